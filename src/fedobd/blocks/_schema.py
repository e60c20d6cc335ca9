"""ModelSchema: what both ends know of a model, so that payloads carry neither names nor shapes.

Rules kept here:
- every element of a trainable parameter lies in exactly one segment of exactly one block;
- every buffer lies whole in exactly one block; a frozen parameter lies in none;
- two schemas are interchangeable exactly when their fingerprints are equal.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate
from typing import Any

import torch

from fedobd._errors import UsageError


class Role(StrEnum):
    """What a tensor of the model is to federated training."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    FROZEN = "frozen"


DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
"""The element types that a schema admits, by name."""

_SIXTEEN_BIT = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the model, as it is in the model's state."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    role: Role
    num_elements: int = field(init=False, repr=False, compare=False)
    wire_dtype: torch.dtype = field(init=False, repr=False, compare=False)
    """The type in which plain values travel: a 16-bit parameter in its own, any other floating
    tensor in float32 (buffers always, and float64 narrowed), integers and booleans as they are."""

    def __post_init__(self) -> None:
        if any(length < 0 for length in self.shape):
            raise UsageError(f"tensor {self.name!r} has shape {self.shape}; lengths start at 0")
        if self.dtype not in DTYPES.values():
            raise UsageError(
                f"tensor {self.name!r} has element type {self.dtype}; supported are "
                f"{', '.join(DTYPES)}"
            )
        is_narrow = self.dtype in _SIXTEEN_BIT and self.role is not Role.BUFFER
        keeps_type = is_narrow or not self.is_floating
        object.__setattr__(self, "num_elements", math.prod(self.shape))
        object.__setattr__(self, "wire_dtype", self.dtype if keeps_type else torch.float32)

    @property
    def is_floating(self) -> bool:
        """Whether the elements are floating-point numbers."""
        return self.dtype.is_floating_point

    @property
    def repr_bits(self) -> int:
        """REPR of NNADQ: bits of the type in which plain values travel."""
        return self.wire_dtype.itemsize * 8


@dataclass(frozen=True, slots=True)
class Segment:
    """Elements `[start, stop)` of tensor number `tensor`, in row-major order."""

    tensor: int
    start: int
    stop: int

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Block:
    """A semantic block: the unit that is uploaded or dropped.

    It has the name of its module, or of its first layer, with `[i/n]` for part i of n; its kind is
    what made it a block: a class name, or a pattern such as `Conv2d+BatchNorm2d`. Layers are the
    modules that hold its tensors; segments are in module order; only parameters are counted.
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    segments: tuple[Segment, ...]
    num_parameters: int


@dataclass(frozen=True, eq=False)
class ModelSchema:
    """The tensors of a model and their blocks, bottom layer first; equal by fingerprint.

    Args:
        tensors: every tensor of the model's state, tied ones once.
        blocks: the semantic blocks.

    Raises:
        UsageError: the blocks do not cover the tensors as the rules of this module want, or there
            is nothing to train.
    """

    tensors: tuple[TensorSpec, ...]
    blocks: tuple[Block, ...]
    num_parameters: int = field(init=False)
    fingerprint: bytes = field(init=False, repr=False)
    _offsets: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # First, since buffers without a parameter are in no block.
        if not any(t.role is Role.PARAMETER and t.num_elements for t in self.tensors):
            raise UsageError(
                "the model has no trainable parameters; at least one tensor must have "
                "requires_grad=True"
            )
        self._check_cover()
        object.__setattr__(self, "num_parameters", sum(b.num_parameters for b in self.blocks))
        canonical = json.dumps(self.to_json(), separators=(",", ":"), sort_keys=True)
        digest = hashlib.blake2b(canonical.encode(), digest_size=16).digest()
        object.__setattr__(self, "fingerprint", digest)
        sizes = [t.num_elements if t.role is Role.PARAMETER else 0 for t in self.tensors]
        object.__setattr__(self, "_offsets", tuple(accumulate(sizes, initial=0)))

    def _check_cover(self) -> None:
        names = [spec.name for spec in self.tensors]
        if len(set(names)) < len(names):
            double = next(name for name in names if names.count(name) > 1)
            raise UsageError(f"two tensors have the name {double!r}")
        spans: list[list[tuple[int, int]]] = [[] for _ in self.tensors]
        for block in self.blocks:
            counted = 0
            for segment in block.segments:
                if not 0 <= segment.tensor < len(self.tensors):
                    raise UsageError(f"block {block.name!r} names tensor number {segment.tensor}")
                spans[segment.tensor].append((segment.start, segment.stop))
                if self.tensors[segment.tensor].role is Role.PARAMETER:
                    counted += segment.num_elements
            if counted != block.num_parameters:
                raise UsageError(
                    f"block {block.name!r} says {block.num_parameters} parameters and holds "
                    f"{counted}"
                )
        for spec, tensor_spans in zip(self.tensors, spans, strict=True):
            _check_tiling(spec, sorted(tensor_spans))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelSchema) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def mask_offset(self, segment: Segment) -> int:
        """Number of the segment's first element among all trainable elements, in tensor order."""
        return self._offsets[segment.tensor] + segment.start

    def frozen(self) -> tuple[int, ...]:
        """Numbers of the frozen tensors."""
        return tuple(i for i, spec in enumerate(self.tensors) if spec.role is Role.FROZEN)

    def to_json(self) -> dict[str, Any]:
        """Return the schema as plain JSON values."""
        return {
            "tensors": [
                [t.name, list(t.shape), str(t.dtype).removeprefix("torch."), t.role.value]
                for t in self.tensors
            ],
            "blocks": [
                [b.name, b.kind, list(b.layers), [[s.tensor, s.start, s.stop] for s in b.segments]]
                for b in self.blocks
            ],
        }

    @classmethod
    def from_json(cls, value: Any) -> ModelSchema:
        """Rebuild a schema from `to_json`.

        Raises:
            UsageError: the value is not such a schema.
        """
        try:
            tensors = tuple(
                TensorSpec(str(name), tuple(map(_whole, shape)), DTYPES[dtype], Role(role))
                for name, shape, dtype, role in value["tensors"]
            )
            blocks = []
            for name, kind, layers, spans in value["blocks"]:
                segments = tuple(Segment(_whole(t), _whole(a), _whole(b)) for t, a, b in spans)
                count = sum(
                    s.num_elements for s in segments if tensors[s.tensor].role is Role.PARAMETER
                )
                blocks.append(
                    Block(str(name), str(kind), tuple(map(str, layers)), segments, count)
                )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UsageError(f"this is not a model schema: {error!r}") from error
        return cls(tensors, tuple(blocks))


def _check_tiling(spec: TensorSpec, spans: Sequence[tuple[int, int]]) -> None:
    """Raise UsageError unless spans (start, stop), in order, cover a tensor as its role wants."""
    position = 0
    for start, stop in spans:
        if start != position or stop < start:
            raise UsageError(f"blocks do not tile tensor {spec.name!r} at element {start}")
        position = stop
    is_frozen = spec.role is Role.FROZEN
    wanted = 0 if is_frozen else spec.num_elements
    if position != wanted or bool(spans) is is_frozen:  # one of no elements has a segment too
        raise UsageError(
            f"blocks cover {position} of {wanted} elements of {spec.role} {spec.name!r}"
        )
    if spec.role is Role.BUFFER and len(spans) > 1:
        raise UsageError(f"buffer {spec.name!r} is split between blocks")


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is no whole number")
    return value
