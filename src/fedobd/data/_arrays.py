"""Arrays: examples from one file of plain arrays, such as an institution keeps on its own disk."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from fedobd._errors import UsageError
from fedobd.data._examples import Examples


def load_arrays(path: str | Path) -> Examples:
    """Load examples from a `.npz` file of arrays; nothing is unpickled.

    Args:
        path: a file with the arrays `inputs` and `targets`, first dimension the examples. float64
            becomes float32, integers become int64.

    Raises:
        UsageError: the file cannot be read, or lacks an array.
    """
    try:
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: torch.from_numpy(archive[name]) for name in archive.files}
    except (
        OSError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UsageError(f"data file {str(path)!r} cannot be read: {error}") from error
    missing = [name for name in ("inputs", "targets") if name not in arrays]
    if missing:
        raise UsageError(
            f"data file {str(path)!r} holds {', '.join(sorted(arrays)) or 'no arrays'}; "
            f"{' and '.join(missing)} lacks"
        )
    empty = [name for name in ("inputs", "targets") if not sum(arrays[name].shape[:1])]
    if empty:
        raise UsageError(f"data file {str(path)!r}: {' and '.join(empty)} hold no examples")
    return Examples(_in_common_type(arrays["inputs"]), _in_common_type(arrays["targets"]))


def _in_common_type(array: torch.Tensor) -> torch.Tensor:
    if array.dtype == torch.float64:
        return array.to(torch.float32)
    return array if array.is_floating_point() else array.to(torch.int64)
