"""Local training: schedules, seeds, batches."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fedobd import RoundPlan, UsageError
from fedobd.data import (
    ClientData,
    Examples,
    Selection,
    federate,
    gather,
    load_digits,
    partition_iid,
    take_together,
)
from fedobd.training import (
    TrainingOptions,
    accuracy,
    binary_cross_entropy,
    evaluate,
    rate_factor,
    train_locally,
)
from tests.toy import make_data, make_model

PLAN = RoundPlan(
    round=1,
    stage=1,
    cohort=(0,),
    epochs=2,
    schedule_start=0,
    schedule_epochs=2,
    run_start=4,
    run_epochs=10,
)


def trained(
    seed: int = 0,
    options: TrainingOptions | None = None,
    plan: RoundPlan = PLAN,
    examples: int = 60,
) -> tuple[list[torch.Tensor], float]:
    torch.manual_seed(5)
    model = make_model()
    data = make_data(2, 0, num_examples=examples).clients[0]
    result = train_locally(
        model, data, plan, seed, options=options or TrainingOptions(batch_size=8)
    )
    return [p.detach().clone() for p in model.parameters()], result.loss


def test_the_same_seed_trains_the_same_and_leaves_the_global_state_alone() -> None:
    torch.manual_seed(9)
    before = torch.random.get_rng_state()
    first, loss = trained(seed=3)
    torch.manual_seed(123)
    torch.rand(7)
    second, _ = trained(seed=3)
    other, _ = trained(seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert math.isfinite(loss)
    torch.random.set_rng_state(before)
    data = make_data(2, 0).clients[0]
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Dropout(0.5))
    state = torch.random.get_rng_state()
    train_locally(model, data, PLAN, 0, options=TrainingOptions())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_sgd_equals_a_loop_written_out() -> None:
    data = make_data(2, 0).clients[0]
    options = TrainingOptions(
        learning_rate=0.1,
        momentum=0.5,
        weight_decay="1/n",
        batch_size=1000,
        max_gradient_norm=0.05,
    )
    torch.manual_seed(0)
    layer = nn.Linear(36, 4)
    model = nn.Sequential(nn.Flatten(), layer)
    weight = layer.weight.detach().clone().double()
    bias = layer.bias.detach().clone().double()
    plan = replace(PLAN, epochs=3, schedule_epochs=4)
    train_locally(model, data, plan, 0, options=options)
    inputs = gather(data.train).inputs.flatten(1).double()
    n = len(inputs)
    speed_w, speed_b = torch.zeros_like(weight), torch.zeros_like(bias)
    for epoch in range(3):
        rate = 0.1 * (1 + math.cos(math.pi * epoch / 4)) / 2
        probabilities = (inputs @ weight.T + bias).softmax(1)
        probabilities[torch.arange(n), gather(data.train).targets] -= 1
        grad_w, grad_b = probabilities.T @ inputs / n, probabilities.mean(0)
        norm = math.sqrt(float((grad_w**2).sum() + (grad_b**2).sum()))
        assert norm > 0.05  # so that the clipping is seen
        grad_w, grad_b = grad_w * 0.05 / norm + weight / n, grad_b * 0.05 / norm + bias / n
        speed_w, speed_b = 0.5 * speed_w + grad_w, 0.5 * speed_b + grad_b
        weight, bias = weight - rate * speed_w, bias - rate * speed_b
    torch.testing.assert_close(layer.weight.double(), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.bias.double(), bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "plan", "epoch", "step", "wanted"),
    [
        ("constant", PLAN, 1.0, 1.0, 1.0),
        ("cosine", PLAN, 0.0, 1.0, 1.0),
        ("cosine", PLAN, 1.0, 1.0, 0.5),
        ("cosine", PLAN, 1.5, 0.5, (1 + math.cos(0.75 * math.pi)) / 2),
        ("cosine-run", PLAN, 0.0, 1.0, (1 + math.cos(0.4 * math.pi)) / 2),
        ("cosine-run", PLAN, 1.0, 1.0, 0.5),
        # stage 2 of five epochs: the schedule goes on from epoch to epoch
        ("cosine", replace(PLAN, schedule_start=0, schedule_epochs=5), 0.0, 1.0, 1.0),
        ("cosine", replace(PLAN, schedule_start=4, schedule_epochs=5), 0.0, 1.0,
         (1 + math.cos(0.8 * math.pi)) / 2),
    ],
)  # fmt: skip
def test_schedules(
    schedule: Any, plan: RoundPlan, epoch: float, step: float, wanted: float
) -> None:
    options = TrainingOptions(schedule=schedule)
    assert rate_factor(options, plan, epoch, step) == pytest.approx(wanted, abs=1e-12)


def test_warm_up_rises_linearly_and_then_the_schedule_begins() -> None:
    options = TrainingOptions(schedule="cosine", warmup_epochs=2)
    plan = replace(PLAN, epochs=6, schedule_epochs=6)
    factors = [rate_factor(options, plan, float(e), 1.0) for e in range(6)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[4] == pytest.approx(0.5)
    by_batch = [rate_factor(options, plan, e / 4, 0.25) for e in range(8)]
    assert by_batch == [pytest.approx((i + 1) / 8) for i in range(8)]
    with pytest.raises(UsageError, match=r"warmup_epochs is 2; the schedule has only 2 epochs"):
        rate_factor(options, PLAN, 0.0, 1.0)


def mean_output(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient is the mean input, whatever the weights are."""
    return outputs.mean()


def test_a_schedule_by_batch_moves_after_each_batch() -> None:
    """Three batches of an epoch: the cosine is at 0, 1/3 and 2/3 of its way, 1, 0.75 and 0.25."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    examples = Examples(torch.ones(6, 1), torch.zeros(6))
    options = TrainingOptions(learning_rate=0.5, momentum=0.0, batch_size=2, schedule_step="batch")
    plan = replace(PLAN, epochs=1, schedule_epochs=1)
    train_locally(
        model, ClientData(examples, examples), plan, 0, options=options, loss=mean_output
    )
    assert float(model.weight.detach()) == pytest.approx(-0.5 * (1 + 0.75 + 0.25))


def test_the_loss_is_the_mean_over_the_examples_of_the_last_epoch() -> None:
    """Each example's loss is its input; a rate near 0 leaves the model as it is.

    Of 5 examples in batches of 2 the last has one, so that a mean over batches would be another.
    """
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    examples = Examples(torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]]), torch.zeros(5))
    options = TrainingOptions(learning_rate=1e-12, batch_size=2)
    result = train_locally(
        model, ClientData(examples, examples), PLAN, 3, options=options, loss=mean_output
    )
    assert result.loss == pytest.approx(31 / 5)
    assert result.num_examples == 5
    falling = TrainingOptions(learning_rate=0.01, momentum=0.0, batch_size=5, schedule="constant")
    result = train_locally(
        model, ClientData(examples, examples), PLAN, 3, options=falling, loss=mean_output
    )
    # the second epoch's loss is that of a weight of 1 - 0.01 · 31 / 5
    assert result.loss == pytest.approx(31 / 5 * (1 - 0.01 * 31 / 5), rel=1e-5)


def test_every_option_changes_what_is_trained() -> None:
    base, _ = trained()
    for options in (
        TrainingOptions(batch_size=8, optimizer="adamw", learning_rate=0.01),
        TrainingOptions(batch_size=8, momentum=0.0),
        TrainingOptions(batch_size=8, weight_decay=0.1),
        TrainingOptions(batch_size=8, weight_decay="1/n"),
        TrainingOptions(batch_size=8, schedule="constant"),
        TrainingOptions(batch_size=8, schedule_step="batch"),
        TrainingOptions(batch_size=8, max_gradient_norm=0.01),
        TrainingOptions(batch_size=4),
    ):
        other, _ = trained(options=options)
        assert not all(torch.equal(a, b) for a, b in zip(base, other, strict=True)), options


def test_a_last_batch_of_one_is_left_out_only_with_batch_norm() -> None:
    seen: list[int] = []

    class Watch(nn.Module):
        def __init__(self, norm: bool) -> None:
            super().__init__()
            self.layer = nn.Linear(36, 4)
            self.norm = nn.BatchNorm1d(4) if norm else nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            out: torch.Tensor = self.norm(self.layer(x.flatten(1)))
            return out

    examples = Examples(torch.randn(9, 1, 6, 6), torch.zeros(9, dtype=torch.int64))
    data = ClientData(examples, examples)
    plan = replace(PLAN, epochs=1)
    for norm, wanted in ((True, [4, 4]), (False, [4, 4, 1])):
        seen.clear()
        train_locally(Watch(norm), data, plan, 0, options=TrainingOptions(batch_size=4))
        assert seen == wanted
    seen.clear()
    train_locally(Watch(True), data, plan, 0, options=TrainingOptions(batch_size=7))
    assert seen == [7, 2]
    single = ClientData(examples.take(torch.tensor([0])), examples)
    with pytest.raises(UsageError, match="a single training example"):
        train_locally(Watch(True), single, plan, 0, options=TrainingOptions())


def test_evaluate_weights_batches_and_joins_a_last_single_example() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    examples = Examples(torch.randn(9, 1, 6, 6), torch.randint(0, 4, (9,)))
    sizes: list[int] = []
    model.register_forward_hook(lambda m, i, o: sizes.append(len(o)))
    figures = evaluate(model, examples, batch_size=4)
    assert sizes == [4, 5]
    with torch.no_grad():
        outputs = model(examples.inputs)
    assert figures.num_examples == 9
    assert figures.metric == pytest.approx(float(accuracy(outputs, examples.targets)))
    assert figures.loss == pytest.approx(
        float(nn.functional.cross_entropy(outputs, examples.targets)), rel=1e-5
    )
    with pytest.raises(UsageError, match="no examples to evaluate on"):
        evaluate(model, examples.take(torch.tensor([], dtype=torch.int64)))


def test_evaluation_drops_nothing_and_moves_no_statistics() -> None:
    """With the running statistics of a new model, 0 and 1, normalization changes nothing."""
    norm = nn.BatchNorm1d(2)
    model = nn.Sequential(norm, nn.Dropout(0.9))
    inputs = torch.tensor([[4.0, 1.0], [3.0, 9.0], [7.0, 2.0], [1.0, 5.0]])
    examples = Examples(inputs, torch.tensor([0, 1, 0, 0]))
    model.train()
    assert evaluate(model, examples).metric == 3 / 4
    assert norm.running_mean is not None
    assert norm.running_mean.tolist() == [0.0, 0.0]


def test_one_logit_is_a_binary_answer() -> None:
    outputs = torch.tensor([[2.0], [-1.0], [0.5]])
    targets = torch.tensor([1, 0, 0])
    assert float(accuracy(outputs, targets)) == pytest.approx(2 / 3)
    assert float(accuracy(torch.zeros(2), torch.tensor([1, 0]))) == 0.5
    assert float(accuracy(torch.zeros(2, 1), torch.tensor([0, 0]))) == 1  # 0 is not above 0
    wanted = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)) + math.log1p(math.exp(0.5))) / 3
    assert float(binary_cross_entropy(outputs, targets)) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, r"learning_rate is 0.0; allowed are numbers above 0"),
        ({"momentum": 1.0}, r"momentum is 1.0; allowed are 0 <= momentum < 1"),
        ({"batch_size": 0}, r"batch_size is 0; allowed are whole numbers from 1"),
        ({"weight_decay": "n"}, r"weight_decay is 'n'; allowed are numbers from 0, or '1/n'"),
        ({"weight_decay": -1.0}, r"weight_decay is -1.0"),
        ({"max_gradient_norm": 0.0}, r"max_gradient_norm is 0.0"),
        ({"warmup_epochs": -1.0}, r"warmup_epochs is -1.0"),
        ({"optimizer": "adam"}, r"optimizer is 'adam'; allowed are 'sgd', 'adamw'"),
        ({"schedule": "step"}, r"schedule is 'step'"),
        ({"schedule_step": "round"}, r"schedule_step is 'round'"),
    ],
)
def test_wrong_options_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainingOptions(**change)


def test_digits_are_the_real_ones() -> None:
    digits = load_digits()
    assert digits.inputs.shape == (1797, 1, 8, 8)
    assert digits.targets.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    first = (digits.inputs[0, 0, 0] + 1) * 8
    assert first.tolist() == [0, 0, 5, 13, 9, 1, 0, 0]


def test_federate_shares_everything_out_once() -> None:
    examples = Examples(torch.arange(101).float(), torch.arange(101))
    data = federate(examples, 7, test_fraction=0.2, validation_fraction=0.25, seed=3)
    shares = [
        torch.cat([gather(c.train).targets, gather(c.validation).targets]) for c in data.clients
    ]
    everything = torch.cat([*shares, gather(data.test).targets])
    assert sorted(everything.tolist()) == list(range(101))
    assert {len(share) for share in shares} == {11, 12}
    assert len(data.test) == 20
    assert all(len(c.validation) == len(s) // 4 for c, s in zip(data.clients, shares, strict=True))
    again = federate(examples, 7, test_fraction=0.2, validation_fraction=0.25, seed=3)
    other = federate(examples, 7, test_fraction=0.2, validation_fraction=0.25, seed=4)
    assert torch.equal(gather(again.test).targets, gather(data.test).targets)
    assert not torch.equal(gather(other.test).targets, gather(data.test).targets)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_taken_images_lie_in_memory_as_all_of_them_do(layout: torch.memory_format) -> None:
    inputs = torch.randn(7, 3, 4, 5).contiguous(memory_format=layout)
    taken = Examples(inputs, torch.arange(7)).take(torch.tensor([5, 0, 5])).inputs
    assert torch.equal(taken, inputs[[5, 0, 5]])
    assert taken.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("prepare", [None, lambda inputs: inputs.double() * 2])
def test_examples_taken_together_are_those_taken_one_set_after_another(prepare: Any) -> None:
    whole = Examples(torch.randn(9, 3, 4), torch.arange(9))
    sets = [Selection(whole, torch.tensor(own), prepare) for own in ([0, 4, 8], [5, 1], [2, 3])]
    numbers = [torch.tensor(own) for own in ([2, 0], [0, 1], [1, 1])]
    together = take_together(sets, numbers)
    one_by_one = [own.take(which) for own, which in zip(sets, numbers, strict=True)]
    assert torch.equal(together.inputs, torch.stack([part.inputs for part in one_by_one]))
    assert together.targets.tolist() == [[8, 0], [5, 1], [3, 3]]
    apart = take_together([*map(gather, sets)], numbers)
    assert torch.equal(apart.inputs, together.inputs)
    assert torch.equal(apart.targets, together.targets)


def test_wrong_shares_are_refused() -> None:
    with pytest.raises(UsageError, match="3 examples cannot be shared among 4 clients"):
        partition_iid(3, 4)
    examples = Examples(torch.zeros(10), torch.zeros(10))
    with pytest.raises(UsageError, match=r"test_fraction is 1.0"):
        federate(examples, 2, test_fraction=1.0)
    with pytest.raises(UsageError, match=r"validation_fraction is -0.1"):
        federate(examples, 2, validation_fraction=-0.1)
    with pytest.raises(UsageError, match="different numbers of examples"):
        Examples(torch.zeros(3), torch.zeros(4))
