"""Frames: what stands behind the header of a payload, and in which order.

A block has up to three frames: the levels of its parameters, plain values of its parameters, plain
values of its buffers. Which of them it has, and how long the plain ones are, follows from schema
and header.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from fedobd._errors import UsageError
from fedobd.blocks import ModelSchema, Role, Segment
from fedobd.codec import RAW, Coding, Mask, SegmentCode, level_bits
from fedobd.payload._header import Header


@dataclass(frozen=True, slots=True)
class PlainPart:
    """Plain values of a segment in a frame; mask: which of them are there, bool, shape (n,)."""

    segment: Segment
    dtype: torch.dtype
    mask: torch.Tensor | None = None
    num_bytes: int = field(init=False)
    """Bytes of the values that are there."""

    def __post_init__(self) -> None:
        count = self.segment.num_elements if self.mask is None else int(self.mask.sum())
        object.__setattr__(self, "num_bytes", count * self.dtype.itemsize)


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """The frames of a block, each as its segments; one without any is not in the payload."""

    levels: tuple[tuple[Segment, SegmentCode], ...]
    raw: tuple[PlainPart, ...]
    buffers: tuple[PlainPart, ...]
    most_level_bytes: int = field(init=False)
    """Bytes that no frame of these levels passes: 1.25 times the nominal ones, and 4,096.

    Coded levels take about the nominal ones at most; the rest is for tables and lane states."""
    nominal_bits: int = field(init=False)
    """Bits by the papers' formula."""
    mean_levels: float = field(init=False)
    """Mean number of levels over the elements that are quantized; 0 where none is."""

    def __post_init__(self) -> None:
        bits = elements = total = 0
        for segment, code in self.levels:
            count = segment.num_elements
            bits += count * level_bits(code.num_levels)
            elements += count
            total += count * code.num_levels
        plain_bytes = sum([part.num_bytes for part in (*self.raw, *self.buffers)])
        object.__setattr__(self, "most_level_bytes", bits // 8 + bits // 32 + 4096)
        object.__setattr__(self, "nominal_bits", bits + 8 * plain_bytes)
        object.__setattr__(self, "mean_levels", total / elements if elements else 0.0)


def lay_out(
    schema: ModelSchema, header: Header, number: int, codes: Sequence[SegmentCode]
) -> BlockLayout:
    """Return the frames of a block, by its number, whose segments have these codes."""
    # A model sent raw has many small segments, and time goes into laying them out anew.
    if codes.count(RAW) == len(codes):
        return _lay_out_plain(schema, number, header.is_difference)
    return _lay_out(schema, header.is_difference, header.mask, number, codes)


@cache  # the same few layouts stand in every payload of a run
def _lay_out_plain(schema: ModelSchema, number: int, is_difference: bool) -> BlockLayout:
    codes = [RAW] * len(schema.blocks[number].segments)
    return _lay_out(schema, is_difference, None, number, codes)


def _lay_out(
    schema: ModelSchema,
    is_difference: bool,
    mask: Mask | None,
    number: int,
    codes: Sequence[SegmentCode],
) -> BlockLayout:
    levels: list[tuple[Segment, SegmentCode]] = []
    raw: list[PlainPart] = []
    buffers: list[PlainPart] = []
    for segment, code in zip(schema.blocks[number].segments, codes, strict=True):
        if code.coding is Coding.LEVELS:
            levels.append((segment, code))
        elif code.coding is not Coding.CONSTANT:
            kept = None
            if code.coding is Coding.MASKED:
                assert mask is not None
                start = schema.mask_offset(segment)
                kept = torch.from_numpy(mask.kept(start, start + segment.num_elements))
            dtype = plain_dtype(schema, is_difference, segment)
            is_buffer = schema.tensors[segment.tensor].role is Role.BUFFER
            (buffers if is_buffer else raw).append(PlainPart(segment, dtype, kept))
    return BlockLayout(tuple(levels), tuple(raw), tuple(buffers))


def frozen_parts(schema: ModelSchema) -> tuple[PlainPart, ...]:
    """Return the frame of the frozen tensors, each in its own type."""
    return tuple(
        PlainPart(Segment(n, 0, schema.tensors[n].num_elements), schema.tensors[n].dtype)
        for n in schema.frozen()
    )


def plain_dtype(schema: ModelSchema, is_difference: bool, segment: Segment) -> torch.dtype:
    """Return the type of plain values: the tensor's on the wire; of differences, float32."""
    spec = schema.tensors[segment.tensor]
    if is_difference and spec.role is Role.PARAMETER:
        return torch.float32
    return spec.wire_dtype


def _is_finite(values: torch.Tensor) -> bool:
    if values.dtype == torch.float32 and values.is_cpu and values.is_contiguous():
        import fedobd.codec.kernels as kernels  # when first needed: importing numba takes its time

        return kernels.is_finite(values.numpy().ravel())
    return bool(torch.isfinite(values).all())


def check_finite(name: str, values: torch.Tensor) -> None:
    """Raise UsageError where a floating tensor, of any shape, holds NaN or an infinity."""
    if values.is_floating_point() and not _is_finite(values):
        kind = "NaN" if bool(values.isnan().any()) else "an infinity"
        raise UsageError(
            f"tensor {name!r} holds {kind} as {values.dtype}; "
            "training has diverged, or the model was wrong at the start"
        )
