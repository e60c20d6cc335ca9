"""A slow reference of the level coder, written from the description of the stream.

It shares no code with the package: Python's own integers, bits as lists, one symbol at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LOW = 2**31
STATE_BYTES = 6


class BadStreamError(Exception):
    """The bits are none that an encoder writes."""


@dataclass(frozen=True)
class Table:
    """Frequencies that add up to 2^k."""

    frequencies: tuple[int, ...]
    k: int


@dataclass(frozen=True)
class Part:
    """The symbols of a segment, and how they are coded."""

    symbols: tuple[int, ...]
    num_levels: int
    table: Table


def alphabet(num_levels: int) -> tuple[int, int, int]:
    """Return low bits, number of symbols without them, and bits of the largest one."""
    low_bits = 0
    while (2 * num_levels) >> low_bits >= 2**12:
        low_bits += 1
    largest = (2 * num_levels) >> low_bits
    return low_bits, largest + 1, len(f"{largest:b}")


def uniform(size: int) -> Table:
    return Table(tuple((i + 1) * 2**16 // size - i * 2**16 // size for i in range(size)), 16)


# --- tables --------------------------------------------------------------------------------------


def number_bits(value: int, count: int) -> list[int]:
    """The lowest bit first."""
    return [value >> i & 1 for i in range(count)]


def gamma_bits(value: int) -> list[int]:
    n = value.bit_length()
    return [0] * (n - 1) + [1] + number_bits(value, n - 1)


def table_bits(
    frequencies: Sequence[int], unwritten: int, k: int, mantissa: int, width: int
) -> list[int]:
    bits = [1, *number_bits(k - 1, 4), *number_bits(mantissa, 4), *number_bits(unwritten, width)]
    written = [f for symbol, f in enumerate(frequencies) if symbol != unwritten]
    bits += gamma_bits(sum(f > 0 for f in written) + 1)
    gap = last = 0
    for f in written:
        if f == 0:
            gap += 1
            continue
        bits += [1, *gamma_bits(gap)] if gap else [0]
        log = f.bit_length() - 1
        change = log - last
        bits += [1] * (2 * change if change >= 0 else -2 * change - 1) + [0]
        kept = min(mantissa, log)
        assert f % 2 ** (log - kept) == 0
        bits += number_bits(f >> (log - kept), kept)
        gap, last = 0, log
    return bits


class Bits:
    """Reads bits from front to back."""

    def __init__(self, bits: Sequence[int], position: int = 0) -> None:
        self.bits = bits
        self.position = position

    def number(self, count: int) -> int:
        part = self.bits[self.position : self.position + count]
        if len(part) < count:
            raise BadStreamError("cut")
        self.position += count
        return sum(bit << i for i, bit in enumerate(part))

    def run(self, of: int) -> int:
        """Return how often a bit comes in a row; the other one after it is taken too."""
        count = 0
        while self.number(1) == of:
            count += 1
        return count

    def gamma(self) -> int:
        n = self.run(of=0)
        return (1 << n) + self.number(n)


def read_table(bits: Bits, size: int, width: int) -> Table:
    if bits.number(1) == 0:
        return uniform(size)
    k, mantissa, unwritten = bits.number(4) + 1, bits.number(4), bits.number(width)
    frequencies = [0] * size
    others = [symbol for symbol in range(size) if symbol != unwritten]
    entries = bits.gamma()
    if unwritten >= size or entries > size:
        raise BadStreamError("more symbols than there are")
    place = last = 0
    for _ in range(entries - 1):
        if bits.number(1):
            place += bits.gamma()
        folded = bits.run(of=1)
        log = last + (folded // 2 if folded % 2 == 0 else -(folded + 1) // 2)
        if not 0 <= log <= 15 or place >= len(others):
            raise BadStreamError("a frequency or a symbol out of range")
        kept = min(mantissa, log)
        frequencies[others[place]] = (2**kept + bits.number(kept)) << (log - kept)
        place, last = place + 1, log
    left = 2**k - sum(frequencies)
    if left < 1:
        raise BadStreamError("nothing is left")
    frequencies[unwritten] = left
    return Table(tuple(frequencies), k)


# --- lanes ---------------------------------------------------------------------------------------


def put_in(x: int, frequency: int, start: int, k: int, words: list[int]) -> int:
    while x >= frequency << (47 - k):
        words.append(x % 2**16)
        x //= 2**16
    return (x // frequency << k) + start + x % frequency


def encode_chunk(parts: Sequence[Part]) -> tuple[list[int], list[int]]:
    """Return lane states and words of a chunk."""
    flat = [(symbol, part) for part in parts for symbol in part.symbols]
    lanes, words = [LOW] * 4, list[int]()
    for i in reversed(range(len(flat))):
        symbol, part = flat[i]
        low_bits = alphabet(part.num_levels)[0]
        x = lanes[i % 4]
        if low_bits:
            x = put_in(x, 1, symbol % 2**low_bits, low_bits, words)
        high = symbol >> low_bits
        frequencies = part.table.frequencies
        x = put_in(x, frequencies[high], sum(frequencies[:high]), part.table.k, words)
        lanes[i % 4] = x
    return lanes, words[::-1]


def decode_chunk(
    lanes: list[int], words: Sequence[int], shape: Sequence[tuple[int, int, Table]]
) -> list[list[int]]:
    """Return the symbols of each part, given its length, number of levels and table."""
    source = iter(words)

    def refill(x: int) -> int:
        while x < LOW:
            word = next(source, None)
            if word is None:
                raise BadStreamError("words are missing")
            x = x * 2**16 + word
        return x

    decoded, i = [], 0
    for count, num_levels, table in shape:
        low_bits = alphabet(num_levels)[0]
        owner = [s for s, f in enumerate(table.frequencies) for _ in range(f)]
        symbols = []
        for _ in range(count):
            x = lanes[i % 4]
            slot = x % 2**table.k
            symbol = owner[slot]
            start = sum(table.frequencies[:symbol])
            x = refill(table.frequencies[symbol] * (x >> table.k) + slot - start)
            if low_bits:
                symbol = symbol << low_bits | x % 2**low_bits
                x = refill(x >> low_bits)
            lanes[i % 4] = x
            symbols.append(symbol)
            i += 1
        decoded.append(symbols)
    if next(source, None) is not None or lanes != [LOW] * 4:
        raise BadStreamError("does not end as it began")
    return decoded


# --- streams -------------------------------------------------------------------------------------


def cut(parts: Sequence[Part], size: int) -> list[list[Part]]:
    """Cut the parts into chunks of so many symbols, the last one shorter."""
    chunks: list[list[Part]] = [[]]
    room = size
    for part in parts:
        symbols = part.symbols
        while symbols:
            if room == 0:
                chunks.append([])
                room = size
            chunks[-1].append(Part(symbols[:room], part.num_levels, part.table))
            taken = min(room, len(symbols))
            symbols, room = symbols[taken:], room - taken
    return chunks


def encode_stream(parts: Sequence[Part], bits: Sequence[int], chunk_log2: int) -> bytes:
    """Return the stream of parts whose tables are these bits."""
    padded = [*bits, *[0] * (-len(bits) % 8)]
    stream = bytes([chunk_log2])
    stream += bytes(Bits(padded, at).number(8) for at in range(0, len(padded), 8))
    chunks = cut(parts, 2**chunk_log2)
    for number, chunk in enumerate(chunks):
        lanes, words = encode_chunk(chunk)
        if number < len(chunks) - 1:
            length = len(words)
            while length >= 128:
                stream += bytes([length % 128 + 128])
                length //= 128
            stream += bytes([length])
        stream += b"".join(x.to_bytes(STATE_BYTES, "little") for x in lanes)
        stream += b"".join(word.to_bytes(2, "little") for word in words)
    return stream


def decode_stream(stream: bytes, shape: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Return the symbols of each segment, given its length and number of levels; one chunk."""
    bits = Bits([byte >> i & 1 for byte in stream[1:] for i in range(8)])
    tables = [read_table(bits, *alphabet(num_levels)[1:]) for _, num_levels in shape]
    if sum(count for count, _ in shape) > 2 ** stream[0]:
        raise BadStreamError("this reads one chunk alone")
    position = 1 + (bits.position + 7) // 8
    if any(bits.bits[bits.position : 8 * (position - 1)]):
        raise BadStreamError("bits between tables and lanes")
    head, tail = stream[position : position + 24], stream[position + 24 :]
    lanes = [int.from_bytes(head[i : i + 6], "little") for i in range(0, 24, 6)]
    words = [int.from_bytes(tail[i : i + 2], "little") for i in range(0, len(tail), 2)]
    return decode_chunk(
        lanes, words, [(n, s, table) for (n, s), table in zip(shape, tables, strict=True)]
    )
