"""Files that processes share: payloads, values and sums, in memory where there is room."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fedobd.payload import Bytes
from fedobd.sessions import Sums


def map_file(path: Path) -> memoryview:
    """Return the bytes of a file, which stay when it is removed.

    Without a copy, and until the last view of them is gone.
    """
    with path.open("rb") as stream:
        return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))


def write_over(file: Path, chunks: Iterable[Bytes]) -> None:
    """Write a file where another may stand, whose memory is then used again."""
    with file.open("r+b" if file.exists() else "wb") as stream:
        stream.truncate(sum(map(stream.write, chunks)))


def map_sums(file: Path, count: int) -> Sums:
    """Return sums in a file, int64, shape (count,), all 0 where it is made for them.

    Whoever maps the file sees the same numbers, and may change them.
    """
    length = max(1, count) * np.dtype(np.int64).itemsize  # nothing cannot be mapped
    with file.open("a+b") as stream:
        stream.truncate(length)
        return np.frombuffer(mmap.mmap(stream.fileno(), length), np.int64, count)
