"""The weighted mean of uploads, the same bits in whatever order they arrive.

Each contribution `difference · n_k` is rounded once to a 64-bit integer in units of 2^-p; integers
add in any order to the same sum, in one place or in several whose sums are added at the end, and
subtract exactly, so that an upload with a fault found late is taken back without a trace. p is
fixed for each tensor before the uploads come: the server's own values, with a floor for tensors
near zero, say how large a difference may legally be, and `legal difference · most examples · 2^p ·
cohort` stays within 2^62, so the sum cannot overflow.

The mean lies within `cohort · 2^-(p + 1) / Σ n_k` of the exact one, before it is rounded to
float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from fedobd._errors import DecodeError, DecodeReason, EmptyRoundError
from fedobd.blocks import ModelSchema, ModelState, Role, TensorSpec
from fedobd.payload import DecodedBlock, DecodedSegment, SegmentView, refuse_not_finite

_ROOM_BITS = {Role.PARAMETER: 10, Role.BUFFER: 20}
"""A legal difference is below 2^room times the largest value of its tensor on the server."""

_FLOOR_EXPONENT = {Role.PARAMETER: -4, Role.BUFFER: 0}
"""...which is taken to be at least 2^floor, for tensors that start at zero."""

_NO_BASE, _NO_MASK = np.empty(0, np.float32), np.empty(0, np.bool_)
_GIVEN_UP = np.empty(0, np.int64)

Sums = NDArray[np.int64]
"""What was added up: sums and weights of the averaged tensors, the largest of integer ones."""


def num_sums(schema: ModelSchema, *, per_element: bool) -> int:
    """Return how many numbers a mean keeps while uploads come in."""
    return sum(_numbers_of(spec, per_element) for spec in schema.tensors)


def _numbers_of(spec: TensorSpec, per_element: bool) -> int:
    if spec.role is Role.FROZEN:
        return 0
    is_counted = per_element and spec.role is Role.PARAMETER and spec.is_floating
    return spec.num_elements * (2 if is_counted else 1)


def _is_averaged(spec: TensorSpec) -> bool:
    return spec.is_floating and spec.role is not Role.FROZEN


class WeightedMean:
    """Weighted mean of what clients upload, relative to the server's values W.

    Args:
        schema: the model's schema.
        reference: W, floating tensors in float32; read, never changed.
        cohort_size: the most uploads that can come.
        max_examples: the largest weight of one upload.
        per_element: average each element over the uploads that hold it, and keep W where none
            does; otherwise what an upload does not hold counts as unchanged.
        memory: where to keep the sums, shape (`num_sums`,), all 0; None for its own.
    """

    def __init__(
        self,
        schema: ModelSchema,
        reference: Mapping[str, torch.Tensor],
        *,
        cohort_size: int,
        max_examples: int,
        per_element: bool = False,
        memory: Sums | None = None,
    ) -> None:
        self._schema = schema
        self._reference = reference
        self._per_element = per_element
        self._num_examples = 0
        limit_bits = 62 - (cohort_size - 1).bit_length() - (max_examples - 1).bit_length()
        self._limits: list[float] = []
        self._scales: list[float] = []
        self._base: list[NDArray[np.float32]] = []
        self._given = memory
        self._memory: list[Sums] = []
        for spec in schema.tensors:
            exponent, base = 0, _NO_BASE
            if _is_averaged(spec):
                base = reference[spec.name].reshape(-1).numpy()
                largest = float(reference[spec.name].abs().max()) if base.size else 0.0
                floor = _FLOOR_EXPONENT[spec.role]
                exponent = max(math.frexp(largest)[1], floor) if largest > 0 else floor
                exponent += _ROOM_BITS[spec.role]
            self._limits.append(math.ldexp(1.0, exponent))
            self._scales.append(math.ldexp(1.0, limit_bits - exponent))
            self._base.append(base)

    def _split(self, memory: Sums | None) -> Iterator[Sums]:
        """Yield each tensor's part of some memory, or new memory where none is given."""
        end = 0
        for spec in self._schema.tensors:
            count = _numbers_of(spec, self._per_element)
            end += count
            yield np.zeros(count, np.int64) if memory is None else memory[end - count : end]

    def _begin(self) -> None:
        """Make the memory ready for the first upload."""
        self._memory = [*self._split(self._given)]
        for spec, part in zip(self._schema.tensors, self._memory, strict=True):
            if part.size and not spec.is_floating:
                part[:] = self._reference[spec.name].reshape(-1).numpy()

    def merge(self, memory: Sums, num_examples: int) -> None:
        """Add what another mean of the round has added up: sums (may be kept) and weight."""
        theirs = [*self._split(memory)]
        if not self._memory:
            self._memory = theirs
        else:
            for spec, mine, other in zip(self._schema.tensors, self._memory, theirs, strict=True):
                merge = np.add if _is_averaged(spec) else np.maximum
                merge(mine, other, out=mine)
        self._num_examples += num_examples

    def accumulate(
        self,
        blocks: Callable[[], Iterable[DecodedBlock]],
        num_examples: int,
        *,
        differences: bool,
    ) -> None:
        """Add one upload, wholly or not at all.

        `blocks` decodes it; it is called again, to subtract what was added, if a fault is found on
        the way. Its weight n_k is num_examples. `differences` says what parameters are; buffers
        are always values.

        Raises:
            DecodeError: a block is damaged, a value is not finite or a difference is beyond the
                legal range; the mean is then as before.
        """
        if not self._memory:
            self._begin()
        integers: list[DecodedSegment] = []
        added = 0
        try:
            for one in (segment for _, segments in blocks() for segment in segments):
                if self._schema.tensors[one.segment.tensor].is_floating:
                    self._add(one, num_examples, differences)
                elif isinstance(one, DecodedSegment):
                    integers.append(one)
                added += 1
        except BaseException:
            # No more is decoded again than was added: what comes next may be what is damaged.
            again = (segment for _, segments in blocks() for segment in segments)
            for one in islice(again, added):
                if self._schema.tensors[one.segment.tensor].is_floating:
                    self._add(one, -num_examples, differences)
            raise
        for one in integers:
            largest = self._memory[one.segment.tensor][one.segment.start : one.segment.stop]
            np.maximum(largest, one.values.numpy(), out=largest)
        self._num_examples += num_examples

    def _add(self, one: DecodedSegment | SegmentView, weight: int, differences: bool) -> None:
        """Add a segment, or subtract it by a negative weight, after a look at its range."""
        import fedobd.codec.kernels as kernels  # when first needed: importing numba takes its time

        segment = one.segment
        spec = self._schema.tensors[segment.tensor]
        where = slice(segment.start, segment.stop)
        base, numbers = self._base[segment.tensor], self._memory[segment.tensor]
        sums, weights = numbers[: spec.num_elements], numbers[spec.num_elements :]
        values = one.values
        if isinstance(values, torch.Tensor):
            values = values.to(torch.float32).numpy()
        is_relative = differences and spec.role is Role.PARAMETER
        limit = self._limits[segment.tensor]
        too_large = kernels.add_differences(
            values,
            _NO_BASE if is_relative else base[where],
            _NO_MASK if one.mask is None else one.mask.numpy(),
            limit,
            weight * self._scales[segment.tensor],
            sums[where],
        )
        if too_large >= 0:
            refuse_not_finite(spec, torch.from_numpy(values.copy()))
            raise DecodeError(
                DecodeReason.LIMIT,
                f"tensor {spec.name!r} would change by {np.int64(too_large).view(np.float64):.3g} "
                f"in one round; at most {limit:.3g} is accepted",
            )
        if weights.size:
            weights[where] += weight * (1 if one.mask is None else one.mask.numpy())

    def finish(self) -> ModelState:
        """Return the new values: reference plus mean difference; integer tensors take the largest.

        Sums are given up on the way, so that old and new values never stand beside all of them.

        Raises:
            EmptyRoundError: nothing was accumulated, or the mean has been finished already.
        """
        import fedobd.codec.kernels as kernels  # when first needed: importing numba takes its time

        if self._num_examples == 0:
            raise EmptyRoundError("no upload was accepted in this round, so there is no mean")
        state: ModelState = {}
        for number, spec in enumerate(self._schema.tensors):
            before = self._reference[spec.name]
            sums = self._memory[number]
            if spec.role is Role.FROZEN:
                state[spec.name] = before
                continue
            if not spec.is_floating:
                largest = torch.from_numpy(sums).to(before.dtype, copy=True)
                state[spec.name] = largest.reshape(before.shape)
                continue
            after = torch.empty(before.shape, dtype=torch.float32)
            kernels.finish_mean(
                before.reshape(-1).numpy(),
                sums[: spec.num_elements],
                1 / self._scales[number],
                float(self._num_examples),
                sums[spec.num_elements :],
                after.reshape(-1).numpy(),
            )
            state[spec.name] = after
            self._memory[number] = _GIVEN_UP
        self._num_examples = 0
        return state
