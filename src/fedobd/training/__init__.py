"""Training: what a client does between broadcast and upload, alone or stacked with others."""

from __future__ import annotations

from fedobd.training._evaluation import (
    LOSSES,
    METRICS,
    Evaluation,
    Loss,
    Metric,
    accuracy,
    binary_cross_entropy,
    cross_entropy,
    evaluate,
)
from fedobd.training._local import (
    Augment,
    LocalResult,
    LocalTraining,
    seed_device,
    train_locally,
)
from fedobd.training._options import TrainingOptions, rate_factor
from fedobd.training._stacked import ClientStart, train_stacked

__all__ = [
    "LOSSES",
    "METRICS",
    "Augment",
    "ClientStart",
    "Evaluation",
    "LocalResult",
    "LocalTraining",
    "Loss",
    "Metric",
    "TrainingOptions",
    "accuracy",
    "binary_cross_entropy",
    "cross_entropy",
    "evaluate",
    "rate_factor",
    "seed_device",
    "train_locally",
    "train_stacked",
]
