"""Flower's client, imported by the processes of its simulation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from measure import now
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from workloads import SEED, WORKLOADS, Workload, make_data, make_model

app = ClientApp()


@dataclass(frozen=True, slots=True)
class Kept:
    """What a process makes once and uses for all of its clients."""

    workload: Workload
    model: nn.Sequential
    data: list[tuple[Tensor, Tensor]]
    generator: Generator


@cache
def kept(workload_name: str, threads: int) -> Kept:
    """Return this process's model and data."""
    torch.set_num_threads(threads)
    workload = WORKLOADS[workload_name]
    generator = torch.Generator().manual_seed(SEED)
    return Kept(workload, make_model(workload), make_data(workload), generator)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one client for one epoch."""
    config = message.content.config_records["config"]
    own = kept(str(config["workload"]), int(str(config["threads"])))
    began = now()
    inputs, targets = own.data[int(str(config["client"]))]
    own.model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    own.model.train()
    optimizer = torch.optim.SGD(own.model.parameters(), lr=own.workload.learning_rate)
    loss_sum = 0.0
    order = torch.randperm(len(targets), generator=own.generator)
    for start in range(0, len(order), own.workload.batch_size):
        batch = order[start : start + own.workload.batch_size]
        optimizer.zero_grad()
        loss = F.cross_entropy(own.model(inputs[batch]), targets[batch])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        loss_sum += loss.item() * len(batch)
    metrics: dict[str, int | float | list[int] | list[float]] = {
        "num-examples": len(targets),
        "loss": loss_sum / len(targets),
        "began": began,
    }
    content = RecordDict(
        {"arrays": ArrayRecord(own.model.state_dict()), "metrics": MetricRecord(metrics)}
    )
    return Message(content=content, reply_to=message)
