"""Compiled loops on values: quantize and count, mask, subtract, add into sums, finish a mean.

Where values are floating point, their operations are written one by one, and the compiler neither
reorders nor fuses them, so that results are the same everywhere. Sums are of integers, or of a
fixed number of partial sums: a processor adds several at a time, in an order that stays the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedobd.codec._compiled import bits_of_float64, compiled

_CACHED = 4096
"""Elements that are gone over twice while they are still in the first cache (16 KiB of 32)."""


@compiled
def _quantize_row(
    values: Any, offset: Any, span: Any, num_levels: Any, shift: Any, symbols: Any, counts: Any
) -> Any:
    """Quantize and count the values of one client; see `quantize`."""
    one, cut, whole = np.uint32(1), np.uint64(shift), np.int32(num_levels)
    a, b = np.zeros(counts.size, np.uint32), np.zeros(counts.size, np.uint32)
    c, d = np.zeros(counts.size, np.uint32), np.zeros(counts.size, np.uint32)
    for start in range(0, values.size, _CACHED):
        part, made = values[start : start + _CACHED], symbols[start : start + _CACHED]
        for i in range(part.size):
            level = np.rint((part[i] - offset) / span * num_levels)
            made[i] = np.int32(min(max(level, -num_levels), num_levels)) + whole
        # Four counters for each symbol: adding to the one that was just written waits for the
        # write, and most symbols are like the one before.
        for i in range(0, made.size - 3, 4):
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

    values: float32, and symbols (written): unsigned, shape (clients, n), of which the columns
    start to stop. offsets, spans (d), num_levels (s): float32, shape (clients,). shifts, how many
    low bits are not counted: int64, shape (clients,). counts: int64, shape (clients, at least
    symbols without low bits); added to.
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
def keep(start: Any, seed: Any, threshold: Any, kept: Any) -> Any:
    """Write whether SplitMix64's outputs number `start` and on are at least a threshold (uint64).

    `_masks` has the source of the constants.
    """
    # Counter-based: output i needs none before it, so parts of a mask can be made apart.
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
    """Write differences and return the sum of their squares, in eight partial sums.

    One sum would wait for each addition before the next; LLVM may not reorder it by itself.
    """
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

    now: float32, shape (rows, m); before: the same, or (1, m), alike for all rows. Written:
    differences, float32, shape (rows, n); norms, float64, shape (rows,).
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
            largest = max(largest, bits_of_float64(np.float64(values[i])) & sign_off)
    else:
        for i in range(values.size):
            difference = np.float64(values[i]) - np.float64(base[i])
            largest = max(largest, bits_of_float64(difference) & sign_off)
    return largest


@compiled
def _add(values: Any, base: Any, scale: Any, sums: Any) -> Any:
    """Add (value - base) · scale, each rounded once half to even; no base: value · scale."""
    if base.size:
        for i in range(values.size):
            difference = np.float64(values[i]) - np.float64(base[i])
            # Fixed point: integers add up to the same in any order of uploads.
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
        below = base[mask] if base.size else base
        largest = _largest_difference(values, below)
        if largest > bits_of_float64(limit):
            return largest
        _add_masked(values, below, mask, scale, sums)
        return np.int64(-1)
    for start in range(0, values.size, _CACHED):
        part, below = values[start : start + _CACHED], base[start : start + _CACHED]
        if _largest_difference(part, below) > bits_of_float64(limit):
            _add(values[:start], base[:start], -scale, sums)  # takes back what was added
            return _largest_difference(values, base)
        _add(part, below, scale, sums[start : start + _CACHED])
    return np.int64(-1)


@compiled
def finish_mean(before: Any, sums: Any, unit: Any, total: Any, weights: Any, after: Any) -> Any:
    """Write before + sum · unit / total, worked out in float64.

    before, after (written): float32, shape (n,); sums: int64, in units of `unit`. The weight of
    each element is total, or weights: int64, shape (n,), 0 counted as 1; or shape (0,).
    """
    for i in range(before.size):
        weight = total if weights.size == 0 else max(weights[i], 1)
        after[i] = np.float32(np.float64(before[i]) + np.float64(sums[i]) * unit / weight)
