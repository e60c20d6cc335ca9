"""Rounds: what is planned before one, and what is recorded after it.

All of it is plain, frozen data; `RoundRecord.to_json` is what a run folder keeps of a round.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch

from fedobd._errors import UsageError, check_choice
from fedobd._seeds import make_generator
from fedobd.payload import BlockTraffic, ByteCount, Report


def cohort_size(cohort: int | float, num_clients: int) -> int:
    """Return how many of the clients take part in a round.

    A cohort is a count (int), or a fraction in (0, 1] (float) of them, rounded down, at least 1.

    Raises:
        UsageError: the count is above the number of clients.
    """
    check_cohort(cohort)
    if isinstance(cohort, float):
        return max(1, math.floor(Fraction(str(cohort)) * num_clients))
    if cohort > num_clients:
        raise UsageError(f"a cohort of {cohort} clients was asked for; there are {num_clients}")
    return cohort


def check_cohort(cohort: int | float) -> None:
    """Raise UsageError unless the cohort is a count of at least 1 or a fraction in (0, 1]."""
    legal = 0 < cohort <= 1 if isinstance(cohort, float) else is_count(cohort)
    if not legal:
        raise UsageError(
            f"cohort is {cohort}; allowed are a count of at least 1 (5) or a fraction above 0 "
            f"and up to 1 (0.5)"
        )


def is_count(value: object) -> bool:
    """Whether a value is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def sample_cohort(
    cohort: int | float,
    num_clients: int,
    seed: int,
    round_number: int,
    available: Collection[int] | None = None,
) -> tuple[int, ...]:
    """Return the clients of a round, ascending.

    They are a uniform sample without replacement that depends on seed, round and `available`
    (the clients that can be reached; None for all) alone: the first of one random order. Where
    fewer are available than the cohort (a count, or a fraction of all) wants, all take part.
    """
    size = cohort_size(cohort, num_clients)
    generator = make_generator(seed, "cohort", round_number)
    order = torch.randperm(num_clients, generator=generator).tolist()
    if available is not None:
        reached = frozenset(available)
        order = [client for client in order if client in reached]
    return tuple(sorted(order[:size]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Like rounds, so many at most, with their local epochs and cohort (a count or fraction).

    With `one_schedule` the learning-rate schedule goes on from round to round; else each round
    starts it anew.
    """

    number: int
    rounds: int
    epochs: int
    cohort: int | float
    one_schedule: bool = False

    def __post_init__(self) -> None:
        for name in ("rounds", "epochs"):
            if not is_count(getattr(self, name)):
                raise UsageError(
                    f"{name} of stage {self.number} is {getattr(self, name)}; allowed are "
                    f"numbers from 1"
                )
        check_cohort(self.cohort)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPlan:
    """What happens in a round.

    Args:
        round: its number, from 1.
        stage: number of its stage.
        cohort: the clients that take part, ascending.
        epochs: local epochs.
        schedule_start: epochs of the learning-rate schedule that lie behind the client.
        schedule_epochs: length of that schedule in epochs.
        run_start: local epochs that are planned before this round, for schedules over the run.
        run_epochs: local epochs of all planned rounds.
    """

    round: int
    stage: int
    cohort: tuple[int, ...]
    epochs: int
    schedule_start: int
    schedule_epochs: int
    run_start: int
    run_epochs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadRecord:
    """One accepted upload.

    `report.num_examples` is its weight. Mean block differences are of every block, where the
    method sends them; `uplink_blocks` are what the held blocks took, in the order of block_ids.
    """

    client: int
    report: Report
    block_ids: tuple[int, ...]
    block_differences: tuple[float, ...] | None
    uplink: ByteCount
    uplink_blocks: tuple[BlockTraffic, ...]

    def to_json(self) -> dict[str, Any]:
        """Return what `rounds.jsonl` has of it, in the order and under the names that it has."""
        return {
            "client": self.client,
            **asdict(self.report),
            "blocks_kept": self.block_ids,
            "block_differences": self.block_differences,
            "uplink": asdict(self.uplink),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """One upload that was refused, or never came, on a client's connection.

    The reason is a `DecodeReason`, or what an engine says of an upload that did not come
    (`"late"`, `"failed"`). Its bytes were sent all the same.
    """

    client: int
    reason: str
    message: str
    uplink_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRecord:
    """What happened in a round.

    Args:
        round, stage, cohort: as in its plan.
        uploads: accepted uploads by client; `refusals`: refused or missing ones, likewise.
        train_loss: mean over accepted uploads, weighted by examples.
        validation_loss: mean over accepted uploads of the received model's loss, weighted by
            validation examples; None without any.
        validation_metric: the same of its metric.
        uplink_bytes: bytes of all uploads, refused ones included, and those of attempts at the
            round that were aborted.
        downlink_bytes: bytes of the broadcast to each client of the cohort and of initial
            payloads, with those that were sent again, and those of aborted attempts.
        uplink_nominal_bits: accepted uploads by the papers' formula.
        downlink_nominal_bits: the same of what went down.
        uplink_blocks: what each block of the schema took in the accepted uploads.
        broadcast: bytes of one broadcast by what they are for.
        broadcast_blocks: what each block of the schema took in one broadcast.
        initial_bytes: bytes of the round's initial payloads, part of downlink_bytes.
        initialized: clients that were sent one; `reinitialized`: those that had lost what an
            earlier one gave them, and were sent initial payload and broadcast again.
    """

    round: int
    stage: int
    cohort: tuple[int, ...]
    uploads: tuple[UploadRecord, ...]
    refusals: tuple[Refusal, ...]
    train_loss: float
    validation_loss: float | None
    validation_metric: float | None
    uplink_bytes: int
    downlink_bytes: int
    uplink_nominal_bits: int
    downlink_nominal_bits: int
    uplink_blocks: tuple[BlockTraffic, ...]
    broadcast: ByteCount
    broadcast_blocks: tuple[BlockTraffic, ...]
    initial_bytes: int
    initialized: tuple[int, ...]
    reinitialized: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return what `rounds.jsonl` has of it, uploads as `clients`.

        The names are those of the file format, which are older than the attributes'.
        """
        values = asdict(replace(self, uploads=()))
        del values["uploads"]
        values["opening_bytes"] = values.pop("initial_bytes")
        values["opened"] = values.pop("initialized")
        values["reopened"] = values.pop("reinitialized")
        values["clients"] = [self._client_json(upload) for upload in self.uploads]
        return values

    def _client_json(self, upload: UploadRecord) -> dict[str, Any]:
        """Return what `rounds.jsonl` has of a client, with the bytes that went each way."""
        times_sent = len(self.initialized) + len(self.reinitialized)
        initial_bytes = self.initial_bytes // times_sent if times_sent else 0
        again = self.reinitialized.count(upload.client)
        initial = again + (upload.client in self.initialized)
        return {
            **upload.to_json(),
            "uplink_bytes": upload.uplink.total,
            "downlink_bytes": self.broadcast.total * (1 + again) + initial_bytes * initial,
        }


def weighted_mean(values: Sequence[float], weights: Sequence[int]) -> float | None:
    """Return the weighted mean, or None where the weights add to 0.

    Sums are exactly rounded, so the order does not matter.
    """
    total = sum(weights)
    if total == 0:
        return None
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / total


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyStop:
    """Leave a stage when the metric has not risen by `min_gain` for `patience` rounds.

    Args:
        source: `"off"`; `"validation"` for the clients' validation figures; `"test"` for the test
            set, which flatters a method and marks its results.
        min_gain: the least rise that counts.
        patience: rounds without one after which the stage is left.
    """

    source: str = "off"
    min_gain: float = 0.001
    patience: int = 5

    def __post_init__(self) -> None:
        check_choice("the early stop's source", self.source, ("off", "validation", "test"))
        if not is_count(self.patience):
            raise UsageError(f"patience is {self.patience}; allowed are numbers of rounds from 1")
        if not 0 <= self.min_gain < math.inf:
            raise UsageError(f"min_gain is {self.min_gain}; allowed are finite numbers from 0")


@dataclass(slots=True)
class StopWatch:
    """State of an early stop within a stage: the best metric and the rounds since it rose."""

    best: float | None = None
    rounds_since: int = 0

    def observe(self, metric: float | None, rule: EarlyStop) -> bool:
        """Take in a round's metric and say whether to leave the stage."""
        if metric is None:
            return False
        least = -math.inf if self.best is None else self.best + rule.min_gain
        if metric >= least and metric != self.best:  # NaN is no rise
            self.best, self.rounds_since = metric, 0
        else:
            self.rounds_since += 1
        return self.rounds_since >= rule.patience


@dataclass(slots=True)
class Progress:
    """Where a run stands between two rounds.

    `stage` is an index; uploads by block are the accepted ones of stage 1; `start` is the initial
    model's fingerprint in hexadecimal, where clients hold it already; aborted bytes are those
    since the last round that ended.
    """

    rounds: int = 0
    stage: int = 0
    stage_rounds: int = 0
    watch: StopWatch = field(default_factory=StopWatch)
    initialized: set[int] = field(default_factory=set)
    uploads_by_block: list[int] = field(default_factory=list)
    memory: dict[str, object] = field(default_factory=dict)
    start: str | None = None
    aborted_uplink: int = 0
    aborted_downlink: int = 0
