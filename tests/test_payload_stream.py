"""A payload that comes in chunks: the same values as whole, or a DecodeError at the latest at its
end; and no more of it kept than a block.
"""

from __future__ import annotations

import functools
import tracemalloc
from collections.abc import Iterable, Iterator
from itertools import chain, repeat

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedobd import Broadcast, DecodeError, DecodeReason, FedAvg, FedOBD, FedPAQ, Method
from fedobd.blocks import ModelSchema
from fedobd.codec import NNADQ, Unquantized
from fedobd.payload import Bytes, Kind, Payload, PayloadStream
from tests.helpers import (
    encode,
    frozen,
    header_of,
    law,
    make_schema,
    parameter,
    random_state,
    with_checksum,
)
from tests.session_helpers import MODELS, bits, bits_of, make_state
from tests.session_helpers import make_schema as schema_of
from tests.test_payload import CASES, Case, cases, every_case

Values = list[object]


def values_of(payload: Payload | PayloadStream) -> Values:
    """All that a payload holds, to compare with ==."""
    found: Values = [payload.header]
    for spec, values in payload.frozen():
        found.append((spec, values.dtype, values.shape, bits_of(values)))
    for number, segments in payload.blocks():
        for decoded in segments:
            mask = None if decoded.mask is None else decoded.mask.tolist()
            found.append(
                (number, decoded.segment, decoded.values.dtype, bits_of(decoded.values), mask)
            )
    return found


@functools.cache
def bytes_of(name: str) -> bytes:
    return CASES[name].encode()


@functools.cache
def wanted_of(name: str) -> Values:
    return values_of(Payload.parse(bytes_of(name), CASES[name].schema))


def streamed(chunks: Iterable[Bytes], schema: ModelSchema) -> Values:
    return values_of(PayloadStream(chunks, schema))


def reason_of(chunks: Iterable[Bytes], schema: ModelSchema) -> DecodeReason | None:
    """Read to the end; any exception but DecodeError passes through and fails the test."""
    try:
        streamed(chunks, schema)
    except DecodeError as error:
        return error.reason
    return None


def in_pieces(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


@every_case
def test_whole_and_in_pieces(name: str) -> None:
    data, schema = bytes_of(name), CASES[name].schema
    assert streamed([data], schema) == wanted_of(name)
    for size in (1, 2, 3, 7, 64):
        assert streamed(in_pieces(data, size), schema) == wanted_of(name), size


@every_case
def test_cut_in_two_at_every_place(name: str) -> None:
    data, schema = bytes_of(name), CASES[name].schema
    for place in range(len(data) + 1):
        assert streamed([data[:place], b"", data[place:]], schema) == wanted_of(name), place


@every_case
def test_other_buffers_and_those_that_are_used_again(name: str) -> None:
    data, schema = bytes_of(name), CASES[name].schema
    assert streamed([bytearray(data[:40]), memoryview(data)[40:]], schema) == wanted_of(name)


@law(60)
@given(cases(), st.data())
def test_any_payload_in_any_pieces(case: Case, data: st.DataObject) -> None:
    whole = case.encode()
    places = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    chunks = [whole[a:b] for a, b in zip([0, *places], [*places, len(whole)], strict=True)]
    assert streamed(chunks, case.schema) == values_of(Payload.parse(whole, case.schema))


def test_added_bytes_are_refused() -> None:
    data, schema = bytes_of("broadcast nnadq"), CASES["broadcast nnadq"].schema
    for extra in (b"\0", b"\xff" * 9, data):
        assert reason_of([data + extra], schema) is DecodeReason.TRAILING
        assert reason_of([data, b"", extra], schema) is DecodeReason.TRAILING
        assert reason_of(in_pieces(data + extra, 1), schema) is DecodeReason.TRAILING


def test_no_more_is_read_of_what_follows() -> None:
    data, schema = bytes_of("broadcast nnadq"), CASES["broadcast nnadq"].schema
    carrier = Carrier(data, filler=10**9)
    assert reason_of(carrier, schema) is DecodeReason.TRAILING
    assert carrier.given == len(data) + 1000


@pytest.mark.parametrize("name", ["broadcast lossless", "upload stochastic"])
def test_each_altered_byte_is_refused(name: str) -> None:
    data, schema = bytes_of(name), CASES[name].schema
    for position in range(len(data)):
        for change in (0x01, 0x80):
            altered = bytearray(data)
            altered[position] ^= change
            assert reason_of([bytes(altered)], schema) is not None, position


@law(100)
@given(cases(), st.data())
def test_damage_gives_values_or_decode_error(case: Case, data: st.DataObject) -> None:
    whole = bytearray(case.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(whole) - 1))
        whole[position : position + 1] = data.draw(st.binary(max_size=3))
    reason_of(in_pieces(bytes(whole), data.draw(st.integers(1, 40))), case.schema)
    reason_of([with_checksum(bytes(whole))], case.schema)


@law(100)
@given(st.lists(st.binary(max_size=60), max_size=5))
def test_random_chunks_are_refused(chunks: list[bytes]) -> None:
    assert reason_of(chunks, CASES["broadcast nnadq"].schema) is not None


@pytest.mark.parametrize(
    ("position", "new", "match"),
    [
        (0, b"PK\3\4", "this is no payload of fedobd"),
        (4, b"\1", "format version 1 came; this side reads 2"),
        (4, b"\3", "format version 3 came; this side reads 2"),
    ],
)
def test_another_format_is_refused_by_the_header_alone(
    position: int, new: bytes, match: str
) -> None:
    data, schema = bytes_of("broadcast nnadq"), CASES["broadcast nnadq"].schema
    altered = with_checksum(data[:position] + new + data[position + len(new) :])
    with pytest.raises(DecodeError, match=match) as caught:
        PayloadStream([altered], schema)
    assert caught.value.reason is DecodeReason.VERSION


def test_error_of_the_carrier_passes_through() -> None:
    def breaks_off() -> Iterator[bytes]:
        yield bytes_of("broadcast nnadq")[:60]
        raise ConnectionResetError("gone")

    with pytest.raises(ConnectionResetError, match="gone"):
        streamed(breaks_off(), CASES["broadcast nnadq"].schema)


# --- memory --------------------------------------------------------------------------------------


class Carrier:
    """Gives chunks, and knows how many bytes were asked for."""

    def __init__(self, head: bytes, *, filler: int, size: int = 1000) -> None:
        self._head = head
        self._filler = filler
        self._size = size
        self.given = 0

    def __iter__(self) -> Iterator[bytes]:
        for chunk in chain([self._head], repeat(b"\0" * self._size, self._filler // self._size)):
            self.given += len(chunk)
            yield chunk


@pytest.mark.parametrize(
    ("quantizer", "is_lossless", "cap"),
    [
        (NNADQ(0.01), False, 4 + 1 + 4096),
        (Unquantized(), True, 16 + 1024),
        (Unquantized(), False, 16),
    ],
)
@pytest.mark.parametrize("claimed", [2**62, 2**32, 5000])
def test_no_frame_longer_than_its_cap_is_waited_for(
    quantizer: NNADQ | Unquantized, is_lossless: bool, cap: int, claimed: int
) -> None:
    schema = make_schema([parameter("w", 4)])
    data = encode(
        schema, random_state(schema, 1), header_of(schema, is_lossless=is_lossless), quantizer
    )
    (traffic,) = Payload.parse(data, schema).traffic.blocks.values()
    length = traffic.num_bytes
    head = data[: len(data) - 4 - length]
    for size, allowed in ((claimed, False), (cap + 1, False), (cap, True)):
        digits = [size >> shift & 0x7F for shift in range(0, size.bit_length(), 7)]
        varint = bytes([*(digit | 0x80 for digit in digits[:-1]), digits[-1]])
        carrier = Carrier(head + varint, filler=100_000)
        reason = reason_of(carrier, schema)
        if allowed:
            assert reason is not None
        else:
            assert reason in (DecodeReason.LIMIT, DecodeReason.FIELD)
            assert carrier.given == len(head + varint)


def test_memory_is_that_of_the_largest_block() -> None:
    names = [f"w{i}" for i in range(24)]
    schema = make_schema([parameter(name, 50_000) for name in names])
    state = random_state(schema, 1)
    data = encode(schema, state)
    largest = 50_000 * 4

    def read() -> int:
        tracemalloc.start()
        stream = PayloadStream((data[i : i + 4096] for i in range(0, len(data), 4096)), schema)
        for number, segments in stream.blocks():
            assert torch.equal(segments[0].values, state[names[number]])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    read()
    assert read() < 5 * largest < len(data) / 4


# --- broadcasts ----------------------------------------------------------------------------------


METHODS: dict[str, Method] = {
    "fedavg": FedAvg(),
    "fedavg lossless": FedAvg(lossless=True),
    "fedpaq": FedPAQ(),
    "fedobd": FedOBD(),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", MODELS)
def test_broadcast_from_chunks_is_that_of_the_whole(name: str, kind: str) -> None:
    method, model = METHODS[name], MODELS[kind]()
    schema = schema_of(model, method)
    for wire_kind in (Kind.INITIAL, Kind.BROADCAST, Kind.DELIVERY):
        header = header_of(schema, wire_kind, is_lossless=method.lossless)
        data = bytearray(encode(schema, make_state(model), header, NNADQ(1e-3)))
        data[6] = method.wire_id
        whole = with_checksum(bytes(data))
        wanted = Broadcast.decode(whole, method, schema, wire_kind)
        for size in (1, 100, 10**6):
            came = Broadcast.decode(in_pieces(whole, size), method, schema, wire_kind)
            assert came.header == wanted.header
            assert bits(came.values) == bits(wanted.values)
        for chunks in ([whole[:-1]], [whole, b"\0"], [whole[:-1], b"?"], []):
            with pytest.raises(DecodeError):
                Broadcast.decode(chunks, method, schema, wire_kind)


def test_broadcast_from_chunks_for_another_kind_or_method_is_refused_early() -> None:
    schema = make_schema([parameter("w", 4), frozen("ice", 2)])
    data = encode(schema, random_state(schema, 1))
    carrier = Carrier(data[:-8], filler=10_000)
    with pytest.raises(DecodeError, match="kind BROADCAST came; wanted INITIAL"):
        Broadcast.decode(carrier, FedAvg(), schema, Kind.INITIAL)
    with pytest.raises(DecodeError, match="method number 1 came; wanted"):
        Broadcast.decode(carrier, FedPAQ(), schema)
    assert carrier.given == 2 * len(data[:-8])


def test_decoded_values_do_not_share_memory_with_the_chunks() -> None:
    schema = make_schema([parameter("w", 3)])
    state = {"w": torch.from_numpy(np.arange(3, dtype=np.float32))}
    data = bytearray(encode(schema, state))
    ((_, segments),) = PayloadStream([data], schema).blocks()
    data[:] = b"\0" * len(data)
    assert segments[0].values.tolist() == [0.0, 1.0, 2.0]
