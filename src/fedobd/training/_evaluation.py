"""Evaluation: losses, metrics, and what a model does on a set of examples."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from fedobd._errors import UsageError
from fedobd.data import ExampleSet

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Mean loss of a batch, 0-dim, from the model's outputs and the targets."""

Metric = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Mean metric of a batch, 0-dim, larger is better, from the model's outputs and the targets."""


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
    """Return the mean cross-entropy in nats, 0-dim.

    Args:
        outputs: logits, float, shape (n, classes).
        targets: classes, int64, shape (n,).
    """
    return F.cross_entropy(outputs, targets)


def binary_cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean binary cross-entropy in nats, 0-dim.

    Args:
        outputs: one logit an example, float, shape (n,) or (n, 1).
        targets: 0 or 1, any type, shape (n,).
    """
    return F.binary_cross_entropy_with_logits(outputs.reshape(-1), targets.to(outputs.dtype))


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the share of right answers, float32, 0-dim.

    Args:
        outputs: logits, float, shape (n, classes); with shape (n,) or (n, 1) a logit above 0
            means class 1.
        targets: classes, shape (n,).
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
        model: put into evaluation mode; its parameters' device is where the work is done.
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
    # Models that normalize by the statistics of their batch fail on a single example.
    if len(bounds) > 2 and bounds[-1] - bounds[-2] == 1:
        del bounds[-2]
    with torch.inference_mode():
        for start, stop in itertools.pairwise(bounds):
            batch = examples.take(torch.arange(start, stop))
            outputs = model(batch.inputs.to(device))
            targets = batch.targets.to(device)
            total_loss += float(loss(outputs, targets)) * (stop - start)
            total_metric += float(metric(outputs, targets)) * (stop - start)
    count = len(examples)
    return Evaluation(total_loss / count, total_metric / count, count)
