from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import nn

from fedobd import UsageError
from fedobd.blocks import DTYPES, Block, ModelSchema, Role, Segment, TensorSpec, decompose
from tests.helpers import buffer, frozen, law, make_schema, parameter, tiny_model
from tests.test_payload import Case, cases

SPECS = [
    parameter("layer.w", 3, 2),
    buffer("layer.mean", 2),
    frozen("ice", 4),
    parameter("scalar", dtype=torch.bfloat16),
    parameter("empty", 0, 2),
    buffer("seen", dtype=torch.int64),
]
SCHEMA = make_schema(SPECS, [(0, 0, 4)], [(0, 4, 6), 1, 3], [4, 5])


@law(100)
@given(cases())
def test_json_round_trip(case: Case) -> None:
    text = json.dumps(case.schema.to_json(), allow_nan=False)
    again = ModelSchema.from_json(json.loads(text))
    assert again == case.schema
    assert again.fingerprint == case.schema.fingerprint
    assert again.num_parameters == case.schema.num_parameters


def test_json_of_a_decomposed_model_round_trips() -> None:
    schema = decompose(tiny_model())
    assert ModelSchema.from_json(json.loads(json.dumps(schema.to_json()))) == schema


def test_fingerprint_is_pinned() -> None:
    # Payloads and saved runs carry it; a change of its making is a change of the format.
    schema = make_schema([parameter("w", 3, 2), buffer("seen", dtype=torch.int64)], [0, 1])
    assert schema.fingerprint.hex() == "d26fb2fcdb534a75786cf9894e937e62"


def altered_schemas() -> dict[str, ModelSchema]:
    def with_spec(number: int, **changes: Any) -> ModelSchema:
        specs = list(SPECS)
        specs[number] = replace(specs[number], **changes)
        return make_schema(specs, [(0, 0, 4)], [(0, 4, 6), 1, 3], [4, 5])

    def with_block(number: int, **changes: Any) -> ModelSchema:
        blocks = list(SCHEMA.blocks)
        blocks[number] = replace(blocks[number], **changes)
        return ModelSchema(SCHEMA.tensors, tuple(blocks))

    return {
        "name": with_spec(0, name="layer.x"),
        "shape": with_spec(0, shape=(2, 3)),
        "dtype": with_spec(1, dtype=torch.float64),
        "frozen dtype": with_spec(2, dtype=torch.float16),
        "frozen shape": with_spec(2, shape=(2, 2)),
        "scalar as vector": with_spec(3, shape=(1,)),
        "empty shape": with_spec(4, shape=(0, 3)),
        "role": make_schema(
            [*SPECS[:5], parameter("seen", dtype=torch.int64)],
            [(0, 0, 4)],
            [(0, 4, 6), 1, 3],
            [4, 5],
        ),
        "cut": make_schema(SPECS, [(0, 0, 2)], [(0, 2, 6), 1, 3], [4, 5]),
        "block of a tensor": make_schema(SPECS, [(0, 0, 4), 3], [(0, 4, 6), 1], [4, 5]),
        "order in a block": make_schema(SPECS, [(0, 0, 4)], [1, (0, 4, 6), 3], [4, 5]),
        "order of blocks": make_schema(SPECS, [(0, 4, 6), 1, 3], [(0, 0, 4)], [4, 5]),
        "block name": with_block(0, name="other"),
        "block kind": with_block(0, kind="Other"),
        "block layers": with_block(0, layers=("x", "y")),
    }


ALTERED = altered_schemas()


@pytest.mark.parametrize("name", ALTERED)
def test_fingerprint_changes(name: str) -> None:
    assert len(ALTERED[name].fingerprint) == 16
    assert ALTERED[name].fingerprint != SCHEMA.fingerprint
    assert ALTERED[name] != SCHEMA


def test_fingerprints_differ_from_each_other_and_stay_for_equal_schemas() -> None:
    assert len({schema.fingerprint for schema in ALTERED.values()}) == len(ALTERED)
    again = make_schema(SPECS, [(0, 0, 4)], [(0, 4, 6), 1, 3], [4, 5])
    assert again.fingerprint == SCHEMA.fingerprint


W, MEAN, ICE = parameter("w", 4), buffer("mean", 2), frozen("ice", 3)

UNCOVERED: list[tuple[str, list[TensorSpec], list[list[Any]], str]] = [
    ("missing parameter", [W, MEAN], [[1]], "cover 0 of 4 elements of parameter 'w'"),
    ("missing buffer", [W, MEAN], [[0]], "cover 0 of 2 elements of buffer 'mean'"),
    ("missing end", [W], [[(0, 0, 3)]], "cover 3 of 4 elements of parameter 'w'"),
    ("missing start", [W], [[(0, 1, 4)]], "do not tile tensor 'w' at element 1"),
    ("gap", [W], [[(0, 0, 1)], [(0, 2, 4)]], "do not tile tensor 'w' at element 2"),
    ("overlap", [W], [[(0, 0, 3)], [(0, 2, 4)]], "do not tile tensor 'w' at element 2"),
    ("twice", [W], [[0], [0]], "do not tile tensor 'w' at element 0"),
    ("beyond", [W], [[(0, 0, 5)]], "cover 5 of 4 elements of parameter 'w'"),
    ("backwards", [W], [[(0, 0, 4), (0, 4, 2)]], "do not tile tensor 'w' at element 4"),
    ("negative start", [W], [[(0, -1, 4)]], "do not tile tensor 'w' at element -1"),
    ("split buffer", [W, MEAN], [[0], [(1, 0, 1)], [(1, 1, 2)]], "buffer 'mean' is split"),
    ("frozen in a block", [W, ICE], [[0, 1]], "cover 3 of 0 elements of frozen 'ice'"),
    ("empty of frozen", [W, ICE], [[0, (1, 0, 0)]], "cover 0 of 0 elements of frozen 'ice'"),
    (
        "zero-size in no block",
        [W, parameter("none", 0)],
        [[0]],
        "cover 0 of 0 elements of parameter 'none'",
    ),
    (
        "scalar buffer in no block",
        [W, buffer("seen", dtype=torch.int64)],
        [[0]],
        "cover 0 of 1 elements of buffer 'seen'",
    ),
]


@pytest.mark.parametrize(
    ("specs", "blocks", "match"),
    [case[1:] for case in UNCOVERED],
    ids=[case[0] for case in UNCOVERED],
)
def test_blocks_that_do_not_cover_are_refused(
    specs: list[TensorSpec], blocks: list[list[Any]], match: str
) -> None:
    with pytest.raises(UsageError, match=match):
        make_schema(specs, *blocks)


@pytest.mark.parametrize("number", [-1, 1, 99])
def test_block_of_an_unknown_tensor_is_refused(number: int) -> None:
    block = Block("b", "Test", (), (Segment(number, 0, 4),), 4)
    with pytest.raises(UsageError, match=f"block 'b' names tensor number {number}"):
        ModelSchema((W,), (block,))


@pytest.mark.parametrize("count", [0, 3, 6])
def test_wrong_count_of_parameters_is_refused(count: int) -> None:
    block = Block("b", "Test", (), (Segment(0, 0, 4), Segment(1, 0, 2)), count)
    with pytest.raises(UsageError, match=f"block 'b' says {count} parameters and holds 4"):
        ModelSchema((W, MEAN), (block,))


def test_tensors_of_one_name_are_refused() -> None:
    # Values travel and are kept by name, so two tensors of one name would be one.
    with pytest.raises(UsageError, match="'w'"):
        make_schema([parameter("w", 2), parameter("w", 2)])


@pytest.mark.parametrize("specs", [[], [ICE], [MEAN], [parameter("none", 0)], [MEAN, ICE]])
def test_nothing_to_train_is_refused(specs: list[TensorSpec]) -> None:
    with pytest.raises(UsageError, match=r"no trainable parameters; .* requires_grad=True"):
        make_schema(specs)


def test_model_without_trainable_parameters_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.requires_grad_(False)
    with pytest.raises(UsageError, match="the model has no trainable parameters"):
        decompose(model)


def test_element_type_that_is_not_supported_is_refused() -> None:
    for dtype in (torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(UsageError, match=rf"tensor 'z' has element type {dtype}; supported"):
            parameter("z", 2, dtype=dtype)


GOOD = {"tensors": [["w", [2], "float32", "parameter"]], "blocks": [["b", "k", [], [[0, 0, 2]]]]}


def test_smallest_json_is_read() -> None:
    assert ModelSchema.from_json(GOOD).num_parameters == 2


@pytest.mark.parametrize(
    "value",
    [
        None,
        3,
        "schema",
        [],
        {},
        {"tensors": []},
        {**GOOD, "tensors": None},
        {**GOOD, "tensors": [["w", [2], "float32"]]},
        {**GOOD, "tensors": [["w", 2, "float32", "parameter"]]},
        {**GOOD, "tensors": [["w", ["x"], "float32", "parameter"]]},
        {**GOOD, "tensors": [["w", [None], "float32", "parameter"]]},
        {**GOOD, "tensors": [["w", [2], "float128", "parameter"]]},
        {**GOOD, "tensors": [["w", [2], ["float32"], "parameter"]]},
        {**GOOD, "tensors": [["w", [2], "float32", "weight"]]},
        {**GOOD, "tensors": [["w", [math.inf], "float32", "parameter"]]},
        {**GOOD, "tensors": [["w", [math.nan], "float32", "parameter"]]},
        {**GOOD, "tensors": [["w", [2.5], "float32", "parameter"]]},
        {**GOOD, "tensors": [["w", [-1, -2], "float32", "parameter"]]},
        {**GOOD, "blocks": None},
        {**GOOD, "blocks": [["b", "k", []]]},
        {**GOOD, "blocks": [["b", "k", None, [[0, 0, 2]]]]},
        {**GOOD, "blocks": [["b", "k", [], [[0, 0]]]]},
        {**GOOD, "blocks": [["b", "k", [], [[7, 0, 2]]]]},
        {**GOOD, "blocks": [["b", "k", [], [[-1, 0, 2]]]]},
        {**GOOD, "blocks": [["b", "k", [], [[0, 0, math.inf]]]]},
        {**GOOD, "blocks": [["b", "k", [], [[0, 0, 2.5]]]]},
    ],
)
def test_json_that_is_no_schema_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match=r"this is not a model schema|names tensor number|shape"):
        ModelSchema.from_json(value)


def test_num_parameters_counts_trainable_elements_only() -> None:
    assert SCHEMA.num_parameters == 7
    assert [block.num_parameters for block in SCHEMA.blocks] == [4, 3, 0]


def test_mask_offsets_count_trainable_elements_in_tensor_order() -> None:
    schema = make_schema(
        [buffer("mean", 9), parameter("a", 2, 3), frozen("ice", 5), parameter("b", 4)],
        [3],
        [(1, 4, 6)],
        [(1, 0, 4), 0],
    )
    assert schema.mask_offset(Segment(1, 0, 4)) == 0
    assert schema.mask_offset(Segment(1, 4, 6)) == 4
    assert schema.mask_offset(Segment(3, 0, 4)) == 6
    assert schema.mask_offset(Segment(3, 3, 4)) == 9


def test_frozen_tensors_are_listed_in_order() -> None:
    schema = make_schema([frozen("a", 1), parameter("w", 1), frozen("b", 2)])
    assert schema.frozen() == (0, 2)
    assert make_schema([parameter("w", 1)]).frozen() == ()


@pytest.mark.parametrize(
    ("dtype", "role", "wire", "bits"),
    [
        (torch.float32, Role.PARAMETER, torch.float32, 32),
        (torch.float64, Role.PARAMETER, torch.float32, 32),
        (torch.float16, Role.PARAMETER, torch.float16, 16),
        (torch.bfloat16, Role.PARAMETER, torch.bfloat16, 16),
        (torch.bfloat16, Role.BUFFER, torch.float32, 32),
        (torch.float16, Role.BUFFER, torch.float32, 32),
        (torch.float64, Role.BUFFER, torch.float32, 32),
        (torch.int64, Role.BUFFER, torch.int64, 64),
        (torch.bool, Role.BUFFER, torch.bool, 8),
    ],
)
def test_type_on_the_wire(dtype: torch.dtype, role: Role, wire: torch.dtype, bits: int) -> None:
    spec = TensorSpec("t", (2, 3), dtype, role)
    assert (spec.wire_dtype, spec.repr_bits) == (wire, bits)
    assert (spec.num_elements, spec.is_floating) == (6, dtype.is_floating_point)
    assert DTYPES[str(dtype).removeprefix("torch.")] is dtype
