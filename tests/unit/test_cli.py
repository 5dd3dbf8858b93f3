"""The command line without a server: parsing, rendering, exit codes, what is imported."""

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from colmeia.cli import image, output, vm, vm_spec
from colmeia.cli.escape import EscapeFilter
from colmeia.cli.main import NOUNS, run
from colmeia.client import ClientError

VM = {
    "name": "web1",
    "state": "running",
    "spec": {
        "cpus": 2,
        "memory": "1GiB",
        "disks": [{"name": "root", "image": "tiny"}],
        "nics": [
            {
                "mac": None,
                "forwards": [
                    {"host_address": "127.0.0.1", "host_port": 2222, "guest_port": 22, "protocol": "tcp"},
                    {"host_address": "0.0.0.0", "host_port": 53, "guest_port": 53, "protocol": "udp"},
                ],
            }
        ],
    },
    "runtime": {"accelerator": "tcg", "warnings": []},
    "created_at": "2020-01-01T00:00:00Z",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2222:22", {"host_port": 2222, "guest_port": 22, "protocol": "tcp"}),
        ("53:53/udp", {"host_port": 53, "guest_port": 53, "protocol": "udp"}),
        ("0.0.0.0:80:8080", {"host_address": "0.0.0.0", "host_port": 80, "guest_port": 8080, "protocol": "tcp"}),
    ],
)
def test_a_forward_is_read(text: str, expected: dict[str, object]) -> None:
    assert vm_spec.parse_forward(text) == expected


@pytest.mark.parametrize("text", ["22", "a:b", "1:2:3", ":22", "22:", "22:22/icmp"])
def test_a_wrong_forward_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(ClientError) as caught:
        vm_spec.parse_forward(text)
    assert caught.value.kind == "invalid"
    assert "2222:22" in caught.value.hint


def test_disks_are_the_root_and_the_extra_ones() -> None:
    assert vm_spec.disks("tiny", "5GiB", ["data=1GiB"]) == [
        {"name": "root", "image": "tiny", "size": "5GiB"},
        {"name": "data", "size": "1GiB"},
    ]
    assert vm_spec.disks(None, None, []) == []
    with pytest.raises(ClientError):
        vm_spec.disks(None, None, ["1GiB"])


def test_ssh_keys_come_from_text_or_files_and_private_ones_stay(tmp_path: Path) -> None:
    public = tmp_path / "id.pub"
    public.write_text("# mine\nssh-ed25519 AAAA me@here\n\nssh-rsa BBBB you\n")
    assert vm_spec.read_ssh_keys("ssh-ed25519 AAAA me") == ["ssh-ed25519 AAAA me"]
    assert vm_spec.read_ssh_keys(str(public)) == ["ssh-ed25519 AAAA me@here", "ssh-rsa BBBB you"]
    private = tmp_path / "id"
    private.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    with pytest.raises(ClientError, match="private key"):
        vm_spec.read_ssh_keys(str(private))
    with pytest.raises(ClientError, match="Cannot read"):
        vm_spec.read_ssh_keys(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/srv/Debian_12.qcow2", "debian-12"),
        ("https://example.org/a/disk.img?x=1", "disk"),
        ("debian-12", "debian-12"),
        ("tiny", "tiny"),
    ],
)
def test_an_image_is_named_after_its_source(source: str, name: str) -> None:
    assert image.name_of(source) == name


def test_the_vm_table_shows_what_matters() -> None:
    text = output.render([VM], "table", vm.COLUMNS)
    head, line = text.splitlines()
    assert head.split() == ["NAME", "STATE", "CPUS", "MEMORY", "IMAGE", "ACCEL", "FORWARDS", "AGE"]
    assert line.split()[:7] == ["web1", "running", "2", "1GiB", "tiny", "tcg", "2222:22"]
    assert "0.0.0.0:53:53/udp" in line
    assert output.render([], "table", vm.COLUMNS).splitlines() == [head.split() and "  ".join(vm.COLUMNS)]


def test_json_and_yaml_say_the_same() -> None:
    import yaml

    assert json.loads(output.render(VM, "json")) == yaml.safe_load(output.render(VM, "yaml")) == VM


def test_fields_indent_what_is_inside() -> None:
    text = output.fields(
        {"name": "a", "spec": {"cpus": 1, "disks": [{"name": "root", "size": None}]}, "tags": ["x", "y"]}
    )
    assert text == "name  a\nspec\n  cpus   1\n  disks\n    - name  root\n      size  -\ntags  x, y\n"


def test_a_cell_cannot_steer_the_terminal() -> None:
    assert output.text_of("a\x1b[2Jb\n") == "a?[2Jb?"
    assert [output.text_of(value) for value in (None, "", True, False, 0)] == ["-", "-", "yes", "no", "0"]


@pytest.mark.parametrize(("seconds", "text"), [(5, "5s"), (180, "3m"), (7200, "2h"), (86400 * 12, "12d"), (-3, "0s")])
def test_ages_use_the_largest_unit(seconds: int, text: str) -> None:
    now = datetime.fromtimestamp(1_000_000 + seconds, UTC)
    assert output.age(datetime.fromtimestamp(1_000_000, UTC).isoformat(), now) == text


@pytest.mark.parametrize(
    ("typed", "sent", "is_left"),
    [
        ([b"ls\r"], b"ls\r", False),
        ([b"~."], b"", True),
        ([b"ls\r~", b".more"], b"ls\r", True),
        ([b"a~.b"], b"a~.b", False),
        ([b"\r~~."], b"\r~.", False),
        ([b"~x"], b"~x", False),
        ([b"~\r~."], b"~\r", True),
    ],
)
def test_the_escape_is_found_at_the_start_of_a_line(typed: list[bytes], sent: bytes, is_left: bool) -> None:
    escape = EscapeFilter()
    out = b""
    for part in typed:
        out += escape.feed(part)
        if escape.is_left:
            break
    assert (out, escape.is_left) == (sent, is_left)


def test_an_absent_server_is_exit_code_6(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["vm", "list", "--server", f"unix://{tmp_path}/none.sock"]) == 6
    assert "colmeia serve" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["vm", "create", "x", "--forward", "nonsense"], ["vm", "start"], ["vm", "set", "x"]]
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert "Error:" in capsys.readouterr().err


def test_wrong_options_are_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(["vm", "list", "--bogus"])
    assert caught.value.code == 2
    assert "--bogus" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["doctor"], ["serve"], *([noun] for noun in NOUNS)])
def test_every_help_is_there(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*words, "--help"]) == 0
    assert "Usage: colmeia" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["vm", "create"], ["vm", "console"], ["vm", "exec"], ["image", "import"], ["image", "build"]]
)
def test_the_help_teaches_by_example(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run([*words, "--help"])
    text = capsys.readouterr().out
    assert "For example:" in text
    assert text.count("colmeia " + " ".join(words)) >= 3


def test_a_listing_loads_only_what_it_needs(tmp_path: Path) -> None:
    """The budget of `colmeia vm list` is 0.25 s: these cost most of it."""
    program = (
        "import sys; from colmeia.cli.main import run; run(['vm', 'list', '--server', sys.argv[1]]);"
        "heavy = {'httpx2', 'pydantic', 'rich', 'asyncio', 'anyio', 'yaml', 'docstring_parser'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "none.sock")],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert done.stdout.strip() == "[]"
