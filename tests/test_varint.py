from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedobd import DecodeError, DecodeReason
from fedobd.codec import MAX_VARINT_BYTES, read_varint, write_varint
from fedobd.payload._cursor import Cursor
from tests.helpers import law

LARGEST = 2**63 - 1

BY_HAND = {
    0: b"\0",
    1: b"\1",
    127: b"\x7f",
    128: b"\x80\1",
    300: b"\xac\2",
    16383: b"\xff\x7f",
    16384: b"\x80\x80\1",
    2**32: b"\x80\x80\x80\x80\x10",
    LARGEST: b"\xff" * 8 + b"\x7f",
}


def refuse(data: bytes, reason: DecodeReason, match: str) -> None:
    """Check that both readers refuse the bytes alike."""
    with pytest.raises(DecodeError, match=match) as caught:
        read_varint(memoryview(data), 0, "the number")
    assert caught.value.reason is reason
    with pytest.raises(DecodeError, match="the number") as caught:
        Cursor(memoryview(data)).varint("the number")
    assert caught.value.reason is reason


@pytest.mark.parametrize("value", BY_HAND)
def test_values_worked_by_hand(value: int) -> None:
    data = BY_HAND[value]
    assert write_varint(value) == data
    assert read_varint(memoryview(data), 0, "it") == (value, len(data))


@law(100)
@given(st.integers(0, LARGEST), st.binary(max_size=12), st.binary(max_size=12))
def test_round_trip_in_as_few_bytes_as_it_takes(value: int, before: bytes, after: bytes) -> None:
    data = write_varint(value)
    assert len(data) == max(1, -(-value.bit_length() // 7)) <= MAX_VARINT_BYTES
    whole = memoryview(before + data + after)
    assert read_varint(whole, len(before), "it") == (value, len(before) + len(data))
    cursor = Cursor(whole)
    cursor.take(len(before), "what stands before")
    assert cursor.varint("it") == value
    assert cursor.position == len(before) + len(data)


@law(100)
@given(st.binary(max_size=14))
def test_bytes_are_a_number_in_one_way_only(data: bytes) -> None:
    try:
        value, position = read_varint(memoryview(data), 0, "it")
    except DecodeError as error:
        refuse(data, error.reason, "it|the number")
        return
    assert 0 <= value <= LARGEST
    assert write_varint(value) == data[:position]
    assert Cursor(memoryview(data)).varint("it") == value


@law(100)
@given(st.integers(0, LARGEST), st.integers(1, 12))
def test_longer_than_it_has_to_be_is_refused(value: int, padding: int) -> None:
    data = write_varint(value)
    longer = data[:-1] + bytes([data[-1] | 0x80]) + b"\x80" * (padding - 1) + b"\0"
    refuse(longer, DecodeReason.FIELD, "the number at offset 0 is not a proper number")


@law(100)
@given(st.integers(128, LARGEST))
def test_cut_number_is_refused(value: int) -> None:
    data = write_varint(value)
    for length in range(len(data)):
        refuse(data[:length], DecodeReason.TRUNCATED, "the payload ends inside the number")


@pytest.mark.parametrize("value", [2**63, 2**63 + 1, 2**64 - 1, 2**64, 2**200])
def test_number_from_2_to_the_63_is_refused(value: int) -> None:
    refuse(write_varint(value), DecodeReason.FIELD, "the number at offset 0 is not a proper")


def test_endless_number_is_not_read_to_its_end() -> None:
    cursor = Cursor(memoryview(b"\xff" * 1000))
    with pytest.raises(DecodeError, match="not a proper number"):
        cursor.varint("the number")
    assert cursor.position <= 2 * MAX_VARINT_BYTES
