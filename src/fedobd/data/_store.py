"""StoredExamples: examples as two arrays on disk, which are mapped and read page by page.

What a data set becomes is written once, under a name that says what it was made of, and found
again by later runs and by every process of a run.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedobd._errors import UsageError
from fedobd.data._examples import Examples

_INPUTS, _TARGETS, _FACTS = "inputs.npy", "targets.npy", "facts.json"


class StoredExamples:
    """Examples in a folder; a set of any size takes no more memory than what is in use.

    Args:
        folder: where `store` has put them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Mode c copies the pages that are written to: a tensor cannot be read-only.
        self.inputs = torch.from_numpy(np.load(folder / _INPUTS, mmap_mode="c"))
        self.targets = torch.from_numpy(np.load(folder / _TARGETS))
        self.facts: dict[str, Any] = json.loads((folder / _FACTS).read_text(encoding="utf-8"))

    def __len__(self) -> int:
        return len(self.targets)

    def __reduce__(self) -> tuple[type[StoredExamples], tuple[Path]]:
        return StoredExamples, (self._folder,)  # another process maps the same file

    def take(self, indices: torch.Tensor) -> Examples:
        """See `ExampleSet.take`."""
        return Examples(self.inputs.index_select(0, indices), self.targets[indices])


def move_to(
    examples: Examples | StoredExamples, device: torch.device, *, most_bytes: int
) -> Examples | StoredExamples:
    """Return a set that lies on a device, so that no batch has to be brought there.

    Args:
        examples: the set.
        device: where to.
        most_bytes: a larger set stays where it is.
    """
    if examples.inputs.nbytes + examples.targets.nbytes > most_bytes:
        return examples
    return Examples(examples.inputs.to(device), examples.targets.to(device))


Contents = tuple[Iterator[NDArray[Any]], NDArray[np.int64], dict[str, Any]]
"""What is stored: the inputs, batch by batch and each batch of shape (m, ...), the targets, shape
(n,), and facts to keep beside them, as JSON values."""


def cache_folder() -> Path:
    """Return where prepared data sets are kept: `$FEDOBD_CACHE`, else the user's cache folder."""
    chosen = os.environ.get("FEDOBD_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedobd"


def stored(name: str, make: Callable[[], Contents]) -> StoredExamples:
    """Return the examples of this name, made if they are not there.

    Args:
        name: names what they are made of.
        make: makes them; the inputs are taken from it while they are written.

    Raises:
        UsageError: the cache cannot be read or written.
    """
    folder = cache_folder() / name
    with _using(folder.parent, "read"):
        is_there = (folder / _FACTS).exists()
    if not is_there:
        # Made under a name of its own and moved when it is whole: other processes may want the
        # same entry at the same time, and what is interrupted must not look like one.
        partial = folder.with_name(f"{name}-{uuid.uuid4().hex}")
        with _using(folder.parent, "written"):
            partial.mkdir(parents=True)
        try:
            _write(partial, *make())
            with _using(folder.parent, "written"):
                _move(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    with _using(folder.parent, "read"):
        return StoredExamples(folder)


@contextmanager
def _using(cache: Path, how: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"the cache {str(cache)!r} cannot be {how}: {error.strerror or error}; "
            "FEDOBD_CACHE names another folder"
        ) from error


def _write(
    folder: Path,
    batches: Iterator[NDArray[Any]],
    targets: NDArray[np.int64],
    facts: dict[str, Any],
) -> None:
    with _using(folder.parent, "written"):
        stream = (folder / _INPUTS).open("wb")
    row = 0
    try:  # not in a mapped file, where a full disk is no error but a signal
        for batch in batches:  # outside of _using: what fails in here is not the cache
            with _using(folder.parent, "written"):
                if row == 0:
                    header = np.lib.format.header_data_from_array_1_0(np.ascontiguousarray(batch))
                    header["shape"] = (len(targets), *batch.shape[1:])
                    np.lib.format.write_array_header_1_0(stream, header)
                stream.write(batch.tobytes())
            row += len(batch)
        with _using(folder.parent, "written"):
            stream.flush()
    finally:
        with suppress(OSError):  # of what could not be written, which was said
            stream.close()
    assert row == len(targets)
    with _using(folder.parent, "written"):
        np.save(folder / _TARGETS, targets)
        (folder / _FACTS).write_text(json.dumps(facts), encoding="utf-8")


def _move(made: Path, folder: Path) -> None:
    """Give a folder its name, unless another process was faster."""
    try:
        made.rename(folder)
    except OSError:
        if not (folder / _FACTS).exists():
            raise
