"""Clip norms: what is shrunk so that quantization raises no L2 norm, on cases worked by hand.

With one level a segment from -8 to 8 becomes -8, 0 and 8. So (-8, 8, 5) becomes (-8, 8, 8): 153,
the square of its norm, becomes 192; any multiple c of it becomes c·(-8, 8, 8), whose norm is no
larger where c is at most √(153 / 192).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fedobd import NNADQ, Segment, Unquantized, decompose
from fedobd._clipping import bound_norms, shrink_factor
from fedobd._quantization import dequantize

ONE_LEVEL = NNADQ(1e3)
RAISED = [-8.0, 8.0, 5.0]
FACTOR = math.sqrt(153 / 192)


def test_what_would_have_a_larger_norm_is_shrunk_just_so_far_that_it_has_not() -> None:
    values = np.array(RAISED, np.float32)
    factor = shrink_factor(values, ONE_LEVEL, 32)
    assert factor == pytest.approx(FACTOR, rel=3e-6)
    shrunk = values * np.float32(factor)
    code = ONE_LEVEL.measure(shrunk, 32)
    assert code.num_levels == 1
    sent = dequantize(ONE_LEVEL.quantize(shrunk, code).signed(), code).astype(np.float64)
    assert 152.999 < (sent**2).sum() <= 153


@pytest.mark.parametrize(
    "values",
    [
        [-8.0, 8.0, 3.0],  # becomes (-8, 8, 0)
        [-8.0, 8.0, 8.0],  # is on the levels
        [2.0, 2.0, 2.0],  # a constant
        [0.0, 0.0, 0.0],
    ],
)
def test_what_has_no_larger_norm_is_left(values: list[float]) -> None:
    assert shrink_factor(np.array(values, np.float32), ONE_LEVEL, 32) == 1
    assert shrink_factor(np.array(RAISED, np.float32), Unquantized(), 32) == 1


def test_only_parameters_of_clients_with_a_quantizer_are_shrunk_each_by_its_own_factor() -> None:
    schema = decompose(nn.Sequential(nn.Linear(3, 1, bias=False), nn.BatchNorm1d(3)))
    values = {
        "0.weight": torch.tensor([RAISED, RAISED]),
        "1.weight": torch.tensor([[-8.0, 8.0, 3.0]] * 2),
        "1.running_mean": torch.tensor([RAISED, RAISED]),
    }

    def source(segment: Segment) -> torch.Tensor:
        return values[schema.tensors[segment.tensor].name]

    numbers = {spec.name: number for number, spec in enumerate(schema.tensors)}
    bounded = bound_norms(source, schema, [ONE_LEVEL, None])
    for _ in range(2):
        weight = bounded(Segment(numbers["0.weight"], 0, 3))
        assert weight[0].tolist() == pytest.approx([FACTOR * v for v in RAISED], rel=3e-6)
        assert weight[1].tolist() == RAISED
        for name in ("1.weight", "1.running_mean"):
            assert torch.equal(bounded(Segment(numbers[name], 0, 3)), values[name])
