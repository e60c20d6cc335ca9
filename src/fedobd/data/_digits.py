"""Digits: 1,797 real images of handwritten digits that come with the package."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import torch

from fedobd.data._examples import Examples


def load_digits() -> Examples:
    """Load the handwritten digits; `DIGITS_SOURCE.md` beside them names source and licence.

    Returns:
        1,797 examples: inputs float32, shape (1797, 1, 8, 8), in [-1, 1]; targets int64, 0 to 9.
    """
    with (files("fedobd.data") / "digits.npz").open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        images = torch.from_numpy(archive["images"]).to(torch.float32)
        labels = torch.from_numpy(archive["labels"]).to(torch.int64)
    return Examples((images / 8 - 1).unsqueeze(1), labels)
