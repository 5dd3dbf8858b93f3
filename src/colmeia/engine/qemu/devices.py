"""What a QEMU machine is made of, as data that serves both the command line and hot-plug.

A description knows its JSON form and nothing else: `argument()` puts it on the command line, `qmp()` is the same data
for `device_add`, `blockdev-add`, `object-add` and `netdev_add`. It refuses to decide: which devices a VM gets, and
where they sit, is `command`'s business.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

Json = str | int | bool | None | Mapping[str, "Json"] | Sequence["Json"]


@dataclass(frozen=True, slots=True)
class Description:
    """Named data under one option of QEMU, in the order in which it was written down."""

    option: ClassVar[str]
    command: ClassVar[str]
    kind_key: ClassVar[str]
    name_key: ClassVar[str] = "id"

    kind: str
    id: str
    properties: Mapping[str, Json] = field(default_factory=dict)

    def qmp(self) -> dict[str, Json]:
        """Return the arguments of the QMP command that adds it to a running machine (`command`)."""
        return {self.kind_key: self.kind, self.name_key: self.id, **self.properties}

    def argument(self) -> tuple[str, str]:
        """Return the option and its JSON value for the command line."""
        return self.option, json.dumps(self.qmp(), separators=(",", ":"))


class Device(Description):
    """A front end the guest sees."""

    option = "-device"
    command = "device_add"
    kind_key = "driver"


class BlockNode(Description):
    """One node of a block graph. `backing` is always said, so no header decides what is opened."""

    option = "-blockdev"
    command = "blockdev-add"
    kind_key = "driver"
    name_key = "node-name"


class Object(Description):
    """A back end: memory, I/O thread, random numbers."""

    option = "-object"
    command = "object-add"
    kind_key = "qom-type"


class Netdev(Description):
    """The host side of a network card."""

    option = "-netdev"
    command = "netdev_add"
    kind_key = "type"


@dataclass(frozen=True, slots=True)
class SocketChardev:
    """A character device on a listening UNIX socket that QEMU is handed (`key` names the descriptor).

    `-chardev` knows no JSON in QEMU 7.2, so this one is written by hand. Nothing from outside gets into it.
    """

    id: str
    fd: str
    log: str = ""

    def argument(self) -> tuple[str, str]:
        log = f",logfile={self.log},logappend=on" if self.log else ""
        return "-chardev", f"socket,id={self.id},fd={self.fd},server=on,wait=off{log}"
