"""Compiled loops of the level coder's tables: from counts to frequencies, to bits, and back.

All of it is integer arithmetic, so that the same counts give the same table on every machine.
Reading checks every place against the buffer's length and every frequency against what is left,
and says so by a negative number.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedobd.codec._compiled import compiled


@compiled
def _floor_log2(number: Any) -> Any:
    """Return ⌊log2⌋ of a number from 1."""
    whole = 0
    while number >> (whole + 1):
        whole += 1
    return whole


@compiled
def log2_table(size: Any) -> Any:
    """Return log2 of 0 (as 0) to size - 1, int64 in units of 2^-16, from integers alone.

    A library's log2 may differ in its last bit from machine to machine, and with it the table that
    is chosen. Each bit of the fraction comes from squaring y in [1, 2): y² ≥ 2 says that it is 1.
    """
    table = np.zeros(size, np.int64)
    for number in range(1, size):
        whole = _floor_log2(number)
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

    Few leading bits make a table short, and it travels with every stream: a frequency has at most
    `mantissa` bits after its leading one, and symbol `largest` takes what the others leave.
    Counts and frequencies (written) are int64, shape (symbols,); k is 1 to 16. Returns whether
    the others leave at least 1.
    """
    # The largest symbol takes what is left, since a unit more or less costs it least.
    wanted = max(1, ((counts[largest] << k) + total // 2) // total)
    mass, left = 1 << k, 0
    for _ in range(8):  # rounding up, to 1 above all, takes mass that others have to give
        left = 1 << k
        for symbol in range(counts.size):
            frequency = 0
            if counts[symbol] > 0 and symbol != largest:
                frequency = max(1, (counts[symbol] * mass + total // 2) // total)
                cut = _floor_log2(frequency) - mantissa
                if cut > 0:
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
    length = _floor_log2(value)
    position = _write_bits(buffer, position, 1 << length, length + 1)
    return _write_bits(buffer, position, value & ((1 << length) - 1), length)


@compiled
def write_table(
    frequencies: Any, largest: Any, k: Any, mantissa: Any, width: Any, buffer: Any, position: Any
) -> Any:
    """Write a table as `normalize` makes it into a uint8 buffer; return the position after it.

    `_entropy` describes it. Positions are in bits, from which on the buffer is zero; `width` is
    the bits of a symbol's number.
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
        length = _floor_log2(frequency)
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
def _read_length(buffer: Any, position: Any, before: Any) -> Any:
    """Return ⌊log2⌋ of a frequency after that of the one before, or -1; and the position after."""
    folded = 0
    bit = _read_bits(buffer, position, 1)
    while bit == 1 and folded <= 32:
        folded += 1
        bit = _read_bits(buffer, position + folded, 1)
    length = before + (folded >> 1 if folded & 1 == 0 else -((folded + 1) >> 1))
    if bit != 0 or length < 0 or length > 15:
        return -1, position
    return length, position + folded + 1


@compiled
def _read_entry(buffer: Any, position: Any, before: Any, mantissa: Any) -> Any:
    """Return the gap before a written frequency (-1: it is none), it, its ⌊log2⌋, the position."""
    gap = _read_bits(buffer, position, 1)
    position += 1
    if gap == 1:
        gap, position = _read_gamma(buffer, position, 16)
    length, position = _read_length(buffer, position, before)
    kept = min(length, mantissa)
    tail = _read_bits(buffer, position, kept) if kept >= 0 else -1
    if gap < 0 or tail < 0:
        return -1, 0, 0, position
    frequency = ((np.int64(1) << kept) + tail) << (length - kept)
    return gap, frequency, length, position + kept


@compiled
def read_table(buffer: Any, position: Any, width: Any, frequencies: Any) -> Any:
    """Read a table, as `write_table` writes it, into frequencies of 0.

    Returns k, 0 for the uniform table, -1 for a table that no encoder writes; and the position
    after.
    """
    mode = _read_bits(buffer, position, 1)
    if mode <= 0:
        return mode, position + 1
    k = _read_bits(buffer, position + 1, 4) + 1
    mantissa = _read_bits(buffer, position + 5, 4)
    largest = _read_bits(buffer, position + 9, width)
    entries, position = _read_gamma(buffer, position + 9 + width, 16)
    # The last of these to be cut is -1 too, so it speaks for those before it.
    if largest < 0 or largest >= frequencies.size or entries < 1 or entries > frequencies.size:
        return -1, position
    left = np.int64(1) << k
    index, length = 0, 0
    for _ in range(entries - 1):
        gap, frequency, length, position = _read_entry(buffer, position, length, mantissa)
        index += gap
        symbol = index + (1 if index >= largest else 0)
        if gap < 0 or symbol >= frequencies.size:
            return -1, position
        frequencies[symbol] = frequency
        left -= frequency
        index += 1
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

    A larger k has to save one part in 4,096, since a smaller one decodes faster. `log2` is for 0
    to 2^16, `scratch` zeros with room for any table, and `frequencies` is written for the choice.
    Returns k (0 for the uniform table), mantissa, the symbol that takes the rest, and all bits.
    """
    largest, distinct = counts.argmax(), np.count_nonzero(counts)
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
            if bits > best:  # spares writing the table
                continue
            end = write_table(frequencies, largest, k, mantissa, width, scratch, 0)
            scratch[: (end + 7) >> 3] = 0
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
    """Write what `encode_symbols` wants to know of each symbol: uint64, shape (4 · symbols,).

    For a symbol of frequency f, whose slots start at c: ⌈2^64 / f⌉, f·2^(47-k), c, and 2^k - f.
    """
    start = 0
    for symbol in range(frequencies.size):
        f = np.uint64(frequencies[symbol])
        if frequencies[symbol] == 1:
            # 2^64 has no place; 2^64 - 1 makes ⌊x / f⌋ one too small, which c makes good.
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
    """Write what `decode_symbols` looks up: uint64, shape (sum of the frequencies,).

    A slot is what its symbol stands for (`contents`, uint32) · 2^32 + (f - 1) · 2^16 + its place
    among those of the symbol. f - 1, since f may be 2^16.
    """
    position = 0
    for symbol in range(frequencies.size):
        head = np.uint64(contents[symbol]) << np.uint64(32)
        head |= np.uint64(max(frequencies[symbol] - 1, 0)) << np.uint64(16)
        for inner in range(frequencies[symbol]):
            slots[position] = head | np.uint64(inner)
            position += 1
