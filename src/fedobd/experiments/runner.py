"""Runner: one run of one method with one seed, from configuration to summary."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

from fedobd._errors import UsageError
from fedobd.blocks import ModelState
from fedobd.experiments._build import Experiment, build_experiment
from fedobd.experiments._tune import measure_stack
from fedobd.experiments.config import RunConfig
from fedobd.experiments.folder import (
    CONFIG_FILE,
    SCHEMA_FILE,
    SUMMARY_FILE,
    RunFolder,
    claim_folder,
)
from fedobd.payload import Kind
from fedobd.sessions import Broadcast, RoundPlan, ServerSession
from fedobd.simulation import (
    ClientStates,
    PlayedRound,
    Watcher,
    check_workers,
    open_pool,
    simulate,
)
from fedobd.tracking import (
    log_round,
    log_summary,
    log_to_file,
    make_trackers,
    starvation_warning,
    starved_blocks,
)

logger = logging.getLogger(__name__)

LOG = "run.log"

OVERHEAD_PHASES = ("broadcast", "fold", "mean", "decode", "encode")
"""Phases of a round that are the core's own work, in the seconds of a record."""


class Engine(Protocol):
    """Plays the remaining rounds of a run, wherever its clients are."""

    def __call__(
        self,
        experiment: Experiment,
        server: ServerSession,
        *,
        should_evaluate: Callable[[RoundPlan], bool],
        states: ClientStates,
        watcher: Watcher,
    ) -> Iterator[PlayedRound]:
        """Yield each round when it has ended; see `fedobd.simulation.simulate`."""
        ...


class Observer(Protocol):
    """Sees a run as it goes.

    A run that goes on, or has ended before, shows the rounds that lie behind it first.
    """

    def begin_run(self, config: RunConfig, planned_rounds: int, folder: Path) -> None:
        """A run begins or goes on."""
        ...

    def client_done(self, plan: RoundPlan, done: int) -> None:
        """A client of the round has uploaded."""
        ...

    def end_round(self, record: dict[str, Any]) -> None:
        """A round has ended, or was read from the run folder."""
        ...

    def end_run(self, summary: Summary) -> None:
        """The run has ended."""
        ...


class _Observers:
    """Several observers, as one."""

    def __init__(self, members: Sequence[Observer]) -> None:
        self._members = members

    def begin_run(self, config: RunConfig, planned_rounds: int, folder: Path) -> None:
        for member in self._members:
            member.begin_run(config, planned_rounds, folder)

    def client_done(self, plan: RoundPlan, done: int) -> None:
        for member in self._members:
            member.client_done(plan, done)

    def end_round(self, record: dict[str, Any]) -> None:
        for member in self._members:
            member.end_round(record)

    def end_run(self, summary: Summary) -> None:
        for member in self._members:
            member.end_run(summary)


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
        downlink_bytes: all broadcasts and openings.
        total_bytes: both.
        uplink_nominal_bits: accepted uploads by the papers' formula.
        downlink_nominal_bits: broadcasts and openings by it.
        shares: of all bytes but refused uploads', what headers, levels, raw values and buffers
            take, by direction.
        delivery_bytes: the trained model's delivery to all clients, counted in no total.
        never_uploaded: blocks that no client uploaded in stage 1: name, parameters, share of the
            parameters.
        refusals: refused uploads, and clients that a deployment went on without.
        stops_on_test: whether the test set decided when to stop, which flatters the result.
        seconds: wall-clock seconds by phase over all rounds; clients' phases overlap where there
            are workers.
        overhead: share of a round's time that the core's own work took; None where clients are
            played beside each other.
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


def run(
    config: RunConfig,
    path: Path,
    *,
    workers: int = 0,
    resume: bool = False,
    observer: Observer | None = None,
    engine: Engine | None = None,
) -> Summary:
    """Run a configuration to its end, or go on with a run that was cut off.

    What the run says is appended to `run.log` in its folder, and its figures go to the trackers
    of `output.trackers`; results depend on neither.

    Args:
        config: what to run.
        path: the run folder.
        workers: worker processes; 0 for none. The results do not depend on it.
        resume: go on from the folder's checkpoint.
        observer: sees the run as it goes.
        engine: plays the rounds; None for the clients on this machine.

    Raises:
        UsageError: the configuration cannot be run, the folder holds another run, or another
            process works on it, or a tracker cannot be used.
        EmptyRoundError: no upload of a round was accepted.
    """
    check_workers(workers)
    one_at_a_time = engine is None and workers == 0
    engine = engine or partial(_play_here, workers=workers)
    trackers = make_trackers(config.output.trackers, config.output.tracking_uri)
    experiment = build_experiment(config, workers)
    server = ServerSession(
        experiment.method,
        experiment.schema,
        experiment.initial,
        num_clients=config.federation.clients,
        seed=config.federation.seed,
        max_examples=config.federation.max_examples,
        shared_start=config.federation.shared_start,
    )
    folder = RunFolder(path)
    claim_folder(path, CONFIG_FILE, resume=resume)
    if config.simulation.stack == "auto":
        known = (folder.config() or {}).get("simulation", {})
        found = known.get("stack") or measure_stack(experiment, server)
        config = config.with_stack(found)
        setup = dataclasses.replace(experiment.setup, stack=found)
        experiment = dataclasses.replace(experiment, setup=setup)
    folder.start(config.to_resume(folder.config()), resume=resume)
    with ExitStack() as stack:
        stack.enter_context(folder.locked())
        stack.enter_context(log_to_file(path / LOG))
        for tracker in trackers:
            stack.enter_context(closing(tracker))
        observers = _Observers([*([observer] if observer is not None else []), *trackers])
        observers.begin_run(config, server.planned_rounds, path)
        _take_up(config, experiment, server, folder, workers)
        for record in folder.records():
            observers.end_round(record)
        if folder.is_finished:
            summary = read_summary(folder)
        else:
            _play(config, experiment, server, folder, engine, observers)
            summary = _finish(config, experiment, server, folder, one_at_a_time)
        observers.end_run(summary)
    return summary


def _take_up(
    config: RunConfig,
    experiment: Experiment,
    server: ServerSession,
    folder: RunFolder,
    workers: int,
) -> None:
    """Bring server and folder to where the run stands."""
    logger.info(
        "fedobd %s: method %s, seed %d, at most %d rounds",
        version("fedobd"),
        config.method,
        config.federation.seed,
        server.planned_rounds,
    )
    if folder.is_finished:
        logger.info("has ended before")
        return
    saved = folder.load_checkpoint()
    if saved is not None:
        server.restore(saved)
        logger.info("goes on after round %d", server.rounds)
    folder.cut_records(server.rounds)
    folder.write_json(SCHEMA_FILE, experiment.schema.to_json())
    folder.write_json("environment.json", _environment(workers, experiment.setup.device))


def _play(
    config: RunConfig,
    experiment: Experiment,
    server: ServerSession,
    folder: RunFolder,
    engine: Engine,
    observer: Observer,
) -> None:
    every = config.output.evaluate_every
    watcher = Watcher(
        on_payload=folder.write_payload if config.output.keep_payloads else None,
        on_client=observer.client_done,
    )
    if server.is_finished:
        return
    rounds = engine(
        experiment,
        server,
        should_evaluate=lambda plan: plan.round % every == 0,
        states=folder,
        watcher=watcher,
    )
    for played in rounds:
        record = make_record(played)
        folder.append_record(record)
        folder.save_checkpoint(server.save())
        log_round(record, server.planned_rounds)
        observer.end_round(record)


def _play_here(
    experiment: Experiment,
    server: ServerSession,
    *,
    should_evaluate: Callable[[RoundPlan], bool],
    states: ClientStates,
    watcher: Watcher,
    workers: int,
) -> Iterator[PlayedRound]:
    """Play the clients on this machine."""
    with open_pool(experiment.setup, workers) as pool:
        yield from simulate(
            server,
            pool,
            evaluate=experiment.evaluate_part,
            should_evaluate=should_evaluate,
            states=states,
            watcher=watcher,
        )


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


def make_record(played: PlayedRound) -> dict[str, Any]:
    """Return a round's line of rounds.jsonl; only `seconds` depends on the clock."""
    values = played.record.to_json()
    clients = values.pop("clients")
    return {
        **values,
        "test_loss": _finite(played.test.loss) if played.test else None,
        "test_metric": _finite(played.test.metric) if played.test else None,
        "clients": clients,
        "seconds": {name: round(spent, 6) for name, spent in sorted(played.seconds.items())},
    }


def _finite(figure: float) -> float | None:
    """Return a figure of a test, None for one that is no number, which JSON cannot hold."""
    if math.isfinite(figure):
        return figure
    logger.warning("a test ended with %s, which is recorded as not measured", figure)
    return None


BYTE_PARTS = ("header", "levels", "raw", "buffers")
"""What the bytes of a payload are for."""


def _finish(
    config: RunConfig,
    experiment: Experiment,
    server: ServerSession,
    folder: RunFolder,
    one_at_a_time: bool,
) -> Summary:
    delivery = server.delivery().data
    received = Broadcast.decode(delivery, experiment.method, experiment.schema, Kind.DELIVERY)
    held = {**server.state, **received.values}
    test = experiment.evaluate
    final = of_held = _finite(test(server.state).metric) if test else None
    if test and not _are_equal(held, server.state):
        of_held = _finite(test(held).metric)
    records = folder.records()
    starved = starved_blocks(records, experiment.schema)
    metrics = [m for m in (*(r["test_metric"] for r in records), final) if m is not None]
    uplink_bytes = sum(r["uplink_bytes"] for r in records)
    downlink_bytes = sum(r["downlink_bytes"] for r in records)
    seconds: dict[str, float] = defaultdict(float)
    for record in records:
        for phase, spent in record["seconds"].items():
            seconds[phase] += spent
    overhead = sum(seconds[phase] for phase in OVERHEAD_PHASES) / seconds["round"]
    summary = Summary(
        method=config.method,
        seed=config.federation.seed,
        rounds=server.rounds,
        final_metric=final,
        best_metric=max(metrics, default=None),
        broadcast_metric=of_held,
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
            {"block": own.block, "parameters": own.parameters, "share": own.share}
            for own in starved
            if own.uploads == 0
        ),
        rarely_uploaded=tuple(dataclasses.asdict(own) for own in starved if own.uploads > 0),
        refusals=sum(len(r["refusals"]) for r in records),
        stops_on_test=experiment.method.stop.source == "test",
        seconds={phase: round(spent, 3) for phase, spent in sorted(seconds.items())},
        overhead=overhead if one_at_a_time else None,
    )
    folder.write_model(server.state)
    folder.write_json(SUMMARY_FILE, dataclasses.asdict(summary))
    warning = starvation_warning(experiment.method, {config.federation.seed: starved})
    if warning is not None:
        logger.warning(warning)
    log_summary(dataclasses.asdict(summary))
    return summary


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


def _environment(workers: int, device: str) -> dict[str, Any]:
    packages = ("fedobd", "torch", "numpy", "zstandard", "safetensors", "pydantic")
    return {
        "python": sys.version.split()[0],
        "packages": {name: version(name) for name in packages},
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "cuda": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "workers": workers,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
