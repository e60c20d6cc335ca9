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

from fedobd.blocks import ModelSchema, Role, Segment


def subtract(
    now: torch.Tensor, before: torch.Tensor, start: int, stop: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a part of each client's values has changed by, and the sum of squares of that.

    On the CPU eight float64 sums run over every eighth difference (what is left over goes to the
    first) and are added in pairs: the same bits on every machine, which a library's reduction does
    not promise. On another device they are added up there, in its own order.

    now: floating, shape (clients, m), on any device; before: the same, or (1, m), alike for all.
    Both results lie where `now` does: float32, shape (clients, stop - start); and float64,
    shape (clients,).
    """
    part = slice(start, stop)
    if now.device.type != "cpu":
        below = before[:, part].to(now.device, torch.float32)
        differences = now[:, part].to(torch.float32) - below
        return differences, differences.to(torch.float64).square().sum(dim=1)
    import fedobd.codec.kernels as kernels  # when first needed: importing numba takes its time

    if now.dtype != torch.float32 or before.dtype != torch.float32:
        now, before = now[:, part].to(torch.float32), before[:, part].to(torch.float32)
        start = 0
    differences = torch.empty(len(now), stop - part.start)
    norms = torch.empty(len(now), dtype=torch.float64)
    kernels.subtract(
        now.contiguous().numpy(),
        before.contiguous().numpy(),
        start,
        differences.numpy(),
        norms.numpy(),
    )
    return differences, norms


def squared_norm(values: NDArray[np.float32]) -> float:
    """Return the sum of squares of values, shape (n,), in float64, as `subtract` adds them up."""
    rows = torch.from_numpy(values).unsqueeze(0)
    return float(subtract(rows, torch.zeros_like(rows), 0, values.size)[1])


def mean_block_differences(
    schema: ModelSchema, squared_norms: Callable[[Segment], torch.Tensor]
) -> list[tuple[float, ...]]:
    """Return each client's mean block difference ‖vec(Ŵ[b]) - vec(W_k[b])‖₂ / |b| of each block.

    `squared_norms` gives the sums of squares of a segment's differences, float64, shape
    (clients,). A block of buffers alone has 0.
    """
    sizes = {n: b.num_parameters for n, b in enumerate(schema.blocks) if b.num_parameters}
    totals = []
    for number in sizes:
        segments = schema.blocks[number].segments
        trained = [s for s in segments if schema.tensors[s.tensor].role is Role.PARAMETER]
        norms = list(map(squared_norms, trained))
        totals.append(sum(norms[1:], norms[0]))
    means = []
    for of_client in torch.stack(totals, dim=1).tolist():
        mean = dict.fromkeys(range(len(schema.blocks)), 0.0)
        for (number, size), total in zip(sizes.items(), of_client, strict=True):
            mean[number] = math.sqrt(total) / size
        means.append(tuple(mean.values()))
    return means


def parameter_budget(num_parameters: int, dropout_rate: float) -> int:
    """Return the largest whole number of parameters within (1 - λ)·|W|.

    λ counts as it is written in decimal.
    """
    return math.floor((1 - Fraction(str(dropout_rate))) * num_parameters)


def oversized_blocks(schema: ModelSchema, dropout_rate: float) -> tuple[int, ...]:
    """Return the numbers of the blocks that are larger than the (1 - λ) budget."""
    budget = parameter_budget(schema.num_parameters, dropout_rate)
    return tuple(
        number for number, block in enumerate(schema.blocks) if block.num_parameters > budget
    )


def fill_budget(schema: ModelSchema, order: Sequence[int], budget: int) -> tuple[int, ...]:
    """Return the blocks that are chosen, ascending, most wanted first, within a parameter budget.

    A block that does not fit is skipped, and the scan goes on; one without parameters always fits.
    """
    block_ids, used = [], 0
    for number in order:
        size = schema.blocks[number].num_parameters
        if used + size <= budget:
            block_ids.append(number)
            used += size
    return tuple(sorted(block_ids))


def order_by_difference(differences: Sequence[float]) -> list[int]:
    """Return block numbers by mean block difference, largest first.

    Of equal ones the lower number comes first.
    """
    return sorted(range(len(differences)), key=lambda number: (-differences[number], number))


def random_order(num_blocks: int, generator: torch.Generator) -> list[int]:
    """Return block numbers in random order, the ablation without mean block differences."""
    return list(map(int, torch.randperm(num_blocks, generator=generator)))
