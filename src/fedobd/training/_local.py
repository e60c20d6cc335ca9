"""Local training: what a client does with the model between broadcast and upload.

Optimizer state lives for one call, so a client carries nothing from round to round but its place
in the learning-rate schedule, which is part of the round's plan. All randomness (order of batches,
dropout) follows from the seed that is given; the global random state is as before afterwards.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from fedobd._errors import UsageError
from fedobd.data import ClientData, ExampleSet
from fedobd.sessions import RoundPlan
from fedobd.training._acceleration import channels_last_gradients, pooling_first

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Mean loss of a batch, 0-dim, from the model's outputs and the targets."""

Metric = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Mean metric of a batch, 0-dim, larger is better, from the model's outputs and the targets."""


Augment = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
"""Changes a batch of inputs at random; all draws are made of the CPU generator."""


@dataclass(frozen=True, slots=True)
class LocalResult:
    """What local training reports.

    Args:
        num_examples: examples it trained on, the client's weight in the mean.
        loss: mean training loss of the last epoch.
    """

    num_examples: int
    loss: float


class LocalTraining(Protocol):
    """Trains a model in place."""

    def __call__(
        self, model: nn.Module, data: ClientData, plan: RoundPlan, seed: int
    ) -> LocalResult:
        """Train `model` on `data.train` as `plan` says; `seed` is this client's in this round."""
        ...


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a model does on a set of examples.

    Args:
        loss: mean loss.
        metric: mean metric.
        num_examples: how many examples.
    """

    loss: float
    metric: float
    num_examples: int


def cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy.

    Logits have shape (n, classes); classes are int64, shape (n,).
    """
    return F.cross_entropy(outputs, targets)


def binary_cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean binary cross-entropy of one logit an example and targets 0 or 1."""
    return F.binary_cross_entropy_with_logits(outputs.reshape(-1), targets.to(outputs.dtype))


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the share of right answers.

    One logit an example means class 1 where it is above 0.
    """
    if outputs.ndim == 1 or outputs.shape[1] == 1:
        answers = (outputs.reshape(-1) > 0).to(targets.dtype)
    else:
        answers = outputs.argmax(dim=1)
    return (answers == targets).to(torch.float32).mean()


LOSSES: dict[str, Loss] = {
    "cross-entropy": cross_entropy,
    "binary-cross-entropy": binary_cross_entropy,
}
"""Losses by the names that a configuration gives them."""

METRICS: dict[str, Metric] = {"accuracy": accuracy}
"""Metrics by the names that a configuration gives them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """How a client trains.

    Args:
        optimizer: `"sgd"` or `"adamw"`.
        learning_rate: the rate at the top of the schedule, above 0.
        momentum: of SGD, in [0, 1).
        weight_decay: a number from 0, or `"1/n"` for 1 / n_k, the published setting.
        batch_size: examples a batch, from 1.
        schedule: `"constant"`; `"cosine"` from the rate to 0 within each round (in FedOBD's stage
            2, within the stage); `"cosine-run"` from the rate to 0 over the whole run.
        schedule_step: whether the schedule moves once an `"epoch"` (the published setting) or once
            a `"batch"`.
        warmup_epochs: epochs of linear warm-up at the schedule's start, from 0.
        max_gradient_norm: gradients are scaled down to this Euclidean norm; None leaves them.
        autocast: whether the model computes in bfloat16 where that is safe; values stay in their
            own types.

    Raises:
        UsageError: a value is outside what is allowed.
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float | Literal["1/n"] = 0.0
    batch_size: int = 64
    schedule: Literal["constant", "cosine", "cosine-run"] = "cosine"
    schedule_step: Literal["epoch", "batch"] = "epoch"
    warmup_epochs: float = 0.0
    max_gradient_norm: float | None = None
    autocast: bool = False

    def __post_init__(self) -> None:
        _choose("optimizer", self.optimizer, "sgd", "adamw")
        _choose("schedule", self.schedule, "constant", "cosine", "cosine-run")
        _choose("schedule_step", self.schedule_step, "epoch", "batch")
        checks = {
            "learning_rate": (self.learning_rate > 0, "numbers above 0"),
            "momentum": (0 <= self.momentum < 1, "0 <= momentum < 1"),
            "batch_size": (self.batch_size >= 1, "whole numbers from 1"),
            "warmup_epochs": (self.warmup_epochs >= 0, "numbers from 0"),
            "weight_decay": (
                self.weight_decay == "1/n"
                if isinstance(self.weight_decay, str)
                else self.weight_decay >= 0,
                "numbers from 0, or '1/n'",
            ),
            "max_gradient_norm": (
                self.max_gradient_norm is None or self.max_gradient_norm > 0,
                "numbers above 0",
            ),
        }
        for name, (legal, allowed) in checks.items():
            if not legal:
                raise UsageError(f"{name} is {getattr(self, name)!r}; allowed are {allowed}")


def _choose(name: str, value: str, *allowed: str) -> None:
    if value not in allowed:
        raise UsageError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}")


def rate_factor(options: TrainingOptions, plan: RoundPlan, epoch: float, step: float) -> float:
    """Return the factor on the learning rate.

    Args:
        options: schedule and warm-up.
        plan: where the round lies in the schedule.
        epoch: epochs of this round that lie behind.
        step: how far the schedule moves at a time, in epochs.

    Returns:
        A number in [0, 1].

    Raises:
        UsageError: the warm-up is as long as the schedule.
    """
    if options.schedule == "cosine":
        position, length = plan.schedule_start + epoch, plan.schedule_epochs
    else:
        position, length = plan.run_start + epoch, plan.run_epochs
    warmup = options.warmup_epochs
    if warmup >= length:
        raise UsageError(f"warmup_epochs is {warmup}; the schedule has only {length} epochs")
    if position < warmup:
        return min(1.0, (position + step) / warmup)
    if options.schedule == "constant":
        return 1.0
    return (1 + math.cos(math.pi * (position - warmup) / (length - warmup))) / 2


def train_locally(
    model: nn.Module,
    data: ClientData,
    plan: RoundPlan,
    seed: int,
    *,
    options: TrainingOptions,
    loss: Loss = cross_entropy,
    augment: Augment | None = None,
) -> LocalResult:
    """Train a model in place with a fresh optimizer.

    A last batch of one example is left out where the model has batch normalization.

    Args:
        model: its parameters' device is where the work is done.
        data: `data.train` is used.
        plan: epochs, and the place in the schedule.
        seed: of the order of batches and of dropout.
        options: optimizer, schedule, batch size.
        loss: mean loss of a batch.
        augment: changes the inputs of each batch.

    Raises:
        UsageError: the only batch has one example, and the model has batch normalization.
    """
    optimizer = _optimizer(model, options, len(data.train))
    device = optimizer.param_groups[0]["params"][0].device
    num_examples = len(data.train)
    leave_single_out = has_batch_norm(model)
    order = torch.Generator().manual_seed(seed)
    last_loss = 0.0
    model.train()
    generators = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with generators, pooling_first(model), channels_last_gradients(model):
        seed_device(seed, device)
        for epoch in range(plan.epochs):
            batches = list(_batches(num_examples, options.batch_size, order, leave_single_out))
            if not batches:
                raise UsageError(
                    "a client has a single training example, which batch normalization cannot use"
                )
            total, seen = torch.zeros((), device=device), 0
            for number, indices in enumerate(batches):
                step = 1 / len(batches) if options.schedule_step == "batch" else 1.0
                done = number * step if options.schedule_step == "batch" else 0.0
                rate = options.learning_rate * rate_factor(options, plan, epoch + done, step)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                batch = data.train.take(indices)
                inputs = batch.inputs.to(device)
                if augment is not None:
                    inputs = augment(inputs, order)
                optimizer.zero_grad(set_to_none=True)
                with autocast(options, device):
                    batch_loss = loss(model(inputs), batch.targets.to(device))
                batch_loss.backward()  # type: ignore[no-untyped-call]
                if options.max_gradient_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), options.max_gradient_norm)
                optimizer.step()
                total += batch_loss.detach() * len(indices)
                seen += len(indices)
            last_loss = float(total) / seen
    return LocalResult(num_examples, last_loss)


def seed_device(seed: int, device: torch.device) -> None:
    """Seed the generators that a model on a device draws from: the CPU's, and a GPU's own.

    `torch.manual_seed` seeds every GPU, and looks for every kind of accelerator, which took 0.3 ms
    of a client's time.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _optimizer(
    model: nn.Module, options: TrainingOptions, num_examples: int
) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    decay = 1 / num_examples if options.weight_decay == "1/n" else float(options.weight_decay)
    rate, fused = options.learning_rate, trained[0].device.type in ("cpu", "cuda")
    if options.optimizer == "adamw":
        return torch.optim.AdamW(trained, lr=rate, weight_decay=decay, fused=fused)
    return torch.optim.SGD(
        trained, lr=rate, momentum=options.momentum, weight_decay=decay, fused=fused
    )


def autocast(options: TrainingOptions, device: torch.device) -> torch.autocast:
    """Return the context in which a model computes."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.autocast)


def _batches(
    num_examples: int, batch_size: int, order: torch.Generator, leave_single_out: bool
) -> Iterator[torch.Tensor]:
    for batch in torch.split(torch.randperm(num_examples, generator=order), batch_size):
        if len(batch) > 1 or not leave_single_out:
            yield batch


def has_batch_norm(model: nn.Module) -> bool:
    """Whether the model has a batch normalization layer."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def evaluate(
    model: nn.Module,
    examples: ExampleSet,
    *,
    loss: Loss = cross_entropy,
    metric: Metric = accuracy,
    batch_size: int = 256,
) -> Evaluation:
    """Evaluate a model; a last batch of one example joins the batch before it.

    Args:
        model: put into evaluation mode.
        examples: at least one.
        loss: mean loss of a batch.
        metric: mean metric of a batch.
        batch_size: examples a batch.

    Raises:
        UsageError: there are no examples.
    """
    if len(examples) == 0:
        raise UsageError("there are no examples to evaluate on")
    device = next(model.parameters()).device
    model.eval()
    total_loss = total_metric = 0.0
    bounds = [*range(0, len(examples), batch_size), len(examples)]
    if len(bounds) > 2 and bounds[-1] - bounds[-2] == 1:
        del bounds[-2]
    with torch.inference_mode(), pooling_first(model):
        for start, stop in itertools.pairwise(bounds):
            batch = examples.take(torch.arange(start, stop))
            outputs = model(batch.inputs.to(device))
            targets = batch.targets.to(device)
            total_loss += float(loss(outputs, targets)) * (stop - start)
            total_metric += float(metric(outputs, targets)) * (stop - start)
    count = len(examples)
    return Evaluation(total_loss / count, total_metric / count, count)
