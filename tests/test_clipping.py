"""A clip norm outlasts quantization: how much a difference is shrunk, and what is sent of it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from fedobd import (
    NNADQ,
    Broadcast,
    ClientSession,
    Codec,
    ModelSchema,
    ModelState,
    Payload,
    Report,
    Segment,
    get_state,
)
from fedobd.blocks import decompose, segment_of
from fedobd.codec import Coding, Quantizer, Unquantized, dequantize
from fedobd.methods import FedOBD
from fedobd.payload import Header, Kind
from fedobd.sessions import all_blocks
from fedobd.sessions._clipping import bound_norms, shrink_factor
from fedobd.sessions._selection import squared_norm

UNQUANTIZED = Codec(uplink_quantizer="none", downlink_quantizer="none", selection="none")


def test_a_clip_norm_would_be_broken_without_care() -> None:
    """What the tests below guard against does happen."""
    broken = 0
    for seed in range(20):
        values = np.random.default_rng(seed).normal(size=1000).astype(np.float32)
        quantizer = NNADQ(100.0)
        code = quantizer.measure(values, 32)
        if code.coding is Coding.LEVELS:
            rounded = dequantize(quantizer.quantize(values, code).signed(), code)
            broken += squared_norm(rounded) > squared_norm(values)
    assert broken > 5


@st.composite
def float_vectors(draw: st.DrawFn) -> NDArray[np.float32]:
    size = draw(st.integers(1, 200))
    seed = draw(st.integers(0, 2**32 - 1))
    scale = 10.0 ** draw(st.floats(-30, 17))
    kind = draw(st.sampled_from(["normal", "sparse", "ties", "constant", "offset"]))
    generator = np.random.default_rng(seed)
    values = generator.normal(size=size)
    if kind == "sparse":
        values *= generator.random(size) < 0.05
    elif kind == "ties":
        values = np.round(values * 2) / 2 + 0.25
    elif kind == "constant":
        values[:] = values[0]
    elif kind == "offset":
        values += 50
    return np.asarray(values * scale, np.float32)


@given(float_vectors(), st.floats(-6, 8), st.sampled_from([16, 32]))
@settings(max_examples=100, deadline=None)
def test_what_is_shrunk_keeps_its_norm_when_it_is_quantized(
    values: NDArray[np.float32], log_weight: float, repr_bits: int
) -> None:
    quantizer: Quantizer = NNADQ(10.0**log_weight)
    factor = shrink_factor(values, quantizer, repr_bits)
    assert 0 < factor <= 1
    shrunk = values * np.float32(factor)
    code = quantizer.measure(shrunk, repr_bits)
    decoded = shrunk
    if code.coding is Coding.LEVELS:
        decoded = dequantize(quantizer.quantize(shrunk, code).signed(), code)
    elif code.coding is Coding.CONSTANT:
        decoded = np.full_like(values, code.offset)
    assert squared_norm(decoded) <= squared_norm(values) * (1 + 1e-6)
    original = quantizer.measure(values, repr_bits)
    if original.coding is Coding.LEVELS:
        plain = dequantize(quantizer.quantize(values, original).signed(), original)
        if squared_norm(plain) <= squared_norm(values):
            assert factor == 1  # nothing is shrunk without need


@given(float_vectors())
@settings(max_examples=30, deadline=None)
def test_nothing_is_shrunk_where_nothing_is_quantized(values: NDArray[np.float32]) -> None:
    assert shrink_factor(values, Unquantized(), 32) == 1


def test_empty_and_zero_differences_are_not_shrunk() -> None:
    for values in (np.zeros(0, np.float32), np.zeros(9, np.float32)):
        assert shrink_factor(values, NNADQ(1.0), 32) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("quantizer", [Unquantized(), NNADQ(1.0)])
def test_differences_that_are_not_finite_are_left_to_the_encoder(
    value: float, quantizer: Quantizer
) -> None:
    assert shrink_factor(np.asarray([1, value, 2], np.float32), quantizer, 32) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codec", [UNQUANTIZED, Codec(uplink_weight=1e-9, selection="none")])
def test_half_precision_differences_keep_their_norm_on_the_wire(
    dtype: torch.dtype, codec: Codec
) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)).to(dtype)
    schema = decompose(model)
    codec = dataclasses.replace(codec, bound_norm=True)
    for seed in range(8):
        start = {name: torch.zeros_like(value) for name, value in get_state(model).items()}
        generator = torch.Generator().manual_seed(seed)
        trained = {
            name: 0.1 * torch.randn(value.shape, generator=generator)
            for name, value in start.items()
        }
        sent = send_up(schema, codec, start, trained)
        for name, value in trained.items():
            assert float(sent[name].double().norm()) <= float(value.double().norm()) * (1 + 1e-6)


def send_up(
    schema: ModelSchema, codec: Codec, start: ModelState, trained: ModelState
) -> ModelState:
    """Return the differences that an upload of a client holds."""
    method = FedOBD(codec=codec)
    header = Header(
        kind=Kind.BROADCAST, method=method.wire_id, round=1, stage=1, block_ids=all_blocks(schema)
    )
    client = ClientSession(method, schema, client=0)
    client.receive(Broadcast(header, start))
    upload = client.upload(trained, Report(num_examples=1, train_loss=0.0)).data
    sent = {name: torch.zeros(value.shape) for name, value in trained.items()}
    for _, segments in Payload.parse(upload, schema).blocks():
        for decoded in segments:
            spec = schema.tensors[decoded.segment.tensor]
            segment_of(sent, spec, decoded.segment).copy_(decoded.values)
    return sent


# --- by hand
#
# With one level a segment from -8 to 8 becomes -8, 0 and 8. So (-8, 8, 5) becomes (-8, 8, 8): 153,
# the square of its norm, becomes 192; any multiple c of it becomes c·(-8, 8, 8), whose norm is no
# larger where c is at most √(153 / 192).

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
