# shellcheck shell=bash disable=SC2034
# Sourced by prepare, up and down: where things are in this checkout and on this host.

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$checkout/.venv
colmeia=$venv/bin/colmeia
link=/usr/local/bin/colmeia
unit=/etc/systemd/system/colmeia.service
unset PYTHONDONTWRITEBYTECODE PYTHONPATH PYTHONHOME COLMEIA_SERVER COLMEIA_PROJECT

say() { printf '%s\n' "$*"; }

fail() {
    printf 'Error: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf 'Hint: %s\n' "$2" >&2
    exit 1
}

is_root() { [ "$(id -u)" -eq 0 ]; }

has_systemd() { is_root && [ -d /run/systemd/system ]; }

# Set state, socket and listen as the daemon itself reads them (file, then COLMEIA_… variables).
read_places() {
    local places
    places=$("$venv/bin/python" -c '
from colmeia.settings import read_settings
settings = read_settings(None)
print(settings.state_dir, settings.socket, settings.listen or "-", sep="\n")') || exit 1
    { read -r state && read -r socket && read -r listen; } <<<"$places"
    pid_file=$state/daemon.pid
    started_from=$state/daemon.source
    daemon_log=$state/daemon.log
}

# True when a daemon answers on the local socket.
answers() {
    "$venv/bin/python" -I -S - "$socket" <<'PYTHON'
import socket, sys
try:
    with socket.socket(socket.AF_UNIX) as wire:
        wire.settimeout(5)
        wire.connect(sys.argv[1])
        wire.sendall(b"GET /healthz HTTP/1.1\r\nHost: colmeia\r\nConnection: close\r\n\r\n")
        sys.exit(b" 200 " not in wire.recv(64))
except OSError:
    sys.exit(1)
PYTHON
}

# Print the pid of the daemon that `make up` started, when that process is still it and not a later one of that number.
own_daemon() {
    local pid
    [ -r "$pid_file" ] && read -r pid <"$pid_file" || return 1
    case $(tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null) in
        *"$colmeia serve "*) printf '%s\n' "$pid" ;;
        *) return 1 ;;
    esac
}

# Wait until a command succeeds: wait_until SECONDS COMMAND… False when the time is over.
wait_until() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.1
    done
}

is_gone() { [ ! -d "/proc/$1" ]; }

# End the daemon that `make up` started; VMs go on.
stop_own_daemon() {
    local pid
    if has_systemd && systemctl is-active --quiet colmeia; then
        systemctl stop colmeia
    elif pid=$(own_daemon); then
        kill "$pid"
        wait_until 20 is_gone "$pid" || fail "The daemon (pid $pid) does not end." "Look into $daemon_log."
    fi
    rm -f "$pid_file"
}

# Print the state of a VM or an image (`state_of vm demo`); nothing when there is none of that name.
state_of() {
    local answer status=0
    answer=$("$colmeia" "$1" show "$2" -o json 2>&1) || status=$?
    case $status in
        0) sed -n 's/^ *"state": *"\([a-z]*\)".*/\1/p' <<<"$answer" | head -n 1 ;;
        3) ;;
        *) fail "$answer" ;;
    esac
}
