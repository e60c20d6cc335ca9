"""A Flower app as one writes it without fedobd; `flower_after.py` is the same app, compressed.

Five nodes train a small network on made-up data of four classes with Flower's FedAvg. A mod counts
the bytes of the arrays that reach a client and leave it.

    pip install 'fedobd[flower]'
    python examples/flower_before.py

It prints the model's accuracy on examples that no node has, and the mean bytes a client and round.
"""

from __future__ import annotations

from logging import getLogger

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn

NUM_NODES = 5
NUM_ROUNDS = 6


def make_model() -> nn.Module:
    """Return a network of 19,204 parameters."""
    return nn.Sequential(
        nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4)
    )


def make_data(num_examples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs, shape (n, 16), and classes: which of four noisy centres is meant."""
    centres = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(4, (num_examples,), generator=generator)
    return centres[classes] + 1.5 * torch.randn(num_examples, 16, generator=generator), classes


def num_bytes(content: RecordDict) -> int:
    """Return the length of all arrays of a message, as they travel."""
    records = content.array_records.values()
    return sum(len(array.data) for record in records for array in record.values())


def count_bytes(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Add to a reply's metrics what came down and goes up; a mod."""
    downlink_bytes = num_bytes(message.content)
    reply = call_next(message, context)
    for metrics in reply.content.metric_records.values():
        metrics["downlink-bytes"] = downlink_bytes
        metrics["uplink-bytes"] = num_bytes(reply.content)
    return reply


client_app = ClientApp(mods=[count_bytes])


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train for an epoch on this node's examples."""
    model = make_model()
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    inputs, classes = make_data(200, seed=1 + int(context.node_config["partition-id"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in torch.split(torch.arange(len(inputs)), 20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs[batch]), classes[batch])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    metrics = MetricRecord({"num-examples": len(inputs), "train_loss": loss.item()})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)


server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run FedAvg, then test what came of it."""
    torch.manual_seed(0)
    model = make_model()
    arrays = ArrayRecord(model.state_dict())
    strategy = FedAvg(fraction_evaluate=0.0)
    result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=NUM_ROUNDS)
    model.load_state_dict(result.arrays.to_torch_state_dict())
    inputs, classes = make_data(1000, seed=100)
    accuracy = (model(inputs).argmax(dim=1) == classes).float().mean().item()
    print(f"accuracy {accuracy:.3f}")
    for number, metrics in result.train_metrics_clientapp.items():
        down, up = metrics["downlink-bytes"], metrics["uplink-bytes"]
        print(f"round {number}: {down:,.0f} bytes down, {up:,.0f} up a client")


if __name__ == "__main__":
    getLogger("flwr").setLevel("ERROR")
    run_simulation(server_app, client_app, num_supernodes=NUM_NODES)
