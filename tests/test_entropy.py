"""The level coder: round trips, size, damage, and the slow reference that it equals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedobd import DecodeError, DecodeReason
from fedobd.codec import (
    MAX_LEVELS,
    NNADQ,
    Coding,
    Levels,
    SegmentCode,
    _entropy,
    decode_levels,
    dequantize,
    encode_levels,
    level_bits,
)
from fedobd.codec import _frequencies as _tables
from tests import rans_reference as slow
from tests.helpers import law

Int32 = NDArray[np.int32]

SMALLEST_CHUNK = 12
"""log2 of the smallest chunk that a decoder reads."""

level_counts = st.one_of(
    st.sampled_from(
        [1, 2, 127, 128, 2047, 2048, 4095, 4096, 32767, 32768, MAX_LEVELS - 1, MAX_LEVELS]
    ),
    st.integers(1, 3000),
    st.integers(1, MAX_LEVELS),
)


@dataclass(frozen=True)
class Coded:
    """Levels of a segment, and the code that says what they stand for."""

    levels: Int32
    code: SegmentCode

    def __repr__(self) -> str:
        return f"Coded({self.levels.tolist()[:20]}, n={self.levels.size}, {self.code})"

    @property
    def shape(self) -> tuple[int, SegmentCode]:
        return self.levels.size, self.code


def coded(levels: Sequence[int] | Int32, num_levels: int, *, offset: float = 0.25) -> Coded:
    return Coded(
        np.asarray(levels, np.int32), SegmentCode(Coding.LEVELS, num_levels, offset, 1.75)
    )


def spread_levels(
    rng: np.random.Generator, num_levels: int, count: int, kind: str, width: float
) -> Int32:
    """Levels of a kind of distribution from -s to s."""
    if kind == "one":
        levels = np.full(count, rng.integers(-num_levels, num_levels + 1))
    elif kind == "extremes":
        levels = num_levels * rng.choice([-1, 1], count)
    elif kind == "even":
        levels = rng.integers(-num_levels, num_levels + 1, count)
    else:
        levels = np.rint(rng.laplace(0, 1 + width * num_levels, count))
    return np.clip(levels, -num_levels, num_levels).astype(np.int32)


kinds = st.sampled_from(["one", "extremes", "even", "narrow"])


@st.composite
def segments(
    draw: st.DrawFn, counts: Sequence[int] = (1, 2, 3, 4, 5, 9, 100, 3000)
) -> list[Coded]:
    made = []
    for _ in range(draw(st.integers(1, 4))):
        num_levels = draw(level_counts)
        rng = np.random.default_rng(draw(st.integers(0, 2**32)))
        levels = spread_levels(
            rng,
            num_levels,
            draw(st.sampled_from(counts)),
            draw(kinds),
            draw(st.sampled_from([1e-4, 0.01, 0.3])),
        )
        offset = draw(st.floats(-(2.0**126), 2.0**126, width=32))
        span = draw(st.floats(2.0**-104, 2.0**126, width=32))
        made.append(Coded(levels, SegmentCode(Coding.LEVELS, num_levels, offset, span)))
    return made


def encoded(made: Sequence[Coded], executor: Executor | None = None) -> bytes:
    return encode_levels([Levels.of(c.levels, c.code.num_levels) for c in made], executor)


def decoded(
    stream: bytes, made: Sequence[Coded], executor: Executor | None = None
) -> list[NDArray[np.float32]]:
    return decode_levels(memoryview(stream), [c.shape for c in made], executor)


def check(made: Sequence[Coded], stream: bytes, executor: Executor | None = None) -> None:
    """Compare the bits of what comes out with what the levels stand for."""
    for c, values in zip(made, decoded(stream, made, executor), strict=True):
        assert values.dtype == np.float32
        wanted = dequantize(c.levels, c.code)
        assert np.array_equal(values.view(np.uint32), wanted.view(np.uint32))


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


# --- round trips ---------------------------------------------------------------------------------


@law(100)
@given(segments())
def test_round_trip(made: list[Coded]) -> None:
    levels = [Levels.of(c.levels, c.code.num_levels) for c in made]
    before = [one.symbols.copy() for one in levels]
    stream = encode_levels(levels)
    for c, one, was in zip(made, levels, before, strict=True):
        assert np.array_equal(one.signed(), c.levels)
        assert np.array_equal(one.symbols, was)
    check(made, stream)


@pytest.mark.parametrize("num_levels", [1, 2, 3, 2047, 2048, 2049, 32767, 32768, MAX_LEVELS])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_each_level_of_a_tiny_segment_round_trips(num_levels: int, count: int) -> None:
    ends = {-num_levels, 1 - num_levels, -1, 0, 1, num_levels - 1, num_levels}
    for level in sorted(level for level in ends if abs(level) <= num_levels):
        made = [coded([level] * count, num_levels), coded([0] * 3 + [level], num_levels)]
        check(made, encoded(made))


@law(25)
@given(segments((1, 5, 4095, 4096, 4097, 9000)))
def test_chunk_borders_fall_where_they_will(made: list[Coded]) -> None:
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(_entropy, "_chunk_log2", lambda total, cost: SMALLEST_CHUNK)
        stream = encoded(made)
        assert stream[0] == SMALLEST_CHUNK
        assert encoded(made, pool) == stream
        check(made, stream)
        check(made, stream, pool)


def test_large_block_is_cut_into_chunks(pool: ThreadPoolExecutor) -> None:
    rng = np.random.default_rng(3)
    made = [
        coded(spread_levels(rng, 100, 300_001, "narrow", 0.2), 100),
        coded([3], 3),
        coded(spread_levels(rng, 40_000, 250_002, "even", 0), 40_000),
    ]
    stream = encoded(made)
    assert stream[0] == 18
    assert encoded(made, pool) == stream
    check(made, stream)
    check(made, stream, pool)


def test_chunks_are_made_larger_where_they_would_be_almost_empty() -> None:
    levels = np.zeros(1 << 21, np.int32)
    levels[::1000] = 1
    made = [coded(levels, 1)]
    stream = encoded(made)
    assert stream[0] > 18
    assert len(stream) < 4096
    check(made, stream)


# --- size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1e-4, 1e-3, 1e-2, 0.1, 1.0])
@pytest.mark.parametrize("scale", [0.005, 1.0])
@pytest.mark.parametrize("kind", ["normal", "laplace", "student"])
def test_size_is_close_to_the_entropy(kind: str, scale: float, weight: float) -> None:
    rng = np.random.default_rng(5)
    count = 100_000
    drawn = {
        "normal": lambda: rng.standard_normal(count),
        "laplace": lambda: rng.laplace(0, 1, count),
        "student": lambda: rng.standard_t(3, count),
    }[kind]()
    values = (drawn * scale).astype(np.float32)
    quantizer = NNADQ(weight)
    code = quantizer.measure(values, 32)
    assert code.coding is Coding.LEVELS
    levels = quantizer.quantize(values, code)
    stream = encode_levels([levels])
    _, occurrences = np.unique(levels.symbols, return_counts=True)
    shares = occurrences / count
    entropy_bytes = -float((shares * np.log2(shares)).sum()) * count / 8
    assert len(stream) <= 1.005 * entropy_bytes + 32 + 1.5 * occurrences.size
    assert len(stream) <= count * level_bits(code.num_levels) / 8
    (came,) = decode_levels(memoryview(stream), [(count, code)])
    wanted = dequantize(levels.signed(), code)
    assert np.array_equal(came.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("num_levels", [1, 3, 100, 2047, 2048, 32768, MAX_LEVELS])
@pytest.mark.parametrize("kind", ["one", "extremes", "even", "narrow"])
def test_size_of_100_000_is_not_above_the_nominal_bits(kind: str, num_levels: int) -> None:
    levels = spread_levels(np.random.default_rng(1), num_levels, 100_000, kind, 0.05)
    made = [coded(levels, num_levels)]
    stream = encoded(made)
    # 2^12 - 1 even symbols have 12 bits each, and leave no room for lane states
    states = 26 if (kind, num_levels) == ("even", 2047) else 0
    assert len(stream) <= 100_000 * level_bits(num_levels) / 8 + states
    check(made, stream)


@law(100)
@given(segments())
def test_size_is_within_the_cap_of_a_frame(made: list[Coded]) -> None:
    bits = sum(c.levels.size * level_bits(c.code.num_levels) for c in made)
    assert len(encoded(made)) <= bits // 8 + bits // 32 + 4096


# --- damage --------------------------------------------------------------------------------------


SAMPLE = [
    coded([-9, 9, 0, 0, 1, 2, 0, 0, 0, 1, -1, 3], 9),
    coded([70000, -3, 0], 70000),
    coded([2] * 5, 3),
    coded(np.arange(-20, 21).repeat(3).tolist(), 20),
]


def refused(stream: bytes, made: Sequence[Coded]) -> bool:
    """Whether a stream is refused; all but values and a stream error fails the test."""
    try:
        came = decoded(stream, made)
    except DecodeError as error:
        if error.reason is not DecodeReason.STREAM:
            raise
        return True
    for c, values in zip(made, came, strict=True):
        assert values.shape == c.levels.shape
        assert bool((np.abs(values - c.code.offset) <= c.code.range * (1 + 1e-6)).all())
    return False


def test_each_cut_stream_is_refused() -> None:
    stream = encoded(SAMPLE)
    for length in range(len(stream)):
        assert refused(stream[:length], SAMPLE), length


@pytest.mark.parametrize("extra", [b"\0", b"\0\0", b"junk", encoded(SAMPLE)])
def test_bytes_after_a_stream_are_refused(extra: bytes) -> None:
    assert refused(encoded(SAMPLE) + extra, SAMPLE)


def test_each_altered_bit_is_refused_or_gives_other_levels() -> None:
    # the lanes' end gives away most; a low bit, say, can only be guarded by the checksum
    stream = encoded(SAMPLE)
    num_refused = 0
    for position in range(len(stream)):
        for bit in range(8):
            altered = bytearray(stream)
            altered[position] ^= 1 << bit
            num_refused += refused(bytes(altered), SAMPLE)
    assert num_refused > 0.9 * 8 * len(stream)


@pytest.fixture(scope="module")
def chunked() -> tuple[bytes, list[Coded]]:
    """A stream of four chunks."""
    rng = np.random.default_rng(8)
    made = [
        coded(spread_levels(rng, 4, 6000, "narrow", 0.1), 4),
        coded(spread_levels(rng, 3000, 7000, "even", 0), 3000),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_entropy, "_chunk_log2", lambda total, cost: SMALLEST_CHUNK)
        return encoded(made), made


def test_each_cut_in_a_stream_of_chunks_is_refused(chunked: tuple[bytes, list[Coded]]) -> None:
    stream, made = chunked
    for length in range(0, len(stream), 1 if len(stream) < 3000 else 7):
        assert refused(stream[:length], made), length


def length_positions(stream: bytes, made: Sequence[Coded]) -> list[int]:
    """Where the lengths of the chunks stand."""
    bits = slow.Bits([byte >> i & 1 for byte in stream[1:] for i in range(8)])
    for c in made:
        slow.read_table(bits, *slow.alphabet(c.code.num_levels)[1:])
    position, found = 1 + (bits.position + 7) // 8, []
    for _ in range((sum(c.levels.size for c in made) - 1) >> stream[0]):
        found.append(position)
        num_words = shift = 0
        while True:
            num_words |= (stream[position] & 0x7F) << shift
            position, shift = position + 1, shift + 7
            if stream[position - 1] < 0x80:
                break
        position += 24 + 2 * num_words
    return found


@pytest.mark.parametrize(
    "length",
    [b"\0", b"\1", b"\x7f", b"\x80\0", b"\xff\xff\x7f", b"\xff" * 8 + b"\x7f", b"\xff" * 20, b""],
)
def test_chunk_of_another_length_is_refused(
    length: bytes, chunked: tuple[bytes, list[Coded]]
) -> None:
    stream, made = chunked
    positions = length_positions(stream, made)
    assert len(positions) == 3
    for position in positions:
        end = position + next(i for i in range(9) if stream[position + i] < 0x80) + 1
        assert refused(stream[:position] + length + stream[end:], made)
        assert refused(stream[:position] + length, made)
        assert refused(stream[: position + 1], made)


@pytest.mark.parametrize("size", [0, 11, 13, 17, 18, 40, 41, 255])
def test_chunk_size_of_another_stream_is_refused(
    size: int, chunked: tuple[bytes, list[Coded]]
) -> None:
    stream, made = chunked
    assert refused(bytes([size]) + stream[1:], made)


@law(100)
@given(st.binary(max_size=80), segments((1, 3, 50)))
def test_foreign_bytes_are_refused(data: bytes, made: list[Coded]) -> None:
    refused(data, made)
    refused(bytes([18]) + data, made)


@law(100)
@given(segments((1, 3, 50)), st.data())
def test_damage_gives_values_or_a_stream_error(made: list[Coded], data: st.DataObject) -> None:
    stream = bytearray(encoded(made))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(stream) - 1))
        stream[position : position + 1] = data.draw(st.binary(max_size=3))
    refused(bytes(stream), made)


@law(100)
@given(segments((1, 3, 50)), segments((1, 3, 50)))
def test_stream_of_other_segments_gives_values_or_a_stream_error(
    made: list[Coded], other: list[Coded]
) -> None:
    refused(encoded(made), other)


def test_level_beyond_the_largest_is_refused() -> None:
    # of s = 2^22 a symbol has 12 low bits; the highest may only hold 2 s itself
    for num_levels in (2048, 5000, MAX_LEVELS):
        low_bits, size, width = slow.alphabet(num_levels)
        assert low_bits
        made = [coded([0], num_levels)]
        for symbol in (2 * num_levels, 2 * num_levels + 1):
            if symbol >> low_bits == (2 * num_levels) >> low_bits:
                table = slow.Table((0,) * (size - 1) + (256,), 8)
                bits = slow.table_bits(table.frequencies, size - 1, 8, 0, width)
                part = slow.Part((symbol,), num_levels, table)
                stream = slow.encode_stream([part], bits, 18)
                assert refused(stream, made) is (symbol > 2 * num_levels)
        with pytest.raises(DecodeError, match=f"holds a level above {num_levels}"):
            decoded(stream, made)


@pytest.mark.parametrize(
    ("stream", "match"),
    [
        (b"", "no proper chunk size"),
        (b"\x0b", "no proper chunk size"),
        (b"\x12", "a table that no encoder writes"),
        (b"\x12\x02" + bytes(24), "bits set between its tables and its chunks"),
        (b"\x12\x00" + bytes(23), "a chunk of no proper length"),
        (b"\x12\x00" + bytes(25), "a chunk of no proper length"),
        (b"\x12\x00" + bytes(24), "a lane state out of range"),
        (b"\x12\x00" + b"\xff" * 24, "a lane state out of range"),
        (b"\x12\x00" + (2**31).to_bytes(6, "little") * 4, "ends before its last level"),
        (b"\x12\x00" + (2**47 - 1).to_bytes(6, "little") * 4, "does not end where its last"),
    ],
)
def test_message_says_what_is_wrong_with_a_stream(stream: bytes, match: str) -> None:
    with pytest.raises(DecodeError, match=f"a level stream .*{match}") as caught:
        decoded(stream, [coded([0], 1)])
    assert caught.value.reason is DecodeReason.STREAM


# --- the slow reference --------------------------------------------------------------------------


def tables_of(made: Sequence[Coded]) -> tuple[list[slow.Part], list[int]]:
    """Return the parts with the tables that the package chooses, and these tables' bits."""
    parts, bits = [], []
    for c in made:
        levels = Levels.of(c.levels, c.code.num_levels)
        _, size, width = slow.alphabet(c.code.num_levels)
        frequencies = np.zeros(size, np.int64)
        scratch = np.zeros(64 + 24 * size, np.uint8)
        log2 = _tables.log2_table((1 << 16) + 1)
        k, mantissa, largest, _ = _tables.choose_table(
            levels.counts, c.levels.size, width, log2, scratch, frequencies
        )
        table = slow.Table(tuple(frequencies.tolist()), k) if k else slow.uniform(size)
        bits += slow.table_bits(table.frequencies, largest, k, mantissa, width) if k else [0]
        symbols = tuple((c.levels + c.code.num_levels).tolist())
        parts.append(slow.Part(symbols, c.code.num_levels, table))
    return parts, bits


@law(60)
@given(segments((1, 2, 3, 4, 5, 9, 60, 300)))
def test_stream_equals_that_of_the_slow_reference(made: list[Coded]) -> None:
    stream = encoded(made)
    parts, bits = tables_of(made)
    assert slow.encode_stream(parts, bits, 18) == stream
    shape = [(c.levels.size, c.code.num_levels) for c in made]
    assert slow.decode_stream(stream, shape) == [list(part.symbols) for part in parts]


def test_stream_of_chunks_equals_that_of_the_slow_reference(
    chunked: tuple[bytes, list[Coded]],
) -> None:
    stream, made = chunked
    assert slow.encode_stream(*tables_of(made), SMALLEST_CHUNK) == stream


@st.composite
def tables(draw: st.DrawFn, size: int) -> tuple[slow.Table, int]:
    """A table that any encoder might choose, and the symbol that it leaves out."""
    k = draw(st.integers(max(1, min(16, math.ceil(math.log2(size)))), 16))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    left = 2**k
    frequencies = [0] * size
    unwritten = int(rng.integers(size))
    for symbol in rng.permutation(size).tolist():
        if symbol != unwritten and left > 1 and rng.random() < 0.8:
            frequencies[symbol] = int(rng.integers(1, max(2, min(left, 1 + 2 * left // size))))
            left -= frequencies[symbol]
    frequencies[unwritten] = left
    return slow.Table(tuple(frequencies), k), unwritten


@law(100)
@given(st.data())
def test_stream_of_the_slow_reference_is_read(data: st.DataObject) -> None:
    made, parts, bits = [], [], []
    for _ in range(data.draw(st.integers(1, 3))):
        num_levels = data.draw(st.one_of(st.sampled_from([1, 2, 40]), level_counts))
        low_bits, size, width = slow.alphabet(num_levels)
        table, unwritten = data.draw(tables(size))
        there = [s for s, f in enumerate(table.frequencies) if f]
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
        high = rng.choice(there, data.draw(st.integers(1, 40)))
        symbols = np.minimum((high << low_bits) + rng.integers(1 << low_bits), 2 * num_levels)
        parts.append(slow.Part(tuple(symbols.tolist()), num_levels, table))
        bits += slow.table_bits(table.frequencies, unwritten, table.k, 15, width)
        made.append(coded(symbols - num_levels, num_levels))
    check(made, slow.encode_stream(parts, bits, 18))
