"""A VM's spec: absurd wishes are refused at the edge, with a sentence; good ones survive the wire unchanged."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from colmeia.model.base import GIB, MIB, TIB
from colmeia.model.errors import Conflict
from colmeia.model.vm import CloudInit, Disk, Forward, Machine, Nic, VmCreate, VmSpec, check_fits

FORWARD = {"host_port": 2222, "guest_port": 22}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"memory": "8MiB"}, "between 16 MiB"),
        ({"memory": 16 * MIB + 1}, "whole number of MiB"),
        ({"memory": "17TiB"}, "16 TiB"),
        ({"memory": -1}, "between 0"),
        ({"cpus": 0}, "greater than or equal to 1"),
        ({"cpus": 100_000}, "less than or equal to 512"),
        ({"disks": [{"name": "root"}]}, "needs a size or an image"),
        ({"disks": [{"size": "1KiB"}]}, "between 1 MiB and 64 TiB"),
        ({"disks": [{"size": 65 * TIB}]}, "between 1 MiB and 64 TiB"),
        ({"disks": [{"size": "1G"}, {"size": "2G"}]}, "two disks have the same name"),
        ({"nics": [{"forwards": [FORWARD, FORWARD]}]}, "same host port"),
        ({"nics": [{"forwards": [FORWARD]}, {"forwards": [FORWARD]}]}, "same host port"),
        ({"nics": [{"forwards": [{"host_port": 0, "guest_port": 22}]}]}, "greater than or equal to 1"),
        ({"nics": [{"mac": "52:54:00:00:00:01"}, {"mac": "52:54:00:00:00:01"}]}, "same MAC"),
        ({"nics": [{"mac": "53:54:00:00:00:01"}]}, "pattern"),
        ({"machine": "microvm", "firmware": "uefi"}, "use machine q35"),
        ({"cpu_model": "host,+vmx"}, "pattern"),
        ({"cpu_model": ""}, "pattern"),
        ({"colour": "red"}, "Extra inputs"),
    ],
)
def test_an_absurd_wish_is_refused_with_a_sentence(spec: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as refused:
        VmSpec.model_validate(spec)
    assert words in str(refused.value)


def test_the_same_port_may_be_forwarded_for_both_protocols() -> None:
    forwards = (Forward(host_port=53, guest_port=53), Forward(host_port=53, guest_port=53, protocol="udp"))
    assert VmSpec(nics=(Nic(forwards=forwards),)).nics[0].forwards == forwards


def test_a_line_break_cannot_be_smuggled_into_a_key_a_user_or_an_address() -> None:
    for wrong in ({"ssh_keys": ["ssh-ed25519 AAAA\nroot"]}, {"user": "root\n"}, {"user": "Root"}, {"user": "a b"}):
        with pytest.raises(ValidationError):
            CloudInit.model_validate(wrong)
    with pytest.raises(ValidationError):
        Forward.model_validate({**FORWARD, "host_address": "127.0.0.1,guestfwd=tcp"})


SPECS = st.builds(
    VmSpec,
    cpus=st.integers(min_value=1, max_value=512),
    memory=st.integers(min_value=16, max_value=16 * 1024 * 1024).map(lambda mib: mib * MIB),
    machine=st.sampled_from(Machine),
    disks=st.lists(
        st.builds(
            Disk,
            name=st.from_regex(r"[a-z]([a-z0-9-]{0,13}[a-z0-9])?", fullmatch=True),
            image=st.none(),
            size=st.integers(min_value=MIB, max_value=64 * TIB),
        ),
        max_size=4,
        unique_by=lambda disk: disk.name,
    ).map(tuple),
    firmware=st.none(),
    cpu_model=st.just("auto"),
    nics=st.just((Nic(),)),
    cloud_init=st.none(),
    kernel_arguments=st.text(max_size=50),
)


@given(SPECS)
def test_a_spec_survives_the_wire_unchanged(spec: VmSpec) -> None:
    assert VmSpec.model_validate_json(spec.model_dump_json()) == spec


@given(SPECS, st.integers(min_value=1, max_value=256), st.integers(min_value=1, max_value=4096))
def test_a_spec_fits_a_host_or_is_refused_with_the_hosts_figures(spec: VmSpec, cpus: int, gib: int) -> None:
    try:
        check_fits(spec, cpus=cpus, memory_bytes=gib * GIB)
    except Conflict as refused:
        assert refused.code in ("memory_exceeds_host", "cpus_exceed_host")
        assert spec.memory > gib * GIB or spec.cpus > 8 * cpus
    else:
        assert spec.memory <= gib * GIB
        assert spec.cpus <= 8 * cpus


def test_what_is_not_said_has_a_sensible_default() -> None:
    wish = VmCreate.model_validate({"name": "web1"})
    assert (wish.spec.cpus, wish.spec.memory, wish.spec.machine, wish.start) == (1, 512 * MIB, Machine.Q35, False)
