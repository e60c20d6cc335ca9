"""Stacked training: the numbers of `train_locally`, for every option, model and federation.

Value by value they are compared in float64, where the rounding of another order of additions
cannot be mistaken for another formula: see `WITHIN`. In float32 it turns a ReLU or a maximum now
and then, and no value has a bound; what is compared there is the whole update: see `NEAR`.
"""

from __future__ import annotations

import copy
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedobd import Payload, Report, RoundPlan, ServerSession, UsageError
from fedobd.blocks import ModelState, get_state, load_state
from fedobd.data import ClientData, Examples, gather, select
from fedobd.experiments import Experiment, RunConfig, _tune, build_experiment, load_config, run
from fedobd.experiments._tune import measure_stack
from fedobd.models import (
    DenseNet40,
    DigitsCNN,
    ResNet18,
    TransformerClassifier,
    use_batch_statistics,
)
from fedobd.sessions import Aggregator
from fedobd.simulation import (
    ClientResult,
    ClientSetup,
    ClientTask,
    LocalClient,
    RoundResult,
    SequentialPool,
    open_pool,
    simulate,
)
from fedobd.training import (
    ClientStart,
    LocalResult,
    Loss,
    TrainingOptions,
    binary_cross_entropy,
    cross_entropy,
    train_locally,
    train_stacked,
)
from fedobd.training._stacked import _steps
from tests.helpers import law
from tests.toy import Interrupted, PayloadKeeper, Stopper, config, make_model


class Within(NamedTuple):
    """Relative and absolute tolerance."""

    rtol: float
    atol: float


WITHIN = Within(1e-5, 1e-6)
"""How near values in float64 come after a few steps of a size of 0.01 to 0.1.

Rates and decays are float32 in the stack, each off by up to 6e-8 of itself, and so is AdamW's
1 - 0.999^t, off by up to 3e-5 of itself at t = 1, which enters by its root: 1.5e-5 of a step of
0.01. A schedule that is off by one step, a decay that is left out or a batch in another order
changes values by 1e-3 and more.
"""
WITHIN_ADAMW = Within(1e-4, 1e-5)
"""The same where AdamW trains many values: some gradients are near its 1e-8, and steps there
follow the least change of them."""

NEAR = 0.1
"""How far an update in float32 may be from that of a client alone, of its own length.

Rounding moves the digits network's by 1e-6 of its length where it turns no ReLU, and by 3e-3 where
it turns one. Another client's update is further off than its own length, one of another order of
the batches by 0.8 and more.
"""

PLAN = RoundPlan(
    round=1,
    stage=1,
    cohort=(0, 1, 2),
    epochs=2,
    schedule_start=0,
    schedule_epochs=2,
    run_start=4,
    run_epochs=10,
)
STAGE_TWO = replace(PLAN, stage=2, epochs=1, schedule_start=3, schedule_epochs=5, run_start=9)
OPTIONS = TrainingOptions(batch_size=8, learning_rate=0.05)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def rounded_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy in float32; the gradient keeps the outputs' float64."""
    return cross_entropy(outputs, targets).float()


def images(
    sizes: Sequence[int], *shape: int, classes: int = 4, dtype: torch.dtype = torch.float64
) -> list[ClientData]:
    """Return clients with so many examples each."""
    generator = torch.Generator().manual_seed(1)
    none = Examples(torch.empty(0, *shape), torch.empty(0))
    return [
        ClientData(
            Examples(
                torch.randn(size, *shape, generator=generator, dtype=dtype),
                torch.randint(0, classes, (size,), generator=generator),
            ),
            none,
        )
        for size in sizes
    ]


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 4))


def normalized() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 4)
    )


def one_by_one(
    model: nn.Module,
    starts: Sequence[ModelState],
    data: Sequence[ClientData],
    plan: RoundPlan = PLAN,
    options: TrainingOptions = OPTIONS,
    loss: Loss = rounded_loss,
) -> tuple[list[ModelState], list[LocalResult]]:
    model = copy.deepcopy(model)
    states, results = [], []
    for number, (start, own) in enumerate(zip(starts, data, strict=True)):
        load_state(model, start)
        results.append(train_locally(model, own, plan, 10 + number, options=options, loss=loss))
        states.append(get_state(model))
    return states, results


def stacked(
    model: nn.Module,
    starts: Sequence[ModelState],
    data: Sequence[ClientData],
    plan: RoundPlan = PLAN,
    options: TrainingOptions = OPTIONS,
    loss: Loss = rounded_loss,
) -> tuple[Sequence[ModelState], list[LocalResult]]:
    clients = begin(starts, data, range(10, 10 + len(data)))
    return train_stacked(model, clients, plan, options=options, loss=loss)


def begin(
    starts: Sequence[ModelState], data: Sequence[ClientData], seeds: Sequence[int]
) -> list[ClientStart]:
    return [ClientStart(*client) for client in zip(starts, data, seeds, strict=True)]


def check_close(
    value: torch.Tensor, wanted: torch.Tensor, within: Within = WITHIN, place: str = ""
) -> None:
    torch.testing.assert_close(
        value,
        wanted,
        rtol=within.rtol if value.is_floating_point() else 0,
        atol=within.atol if value.is_floating_point() else 0,
        msg=lambda text: f"{place}: {text}",
    )


def distance(one: ModelState, other: ModelState, names: Iterable[str]) -> float:
    """Return the Euclidean distance between two states in these tensors."""
    squares = ((one[n].double() - other[n].double()).square().sum() for n in names)
    return math.sqrt(sum(float(square) for square in squares))


def check_same(
    model: nn.Module,
    data: Sequence[ClientData],
    plan: RoundPlan = PLAN,
    options: TrainingOptions = OPTIONS,
    *,
    starts: Sequence[ModelState] | None = None,
    loss: Loss = rounded_loss,
    within: Within = WITHIN,
) -> Sequence[ModelState]:
    """Check that clients trained together are as if trained alone; return their states."""
    starts = starts or [get_state(model)] * len(data)
    wanted = one_by_one(model, starts, data, plan, options, loss)
    states, results = stacked(model, starts, data, plan, options, loss)
    for client, (state, alone) in enumerate(zip(states, wanted[0], strict=True)):
        assert list(state) == list(starts[client])
        for name, value in alone.items():
            assert state[name].dtype == value.dtype, name
            check_close(state[name], value, within, f"client {client}, {name}")
    for result, alone_result in zip(results, wanted[1], strict=True):
        assert result.num_examples == alone_result.num_examples
        assert result.loss == pytest.approx(alone_result.loss, rel=within.rtol, abs=1e-6)
    return states


# Options


@pytest.mark.parametrize(
    "change",
    [
        {"momentum": 0.0},
        {"momentum": 0.9},
        {"weight_decay": 0.1},
        {"weight_decay": "1/n"},
        {"weight_decay": 0.1, "momentum": 0.0},
        {"max_gradient_norm": 0.05},
        {"max_gradient_norm": 1e3},
        {"max_gradient_norm": 0.05, "weight_decay": 0.1, "momentum": 0.0},
        {"optimizer": "adamw", "learning_rate": 0.01},
        {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1},
        {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": "1/n"},
        {"optimizer": "adamw", "learning_rate": 0.01, "max_gradient_norm": 0.05},
    ],
    ids=lambda change: ",".join(f"{k}={v}" for k, v in change.items()),
)
def test_every_optimizer_is_that_of_torch(change: dict[str, Any]) -> None:
    options = replace(OPTIONS, **change)
    check_same(linear().double(), images([20, 16, 11, 3], 3, 4), options=options)


@pytest.mark.parametrize("plan", [PLAN, STAGE_TWO])
@pytest.mark.parametrize("schedule", ["cosine", "cosine-run"])
@pytest.mark.parametrize("step", ["epoch", "batch"])
def test_every_client_has_its_own_place_in_the_schedule(
    plan: RoundPlan, schedule: Any, step: Any
) -> None:
    """Clients with two, three and four batches an epoch, with and after a warm-up."""
    options = replace(OPTIONS, schedule=schedule, schedule_step=step, warmup_epochs=0.6)
    check_same(linear().double(), images([17, 9, 30], 3, 4), plan, options)


def test_the_schedule_shows_in_what_is_compared() -> None:
    """Each of the options above moves values by far more than what is allowed."""
    model, data = linear().double(), images([17, 9, 30], 3, 4)
    starts = [get_state(model)] * 3
    (base, *_), _ = stacked(model, starts, data)
    for change in (
        {"schedule": "constant"},
        {"schedule_step": "batch"},
        {"warmup_epochs": 1.5},
        {"weight_decay": "1/n"},
        {"max_gradient_norm": 0.05},
        {"momentum": 0.0},
    ):
        (other, *_), _ = stacked(model, starts, data, options=replace(OPTIONS, **change))
        assert max(float((base[n] - other[n]).abs().max()) for n in base) > 1e-3, change
    (other, *_), _ = stacked(model, starts, data, plan=STAGE_TWO)
    assert max(float((base[n] - other[n]).abs().max()) for n in base) > 1e-3


def test_adamw_without_a_gradient_only_decays() -> None:
    """A convolution's bias before batch normalization: its gradient is 0 but for rounding.

    In float32 that is about 1e-9, beside which AdamW's 1e-8 is little, so that its steps go
    anywhere, alone and in a stack. In float64 it is about 1e-18, and they vanish.
    """
    options = replace(OPTIONS, optimizer="adamw", learning_rate=0.01, weight_decay=0.5)
    model = normalized().double()
    start = get_state(model)
    for state in check_same(model, images([16, 12], 1, 3, 4), options=options):
        shrunk = start["0.bias"] * (1 - 0.01 * 0.5) ** 2 * (1 - 0.005 * 0.5) ** 2
        torch.testing.assert_close(state["0.bias"], shrunk, rtol=0, atol=1e-6)
    single = normalized()
    data = images([16, 12], 1, 3, 4, dtype=torch.float32)
    starts = [get_state(single)] * 2
    for a, b in zip(
        one_by_one(single, starts, data, options=options)[0],
        stacked(single, starts, data, options=options)[0],
        strict=True,
    ):
        weights = ("0.weight", "1.weight", "1.bias", "4.weight", "4.bias")
        assert distance(a, b, weights) < NEAR * distance(a, starts[0], weights)
        assert float((a["0.bias"] - b["0.bias"]).abs().max()) <= 2 * 2 * (0.01 + 0.005)


def test_autocast_is_the_same_within_what_bfloat16_resolves() -> None:
    options = replace(OPTIONS, autocast=True)
    data = images([16, 12], 3, 4, dtype=torch.float32)
    check_same(linear(), data, options=options, within=Within(0.02, 0.01))


# Clients of all sizes


@pytest.mark.parametrize(
    "sizes",
    [
        [16, 16, 16],
        [24, 16, 8],
        [20, 12, 4],
        [19, 17, 3, 8, 25, 1],
        [3, 3],
        [7, 5, 5, 2],
        [9, 17, 25],
        [1, 1],
        [13],
    ],
    ids=str,
)
@pytest.mark.parametrize("build", [linear, normalized])
def test_clients_of_any_sizes(sizes: list[int], build: Any) -> None:
    """Among them: equal, below a batch, last batches of equal length and of one example."""
    model = build().double()
    options = replace(OPTIONS, schedule_step="batch", weight_decay="1/n")
    shape = (3, 4) if build is linear else (1, 3, 4)
    if build is normalized:
        sizes = [max(size, 2) for size in sizes]
    check_same(model, images(sizes, *shape), options=options)


def test_a_last_batch_of_one_is_left_out_only_with_batch_norm() -> None:
    data = images([9, 17, 12], 1, 3, 4)
    plan = replace(PLAN, epochs=3, schedule_epochs=3)
    states = check_same(normalized().double(), data, plan)
    counts = [int(state["1.num_batches_tracked"]) for state in states]
    assert counts == [3, 6, 6]  # one, two and two batches an epoch


@pytest.mark.parametrize("statistics", ["running", "batch"])
@pytest.mark.parametrize("sizes", [[1], [16, 1, 9]])
def test_a_single_example_is_refused_with_batch_norm(statistics: str, sizes: list[int]) -> None:
    model = normalized().double()
    if statistics == "batch":
        use_batch_statistics(model)
    data = images(sizes, 1, 3, 4)
    starts = [get_state(model)] * len(sizes)
    with pytest.raises(UsageError, match="a single training example, which batch normalization"):
        stacked(model, starts, data)
    with pytest.raises(UsageError, match="a single training example, which batch normalization"):
        one_by_one(model, starts, data)


def test_batches_of_one_example() -> None:
    options = replace(OPTIONS, batch_size=1)
    check_same(linear().double(), images([3, 1, 2], 3, 4), options=options)
    model = normalized().double()
    with pytest.raises(UsageError, match="a single training example"):
        stacked(model, [get_state(model)], images([4], 1, 3, 4), options=options)


def test_running_statistics_belong_to_each_client() -> None:
    data = images([16, 16, 40], 1, 3, 4)
    data[1] = replace(
        data[1], train=Examples(gather(data[1].train).inputs * 9, gather(data[1].train).targets)
    )
    states = check_same(normalized().double(), data)
    assert [int(s["1.num_batches_tracked"]) for s in states] == [4, 4, 10]
    assert states[0]["1.num_batches_tracked"].dtype == torch.int64
    variances = [float(s["1.running_var"].mean()) for s in states]
    assert variances[1] > 5 * variances[0]


def test_statistics_of_the_batch_alone() -> None:
    model = normalized().double()
    use_batch_statistics(model)
    states = check_same(model, images([16, 9, 12], 1, 3, 4))
    assert not any("running" in name for name in states[0])


def test_losses_are_those_of_the_last_epoch_weighted_by_examples() -> None:
    data = images([9, 8], 3, 4)
    model = linear().double()
    starts = [get_state(model)] * 2
    options = replace(OPTIONS, learning_rate=1e-12)
    _, results = stacked(model, starts, data, options=options)
    with torch.no_grad():
        whole = [
            float(cross_entropy(model(gather(d.train).inputs), gather(d.train).targets))
            for d in data
        ]
    assert [r.loss for r in results] == [pytest.approx(loss, rel=1e-6) for loss in whole]
    assert [r.num_examples for r in results] == [9, 8]
    assert all(isinstance(r.loss, float) for r in results)


# Models


def classify(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return binary_cross_entropy(outputs, targets).float()


def texts(sizes: Sequence[int]) -> list[ClientData]:
    generator = torch.Generator().manual_seed(2)
    none = Examples(torch.empty(0, 5), torch.empty(0))
    return [
        ClientData(
            Examples(
                torch.randint(0, 20, (size, 5), generator=generator),  # 0 is padding
                torch.randint(0, 2, (size,), generator=generator),
            ),
            none,
        )
        for size in sizes
    ]


def transformer(dropout: float, **options: Any) -> nn.Module:
    model = TransformerClassifier(
        20, d_model=8, nhead=2, dim_feedforward=12, dropout=dropout, **options
    )
    return model.double()


def test_the_digits_cnn_in_its_own_float32() -> None:
    """Three steps, two and one; each update is its client's own, far from those of others."""
    data = images([24, 17, 8], 1, 8, 8, classes=10, dtype=torch.float32)
    plan = replace(PLAN, epochs=1)
    model = DigitsCNN()
    start = get_state(model)
    alone, wanted = one_by_one(model, [start] * 3, data, plan, loss=cross_entropy)
    states, results = stacked(model, [start] * 3, data, plan, loss=cross_entropy)
    trained = [name for name, _ in model.named_parameters()]
    averaged = [name for name in start if "running" in name]
    counted = [name for name in start if "tracked" in name]
    assert len(trained) + len(averaged) + len(counted) == len(start)
    for number, (state, one) in enumerate(zip(states, alone, strict=True)):
        for name, value in one.items():
            assert (state[name].dtype, state[name].shape) == (value.dtype, value.shape), name
        assert all(torch.equal(state[name], one[name]) for name in counted)
        for names in (trained, averaged):
            near = NEAR * distance(one, start, names)
            assert distance(state, one, names) < near
            others = [other for n, other in enumerate(alone) if n != number]
            assert min(distance(other, one, names) for other in others) > 2 * near
        assert results[number].num_examples == wanted[number].num_examples
        assert results[number].loss == pytest.approx(wanted[number].loss, rel=NEAR)
    (elsewhere, again), _ = one_by_one(model, [start] * 2, data[:1] * 2, plan, loss=cross_entropy)
    assert distance(again, elsewhere, trained) > 2 * NEAR * distance(elsewhere, start, trained)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_digits_cnn(optimizer: Any) -> None:
    options = replace(OPTIONS, optimizer=optimizer, learning_rate=0.01)
    data = images([17, 8], 1, 8, 8, classes=10)
    within = WITHIN_ADAMW if optimizer == "adamw" else WITHIN
    check_same(DigitsCNN().double(), data, replace(PLAN, epochs=1), options, within=within)


@pytest.mark.parametrize("bottleneck", [True, False])
def test_densenet(bottleneck: bool) -> None:
    options = replace(OPTIONS, batch_size=4, weight_decay="1/n")
    model = DenseNet40(4, growth=1, bottleneck=bottleneck).double()
    check_same(model, images([9, 6], 3, 8, 8), replace(PLAN, epochs=1), options)


def test_resnet() -> None:
    options = replace(OPTIONS, batch_size=4, momentum=0.0, learning_rate=0.01)
    model = ResNet18(4).double()
    check_same(model, images([4, 6], 3, 16, 16), replace(PLAN, epochs=1), options)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # see the next test
@pytest.mark.parametrize("frozen", [False, True])
def test_the_transformer_without_dropout(frozen: bool) -> None:
    model = transformer(0.0, frozen_embedding=frozen)
    for optimizer in ("sgd", "adamw"):
        options = replace(OPTIONS, optimizer=optimizer, learning_rate=0.01)
        within = WITHIN_ADAMW if optimizer == "adamw" else WITHIN
        check_same(model, texts([17, 9, 4]), options=options, loss=classify, within=within)


def test_attention_is_computed_for_all_clients_at_once() -> None:
    model = transformer(0.0)
    stacked(model, [get_state(model)] * 2, texts([8, 8]), loss=classify)


def test_dropout_draws_for_each_client_and_follows_from_the_seeds() -> None:
    model, (data,) = transformer(0.5), texts([16])
    starts = [get_state(model)] * 2
    torch.manual_seed(3)
    before = torch.random.get_rng_state()

    def trained(*seeds: int) -> Sequence[ModelState]:
        clients = begin(starts, [data, data], seeds)
        states, _ = train_stacked(model, clients, PLAN, options=OPTIONS, loss=classify)
        return states

    first = trained(7, 7)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(5)
    assert all(same(a, b) for a, b in zip(first, trained(7, 7), strict=True))
    assert not same(first[0], first[1])  # the same batches in the same order, other draws
    assert not same(first[0], trained(8, 7)[0])


def same(a: ModelState, b: ModelState) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_frozen_parameters_stay_and_are_not_copied() -> None:
    model = make_model(frozen=True).double()
    model[5] = nn.Identity()  # type: ignore[operator]  # in place of the dropout
    start = get_state(model)
    states = check_same(model, images([16, 9], 1, 6, 6), starts=[start] * 2)
    for state in states:
        assert torch.equal(state["4.weight"], start["4.weight"])
        assert not torch.equal(state["4.bias"], start["4.bias"])
    assert states[0]["4.weight"].data_ptr() == states[1]["4.weight"].data_ptr()


class Tied(nn.Module):
    """One matrix that is used twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 12)
        self.outer = nn.Linear(12, 12, bias=False)
        self.outer.weight = self.inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.outer(self.inner(x.flatten(1)).tanh())
        return out


def test_tied_parameters_are_trained_once() -> None:
    for change in ({}, {"max_gradient_norm": 0.05, "weight_decay": 0.1}, {"optimizer": "adamw"}):
        options = replace(OPTIONS, learning_rate=0.01, **change)
        states = check_same(Tied().double(), images([16, 9], 3, 4), options=options)
        assert list(states[0]) == ["inner.weight", "inner.bias"]


class Counting(nn.Module):
    """Buffers that are no batch normalization's: integers, a switch, changed in place."""

    calls: torch.Tensor
    largest: torch.Tensor
    was_called: torch.Tensor
    untouched: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int32))
        self.register_buffer("largest", torch.zeros(12, dtype=torch.int64))
        self.register_buffer("was_called", torch.zeros(1, dtype=torch.bool))
        self.register_buffer("untouched", torch.arange(3, dtype=torch.uint8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        self.calls.add_(1)
        self.was_called.logical_or_(self.calls > 0)
        self.largest.copy_(torch.maximum(self.largest, (x.detach().amax(0) * 100).long()))
        out: torch.Tensor = self.layer(x) * (1 + self.largest.max() / 1000)
        return out


def test_integer_buffers_are_kept_for_each_client() -> None:
    states = check_same(Counting().double(), images([16, 9, 3], 3, 4))
    assert [int(s["calls"]) for s in states] == [4, 4, 2]
    assert len({tuple(s["largest"].tolist()) for s in states}) == 3


class Assigning(nn.Module):
    """A running mean that is assigned anew, not changed in place, as many write it."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 4)
        self.register_buffer("mean", torch.zeros(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        out: torch.Tensor = self.layer(x - self.mean)
        return out


def test_buffers_that_are_assigned_are_kept_too() -> None:
    check_same(Assigning().double(), images([16, 9], 3, 4))


class Scaled(nn.Module):
    """A parameter whose gradient is one number spread out, without memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 4)
        self.scales = nn.Parameter(torch.full((5,), 0.2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x.flatten(1)) * self.scales.sum()
        return out


class Summed(nn.Module):
    """Two parameters that are added, so that their gradients are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.randn(12, 4) / 4)
        self.change = nn.Parameter(torch.randn(12, 4) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ (self.base + self.change)


@pytest.mark.parametrize("build", [Scaled, Summed])
@pytest.mark.parametrize("change", [{"weight_decay": 0.1}, {"max_gradient_norm": 0.05}])
def test_gradients_that_share_memory(build: Any, change: dict[str, Any]) -> None:
    check_same(build().double(), images([16, 9], 3, 4), options=replace(OPTIONS, **change))


class Unused(nn.Module):
    """A parameter that the outputs do not depend on, as an auxiliary head's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 4)
        self.head = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x.flatten(1))
        return out


@pytest.mark.parametrize("change", [{}, {"max_gradient_norm": 0.05}])
def test_a_parameter_that_is_not_used_stays(change: dict[str, Any]) -> None:
    model = Unused().double()
    start = get_state(model)
    states = check_same(model, images([16, 9], 3, 4), options=replace(OPTIONS, **change))
    assert all(torch.equal(s["head.weight"], start["head.weight"]) for s in states)


@pytest.mark.parametrize("change", [{"weight_decay": 0.1}, {"optimizer": "adamw"}])
def test_a_parameter_that_is_not_used_does_not_decay(change: dict[str, Any]) -> None:
    options = replace(OPTIONS, **{"weight_decay": 0.1, **change})
    check_same(Unused().double(), images([16, 9], 3, 4), options=options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_loss_of_another_element_type(dtype: torch.dtype) -> None:
    data = images([16, 9], 3, 4, dtype=dtype)
    within = WITHIN if dtype is torch.float64 else Within(0.1, 0.1)
    check_same(linear().to(dtype), data, loss=cross_entropy, within=within)


def test_a_model_that_cannot_be_stacked_is_refused() -> None:
    """Batch normalization with a cumulative mean reads its count as a Python number."""
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12, momentum=None), nn.Linear(12, 4))
    with pytest.raises(UsageError, match="stack"):
        stacked(model.double(), [get_state(model)] * 2, images([8, 8], 3, 4))


def test_examples_of_unequal_shapes_are_refused() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool1d(12), nn.Flatten(), nn.Linear(36, 4)).double()
    data = [*images([8], 3, 14), *images([8], 3, 15)]
    with pytest.raises(UsageError, match="stack"):
        stacked(model, [get_state(model)] * 2, data)


def full(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory")


def test_a_gpu_without_memory_for_a_stack_is_not_taken_for_a_model_that_cannot_be_stacked() -> (
    None
):
    model = linear().double()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        stacked(model, [get_state(model)] * 2, images([8, 8], 3, 4), loss=full)


# What goes in


def test_starts_may_differ_from_client_to_client() -> None:
    model = normalized().double()
    starts = []
    for seed in range(3):
        torch.manual_seed(seed)
        starts.append(get_state(normalized().double()))
        starts[-1]["1.running_mean"] += seed
        starts[-1]["1.num_batches_tracked"] += 10 * seed
    states = check_same(model, images([16, 9, 3], 1, 3, 4), starts=starts)
    assert [int(s["1.num_batches_tracked"]) for s in states] == [4, 12, 22]


def test_a_stack_of_one_and_any_company_give_the_same() -> None:
    model, data = normalized().double(), images([19, 17, 8, 2], 1, 3, 4)
    starts = [get_state(model)] * 4
    clients = begin(starts, data, range(10, 14))
    together, results = stacked(model, starts, data)
    for number in range(4):
        alone, (result,) = train_stacked(
            model, clients[number : number + 1], PLAN, options=OPTIONS, loss=rounded_loss
        )
        for name, value in alone[0].items():
            check_close(together[number][name], value)
        assert result.loss == pytest.approx(results[number].loss, rel=1e-5)


def test_the_order_of_a_stack_does_not_matter() -> None:
    model, data = normalized().double(), images([19, 17, 8], 1, 3, 4)
    starts = [get_state(model)] * 3
    one, _ = stacked(model, starts, data)
    two, _ = train_stacked(
        model, begin(starts, data, (10, 11, 12))[::-1], PLAN, options=OPTIONS, loss=rounded_loss
    )
    for a, b in zip(one, two[::-1], strict=True):
        for name in a:
            check_close(a[name], b[name])


@pytest.mark.parametrize("sizes", [[19], [19, 8]])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("differ", [False, True])
def test_nothing_of_model_starts_and_data_is_changed(
    differ: bool, optimizer: Any, sizes: list[int]
) -> None:
    model, data = normalized().double(), images(sizes, 1, 3, 4)
    starts = [get_state(model) for _ in sizes] if differ else [get_state(model)] * len(sizes)
    before = copy.deepcopy((get_state(model), starts, data))
    objects = [id(tensor) for tensor in model.state_dict(keep_vars=True).values()]
    states, _ = stacked(model, starts, data, options=replace(OPTIONS, optimizer=optimizer))
    assert same(get_state(model), before[0])
    assert [id(tensor) for tensor in model.state_dict(keep_vars=True).values()] == objects
    assert all(p.grad is None for p in model.parameters())
    for now, then in zip(starts, before[1], strict=True):
        assert same(now, then)
    for own, was in zip(data, before[2], strict=True):
        assert torch.equal(gather(own.train).inputs, gather(was.train).inputs)
        assert torch.equal(gather(own.train).targets, gather(was.train).targets)
    again, _ = stacked(model, starts, data, options=replace(OPTIONS, optimizer=optimizer))
    assert all(same(a, b) for a, b in zip(states, again, strict=True))
    assert not any(value.requires_grad for state in states for value in state.values())


# The plan of an epoch


@law(300)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    batch_size=st.integers(1, 12),
    leave_single_out=st.booleans(),
)
def test_steps_hold_every_batch_once_and_in_order(
    sizes: list[int], batch_size: int, leave_single_out: bool
) -> None:
    epochs = [list(torch.split(torch.arange(size), batch_size)) for size in sizes]
    if leave_single_out:
        epochs = [[b for b in batches if len(b) > 1] for batches in epochs]
        epochs = [batches for batches in epochs if batches]
        if not epochs:
            return
    seen: defaultdict[int, list[int]] = defaultdict(list)
    steps = list(_steps(epochs))
    for step in steps:
        assert len(step.clients) == len(step.batches)
        assert step.clients == sorted(set(step.clients))
        assert len({len(batch) for batch in step.batches}) == 1
        for client, batch in zip(step.clients, step.batches, strict=True):
            assert batch is epochs[client][step.number]
            assert len(seen[client]) == step.number
            seen[client].append(step.number)
    assert seen == {client: list(range(len(batches))) for client, batches in enumerate(epochs)}
    lasts = {(len(batches), len(batches[-1])) for batches in epochs}
    assert len(steps) <= max(map(len, epochs)) + len(lasts)


# Through the engine


def digits(method: str, stack: int, **changes: str) -> RunConfig:
    """Return a short run on the digits with a cohort that is no multiple of 3."""
    overrides = {
        "simulation.stack": str(stack),
        "training.learning_rate": "0.05",
        "methods.fedobd.stage_one_rounds": "2",
        "methods.fedobd.stage_one_epochs": "1",
        "methods.fedobd.stage_two_epochs": "1",
        "methods.smafd.rounds": "3",
        "methods.smafd.epochs": "1",
        **changes,
    }
    source = load_config("digits", overrides=[f"{k}={v}" for k, v in overrides.items()])
    return source.for_method(method, 0)


Kept = dict[str, bytes]


def play(
    experiment: Experiment, pool: Any, num_clients: int, seed: int
) -> tuple[list[RoundResult], Kept, ModelState]:
    server = ServerSession(
        experiment.method, experiment.schema, experiment.initial,
        num_clients=num_clients, seed=seed,
    )  # fmt: skip
    keeper = PayloadKeeper()
    with pool:
        rounds = list(simulate(server, pool, evaluate=experiment.evaluate, callback=keeper))
    return rounds, keeper.kept, server.state


def pixels() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 4))


def test_a_configured_augmentation_is_made_in_a_stack_too() -> None:
    model = {"name": f"{__name__}:pixels"}
    image = {"flip": True, "crop_padding": 2}
    trained = []
    for data in ({}, {"image": image}):
        experiment = build_experiment(config("fedavg", model=model, data=data))
        setup, start = experiment.setup, experiment.initial
        assert setup.train_together is not None
        clients = [setup.data(number) for number in range(3)]
        clients[0] = replace(clients[0], train=select(clients[0].train, torch.arange(5)))
        model_of_one = setup.make_model()
        starts = [
            ClientStart(start, data_of_one, seed)
            for data_of_one, seed in zip(clients, (5, 6, 7), strict=True)
        ]
        states, _ = setup.train_together(model_of_one, starts, PLAN)
        for state, one in zip(states, starts, strict=True):
            load_state(model_of_one, start)
            setup.train(model_of_one, one.data, PLAN, one.seed)
            wanted = get_state(model_of_one)["1.weight"]
            check_close(state["1.weight"], wanted, Within(1e-4, 1e-5))
        trained.append(states[1]["1.weight"])
    assert float((trained[0] - trained[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("method", ["fedobd", "smafd"])
def test_a_stack_makes_the_uploads_of_the_same_clients(method: str) -> None:
    """Rounding alone moves a quantized level, and then the rounds after it.

    So losses are compared in the first round, which all begin with the same values.
    """
    reports: list[dict[str, Report]] = []
    for stack in (1, 3):
        experiment = build_experiment(digits(method, stack))
        pool = open_pool(experiment.setup)
        rounds, kept, _ = play(experiment, pool, 10, 0)
        assert len(rounds) == 3
        assert len(rounds[0].record.cohort) == 5
        assert not any(played.record.refusals for played in rounds)
        uploads = {name: data for name, data in kept.items() if "upload" in name}
        assert len(uploads) == sum(len(played.record.cohort) for played in rounds)
        reports.append({})
        for name, data in uploads.items():
            payload = Payload.parse(data, experiment.schema)
            assert len(list(payload.blocks())) == len(payload.header.block_ids)
            assert payload.header.report is not None
            reports[-1][name] = payload.header.report
        final = rounds[-1].test
        assert final is not None
        assert final.metric > 0.5  # of ten classes; about 0.9
    assert reports[0].keys() == reports[1].keys()
    for name, alone in reports[0].items():
        together = reports[1][name]
        assert together.num_examples == alone.num_examples
        if name.startswith("1 "):
            assert together.train_loss == pytest.approx(alone.train_loss, rel=0.01)


class FreshClients(SequentialPool):
    """Plays each client with a new `LocalClient`, given that client's task alone."""

    def __init__(self, setup: ClientSetup) -> None:
        super().__init__(setup)
        self._shared = setup

    def run(
        self, tasks: Iterable[ClientTask], aggregator: Aggregator | None = None
    ) -> Iterator[ClientResult]:
        for task in tasks:
            yield from LocalClient(self._shared).run([task])


@pytest.mark.parametrize("method", ["fedobd", "smafd"])
def test_a_stack_of_one_client_has_the_bytes_of_clients_played_one_at_a_time(method: str) -> None:
    experiment = build_experiment(config(method, simulation={"stack": 1}))
    one = play(experiment, SequentialPool(experiment.setup), 4, 1)
    two = play(experiment, FreshClients(experiment.setup), 4, 1)
    assert one[1] == two[1]
    assert same(one[2], two[2])
    again = build_experiment(config(method))
    assert play(again, SequentialPool(again.setup), 4, 1)[1] == one[1]


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


ROUNDS: dict[str, dict[str, int]] = {
    "fedobd": {
        "stage_one_rounds": 2, "stage_one_epochs": 2, "stage_two_epochs": 1, "cohort": 2
    },
    "smafd": {"rounds": 3, "epochs": 1, "cohort": 4},
}  # fmt: skip


@pytest.mark.parametrize("method", ["fedobd", "smafd"])
def test_a_stacked_run_has_the_same_bytes_with_workers_and_resumed(
    method: str, tmp_path: Path
) -> None:
    """The toy has dropout and clients of unequal sizes; cohorts of 2 to 4 are stacked by 3."""
    changes: dict[str, Any] = {
        "simulation": {"stack": 3},
        "methods": {method: ROUNDS[method]},
    }
    chosen = config(method, **changes)
    run(chosen, tmp_path / "a")
    run(chosen, tmp_path / "b", workers=2)
    with pytest.raises(Interrupted):
        run(chosen, tmp_path / "c", callbacks=[Stopper(2)])
    run(chosen, tmp_path / "c", resume=True)
    model = (tmp_path / "a" / "model.safetensors").read_bytes()
    for other in ("b", "c"):
        assert records(tmp_path / other) == records(tmp_path / "a")
        assert (tmp_path / other / "model.safetensors").read_bytes() == model
    run(config(method, **{**changes, "simulation": {"stack": 1}}), tmp_path / "d")
    assert (tmp_path / "d" / "model.safetensors").read_bytes() != model  # dropout draws others
    with pytest.raises(UsageError, match=r"simulation.stack was 3, is 2"):
        run(config(method, **{**changes, "simulation": {"stack": 2}}), tmp_path / "a", resume=True)


def test_a_training_function_of_ones_own_cannot_be_stacked(tmp_path: Path) -> None:
    chosen = config(training={"function": "tests.toy:train"}, simulation={"stack": 2})
    with pytest.raises(UsageError, match="cannot be stacked: their training function trains one"):
        run(chosen, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# The size of a stack


def measured(spent: dict[int, float], monkeypatch: pytest.MonkeyPatch, **changes: Any) -> int:
    """Return the stack that is found where a client takes so long with others; inf: no memory."""

    def seconds(setup: ClientSetup, tasks: list[ClientTask], stack: int) -> float:
        assert len(tasks) == stack
        if math.isinf(spent[stack]):
            raise torch.cuda.OutOfMemoryError
        return spent[stack]

    monkeypatch.setattr(_tune, "_seconds_per_client", seconds)
    experiment = build_experiment(digits("fedavg", 1, **changes))
    server = ServerSession(
        experiment.method, experiment.schema, experiment.initial, num_clients=10, seed=0
    )
    before = server.save().values
    found = measure_stack(experiment, server)
    assert server.save().values == before
    return found


@pytest.mark.parametrize(
    ("spent", "wanted"),
    [
        ({1: 1.0, 2: 0.97}, 1),
        ({1: 1.0, 2: 0.9, 4: 0.5, 8: 0.49}, 4),
        ({1: 1.0, 2: 0.9, 4: 0.5, 8: 0.4, 10: 0.3}, 10),
        ({1: 1.0, 2: 0.5, 4: math.inf}, 2),
    ],
)
def test_the_stack_is_as_large_as_it_pays_and_fits(
    spent: dict[int, float], wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measured(spent, monkeypatch) == wanted


def test_one_client_that_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(torch.cuda.OutOfMemoryError):
        measured({1: math.inf}, monkeypatch)


def test_own_training_is_not_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured({}, monkeypatch, **{"training.function": "tests.toy:train"}) == 1


def test_a_stack_that_was_measured_is_kept_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = digits("fedavg", 1, **{"simulation.stack": "auto", "methods.fedavg.rounds": "1"})
    monkeypatch.setattr(_tune, "_seconds_per_client", lambda setup, tasks, stack: 1 / stack)
    run(chosen, tmp_path / "run")
    assert "stack = 10" in (tmp_path / "run" / "config.toml").read_text()
    monkeypatch.setattr(_tune, "_seconds_per_client", None)
    assert run(chosen, tmp_path / "run", resume=True).rounds == 1


@pytest.mark.parametrize("stack", [0, -3, 1.5, "many"])
def test_wrong_stacks_are_refused(stack: Any) -> None:
    with pytest.raises(UsageError, match=r"simulation\.stack"):
        config(simulation={"stack": stack})
    if isinstance(stack, int):
        setup = build_experiment(config()).setup
        with pytest.raises(UsageError, match=rf"stack is {stack}; allowed are numbers from 1"):
            replace(setup, stack=stack)


def test_divergence_in_a_stack_names_its_clients_and_the_round() -> None:
    chosen = config(
        "fedavg", simulation={"stack": 3}, training={"learning_rate": 1e38, "momentum": 0.0}
    )
    experiment = build_experiment(chosen)
    with pytest.raises(UsageError, match=r"client 0, 1, 2, round 1: .*(NaN|nan)"):
        play(experiment, open_pool(experiment.setup), 4, 1)
