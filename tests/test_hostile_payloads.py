"""Payloads that are cut, altered, added to, made up or illegal: a value or a DecodeError."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedobd import DecodeError, DecodeReason
from fedobd.blocks import ModelSchema, ModelState
from fedobd.codec import NNADQ, Coding, Stochastic
from fedobd.payload import Kind, Payload
from tests.helpers import (
    buffer,
    encode,
    header_of,
    law,
    make_schema,
    parameter,
    random_state,
    read_all,
    with_checksum,
)
from tests.test_payload import CASES, Case, cases, every_case


def expect(reason: DecodeReason, data: bytes, schema: ModelSchema, match: str = "") -> None:
    with pytest.raises(DecodeError, match=match) as caught:
        read_all(data, schema)
    assert caught.value.reason is reason


def value_or_decode_error(data: bytes, schema: ModelSchema) -> DecodeReason | None:
    """Decode all; any exception but DecodeError passes through and fails the test."""
    try:
        read_all(data, schema)
    except DecodeError as error:
        return error.reason
    return None


# --- altered without a checksum that holds, for another model ------------------------------------
# `test_hostile_corpus` cuts, lengthens and alters golden payloads under a checksum that holds.


def test_each_altered_byte_is_refused() -> None:
    data, schema = CASES["broadcast of all types"].encode(), CASES["broadcast of all types"].schema
    for position in range(len(data)):
        for change in (0x01, 0x80, 0xFF):
            altered = bytearray(data)
            altered[position] ^= change
            reason = value_or_decode_error(bytes(altered), schema)
            assert reason in (DecodeReason.CHECKSUM, DecodeReason.VERSION), position


@every_case
def test_payload_of_another_model_is_refused(name: str) -> None:
    other = make_schema([parameter("w", 3, 5)])
    expect(DecodeReason.SCHEMA, CASES[name].encode(), other, "is for another model")


def test_other_version_and_magic_are_refused() -> None:
    data, schema = CASES["broadcast nnadq"].encode(), CASES["broadcast nnadq"].schema
    for version in (0, 1, 3, 255):
        altered = with_checksum(data[:4] + bytes([version]) + data[5:])
        expect(DecodeReason.VERSION, altered, schema, rf"format version {version} came; .* 2")
    expect(DecodeReason.VERSION, b"PK\3\4" + data[4:], schema, r"no payload of fedobd: .*b'FOBD'")


# --- damaged at random ---------------------------------------------------------------------------


@law(100)
@given(cases(), st.data())
def test_damage_gives_a_value_or_decode_error(case: Case, data: st.DataObject) -> None:
    whole = bytearray(case.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(whole) - 1))
        whole[position : position + 1] = data.draw(st.binary(max_size=3))
    value_or_decode_error(with_checksum(bytes(whole)), case.schema)


@law(100)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    schema = CASES["broadcast nnadq"].schema
    assert value_or_decode_error(data, schema) is not None
    assert value_or_decode_error(with_checksum(data + b"????"), schema) is not None


@law(100)
@given(st.sampled_from(sorted(CASES)), st.integers(8, 120), st.binary(max_size=200))
def test_random_tail_gives_a_value_or_decode_error(name: str, keep: int, tail: bytes) -> None:
    head = CASES[name].encode()[:keep]
    value_or_decode_error(with_checksum(head + tail + b"????"), CASES[name].schema)


# --- illegal fields ------------------------------------------------------------------------------


# One float32 tensor in levels. Offsets: 5 kind, 7 flags, 29 bitmap, 30 coding, 31 number of
# levels (one byte), 32 offset, 36 range, 40 length of the frame (one byte).
LEVELS_SCHEMA = make_schema([parameter("w", 4)])

LEVELS_STATE: ModelState = {"w": torch.tensor([0.5, -1.0, 0.25, 1.0])}


def f32(value: float) -> bytes:
    return struct.pack("<f", value)


def put(data: bytes, position: int, length: int, new: bytes) -> bytes:
    """Put other bytes in the place of some, under a checksum that holds."""
    return with_checksum(data[:position] + new + data[position + length :])


def varint_of(value: int) -> bytes:
    """LEB128 of any size, written apart from the package's."""
    digits = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([*(digit | 0x80 for digit in digits[:-1]), digits[-1]])


IMPROPER = DecodeReason.FIELD, "the number of levels of tensor 'w' .* is not a proper number"

HOSTILE = [
    (5, 1, b"\4", DecodeReason.KIND, "payload kind 4 is not known"),
    (5, 1, b"\2", DecodeReason.FIELD, "a client's report stands where none belongs, or lacks"),
    (7, 1, b"\1", DecodeReason.FIELD, "a client's report stands where none belongs, or lacks"),
    (7, 1, b"\x40", DecodeReason.FIELD, "flags 0x40 hold an unknown bit"),
    (7, 1, b"\x80", DecodeReason.FIELD, "flags 0x80 hold an unknown bit"),
    (29, 1, b"\3", DecodeReason.FIELD, "the block bitmap names a block past the last"),
    (29, 1, b"\0", DecodeReason.TRAILING, "bytes follow the last frame"),
    (30, 1, b"\4", DecodeReason.FIELD, "coding of tensor 'w' at offset 30 is 4, which is not"),
    (30, 1, b"\3", DecodeReason.FIELD, "coding MASKED of tensor 'w' at offset 30 is not allowed"),
    (31, 1, b"\0", DecodeReason.LIMIT, "0 levels of tensor 'w' .* allowed are 1 to 4194304"),
    (31, 1, varint_of(2**22 + 1), DecodeReason.LIMIT, "4194305 levels of tensor 'w'"),
    (31, 1, varint_of(2**32 - 1), DecodeReason.LIMIT, "4294967295 levels of tensor 'w'"),
    (31, 1, varint_of(2**63 - 1), DecodeReason.LIMIT, "9223372036854775807 levels of tensor"),
    (31, 1, varint_of(2**63), *IMPROPER),
    (31, 1, b"\xff" * 300, *IMPROPER),
    (31, 1, b"\xc2\0", *IMPROPER),
    (31, 1, b"\xc2\x80\x80\0", *IMPROPER),
    (32, 4, f32(math.nan), DecodeReason.FIELD, "range 1.0 and offset nan of tensor 'w'"),
    (32, 4, f32(-math.inf), DecodeReason.FIELD, "range 1.0 and offset -inf of tensor 'w'"),
    (32, 4, f32(1.1 * 2.0**126), DecodeReason.FIELD, "of tensor 'w' .* out of range"),
    (36, 4, f32(0.0), DecodeReason.FIELD, "range 0.0 and offset 0.0 of tensor 'w'"),
    (36, 4, f32(-1.0), DecodeReason.FIELD, "range -1.0 and offset 0.0 of tensor 'w'"),
    (36, 4, f32(math.nan), DecodeReason.FIELD, "range nan and offset 0.0 of tensor 'w'"),
    (36, 4, f32(math.inf), DecodeReason.FIELD, "range inf and offset 0.0 of tensor 'w'"),
    (36, 4, f32(1.1 * 2.0**126), DecodeReason.FIELD, "of tensor 'w' .* out of range"),
    (40, 1, varint_of(2000), DecodeReason.TRUNCATED, "ends inside the levels of block 'b0'"),
    (40, 1, varint_of(4102), DecodeReason.LIMIT, "say they take 4102 bytes; wanted at most 4101"),
    (40, 1, varint_of(2**62), DecodeReason.LIMIT, "the levels of block 'b0' say they take 4611"),
    (40, 1, b"\x80\0", DecodeReason.FIELD, "the length of the levels of block 'b0' .* proper"),
    (40, 1, b"\0", DecodeReason.TRAILING, "bytes follow the last frame"),
]


@pytest.mark.parametrize(("position", "length", "new", "reason", "match"), HOSTILE)
def test_illegal_field_is_refused(
    position: int, length: int, new: bytes, reason: DecodeReason, match: str
) -> None:
    data = encode(LEVELS_SCHEMA, LEVELS_STATE, None, NNADQ(0.01))
    read_all(data, LEVELS_SCHEMA)
    assert data[31] == 66
    assert data[40] == len(data) - 41 - 4
    altered = put(data, position, length, new)
    assert altered != data
    expect(reason, altered, LEVELS_SCHEMA, match)


@pytest.mark.parametrize("num_levels", [3, 5, 2**22])
@pytest.mark.parametrize("sign", [1, -1])
def test_largest_legal_levels_decode_to_finite_values(num_levels: int, sign: int) -> None:
    data = encode(LEVELS_SCHEMA, LEVELS_STATE, None, Stochastic(num_levels))
    start = 31 + len(varint_of(num_levels))
    assert data[start : start + 8] == f32(0.0) + f32(1.0)
    altered = put(data, start, 8, f32(sign * 2.0**126) + f32(2.0**126))
    ((_, segments),) = Payload.parse(altered, LEVELS_SCHEMA).blocks()
    assert bool(torch.isfinite(segments[0].values).all())
    assert float(segments[0].values.abs().max()) == 2.0**127


def test_other_number_of_levels_is_refused_or_decodes_to_finite_values() -> None:
    data = encode(LEVELS_SCHEMA, LEVELS_STATE, None, Stochastic(3))
    for num_levels in (1, 2, 4, 5, 100, 2048, 2**22):
        altered = put(data, 31, 1, varint_of(num_levels))
        assert value_or_decode_error(altered, LEVELS_SCHEMA) in (None, DecodeReason.STREAM)


def test_only_a_server_refers_to_the_initial_model() -> None:
    data = encode(LEVELS_SCHEMA, LEVELS_STATE, header_of(LEVELS_SCHEMA, start=b"f" * 16))
    assert read_all(data, LEVELS_SCHEMA).header.start == b"f" * 16
    assert len(data) == 29 + 16 + 1 + 4
    wanted = "only a server's payload stands for a model"
    expect(DecodeReason.FIELD, put(data, 5, 1, bytes([Kind.DELIVERY])), LEVELS_SCHEMA, wanted)
    upload = encode(LEVELS_SCHEMA, LEVELS_STATE, header_of(LEVELS_SCHEMA, Kind.UPLOAD))
    forged = put(upload, 7, 1, bytes([upload[7] | 32]))
    expect(DecodeReason.FIELD, forged, LEVELS_SCHEMA, wanted)


def test_illegal_coding_of_a_buffer_is_refused() -> None:
    schema = make_schema([buffer("mean", 2), parameter("w", 2)])
    data = encode(schema, random_state(schema, 1))
    for coding in (Coding.CONSTANT, Coding.LEVELS, Coding.MASKED):
        altered = with_checksum(data[:30] + bytes([coding]) + data[31:])
        expect(DecodeReason.FIELD, altered, schema, f"coding {coding.name} of tensor 'mean'")


def test_levels_of_an_empty_tensor_are_refused() -> None:
    schema = make_schema([parameter("empty", 0), parameter("w", 2)])
    data = encode(schema, random_state(schema, 1))
    for coding in (Coding.CONSTANT, Coding.LEVELS):
        altered = with_checksum(data[:30] + bytes([coding]) + data[31:])
        expect(DecodeReason.FIELD, altered, schema, f"coding {coding.name} of tensor 'empty'")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("is_buffer", [False, True])
def test_raw_value_that_is_not_finite_is_refused(value: float, is_buffer: bool) -> None:
    bad = buffer("bad", 1) if is_buffer else parameter("bad", 1)
    schema = make_schema([parameter("w", 1), bad])
    data = encode(schema, random_state(schema, 1))
    altered = with_checksum(data[:-8] + f32(value) + data[-4:])
    # values are decoded late, so the payload is refused when its block is reached
    payload = Payload.parse(altered, schema)
    blocks = payload.blocks()
    assert next(blocks)[0] == 0
    with pytest.raises(DecodeError, match="tensor 'bad' holds NaN or an infinity") as caught:
        next(blocks)
    assert caught.value.reason is DecodeReason.NOT_FINITE


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_constant_that_is_not_finite_is_refused(value: float) -> None:
    data = encode(LEVELS_SCHEMA, {"w": torch.ones(4)}, None, NNADQ(0.01))
    altered = with_checksum(data[:31] + f32(value) + data[35:])
    expect(DecodeReason.NOT_FINITE, altered, LEVELS_SCHEMA, "the offset of tensor 'w'")


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_illegal_block_difference_is_refused(value: float) -> None:
    header = header_of(LEVELS_SCHEMA, block_differences=(0.5,))
    data = encode(LEVELS_SCHEMA, LEVELS_STATE, header)
    altered = with_checksum(data[:29] + f32(value) + data[33:])
    expect(DecodeReason.FIELD, altered, LEVELS_SCHEMA, "mean block difference is negative or not")


@pytest.mark.parametrize(
    ("position", "put", "match"),
    [
        (33, struct.pack("<Q", 2**63), "client 7: num_examples is 9223372036854775808"),
        (41, f32(math.nan), "client 7: train_loss is nan"),
        (53, f32(math.inf), "client 7: validation_loss is inf"),
        (57, f32(-math.inf), "client 7: validation_metric is -inf"),
    ],
)
def test_illegal_report_is_refused(position: int, put: bytes, match: str) -> None:
    data = encode(LEVELS_SCHEMA, LEVELS_STATE, header_of(LEVELS_SCHEMA, Kind.UPLOAD))
    altered = with_checksum(data[:position] + put + data[position + len(put) :])
    expect(DecodeReason.FIELD, altered, LEVELS_SCHEMA, match)


@pytest.mark.parametrize("wrong", [0, 11, 13, 2**63 - 1])
def test_plain_frame_of_another_length_is_refused(wrong: int) -> None:
    schema = make_schema([parameter("w", 3)])
    data = encode(schema, random_state(schema, 1))
    assert data[31] == 12
    altered = put(data, 31, 1, varint_of(wrong))
    match = rf"values of block 'b0': {wrong} bytes came; the schema wants 12"
    expect(DecodeReason.FIELD, altered, schema, match)
