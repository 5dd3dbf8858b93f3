"""What a host can do, as found by looking: facts for decisions, checks for people."""

from enum import StrEnum

from pydantic import Field

from colmeia.model.base import Model


class Verdict(StrEnum):
    OK = "ok"
    DEGRADED = "degraded"
    MISSING = "missing"


class Check(Model):
    """One line of the doctor."""

    name: str = Field(examples=["kvm"])
    verdict: Verdict
    finding: str = Field(description="What was seen, with figures.")
    why: str = Field(description="Why it matters.")
    mend: str = Field(default="", description="What to do about it; empty when all is well.")


class KvmProbe(Model):
    """Whether KVM *runs a guest* at native speed, not whether a device file exists."""

    present: bool
    usable: bool
    reason: str = Field(examples=["guest ring 0 runs at 4 M insn/s: emulated, not native"])
    million_instructions_per_s: int | None = Field(default=None, description="Of the guest's kernel mode.")
    host_million_instructions_per_s: int | None = Field(default=None, description="Of the same loop on the host.")
    duration_ms: float = 0.0


class HostFacts(Model):
    """All that the pure decisions (command line, accelerator) need to know of a host."""

    architecture: str = "x86_64"
    cpus: int
    memory_bytes: int
    qemu_binary: str = Field(default="", description="Path; empty when QEMU is missing.")
    qemu_version: tuple[int, int, int] = (0, 0, 0)
    qemu_machine: str = Field(default="", description="Newest versioned q35 machine, so that a VM keeps its hardware.")
    kvm: KvmProbe
    kvm_gid: int | None = Field(default=None, description="Group that may open /dev/kvm, when not only root may.")
    io_uring: bool = False
    vhost_net: bool = False
    tun: bool = False
    tsc_khz: int | None = Field(default=None, description="Rate of the host's clock, for microvm under TCG.")
    ovmf_code: str = Field(default="", description="UEFI firmware; empty when not installed.")
    ovmf_vars: str = Field(default="", description="Template of the UEFI variables.")
    is_root: bool = True
