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

import numpy as np
import torch
from numpy.typing import NDArray

from fedobd._errors import DecodeError, DecodeReason, EmptyRoundError
from fedobd.blocks import ModelSchema, ModelState, Role, Segment, TensorSpec
from fedobd.payload import Block, DecodedSegment, Found, refuse_not_finite

_ROOM_BITS = {Role.PARAMETER: 10, Role.BUFFER: 20}
"""A legal difference is below 2^room times the largest value of its tensor on the server."""

_FLOOR_EXPONENT = {Role.PARAMETER: -4, Role.BUFFER: 0}
"""...which is taken to be at least 2^floor, for tensors that start at zero."""

_NO_BASE, _NO_MASK = np.empty(0, np.float32), np.empty(0, np.bool_)

Sums = NDArray[np.int64]
"""What was added up: sums and weights of the averaged tensors, the largest of integer ones."""


def num_sums(schema: ModelSchema, *, per_element: bool) -> int:
    """Return how many numbers a mean keeps while uploads come in."""
    return sum(_numbers_of(spec, per_element) for spec in schema.tensors)


def _numbers_of(spec: TensorSpec, per_element: bool) -> int:
    if spec.role is Role.FROZEN:
        return 0
    return spec.num_elements * (2 if _is_counted(spec, per_element) else 1)


def _is_averaged(spec: TensorSpec) -> bool:
    return spec.is_floating and spec.role is not Role.FROZEN


def _is_counted(spec: TensorSpec, per_element: bool) -> bool:
    return per_element and spec.role is Role.PARAMETER and spec.is_floating


class WeightedMean:
    """Weighted mean of what clients upload, relative to the server's values.

    Args:
        schema: the model's schema.
        reference: the server's values W, floating tensors in float32; read, never changed.
        cohort_size: the most uploads that can come.
        max_examples: the largest weight of one upload.
        per_element: average each element over the uploads that hold it, and keep the server's
            value where none does; otherwise what an upload does not hold counts as unchanged.
        memory: where to keep the sums, shape (`num_sums`,), all 0; None for memory of its own.
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
        self._base: list[NDArray[np.float32] | None] = []
        self._given = memory
        self._memory: list[Sums | None] = []
        for spec in schema.tensors:
            averaged = _is_averaged(spec)
            exponent = 0
            if averaged:
                values = reference[spec.name]
                largest = float(values.abs().max()) if values.numel() else 0.0
                floor = _FLOOR_EXPONENT[spec.role]
                exponent = max(math.frexp(largest)[1], floor) if largest > 0 else floor
                exponent += _ROOM_BITS[spec.role]
            self._limits.append(math.ldexp(1.0, exponent))
            self._scales.append(math.ldexp(1.0, limit_bits - exponent))
            base = reference[spec.name].reshape(-1).numpy() if averaged else None
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
        parts = [*self._split(self._given)]
        for spec, part in zip(self._schema.tensors, parts, strict=True):
            if part.size and not spec.is_floating:
                part[:] = self._reference[spec.name].reshape(-1).numpy()
        self._memory = [*parts]

    def merge(self, memory: Sums, num_examples: int) -> None:
        """Add what another mean of the same round has added up.

        Args:
            memory: its sums; may be kept and changed.
            num_examples: the weight of all its uploads.
        """
        if not self._memory:
            self._memory = [*self._split(memory)]
        else:
            for number, theirs in enumerate(self._split(memory)):
                averaged = _is_averaged(self._schema.tensors[number])
                merge = np.add if averaged else np.maximum
                mine = self._sums_of(number)
                merge(mine, theirs, out=mine)
        self._num_examples += num_examples

    def _sums_of(self, number: int) -> Sums:
        """Return a tensor's part of the memory, unless it was given up."""
        sums = self._memory[number]
        assert sums is not None
        return sums

    def accumulate(
        self,
        blocks: Callable[[], Iterable[Block]],
        num_examples: int,
        *,
        differences: bool,
    ) -> None:
        """Add one upload, wholly or not at all.

        Args:
            blocks: decodes it block by block; called again, to subtract what was added, if a fault
                is found on the way.
            num_examples: its weight, n_k.
            differences: whether parameters are differences; buffers are always values.

        Raises:
            DecodeError: a block is damaged, a value is not finite or a difference is beyond the
                legal range; the mean is then as before.
        """
        if not self._memory:
            self._begin()
        integers: list[tuple[Segment, torch.Tensor]] = []
        added = 0
        try:
            for _, segments in blocks():
                for one in segments:
                    if self._schema.tensors[one.segment.tensor].is_floating:
                        self._add(one, num_examples, differences, sign=1)
                        added += 1
                    elif isinstance(one, DecodedSegment):
                        integers.append((one.segment, one.values))
        except BaseException:
            self._take_back(blocks, added, num_examples, differences)
            raise
        for segment, values in integers:
            largest = self._sums_of(segment.tensor)[segment.start : segment.stop]
            np.maximum(largest, values.numpy(), out=largest)
        self._num_examples += num_examples

    def _take_back(
        self,
        blocks: Callable[[], Iterable[Block]],
        added: int,
        num_examples: int,
        differences: bool,
    ) -> None:
        """Subtract the first segments of an upload, as many as were added."""
        for _, segments in blocks() if added else ():
            for one in segments:
                if self._schema.tensors[one.segment.tensor].is_floating:
                    self._add(one, num_examples, differences, sign=-1)
                    added -= 1
                    if added == 0:
                        return

    def _add(
        self,
        one: Found,
        num_examples: int,
        differences: bool,
        *,
        sign: int,
    ) -> None:
        """Add a segment's contribution, or subtract it, after a look at its range."""
        import fedobd.codec.kernels as kernels  # when first needed: importing numba takes its time

        segment = one.segment
        spec = self._schema.tensors[segment.tensor]
        where = slice(segment.start, segment.stop)
        base, numbers = self._base[segment.tensor], self._sums_of(segment.tensor)
        sums, weights = numbers[: spec.num_elements], numbers[spec.num_elements :]
        assert base is not None
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
            sign * num_examples * self._scales[segment.tensor],
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
            held = weights[where]
            held += num_examples * sign * (1 if one.mask is None else one.mask.numpy())

    def finish(self) -> ModelState:
        """Return the new values: reference plus mean difference; integer tensors take the largest.

        The sums are given up on the way, so that old and new values never stand beside all of
        them.

        Raises:
            EmptyRoundError: nothing was accumulated, so that the mean can still be used; or it has
                been finished already.
        """
        import fedobd.codec.kernels as kernels  # when first needed: importing numba takes its time

        if self._num_examples == 0:
            raise EmptyRoundError("no upload was accepted in this round, so there is no mean")
        state: ModelState = {}
        for number, spec in enumerate(self._schema.tensors):
            before = self._reference[spec.name]
            sums = self._sums_of(number)
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
            self._memory[number] = None
        self._num_examples = 0
        return state
