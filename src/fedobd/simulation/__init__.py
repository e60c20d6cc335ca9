"""Simulation: all clients of a run on one machine, one after another or in worker processes."""

from __future__ import annotations

from fedobd.simulation._callback import Callback, Callbacks
from fedobd.simulation._client import (
    ClientResult,
    ClientSetup,
    ClientTask,
    LocalClient,
    StackedTraining,
)
from fedobd.simulation._engine import ClientStates, MemoryStates, RoundResult, simulate
from fedobd.simulation._pool import (
    ClientPool,
    ProcessPool,
    SequentialPool,
    check_workers,
    open_pool,
)
from fedobd.simulation._process import prepare_process

__all__ = [
    "Callback",
    "Callbacks",
    "ClientPool",
    "ClientResult",
    "ClientSetup",
    "ClientStates",
    "ClientTask",
    "LocalClient",
    "MemoryStates",
    "ProcessPool",
    "RoundResult",
    "SequentialPool",
    "StackedTraining",
    "check_workers",
    "open_pool",
    "prepare_process",
    "simulate",
]
