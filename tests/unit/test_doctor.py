"""The doctor's lines, over little file systems written for the purpose."""

from pathlib import Path

import pytest

from colmeia.host.doctor import examine
from colmeia.host.facts import newest_q35
from colmeia.model.base import GIB
from colmeia.model.host import Check, HostFacts, KvmProbe, Verdict

GOOD = HostFacts(
    cpus=8,
    memory_bytes=32 * GIB,
    qemu_binary="/usr/bin/qemu-system-x86_64",
    qemu_version=(7, 2, 22),
    qemu_machine="pc-q35-7.2",
    kvm=KvmProbe(present=True, usable=True, reason="runs a guest", duration_ms=2),
    io_uring=True,
    vhost_net=True,
    tun=True,
    ovmf_code="/usr/share/OVMF/OVMF_CODE_4M.fd",
    ovmf_vars="/usr/share/OVMF/OVMF_VARS_4M.fd",
)
GOOD_FILES = {
    "proc/cpuinfo": "processor : 0\nflags\t\t: fpu vmx sse2\n",
    "proc/meminfo": "MemTotal: 33554432 kB\nMemAvailable: 30000000 kB\nHugePages_Total:      16\n",
    "sys/kernel/iommu_groups/0/type": "DMA",
    "sys/kernel/mm/ksm/run": "0\n",
    "sys/kernel/mm/transparent_hugepage/shmem_enabled": "always within_size advise [never] deny force\n",
    "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids\n",
    "sys/module/apparmor/parameters/enabled": "Y\n",
    "dev/kvm": "",
}


def root_with(folder: Path, **changes: str | None) -> Path:
    for name, text in {**GOOD_FILES, **{key.replace("__", "/"): value for key, value in changes.items()}}.items():
        if text is not None:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return folder


def line(checks: tuple[Check, ...], name: str) -> Check:
    return next(check for check in checks if check.name == name)


def test_a_good_host_is_ok_in_every_line_that_does_not_ask_the_machine_under_test(tmp_path: Path) -> None:
    checks = examine(GOOD, state=tmp_path, root=root_with(tmp_path))
    asked_of_this_machine = {"programs", "disk"}
    assert {c.name for c in checks if c.verdict is not Verdict.OK} <= asked_of_this_machine, checks


def test_every_line_of_the_issue_is_there_once(tmp_path: Path) -> None:
    names = [check.name for check in examine(GOOD, state=tmp_path, root=tmp_path)]
    wanted = {
        "cpu", "kvm", "qemu", "vhost_net", "tun", "iommu", "huge_pages", "ksm", "cgroups", "confinement", "disk",
        "memory",
    }  # fmt: skip
    assert wanted <= set(names)
    assert len(names) == len(set(names))


def test_on_a_host_with_nothing_every_line_says_why_it_matters_and_every_fault_how_to_mend_it(tmp_path: Path) -> None:
    nothing = HostFacts(cpus=1, memory_bytes=GIB, kvm=KvmProbe(present=False, usable=False, reason="none"))
    checks = examine(nothing, state=tmp_path / "not" / "yet", root=tmp_path)
    for check in checks:
        assert check.finding
        assert check.why.endswith(".")
        assert bool(check.mend) == (check.verdict is not Verdict.OK), check
    assert line(checks, "kvm").verdict is Verdict.MISSING
    assert "apt-get install qemu-system-x86" in line(checks, "qemu").mend


def test_a_kvm_that_is_there_but_runs_no_guest_is_named_with_the_measured_reason(tmp_path: Path) -> None:
    probe = KvmProbe(present=True, usable=False, reason="the guest does 4 M instructions/s", duration_ms=15.4)
    check = line(examine(GOOD.model_copy(update={"kvm": probe}), state=tmp_path, root=root_with(tmp_path)), "kvm")
    assert check.verdict is Verdict.DEGRADED
    assert "present but unusable: the guest does 4 M instructions/s (15 ms)" in check.finding
    assert "TCG" in check.mend


@pytest.mark.parametrize(
    ("name", "changes", "verdict", "words"),
    [
        ("cpu", {"proc__cpuinfo": "flags : fpu svm\n"}, Verdict.OK, "AMD-V"),
        ("cpu", {"proc__cpuinfo": "flags : fpu svmx\n"}, Verdict.MISSING, "neither"),
        ("cgroups", {"sys__fs__cgroup__cgroup.controllers": "cpu memory\n"}, Verdict.DEGRADED, "without io, pids"),
        ("ksm", {"sys__kernel__mm__ksm__run": "1\n"}, Verdict.OK, "merges"),
        ("ksm", {"sys__kernel__mm__ksm__run": None}, Verdict.MISSING, "no KSM"),
        ("confinement", {"sys__module__apparmor__parameters__enabled": "N\n"}, Verdict.MISSING, "neither"),
        ("confinement", {"sys__fs__selinux__enforce": "1"}, Verdict.OK, "SELinux"),
        ("memory", {"proc__meminfo": "MemAvailable: 1000 kB\n"}, Verdict.DEGRADED, "of 32.0 GiB"),
        ("huge_pages", {"proc__meminfo": "HugePages_Total: 0\n"}, Verdict.DEGRADED, "never"),
        ("iommu", {"sys__kernel__iommu_groups__0__type": None}, Verdict.MISSING, "no IOMMU"),
    ],
)
def test_a_line_says_what_was_seen(
    tmp_path: Path, name: str, changes: dict[str, str | None], verdict: Verdict, words: str
) -> None:
    check = line(examine(GOOD, state=tmp_path, root=root_with(tmp_path, **changes)), name)
    assert check.verdict is verdict
    assert words in check.finding


def test_an_old_qemu_is_named_with_the_oldest_that_will_do(tmp_path: Path) -> None:
    check = line(examine(GOOD.model_copy(update={"qemu_version": (6, 0, 1)}), state=tmp_path, root=tmp_path), "qemu")
    assert check.verdict is Verdict.DEGRADED
    assert "6.0.1 is older than 7.2.0" in check.finding


def test_the_newest_machine_is_the_newest_by_number_not_by_spelling() -> None:
    names = ["q35", "pc-q35-9.2", "pc-q35-10.0", "pc-q35-4.0.1", "pc-q35-2.10", "pc-i440fx-11.0"]
    machines = "".join(f"{name:20} Standard PC\n" for name in names)
    assert newest_q35(machines) == "pc-q35-10.0"
    assert newest_q35("microvm              microvm (i386)\n") == ""
