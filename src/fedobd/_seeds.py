"""Seeds: every random choice of a run follows from the run's seed and what the choice is for.

No global random state is read or set. A derived seed depends on neither the process nor the order
of calls, so a client's batches are the same whichever worker trains it, and a resumed run needs no
generator state.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """Derive an independent seed for one purpose.

    Args:
        seed: the run's seed, any integer.
        purpose: what the seed is for, such as `"cohort"` or `"train"`.
        numbers: what tells uses of one purpose apart, such as round and client.

    Returns:
        An integer in [0, 2^63), the same on every machine.

    Example:
        >>> derive_seed(0, "train", 1, 3) == derive_seed(0, "train", 1, 3)
        True
        >>> derive_seed(0, "train", 1, 3) == derive_seed(0, "train", 3, 1)
        False
    """
    text = "/".join([str(seed), purpose, *map(str, numbers)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def make_generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """Return a CPU generator seeded with `derive_seed` of the same arguments."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *numbers))
