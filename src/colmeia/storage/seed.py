"""Makes the NoCloud seed: the small ISO that tells cloud-init in a guest its name, user, keys and network.

Pure: values in, bytes out; who writes them where is the caller's affair. Everything is written as JSON, which is YAML
too, so no text of a user can break out of its place. Refuses nothing: the values were checked when they were parsed.
Format: cloud-init's NoCloud data source (a volume labelled `cidata` with user-data, meta-data and network-config).
"""

import io
import json
from collections.abc import Sequence
from typing import Any

from colmeia.model.vm import CloudInit


def build_seed(vm_id: str, name: str, cloud_init: CloudInit, macs: Sequence[str] = ()) -> bytes:
    """Return the ISO 9660 image (Joliet and Rock Ridge) of the seed, about 370 KiB.

    ``macs`` are the NICs that get an address by DHCP; without any, all Ethernet NICs do.
    """
    import pycdlib  # 60 ms, and only needed when a VM is created

    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident="cidata")
    for number, (file, text) in enumerate(seed_files(vm_id, name, cloud_init, macs).items()):
        data = text.encode()
        iso.add_fp(io.BytesIO(data), len(data), f"/F{number}.;1", rr_name=file, joliet_path=f"/{file}")
    out = io.BytesIO()
    iso.write_fp(out)
    iso.close()
    return out.getvalue()


def seed_files(vm_id: str, name: str, cloud_init: CloudInit, macs: Sequence[str] = ()) -> dict[str, str]:
    """Return the files of the seed by name. The instance id is the VM's id: a copied disk is a new instance."""
    hostname = cloud_init.hostname or name
    meta_data = {"instance-id": vm_id, "local-hostname": hostname}
    return {
        "user-data": cloud_init.user_data or "#cloud-config\n" + _json(_user_data(hostname, cloud_init)),
        "meta-data": _json(meta_data),
        "network-config": cloud_init.network_config or _json(_network_config(macs)),
    }


def _user_data(hostname: str, cloud_init: CloudInit) -> dict[str, Any]:
    """A named user may be root; without a name it is the image's own default user (debian, ubuntu…), who may too."""
    user: dict[str, Any] | str = "default"
    if cloud_init.user is not None:
        user = {
            "name": cloud_init.user,
            "shell": "/bin/bash",
            "sudo": "ALL=(ALL) NOPASSWD:ALL",
            "lock_passwd": True,
            "ssh_authorized_keys": list(cloud_init.ssh_keys),
        }
    keys = {"ssh_authorized_keys": list(cloud_init.ssh_keys)} if user == "default" else {}
    return {"hostname": hostname, "manage_etc_hosts": True, "ssh_pwauth": False, "users": [user], **keys}


def _network_config(macs: Sequence[str]) -> dict[str, Any]:
    matches = [{"macaddress": mac} for mac in macs] or [{"name": "e*"}]
    return {
        "version": 2,
        "ethernets": {f"nic{number}": {"match": match, "dhcp4": True} for number, match in enumerate(matches)},
    }


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1) + "\n"
