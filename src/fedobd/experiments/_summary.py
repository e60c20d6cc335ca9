"""Summary: what came of a run."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fedobd._errors import UsageError
from fedobd.blocks import ModelState
from fedobd.experiments._build import Experiment
from fedobd.experiments._config import RunConfig
from fedobd.experiments._folder import SUMMARY_FILE, RunFolder
from fedobd.experiments._record import BYTE_PARTS, finite_or_none
from fedobd.payload import Kind
from fedobd.sessions import Broadcast, ServerSession
from fedobd.tracking import rare_blocks

_OVERHEAD_PHASES = ("broadcast", "fold", "mean", "decode", "encode")
"""Phases of a round that are the core's own work, in the seconds of a record."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What came of a run.

    Args:
        method: the method's name.
        seed: the run's seed.
        rounds: rounds that were run.
        final_metric: the server's W on the test set after the last round; None without one.
        best_metric: the best of all rounds in which W was tested; None without a test set.
        broadcast_metric: Ŵ, what clients hold after the last delivery, on the test set; None
            without one.
        uplink_bytes: all uploads.
        downlink_bytes: all broadcasts and initial payloads.
        total_bytes: both.
        uplink_nominal_bits: accepted uploads by the papers' formula.
        downlink_nominal_bits: broadcasts and initial payloads by it.
        shares: of all bytes but refused uploads', what headers, levels, raw values and buffers
            take, by direction.
        delivery_bytes: the trained model's delivery to all clients, counted in no total.
        never_uploaded: blocks that no client uploaded in stage 1: name, parameters, share of the
            parameters.
        refusals: refused uploads, and clients that a deployment went on without.
        stops_on_test: whether the test set decided when to stop, which flatters the result.
        seconds: wall-clock seconds by phase over all rounds; clients' phases overlap where there
            are workers.
        overhead: share of a round's time that the core's own work took; None where clients
            run beside each other.
        rarely_uploaded: blocks that fewer than 5 % of the uploads of stage 1 held, with that share
            as `uploads`; empty in folders that do not say.
    """

    method: str
    seed: int
    rounds: int
    final_metric: float | None
    best_metric: float | None
    broadcast_metric: float | None
    uplink_bytes: int
    downlink_bytes: int
    total_bytes: int
    uplink_nominal_bits: int
    downlink_nominal_bits: int
    shares: dict[str, dict[str, float]]
    delivery_bytes: int
    never_uploaded: tuple[dict[str, Any], ...]
    refusals: int
    stops_on_test: bool
    seconds: dict[str, float]
    overhead: float | None
    rarely_uploaded: tuple[dict[str, Any], ...] = ()


def read_summary(folder: RunFolder) -> Summary:
    """Return the summary of a run that has ended.

    Raises:
        UsageError: the file is damaged.
    """
    values = folder.read_json(SUMMARY_FILE)
    try:
        return Summary(**values)
    except TypeError as error:
        raise UsageError(f"{str(folder.path / SUMMARY_FILE)!r} is damaged: {error}") from error


def summarize(
    config: RunConfig,
    experiment: Experiment,
    server: ServerSession,
    records: Sequence[dict[str, Any]],
    *,
    one_at_a_time: bool,
) -> Summary:
    """Return what came of a run whose last round has ended.

    Args:
        config: the run's configuration.
        experiment: what was run.
        server: the server after the last round.
        records: the lines of rounds.jsonl.
        one_at_a_time: whether clients ran one after another, so that the phases of their rounds
            add up.
    """
    delivery = server.delivery().data
    final, of_delivery = _test(experiment, server, delivery)
    metrics = [m for m in (*(r["test_metric"] for r in records), final) if m is not None]
    uplink_bytes = sum(r["uplink_bytes"] for r in records)
    downlink_bytes = sum(r["downlink_bytes"] for r in records)
    blocks = rare_blocks(records, experiment.schema)
    seconds: dict[str, float] = defaultdict(float)
    for record in records:
        for phase, spent in record["seconds"].items():
            seconds[phase] += spent
    overhead = sum(seconds[phase] for phase in _OVERHEAD_PHASES) / seconds["round"]
    return Summary(
        method=config.method,
        seed=config.federation.seed,
        rounds=server.rounds,
        final_metric=final,
        best_metric=max(metrics, default=None),
        broadcast_metric=of_delivery,
        uplink_bytes=uplink_bytes,
        downlink_bytes=downlink_bytes,
        total_bytes=uplink_bytes + downlink_bytes,
        uplink_nominal_bits=sum(r["uplink_nominal_bits"] for r in records),
        downlink_nominal_bits=sum(r["downlink_nominal_bits"] for r in records),
        shares={
            "uplink": _shares(c["uplink"] for r in records for c in r["clients"]),
            "downlink": _shares(r["broadcast"] for r in records for _ in r["cohort"]),
        },
        delivery_bytes=len(delivery) * config.federation.clients,
        never_uploaded=tuple(
            {"block": b.block, "parameters": b.parameters, "share": b.share}
            for b in blocks
            if b.uploads == 0
        ),
        rarely_uploaded=tuple(dataclasses.asdict(b) for b in blocks if b.uploads > 0),
        refusals=sum(len(r["refusals"]) for r in records),
        stops_on_test=experiment.method.stop.source == "test",
        seconds={phase: round(spent, 3) for phase, spent in sorted(seconds.items())},
        overhead=overhead if one_at_a_time else None,
    )


def _test(
    experiment: Experiment, server: ServerSession, delivery: bytes
) -> tuple[float | None, float | None]:
    """Return the metrics of W and of what clients hold once they have the delivery."""
    test = experiment.evaluate
    if test is None:
        return None, None
    final = finite_or_none(test(server.state).metric)
    received = Broadcast.decode(delivery, experiment.method, experiment.schema, Kind.DELIVERY)
    held = {**server.state, **received.values}
    if _are_equal(held, server.state):  # where the delivery is exact, a second test is saved
        return final, final
    return final, finite_or_none(test(held).metric)


def _are_equal(one: ModelState, other: ModelState) -> bool:
    """Whether two states of the same model have the same types and values."""
    return all(
        value.dtype == other[name].dtype and torch.equal(value.cpu(), other[name].cpu())
        for name, value in one.items()
    )


def _shares(counts: Iterable[dict[str, int]]) -> dict[str, float]:
    totals: dict[str, int] = defaultdict(int)
    for count in counts:
        for part in BYTE_PARTS:
            totals[part] += count[part]
    whole = sum(totals.values())
    return {part: totals[part] / whole for part in BYTE_PARTS} if whole else {}
