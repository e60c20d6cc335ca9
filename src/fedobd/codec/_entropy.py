"""The level coder: the integer levels of a block to one stream and back.

A level l of a segment with s levels becomes the symbol l + s, from 0 to 2 s. Where 2 s has more
than 12 bits, the bits above 12 are low bits of the symbol that are coded as they are; what is
above them is coded with a table of frequencies. The stream of a block is:

1. one byte, c: the symbols of all segments, one after another, are cut into chunks of 2^c, the
   last one shorter;
2. for each segment a table, as bits, the lowest of each byte first; then 0 bits up to a whole
   byte;
3. for each chunk: the number of its words (LEB128; left out for the last), four lane states of 48
   bits, and its words of 16 bits, all little endian. `_rans` says how lanes and words hold
   symbols.

A table is, with w the bits of the largest symbol's number (at least 1):

- one bit, 0 for the uniform table, in which symbol i of n has the frequency ⌊(i + 1)·2^16 / n⌋ -
  ⌊i·2^16 / n⌋ and k is 16;
- else k - 1 (4 bits), m (4 bits), the number of the symbol whose frequency is not written (w
  bits), and the number of written frequencies plus 1 (gamma code); then for each written
  frequency, by symbol, the unwritten one left out of the count: one bit, 1 if symbols without
  frequency come before it, and their number (gamma code); the change of ⌊log2 f⌋ against the last
  one (0 at first), folded to 0, -1, 1, -2, ... = 0, 1, 2, 3, ..., as so many 1 bits and a 0; and
  the min(m, ⌊log2 f⌋) bits of f below its highest, the bits below those being 0. The unwritten
  frequency is what is left of 2^k.

The gamma code of a number with n bits is n - 1 bits 0, a bit 1, and its lower n - 1 bits.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedobd._errors import DecodeError, DecodeReason
from fedobd.codec._quantization import Float32, Levels, SegmentCode, dequantize, level_shift
from fedobd.codec._varint import read_varint, write_varint

_LEAST_CHUNK_BITS = 8 * 64 * 1024
"""Chunks are made no smaller than this, so that their states weigh nothing."""

_MIN_CHUNK_LOG2, _MAX_CHUNK_LOG2 = 12, 40
_KEPT_TABLES = 8  # of half a megabyte at most, to look symbols up in
_STATE_BYTES = 6
_LANES = 4


@cache
def _rans() -> Any:
    """Import the compiled loops when they are first needed: importing numba takes its time."""
    import fedobd.codec._rans as rans

    return rans


@cache
def _tables() -> Any:
    """Import the loops of the tables, likewise."""
    import fedobd.codec._frequencies as tables

    return tables


@cache
def _log2() -> NDArray[np.int64]:
    table: NDArray[np.int64] = _tables().log2_table((1 << 16) + 1)
    return table


def _alphabet(num_levels: int) -> tuple[int, int, int]:
    """Return low bits, number of symbols without them, and bits of the largest one's number."""
    shift = level_shift(num_levels)
    largest = (2 * num_levels) >> shift
    return shift, largest + 1, max(1, largest.bit_length())


def _table_room(num_symbols: int) -> int:
    """Return bytes that no table passes: an entry has a flag, a gap, a length and a mantissa."""
    return 64 + num_symbols * (1 + 31 + 34 + 15) // 8


@dataclass(frozen=True, slots=True)
class _Table:
    """The frequencies of a segment, which add up to 2^k."""

    frequencies: NDArray[np.int64]
    k: int


def encode_levels(segments: Sequence[Levels], executor: Executor | None = None) -> bytes:
    """Compress the levels of a block's segments, none empty; an executor spreads chunks."""
    tables: list[_Table] = []
    bits = np.zeros(sum(_table_room(levels.counts.size) for levels in segments), np.uint8)
    position = cost = 0
    for levels in segments:
        _, size, width = _alphabet(levels.num_levels)
        frequencies = np.empty(size, np.int64)
        scratch = np.zeros(_table_room(size), np.uint8)
        k, mantissa, largest, coded = _tables().choose_table(
            levels.counts, levels.symbols.size, width, _log2(), scratch, frequencies
        )
        cost += coded + levels.symbols.size * level_shift(levels.num_levels)
        table = frequencies, largest, k, mantissa, width, bits, position
        # One bit 0 is the uniform table.
        position = _tables().write_table(*table) if k else position + 1
        tables.append(_Table(frequencies, k or 16))
    total = sum(levels.symbols.size for levels in segments)
    chunk_log2 = _chunk_log2(total, cost)
    bounds = _chunk_bounds(total, chunk_log2)
    encode = partial(_encode_chunk, segments, tables)
    chunks = list((executor.map if executor else map)(encode, bounds))
    parts = [bytes([chunk_log2]), bits[: (position + 7) // 8].tobytes()]
    for number, (states, words) in enumerate(chunks):
        if number < len(chunks) - 1:
            parts.append(write_varint(words.size))
        parts += [int(state).to_bytes(_STATE_BYTES, "little") for state in states]
        parts.append(words.astype("<u2", copy=False).tobytes())
    return b"".join(parts)


def _chunk_log2(total: int, cost: int) -> int:
    """Return the smallest chunk of at least 2^18 symbols whose bits are worth four states."""
    log2 = 18
    while (1 << log2) < total and (cost << log2) // total < _LEAST_CHUNK_BITS:
        log2 += 1
    return log2


def _chunk_bounds(total: int, chunk_log2: int) -> list[tuple[int, int]]:
    size = 1 << chunk_log2
    return [(start, min(start + size, total)) for start in range(0, total, size)]


def _pieces(ends: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, slice, int]]:
    """Yield the parts of the chunk `start` to `stop` by segments, which end at `ends`.

    Each is the number of a segment, its elements, and their start in the chunk.
    """
    number, place = bisect_right(ends, start), start
    while place < stop:
        first, last = ends[number - 1] if number else 0, min(stop, ends[number])
        if place < last:
            yield number, slice(place - first, last - first), place - start
        number, place = number + 1, last


def _encode_chunk(
    segments: Sequence[Levels], tables: Sequence[_Table], bounds: tuple[int, int]
) -> tuple[NDArray[np.uint64], NDArray[np.uint16]]:
    rans = _rans()
    start, stop = bounds
    states = np.full(_LANES, rans.LOWEST_STATE, np.uint64)
    words = np.empty(2 * (stop - start) + 2, np.uint16)  # a word for low bits, one for the rest
    position = words.size
    ends = list(accumulate(levels.symbols.size for levels in segments))
    for number, part, first in reversed(list(_pieces(ends, start, stop))):
        levels, table = segments[number], tables[number]
        entries = np.zeros(4 * table.frequencies.size, np.uint64)
        _tables().make_entries(table.frequencies, table.k, entries)
        shift = level_shift(levels.num_levels)
        symbols = levels.symbols[part]
        lanes = entries, states, first, words, position
        if shift:
            position = rans.encode_symbols(symbols, shift, *lanes)
        else:
            position = rans.encode_symbols_fast(symbols, *lanes)
    return states, words[position:]


def decode_levels(
    stream: memoryview,
    segments: Sequence[tuple[int, SegmentCode]],
    executor: Executor | None = None,
) -> list[Float32]:
    """Return the dequantized values of a block's segments, float32, shape (n,) each.

    Segments are given by number of elements, at least 1, and code; an executor spreads chunks.

    Raises:
        DecodeError: the stream is not one that an encoder makes for these segments.
    """
    if not len(stream) or not _MIN_CHUNK_LOG2 <= stream[0] <= _MAX_CHUNK_LOG2:
        raise _damaged("has no proper chunk size")
    tables, position = _read_tables(np.frombuffer(stream, np.uint8), segments)
    lengths = [count for count, _ in segments]
    values = [np.empty(count, np.float32) for count in lengths]
    ends = list(accumulate(lengths))
    # Chunks share a segment with their neighbours, so the tables of the last few will do.
    slots_of = lru_cache(_KEPT_TABLES)(lambda number: _slots(tables[number], segments[number][1]))

    def decode(chunk: tuple[int, int, memoryview]) -> None:
        start, stop, data = chunk
        (states, words), position, rans = _begin_chunk(data), 0, _rans()
        for number, part, first in _pieces(ends, start, stop):
            code, k, made = segments[number][1], tables[number].k, values[number][part]
            is_whole = made.size == lengths[number]
            slots = _slots(tables[number], code) if is_whole else slots_of(number)
            lanes = words, position, states, first, slots, k
            if shift := level_shift(code.num_levels):
                step = np.float32(code.range) / np.float32(code.num_levels)
                scale = code.num_levels, step, np.float32(code.offset)
                position = rans.decode_symbols(*lanes, shift, *scale, made)
            else:
                position = rans.decode_symbols_fast(*lanes, made.view(np.uint32))
            if position == -1:
                raise _damaged("ends before its last level")
            if position == -2:
                raise _damaged(f"holds a level above {code.num_levels}")
        # All words are read then, and all lanes are where they began.
        if position != words.size or bool((states != rans.LOWEST_STATE).any()):
            raise _damaged("does not end where its last level does")

    # All lengths are checked before the first chunk is decoded.
    chunks = list(_cut_chunks(stream, (position + 7) // 8, sum(lengths)))
    list((executor.map if executor else map)(decode, chunks))
    return values


def _read_tables(
    buffer: NDArray[np.uint8], segments: Sequence[tuple[int, SegmentCode]]
) -> tuple[list[_Table], int]:
    """Return each segment's table, and the bit at which the last one ends."""
    position = 8
    tables = []
    for _, code in segments:
        _, size, width = _alphabet(code.num_levels)
        frequencies = np.zeros(size, np.int64)
        k, position = _tables().read_table(buffer, position, width, frequencies)
        if k < 0:
            raise _damaged("has a table that no encoder writes")
        if k == 0:
            _tables().uniform(frequencies)
        tables.append(_Table(frequencies, k or 16))
    if position % 8 and int(buffer[position // 8]) >> (position % 8):
        raise _damaged("has bits set between its tables and its chunks")
    return tables, position


def _cut_chunks(
    stream: memoryview, position: int, total: int
) -> Iterator[tuple[int, int, memoryview]]:
    bounds = _chunk_bounds(total, stream[0])
    for number, (start, stop) in enumerate(bounds):
        length = len(stream) - position
        if number < len(bounds) - 1:
            try:
                num_words, position = read_varint(stream, position, "a chunk's length")
            except DecodeError as error:
                raise _damaged("has a chunk of no proper length") from error
            length = _LANES * _STATE_BYTES + 2 * num_words
        if length < _LANES * _STATE_BYTES or length % 2 or position + length > len(stream):
            raise _damaged("has a chunk of no proper length")
        yield start, stop, stream[position : position + length]
        position += length


def _slots(table: _Table, code: SegmentCode) -> NDArray[np.uint64]:
    """Return what is looked up for each symbol: its value, or itself where there are low bits."""
    shift, size, _ = _alphabet(code.num_levels)
    contents = np.arange(size, dtype=np.uint32)
    if not shift:
        levels = np.arange(-code.num_levels, code.num_levels + 1, dtype=np.int32)
        contents = dequantize(levels, code).view(np.uint32)
    slots = np.empty(1 << table.k, np.uint64)
    _tables().make_slots(table.frequencies, contents, slots)
    return slots


def _begin_chunk(data: memoryview) -> tuple[NDArray[np.uint64], NDArray[np.uint16]]:
    """Return a chunk's lane states and words."""
    head = _LANES * _STATE_BYTES
    states = [
        int.from_bytes(data[i : i + _STATE_BYTES], "little") for i in range(0, head, _STATE_BYTES)
    ]
    lowest = _rans().LOWEST_STATE
    if not all(lowest <= state < lowest << 16 for state in states):
        raise _damaged("has a lane state out of range")
    return np.array(states, np.uint64), np.frombuffer(data[head:], "<u2").astype(np.uint16)


def _damaged(what: str) -> DecodeError:
    return DecodeError(DecodeReason.STREAM, f"a level stream {what}")
