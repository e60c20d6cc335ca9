"""Local training: what a client does with the model between broadcast and upload.

Optimizer state lives for one call, so a client carries nothing from round to round but its place
in the learning-rate schedule, which is part of the round's plan. All randomness (order of batches,
dropout) follows from the seed that is given; the global random state is as before afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from fedobd._errors import UsageError
from fedobd.data import ClientData
from fedobd.sessions import RoundPlan
from fedobd.training._evaluation import Loss, cross_entropy
from fedobd.training._options import TrainingOptions, learning_rate

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
        data: `data.train` is used; the model takes its inputs, shape (batch, ...).
        plan: epochs, and the place in the schedule.
        seed: of the order of batches and of dropout.
        options: optimizer, schedule, batch size.
        loss: mean loss of a batch.
        augment: changes the inputs of each batch.

    Raises:
        UsageError: the only batch has one example, and the model has batch normalization.
    """
    num_examples = len(data.train)
    optimizer = _optimizer(model, options, num_examples)
    device = optimizer.param_groups[0]["params"][0].device
    leave_single_out = has_batch_norm(model)
    order = torch.Generator().manual_seed(seed)
    last_loss = 0.0
    model.train()
    with seeded(seed, device):
        for epoch in range(plan.epochs):
            batches = draw_batches(num_examples, options.batch_size, order, leave_single_out)
            # The sum stays on the device: reading each loss would wait for a GPU at every batch.
            total = torch.zeros((), device=device)
            for number, indices in enumerate(batches):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(options, plan, epoch, number, len(batches))
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
            last_loss = float(total) / sum(map(len, batches))
    return LocalResult(num_examples, last_loss)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within it, what a model draws on a device follows from the seed; then all is as before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed_device(seed, device)
        yield


def seed_device(seed: int, device: torch.device) -> None:
    """Seed the generators that a model on a device draws from: the CPU's, and a GPU's own.

    `torch.manual_seed` seeds every GPU, and looks for every kind of accelerator, which took 0.3 ms
    of a client's time.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def autocast(options: TrainingOptions, device: torch.device) -> torch.autocast:
    """Return the context in which a model computes."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.autocast)


def draw_batches(
    num_examples: int, batch_size: int, order: torch.Generator, leave_single_out: bool
) -> list[torch.Tensor]:
    """Draw the batches of an epoch: the numbers of their examples, int64, shape (batch,) each.

    Raises:
        UsageError: none is left, since the only one has a single example.
    """
    numbers = torch.randperm(num_examples, generator=order)
    # `torch.split` takes three times as long, which tiny clients with a single batch notice.
    batches = [numbers[start : start + batch_size] for start in range(0, num_examples, batch_size)]
    if leave_single_out:
        batches = [batch for batch in batches if len(batch) > 1]
    if not batches:
        raise UsageError(
            "a client has a single training example, which batch normalization cannot use"
        )
    return batches


def has_batch_norm(model: nn.Module) -> bool:
    """Whether the model has a batch normalization layer."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def _optimizer(
    model: nn.Module, options: TrainingOptions, num_examples: int
) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    decay, rate = options.decay_of(num_examples), options.learning_rate
    fused = trained[0].device.type in ("cpu", "cuda")  # one pass over all; others have none
    if options.optimizer == "adamw":
        return torch.optim.AdamW(trained, lr=rate, weight_decay=decay, fused=fused)
    return torch.optim.SGD(
        trained, lr=rate, momentum=options.momentum, weight_decay=decay, fused=fused
    )
