"""A slow level coder, the writing side, in plain Python from docs/format.md.

It shares no code with the package and chooses nothing itself: tables and chunk size are given, so
that streams can be made which the package's encoder never makes, legal ones and others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LOWEST_STATE = 1 << 31
NUM_LANES = 4


@dataclass(frozen=True)
class Table:
    """Frequencies that add up to 2^k, each but one written with m bits after its highest."""

    k: int
    m: int
    frequencies: tuple[int, ...]
    unwritten: int


@dataclass(frozen=True)
class Part:
    """The symbols of one segment, level + s; without a table the uniform one is used."""

    symbols: Sequence[int]
    num_levels: int
    table: Table | None = None


def varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


class BitWriter:
    """Bits, the lowest of each byte first."""

    def __init__(self) -> None:
        self.bits: list[int] = []

    def put(self, value: int, count: int) -> None:
        self.bits += [value >> bit & 1 for bit in range(count)]

    def gamma(self, value: int) -> None:
        length = value.bit_length() - 1
        self.put(0, length)
        self.put(1, 1)
        self.put(value - (1 << length), length)

    def to_bytes(self) -> bytes:
        padded = self.bits + [0] * (-len(self.bits) % 8)
        return bytes(
            sum(bit << place for place, bit in enumerate(padded[i : i + 8]))
            for i in range(0, len(padded), 8)
        )


def low_bits(num_levels: int) -> int:
    """How many low bits of a symbol are put in as they are: b."""
    return max(0, (2 * num_levels).bit_length() - 12)


def alphabet(num_levels: int) -> int:
    """How many symbols there are without their low bits: n."""
    return (2 * num_levels >> low_bits(num_levels)) + 1


def uniform_frequencies(size: int) -> tuple[int, ...]:
    return tuple(((i + 1) << 16) // size - (i << 16) // size for i in range(size))


def make_table(symbols: Sequence[int], num_levels: int, k: int, m: int) -> Table:
    """Make a table from how often symbols occur; each must leave room for the unwritten one."""
    shift = low_bits(num_levels)
    counts = [0] * alphabet(num_levels)
    for symbol in symbols:
        counts[symbol >> shift] += 1
    unwritten = counts.index(max(counts))
    frequencies = []
    for symbol, count in enumerate(counts):
        frequency = 0
        if count and symbol != unwritten:
            frequency = max(1, (count << k) // len(symbols))
            cut = max(0, frequency.bit_length() - 1 - m)
            frequency = frequency >> cut << cut
        frequencies.append(frequency)
    frequencies[unwritten] = (1 << k) - sum(frequencies)
    if frequencies[unwritten] < 1:
        raise ValueError(f"k = {k} is too small for {len(counts)} symbols")
    return Table(k, m, tuple(frequencies), unwritten)


def put_table(writer: BitWriter, table: Table | None, num_levels: int) -> None:
    if table is None:
        writer.put(0, 1)
        return
    width = max(1, (alphabet(num_levels) - 1).bit_length())
    written = [
        (symbol, frequency)
        for symbol, frequency in enumerate(table.frequencies)
        if frequency and symbol != table.unwritten
    ]
    writer.put(1, 1)
    writer.put(table.k - 1, 4)
    writer.put(table.m, 4)
    writer.put(table.unwritten, width)
    writer.gamma(len(written) + 1)
    index = length = 0
    for symbol, frequency in written:
        place = symbol - (symbol > table.unwritten)
        writer.put(int(place > index), 1)
        if place > index:
            writer.gamma(place - index)
        change = frequency.bit_length() - 1 - length
        folded = 2 * change if change >= 0 else -2 * change - 1
        writer.put((1 << folded) - 1, folded + 1)
        length += change
        kept = min(table.m, length)
        writer.put(frequency >> (length - kept) & ((1 << kept) - 1), kept)
        index = place + 1


def encode_chunk(
    symbols: Sequence[tuple[int, int, tuple[int, ...], int]],
) -> tuple[list[int], list[int]]:
    """Put (symbol, b, frequencies, k) into four lanes; give states and words."""
    states = [LOWEST_STATE] * NUM_LANES
    words: list[int] = []
    for i in range(len(symbols) - 1, -1, -1):
        symbol, shift, frequencies, k = symbols[i]
        x = states[i % NUM_LANES]
        if shift:
            if x >= 1 << (47 - shift):
                words.append(x & 0xFFFF)
                x >>= 16
            x = x << shift | symbol & ((1 << shift) - 1)
        top = symbol >> shift
        frequency, start = frequencies[top], sum(frequencies[:top])
        if x >= frequency << (47 - k):
            words.append(x & 0xFFFF)
            x >>= 16
        states[i % NUM_LANES] = (x // frequency << k) + start + x % frequency
    return states, words[::-1]


def encode_stream(parts: Sequence[Part], chunk_log2: int) -> bytes:
    """Give the stream of a block."""
    writer = BitWriter()
    symbols: list[tuple[int, int, tuple[int, ...], int]] = []
    for part in parts:
        put_table(writer, part.table, part.num_levels)
        frequencies = uniform_frequencies(alphabet(part.num_levels))
        k = 16
        if part.table is not None:
            frequencies, k = part.table.frequencies, part.table.k
        shift = low_bits(part.num_levels)
        symbols += [(symbol, shift, frequencies, k) for symbol in part.symbols]
    stream = bytes([chunk_log2]) + writer.to_bytes()
    size = 1 << chunk_log2
    for start in range(0, len(symbols), size):
        states, words = encode_chunk(symbols[start : start + size])
        if start + size < len(symbols):
            stream += varint(len(words))
        stream += b"".join(state.to_bytes(6, "little") for state in states)
        stream += b"".join(word.to_bytes(2, "little") for word in words)
    return stream
