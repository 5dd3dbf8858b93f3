"""The NoCloud seed."""

import io
import json
from typing import Any

import pycdlib
import pytest

from colmeia.model.vm import CloudInit
from colmeia.storage.seed import build_seed, seed_files

VM = "00112233445566aa"


def user_data(cloud_init: CloudInit) -> dict[str, Any]:
    head, _, body = seed_files(VM, "web1", cloud_init)["user-data"].partition("\n")
    assert head == "#cloud-config"
    return json.loads(body)


def read(seed: bytes, file: str, *, joliet: bool) -> bytes:
    iso, out = pycdlib.PyCdlib(), io.BytesIO()
    iso.open_fp(io.BytesIO(seed))
    if joliet:
        iso.get_file_from_iso_fp(out, joliet_path=f"/{file}")
    else:
        iso.get_file_from_iso_fp(out, rr_path=f"/{file}")
    iso.close()
    return out.getvalue()


@pytest.mark.parametrize("joliet", [True, False])
def test_the_seed_is_a_volume_named_cidata_with_the_three_files(joliet: bool) -> None:
    seed = build_seed(VM, "web1", CloudInit(ssh_keys=("ssh-ed25519 AAAA me",)))
    assert seed[32768 + 40 : 32768 + 46] == b"cidata"
    for name, text in seed_files(VM, "web1", CloudInit(ssh_keys=("ssh-ed25519 AAAA me",))).items():
        assert read(seed, name, joliet=joliet).decode() == text


def test_the_vm_gives_name_and_instance() -> None:
    meta = json.loads(seed_files(VM, "web1", CloudInit())["meta-data"])
    assert meta == {"instance-id": VM, "local-hostname": "web1"}
    assert json.loads(seed_files(VM, "web1", CloudInit(hostname="db"))["meta-data"])["local-hostname"] == "db"


def test_a_named_user_gets_the_keys_and_may_become_root() -> None:
    (user,) = user_data(CloudInit(user="ana", ssh_keys=("ssh-ed25519 AAAA me",)))["users"]
    assert user["name"] == "ana"
    assert user["ssh_authorized_keys"] == ["ssh-ed25519 AAAA me"]
    assert "NOPASSWD" in user["sudo"]


def test_without_a_name_the_keys_go_to_the_images_own_user() -> None:
    found = user_data(CloudInit(ssh_keys=("ssh-ed25519 AAAA me",)))
    assert found["users"] == ["default"]
    assert found["ssh_authorized_keys"] == ["ssh-ed25519 AAAA me"]


def test_a_key_cannot_break_out_of_its_place() -> None:
    evil = 'ssh-ed25519 AAAA "]}, {"runcmd": ["reboot"]}, #'
    found = user_data(CloudInit(ssh_keys=(evil,)))
    assert found["ssh_authorized_keys"] == [evil]
    assert "runcmd" not in found


def test_own_user_data_and_network_config_are_handed_on_unchanged() -> None:
    wish = CloudInit(user_data="#!/bin/sh\ntrue\n", network_config="version: 2\n")
    files = seed_files(VM, "web1", wish)
    assert (files["user-data"], files["network-config"]) == ("#!/bin/sh\ntrue\n", "version: 2\n")


def test_each_mac_gets_an_address_by_dhcp() -> None:
    macs = ("52:54:00:00:00:01", "52:54:00:00:00:02")
    network = json.loads(seed_files(VM, "web1", CloudInit(), macs)["network-config"])
    assert [nic["match"]["macaddress"] for nic in network["ethernets"].values()] == list(macs)
    assert all(nic["dhcp4"] for nic in network["ethernets"].values())
