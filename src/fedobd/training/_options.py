"""TrainingOptions: how a client trains, and the learning rate that follows for each batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fedobd._errors import UsageError
from fedobd.sessions import RoundPlan


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

    def decay_of(self, num_examples: int) -> float:
        """Return the weight decay of a client with so many training examples."""
        return 1 / num_examples if self.weight_decay == "1/n" else float(self.weight_decay)


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
        # The end of the step, not its beginning: the first one would have a rate of 0.
        return min(1.0, (position + step) / warmup)
    if options.schedule == "constant":
        return 1.0
    return (1 + math.cos(math.pi * (position - warmup) / (length - warmup))) / 2


def learning_rate(
    options: TrainingOptions, plan: RoundPlan, epoch: int, batch: int, num_batches: int
) -> float:
    """Return the learning rate of a batch.

    Args:
        options: schedule and warm-up.
        plan: where the round lies in the schedule.
        epoch: epochs of this round that lie behind.
        batch: batches of this epoch that lie behind.
        num_batches: batches of this epoch in all.

    Raises:
        UsageError: the warm-up is as long as the schedule.
    """
    by_batch = options.schedule_step == "batch"
    step = 1 / num_batches if by_batch else 1.0
    done = batch * step if by_batch else 0.0
    return options.learning_rate * rate_factor(options, plan, epoch + done, step)
