"""Selection: which blocks a client uploads.

References:
    FedOBD (arXiv 2208.05174), section 3.2 and algorithm 2: mean block difference, opportunistic
    block dropout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray

from fedobd._schema import ModelSchema, Role, Segment


def squared_norm(values: NDArray[np.float32]) -> float:
    """Return the sum of squares in float64, added in a fixed order.

    Eight sums run over every eighth value (what is left over goes to the first) and are added in
    pairs: the same bits on every machine, which a library's reduction does not promise.

    Args:
        values: float32, shape (n,).
    """
    import fedobd._kernels as kernels  # when first needed: importing numba takes its time

    return float(kernels.squared_norm(values))


def mean_block_differences(
    schema: ModelSchema, difference: Callable[[Segment], torch.Tensor]
) -> list[tuple[float, ...]]:
    """Return each client's mean block difference ‖vec(Ŵ[b]) - vec(W_k[b])‖₂ / |b| of each block.

    Args:
        schema: the model's schema.
        difference: gives the float32 differences of a segment of a parameter, shape (clients,
            elements).

    Returns:
        For each client one number for each block, 0 for a block of buffers alone. Where the
        differences lie on another device, they are added up there, in its own order.
    """
    totals = []
    for block in schema.blocks:
        if block.num_parameters:
            norms = [
                _squared_norms(difference(segment))
                for segment in block.segments
                if schema.tensors[segment.tensor].role is Role.PARAMETER
            ]
            totals.append(sum(norms[1:], norms[0]))
    means = []
    for own in torch.stack(totals, dim=1).tolist():
        coming = iter(own)
        means.append(
            tuple(
                math.sqrt(next(coming)) / block.num_parameters if block.num_parameters else 0.0
                for block in schema.blocks
            )
        )
    return means


def _squared_norms(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares of each row, float64, where the rows lie."""
    if values.device.type != "cpu":
        return values.to(torch.float64).square().sum(dim=1)
    import fedobd._kernels as kernels  # when first needed: importing numba takes its time

    norms = torch.empty(len(values), dtype=torch.float64)
    kernels.squared_norms(values.contiguous().numpy(), norms.numpy())
    return norms


def parameter_budget(num_parameters: int, dropout_rate: float) -> int:
    """Return the largest whole number of parameters within (1 - λ)·|W|.

    λ counts as it is written in decimal.
    """
    return math.floor((1 - Fraction(str(dropout_rate))) * num_parameters)


def fill_budget(schema: ModelSchema, order: Sequence[int], budget: int) -> tuple[int, ...]:
    """Keep blocks in the given order while they fit.

    A block that does not fit is skipped, and the scan goes on.

    Args:
        schema: the model's schema.
        order: block numbers, most wanted first.
        budget: the most parameters to keep.

    Returns:
        The kept block numbers, ascending. Blocks without parameters are always kept.
    """
    kept, used = [], 0
    for number in order:
        size = schema.blocks[number].num_parameters
        if used + size <= budget:
            kept.append(number)
            used += size
    return tuple(sorted(kept))


def order_by_difference(differences: Sequence[float]) -> list[int]:
    """Return block numbers by mean block difference, largest first.

    Of equal ones the lower number comes first.
    """
    return sorted(range(len(differences)), key=lambda number: (-differences[number], number))


def random_order(num_blocks: int, generator: torch.Generator) -> list[int]:
    """Return block numbers in random order, the ablation without mean block differences."""
    return list(map(int, torch.randperm(num_blocks, generator=generator)))
