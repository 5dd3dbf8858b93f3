"""What the probe assumes of the platform, and what it promises on any: an answer, soon, with nothing left behind."""

import os
import platform
import signal
import threading
from pathlib import Path

import pytest

from colmeia.host.facts import find_facts
from colmeia.host.kvm import DEVICE, probe_kvm, read_tsc_khz
from colmeia.host.machine_code import measure_loop_rate, measure_tsc_khz

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the probe's code is x86-64")
needs_kvm = pytest.mark.skipif(not os.access(DEVICE, os.R_OK | os.W_OK), reason="no /dev/kvm that opens")

HAS_VIRTUALIZATION = any(
    flag in Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split() for flag in ("vmx", "svm")
)


@needs_kvm
def test_the_verdict_follows_the_hardware_and_does_not_waver() -> None:
    probes = [probe_kvm() for _ in range(10)]
    assert all(probe.present for probe in probes)
    assert [probe.usable for probe in probes] == [HAS_VIRTUALIZATION] * len(probes), [probe.reason for probe in probes]


@needs_kvm
def test_the_reason_carries_the_measured_rates() -> None:
    probe = probe_kvm()
    assert probe.million_instructions_per_s is not None
    assert str(probe.million_instructions_per_s) in probe.reason
    assert str(probe.host_million_instructions_per_s) in probe.reason


@pytest.mark.parametrize(
    ("device", "present", "reason"),
    [("/nowhere/kvm", False, "No such file"), ("/dev/null", True, "Inappropriate ioctl"), ("/", True, "directory")],
)
def test_what_is_not_kvm_is_unusable_with_the_systems_own_words(device: str, present: bool, reason: str) -> None:
    probe = probe_kvm(Path(device))
    assert (probe.present, probe.usable) == (present, False)
    assert reason in probe.reason


def test_the_probe_leaves_no_descriptor_thread_mapping_or_signal_mask_behind() -> None:
    def left() -> tuple[int, int, int, set[int]]:
        mapped = Path("/proc/self/maps").read_text().count("anon_inode:kvm")
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), mapped, set(mask)

    probe_kvm()
    before = left()
    for _ in range(5):
        probe_kvm()
        read_tsc_khz()
    assert left() == before


def test_the_probe_runs_in_any_thread_and_in_several_at_once() -> None:
    verdicts: list[bool] = []
    threads = [threading.Thread(target=lambda: verdicts.append(probe_kvm().usable)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(verdicts)) == 1
    assert len(verdicts) == len(threads)


def test_this_process_may_run_the_yardstick() -> None:
    rate = measure_loop_rate()
    assert rate is None or rate > 10


@needs_kvm
def test_the_measured_clock_rate_agrees_with_kvms() -> None:
    known, measured = read_tsc_khz(), measure_tsc_khz()
    if known is None or measured is None:
        pytest.skip("one of the two is not to be had here")
    assert abs(known - measured) / known < 0.005


def test_facts_keep_what_qemu_said_until_the_binary_changes(tmp_path: Path) -> None:
    cache = tmp_path / "qemu.json"
    first = find_facts(cache)
    assert first.qemu_version >= (7, 2, 0)
    assert first.qemu_machine.startswith("pc-q35-")
    assert first.qemu_machine != "q35"
    kept = cache.read_text()
    cache.write_text(kept.replace(first.qemu_machine, "pc-q35-1.0"))
    assert find_facts(cache).qemu_machine == "pc-q35-1.0"
    cache.write_text(cache.read_text().replace('"size": ', '"size": 1'))
    assert find_facts(cache).qemu_machine == first.qemu_machine
    cache.write_text("not JSON")
    assert find_facts(cache).qemu_machine == first.qemu_machine


def test_facts_come_without_qemu_and_without_a_cache_that_can_be_written(tmp_path: Path) -> None:
    facts = find_facts(tmp_path / "no" / "such" / "folder" / "qemu.json", qemu="no-such-qemu")
    assert (facts.qemu_binary, facts.qemu_version, facts.qemu_machine) == ("", (0, 0, 0), "")
    assert facts.cpus >= 1
    assert facts.memory_bytes > 0
