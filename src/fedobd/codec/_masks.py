"""Masks that travel as a seed: a counter-based generator that the payload format itself defines.

Element number i (counted over all trainable elements in tensor order) is kept when SplitMix64's
output number i is at least a threshold. No library's generator is involved, so any reader can make
the same mask.

References:
    Guy L. Steele Jr., Doug Lea, Christine H. Flood. Fast Splittable Pseudorandom Number
    Generators. OOPSLA 2014, doi 10.1145/2660193.2660195, figure 17 with the constants of variant
    13.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from fedobd._errors import UsageError


@dataclass(frozen=True, slots=True)
class Mask:
    """A random mask over the trainable elements; seed and threshold are in [0, 2^64).

    An element is dropped when its random number is below the threshold.
    """

    seed: int
    threshold: int

    def __post_init__(self) -> None:
        for name in ("seed", "threshold"):
            if not 0 <= getattr(self, name) < 2**64:
                raise UsageError(f"{name} is {getattr(self, name)}; allowed are 0 to 2^64 - 1")

    @classmethod
    def of_rate(cls, seed: int, dropout_rate: float) -> Mask:
        """Return the mask that drops each element with probability `dropout_rate`, in [0, 1)."""
        # Of the decimal digits that a user wrote: no float64 is 0.3 itself.
        return cls(seed, int(Fraction(str(dropout_rate)) * 2**64))

    def kept(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Return which of the elements `start` to `stop - 1` are kept, shape (stop - start,).

        Example:
            >>> mask = Mask.of_rate(seed=7, dropout_rate=0.5)
            >>> bool((mask.kept(0, 100)[40:60] == mask.kept(40, 60)).all())
            True
        """
        import fedobd.codec.kernels as kernels  # when first needed: importing numba takes its time

        kept: NDArray[np.bool_] = np.empty(stop - start, np.bool_)
        kernels.keep(np.uint64(start), np.uint64(self.seed), np.uint64(self.threshold), kept)
        return kept
