"""Compiled loops of the codec: quantize and count, rANS in and out, add into sums.

Coding is integer arithmetic; where values are floating point, their operations are written one by
one (the compiler neither reorders nor fuses them), so that results are the same everywhere. Every
index into a buffer that depends on a stream is checked against the buffer's length: a stream can
make a loop stop, never leave a buffer.

rANS with four interleaved lanes, each a state x in [2^31, 2^47), and 16-bit words. Symbols are put
in from the last to the first and come out from the first to the last; the symbol at position i of
a stream belongs to lane i mod 4. Putting in a symbol with frequency f and start c, of frequencies
that add up to M = 2^k: while x ≥ f·2^(47-k), emit the low word and shift; then x becomes ⌊x / f⌋·M
+ c + x mod f.

References:
    Jarek Duda. Asymmetric numeral systems: entropy coding combining speed of Huffman coding with
    compression rate of arithmetic coding. 2013, arXiv 1311.2540.
    Fabian Giesen. Interleaved entropy coders. 2014, arXiv 1402.3392.
    SplitMix64: see `_masks`.
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


def _bits_of_float64(context: Any, value: Any) -> Any:
    """The bits of a float64 as an int64."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.int64(types.float64), generate


_bits: Any = intrinsic(_bits_of_float64)


@compiled
def _quantize_row(
    values: Any, offset: Any, span: Any, num_levels: Any, shift: Any, symbols: Any, counts: Any
) -> Any:
    """Quantize and count the values of one client; see `quantize`."""
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
def quantize(
    values: Any,
    start: Any,
    stop: Any,
    offsets: Any,
    spans: Any,
    num_levels: Any,
    shifts: Any,
    symbols: Any,
    counts: Any,
) -> Any:
    """Turn values of several clients into symbols level + s, and count them without low bits.

    Args:
        values: float32, shape (clients, n).
        start: the first column to quantize.
        stop: the one after the last.
        offsets: float32, shape (clients,).
        spans: float32, shape (clients,), the ranges d.
        num_levels: float32, shape (clients,), s.
        shifts: int64, shape (clients,): how many low bits are not counted.
        symbols: unsigned, shape (clients, n); written.
        counts: int64, shape (clients, at least symbols without low bits); added to.
    """
    for row in range(values.shape[0]):
        _quantize_row(
            values[row, start:stop],
            offsets[row],
            spans[row],
            num_levels[row],
            shifts[row],
            symbols[row, start:stop],
            counts[row, : ((2 * np.int64(num_levels[row])) >> shifts[row]) + 1],
        )


@compiled
def encode_symbols(
    symbols: Any, shift: Any, entries: Any, states: Any, first: Any, words: Any, position: Any
) -> Any:
    """Put symbols into four lanes, from the last to the first.

    Args:
        symbols: unsigned, shape (n,).
        shift: b, low bits that are put in as they are.
        entries: uint64, shape (4 · symbols,): for each symbol without its low bits ⌈2^64 / f⌉
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
def keep(start: Any, seed: Any, threshold: Any, kept: Any) -> Any:
    """Write whether SplitMix64's outputs number `start` and on are at least a threshold.

    Args:
        start: uint64.
        seed: uint64.
        threshold: uint64.
        kept: bool, shape (n,); written.
    """
    for i in range(kept.size):
        mixed = (start + np.uint64(i + 1)) * np.uint64(0x9E3779B97F4A7C15) + seed
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        kept[i] = (mixed ^ (mixed >> np.uint64(31))) >= threshold


@compiled
def _subtract(now: Any, before: Any, differences: Any, i: Any) -> Any:
    """Write one difference and return its square."""
    difference = now[i] - before[i]
    differences[i] = difference
    return np.float64(difference) * np.float64(difference)


@compiled
def _subtract_row(now: Any, before: Any, differences: Any) -> Any:
    """Write differences and return the sum of their squares."""
    a = b = c = d = e = f = g = h = 0.0
    whole = differences.size & ~7
    for i in range(0, whole, 8):
        a += _subtract(now, before, differences, i)
        b += _subtract(now, before, differences, i + 1)
        c += _subtract(now, before, differences, i + 2)
        d += _subtract(now, before, differences, i + 3)
        e += _subtract(now, before, differences, i + 4)
        f += _subtract(now, before, differences, i + 5)
        g += _subtract(now, before, differences, i + 6)
        h += _subtract(now, before, differences, i + 7)
    for i in range(whole, differences.size):
        a += _subtract(now, before, differences, i)
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


@compiled
def subtract(now: Any, before: Any, start: Any, differences: Any, norms: Any) -> Any:
    """Write what a part of each row has changed by, and the sum of squares of that.

    Eight float64 sums run over every eighth difference; what is left over goes to the first, and
    they are added in pairs.

    Args:
        now: float32, shape (rows, m).
        before: float32, shape (rows, m); or (1, m), the same for all rows.
        start: where the part begins.
        differences: float32, shape (rows, n); written: now - before.
        norms: float64, shape (rows,); written.
    """
    part = slice(start, start + differences.shape[1])
    for row in range(differences.shape[0]):
        below = before[min(row, before.shape[0] - 1), part]
        norms[row] = _subtract_row(now[row, part], below, differences[row])


@compiled
def _largest_magnitude(bits: Any) -> Any:
    """Return the bits of the largest |value| of float32 values, given as int32.

    Bits of magnitudes are ordered as the magnitudes are, and above them are infinity and NaN; as
    integers their maximum is taken several at a time.
    """
    largest = np.int32(0)
    for i in range(bits.size):
        largest = max(largest, bits[i] & np.int32(0x7FFFFFFF))
    return largest


_INFINITY = 0x7F800000  # bits of a float32


def is_finite(values: Any) -> bool:
    """Whether none of float32 values, shape (n,), is NaN or infinite."""
    return int(_largest_magnitude(values.view(np.int32))) < _INFINITY


@compiled
def _largest_difference(values: Any, base: Any) -> Any:
    """Return the bits of the largest |value - base|, worked out in float64, as an int64.

    Bits of infinity and NaN are above those of any number.
    """
    largest, sign_off = np.int64(0), np.int64(0x7FFFFFFFFFFFFFFF)
    if base.size == 0:
        for i in range(values.size):
            largest = max(largest, _bits(np.float64(values[i])) & sign_off)
    else:
        for i in range(values.size):
            difference = np.float64(values[i]) - np.float64(base[i])
            largest = max(largest, _bits(difference) & sign_off)
    return largest


@compiled
def _add(values: Any, base: Any, scale: Any, sums: Any) -> Any:
    """Add (value - base) · scale, each rounded once half to even; no base: value · scale."""
    if base.size:
        for i in range(values.size):
            difference = np.float64(values[i]) - np.float64(base[i])
            sums[i] += np.int64(np.rint(difference * scale))
    else:
        for i in range(values.size):
            sums[i] += np.int64(np.rint(np.float64(values[i]) * scale))


@compiled
def _add_masked(values: Any, base: Any, mask: Any, scale: Any, sums: Any) -> Any:
    """Do the same where the mask is set, whose elements values and base are."""
    j = 0
    for i in range(mask.size):
        if mask[i]:
            below = np.float64(base[j]) if base.size else 0.0
            sums[i] += np.int64(np.rint((np.float64(values[j]) - below) * scale))
            j += 1


@compiled
def add_differences(values: Any, base: Any, mask: Any, limit: Any, scale: Any, sums: Any) -> Any:
    """Add (value - base) · scale, each rounded once half to even; nothing where one is too large.

    Args:
        values: float32, shape (n,), of any bits.
        base: float32, shape (m,), what to subtract; shape (0,) where they are differences.
        mask: bool, shape (m,), which elements the values belong to; shape (0,) where n = m.
        limit: float64, the largest |value - base| that is added.
        scale: float64.
        sums: int64, shape (m,); added to.

    Returns:
        -1; or, where nothing was added, the bits of the largest |value - base| as a float64.
    """
    if mask.size:
        own = base[mask] if base.size else base
        largest = _largest_difference(values, own)
        if largest > _bits(limit):
            return largest
        _add_masked(values, own, mask, scale, sums)
        return np.int64(-1)
    size = 4096  # what is looked at and then added while it is still in the first cache
    for start in range(0, values.size, size):
        part, below = values[start : start + size], base[start : start + size]
        if _largest_difference(part, below) > _bits(limit):
            _add(values[:start], base[:start], -scale, sums)  # takes back what was added
            return _largest_difference(values, base)
        _add(part, below, scale, sums[start : start + size])
    return np.int64(-1)


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
