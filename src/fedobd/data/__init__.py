"""Data: examples as tensors, shared out among clients."""

from __future__ import annotations

from fedobd.data._arrays import load_arrays
from fedobd.data._digits import load_digits
from fedobd.data._examples import ClientData, Examples, FederatedData
from fedobd.data._partition import federate, hold_out, partition_iid

__all__ = [
    "ClientData",
    "Examples",
    "FederatedData",
    "federate",
    "hold_out",
    "load_arrays",
    "load_digits",
    "partition_iid",
]
