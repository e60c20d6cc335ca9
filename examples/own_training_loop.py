"""A model, data and a training loop of one's own on the two sessions, without any engine.

`ServerSession` and `ClientSession` only turn model states into bytes and bytes into states. The
loop in between is yours: here plain PyTorch on a made-up regression, with the bytes handed over in
one process. Over a network each client would have a process of its own and the same two calls.

    python examples/own_training_loop.py

It prints, for each round, what went up and down, and the error of the server's model on examples
that no client has.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from fedobd import (
    ClientSession,
    Codec,
    FedOBD,
    Report,
    ServerSession,
    decompose,
    get_state,
    load_state,
)

NUM_CLIENTS = 4
SEED = 0

Data = tuple[torch.Tensor, torch.Tensor]


def make_model() -> nn.Module:
    """Return a network of three blocks, 1,377 parameters."""
    return nn.Sequential(
        nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    )


def make_data(num_examples: int, seed: int) -> Data:
    """Return inputs, shape (n, 8), and targets, shape (n, 1), of one fixed function with noise."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_examples, 8, generator=generator)
    clean = torch.sin(inputs[:, :1]) + inputs[:, 1:2] * inputs[:, 2:3]
    return inputs, clean + 0.1 * torch.randn(num_examples, 1, generator=generator)


def train(model: nn.Module, data: Data, epochs: int) -> float:
    """Train in place, and return the mean loss of the last epoch."""
    inputs, targets = data
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    total = 0.0
    for _ in range(epochs):
        total = 0.0
        for batch in torch.split(torch.randperm(len(inputs)), 32):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs[batch]), targets[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item() * len(batch)
    return total / len(inputs)


def test_error(model: nn.Module, data: Data) -> float:
    """Return the mean squared error."""
    with torch.no_grad():
        return nn.functional.mse_loss(model(data[0]), data[1]).item()


def main() -> None:
    """Train with FedOBD and print each round."""
    torch.manual_seed(SEED)
    model = make_model()
    data = [make_data(200 + 50 * client, seed=1 + client) for client in range(NUM_CLIENTS)]
    test = make_data(1000, seed=100)

    method = FedOBD(
        codec=Codec(dropout_rate=0.3, uplink_weight=1e-3, downlink_weight=1e-3),
        stage_one_rounds=8,
        stage_one_epochs=3,
        stage_two_epochs=4,
        cohort=0.5,
    )
    schema = decompose(model)
    server = ServerSession(method, schema, get_state(model), num_clients=NUM_CLIENTS, seed=SEED)
    total_bytes = 0

    print(f"error before: {test_error(model, test):.3f}")
    while (plan := server.begin_round()) is not None:
        broadcast = server.broadcast().data
        for number in plan.cohort:
            client = ClientSession(method, schema, client=number, seed=SEED)
            own = copy.deepcopy(model)
            load_state(own, client.receive(broadcast))
            loss = train(own, data[number], plan.epochs)
            report = Report(num_examples=len(data[number][0]), train_loss=loss)
            server.receive(number, client.upload(get_state(own), report).data)
        record = server.end_round()
        total_bytes += record.uplink_bytes + record.downlink_bytes
        load_state(model, server.state)
        print(
            f"round {record.round:2} stage {record.stage}: {len(plan.cohort)} clients, "
            f"{record.uplink_bytes:6,} bytes up, {record.downlink_bytes:6,} down, "
            f"error {test_error(model, test):.3f}"
        )
    print(f"error after: {test_error(model, test):.3f}, {total_bytes:,} bytes in all")


if __name__ == "__main__":
    main()
