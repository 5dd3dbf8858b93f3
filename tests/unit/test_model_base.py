"""Sizes, names and ids: what is parsed at the edge is exact, or refused."""

import re
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from colmeia.model.base import GIB, ID_PATTERN, KIB, MIB, SIZE_PATTERN, TIB, Name, Size, format_size, new_id, parse_size
from colmeia.model.vm import mac_for

SIZES = st.integers(min_value=0, max_value=(1 << 62) - 1)
NAMES: TypeAdapter[str] = TypeAdapter(Name)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("512", 512), ("1B", 1), ("1K", KIB), ("4kib", 4 * KIB), ("512MiB", 512 * MIB), ("2 GiB", 2 * GIB),
        ("1.5GiB", 3 * GIB // 2), (" 3T ", 3 * TIB), ("0.5K", 512), (7, 7),
    ],
)  # fmt: skip
def test_a_size_is_read_in_binary_units(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "value",
    ["", "GiB", "-1", "1e3", "1,5G", "1 GB", "1PiB", "0.1B", "1.0000000001G", "4194304T", "9" * 30, "1G1", "٣GiB",
     -1, 1 << 62, True, 1.5, None, [], b"1"],
)  # fmt: skip
def test_what_is_not_an_exact_size_is_refused(value: object) -> None:
    with pytest.raises(ValueError):
        parse_size(value)


@given(SIZES)
def test_a_size_that_is_written_reads_back_exactly(size: int) -> None:
    text = format_size(size)
    assert parse_size(text) == size
    assert re.fullmatch(SIZE_PATTERN, text)


@given(SIZES)
def test_a_size_travels_as_text_and_arrives_as_bytes(size: int) -> None:
    adapter: TypeAdapter[int] = TypeAdapter(Size)
    assert adapter.validate_json(adapter.dump_json(size)) == size


@given(st.text(max_size=40))
def test_any_text_is_a_size_or_a_value_error(text: str) -> None:
    with suppress(ValueError):
        assert parse_size(text) >= 0


@pytest.mark.parametrize("name", ["a", "web1", "1", "a-b", "a" * 63, "0123456789abcde", "0123456789abcdefa"])
def test_a_host_name_label_is_a_name(name: str) -> None:
    assert NAMES.validate_python(name) == name


@pytest.mark.parametrize(
    "name", ["", "-a", "a-", "A", "a_b", "a.b", "a b", "a" * 64, "a\n", "é", "../etc", "0123456789abcdef"]
)
def test_what_is_no_label_or_looks_like_an_id_is_no_name(name: str) -> None:
    with pytest.raises(ValidationError):
        NAMES.validate_python(name)


@given(st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True))
def test_no_name_can_be_taken_for_an_id(name: str) -> None:
    try:
        NAMES.validate_python(name)
    except ValidationError:
        assert re.fullmatch(ID_PATTERN, name)
    else:
        assert not re.fullmatch(ID_PATTERN, name)


def test_ids_are_sixteen_hexadecimal_digits_and_differ() -> None:
    ids = {new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(re.fullmatch(ID_PATTERN, one) for one in ids)


@given(st.from_regex(ID_PATTERN, fullmatch=True).map(str.strip), st.integers(min_value=0, max_value=7))
def test_a_mac_is_qemus_prefix_and_the_same_every_time(vm_id: str, index: int) -> None:
    mac = mac_for(vm_id, index)
    assert re.fullmatch(r"52:54:00(:[0-9a-f]{2}){3}", mac)
    assert mac == mac_for(vm_id, index)
    assert mac != mac_for(vm_id, index + 1)
