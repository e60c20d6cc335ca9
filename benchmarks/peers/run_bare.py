"""FedAvg by hand, as a researcher would write it: the floor that simulators are measured against.

One process trains a round's clients one after another; with `--processes N`, each of N workers
trains its share of them and returns the sum of its models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.multiprocessing as mp
from measure import Stopwatch, arguments, now
from torch import Tensor
from torch.nn import functional as F
from workloads import SEED, WORKLOADS, Workload, draw_cohort, make_data, make_model

State = dict[str, Tensor]


@dataclass
class Share:
    """What the clients of one worker add to a round.

    Args:
        state: The sum of their models, each times its number of examples.
        examples: The sum of those numbers.
        loss: The sum of the examples' losses.
        began: When the first batch began.
    """

    state: State
    examples: int
    loss: float
    began: float


class Trainer:
    """Trains clients one after another with one model object."""

    def __init__(self, workload: Workload, channels_last: bool) -> None:
        self.workload = workload
        self.model = make_model(workload)
        self.data = make_data(workload)
        self.generator = torch.Generator().manual_seed(SEED)
        if channels_last and len(workload.shape) == 3:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.data = [
                (inputs.to(memory_format=torch.channels_last), targets)
                for inputs, targets in self.data
            ]

    def train_clients(self, global_state: State, clients: Sequence[int]) -> Share:
        """Train some clients from the global model."""
        began = now()
        total = {name: torch.zeros_like(value) for name, value in global_state.items()}
        examples, loss = 0, 0.0
        for client in clients:
            self.model.load_state_dict(global_state)
            loss += self.train_client(*self.data[client])
            num_examples = len(self.data[client][1])
            examples += num_examples
            for name, value in self.model.state_dict().items():
                total[name] += num_examples * value
        return Share(total, examples, loss, began)

    def train_client(self, inputs: Tensor, targets: Tensor) -> float:
        """Train one epoch; return the sum of the examples' losses."""
        self.model.train()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=self.workload.learning_rate)
        order = torch.randperm(len(targets), generator=self.generator)
        loss_sum = 0.0
        for start in range(0, len(order), self.workload.batch_size):
            batch = order[start : start + self.workload.batch_size]
            optimizer.zero_grad()
            loss = F.cross_entropy(self.model(inputs[batch]), targets[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss_sum += loss.item() * len(batch)
        return loss_sum


_trainer: Trainer


def _start_worker(workload: Workload, channels_last: bool, threads: int) -> None:
    global _trainer
    torch.set_num_threads(threads)
    _trainer = Trainer(workload, channels_last)


def _work(global_state: State, clients: Sequence[int]) -> Share:
    return _trainer.train_clients(global_state, clients)


def average(shares: Sequence[Share]) -> tuple[State, float]:
    """Return the mean model and the mean loss, weighted by examples."""
    examples = sum(share.examples for share in shares)
    state = {
        name: torch.stack([share.state[name] for share in shares]).sum(0) / examples
        for name in shares[0].state
    }
    return state, sum(share.loss for share in shares) / examples


def main() -> None:
    """Run it."""
    parser = arguments(__doc__, processes=1)
    parser.add_argument("--channels-last", action="store_true")
    words = parser.parse_args()
    workload = WORKLOADS[words.workload]
    workload = replace(workload, rounds=words.rounds or workload.rounds)
    threads = words.threads or (workload.threads if words.processes == 1 else 1)
    torch.set_num_threads(threads)
    stopwatch = Stopwatch(workload)
    name = f"bare loop, {words.processes} × {threads} threads"
    name += ", channels_last" if words.channels_last else ""

    if words.processes == 1:
        trainer = Trainer(workload, words.channels_last)
        state = {key: value.clone() for key, value in trainer.model.state_dict().items()}
        for round_number in range(1, stopwatch.total_rounds + 1):
            share = trainer.train_clients(state, draw_cohort(workload, round_number))
            state, loss = average([share])
            stopwatch.first_batch(share.began)
            stopwatch.end_round(loss)
        stopwatch.report(name)
        return

    context = mp.get_context("spawn")
    options = (workload, words.channels_last, threads)
    with context.Pool(words.processes, _start_worker, options) as pool:
        state = make_model(workload).state_dict()
        for round_number in range(1, stopwatch.total_rounds + 1):
            cohort = draw_cohort(workload, round_number)
            parts = [cohort[start :: words.processes] for start in range(words.processes)]
            shares = pool.starmap(_work, [(state, part) for part in parts], chunksize=1)
            state, loss = average(shares)
            stopwatch.first_batch(min(share.began for share in shares))
            stopwatch.end_round(loss)
        stopwatch.report(name)


if __name__ == "__main__":
    main()
