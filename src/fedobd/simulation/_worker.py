"""Worker: a process that plays clients, as seen from the process that started it.

Payloads do not go through the pipe between the two, which copies them several times: they lie in
files of a folder that both see, in memory where there is room. What all clients share lies in a
file that every worker maps. PyTorch's own ways to share tensors are not used: one runs out of open
files, and the other's helper process dies of a Ctrl-C, after which it waits for ever.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pickle
import signal
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fedobd._errors import FedOBDError
from fedobd._wire import Bytes
from fedobd.simulation._client import (
    ClientResult,
    ClientSetup,
    ClientTask,
    LocalClient,
    map_file,
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
    """Some results of a group, whose uploads the worker has left in a file.

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

    def results(self, file: Path) -> list[ClientResult]:
        """Return them, and remove the file; its bytes stay while something holds one of them."""
        path = _numbered(file, self.number)
        whole = map_file(path)
        path.unlink()
        ends = accumulate(self.lengths)
        return [
            dataclasses.replace(result, upload=whole[end - length : end])
            for result, length, end in zip(self.bare, self.lengths, ends, strict=True)
        ]


def _numbered(file: Path, number: int) -> Path:
    return file.with_name(f"{file.name}-{number}")


class _Outbox:
    """Leaves uploads in files of a megabyte or more, and sends off what else the results hold.

    Args:
        connection: to the process that wants them.
        file: see `Worker`.
    """

    def __init__(self, connection: Connection, file: Path) -> None:
        self._connection = connection
        self._file = file
        self._number = 0
        self._bare: list[ClientResult] = []
        self._lengths: list[int] = []
        self._stream: BinaryIO | None = None

    def write(self, chunks: list[Bytes]) -> bytes:
        """Write an upload; return what stands for it in its result."""
        if self._stream is None:
            self._stream = _numbered(self._file, self._number).open("wb")
        self._lengths.append(sum(map(self._stream.write, chunks)))
        return b""

    def add(self, result: ClientResult, *, is_last: bool) -> None:
        """Take the result whose upload was written, and send what there is once it is enough."""
        self._bare.append(result)
        if is_last or sum(self._lengths) >= _PORTION_BYTES:
            portion = _Portion(self._number, self._bare, self._lengths, is_last)
            self.clear()
            _send(self._connection, portion)

    def clear(self) -> None:
        """Begin the next file, whether or not the one at hand was sent."""
        if self._stream is not None:
            self._stream.close()
        self._number += 1
        self._bare, self._lengths, self._stream = [], [], None


def _work(connection: Connection, setup: Path, file: Path) -> None:
    """Play groups until the connection ends; Ctrl-C is for the process that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prepare_process()
    if hasattr(os, "SCHED_BATCH"):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    outbox = _Outbox(connection, file)
    client = LocalClient(torch.load(setup, mmap=True, weights_only=False), outbox.write)
    with suppress(EOFError, ConnectionError):  # the process that started this one is gone
        _play_groups(connection, client, outbox)


def _play_groups(connection: Connection, client: LocalClient, outbox: _Outbox) -> None:
    while True:
        group = _receive(connection)
        try:
            for done, result in enumerate(client.run(group), start=1):
                outbox.add(result, is_last=done == len(group))
        except ConnectionError:
            raise
        except FedOBDError as error:
            outbox.clear()
            _send(connection, error)
        except Exception as error:
            outbox.clear()
            _send(connection, FedOBDError(f"a worker failed: {error!r}"))
