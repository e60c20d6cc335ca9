"""Compare: several methods with several seeds under one configuration, and a table of results."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fedobd._errors import UsageError
from fedobd.experiments._build import build_experiment
from fedobd.experiments._config import RunConfig
from fedobd.experiments._folder import (
    CONFIG_FILE,
    SCHEMA_FILE,
    claim_folder,
    read_config,
    settle_config,
    write_json,
)
from fedobd.experiments._runner import run
from fedobd.experiments._summary import Summary
from fedobd.simulation import Callback, check_workers

COMPARISON = "comparison.json"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One method over all seeds; standard deviations are those of a sample, 0 for a single seed.

    Args:
        method: its name.
        final_metric: mean test metric of W after the last round.
        final_metric_std: its standard deviation over the seeds.
        best_metric: mean of the best test metric.
        best_metric_std: its standard deviation.
        uplink_bytes: mean.
        downlink_bytes: mean.
        total_bytes: mean.
        nominal_bytes: mean of all bits by the papers' formula, over 8.
        reduction_fedavg: 1 - total / FedAvg's total; None without FedAvg.
        reduction_baseline: the same against the most accurate baseline; None without baselines.
        seconds: mean wall-clock seconds of the rounds.
        header_share: share of headers in what went up and down.
        buffer_share: share of buffers.
        overhead: mean share of the core's own work in the rounds' time; None with workers.
        never_uploaded_share: largest share of the parameters that no client uploaded in stage 1.
    """

    method: str
    final_metric: float
    final_metric_std: float
    best_metric: float
    best_metric_std: float
    uplink_bytes: float
    downlink_bytes: float
    total_bytes: float
    nominal_bytes: float
    reduction_fedavg: float | None
    reduction_baseline: float | None
    seconds: float
    header_share: float
    buffer_share: float
    overhead: float | None
    never_uploaded_share: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All rows, and which baseline was the most accurate.

    Args:
        rows: one a method, in the order of the configuration.
        best_baseline: the most accurate method other than FedOBD, of equal ones that with fewer
            bytes; None without one.
        seeds: the seeds.
    """

    rows: tuple[Row, ...]
    best_baseline: str | None
    seeds: tuple[int, ...]


def compare(
    config: RunConfig,
    path: Path,
    *,
    seeds: Sequence[int],
    methods: Sequence[str] = (),
    workers: int = 0,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Comparison:
    """Run each method with each seed, each in a folder of its own, and compare them.

    Args:
        config: holds the options of each method.
        path: the folder of the comparison; runs lie in it as `method-seedN`.
        seeds: at least one.
        methods: which methods; empty for all of the configuration.
        workers: worker processes of each run.
        resume: keep finished runs and go on with the one that was cut off.
        callbacks: see each run as it goes.

    Raises:
        UsageError: there is nothing to compare, or it cannot be run, or the folder holds something
            else, or a comparison of another configuration.
    """
    chosen = list(methods) or list(config.methods)
    if not seeds or len(set(seeds)) != len(seeds):
        raise UsageError(f"seeds are {list(seeds)}; wanted at least one, each once")
    singles = {(name, seed): config.for_method(name, seed) for seed in seeds for name in chosen}
    if (path / SCHEMA_FILE).exists():
        raise UsageError(f"output folder {str(path)!r} holds a single run; wanted a comparison")
    check_workers(workers)
    build_experiment(next(iter(singles.values())))  # what cannot be run leaves no folder
    claim_folder(path, CONFIG_FILE, resume=resume)
    settle_config(path, config.to_resume(read_config(path)))
    summaries: dict[str, list[Summary]] = {name: [] for name in chosen}
    for (name, seed), single in singles.items():
        folder = path / f"{name}-seed{seed}"
        summary = run(single, folder, workers=workers, resume=folder.exists(), callbacks=callbacks)
        summaries[name].append(summary)
    comparison = tabulate(summaries, tuple(seeds))
    write_json(path / COMPARISON, dataclasses.asdict(comparison))
    return comparison


def tabulate(summaries: dict[str, list[Summary]], seeds: tuple[int, ...]) -> Comparison:
    """Make the table from the summaries of each method."""
    plain = {name: _row(name, found) for name, found in summaries.items()}
    baselines = [row for row in plain.values() if row.method != "fedobd"]
    best = max(baselines, key=lambda r: (r.final_metric, -r.total_bytes), default=None)
    fedavg = plain.get("fedavg")
    rows = [
        dataclasses.replace(
            row,
            reduction_fedavg=_reduction(row, fedavg),
            reduction_baseline=_reduction(row, best),
        )
        for row in plain.values()
    ]
    return Comparison(rows=tuple(rows), best_baseline=best.method if best else None, seeds=seeds)


def _reduction(row: Row, other: Row | None) -> float | None:
    return None if other is None else 1 - row.total_bytes / other.total_bytes


def _row(name: str, found: list[Summary]) -> Row:
    def spread(values: list[float]) -> float:
        return stdev(values) if len(values) > 1 else 0.0

    finals = [s.final_metric for s in found if s.final_metric is not None]
    bests = [s.best_metric for s in found if s.best_metric is not None]
    if not len(finals) == len(bests) == len(found):
        raise UsageError(f"method {name!r} was not tested; a comparison needs a test set")
    overheads = [s.overhead for s in found if s.overhead is not None]
    return Row(
        method=name,
        final_metric=fmean(finals),
        final_metric_std=spread(finals),
        best_metric=fmean(bests),
        best_metric_std=spread(bests),
        uplink_bytes=fmean([s.uplink_bytes for s in found]),
        downlink_bytes=fmean([s.downlink_bytes for s in found]),
        total_bytes=fmean([s.total_bytes for s in found]),
        nominal_bytes=fmean(
            [(s.uplink_nominal_bits + s.downlink_nominal_bits) / 8 for s in found]
        ),
        reduction_fedavg=None,
        reduction_baseline=None,
        seconds=fmean([s.seconds["round"] for s in found]),
        header_share=fmean([_share(s, "header") for s in found]),
        buffer_share=fmean([_share(s, "buffers") for s in found]),
        overhead=fmean(overheads) if overheads else None,
        never_uploaded_share=max(sum(block["share"] for block in s.never_uploaded) for s in found),
    )


def _share(summary: Summary, part: str) -> float:
    """Share of a part in what went up and down together."""
    up, down = summary.uplink_bytes, summary.downlink_bytes
    shares: dict[str, Any] = summary.shares
    return float((shares["uplink"][part] * up + shares["downlink"][part] * down) / (up + down))
