"""The pure parts of the image builders: module order, initial RAM disk, package sources, GRUB's sectors."""

import struct

from hypothesis import given
from hypothesis import strategies as st

from colmeia.storage.build_debian import Source, patch_boot_sector, patch_core, read_sources
from colmeia.storage.build_tiny import Entry, make_cpio, order_modules

NAMES = [f"m{number}" for number in range(8)]


def read_cpio(data: bytes) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    found, at = {}, 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, device, name_size = fields[1], fields[6], (fields[9], fields[10]), fields[11]
        name = data[at + 110 : at + 110 + name_size - 1].decode()
        at = (at + 110 + name_size + 3) // 4 * 4
        if name == "TRAILER!!!":
            return found
        found[name] = (mode, data[at : at + size], device)
        at = (at + size + 3) // 4 * 4


@given(st.dictionaries(st.text("abc/-", min_size=1, max_size=9), st.binary(max_size=50), max_size=6))
def test_every_file_of_the_initial_ram_disk_can_be_read_back(files: dict[str, bytes]) -> None:
    entries = {name: Entry(0o100644, data) for name, data in files.items()}
    assert {name: data for name, (_, data, _) in read_cpio(make_cpio(entries)).items()} == files


def test_a_device_node_keeps_its_numbers() -> None:
    assert read_cpio(make_cpio({"dev/console": Entry(0o020600, device=(5, 1))})) == {
        "dev/console": (0o020600, b"", (5, 1))
    }


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)).filter(lambda pair: pair[0] > pair[1])))
def test_every_module_comes_after_what_it_needs(pairs: list[tuple[str, str]]) -> None:
    needs = {name: tuple(need for user, need in pairs if user == name) for name in NAMES}
    order = order_modules(NAMES, needs)
    assert sorted(order) == NAMES
    assert all(order.index(need) < order.index(user) for user, need in pairs)


def test_built_in_modules_are_left_out() -> None:
    assert order_modules(["virtio-rng", "ext4"], {"virtio_rng": ("virtio",), "virtio": ()}) == ["virtio", "virtio_rng"]


DEB822 = """# from the installer
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates bookworm-backports
Components: main contrib
Signed-By: /usr/share/keyrings/debian.gpg

Types: deb
URIs: https://vendor.example/apt
Suites: nodistro
Components: main
"""
ONE_LINE = """# comment
deb http://mirror.example/security bookworm-security main
deb [signed-by=/k.gpg arch=amd64] http://other.example/debian bookworm main non-free
deb https://vendor.example/apt cloud-bookworm main
"""


def test_only_the_releases_own_sources_are_taken() -> None:
    key = "signed-by=/usr/share/keyrings/debian.gpg"
    assert read_sources([DEB822, ONE_LINE], "bookworm") == [
        Source(key, "http://mirror.example/debian", "bookworm", "main"),
        Source(key, "http://mirror.example/debian", "bookworm-updates", "main"),
        Source("", "http://mirror.example/security", "bookworm-security", "main"),
        Source("signed-by=/k.gpg arch=amd64", "http://other.example/debian", "bookworm", "main"),
    ]
    assert str(read_sources([ONE_LINE], "bookworm")[0]) == "deb http://mirror.example/security bookworm-security main"


def test_the_boot_sector_loads_the_core_and_keeps_the_partition_table() -> None:
    mbr = bytes(440) + b"T" * 72
    sector = patch_boot_sector(b"\xeb" * 512, mbr, 2048)
    assert struct.unpack_from("<Q", sector, 0x5C) == (2048,)
    assert sector[440:] == mbr[440:]
    assert len(sector) == 512


def test_the_core_knows_where_the_rest_of_it_is() -> None:
    core = patch_core(b"c" * 1300, 2048)
    assert len(core) == 3 * 512
    assert struct.unpack_from("<QH", core, 500) == (2049, 2)
    assert core[510:512] == b"cc"
