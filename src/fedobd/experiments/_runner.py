"""Runner: one run of one method with one seed, from configuration to summary."""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

from fedobd.experiments._build import Experiment, build_experiment
from fedobd.experiments._config import RunConfig
from fedobd.experiments._folder import (
    CONFIG_FILE,
    SCHEMA_FILE,
    SUMMARY_FILE,
    PayloadFiles,
    RunFolder,
    claim_folder,
)
from fedobd.experiments._record import make_record
from fedobd.experiments._summary import Summary, read_summary, summarize
from fedobd.experiments._tune import measure_stack
from fedobd.sessions import RoundPlan, ServerSession
from fedobd.simulation import (
    Callback,
    Callbacks,
    ClientStates,
    RoundResult,
    check_workers,
    open_pool,
    simulate,
)
from fedobd.tracking import (
    RunLog,
    log_to_file,
    make_trackers,
    rare_blocks,
    rare_blocks_warning,
)

logger = logging.getLogger(__name__)

_LOG_FILE = "run.log"


class Engine(Protocol):
    """Runs the remaining rounds of a run, wherever its clients are."""

    def __call__(
        self,
        experiment: Experiment,
        server: ServerSession,
        *,
        should_evaluate: Callable[[RoundPlan], bool],
        states: ClientStates,
        callback: Callback,
    ) -> Iterator[RoundResult]:
        """Yield each round when it has ended; see `fedobd.simulation.simulate`."""
        ...


def run(
    config: RunConfig,
    path: Path,
    *,
    workers: int = 0,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
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
        callbacks: see the run as it goes.
        engine: runs the rounds; None for the clients on this machine.

    Raises:
        UsageError: the configuration cannot be run, the folder holds another run, or another
            process works on it, or a tracker cannot be used.
        EmptyRoundError: no upload of a round was accepted.
    """
    check_workers(workers)
    trackers = make_trackers(config.output.trackers, config.output.tracking_uri)
    # Whatever can be refused is refused before the folder is made.
    experiment = build_experiment(config, workers)
    server = _make_server(config, experiment)
    folder = RunFolder(path)
    claim_folder(path, CONFIG_FILE, resume=resume)
    if config.simulation.stack == "auto":
        config, experiment = _settle_stack(config, experiment, server, folder)
    folder.start(config.to_resume(folder.config()), resume=resume)
    with ExitStack() as stack:
        stack.enter_context(folder.locked())
        stack.enter_context(log_to_file(path / _LOG_FILE))
        for tracker in trackers:
            stack.enter_context(closing(tracker))
        log, shown = RunLog(), Callbacks([*callbacks, *trackers])
        watching = Callbacks([log, shown])
        watching.on_run_begin(config, server.planned_rounds, path)
        _take_up(experiment, server, folder, workers)
        for record in folder.records():
            shown.on_round_end(record)  # these rounds are in the log already
        if folder.is_finished:
            summary = read_summary(folder)
            shown.on_run_end(summary)
        else:
            rounds = engine or partial(_simulate, workers=workers)
            _run_rounds(config, experiment, server, folder, rounds, watching)
            summary = _finish(
                config, experiment, server, folder, one_at_a_time=not (engine or workers)
            )
            watching.on_run_end(summary)
    return summary


def _make_server(config: RunConfig, experiment: Experiment) -> ServerSession:
    federation = config.federation
    return ServerSession(
        experiment.method,
        experiment.schema,
        experiment.initial,
        num_clients=federation.clients,
        seed=federation.seed,
        max_examples=federation.max_examples,
        shared_start=federation.shared_start,
    )


def _settle_stack(
    config: RunConfig, experiment: Experiment, server: ServerSession, folder: RunFolder
) -> tuple[RunConfig, Experiment]:
    """Put a number in place of `simulation.stack = "auto"`.

    It is measured once: results depend on it in their last bits, so a run that is resumed takes
    what the folder says.
    """
    size = (folder.config() or {}).get("simulation", {}).get("stack")
    size = size or measure_stack(experiment, server)
    setup = dataclasses.replace(experiment.setup, stack=size)
    return config.with_stack(size), dataclasses.replace(experiment, setup=setup)


def _take_up(
    experiment: Experiment, server: ServerSession, folder: RunFolder, workers: int
) -> None:
    """Bring server and folder to where the run stands."""
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


def _run_rounds(
    config: RunConfig,
    experiment: Experiment,
    server: ServerSession,
    folder: RunFolder,
    engine: Engine,
    callback: Callback,
) -> None:
    if server.is_finished:  # killed between the last checkpoint and the summary
        return
    every = config.output.evaluate_every
    keeper = [PayloadFiles(folder)] if config.output.keep_payloads else []
    rounds = engine(
        experiment,
        server,
        should_evaluate=lambda plan: plan.round % every == 0,
        states=folder,
        callback=Callbacks([callback, *keeper]),
    )
    for result in rounds:
        record = make_record(result)
        # In this order: a record without its checkpoint is cut off on resume and its round run
        # again; a checkpoint without its record could not be mended.
        folder.append_record(record)
        folder.save_checkpoint(server.save())
        callback.on_round_end(record)


def _simulate(
    experiment: Experiment,
    server: ServerSession,
    *,
    should_evaluate: Callable[[RoundPlan], bool],
    states: ClientStates,
    callback: Callback,
    workers: int,
) -> Iterator[RoundResult]:
    """Run the clients on this machine."""
    with open_pool(experiment.setup, workers) as pool:
        yield from simulate(
            server,
            pool,
            evaluate=experiment.evaluate_part,
            should_evaluate=should_evaluate,
            states=states,
            callback=callback,
        )


def _finish(
    config: RunConfig,
    experiment: Experiment,
    server: ServerSession,
    folder: RunFolder,
    *,
    one_at_a_time: bool,
) -> Summary:
    records = folder.records()
    blocks = rare_blocks(records, experiment.schema)
    summary = summarize(config, experiment, server, records, one_at_a_time=one_at_a_time)
    folder.write_model(server.state)
    folder.write_json(SUMMARY_FILE, dataclasses.asdict(summary))  # last: it marks the end
    warning = rare_blocks_warning(experiment.method, {config.federation.seed: blocks})
    if warning is not None:
        logger.warning(warning)
    return summary


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
