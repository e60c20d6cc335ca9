"""Partition: who gets which example."""

from __future__ import annotations

import torch

from fedobd._errors import UsageError
from fedobd._seeds import make_generator
from fedobd.data._examples import ClientData, Examples, FederatedData


def partition_iid(num_examples: int, num_clients: int, *, seed: int = 0) -> list[torch.Tensor]:
    """Share out examples at random in shares that differ by at most one.

    Args:
        num_examples: how many there are.
        num_clients: how many shares.
        seed: the run's seed.

    Returns:
        The numbers of each client's examples, int64.

    Raises:
        UsageError: there are more clients than examples, or no clients.
    """
    if not 1 <= num_clients <= num_examples:
        raise UsageError(
            f"{num_examples} examples cannot be shared among {num_clients} clients; "
            f"allowed are 1 to {num_examples} clients"
        )
    order = torch.randperm(num_examples, generator=make_generator(seed, "partition"))
    return list(order.tensor_split(num_clients))


def federate(
    examples: Examples,
    num_clients: int,
    *,
    test_fraction: float = 0.2,
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> FederatedData:
    """Split off a test set and share the rest among clients, identically distributed.

    Args:
        examples: all examples.
        num_clients: how many clients.
        test_fraction: share of all examples that no client gets, in (0, 1).
        validation_fraction: share of each client's examples that it validates on, in [0, 1).
        seed: the run's seed.

    Raises:
        UsageError: a fraction is out of range, or a client would be left without examples.
    """
    if not 0 < test_fraction < 1:
        raise UsageError(f"test_fraction is {test_fraction}; allowed are 0 < fraction < 1")
    order = torch.randperm(len(examples), generator=make_generator(seed, "test split"))
    num_test = max(1, round(test_fraction * len(examples)))
    rest = order[num_test:]
    clients = tuple(
        hold_out(examples.take(rest[share]), validation_fraction)
        for share in partition_iid(len(rest), num_clients, seed=seed)
    )
    return FederatedData(clients, examples.take(order[:num_test]))


def hold_out(examples: Examples, validation_fraction: float) -> ClientData:
    """Hold the first examples of a client out for validation.

    Args:
        examples: all that the client has.
        validation_fraction: share of them, in [0, 1).

    Raises:
        UsageError: the fraction is out of range.
    """
    if not 0 <= validation_fraction < 1:
        raise UsageError(
            f"validation_fraction is {validation_fraction}; allowed are 0 <= fraction < 1"
        )
    count = int(validation_fraction * len(examples))
    numbers = torch.arange(len(examples))
    return ClientData(
        train=examples.take(numbers[count:]), validation=examples.take(numbers[:count])
    )
