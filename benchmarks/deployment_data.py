"""A model of 20 M parameters and random tokens, for the benchmark of a deployment."""

from __future__ import annotations

import torch
from torch import nn

from fedobd.data import ClientData, Examples, FederatedData
from fedobd.models import build_model

VOCABULARY, LENGTH = 1_000, 64


def make_model() -> nn.Module:
    """Return a Transformer classifier of some 20 M parameters."""
    return build_model(
        "transformer",
        vocab_size=VOCABULARY,
        max_length=LENGTH,
        d_model=512,
        num_layers=6,
        nhead=8,
        dim_feedforward=2048,
        num_outputs=2,
    )


def make_data(num_clients: int, seed: int) -> FederatedData:
    """Return random tokens, 16 examples a client."""
    generator = torch.Generator().manual_seed(seed)

    def examples() -> Examples:
        tokens = torch.randint(1, VOCABULARY, (16, LENGTH), generator=generator)
        return Examples(tokens, torch.randint(0, 2, (16,), generator=generator))

    none = examples().take(torch.arange(0))
    clients = tuple(ClientData(train=examples(), validation=none) for _ in range(num_clients))
    return FederatedData(clients, none)
