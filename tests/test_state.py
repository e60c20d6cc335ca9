"""States: out of a module and into one, checked, cast, and cut into segments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedobd._errors import UsageError
from fedobd.blocks import (
    Role,
    Segment,
    cast_state,
    check_state,
    decompose,
    get_state,
    load_state,
    master_state,
    named_tensors,
    segment_of,
)
from tests.helpers import (
    MODELS,
    buffer,
    frozen,
    make_schema,
    model_of,
    parameter,
    random_state,
    tiny_model,
)

# --- out of a module and into one ----------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_state_round_trip(name: str) -> None:
    model, schema = model_of(name), decompose(model_of(name))
    state = get_state(model)
    assert [(n, tuple(v.shape), v.dtype) for n, v in state.items()] == [
        (spec.name, spec.shape, spec.dtype) for spec in schema.tensors
    ]
    check_state(schema, state)
    torch.manual_seed(1)
    other = MODELS[name]()
    load_state(other, state)
    for tensor, value in get_state(other).items():
        assert torch.equal(value, state[tensor]), tensor
    back = cast_state(schema, master_state(schema, state))
    assert all(torch.equal(back[tensor], state[tensor]) for tensor in state)


def test_tied_parameters_and_lost_buffers_are_named_once() -> None:
    model = tiny_model()
    model.register_buffer("scratch", torch.zeros(2), persistent=False)
    names = {name: role for name, _, role in named_tensors(model)}
    assert names == {
        "conv.weight": Role.PARAMETER,
        "conv.bias": Role.PARAMETER,
        "norm.weight": Role.PARAMETER,
        "norm.bias": Role.PARAMETER,
        "norm.running_mean": Role.BUFFER,
        "norm.running_var": Role.BUFFER,
        "norm.num_batches_tracked": Role.BUFFER,
        "table.weight": Role.PARAMETER,
        "fixed.weight": Role.FROZEN,
        "fixed.bias": Role.FROZEN,
    }


def test_tied_weights_stay_tied() -> None:
    model = MODELS["gpt2"]()
    state = get_state(model)
    state["transformer.wte.weight"] = torch.ones(40, 16)
    load_state(model, state)
    head = model.get_parameter("lm_head.weight")
    assert head is model.get_parameter("transformer.wte.weight")
    assert (head == 1).all()


def test_state_is_a_copy_and_can_be_loaded() -> None:
    model, other = tiny_model(1), tiny_model(2)
    state = get_state(model)
    load_state(other, state)
    for name, tensor in get_state(other).items():
        assert torch.equal(tensor, state[name])
        assert tensor.dtype == state[name].dtype
    assert torch.equal(other.out.weight, state["table.weight"])
    with torch.no_grad():
        model.table.weight.zero_()
    assert bool(state["table.weight"].any())


def test_state_of_a_transposed_parameter_is_contiguous() -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
    state = get_state(model)
    assert state["w"].is_contiguous()
    assert state["w"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


def test_load_casts_to_the_types_of_the_model() -> None:
    model = nn.BatchNorm1d(2).to(torch.bfloat16)
    state = {name: value.double() for name, value in get_state(model).items()}
    state["weight"] = torch.tensor([1.0, 1 + 2**-20], dtype=torch.float64)
    state["num_batches_tracked"] = torch.tensor(5.0)
    load_state(model, state)
    assert model.weight.dtype == torch.bfloat16
    assert model.weight.tolist() == [1.0, 1.0]
    assert get_state(model)["num_batches_tracked"].dtype == torch.int64
    assert get_state(model)["num_batches_tracked"].item() == 5


# --- against a schema ----------------------------------------------------------------------------


def test_missing_and_wrong_tensors() -> None:
    model = nn.Linear(3, 2)
    schema, state = decompose(model), get_state(model)
    missing = {"weight": state["weight"]}
    wrong = state | {"bias": torch.zeros(3)}
    for check in (lambda s: check_state(schema, s), lambda s: master_state(schema, s)):
        with pytest.raises(UsageError, match="the state holds no value for tensor 'bias'"):
            check(missing)
        with pytest.raises(UsageError, match=r"'bias' has shape \(3,\); wanted \(2,\)"):
            check(wrong)
    with pytest.raises(UsageError, match="no value for tensor 'bias' of the model"):
        load_state(model, missing)
    with pytest.raises(UsageError, match=r"has shape \(2,\) in the model and \(3,\) in the state"):
        load_state(model, wrong)


def test_state_that_does_not_fit_is_refused_and_loads_nothing() -> None:
    model = tiny_model(1)
    before = get_state(model)
    missing = get_state(tiny_model(2))
    del missing["fixed.bias"]
    with pytest.raises(UsageError, match=r"holds no value for tensor 'fixed\.bias' of the model"):
        load_state(model, missing)
    misshapen = get_state(tiny_model(2))
    misshapen["fixed.bias"] = torch.zeros(4)
    with pytest.raises(
        UsageError, match=r"'fixed\.bias' has shape \(3,\) in the model and \(4,\) in the state"
    ):
        load_state(model, misshapen)
    for name, tensor in get_state(model).items():
        assert torch.equal(tensor, before[name]), name


def test_check_state() -> None:
    schema = make_schema([frozen("ice", 4), parameter("scalar", dtype=torch.bfloat16)])
    state = random_state(schema, 1)
    check_state(schema, state)
    with pytest.raises(UsageError, match=r"'scalar' has shape \(1,\); wanted \(\)"):
        check_state(schema, {**state, "scalar": torch.zeros(1)})
    del state["ice"]
    with pytest.raises(UsageError, match="the state holds no value for tensor 'ice'"):
        check_state(schema, state)
    with pytest.raises(UsageError, match="the state holds no value for tensor 'ice'"):
        master_state(schema, state)


def test_master_state_is_float32_where_values_are_averaged() -> None:
    schema = make_schema(
        [
            parameter("w", 2, dtype=torch.bfloat16),
            parameter("d", 2, dtype=torch.float64),
            buffer("mean", 2, dtype=torch.float16),
            buffer("seen", dtype=torch.int64),
            frozen("ice", 2, dtype=torch.float64),
        ]
    )
    state = random_state(schema, 1)
    master = master_state(schema, state)
    types = {name: tensor.dtype for name, tensor in master.items()}
    assert types == {
        "w": torch.float32,
        "d": torch.float32,
        "mean": torch.float32,
        "seen": torch.int64,
        "ice": torch.float64,
    }
    assert all(master[n].data_ptr() != state[n].data_ptr() for n in state)
    cast = cast_state(schema, master)
    for spec in schema.tensors:
        assert cast[spec.name].dtype == spec.dtype
    assert torch.equal(cast["w"], state["w"])
    assert torch.equal(cast["ice"], state["ice"])


def test_segment_is_a_view() -> None:
    spec = parameter("w", 3, 2)
    state = {"w": torch.zeros(3, 2, requires_grad=True)}
    part = segment_of(state, spec, Segment(0, 1, 4))
    part.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert np.array_equal(state["w"].detach().numpy(), [[0, 1], [2, 3], [0, 0]])
    assert not part.requires_grad
