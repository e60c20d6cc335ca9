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
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from tempfile import gettempdir
from typing import Any, BinaryIO

import torch

from fedobd._errors import DecodeError, FedOBDError
from fedobd.payload import Bytes
from fedobd.sessions import Aggregator, Refusal, Sums, UploadRecord
from fedobd.simulation._client import ClientResult, ClientSetup, ClientTask, LocalClient
from fedobd.simulation._files import map_file, map_sums
from fedobd.simulation._process import prepare_process
from fedobd.simulation._share import ShareTerms

_STOP_SECONDS = 5.0
_LONGEST_FOLDER = 64  # of temporary files; a socket's path in it has at most 107 characters
_PORTION_BYTES = 2**20  # of uploads that go back at once


class Worker:
    """A process that plays groups of clients, one after another.

    Args:
        setup: the file with what the clients share; see `write_setup`.
        file: where it leaves uploads and sums; no other worker's.
    """

    def __init__(self, setup: Path, file: Path) -> None:
        self.taken: list[list[ClientTask]] = []
        """The groups of this round whose uploads it has taken in."""
        self.num_examples = 0
        """The weight of the uploads that it has taken in."""
        self._sums: Sums | None = None
        context = _context()
        self.connection, theirs = context.Pipe()
        self._file = file
        self._process = context.Process(target=_work, args=(theirs, setup, file), daemon=True)
        self._process.start()
        theirs.close()
        self.groups: deque[list[ClientTask]] = deque()
        """What it has been sent and has not answered, in order."""

    def begin(self) -> None:
        """Forget the last round."""
        self.taken, self.num_examples = [], 0

    def send(self, number: int, group: list[ClientTask], share: ShareTerms | None) -> None:
        """Have it play a group of clients, and take their uploads in where it has terms.

        The number tells rounds apart, even those that are played again.
        """
        self.groups.append(group)
        with suppress(OSError):  # it has died, which `receive` says
            _send(self.connection, (number, group, share))

    def sums(self, count: int) -> Sums:
        """Return the sums of what it has taken in, so many numbers."""
        if self._sums is None:
            self._sums = map_sums(_sums_of(self._file), count)
        return self._sums

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
        results = answer.results(self._file)
        for result in results:
            if isinstance(result.outcome, UploadRecord):
                self.num_examples += result.outcome.report.num_examples
        if answer.is_last:
            group = self.groups.popleft()
            if results[-1].outcome is not None:
                self.taken.append(group)
        return results

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
        _sums_of(self._file).unlink(missing_ok=True)


def _context() -> ForkServerContext | SpawnContext:
    """Return how workers are started.

    Where it can be done, they are forked from a process that has imported all they need and has
    no threads; elsewhere each imports it anew, which takes seconds. With a GPU they are not, since
    a process that is forked cannot use CUDA if anything has asked for devices before.
    """
    has_room = len(gettempdir()) <= _LONGEST_FOLDER
    if sys.platform != "linux" or not has_room or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fedobd.simulation._preload"])
    return context


def write_setup(setup: ClientSetup, file: Path) -> None:
    """Write what the clients of a run share to a file, for workers to map."""
    torch.save(setup, file)


def _send(connection: Connection, value: object) -> None:
    connection.send_bytes(pickle.dumps(value))  # `send` would share tensors in PyTorch's ways


def _receive(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())  # noqa: S301 - from a process of this program


@dataclass(frozen=True, slots=True)
class _Portion:
    """Some results of a group, whose uploads the worker has left in a file or taken in.

    Args:
        number: the file's number.
        bare: the results without their uploads.
        lengths: the uploads' lengths in the file, in bytes; none where they were taken in.
        is_last: whether the group has no more.
    """

    number: int
    bare: list[ClientResult]
    lengths: list[int]
    is_last: bool

    def results(self, file: Path) -> list[ClientResult]:
        """Return them, and remove the file; its bytes stay while something holds one of them."""
        if not self.lengths:
            return self.bare
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


def _sums_of(file: Path) -> Path:
    return file.with_name(f"{file.name}-sums")


class _Outbox:
    """Takes uploads in, or leaves them in files of a megabyte or more; sends off the results.

    Args:
        connection: to the process that wants the results.
        setup: what the clients of the run share.
        file: see `Worker`.
    """

    def __init__(self, connection: Connection, setup: ClientSetup, file: Path) -> None:
        self._connection = connection
        self._setup = setup
        self._file = file
        self._share: ShareTerms | None = None
        self._intake: Aggregator | None = None
        self._number = 0
        self._bare: list[ClientResult] = []
        self._lengths: list[int] = []
        self._stream: BinaryIO | None = None

    def begin(self, share: ShareTerms | None) -> None:
        """In this round take uploads in on these terms; on none they are left in files."""
        self._share, self._intake = share, None

    def _open(self, share: ShareTerms) -> Aggregator:
        """Return the round's aggregator, made when the first client has been trained."""
        if self._intake is None:
            method, schema = self._setup.method, self._setup.schema
            memory = map_sums(_sums_of(self._file), Aggregator.num_sums(method, schema))
            self._intake = share.open(method, schema, memory)
        return self._intake

    def join(self, chunks: Sequence[Bytes]) -> bytes:
        """Return an upload of its chunks, or write it and return what stands for it."""
        if self._share is not None:
            return b"".join(chunks)
        if self._stream is None:
            self._stream = _numbered(self._file, self._number).open("wb")
        self._lengths.append(sum(map(self._stream.write, chunks)))
        return b""

    def add(self, result: ClientResult, *, is_last: bool) -> None:
        """Take the result whose upload was joined, and send what there is once it is enough."""
        if self._share is not None:
            result = _taken(self._open(self._share), result)
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


def _taken(aggregator: Aggregator, result: ClientResult) -> ClientResult:
    """Return a result with what came of its upload in place of that."""
    assert result.upload is not None
    began = time.perf_counter()
    outcome: UploadRecord | Refusal
    try:
        outcome = aggregator.receive(result.client, result.upload)
    except DecodeError:
        outcome = aggregator.refusals[-1]
    seconds = {**result.seconds, "fold": time.perf_counter() - began}
    return dataclasses.replace(result, upload=None, seconds=seconds, outcome=outcome)


def _work(connection: Connection, setup: Path, file: Path) -> None:
    """Play groups until the connection ends; Ctrl-C is for the process that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prepare_process()
    if hasattr(os, "SCHED_BATCH"):
        with suppress(OSError):  # not allowed; it only makes fewer switches
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    shared: ClientSetup = torch.load(setup, mmap=True, weights_only=False)
    outbox = _Outbox(connection, shared, file)
    client = LocalClient(shared, outbox.join)
    with suppress(EOFError, ConnectionError):  # the process that started this one is gone
        _play_groups(connection, client, outbox)


def _play_groups(connection: Connection, client: LocalClient, outbox: _Outbox) -> None:
    current = None
    while True:
        number, group, share = _receive(connection)
        if number != current:
            current = number
            client.begin()
            outbox.begin(share)
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
