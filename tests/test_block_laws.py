"""The laws that every decomposition keeps: on known models, and on random stacks of layers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from torch import nn

from fedobd import UsageError
from fedobd.blocks import BlockRules, BlockStyle, ModelSchema, Role, Segment, decompose
from tests.helpers import (
    MODELS,
    Held,
    conv,
    law,
    model_of,
    norm,
)


def covered(schema: ModelSchema) -> list[np.ndarray]:
    """Count for every element of every tensor the blocks that hold it."""
    counts = [np.zeros(spec.num_elements, np.uint8) for spec in schema.tensors]
    for block in schema.blocks:
        for segment in block.segments:
            counts[segment.tensor][segment.start : segment.stop] += 1
    return counts


def check_laws(model: nn.Module, schema: ModelSchema) -> None:
    """Hold a schema to the laws, read from torch's own lists of parameters and buffers."""
    roles = {name: "parameter" if p.requires_grad else "frozen" for name, p in tied_once(model)}
    kept = set(model.state_dict(keep_vars=True))
    roles |= {name: "buffer" for name, _ in model.named_buffers() if name in kept}
    assert {spec.name: str(spec.role) for spec in schema.tensors} == roles

    for spec, counts in zip(schema.tensors, covered(schema), strict=True):
        assert (counts == (spec.role is not Role.FROZEN)).all(), spec.name
    segments = [s for block in schema.blocks for s in block.segments]
    buffers = [s.tensor for s in segments if schema.tensors[s.tensor].role is Role.BUFFER]
    assert len(buffers) == len(set(buffers)), "a buffer lies whole in one block"

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert schema.num_parameters == trained
    assert sum(block.num_parameters for block in schema.blocks) == trained
    assert len({block.name for block in schema.blocks}) == len(schema.blocks)
    for block in schema.blocks:
        holders = [schema.tensors[s.tensor].name.rpartition(".")[0] for s in block.segments]
        assert list(block.layers) == list(dict.fromkeys(holders))
    again = ModelSchema.from_json(json.loads(json.dumps(schema.to_json())))
    assert again == schema
    assert again.fingerprint == schema.fingerprint


def tied_once(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=True))


def check_parts(schema: ModelSchema, fraction: float) -> None:
    limit = fraction * schema.num_parameters
    for block in schema.blocks:
        if block.num_parameters > limit:
            parameters = [
                s
                for s in block.segments
                if schema.tensors[s.tensor].role is Role.PARAMETER and s.num_elements
            ]
            assert len(parameters) == 1, block.name
            assert parameters[0].num_elements == row_length(schema, parameters[0]), block.name


def row_length(schema: ModelSchema, segment: Segment) -> int:
    return math.prod(schema.tensors[segment.tensor].shape[1:])


# --- known models --------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["semantic", "layer", "tensor"])
@pytest.mark.parametrize("name", MODELS)
def test_laws(name: str, style: BlockStyle) -> None:
    model = model_of(name)
    schema = decompose(model, BlockRules(style=style))
    check_laws(model, schema)
    assert decompose(model, BlockRules(style=style)).fingerprint == schema.fingerprint


@pytest.mark.parametrize("fraction", [0.5, 0.05, 0.003])
@pytest.mark.parametrize("name", [n for n in MODELS if n != "resnet"])
def test_laws_of_split_blocks(name: str, fraction: float) -> None:
    model = model_of(name)
    for style in ("semantic", "layer", "tensor"):
        schema = decompose(model, BlockRules(style=style, max_block_fraction=fraction))
        check_laws(model, schema)
        check_parts(schema, fraction)


@pytest.mark.parametrize("name", MODELS)
def test_style_layer_has_a_block_for_each_layer_with_parameters(name: str) -> None:
    model = model_of(name)
    blocks = decompose(model, BlockRules(style="layer")).blocks
    wanted: list[tuple[str, int]] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        count = sum(p.numel() for p in own if id(p) not in seen)
        seen.update(map(id, own))
        if count:
            wanted.append((path or "(model)", count))
    assert [(block.name, block.num_parameters) for block in blocks] == wanted


@pytest.mark.parametrize("name", MODELS)
def test_style_tensor_has_a_block_for_each_parameter_and_one_for_buffers(name: str) -> None:
    model = model_of(name)
    schema = decompose(model, BlockRules(style="tensor"))
    wanted = [(n, p.numel(), 1) for n, p in tied_once(model) if p.requires_grad]
    buffers = sum(spec.role is Role.BUFFER for spec in schema.tensors)
    if buffers:
        wanted.append(("(buffers)", 0, buffers))
    assert [(b.name, b.num_parameters, len(b.segments)) for b in schema.blocks] == wanted


# --- random layers -------------------------------------------------------------------------------


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv": conv,
    "conv1d": lambda: nn.Conv1d(1, 2, 2, bias=False),
    "norm": norm,
    "bare norm": lambda: nn.BatchNorm2d(2, affine=False),
    "group norm": lambda: nn.GroupNorm(1, 2),
    "relu": nn.ReLU,
    "prelu": nn.PReLU,
    "linear": lambda: nn.Linear(2, 3),
    "pool": lambda: nn.MaxPool2d(2),
    "embedding": lambda: nn.Embedding(5, 2),
    "lstm": lambda: nn.LSTM(2, 2),
    "attention": lambda: nn.MultiheadAttention(2, 1),
    "held": Held,
}


@st.composite
def stacks(draw: st.DrawFn) -> nn.Module:
    """Draw a tree of layers; some are frozen, some are used twice."""
    used: list[nn.Module] = []

    def layer(name: str) -> nn.Module:
        if used and draw(st.integers(0, 9)) == 0:
            return draw(st.sampled_from(used))
        used.append(LAYERS[name]().requires_grad_(draw(st.integers(0, 4)) > 0))
        return used[-1]

    leaf = st.sampled_from(sorted(LAYERS))
    tree = draw(st.lists(st.one_of(leaf, st.lists(leaf, max_size=6)), max_size=8))
    return nn.Sequential(
        *(
            layer(item) if isinstance(item, str) else nn.Sequential(*map(layer, item))
            for item in tree
        )
    )


@law(100)
@given(
    model=stacks(),
    style=st.sampled_from(["semantic", "layer", "tensor"]),
    fraction=st.one_of(st.none(), st.floats(0.01, 1)),
)
def test_laws_of_random_stacks(
    model: nn.Module, style: BlockStyle, fraction: float | None
) -> None:
    rules = BlockRules(style=style, max_block_fraction=fraction)
    if not any(p.requires_grad for p in model.parameters()):
        with pytest.raises(UsageError):
            decompose(model, rules)
        return
    schema = decompose(model, rules)
    check_laws(model, schema)
    if fraction is not None:
        check_parts(schema, fraction)
    if style == "semantic":
        plain = decompose(model)
        parts = {re.sub(r"\[\d+/\d+\]$", "", block.name): block.kind for block in schema.blocks}
        assert parts == {block.name: block.kind for block in plain.blocks}
        layers = decompose(model, BlockRules(style="layer"))
        assert len(plain.blocks) <= len(layers.blocks)


@law(100)
@given(
    rows=st.integers(1, 60),
    row=st.integers(1, 40),
    fraction=st.floats(0.01, 1),
    bias=st.booleans(),
)
def test_laws_of_a_split_layer(rows: int, row: int, fraction: float, bias: bool) -> None:
    model = nn.Linear(row, rows, bias=bias)
    schema = decompose(model, BlockRules(max_block_fraction=fraction))
    check_laws(model, schema)
    check_parts(schema, fraction)
    sizes = [block.num_parameters for block in schema.blocks]
    limit = max(1, math.floor(fraction * sum(sizes)))
    rows_a_part = max(1, limit // row)
    assert len(sizes) <= math.ceil(rows / rows_a_part) + math.ceil(rows / limit)


@law(100)
@given(rows=st.integers(1, 60), row=st.integers(1, 40), fraction=st.floats(0.01, 1))
def test_parts_differ_by_at_most_a_row(rows: int, row: int, fraction: float) -> None:
    layer = nn.Linear(row, rows, bias=False)
    blocks = decompose(layer, BlockRules(max_block_fraction=fraction)).blocks
    sizes = [block.num_parameters for block in blocks]
    assert max(sizes) - min(sizes) <= row
