"""A model of some 1 M parameters and random data, for the app that measures traffic."""

from __future__ import annotations

import torch
from torch import nn

from fedobd.data import ClientData, Examples, FederatedData

NUM_INPUTS, NUM_CLASSES = 64, 10
NUM_EXAMPLES = 64


def make_model(width: int = 576) -> nn.Module:
    return nn.Sequential(
        nn.Linear(NUM_INPUTS, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, NUM_CLASSES),
    )


def make_data(num_clients: int, seed: int) -> FederatedData:
    """Draw each client examples of its own, so that no two uploads are alike."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Examples:
        inputs = torch.randn(count, NUM_INPUTS, generator=generator)
        return Examples(inputs, torch.randint(NUM_CLASSES, (count,), generator=generator))

    clients = tuple(ClientData(draw(NUM_EXAMPLES), draw(0)) for _ in range(num_clients))
    return FederatedData(clients, draw(NUM_EXAMPLES))
