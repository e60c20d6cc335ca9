"""Clipping: what quantization may not undo of a clip norm.

A client's update whose L2 norm was clipped (differential privacy) must not leave the client with a
larger one, and rounding to levels can raise it. Each segment is shrunk until it does not; norms of
whole updates are then bounded too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from fedobd.blocks import ModelSchema, Role, Segment
from fedobd.codec import Coding, Float32, Quantizer, dequantize
from fedobd.payload import Source
from fedobd.sessions._selection import squared_norm

_MARGIN = 1 - 2.0**-20  # of a factor, so that rounding of the shrunk values does not undo it

_MOST_STEPS = 64
"""Of shrinking. Each takes off what the norm was raised by; two or three were ever seen to do."""


def bound_norms(
    source: Source, schema: ModelSchema, quantizers: Sequence[Quantizer | None]
) -> Source:
    """Return a source whose segments of parameters keep their L2 norm when they are quantized.

    Quantizers are each client's, deterministic ones; None for a client whose values stay.
    """
    factors: dict[Segment, torch.Tensor] = {}

    def bounded(segment: Segment) -> torch.Tensor:
        values = source(segment)
        spec = schema.tensors[segment.tensor]
        if spec.role is not Role.PARAMETER:
            return values
        if segment not in factors:
            rows = values.cpu().numpy()
            shrunk = [
                [1.0 if quantizer is None else shrink_factor(row, quantizer, spec.repr_bits)]
                for row, quantizer in zip(rows, quantizers, strict=True)
            ]
            factors[segment] = torch.tensor(shrunk, device=values.device, dtype=torch.float32)
        return values * factors[segment]

    return bounded


def shrink_factor(values: Float32, quantizer: Quantizer, repr_bits: int) -> float:
    """Return a c in [0, 1] for which the quantized c·v has no larger L2 norm than v.

    It is 1 where quantization by a deterministic quantizer does not raise the norm; else c is
    lowered by what it was raised, and 0 where that does not end. Values: float32, shape (n,).
    """
    wanted = squared_norm(values)
    if not math.isfinite(wanted):
        return 1.0  # the encoder says what is wrong with such values
    factor = 1.0
    for _ in range(_MOST_STEPS):
        shrunk = values * np.float32(factor)
        code = quantizer.measure(shrunk, repr_bits)
        if code.coding is Coding.LEVELS:
            shrunk = dequantize(quantizer.quantize(shrunk, code).signed(), code)
        norm = squared_norm(shrunk)
        if norm <= wanted:
            return factor
        factor = float(np.float32(factor * math.sqrt(wanted / norm) * _MARGIN))
    return 0.0  # nothing is sent of it, which raises no norm
