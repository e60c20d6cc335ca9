"""Worker: a process that plays clients, as seen from the process that started it.

Payloads do not go through the pipe between the two, which copies them several times: they lie in
files of a folder that both see, in memory where there is room.
"""

from __future__ import annotations

import dataclasses
import mmap
import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from fedobd._errors import FedOBDError
from fedobd.simulation._client import (
    ClientResult,
    ClientSetup,
    ClientTask,
    LocalClient,
    single_thread,
)

_STOP_SECONDS = 5.0


class Worker:
    """A process that plays groups of clients, one after another.

    Args:
        setup: what the clients share; sent once.
        file: where it leaves uploads; no other worker's.
    """

    def __init__(self, setup: ClientSetup, file: Path) -> None:
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
            self.connection.send(group)

    def receive(self) -> list[ClientResult] | None:
        """Return the results of its first group; None where it has died.

        Raises:
            FedOBDError: what playing the group has raised.
        """
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            return None
        if isinstance(answer, BaseException):
            raise answer
        self.groups.popleft()
        results, number, lengths = answer
        uploads = _read(_numbered(self._file, number), lengths)
        return [
            dataclasses.replace(result, upload=upload)
            for result, upload in zip(results, uploads, strict=True)
        ]

    def exit_status(self) -> int | None:
        """Return the exit status of a process whose connection has ended; None if it hangs."""
        self._process.join(_STOP_SECONDS)
        return self._process.exitcode

    def close(self) -> None:
        """End the process at once."""
        self._process.terminate()
        self._process.join(_STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self.connection.close()


def _work(connection: Connection, setup: ClientSetup, file: Path) -> None:
    """Play groups until the connection ends; Ctrl-C is for the process that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    single_thread()
    client = LocalClient(setup)
    number = 0
    while True:
        try:
            group = connection.recv()
        except EOFError:
            return
        number += 1
        answer: tuple[list[ClientResult], int, list[int]] | BaseException
        try:
            results = client.run(group)
            with _numbered(file, number).open("wb") as stream:
                lengths = [stream.write(result.upload) for result in results]
            bare = [dataclasses.replace(result, upload=b"") for result in results]
            answer = bare, number, lengths
        except FedOBDError as error:
            answer = error
        except Exception as error:
            answer = FedOBDError(f"a worker failed: {error!r}")
        connection.send(answer)


def _numbered(file: Path, number: int) -> Path:
    return file.with_name(f"{file.name}-{number}")


def _read(file: Path, lengths: Sequence[int]) -> Iterator[memoryview]:
    """Yield the payloads in a file, which goes away with the last view of its memory."""
    with file.open("rb") as stream:
        whole = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    file.unlink()
    start = 0
    for length in lengths:
        yield whole[start : start + length]
        start += length
