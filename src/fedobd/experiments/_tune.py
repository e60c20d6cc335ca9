"""Tune: how many clients to train together, measured once on the machine at hand."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import torch

from fedobd.experiments._build import Experiment
from fedobd.sessions import ServerSession
from fedobd.simulation import ClientSetup, ClientTask, SequentialPool

_SECONDS = 20.0  # of measuring, after which no larger stack is tried


def measure_stack(experiment: Experiment, server: ServerSession) -> int:
    """Return the stack with which a client of the first round takes the least time here.

    Plays some clients of the round with 1, 2, 4, ... of them together, twice each, and looks at
    the second time; stops where a larger stack no longer gains a twentieth, or does not fit into
    the memory of a GPU.

    Args:
        experiment: what is run; one that cannot be stacked gives 1.
        server: a session before its first round; it is as before afterwards.
    """
    if experiment.setup.train_together is None:
        return 1
    before = server.save()
    plan = server.begin_round()
    if plan is None:
        return 1
    broadcast = server.broadcast().data
    openings = {
        c: server.initial_payload(c).data for c in plan.cohort if server.needs_initial_payload(c)
    }
    tasks = [
        ClientTask(plan=plan, client=c, broadcast=broadcast, opening=openings.get(c))
        for c in plan.cohort
    ]
    server.restore(before)
    best, least, began = 1, float("inf"), time.perf_counter()
    for size in _sizes(len(tasks)):
        try:
            spent = _seconds_per_client(experiment.setup, tasks[:size], size)
        except torch.cuda.OutOfMemoryError:
            if size == 1:
                raise
            torch.cuda.empty_cache()
            break
        if spent > 0.95 * least:
            break
        best, least = size, spent
        if time.perf_counter() - began > _SECONDS:
            break
    return best


def _sizes(most: int) -> Iterator[int]:
    size = 1
    while size < most:
        yield size
        size *= 2
    yield most


def _seconds_per_client(setup: ClientSetup, tasks: list[ClientTask], stack: int) -> float:
    """Return the seconds that a client takes when so many are played together."""
    with SequentialPool(dataclasses.replace(setup, stack=stack)) as pool:
        list(pool.run(tasks))
        began = time.perf_counter()
        list(pool.run(tasks))
    return (time.perf_counter() - began) / len(tasks)
