"""ClientPool: where the clients of a round are played, here or in worker processes.

Every client is played with one torch thread, so that a run has the same bytes with any number of
workers.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import count, islice
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from types import TracebackType
from typing import Protocol, Self

import torch

from fedobd._errors import FedOBDError, UsageError
from fedobd.sessions import Aggregator
from fedobd.simulation._client import ClientResult, ClientSetup, ClientTask, LocalClient
from fedobd.simulation._files import write_over
from fedobd.simulation._process import prepare_process
from fedobd.simulation._share import ShareTerms
from fedobd.simulation._worker import Worker, write_setup

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 4
"""How often clients are played before a round fails because their worker died each time."""

_PREFIX = "fedobd-pool-"

_AHEAD = 2
# Groups of clients that a worker has, so that it need not wait for the next one. Those with states
# come singly: two ends that both write more than a pipe holds would wait for each other.

Group = list[ClientTask]


class ClientPool(Protocol):
    """Plays the clients of a round; a context manager that holds its processes."""

    def run(
        self, tasks: Iterable[ClientTask], aggregator: Aggregator | None = None
    ) -> Iterator[ClientResult]:
        """Yield the results in whatever order they come.

        Args:
            tasks: of one round.
            aggregator: the server's. With it a pool may take uploads in where they are made; it
                has them once the last result was yielded, and those results come without.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def open_pool(setup: ClientSetup, workers: int = 0) -> ClientPool:
    """Return a pool.

    Args:
        setup: what the clients share.
        workers: worker processes; 0 plays the clients in this process.

    Raises:
        UsageError: the number is negative.
    """
    check_workers(workers)
    return ProcessPool(setup, workers) if workers else SequentialPool(setup)


def check_workers(workers: int) -> None:
    """Raise UsageError for a negative number of worker processes."""
    if workers < 0:
        raise UsageError(f"workers is {workers}; allowed are whole numbers from 0")


class _SingleThread:
    """While open, torch has one thread in this process; then as many as before."""

    def __enter__(self) -> Self:
        self._threads = torch.get_num_threads()
        prepare_process()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        torch.set_num_threads(self._threads)


class SequentialPool(_SingleThread):
    """Plays the clients in this process; while open, torch has one thread here.

    Args:
        setup: what the clients share.
    """

    def __init__(self, setup: ClientSetup) -> None:
        self._setup = setup
        self._client = LocalClient(setup)

    def run(
        self, tasks: Iterable[ClientTask], aggregator: Aggregator | None = None
    ) -> Iterator[ClientResult]:
        """See `ClientPool.run`; uploads come with the results."""
        self._client.begin()
        for group in _groups(tasks, self._setup.stack):
            yield from self._client.run(group)


class ProcessPool(_SingleThread):
    """Plays the clients in worker processes with one torch thread each.

    A worker that dies is replaced, and what it had in hand is played again: with the same bytes,
    since nothing of a client depends on where and when it is played.

    Args:
        setup: what the clients share; sent to each worker once.
        workers: how many processes, at least 1.
    """

    def __init__(self, setup: ClientSetup, workers: int) -> None:
        self._setup = setup
        self._count = workers
        self._workers: list[Worker] = []
        self._files: list[Path] = []
        self._round = 0
        self._setup_folder = _make_folder(Path(gettempdir()))
        self._setup_file = Path(self._setup_folder.name) / "setup"
        write_setup(setup, self._setup_file)
        self._folder = _make_folder(_memory(setup, workers))
        self._names = (Path(self._folder.name) / str(number) for number in count())

    def run(
        self, tasks: Iterable[ClientTask], aggregator: Aggregator | None = None
    ) -> Iterator[ClientResult]:
        """See `ClientPool.run`.

        Raises:
            FedOBDError: the worker of some clients died `MAX_ATTEMPTS` times.
        """
        self._round += 1
        files = self._round_files()
        share = None
        if aggregator is not None:
            share = ShareTerms.write(aggregator, next(files))
        coming = _groups(_with_files(tasks, files), self._setup.stack)
        played: set[int] = set()
        waiting = deque(islice(coming, 1))
        attempts: dict[int, int] = {}
        self._dismiss_busy()
        while len(self._workers) < self._count:
            self._workers.append(Worker(self._setup_file, next(self._names)))
        for worker in self._workers:
            worker.begin()
        while waiting or any(worker.groups for worker in self._workers):
            for ahead in range(_AHEAD):
                for worker in self._workers:
                    if (
                        waiting
                        and len(worker.groups) <= ahead
                        and (ahead == 0 or all(task.state is None for task in waiting[0]))
                    ):
                        worker.send(self._round, waiting.popleft(), share)
                        waiting.extend(islice(coming, 0 if waiting else 1))
            ready = wait([worker.connection for worker in self._workers if worker.groups])
            for worker in [w for w in self._workers if w.connection in ready]:
                results = worker.receive()
                if results is not None:
                    new = [result for result in results if result.client not in played]
                    played.update(result.client for result in new)
                    for result in new:
                        if aggregator is not None and result.outcome is not None:
                            aggregator.note(result.outcome)
                        yield result
                    continue
                lost, exit_code = list(worker.groups), worker.exit_status()
                worker.close()
                for task in lost[0]:
                    attempts[task.client] = attempts.get(task.client, 0) + 1
                    if attempts[task.client] >= MAX_ATTEMPTS:
                        raise FedOBDError(
                            f"client {task.client}, round {task.plan.round}: the worker process "
                            f"that played it died {MAX_ATTEMPTS} times, with exit status "
                            f"{exit_code}"
                        )
                logger.warning(
                    "round %d: a worker process died with exit status %s and is replaced; its "
                    "clients are played again",
                    lost[0][0].plan.round,
                    exit_code,
                )
                waiting.extendleft(reversed([*lost, *worker.taken]))
                replacement = Worker(self._setup_file, next(self._names))
                self._workers[self._workers.index(worker)] = replacement
        if aggregator is not None:
            num_sums = Aggregator.num_sums(aggregator.method, aggregator.schema)
            for worker in self._workers:
                if worker.num_examples:
                    aggregator.merge(worker.sums(num_sums), worker.num_examples)

    def _dismiss_busy(self) -> None:
        """End the workers that still have clients of a round that was broken off."""
        for worker in self._workers:
            if worker.groups:
                worker.close()
        self._workers = [worker for worker in self._workers if not worker.groups]

    def _round_files(self) -> Iterator[Path]:
        """Yield files for what workers read in a round: those of the last one first.

        Whoever has read them has copies. Memory that is written over need not be made anew.
        """
        yield from self._files
        while True:
            self._files.append(next(self._names))
            yield self._files[-1]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            worker.stop()  # all of them, before one is waited for
        for worker in self._workers:
            worker.close()
        self._workers = []
        self._folder.cleanup()
        self._setup_folder.cleanup()
        super().__exit__(kind, error, trace)


def _with_files(tasks: Iterable[ClientTask], files: Iterator[Path]) -> Iterator[ClientTask]:
    """Yield tasks whose payloads lie in files, each once for all clients that share it."""
    stored: dict[int, tuple[bytes, Path]] = {}

    def store(payload: bytes | Path | None) -> Path | None:
        if not isinstance(payload, bytes):
            return payload
        if id(payload) not in stored:
            stored[id(payload)] = payload, next(files)
            write_over(stored[id(payload)][1], [payload])
        return stored[id(payload)][1]

    for task in tasks:
        broadcast, opening = store(task.broadcast), store(task.opening)
        assert broadcast is not None
        yield dataclasses.replace(task, broadcast=broadcast, opening=opening)


def _make_folder(base: Path) -> TemporaryDirectory[str]:
    """Make a folder, after removing those of processes that were killed before they could."""
    for folder in base.glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (ValueError, PermissionError):
            continue  # another's, or not of this kind
    return TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-", dir=base)


def _memory(setup: ClientSetup, workers: int) -> Path:
    """Return a folder in memory with room for the payloads under way; else the usual one."""
    folder = Path("/dev/shm")  # noqa: S108 - not a fixed name in it
    model = sum(spec.num_elements * spec.dtype.itemsize for spec in setup.schema.tensors)
    most = 4 * model * (2 + workers * (_AHEAD * setup.stack + 4))  # sums take up to 16 bytes
    has_room = folder.is_dir() and shutil.disk_usage(folder).free > most
    return folder if has_room and os.access(folder, os.W_OK) else Path(gettempdir())


def _groups(tasks: Iterable[ClientTask], size: int) -> Iterator[Group]:
    """Yield the tasks in groups that are played together."""
    source = iter(tasks)
    while group := list(islice(source, size)):
        yield group
