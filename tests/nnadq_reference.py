"""A slow reference of NNADQ, element by element, written from the description of the method.

It shares no code with the package: single NumPy float32 operations in the order that the method
states, minimum and maximum by comparison, rounding by Python's own half-to-even `round`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_CAP = 2**22
_LARGEST_RANGE = 2.0**126
_SMALLEST_RANGE = 2.0**-104


@dataclass(frozen=True)
class Reference:
    """What NNADQ makes of a tensor: `coding` is "raw", "constant" or "levels"."""

    coding: str
    num_levels: int = 0
    offset: float = 0.0
    range: float = 0.0
    levels: tuple[int, ...] = ()
    decoded: tuple[float, ...] = ()


def num_levels_of(span: float, weight: float, repr_bits: int) -> int:
    """Return s = max(1, ⌊√(ln 4 · REPR · d / β)⌋), at most 2^22, in float64."""
    ideal = math.sqrt(math.log(4) * repr_bits * span / weight)
    return _CAP if ideal >= _CAP else max(1, math.floor(ideal))


def nominal_bits_of_level(num_levels: int) -> int:
    """Return ⌈log2(s + 1)⌉ + 1, the ⌈log2⌉ found by doubling."""
    bits = 0
    while 2**bits < num_levels + 1:
        bits += 1
    return bits + 1


def reference_nnadq(values: Sequence[float], weight: float, repr_bits: int) -> Reference:
    """Quantize and decode float32 values one by one."""
    if not values:
        return Reference("raw")
    elements = [np.float32(v) for v in values]
    low = high = elements[0]
    for v in elements:
        low = v if v < low else low
        high = v if v > high else high
    half = np.float32(0.5)
    a = np.float32(high * half + low * half)
    above, below = np.float32(high - a), np.float32(a - low)
    d = above if above >= below else below
    s = num_levels_of(float(d), weight, repr_bits)
    if nominal_bits_of_level(s) >= repr_bits:
        return Reference("raw")
    if d == 0:
        return Reference("constant", 0, float(a), 0.0, (), tuple(float(a) for _ in elements))
    if float(d) > _LARGEST_RANGE or abs(float(a)) > _LARGEST_RANGE:
        return Reference("raw")
    if float(d) < _SMALLEST_RANGE:
        s = 1
    levels, decoded = [], []
    for v in elements:
        centred = np.float32(v - a)
        share = np.float32(centred / d)
        level = round(float(np.float32(share * np.float32(s))))
        level = max(-s, min(s, level))
        step = np.float32(d / np.float32(s))
        decoded.append(float(np.float32(np.float32(np.float32(level) * step) + a)))
        levels.append(level)
    return Reference("levels", s, float(a), float(d), tuple(levels), tuple(decoded))
