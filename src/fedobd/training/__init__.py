"""Training: what a client does between broadcast and upload, alone or stacked with others."""

from __future__ import annotations

from fedobd.training._local import (
    LOSSES,
    METRICS,
    Augment,
    Evaluation,
    LocalResult,
    LocalTraining,
    Loss,
    Metric,
    TrainingOptions,
    accuracy,
    autocast,
    binary_cross_entropy,
    cross_entropy,
    evaluate,
    has_batch_norm,
    rate_factor,
    seed_device,
    train_locally,
)
from fedobd.training._stacked import train_stacked

__all__ = [
    "LOSSES",
    "METRICS",
    "Augment",
    "Evaluation",
    "LocalResult",
    "LocalTraining",
    "Loss",
    "Metric",
    "TrainingOptions",
    "accuracy",
    "autocast",
    "binary_cross_entropy",
    "cross_entropy",
    "evaluate",
    "has_batch_norm",
    "rate_factor",
    "seed_device",
    "train_locally",
    "train_stacked",
]
