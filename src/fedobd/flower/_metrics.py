"""Metrics: what a client's functions report, and under which names."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from flwr.app import RecordDict

from fedobd._errors import UsageError
from fedobd.payload import Report
from fedobd.sessions import weighted_mean

Figures = dict[str, int | float]
"""Numbers as a MetricRecord holds them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricKeys:
    """The names under which a client's train function reports figures in its MetricRecord.

    Args:
        num_examples: examples it trained on, the client's weight; must be there.
        train_loss: mean training loss.
        num_eval_examples: examples on which it evaluated the model it received.
        eval_loss: mean loss on them.
        eval_metric: mean metric on them, by which a stage can be left early.
    """

    num_examples: str = "num-examples"
    train_loss: str = "train_loss"
    num_eval_examples: str = "num-eval-examples"
    eval_loss: str = "eval_loss"
    eval_metric: str = "eval_acc"


def make_report(content: RecordDict, keys: MetricKeys | None) -> Report:
    """Return what the train function reports, for the payload's header.

    Raises:
        UsageError: it reports no number of examples, or something that is no number.
    """
    if keys is None:
        return Report(num_examples=1, train_loss=0.0)
    entries = _entries(content)
    if not isinstance(entries.get(keys.num_examples), int):
        raise UsageError(
            f"the train function reports no whole number {keys.num_examples!r} in its "
            f"MetricRecord; it has {', '.join(sorted(entries)) or 'none'}"
        )

    def number(key: str) -> float:
        value = entries.get(key, 0.0)
        if not isinstance(value, int | float):
            raise UsageError(f"the train function reports {key!r} as {value!r}; wanted a number")
        return float(value)

    evaluated = keys.num_eval_examples in entries
    return Report(
        num_examples=entries[keys.num_examples],
        train_loss=number(keys.train_loss),
        num_validation_examples=int(number(keys.num_eval_examples)) if evaluated else 0,
        validation_loss=number(keys.eval_loss) if evaluated else 0.0,
        validation_metric=number(keys.eval_metric) if evaluated else 0.0,
    )


def numbers_in(content: RecordDict) -> Figures:
    """Return the numbers in a reply's MetricRecords."""
    return {k: v for k, v in _entries(content).items() if isinstance(v, int | float)}


def mean_of(weighted: list[tuple[Figures, int]]) -> Figures:
    """Return the weighted mean of the finite numbers that all have."""
    means: Figures = {}
    weights = [weight for _, weight in weighted]
    for key in set[str]().union(*(entries for entries, _ in weighted)):
        values = [entries[key] for entries, _ in weighted if key in entries]
        with suppress(OverflowError, ValueError):  # of absurd numbers
            mean = weighted_mean(values, weights) if len(values) == len(weights) else None
            if mean is not None and math.isfinite(mean):
                means[key] = mean
    return means


def _entries(content: RecordDict) -> dict[str, Any]:
    return {k: v for record in content.metric_records.values() for k, v in record.items()}
