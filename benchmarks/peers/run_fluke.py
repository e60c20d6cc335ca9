"""FedAvg with fluke, in one process: it trains a round's clients one after another.

What is ours: the server draws the same clients as every peer. Clients forget their model after a
round (`persistency`), as FedAvg's do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from fluke import DDict, FlukeENV
from fluke.algorithms.fedavg import FedAVG
from fluke.client import Client
from fluke.data import DataSplitter, DummyDataContainer, FastDataLoader
from fluke.server import Server
from fluke.utils import ClientObserver, FederationObserver
from measure import Stopwatch, arguments
from workloads import NUM_CLASSES, SEED, WORKLOADS, Workload, draw_cohort, make_data, make_model


class CohortServer(Server):  # type: ignore[misc]
    """fluke's server, drawing the cohorts that every peer trains."""

    workload: Workload
    round_number = 0

    def get_eligible_clients(self, eligible_perc: float) -> Sequence[Client]:
        """Return the next round's clients."""
        self.round_number += 1
        return [self.clients[index] for index in draw_cohort(self.workload, self.round_number)]


class FedAvg(FedAVG):  # type: ignore[misc]
    """fluke's algorithm with that server."""

    def get_server_class(self) -> type[Server]:
        """Return the server's class."""
        return CohortServer


class RoundClock(FederationObserver, ClientObserver):  # type: ignore[misc]
    """Notes the end of each round and the clients' losses in it."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch
        self.losses: list[float] = []

    def start_fit(self, **event: Any) -> None:
        """Note that a client begins."""
        self.stopwatch.first_batch()

    def end_fit(self, loss: float, **event: Any) -> None:
        """Keep a client's mean loss; all have as many examples."""
        self.losses.append(loss)

    def end_round(self, **event: Any) -> None:
        """Note that a round ended."""
        self.stopwatch.end_round(sum(self.losses) / len(self.losses))
        self.losses.clear()


def make_algorithm(workload: Workload) -> FedAvg:
    """Return the algorithm with its clients."""
    loaders = [
        FastDataLoader(
            inputs, targets,
            num_labels=NUM_CLASSES, batch_size=workload.batch_size, shuffle=True,
        )
        for inputs, targets in make_data(workload)
    ]  # fmt: skip
    container = DummyDataContainer(loaders, [None] * len(loaders), None, NUM_CLASSES)
    options = DDict(
        model=make_model(workload),
        client=DDict(
            batch_size=workload.batch_size,
            local_epochs=1,
            loss="CrossEntropyLoss",
            optimizer=DDict(name="SGD", lr=workload.learning_rate),
            scheduler=DDict(name="StepLR", step_size=1, gamma=1),
            persistency=False,
        ),
        server=DDict(weighted=True),
    )
    return FedAvg(workload.num_clients, DataSplitter(container), options)


def main() -> None:
    """Run it."""
    words = arguments(__doc__).parse_args()
    workload = WORKLOADS[words.workload]
    workload = replace(workload, rounds=words.rounds or workload.rounds)
    threads = words.threads or workload.threads
    torch.set_num_threads(threads)

    environment = FlukeENV()
    environment.set_seed(SEED)
    environment.set_eval_cfg(pre_fit=False, post_fit=False, locals=False, server=False)
    CohortServer.workload = workload
    algorithm = make_algorithm(workload)
    stopwatch = Stopwatch(workload)
    algorithm.set_callbacks([RoundClock(stopwatch)])
    algorithm.run(stopwatch.total_rounds, workload.cohort / workload.num_clients)
    stopwatch.report(f"fluke 0.8.1, 1 × {threads} threads")


if __name__ == "__main__":
    main()
