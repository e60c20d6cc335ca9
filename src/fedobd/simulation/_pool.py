"""ClientPool: where the clients of a round are played, here or in worker processes.

Every client is played with one torch thread, so that a run has the same bytes with any number of
workers.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Protocol, Self

import torch

from fedobd._errors import FedOBDError, UsageError
from fedobd.simulation._client import (
    ClientResult,
    ClientSetup,
    ClientTask,
    LocalClient,
    single_thread,
)


class ClientPool(Protocol):
    """Plays the clients of a round; a context manager that holds its processes."""

    def run(self, tasks: Iterable[ClientTask]) -> Iterator[ClientResult]:
        """Yield the results in whatever order they come."""
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
        single_thread()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        torch.set_num_threads(self._threads)


class SequentialPool(_SingleThread):
    """Plays the clients in this process, one after another; while open, torch has one thread here.

    Args:
        setup: what the clients share.
    """

    def __init__(self, setup: ClientSetup) -> None:
        self._client = LocalClient(setup)

    def run(self, tasks: Iterable[ClientTask]) -> Iterator[ClientResult]:
        """See `ClientPool.run`."""
        for task in tasks:
            yield self._client.run(task)


_worker_client: LocalClient | None = None
"""The one client of a worker process, made when the process starts."""


def _start_worker(setup: ClientSetup) -> None:
    global _worker_client
    single_thread()
    _worker_client = LocalClient(setup)


def _run_in_worker(task: ClientTask) -> ClientResult:
    assert _worker_client is not None
    return _worker_client.run(task)


class ProcessPool(_SingleThread):
    """Plays the clients in worker processes with one torch thread each.

    Args:
        setup: what the clients share; sent to each worker once.
        workers: how many processes, at least 1.
    """

    def __init__(self, setup: ClientSetup, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._executor = ProcessPoolExecutor(
            workers, mp_context=context, initializer=_start_worker, initargs=(setup,)
        )

    def run(self, tasks: Iterable[ClientTask]) -> Iterator[ClientResult]:
        """See `ClientPool.run`.

        Raises:
            FedOBDError: a worker process died.
        """
        pending: set[Future[ClientResult]] = {
            self._executor.submit(_run_in_worker, task) for task in tasks
        }
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            raise FedOBDError(f"a worker process died or could not start: {error}") from error
        finally:
            for future in pending:
                future.cancel()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
        super().__exit__(kind, error, trace)
