"""FedAvg with BlazeFL's own trainer and server (`blazefl.contrib`): threads of one process.

What is ours: batches are slices of tensors instead of a DataLoader, which is slower; training
keeps its losses; the server draws the same clients as every peer.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from blazefl.contrib import FedAvgBaseServerHandler, FedAvgThreadPoolClientTrainer
from blazefl.contrib.fedavg import FedAvgUplinkPackage
from blazefl.core import deserialize_model, serialize_model
from measure import Stopwatch, arguments
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from workloads import SEED, WORKLOADS, Workload, draw_cohort, make_data, make_model


@dataclass
class Selector:
    """Makes the model that BlazeFL asks for."""

    workload: Workload

    def select_model(self, model_name: str) -> nn.Module:
        """Return a new model."""
        return make_model(self.workload)


class Partitions:
    """The clients' data, in the form that BlazeFL asks for."""

    def __init__(self, workload: Workload) -> None:
        self.data = make_data(workload)

    def get_dataset(self, type_: str, cid: int | None) -> Any:
        """Return a client's tensors."""
        assert cid is not None
        return self.data[cid]

    def set_dataset(self, type_: str, cid: int | None, dataset: Any) -> None:
        """Not used."""
        raise NotImplementedError

    def get_dataloader(
        self, type_: str, cid: int | None, batch_size: int | None, generator: Generator | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one shuffled epoch of a client's batches."""
        inputs, targets = self.get_dataset(type_, cid)
        order = torch.randperm(len(targets), generator=generator)
        assert batch_size is not None
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            yield inputs[batch], targets[batch]


class Trainer(FedAvgThreadPoolClientTrainer):  # type: ignore[misc]
    """BlazeFL's trainer, keeping the losses and showing no progress bar."""

    stopwatch: Stopwatch

    def progress_fn(self, it: list[Any]) -> Iterable[Any]:
        """Return what there is to wait for."""
        return it

    def train(
        self,
        model: nn.Module,
        model_parameters: Tensor,
        train_loader: Iterable[tuple[Tensor, Tensor]],
        device: str,
        epochs: int,
        lr: float,
        stop_event: threading.Event,
        cid: int,
    ) -> FedAvgUplinkPackage:
        """Train one client for one epoch."""
        self.stopwatch.first_batch()
        deserialize_model(model, model_parameters)
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        examples, loss_sum = 0, 0.0
        for inputs, targets in train_loader:
            loss = F.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            examples += len(targets)
            loss_sum += loss.item() * len(targets)
        return FedAvgUplinkPackage(cid, serialize_model(model), examples, {"loss": loss_sum})


class Server(FedAvgBaseServerHandler):  # type: ignore[misc]
    """BlazeFL's server, drawing the cohorts that every peer trains."""

    workload: Workload

    def sample_clients(self) -> list[int]:
        """Return the next round's clients."""
        return draw_cohort(self.workload, self.round + 1)


def main() -> None:
    """Run it."""
    parser = arguments(__doc__)
    parser.add_argument("--parallel", type=int, help="clients trained at once, a thread for each")
    words = parser.parse_args()
    workload = WORKLOADS[words.workload]
    workload = replace(workload, rounds=words.rounds or workload.rounds)
    # Threads contend for the interpreter where steps are tiny: serial is faster there.
    parallel = words.parallel or (2 if workload.name == "w1" else 1)
    threads = words.threads or 1
    torch.set_num_threads(threads)

    stopwatch = Stopwatch(workload)
    Server.workload, Trainer.stopwatch = workload, stopwatch
    selector, partitions = Selector(workload), Partitions(workload)
    server = Server(
        selector, "model", partitions,
        global_round=stopwatch.total_rounds, num_clients=workload.num_clients,
        sample_ratio=workload.cohort / workload.num_clients, device="cpu",
        batch_size=workload.batch_size, seed=SEED,
    )  # fmt: skip
    trainer = Trainer(
        selector, "model", partitions,
        device="cpu", num_clients=workload.num_clients, epochs=1, batch_size=workload.batch_size,
        lr=workload.learning_rate, seed=SEED, num_parallels=parallel,
    )  # fmt: skip
    while not server.if_stop():
        trainer.local_process(server.downlink_package(), server.sample_clients())
        packages = trainer.uplink_package()
        for package in packages:
            server.load(package)
        loss = sum(package.metadata["loss"] for package in packages)
        stopwatch.end_round(loss / sum(package.data_size for package in packages))
    stopwatch.report(f"BlazeFL 2.0.3, {parallel} at once × {threads} threads")


if __name__ == "__main__":
    main()
