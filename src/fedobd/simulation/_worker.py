"""Worker: a process that plays clients, as seen from the process that started it.

Payloads do not go through the pipe between the two, which copies them several times: they lie in
files of a folder that both see, in memory where there is room. What all clients share lies in a
file that every worker maps. PyTorch's own ways to share tensors are not used: one runs out of open
files, and the other's helper process dies of a Ctrl-C, after which it waits for ever.
"""

from __future__ import annotations

import dataclasses
import mmap
import multiprocessing
import os
import pickle
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from fedobd._errors import FedOBDError
from fedobd.simulation._client import (
    ClientResult,
    ClientSetup,
    ClientTask,
    LocalClient,
)
from fedobd.simulation._process import prepare_process

_STOP_SECONDS = 5.0
_PORTION_BYTES = 2**20  # of uploads that go back at once


class Worker:
    """A process that plays groups of clients, one after another.

    Args:
        setup: the file with what the clients share; see `write_setup`.
        file: where it leaves uploads; no other worker's.
    """

    def __init__(self, setup: Path, file: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._file = file
        self._process = context.Process(target=_work, args=(theirs, setup, file), daemon=True)
        self._process.start()
        theirs.close()
        self.groups: deque[list[ClientTask]] = deque()
        """What it has been sent and has not answered, in order."""

    def send(self, group: list[ClientTask]) -> None:
        """Have it play a group of clients."""
        self.groups.append(group)
        with suppress(OSError):  # it has died, which `receive` says
            _send(self.connection, group)

    def receive(self) -> list[ClientResult] | None:
        """Return the next results of its first group; None where it has died.

        Raises:
            FedOBDError: what playing the group has raised.
        """
        try:
            answer: _Portion | FedOBDError = _receive(self.connection)
        except (EOFError, OSError):
            return None
        if isinstance(answer, FedOBDError):
            raise answer
        if answer.is_last:
            self.groups.popleft()
        return answer.results(self._file)

    def exit_status(self) -> int | None:
        """Return the exit status of a process whose connection has ended; None if it hangs."""
        self._process.join(_STOP_SECONDS)
        return self._process.exitcode

    def stop(self) -> None:
        """Have the process end, without waiting for it."""
        self._process.terminate()

    def close(self) -> None:
        """End the process and wait until it has."""
        self.stop()
        self._process.join(_STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self.connection.close()


def write_setup(setup: ClientSetup, file: Path) -> None:
    """Write what the clients of a run share to a file, for workers to map."""
    torch.save(setup, file)


def _send(connection: Connection, value: object) -> None:
    connection.send_bytes(pickle.dumps(value))  # `send` would share tensors in PyTorch's ways


def _receive(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())  # noqa: S301 - from a process of this program


@dataclass(frozen=True, slots=True)
class _Portion:
    """Some results of a group, which the worker has left in a file.

    Args:
        number: the file's number.
        bare: the results without their uploads.
        lengths: the uploads' lengths, in bytes.
        is_last: whether the group has no more.
    """

    number: int
    bare: list[ClientResult]
    lengths: list[int]
    is_last: bool

    @classmethod
    def write(
        cls, file: Path, number: int, results: Sequence[ClientResult], *, is_last: bool
    ) -> _Portion:
        """Leave results in a file."""
        with _numbered(file, number).open("wb") as stream:
            lengths = [stream.write(result.upload) for result in results]
        bare = [dataclasses.replace(result, upload=b"") for result in results]
        return cls(number, bare, lengths, is_last)

    def results(self, file: Path) -> list[ClientResult]:
        """Return them, and remove the file."""
        path = _numbered(file, self.number)
        with path.open("rb") as stream:
            whole = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        path.unlink()  # its bytes stay while something holds one of them
        ends = accumulate(self.lengths)
        return [
            dataclasses.replace(result, upload=whole[end - length : end])
            for result, length, end in zip(self.bare, self.lengths, ends, strict=True)
        ]


def _numbered(file: Path, number: int) -> Path:
    return file.with_name(f"{file.name}-{number}")


def _work(connection: Connection, setup: Path, file: Path) -> None:
    """Play groups until the connection ends; Ctrl-C is for the process that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prepare_process()
    if hasattr(os, "SCHED_BATCH"):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    client = LocalClient(torch.load(setup, mmap=True, weights_only=False))
    with suppress(EOFError, ConnectionError):  # the process that started this one is gone
        _play_groups(connection, client, file)


def _play_groups(connection: Connection, client: LocalClient, file: Path) -> None:
    numbers = count()
    while True:
        group = _receive(connection)
        try:
            for results, is_last in _portions(client.run(group), len(group)):
                portion = _Portion.write(file, next(numbers), results, is_last=is_last)
                _send(connection, portion)
        except ConnectionError:
            raise
        except FedOBDError as error:
            _send(connection, error)
        except Exception as error:
            _send(connection, FedOBDError(f"a worker failed: {error!r}"))


def _portions(
    results: Iterator[ClientResult], total: int
) -> Iterator[tuple[list[ClientResult], bool]]:
    """Yield results a megabyte or more at a time, and whether they are the last."""
    portion: list[ClientResult] = []
    for done, result in enumerate(results, start=1):
        portion.append(result)
        if done == total or sum(len(held.upload) for held in portion) >= _PORTION_BYTES:
            yield portion, done == total
            portion = []
