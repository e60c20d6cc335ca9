"""Compiled loops of the level coder: quantize and count, rANS in and out, add into sums.

Everything is integer arithmetic but for the quantization itself, whose float32 operations are
written one by one (the compiler neither reorders nor fuses them). Every index into a buffer that
depends on a stream is checked against the buffer's length: a stream can make a loop stop, never
leave a buffer.

rANS with four interleaved lanes, each a state x in [2^31, 2^47), and 16-bit words. Symbols are put
in from the last to the first and come out from the first to the last; the symbol at position i of
a stream belongs to lane i mod 4. Putting in a symbol with frequency f and start c, of frequencies
that add up to M = 2^k: while x ≥ f·2^(47-k), emit the low word and shift; then x becomes ⌊x / f⌋·M
+ c + x mod f.

References:
    Jarek Duda. Asymmetric numeral systems: entropy coding combining speed of Huffman coding with
    compression rate of arithmetic coding. 2013, arXiv 1311.2540.
    Fabian Giesen. Interleaved entropy coders. 2014, arXiv 1402.3392.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

LOWEST_STATE = 1 << 31
"""L: a lane's state is in [L, 2^16 L) between two symbols, and L before the first is put in."""

NUM_LANES = 4


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop when it is first called, and keep it on disk; it runs without the GIL."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    result: Callable[..., Any]
    try:
        result = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # there is no folder to keep it in: it is compiled in every process
        result = numba.njit(**options)(function)
    return result


def _multiply_high(context: Any, a: Any, b: Any) -> Any:
    """Upper 64 bits of the 128-bit product of two unsigned 64-bit numbers."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide, narrow = ir.IntType(128), ir.IntType(64)
        x, y = (builder.zext(argument, wide) for argument in arguments)
        product = builder.mul(x, y)
        return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), narrow)

    return types.uint64(types.uint64, types.uint64), generate


_high_product: Any = intrinsic(_multiply_high)


@compiled
def quantize(
    values: Any, offset: Any, span: Any, num_levels: Any, shift: Any, symbols: Any, counts: Any
) -> Any:
    """Turn values into symbols level + s, and count the symbols without their low bits.

    Args:
        values: float32, shape (n,).
        offset: float32.
        span: float32, the range d.
        num_levels: float32, s.
        shift: how many low bits are not counted.
        symbols: unsigned, shape (n,); written.
        counts: int64, one for each symbol without its low bits; added to.
    """
    size = 4096  # what is quantized and then counted while it is still in the first cache
    one, cut, whole = np.uint32(1), np.uint64(shift), np.int32(num_levels)
    a, b = np.zeros(counts.size, np.uint32), np.zeros(counts.size, np.uint32)
    c, d = np.zeros(counts.size, np.uint32), np.zeros(counts.size, np.uint32)
    for start in range(0, values.size, size):
        part, made = values[start : start + size], symbols[start : start + size]
        for i in range(part.size):
            level = np.rint((part[i] - offset) / span * num_levels)
            made[i] = np.int32(min(max(level, -num_levels), num_levels)) + whole
        for i in range(0, made.size - 3, 4):  # like symbols in a row wait for each other else
            a[np.uint64(made[i]) >> cut] += one
            b[np.uint64(made[i + 1]) >> cut] += one
            c[np.uint64(made[i + 2]) >> cut] += one
            d[np.uint64(made[i + 3]) >> cut] += one
        for i in range(made.size - made.size % 4, made.size):
            a[np.uint64(made[i]) >> cut] += one
    for i in range(counts.size):
        counts[i] += np.int64(a[i]) + np.int64(b[i]) + np.int64(c[i]) + np.int64(d[i])


@compiled
def encode_symbols(
    symbols: Any, shift: Any, entries: Any, states: Any, first: Any, words: Any, position: Any
) -> Any:
    """Put symbols into four lanes, from the last to the first.

    Args:
        symbols: unsigned, shape (n,).
        shift: b, low bits that are put in as they are.
        entries: uint64, shape (4 · symbols,): for each symbol without its low bits ⌊2^64 / f⌋ + 1
            (2^64 - 1 for f = 1), f·2^(47-k), c (c + M - 1 for f = 1), and M - f.
        states: uint64, shape (4,): the lane of symbol i is (first + i) mod 4; changed.
        first: position of the first symbol in its stream.
        words: uint16; written from `position` down, at most 2 words a symbol.
        position: where the words start that were written before.

    Returns:
        Where the words start now.
    """
    b = np.uint64(shift)
    low_bits = (np.uint64(1) << b) - np.uint64(1)
    for i in range(symbols.size - 1, -1, -1):
        lane = (first + i) & 3
        x = states[lane]
        if shift:
            if x >= np.uint64(1) << (np.uint64(47) - b):
                position -= 1
                words[position] = np.uint16(x & np.uint64(0xFFFF))
                x >>= np.uint64(16)
            x = (x << b) | (np.uint64(symbols[i]) & low_bits)
        e = np.int64(np.uint64(symbols[i]) >> b) * 4
        if x >= entries[e + 1]:
            position -= 1
            words[position] = np.uint16(x & np.uint64(0xFFFF))
            x >>= np.uint64(16)
        states[lane] = x + entries[e + 2] + _high_product(x, entries[e]) * entries[e + 3]
    return position


@compiled
def encode_symbols_fast(
    symbols: Any, entries: Any, states: Any, first: Any, words: Any, position: Any
) -> Any:
    """Do what `encode_symbols` does, without low bits, branches, and memory for the lanes."""
    i = symbols.size - 1
    a, b, c, d = first & 3, (first + 1) & 3, (first + 2) & 3, (first + 3) & 3
    while i >= 0 and (i & 3) != 3:
        lane = (first + i) & 3
        x = states[lane]
        e = np.int64(symbols[i]) * 4
        if x >= entries[e + 1]:
            position -= 1
            words[position] = np.uint16(x & np.uint64(0xFFFF))
            x >>= np.uint64(16)
        states[lane] = x + entries[e + 2] + _high_product(x, entries[e]) * entries[e + 3]
        i -= 1
    x0, x1, x2, x3 = states[a], states[b], states[c], states[d]
    while i >= 3:
        e = np.int64(symbols[i]) * 4
        words[position - 1] = np.uint16(x3 & np.uint64(0xFFFF))
        full = np.int64(x3 >= entries[e + 1])
        position -= full
        x3 >>= np.uint64(full << 4)
        x3 = x3 + entries[e + 2] + _high_product(x3, entries[e]) * entries[e + 3]
        e = np.int64(symbols[i - 1]) * 4
        words[position - 1] = np.uint16(x2 & np.uint64(0xFFFF))
        full = np.int64(x2 >= entries[e + 1])
        position -= full
        x2 >>= np.uint64(full << 4)
        x2 = x2 + entries[e + 2] + _high_product(x2, entries[e]) * entries[e + 3]
        e = np.int64(symbols[i - 2]) * 4
        words[position - 1] = np.uint16(x1 & np.uint64(0xFFFF))
        full = np.int64(x1 >= entries[e + 1])
        position -= full
        x1 >>= np.uint64(full << 4)
        x1 = x1 + entries[e + 2] + _high_product(x1, entries[e]) * entries[e + 3]
        e = np.int64(symbols[i - 3]) * 4
        words[position - 1] = np.uint16(x0 & np.uint64(0xFFFF))
        full = np.int64(x0 >= entries[e + 1])
        position -= full
        x0 >>= np.uint64(full << 4)
        x0 = x0 + entries[e + 2] + _high_product(x0, entries[e]) * entries[e + 3]
        i -= 4
    states[a], states[b], states[c], states[d] = x0, x1, x2, x3
    return position


@compiled
def decode_symbols(
    words: Any,
    position: Any,
    states: Any,
    first: Any,
    slots: Any,
    k: Any,
    shift: Any,
    num_levels: Any,
    step: Any,
    offset: Any,
    values: Any,
) -> Any:
    """Take symbols out of four lanes, from the first to the last, and dequantize them.

    Args:
        words: uint16.
        position: the next word.
        states: uint64, shape (4,): the lane of value i is (first + i) mod 4; changed.
        first: position of the first value in its stream.
        slots: uint64, shape (2^k,): symbol without low bits · 2^32 + (f - 1) · 2^16 + slot - c.
        k: frequencies add up to 2^k.
        shift: b, low bits that come out as they are.
        num_levels: s, int64.
        step: float32, range / s.
        offset: float32.
        values: float32, shape (n,); written.

    Returns:
        The next word; -1 where words are missing, -2 where a level is beyond s.
    """
    bits, b = np.uint64(k), np.uint64(shift)
    mask = (np.uint64(1) << bits) - np.uint64(1)
    low_bits = (np.uint64(1) << b) - np.uint64(1)
    sixteen, low16 = np.uint64(16), np.uint64(0xFFFF)
    lowest = np.uint64(LOWEST_STATE)
    for i in range(values.size):
        lane = (first + i) & 3
        x = states[lane]
        slot = slots[x & mask]
        x = ((slot >> sixteen & low16) + np.uint64(1)) * (x >> bits) + (slot & low16)
        if x < lowest:
            if position >= words.size:
                return -1
            x = (x << sixteen) | np.uint64(words[position])
            position += 1
        symbol = slot >> np.uint64(32)
        if shift:
            symbol = (symbol << b) | (x & low_bits)
            x >>= b
            if x < lowest:
                if position >= words.size:
                    return -1
                x = (x << sixteen) | np.uint64(words[position])
                position += 1
        states[lane] = x
        level = np.int64(symbol) - num_levels
        if level > num_levels:
            return -2
        scaled = np.float32(level) * step
        values[i] = scaled + offset
    return position


@compiled
def decode_symbols_fast(
    words: Any, position: Any, states: Any, first: Any, slots: Any, k: Any, values: Any
) -> Any:
    """Do what `decode_symbols` does, for no low bits, from slots that hold the values' bits.

    Args:
        words: uint16.
        position: the next word.
        states: uint64, shape (4,); changed.
        first: position of the first value in its stream.
        slots: uint64, shape (2^k,): bits of the float32 value · 2^32 + (f - 1) · 2^16 + slot - c.
        k: frequencies add up to 2^k.
        values: uint32, shape (n,), for the bits of the values; written.

    Returns:
        The next word; -1 where words are missing.
    """
    bits = np.uint64(k)
    mask = (np.uint64(1) << bits) - np.uint64(1)
    one, sixteen, half = np.uint64(1), np.uint64(16), np.uint64(32)
    low16, lowest = np.uint64(0xFFFF), np.uint64(LOWEST_STATE)
    a, b, c, d = first & 3, (first + 1) & 3, (first + 2) & 3, (first + 3) & 3
    x0, x1, x2, x3 = states[a], states[b], states[c], states[d]
    i = 0
    while i + 4 <= values.size and position + 4 <= words.size:
        slot = slots[x0 & mask]
        values[i] = np.uint32(slot >> half)
        x0 = ((slot >> sixteen & low16) + one) * (x0 >> bits) + (slot & low16)
        empty = np.int64(x0 < lowest)
        x0 = (x0 << np.uint64(empty << 4)) | (np.uint64(words[position]) * np.uint64(empty))
        position += empty
        slot = slots[x1 & mask]
        values[i + 1] = np.uint32(slot >> half)
        x1 = ((slot >> sixteen & low16) + one) * (x1 >> bits) + (slot & low16)
        empty = np.int64(x1 < lowest)
        x1 = (x1 << np.uint64(empty << 4)) | (np.uint64(words[position]) * np.uint64(empty))
        position += empty
        slot = slots[x2 & mask]
        values[i + 2] = np.uint32(slot >> half)
        x2 = ((slot >> sixteen & low16) + one) * (x2 >> bits) + (slot & low16)
        empty = np.int64(x2 < lowest)
        x2 = (x2 << np.uint64(empty << 4)) | (np.uint64(words[position]) * np.uint64(empty))
        position += empty
        slot = slots[x3 & mask]
        values[i + 3] = np.uint32(slot >> half)
        x3 = ((slot >> sixteen & low16) + one) * (x3 >> bits) + (slot & low16)
        empty = np.int64(x3 < lowest)
        x3 = (x3 << np.uint64(empty << 4)) | (np.uint64(words[position]) * np.uint64(empty))
        position += empty
        i += 4
    states[a], states[b], states[c], states[d] = x0, x1, x2, x3
    while i < values.size:
        lane = (first + i) & 3
        x = states[lane]
        slot = slots[x & mask]
        values[i] = np.uint32(slot >> half)
        x = ((slot >> sixteen & low16) + one) * (x >> bits) + (slot & low16)
        if x < lowest:
            if position >= words.size:
                return -1
            x = (x << sixteen) | np.uint64(words[position])
            position += 1
        states[lane] = x
        i += 1
    return position


@compiled
def log2_table(size: Any) -> Any:
    """Return log2 of 0 (as 0) to size - 1, int64 in units of 2^-16, from integers alone."""
    table = np.zeros(size, np.int64)
    for number in range(1, size):
        whole = 0
        while number >> (whole + 1):
            whole += 1
        y = np.uint64(number) << np.uint64(31 - whole)
        fraction = 0
        for _ in range(16):
            y = (y * y) >> np.uint64(31)
            fraction <<= 1
            if y >> np.uint64(32):
                y >>= np.uint64(1)
                fraction |= 1
        table[number] = (whole << 16) + fraction
    return table


@compiled
def normalize(
    counts: Any, total: Any, largest: Any, k: Any, mantissa: Any, frequencies: Any
) -> Any:
    """Turn counts into frequencies that add up to 2^k, all but one rounded to few leading bits.

    Args:
        counts: int64, shape (symbols,).
        total: their sum.
        largest: the symbol that takes what the others leave.
        k: 1 to 16.
        mantissa: bits that a frequency may have after its leading one.
        frequencies: int64, shape (symbols,); written.

    Returns:
        Whether the others leave at least 1.
    """
    wanted = max(1, ((counts[largest] << k) + total // 2) // total)
    mass, left = 1 << k, 0
    for _ in range(8):  # rounding up, to 1 above all, takes mass that others have to give
        left = 1 << k
        for symbol in range(counts.size):
            frequency = 0
            if counts[symbol] > 0 and symbol != largest:
                frequency = max(1, (counts[symbol] * mass + total // 2) // total)
                length = 0
                while frequency >> (length + 1):
                    length += 1
                if length > mantissa:
                    cut = length - mantissa
                    frequency = ((frequency + (1 << (cut - 1))) >> cut) << cut
            frequencies[symbol] = frequency
            left -= frequency
        if abs(left - wanted) <= wanted >> 4:
            break
        mass = max(1, mass + left - wanted)
    frequencies[largest] = left
    return left >= 1


@compiled
def coded_bits(counts: Any, frequencies: Any, k: Any, log2: Any) -> Any:
    """Return what the symbols cost with these frequencies, in units of 2^-16 bits."""
    total = 0
    for symbol in range(counts.size):
        if counts[symbol]:
            total += counts[symbol] * ((k << 16) - log2[frequencies[symbol]])
    return total


@compiled
def _write_bits(buffer: Any, position: Any, value: Any, count: Any) -> Any:
    for bit in range(count):
        if (value >> bit) & 1:
            buffer[(position + bit) >> 3] |= np.uint8(1 << ((position + bit) & 7))
    return position + count


@compiled
def _write_gamma(buffer: Any, position: Any, value: Any) -> Any:
    """Write Elias's gamma code of a number from 1."""
    length = 0
    while value >> (length + 1):
        length += 1
    position = _write_bits(buffer, position, 1 << length, length + 1)
    return _write_bits(buffer, position, value & ((1 << length) - 1), length)


@compiled
def write_table(
    frequencies: Any, largest: Any, k: Any, mantissa: Any, width: Any, buffer: Any, position: Any
) -> Any:
    """Write a table of frequencies; `_entropy` describes it.

    Args:
        frequencies: int64, shape (symbols,), as `normalize` makes them.
        largest: the symbol that takes what the others leave.
        k: frequencies add up to 2^k.
        mantissa: bits that a frequency may have after its leading one.
        width: bits of a symbol's number.
        buffer: uint8, zero from `position` on.
        position: in bits.

    Returns:
        The position after it.
    """
    position = _write_bits(buffer, position, 1, 1)
    position = _write_bits(buffer, position, k - 1, 4)
    position = _write_bits(buffer, position, mantissa, 4)
    position = _write_bits(buffer, position, largest, width)
    entries = 0
    for symbol in range(frequencies.size):
        if frequencies[symbol] and symbol != largest:
            entries += 1
    position = _write_gamma(buffer, position, entries + 1)
    gap, before = 0, 0
    for symbol in range(frequencies.size):
        frequency = frequencies[symbol]
        if symbol == largest:
            continue
        if frequency == 0:
            gap += 1
            continue
        position = _write_bits(buffer, position, np.int64(gap > 0), 1)
        if gap:
            position = _write_gamma(buffer, position, gap)
        length = 0
        while frequency >> (length + 1):
            length += 1
        change = length - before
        folded = 2 * change if change >= 0 else -2 * change - 1
        position = _write_bits(buffer, position, (np.int64(1) << folded) - 1, folded + 1)
        kept = min(length, mantissa)
        tail = (frequency >> (length - kept)) & ((1 << kept) - 1)
        position = _write_bits(buffer, position, tail, kept)
        gap, before = 0, length
    return position


@compiled
def _read_bits(buffer: Any, position: Any, count: Any) -> Any:
    """Return a number of bits as a number; -1 where the buffer ends before."""
    if position + count > buffer.size * 8:
        return -1
    value = np.int64(0)
    for bit in range(count):
        value |= np.int64((buffer[(position + bit) >> 3] >> ((position + bit) & 7)) & 1) << bit
    return value


@compiled
def _read_gamma(buffer: Any, position: Any, longest: Any) -> Any:
    """Return the number and the position after it; -1 where it is cut or over `longest` bits."""
    length = 0
    while True:
        bit = _read_bits(buffer, position, 1)
        position += 1
        if bit < 0 or length > longest:
            return -1, position
        if bit:
            break
        length += 1
    tail = _read_bits(buffer, position, length)
    if tail < 0:
        return -1, position
    return (np.int64(1) << length) + tail, position + length


@compiled
def read_table(buffer: Any, position: Any, width: Any, frequencies: Any) -> Any:
    """Read a table of frequencies.

    Args:
        buffer: uint8.
        position: in bits.
        width: bits of a symbol's number.
        frequencies: int64, zeros, shape (symbols,); written.

    Returns:
        k, 0 for the uniform table, -1 for a table that no encoder writes; and the position after.
    """
    mode = _read_bits(buffer, position, 1)
    if mode <= 0:
        return mode, position + 1
    k = _read_bits(buffer, position + 1, 4) + 1
    mantissa = _read_bits(buffer, position + 5, 4)
    largest = _read_bits(buffer, position + 9, width)
    position += 9 + width
    if k < 1 or mantissa < 0 or largest < 0 or largest >= frequencies.size:
        return -1, position
    entries, position = _read_gamma(buffer, position, 16)
    if entries < 1 or entries > frequencies.size:
        return -1, position
    left = np.int64(1) << k
    index, before = 0, 0
    for _ in range(entries - 1):
        gap = _read_bits(buffer, position, 1)
        position += 1
        if gap == 1:
            gap, position = _read_gamma(buffer, position, 16)
        if gap < 0:
            return -1, position
        folded = 0
        while True:
            bit = _read_bits(buffer, position, 1)
            position += 1
            if bit < 0 or folded > 32:
                return -1, position
            if bit == 0:
                break
            folded += 1
        length = before + (folded >> 1 if folded & 1 == 0 else -((folded + 1) >> 1))
        if length < 0 or length > 15:
            return -1, position
        kept = min(length, mantissa)
        tail = _read_bits(buffer, position, kept)
        position += kept
        index += gap
        symbol = index + (1 if index >= largest else 0)
        if tail < 0 or symbol >= frequencies.size:
            return -1, position
        frequency = ((np.int64(1) << kept) + tail) << (length - kept)
        frequencies[symbol] = frequency
        left -= frequency
        index += 1
        before = length
    if left < 1:
        return -1, position
    frequencies[largest] = left
    return k, position


@compiled
def uniform(frequencies: Any) -> Any:
    """Write the frequencies of the uniform table, which add up to 2^16."""
    size = frequencies.size
    for symbol in range(size):
        frequencies[symbol] = ((symbol + 1) << 16) // size - (symbol << 16) // size


@compiled
def choose_table(
    counts: Any, total: Any, width: Any, log2: Any, scratch: Any, frequencies: Any
) -> Any:
    """Choose k and mantissa so that table and symbols together take the fewest bits.

    A larger k has to save one part in 4,096, since a smaller one decodes faster.

    Args:
        counts: int64, shape (symbols,).
        total: their sum, at least 1.
        width: bits of a symbol's number.
        log2: as `log2_table` makes it, for 0 to 2^16.
        scratch: uint8, zeros, room for any table.
        frequencies: int64, shape (symbols,); written for the choice.

    Returns:
        k (0 for the uniform table), mantissa, the symbol that takes what is left, and all bits.
    """
    largest, distinct = 0, 0
    for symbol in range(counts.size):
        distinct += counts[symbol] > 0
        if counts[symbol] > counts[largest]:
            largest = symbol
    uniform(frequencies)
    best = coded_bits(counts, frequencies, 16, log2) + (1 << 16)
    best_k, best_mantissa = 0, 0
    small = total < 1 << 14  # few symbols pay for a coarse table only, many for a fine one only
    for k in range(8 if small else 10, 13 if small else 17, 2):
        if (1 << k) < 2 * distinct:
            continue
        for mantissa in (0, 1, 2) if small else (2, 4, 15):
            if not normalize(counts, total, largest, k, mantissa, frequencies):
                continue
            bits = coded_bits(counts, frequencies, k, log2)
            if bits > best:
                continue
            end = write_table(frequencies, largest, k, mantissa, width, scratch, 0)
            for i in range((end + 7) >> 3):
                scratch[i] = 0
            bits += end << 16
            if bits < (best if k == best_k else best - (best >> 12)):
                best, best_k, best_mantissa = bits, k, mantissa
    if best_k:
        normalize(counts, total, largest, best_k, best_mantissa, frequencies)
    else:
        uniform(frequencies)
    return best_k, best_mantissa, largest, best >> 16


@compiled
def make_entries(frequencies: Any, k: Any, entries: Any) -> Any:
    """Write what `encode_symbols` wants to know of each symbol."""
    start = 0
    for symbol in range(frequencies.size):
        f = np.uint64(frequencies[symbol])
        if frequencies[symbol] == 1:
            entries[4 * symbol] = np.uint64(0xFFFFFFFFFFFFFFFF)
            entries[4 * symbol + 2] = np.uint64(start + (1 << k) - 1)
        elif frequencies[symbol] > 1:
            entries[4 * symbol] = np.uint64(0xFFFFFFFFFFFFFFFF) // f + np.uint64(1)
            entries[4 * symbol + 2] = np.uint64(start)
        entries[4 * symbol + 1] = f << np.uint64(47 - k)
        entries[4 * symbol + 3] = np.uint64(1 << k) - f
        start += frequencies[symbol]


@compiled
def make_slots(frequencies: Any, contents: Any, slots: Any) -> Any:
    """Write what `decode_symbols` looks up; `contents`, uint32, is what each symbol stands for."""
    position = 0
    for symbol in range(frequencies.size):
        head = np.uint64(contents[symbol]) << np.uint64(32)
        head |= np.uint64(max(frequencies[symbol] - 1, 0)) << np.uint64(16)
        for inner in range(frequencies[symbol]):
            slots[position] = head | np.uint64(inner)
            position += 1


@compiled
def squared_norm(values: Any) -> Any:
    """Return the sum of squares of float32 values: eight float64 sums over every eighth value."""
    a = b = c = d = e = f = g = h = 0.0
    whole = values.size & ~7
    for i in range(0, whole, 8):
        a += np.float64(values[i]) * np.float64(values[i])
        b += np.float64(values[i + 1]) * np.float64(values[i + 1])
        c += np.float64(values[i + 2]) * np.float64(values[i + 2])
        d += np.float64(values[i + 3]) * np.float64(values[i + 3])
        e += np.float64(values[i + 4]) * np.float64(values[i + 4])
        f += np.float64(values[i + 5]) * np.float64(values[i + 5])
        g += np.float64(values[i + 6]) * np.float64(values[i + 6])
        h += np.float64(values[i + 7]) * np.float64(values[i + 7])
    for i in range(whole, values.size):
        a += np.float64(values[i]) * np.float64(values[i])
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


@compiled
def add_scaled(values: Any, scale: Any, sums: Any) -> Any:
    """Add each value times a float64 scale, rounded once half to even, to int64 sums."""
    for i in range(values.size):
        sums[i] += np.int64(np.rint(np.float64(values[i]) * scale))


@compiled
def finish_mean(before: Any, sums: Any, unit: Any, total: Any, weights: Any, after: Any) -> Any:
    """Write before + sum · unit / total, worked out in float64.

    Args:
        before: float32, shape (n,).
        sums: int64, shape (n,).
        unit: float64, what one unit of a sum is worth.
        total: the weight of all uploads; not used where there are weights.
        weights: int64, shape (n,), the weight of each element, 0 counted as 1; or shape (0,).
        after: float32, shape (n,); written.
    """
    for i in range(before.size):
        weight = total if weights.size == 0 else max(weights[i], 1)
        after[i] = np.float32(np.float64(before[i]) + np.float64(sums[i]) * unit / weight)
