"""Run: what a run folder says of one run, as plain data.

All figures are those of summary.json and rounds.jsonl. A run that has not finished has no
summary; its figures are those of the rounds that have ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from fedobd._errors import UsageError
from fedobd.blocks import ModelSchema
from fedobd.experiments import (
    BYTE_PARTS,
    CONFIG_FILE,
    MODEL_FILE,
    ROUNDS_FILE,
    SCHEMA_FILE,
    SUMMARY_FILE,
    RunConfig,
    RunFolder,
    load_config,
)
from fedobd.tracking import RareBlock, rare_blocks

Record = dict[str, Any]
"""One line of rounds.jsonl."""

Values = NDArray[np.float64]

ENVIRONMENT = "environment.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockBits:
    """Bits for each parameter of each block, shape (blocks,); NaN where there are none.

    Args:
        real: of what was coded.
        nominal: of the same by the papers' formula.
        levels: mean number of levels s, over all payloads.
        entropy: of levels, each tensor by the frequencies of its own, taken one by one; the
            tables of frequencies are not counted.
    """

    real: Values
    nominal: Values
    levels: Values | None = None
    entropy: Values | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficByBlock:
    """What blocks took in one direction; every array has the shape (rounds, blocks).

    Args:
        payloads: payloads that held the block.
        num_bytes: bytes of its frames in them.
        nominal_bits: their bits by the papers' formula.
        levels: mean number of levels s; 0 where nothing was quantized.
    """

    payloads: Values
    num_bytes: Values
    nominal_bits: Values
    levels: Values

    def bits(self, schema: ModelSchema) -> BlockBits:
        """Return what a parameter of each block took, a mean over the payloads that held it."""
        sizes = [block.num_parameters for block in schema.blocks]
        elements = _or_nan(self.payloads.sum(axis=0) * sizes)
        quantized = np.where(self.levels > 0, self.payloads, 0)
        return BlockBits(
            real=8 * self.num_bytes.sum(axis=0) / elements,
            nominal=self.nominal_bits.sum(axis=0) / elements,
            levels=(self.levels * quantized).sum(axis=0) / _or_nan(quantized.sum(axis=0)),
        )


def _or_nan(counts: Values) -> Values:
    """Return counts to divide by, NaN for those of nothing."""
    return np.where(counts == 0, np.nan, counts)


@checked_dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round that has ended.

    Args:
        number: from 1.
        cohort: clients that were asked.
        clients: clients whose upload was accepted.
        broadcasts: broadcasts that went down: one a client, and those that were sent again.
        downlink_bytes: all broadcasts and initial payloads.
        uplink_parts: bytes by what they are for, as in `downlink_parts`.
        test_metric: of the server's model; None where it was not tested.
        train_s: training time, mean over the clients; None where it was not measured.
    """

    number: int
    stage: int
    cohort: int
    clients: int
    broadcasts: int
    uplink_bytes: int
    downlink_bytes: int
    uplink_parts: dict[str, int]
    downlink_parts: dict[str, int]
    test_metric: float | None
    train_s: float | None


@checked_dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What came of a run, or of its rounds so far.

    Args:
        final_metric: of the server's model after the last round; None where it was not tested.
        best_metric: the best of all rounds.
        refusals: clients that were left out, and refused uploads.
        round_s: wall-clock seconds of all rounds.
        stops_on_test: whether the test set decided when to stop.
    """

    final_metric: float | None
    best_metric: float | None
    uplink_bytes: int
    downlink_bytes: int
    refusals: int
    round_s: float
    stops_on_test: bool

    @property
    def total_bytes(self) -> int:
        """Bytes of both directions."""
        return self.uplink_bytes + self.downlink_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run.

    Args:
        name: what it is called in the report.
        toml: its configuration as it stands in the folder.
        rounds: the rounds that have ended, at least one.
        uploads: how many clients uploaded each block, shape (rounds, blocks).
        rare_blocks: blocks that were never or rarely uploaded in stage 1.
        differences: mean block difference over the clients of a round, the same shape; None where
            the method sends none.
        uplink: what each block took in accepted uploads.
        downlink: what each block took in one broadcast.
    """

    folder: Path
    name: str
    config: RunConfig
    toml: str
    environment: dict[str, Any]
    schema: ModelSchema
    rounds: tuple[Round, ...]
    uploads: Values
    rare_blocks: tuple[RareBlock, ...]
    differences: Values | None
    uplink: TrafficByBlock
    downlink: TrafficByBlock
    results: Results
    is_finished: bool

    @property
    def method(self) -> str:
        """The method's name."""
        return self.config.method

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.config.federation.seed

    @property
    def planned_rounds(self) -> int:
        """Rounds of all stages, if none is left early."""
        return sum(stage.rounds for stage in self.config.chosen.stages())

    @property
    def model_file(self) -> Path:
        """Where the trained model lies, once the run has finished."""
        return self.folder / MODEL_FILE

    def in_stage(self, number: int) -> NDArray[np.bool_]:
        """Return which rounds are of a stage, shape (rounds,)."""
        return np.array([r.stage == number for r in self.rounds], bool)


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, and not a comparison or something else."""
    return (folder / CONFIG_FILE).is_file() and (folder / SCHEMA_FILE).is_file()


def read_run(folder: Path) -> Run | None:
    """Read a run folder; None where no round has ended yet."""
    try:
        return _read(RunFolder(folder))
    except UsageError as error:
        raise UsageError(f"run {str(folder)!r}: {error}") from error


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Name the file of a run folder in what goes wrong with it."""
    try:
        yield
    except FileNotFoundError as error:
        raise UsageError(f"{name} is missing, which `fedobd run` writes") from error
    except ValidationError as error:
        faults = (
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()
        )
        raise UsageError(f"{name} is damaged: {'; '.join(faults)}") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{name} is damaged: {type(error).__name__}: {error}") from error


def _read(stored: RunFolder) -> Run | None:
    with _reading(ROUNDS_FILE):
        records = stored.records()
    with _reading(SUMMARY_FILE):
        summary = stored.read_json(SUMMARY_FILE) if stored.is_finished else None
        if summary is not None and summary["rounds"] != len(records):
            raise UsageError(
                f"{ROUNDS_FILE} holds {len(records)} whole rounds, and {SUMMARY_FILE} is of "
                f"{summary['rounds']}"
            )
    if not records:
        return None
    with _reading(SCHEMA_FILE):
        schema = ModelSchema.from_json(stored.read_json(SCHEMA_FILE))
    with _reading(ENVIRONMENT):
        environment = stored.read_json(ENVIRONMENT)
        if not isinstance(environment, dict):
            raise TypeError(f"wanted an object, not {type(environment).__name__}")
        if not isinstance(environment.get("packages", {}), dict):
            raise TypeError("packages: wanted an object")
    with _reading(SUMMARY_FILE if summary else ROUNDS_FILE):
        results = _results(records, summary)
    with _reading(CONFIG_FILE):
        config = load_config(str(stored.path / CONFIG_FILE))
    with _reading(ROUNDS_FILE):
        num_blocks = len(schema.blocks)
        return Run(
            folder=stored.path,
            name=stored.path.name,
            config=config,
            toml=(stored.path / CONFIG_FILE).read_text(encoding="utf-8"),
            environment=environment,
            schema=schema,
            rounds=tuple(map(_round, records)),
            uploads=_uploads(records, num_blocks),
            rare_blocks=rare_blocks(records, schema),
            differences=_differences(records, num_blocks),
            uplink=_traffic(records, "uplink_blocks", num_blocks),
            downlink=_traffic(records, "broadcast_blocks", num_blocks),
            results=results,
            is_finished=summary is not None,
        )


def _round(record: Record) -> Round:
    clients = record["clients"]
    if not clients or not record["cohort"]:
        raise ValueError(f"round {record['round']} names no clients")
    broadcasts = len(record["cohort"]) + len(record["reopened"])
    up = {part: sum(c["uplink"][part] for c in clients) for part in BYTE_PARTS}
    up["refused or repeated"] = record["uplink_bytes"] - sum(up.values())
    down = {part: record["broadcast"][part] * broadcasts for part in BYTE_PARTS}
    down["initial payloads"] = record["opening_bytes"]
    down["refused or repeated"] = record["downlink_bytes"] - sum(down.values())
    train_s = record["seconds"].get("train")
    return Round(
        number=record["round"],
        stage=record["stage"],
        cohort=len(record["cohort"]),
        clients=len(clients),
        broadcasts=broadcasts,
        uplink_bytes=record["uplink_bytes"],
        downlink_bytes=record["downlink_bytes"],
        uplink_parts=up,
        downlink_parts=down,
        test_metric=record["test_metric"],
        train_s=None if train_s is None else train_s / len(clients),
    )


def _uploads(records: Sequence[Record], num_blocks: int) -> Values:
    counts = np.zeros((len(records), num_blocks))
    for row, record in zip(counts, records, strict=True):
        for client in record["clients"]:
            row[client["blocks_kept"]] += 1
    return counts


def _differences(records: Sequence[Record], num_blocks: int) -> Values | None:
    differences = [[c["block_differences"] for c in record["clients"]] for record in records]
    if any(values is None for clients in differences for values in clients):
        return None
    means = np.array([np.mean(clients, axis=0) for clients in differences])
    return _shaped(means, (len(records), num_blocks))


def _traffic(records: Sequence[Record], key: str, num_blocks: int) -> TrafficByBlock:
    names = [field.name for field in fields(TrafficByBlock)]  # those of the records
    rows = [[[block[name] for name in names] for block in record[key]] for record in records]
    values = np.array(rows, np.float64)
    shape = (len(records), num_blocks, len(names))
    columns = np.moveaxis(_shaped(values, shape), -1, 0)
    return TrafficByBlock(**dict(zip(names, columns, strict=True)))


def _shaped(values: Values, shape: tuple[int, ...]) -> Values:
    if values.shape != shape:
        raise ValueError(f"records name other blocks than the {shape[1]} of schema.json")
    return values


def _results(records: Sequence[Record], summary: Record | None) -> Results:
    if summary is not None:
        return Results(**summary, round_s=summary["seconds"]["round"])
    metrics = [r["test_metric"] for r in records if r["test_metric"] is not None]
    return Results(
        final_metric=metrics[-1] if metrics else None,
        best_metric=max(metrics, default=None),
        uplink_bytes=sum(r["uplink_bytes"] for r in records),
        downlink_bytes=sum(r["downlink_bytes"] for r in records),
        refusals=sum(len(r["refusals"]) for r in records),
        round_s=sum(r["seconds"]["round"] for r in records),
        stops_on_test=False,
    )
