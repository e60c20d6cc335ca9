"""Examples: inputs and targets as tensors, and who has which."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedobd._errors import UsageError


@dataclass(frozen=True, slots=True)
class Examples:
    """Inputs with their targets.

    Args:
        inputs: what the model takes, first dimension the examples.
        targets: what the loss takes, first dimension the examples.

    Raises:
        UsageError: the two have different numbers of examples.
    """

    inputs: torch.Tensor
    targets: torch.Tensor

    def __post_init__(self) -> None:
        if self.inputs.shape[:1] != self.targets.shape[:1]:
            raise UsageError(
                f"inputs of shape {tuple(self.inputs.shape)} and targets of shape "
                f"{tuple(self.targets.shape)} have different numbers of examples"
            )

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, indices: torch.Tensor) -> Examples:
        """Return the examples with these numbers, int64, shape (n,)."""
        return Examples(self.inputs[indices], self.targets[indices])


@dataclass(frozen=True, slots=True)
class ClientData:
    """What one client has.

    Args:
        train: examples to train on; their number is the client's weight.
        validation: examples on which it validates the model that it receives; may be empty.
    """

    train: Examples
    validation: Examples


@dataclass(frozen=True, slots=True)
class FederatedData:
    """A data set that is shared out.

    Args:
        clients: each client's data, by client number.
        test: examples that no client has; only reported on. May be empty, where nobody but the
            clients has examples.

    Raises:
        UsageError: a client has nothing to train on.
    """

    clients: tuple[ClientData, ...]
    test: Examples

    def __post_init__(self) -> None:
        for number, client in enumerate(self.clients):
            if len(client.train) == 0:
                raise UsageError(
                    f"client {number} has no training examples; "
                    f"use fewer clients than {len(self.clients)} or more data"
                )
