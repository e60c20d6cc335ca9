"""Quantizers: float32 values to integer levels and back, in arithmetic fixed to the last bit.

Every operation on elements is one IEEE 754 float32 operation in the order written (no fused
multiply-add), so that levels decode to the same values on every machine. Decoding is one rule for
all quantizers: `value = level * (range / num_levels) + offset`.

References:
    FedOBD (arXiv 2208.05174), section 3.3: NNADQ, adaptive deterministic quantization.
    Dan Alistarh, Demjan Grubic, Jerry Li, Ryota Tomioka, Milan Vojnovic. QSGD:
    Communication-Efficient SGD via Gradient Quantization and Encoding. NeurIPS 2017, arXiv
    1610.02132, section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fedobd._errors import UsageError

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

MAX_LEVELS = 1 << 22
"""Largest number of levels on one side of the offset; float32 still tells such levels apart."""

MAX_RANGE = 2.0**126
"""Above this range, `level * (range / num_levels)` could round past the largest float32; such
tensors travel raw."""

MIN_DIVISIBLE_RANGE = 2.0**-104
"""Below this range, `range / num_levels` could be subnormal and lose precision; one level is used,
which is exact."""

_QUANTIZE_STEP = 1 << 18  # elements that one thread of an executor takes at a time


class Coding(IntEnum):
    """How the elements of a segment travel."""

    CONSTANT = 0
    LEVELS = 1
    RAW = 2
    MASKED = 3


@dataclass(frozen=True, slots=True)
class SegmentCode:
    """What the header of a payload says of one segment.

    Args:
        coding: how its elements travel.
        num_levels, offset, range: s (levels are from -s to s), a, and d > 0, both float32; 0
            where there is none.
    """

    coding: Coding
    num_levels: int = 0
    offset: float = 0.0
    range: float = 0.0


RAW, MASKED = SegmentCode(Coding.RAW), SegmentCode(Coding.MASKED)
"""The codes that have no numbers."""


def level_bits(num_levels: int) -> int:
    """Nominal bits of one level from -s to s: ⌈log2(s + 1)⌉ + 1."""
    return num_levels.bit_length() + 1


Symbols = NDArray[np.unsignedinteger[Any]]

CODED_BITS = 12
"""Bits of a symbol that are coded with frequencies; lower ones are coded as they are. Where there
are so many levels, the low bits are nearly even, and tables of frequencies would outgrow a cache.
"""


def level_shift(num_levels: int) -> int:
    """Return how many low bits of a symbol from 0 to 2 s are coded as they are."""
    return max(0, (2 * num_levels).bit_length() - CODED_BITS)


@dataclass(frozen=True, slots=True)
class Levels:
    """The levels of a segment, as symbols level + s: uint16, or uint32 where 2 s needs it, (n,).

    Counts say how often each symbol occurs, without its `level_shift` low bits, int64.
    """

    symbols: Symbols
    counts: NDArray[np.int64]
    num_levels: int

    @classmethod
    def of(cls, levels: Int32, num_levels: int) -> Levels:
        """Make them from levels from -s to s, int32, shape (n,)."""
        symbols, shift = levels + np.int32(num_levels), level_shift(num_levels)
        counts = np.bincount(symbols >> shift, minlength=((2 * num_levels) >> shift) + 1)
        narrow: Symbols = symbols.astype(_symbol_type(num_levels))
        return cls(narrow, counts.astype(np.int64), num_levels)

    def signed(self) -> Int32:
        """Return the levels from -s to s, int32, shape (n,)."""
        return self.symbols.astype(np.int32) - np.int32(self.num_levels)


def _symbol_type(num_levels: int) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if 2 * num_levels < 1 << 16 else np.uint32


Draws = Callable[[int], torch.Generator | None]
"""Gives the generator of a client, by its row."""


class Quantizer(Protocol):
    """Turns values into levels in two steps: the header of a payload holds all ranges."""

    def measure(self, values: Float32, repr_bits: int) -> SegmentCode:
        """Choose the coding, number of levels, offset and range.

        Args:
            values: float32, shape (n,), all finite; the least and the largest of them will do.
            repr_bits: bits of the type that the values have in the model.
        """
        ...

    def quantize_all(
        self,
        values: torch.Tensor,
        codes: Sequence[SegmentCode],
        generator: Draws,
        executor: Executor | None = None,
    ) -> list[Levels]:
        """Return the levels of several clients' values of a segment.

        Values: float32, shape (clients, n), n ≥ 1, on any device. Codes are what `measure` chose
        for each client, all LEVELS. An executor spreads the work; the levels are the same.

        Raises:
            UsageError: the quantizer is stochastic and a client has no generator, or it makes no
                levels.
        """
        raise UsageError("values that are not quantized have no levels")

    def quantize(
        self, values: Float32, code: SegmentCode, generator: torch.Generator | None = None
    ) -> Levels:
        """Return the levels of one client's values, float32, shape (n,); see `quantize_all`."""
        return self.quantize_all(torch.from_numpy(values)[None], [code], lambda _: generator)[0]


def _code(offset: np.float32, span: np.float32, num_levels: int) -> SegmentCode:
    if span == 0:
        return SegmentCode(Coding.CONSTANT, offset=float(offset))
    if span > MAX_RANGE or abs(float(offset)) > MAX_RANGE:
        return RAW
    if span < MIN_DIVISIBLE_RANGE:
        num_levels = 1
    return SegmentCode(Coding.LEVELS, num_levels, float(offset), float(span))


@dataclass(frozen=True, slots=True)
class NNADQ(Quantizer):
    """Adaptive deterministic quantization for neural networks.

    Centres the values, `a = max/2 + min/2`, takes `d = max(max - a, a - min)` and
    `s = max(1, ⌊√(ln 4 · REPR · d / β)⌋)`: there `β · log2(s) / REPR + d / s²`, the bits of an
    element weighed against its error, is smallest (section 3.3 of the paper; its derivative by s
    is 0 at s² = 2 · ln 2 · REPR · d / β). The error of each element is at most
    `d / (2 s) + 5 ulp(max |v|)`. d = 0 gives a constant; more nominal bits than REPR - 1 give raw
    values.

    Args:
        weight: β > 0, the weight of bits against error; smaller is finer.

    Raises:
        UsageError: the weight is not a finite number above 0.

    Departs from the paper:
        The levels are limited to 2^22, and the arithmetic is fixed as described in the module.
    """

    weight: float

    def __post_init__(self) -> None:
        check_positive("the quantization weight β", self.weight)

    def measure(self, values: Float32, repr_bits: int) -> SegmentCode:
        """See `Quantizer.measure`."""
        if values.size == 0:
            return RAW
        low, high = values.min(), values.max()
        half = np.float32(0.5)
        # Halved first: high + low may pass the largest float32. And never -0, which would make
        # payloads of equal values differ.
        offset = np.float32(high * half + low * half) + np.float32(0)
        span = np.float32(max(high - offset, offset - low))
        # The limit stands inside the root, since a tiny β makes this infinite.
        squared = math.log(4) * repr_bits * float(span) / self.weight
        num_levels = max(1, math.floor(math.sqrt(min(squared, float(MAX_LEVELS) ** 2))))
        if level_bits(num_levels) >= repr_bits:
            return RAW
        return _code(offset, span, num_levels)

    def quantize_all(
        self,
        values: torch.Tensor,
        codes: Sequence[SegmentCode],
        generator: Draws,
        executor: Executor | None = None,
    ) -> list[Levels]:
        """See `Quantizer.quantize_all`; the generator is not used.

        Values on another device are quantized and counted there, by the same float32 operations,
        and only their symbols are brought here.
        """
        if values.device.type == "cpu":
            return _round_here(values.numpy(), codes, executor)
        return _round_there(values, codes)


def _round_here(
    values: Float32, codes: Sequence[SegmentCode], executor: Executor | None
) -> list[Levels]:
    """Round values of several clients, shape (clients, n), to the nearest levels."""
    import fedobd.codec.kernels as kernels  # when first needed: importing numba takes its time

    values = np.ascontiguousarray(values)
    num_levels = [code.num_levels for code in codes]
    shifts = np.array(list(map(level_shift, num_levels)))
    size = int(((2 * np.array(num_levels)) >> shifts).max()) + 1
    numbers = np.array([(c.offset, c.range, c.num_levels) for c in codes], np.float32)
    offsets, spans, most = np.ascontiguousarray(numbers.T)
    symbols: Symbols = np.empty(values.shape, _symbol_type(max(num_levels)))
    starts = range(0, values.shape[1], _QUANTIZE_STEP)
    counts = np.zeros((len(starts), len(codes), size), np.int64)

    def quantize(number: int) -> None:
        start = starts[number]
        stop = min(start + _QUANTIZE_STEP, values.shape[1])
        scales = offsets, spans, most, shifts
        kernels.quantize(values, start, stop, *scales, symbols, counts[number])

    list((executor.map if executor else map)(quantize, range(len(starts))))
    return _split(symbols, counts[0] if len(starts) == 1 else counts.sum(axis=0), num_levels)


def _round_there(values: torch.Tensor, codes: Sequence[SegmentCode]) -> list[Levels]:
    """Do what `_round_here` does on the device of the values."""
    num_levels = [code.num_levels for code in codes]
    shifts = list(map(level_shift, num_levels))
    size = 1 + max((2 * s) >> shift for s, shift in zip(num_levels, shifts, strict=True))
    offset, span, most = torch.tensor(
        [[(code.offset,), (code.range,), (code.num_levels,)] for code in codes],
        dtype=torch.float32,
        device=values.device,
    ).unbind(1)
    # Eager operations, one kernel each: a compiled graph might fuse them into other roundings.
    levels = ((values - offset) / span * most).round()
    made = (torch.minimum(torch.maximum(levels, -most), most) + most).to(torch.int32)
    numbers = torch.arange(0, size * len(codes), size, device=values.device).unsqueeze(1)
    # One count for all clients: each has `size` numbers of its own.
    coded = (made >> torch.tensor(shifts, device=values.device).unsqueeze(1)) + numbers
    counts = torch.bincount(coded.reshape(-1), minlength=size * len(codes))
    narrow = made.to(torch.int16) if 2 * max(num_levels) < 1 << 15 else made
    return _split(narrow.cpu().numpy(), counts.cpu().numpy().reshape(-1, size), num_levels)


def _split(
    symbols: NDArray[np.integer[Any]], counts: NDArray[np.int64], num_levels: Sequence[int]
) -> list[Levels]:
    """Return the levels of each client; `symbols` may have a wider type, `counts` more columns."""
    return [
        Levels(
            symbols[row].astype(_symbol_type(s), copy=False),
            counts[row, : ((2 * s) >> level_shift(s)) + 1],
            s,
        )
        for row, s in enumerate(num_levels)
    ]


@dataclass(frozen=True, slots=True)
class Stochastic(Quantizer):
    """QSGD's unbiased stochastic quantization by the largest magnitude.

    `y = |v| / max|v| · s` is rounded up with probability `y - ⌊y⌋`, else down; the sign is kept.

    Args:
        num_levels: s, from 1 to 2^22.

    Raises:
        UsageError: the number of levels is out of range.
    """

    num_levels: int = 255

    def __post_init__(self) -> None:
        if not (isinstance(self.num_levels, int) and 1 <= self.num_levels <= MAX_LEVELS):
            raise UsageError(f"num_levels is {self.num_levels}; allowed are 1 to {MAX_LEVELS}")

    def measure(self, values: Float32, repr_bits: int) -> SegmentCode:
        """See `Quantizer.measure`."""
        if values.size == 0 or level_bits(self.num_levels) >= repr_bits:
            return RAW
        span = np.float32(max(values.max(), -values.min()))
        return _code(np.float32(0), span, self.num_levels)

    def quantize_all(
        self,
        values: torch.Tensor,
        codes: Sequence[SegmentCode],
        generator: Draws,
        executor: Executor | None = None,
    ) -> list[Levels]:
        """See `Quantizer.quantize_all`; draws are the CPU's, so values are brought here first."""
        array = values.cpu().numpy()
        span, most = np.array([(c.range, c.num_levels) for c in codes], np.float32).T[..., None]
        scaled = np.abs(array)
        scaled /= span
        scaled *= most
        floor = np.floor(scaled)
        scaled -= floor
        for number, row in enumerate(floor):
            draws = generator(number)
            if draws is None:
                raise UsageError("stochastic quantization needs a torch.Generator")
            row += torch.rand(row.size, generator=draws).numpy() < scaled[number]
        levels = np.minimum(floor, most).astype(np.int32)
        signed = np.where(np.signbit(array), -levels, levels)
        return [Levels.of(row, code.num_levels) for row, code in zip(signed, codes, strict=True)]


@dataclass(frozen=True, slots=True)
class Unquantized(Quantizer):
    """Leaves values as they are: every segment travels raw."""

    def measure(self, values: Float32, repr_bits: int) -> SegmentCode:
        """See `Quantizer.measure`."""
        return RAW


def dequantize(levels: Int32, code: SegmentCode) -> Float32:
    """Return `level * (range / num_levels) + offset`, the same on every machine.

    Levels from -s to s: int32, shape (n,); the result: float32, shape (n,).
    """
    values = levels.astype(np.float32)
    values *= np.float32(code.range) / np.float32(code.num_levels)
    values += np.float32(code.offset)
    return values


def check_positive(what: str, value: float) -> None:
    """Raise UsageError unless the value is a finite number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"{what} is {value}; allowed are finite numbers above 0")
