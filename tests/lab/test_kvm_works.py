"""On a host whose KVM works, the probe says so. This host is itself emulated: only ratios of speeds mean anything."""

from pathlib import Path

from colmeia.host.kvm import probe_kvm, read_tsc_khz


def test_the_kernel_offers_kvm() -> None:
    assert Path("/sys/module/kvm_amd").is_dir()
    assert Path("/dev/kvm").is_char_device()


def test_the_probe_says_usable() -> None:
    probes = [probe_kvm() for _ in range(5)]
    for probe in probes:
        print(probe)
    assert all(probe.present and probe.usable for probe in probes), probes


def test_kvm_knows_the_rate_of_the_clock() -> None:
    assert read_tsc_khz()
