"""Arrays: examples from plain arrays in a file, those of an institution or the packaged digits."""

from __future__ import annotations

from importlib.resources import files
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

    Returns:
        Inputs of shape (n, ...) and targets of shape (n,) or (n, ...), as the arrays have them.

    Raises:
        UsageError: the file cannot be read, or lacks an array.
    """
    try:
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: torch.from_numpy(archive[name]) for name in archive.files}
    except Exception as error:  # damaged archives, and files that are none, raise many kinds
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


def load_digits() -> Examples:
    """Load the handwritten digits; `DIGITS_SOURCE.md` beside them names source and licence.

    Returns:
        1,797 examples: inputs float32, shape (1797, 1, 8, 8), in [-1, 1]; targets int64, shape
        (1797,), 0 to 9.
    """
    with (files("fedobd.data") / "digits.npz").open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        images = torch.from_numpy(archive["images"]).to(torch.float32)
        labels = torch.from_numpy(archive["labels"]).to(torch.int64)
    return Examples((images / 8 - 1).unsqueeze(1), labels)
