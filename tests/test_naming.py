"""Blocks from names alone: the rule, its options and errors, and laws of any names."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from fedobd import BlockRules, UsageError, decompose, decompose_names, guess_roles
from fedobd.blocks import BlockStyle, ModelSchema, Role, TensorSpec
from tests.helpers import buffer, frozen, law, model_of, parameter
from tests.test_block_laws import check_parts, covered


def floats(*names: str) -> list[TensorSpec]:
    return [parameter(name, 2, 2) for name in names]


def blocks_of(tensors: Sequence[TensorSpec], rules: BlockRules | None = None) -> list[str]:
    return [block.name for block in decompose_names(tensors, rules).blocks]


# --- the rule ------------------------------------------------------------------------------------


def test_a_module_or_what_is_below_its_last_number_is_a_block() -> None:
    wanted = {
        "embed.word.weight": "embed.word",
        "encoder.layer.0.attention.query.weight": "encoder.layer.0",
        "encoder.layer.0.norm.bias": "encoder.layer.0",
        "encoder.layer.1.norm.bias": "encoder.layer.1",
        "stages.0.blocks.1.norm.weight": "stages.0.blocks.1",
        "h3.a.weight": "h3.a",
        "3x.b.weight": "3x.b",
        "scale": "scale",
        "7": "7",
    }
    schema = decompose_names(floats(*wanted))
    came = {schema.tensors[s.tensor].name: b.name for b in schema.blocks for s in b.segments}
    assert came == wanted
    assert [block.name for block in schema.blocks] == list(dict.fromkeys(wanted.values()))


def test_known_model_from_its_state_dict() -> None:
    state = model_of("bert").state_dict()
    shapes = [value.shape for value in state.values()]
    specs = guess_roles(list(state), shapes, [value.dtype for value in state.values()])
    layers = [name for name in blocks_of(specs) if ".layer." in name]
    assert layers == ["bert.encoder.layer.0", "bert.encoder.layer.1"]


def test_tensors_of_a_module_that_lie_apart() -> None:
    schema = decompose_names(floats("a.weight", "b.weight", "a.bias"))
    assert [spec.name for spec in schema.tensors] == ["a.weight", "b.weight", "a.bias"]
    assert [[s.tensor for s in b.segments] for b in schema.blocks] == [[0, 2], [1]]


def test_buffers_without_company_join_the_block_before() -> None:
    apart = [buffer("x.steps"), *floats("y.weight"), buffer("z.steps"), *floats("w.weight")]
    assert [b.layers for b in decompose_names(apart).blocks] == [("x", "y", "z"), ("w",)]
    assert blocks_of([frozen("h.0.a.weight", 2), *floats("h.0.b.weight", "x.w")]) == ["h.0", "x"]


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [None, 0.2, 0.01])
@pytest.mark.parametrize("style", ["layer", "tensor"])
def test_layers_tensors_and_parts_as_from_the_model(
    style: BlockStyle, fraction: float | None
) -> None:
    rules = BlockRules(style=style, max_block_fraction=fraction)
    schema = decompose(model_of("bert"), rules)
    named = decompose_names(schema.tensors, rules)
    assert [(b.name, b.segments) for b in named.blocks] == [
        (b.name, b.segments) for b in schema.blocks
    ]


def test_unit_names() -> None:
    tensors = floats("a.b.0.c.weight", "a.b.1.d.weight", "a.e.weight", "f.weight", "g")

    def named(*patterns: str) -> list[str]:
        return blocks_of(tensors, BlockRules(unit_names=patterns))

    assert named() == ["a.b.0", "a.b.1", "a.e", "f", "g"]
    assert named("a.b") == ["a.b", "a.e", "f", "g"]
    assert named("a.b", "a") == ["a", "f", "g"]
    assert named("?.e") == named()


def test_roles() -> None:
    float32, int64 = torch.float32, torch.int64
    names = ["n.running_mean", "n.running_var", "n.num_batches_tracked", "e.position_ids"]
    for name in (*names, "running_mean"):
        assert guess_roles([name], [(2,)], [float32])[0].role is Role.BUFFER
    for dtype in (int64, torch.bool, torch.uint8):
        assert guess_roles(["a.weight"], [(2,)], [dtype])[0].role is Role.BUFFER
    for dtype in (float32, torch.bfloat16, torch.float64):
        assert guess_roles(["a.weight"], [[2]], [dtype]) == (
            parameter("a.weight", 2, dtype=dtype),
        )
    assert guess_roles(["running_mean.weight"], [()], [float32])[0].role is Role.PARAMETER


# --- errors --------------------------------------------------------------------------------------


def test_errors() -> None:
    tensors = floats("a.weight", "b.weight")
    with pytest.raises(UsageError, match="unit_classes needs a model; where only names are known"):
        decompose_names(tensors, BlockRules(unit_classes=("Block",)))
    with pytest.raises(UsageError, match=r"unit_names: 'c\.\*' matches no module of the model"):
        decompose_names(tensors, BlockRules(unit_names=("c.*",)))
    with pytest.raises(UsageError, match=r"two tensors have the name 'a\.weight'"):
        decompose_names([*tensors, tensors[0]])
    with pytest.raises(
        UsageError, match=r"parameter 'n' has element type torch.int64; wanted a fl"
    ):
        decompose_names([*tensors, parameter("n", dtype=torch.int64)])
    for nothing in ([], [buffer("a.running_mean", 2)], [parameter("a", 0)]):
        with pytest.raises(UsageError, match="the model has no trainable parameters"):
            decompose_names(nothing)
    with pytest.raises(UsageError, match="1 names, 0 shapes and 2 element types; wanted one of"):
        guess_roles(["a"], [], [torch.float32] * 2)
    with pytest.raises(UsageError, match=r"'a' has element type torch.complex64; supported are"):
        guess_roles(["a"], [()], [torch.complex64])


# --- laws ----------------------------------------------------------------------------------------


COMPONENTS = ("0", "1", "12", "layer1", "conv", "", "weight", "bias", "running_mean")


@st.composite
def tensor_lists(draw: st.DrawFn) -> list[TensorSpec]:
    """Draw tensors with names that mean something, or with any."""
    dotted = st.lists(st.sampled_from(COMPONENTS), min_size=1, max_size=6).map(".".join)
    names = draw(st.lists(dotted | st.text(max_size=9), unique=True, min_size=1, max_size=25))
    shapes = [tuple(draw(st.lists(st.integers(0, 4), max_size=5))) for _ in names]
    dtypes = [draw(st.sampled_from([torch.float32, torch.float16, torch.int64])) for _ in names]
    specs = guess_roles(names, shapes, dtypes)
    fixed = draw(st.sets(st.sampled_from(range(len(names))), max_size=3))
    return [
        dataclasses.replace(spec, role=Role.FROZEN) if number in fixed else spec
        for number, spec in enumerate(specs)
    ]


def trained(schema: ModelSchema) -> list[set[str]]:
    """Return for each block the names of its parameters."""
    specs = schema.tensors
    names = [[specs[s.tensor] for s in block.segments] for block in schema.blocks]
    return [{spec.name for spec in held if spec.role is Role.PARAMETER} for held in names]


@law(100)
@given(
    tensors=tensor_lists(),
    style=st.sampled_from(["semantic", "layer", "tensor"]),
    fraction=st.one_of(st.none(), st.floats(0.01, 1)),
    seed=st.integers(0, 99),
)
def test_laws_of_any_names(
    tensors: list[TensorSpec], style: BlockStyle, fraction: float | None, seed: int
) -> None:
    rules = BlockRules(style=style, max_block_fraction=fraction)
    if not any(t.role is Role.PARAMETER and t.num_elements for t in tensors):
        with pytest.raises(UsageError, match="no trainable parameters"):
            decompose_names(tensors, rules)
        return
    schema = decompose_names(tensors, rules)
    assert list(schema.tensors) == tensors
    for spec, counts in zip(tensors, covered(schema), strict=True):
        assert (counts == (spec.role is not Role.FROZEN)).all(), spec.name
    assert all(block.segments for block in schema.blocks)
    assert decompose_names(tensors, rules) == schema
    if fraction is not None:
        check_parts(schema, fraction)
    elif style == "semantic":
        for names in trained(decompose_names(tensors, BlockRules(style="layer"))):
            assert any(names <= block for block in trained(schema)), "no module is torn apart"
    other = random.Random(seed).sample(tensors, len(tensors))  # noqa: S311
    shuffled = decompose_names(other, rules)
    assert sorted(t.name for t in shuffled.tensors) == sorted(t.name for t in tensors)
    assert shuffled.num_parameters == schema.num_parameters
