"""ClientPool: where the clients of a round run, here or in worker processes.

Every client runs with one torch thread, since the bits of a sum depend on how many threads share
it out: so a run has the same bytes with any number of workers.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from itertools import count, islice
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
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
"""How often clients run before a round fails because their worker died each time."""

_PREFIX = "fedobd-pool-"

_AHEAD = 2
"""Groups that a worker has at a time: the one it runs, and one so that it need not wait."""

Group = list[ClientTask]


class ClientPool(Protocol):
    """Runs the clients of a round; a context manager that holds its processes."""

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

    def __exit__(self, *error: object) -> None: ...


def open_pool(setup: ClientSetup, workers: int = 0) -> ClientPool:
    """Return a pool.

    Args:
        setup: what the clients share.
        workers: worker processes; 0 runs the clients in this process.

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

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self._threads)


class SequentialPool(_SingleThread):
    """Runs the clients in this process; while open, torch has one thread here.

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
    """Runs the clients in worker processes with one torch thread each.

    A worker that dies is replaced, and its clients run again: with the same bytes, since nothing
    of a client depends on where and when it runs.

    Payloads and sums lie in files of a folder in memory. Each file has one owner that removes it:
    the pool what it writes itself, a `Worker` object what its process has left, even when that has
    died. What neither could remove goes with the folder; and where this process is killed, with
    the next pool that is made (`_make_folder`).

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
        # Two folders: the setup holds the clients' data, which may be larger than free memory and
        # is read once; workers map it, so that its pages are in memory once for all of them.
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
        share = None if aggregator is None else ShareTerms.write(aggregator, next(files))
        backlog = _Backlog(_groups(_with_files(tasks, files), self._setup.stack))
        self._prepare_workers()
        finished: set[int] = set()
        while backlog or any(worker.groups for worker in self._workers):
            self._dispatch(backlog, share)
            for result in self._collect(backlog):
                # A client whose worker died later runs again, for the sums; it has been recorded.
                if result.client in finished:
                    continue
                finished.add(result.client)
                if aggregator is not None and result.outcome is not None:
                    aggregator.note(result.outcome)
                yield result
        # Not before all are done: a worker that dies takes its sums with it.
        if aggregator is not None:
            num_sums = Aggregator.num_sums(aggregator.method, aggregator.schema)
            for worker in self._workers:
                if worker.num_examples:
                    aggregator.merge(worker.sums(num_sums), worker.num_examples)

    def _prepare_workers(self) -> None:
        """Have as many idle workers as there should be.

        One that still runs clients of a round that was broken off is ended: what it would send
        back belongs to no round, and it would be waited for.
        """
        for worker in self._workers:
            if worker.groups:
                worker.close()
        self._workers = [worker for worker in self._workers if not worker.groups]
        while len(self._workers) < self._count:
            self._workers.append(self._start_worker())
        for worker in self._workers:
            worker.begin()

    def _start_worker(self) -> Worker:
        return Worker(self._setup_file, next(self._names))

    def _dispatch(self, backlog: _Backlog, share: ShareTerms | None) -> None:
        """Send groups to workers that have room; every worker has one before any has two."""
        for ahead in range(_AHEAD):
            for worker in self._workers:
                group = backlog.first()
                if group is None:
                    return
                # Two ends that both write more than a pipe holds would wait for each other. A task
                # with a state may be that large, so its worker must be idle, which means: reading.
                if len(worker.groups) <= ahead and (ahead == 0 or not _has_state(group)):
                    backlog.remove_first()
                    worker.send(self._round, group, share)

    def _collect(self, backlog: _Backlog) -> Iterator[ClientResult]:
        """Wait for workers and yield what they send back; replace those that have died."""
        ready = wait([worker.connection for worker in self._workers if worker.groups])
        for worker in [worker for worker in self._workers if worker.connection in ready]:
            results = worker.receive()
            if results is None:
                self._replace(worker, backlog)
            else:
                yield from results

    def _replace(self, worker: Worker, backlog: _Backlog) -> None:
        """Start a worker in place of one that died; its clients go back to the backlog."""
        exit_status = worker.exit_status()
        worker.close()
        died_of, *queued = worker.groups
        backlog.count_failure(died_of, exit_status)
        logger.warning(
            "round %d: a worker process died with exit status %s and is replaced; its clients "
            "run again",
            died_of[0].plan.round,
            exit_status,
        )
        backlog.put_first([died_of, *queued, *worker.accumulated])
        self._workers[self._workers.index(worker)] = self._start_worker()

    def _round_files(self) -> Iterator[Path]:
        """Yield files for what workers read in a round: those of the last one first.

        Whoever has read them has copies. Memory that is written over need not be made anew: a new
        file's pages would each cost a fault, and be set to 0 first.
        """
        yield from self._files
        while True:
            self._files.append(next(self._names))
            yield self._files[-1]

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.stop()  # all of them, before one is waited for: they end side by side
        for worker in self._workers:
            worker.close()
        self._workers = []
        self._folder.cleanup()
        self._setup_folder.cleanup()
        super().__exit__(*error)


class _Backlog:
    """Groups of a round that no worker has.

    They are drawn from the round's tasks one at a time: a task holds what its client kept, which
    for all clients of a round need not fit into memory.
    """

    def __init__(self, groups: Iterator[Group]) -> None:
        self._groups = groups
        self._next: deque[Group] = deque()
        self._failures: Counter[int] = Counter()

    def __bool__(self) -> bool:
        return self.first() is not None

    def first(self) -> Group | None:
        """Return the next group, and leave it where it is; None where none is left."""
        if not self._next:
            self._next.extend(islice(self._groups, 1))
        return self._next[0] if self._next else None

    def remove_first(self) -> None:
        """Remove the group that `first` has returned."""
        self._next.popleft()

    def put_first(self, groups: list[Group]) -> None:
        """Put groups back, before all others."""
        self._next.extendleft(reversed(groups))

    def count_failure(self, group: Group, exit_status: int | None) -> None:
        """Note that a worker died of a group.

        Raises:
            FedOBDError: it was the last attempt.
        """
        for task in group:
            self._failures[task.client] += 1
            if self._failures[task.client] >= MAX_ATTEMPTS:
                raise FedOBDError(
                    f"client {task.client}, round {task.plan.round}: its worker process died "
                    f"{MAX_ATTEMPTS} times, with exit status {exit_status}"
                )


def _has_state(group: Group) -> bool:
    return any(task.state is not None for task in group)


def _with_files(tasks: Iterable[ClientTask], files: Iterator[Path]) -> Iterator[ClientTask]:
    """Yield tasks whose payloads lie in files, each once for all clients that share it."""
    # By identity, which costs nothing; the payload is kept, so that no other gets its number.
    stored: dict[int, tuple[bytes, Path]] = {}

    def store(payload: bytes | Path | None) -> Path | None:
        if not isinstance(payload, bytes):
            return payload
        if id(payload) not in stored:
            stored[id(payload)] = payload, next(files)
            write_over(stored[id(payload)][1], [payload])
        return stored[id(payload)][1]

    for task in tasks:
        broadcast, initial = store(task.broadcast), store(task.initial_payload)
        assert broadcast is not None
        yield dataclasses.replace(task, broadcast=broadcast, initial_payload=initial)


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
    # The server's values and the broadcast; for each worker the uploads of its groups, and sums,
    # which take up to 16 bytes an element. Four times as much, since a full /dev/shm is no error
    # that could be caught: who writes to its mapped memory is killed by SIGBUS.
    most = 4 * model * (2 + workers * (_AHEAD * setup.stack + 4))
    has_room = folder.is_dir() and shutil.disk_usage(folder).free > most
    return folder if has_room and os.access(folder, os.W_OK) else Path(gettempdir())


def _groups(tasks: Iterable[ClientTask], size: int) -> Iterator[Group]:
    """Yield the tasks in groups that run together."""
    source = iter(tasks)
    while group := list(islice(source, size)):
        yield group
