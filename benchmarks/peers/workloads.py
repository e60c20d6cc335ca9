"""The two workloads that every simulator is timed on: models, data and cohorts, made from seeds.

Needs PyTorch alone, so that it can be imported in each peer's environment. All draws come from
generators with seeds of their own: every peer starts from the same model and trains the same
clients on the same examples in the same rounds; only the order of a client's examples is its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

SEED = 6
NUM_CLASSES = 10


@dataclass(frozen=True, slots=True)
class Workload:
    """Federated averaging of small clients: one local epoch of plain SGD, no evaluation.

    Args:
        name: "w1" or "w2".
        shape: One example's shape.
        signal: How far the classes' means lie apart, in standard deviations of the noise.
        num_clients: How many there are.
        cohort: How many are drawn for a round, without replacement.
        examples: How many each holds.
        batch_size: Examples a step.
        learning_rate: Of SGD, without momentum or weight decay.
        threads: PyTorch's threads in the reference, the plain sequential loop.
        warmup_rounds: Rounds before the clock starts.
        rounds: Rounds that are timed.
    """

    name: str
    shape: tuple[int, ...]
    signal: float
    num_clients: int
    cohort: int
    examples: int
    batch_size: int
    learning_rate: float
    threads: int
    warmup_rounds: int
    rounds: int


WORKLOADS = {
    "w1": Workload(
        name="w1", shape=(3, 32, 32), signal=0.3, num_clients=100, cohort=10, examples=100,
        batch_size=20, learning_rate=0.1, threads=2, warmup_rounds=2, rounds=30,
    ),
    "w2": Workload(
        name="w2", shape=(784,), signal=0.1, num_clients=1000, cohort=100, examples=20,
        batch_size=20, learning_rate=0.1, threads=1, warmup_rounds=5, rounds=100,
    ),
}  # fmt: skip


def make_model(workload: Workload) -> nn.Sequential:
    """Return the model with its first weights: 545,098 parameters in W1, 25,450 in W2."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        if workload.name == "w1":
            return nn.Sequential(
                nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Flatten(), nn.Linear(4096, 128), nn.ReLU(), nn.Linear(128, NUM_CLASSES),
            )  # fmt: skip
        return nn.Sequential(nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, NUM_CLASSES))


def make_data(workload: Workload) -> list[tuple[Tensor, Tensor]]:
    """Return the inputs (examples × shape) and targets (examples) of each client.

    Noise around the mean of the example's class, so that the loss falls, and slowly: in W1 from
    2.37 in the first round to 1.30 in the last of thirty-two.
    """
    generator = torch.Generator().manual_seed(SEED)
    means = workload.signal * torch.randn(NUM_CLASSES, *workload.shape, generator=generator)
    data = []
    for _ in range(workload.num_clients):
        targets = torch.randint(NUM_CLASSES, (workload.examples,), generator=generator)
        inputs = torch.randn(workload.examples, *workload.shape, generator=generator)
        data.append((inputs.add_(means[targets]), targets))
    return data


def draw_cohort(workload: Workload, round_number: int) -> list[int]:
    """Return the clients of a round (the first is 1), drawn without replacement."""
    generator = torch.Generator().manual_seed(SEED + round_number)
    order = torch.randperm(workload.num_clients, generator=generator)
    return [int(client) for client in order[: workload.cohort]]
