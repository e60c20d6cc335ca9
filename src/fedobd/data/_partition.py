"""Partition: who gets which example.

Every example goes to exactly one client, and no client is left without any. Equal seeds give equal
partitions: what is drawn, with which generator and in which order, is part of the behaviour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from fedobd._errors import UsageError
from fedobd._seeds import derive_seed, make_generator
from fedobd.data._examples import (
    ClientData,
    Examples,
    ExampleSet,
    FederatedData,
    Prepare,
    Selection,
    select,
)

_MOST_DRAWS = 11  # of a Dirichlet partition; one more would change what existing settings refuse


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionOptions:
    """How examples are shared out.

    Args:
        name: `iid`: at random, in shares that differ by at most one; `dirichlet`: each class by
            shares drawn from a Dirichlet distribution; `shard`: sorted by class, cut into
            shards that differ by at most one, and so many of them to each client;
            `pathological`: so many classes to each client, and each class in equal parts to so
            many clients, or one more, as any other; `natural`: by the column that says whose an
            example is. None leaves an example out.
        alpha: concentration of `dirichlet`, above 0; the smaller, the more unequal.
        min_examples: the least of a client's share with `dirichlet`, drawn anew until it is met.
        shards_per_client: with `shard`, from 1.
        classes_per_client: with `pathological`, from 1.

    Raises:
        UsageError: an option is outside what is allowed.

    References:
        Mikhail Yurochkin et al. Bayesian Nonparametric Federated Learning of Neural Networks.
        ICML 2019, arXiv 1905.12022, section 4 (`dirichlet`).
        H. Brendan McMahan et al. Communication-Efficient Learning of Deep Networks from
        Decentralized Data. AISTATS 2017, arXiv 1602.05629, section 3 (`shard`).
        Qinbin Li, Yiqun Diao, Quan Chen, Bingsheng He. Federated Learning on Non-IID Data Silos:
        An Experimental Study. ICDE 2022, arXiv 2102.02079, section 4.1 (`pathological`; there the
        classes of a client are drawn, so that one may be left without a client).
    """

    name: Literal["iid", "dirichlet", "shard", "pathological", "natural"] = "iid"
    alpha: float = 0.5
    min_examples: int = 10
    shards_per_client: int = 2
    classes_per_client: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.alpha < float("inf"):
            raise UsageError(f"alpha is {self.alpha}; allowed are numbers above 0")
        for name in ("min_examples", "shards_per_client", "classes_per_client"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; allowed are numbers from 1")


def partition(
    targets: torch.Tensor,
    num_clients: int,
    options: PartitionOptions,
    *,
    owners: Sequence[Any] | None = None,
    seed: int = 0,
) -> list[torch.Tensor]:
    """Share out examples.

    Args:
        targets: the examples' classes, int64, shape (n,).
        num_clients: how many shares.
        options: how.
        owners: whose each example is, for `natural`; clients are numbered in their order.
        seed: the run's seed.

    Returns:
        The numbers of each client's examples, int64, shape (examples of the client,) each, in
        random order.

    Raises:
        UsageError: the examples cannot be shared out so.
    """
    _check_count(len(targets), num_clients)
    if options.name == "iid":
        return partition_iid(len(targets), num_clients, seed=seed)
    if options.name == "natural":
        shares = _by_owner(owners, num_clients)
    else:
        deal = {"dirichlet": _dirichlet, "shard": _shards, "pathological": _classes}[options.name]
        try:
            shares = deal(targets, num_clients, options, seed)
        except ValueError as error:
            raise UsageError(
                f"{len(targets)} examples cannot be shared among {num_clients} clients by "
                f"{options.name!r}: {error}"
            ) from error
    # The first examples of a share are held out for validation: sorted ones would be of one class.
    generators = (make_generator(seed, "partition order", n) for n in range(num_clients))
    return [
        share[torch.randperm(len(share), generator=generator)]
        for share, generator in zip(shares, generators, strict=True)
    ]


def _by_owner(owners: Sequence[Any] | None, num_clients: int) -> list[torch.Tensor]:
    if owners is None:
        raise UsageError("the partition 'natural' wants data.columns.client")
    if None in owners:
        raise UsageError(f"example {owners.index(None)} is of no client")
    numbers_by_owner: dict[Any, list[int]] = {}
    for number, owner in enumerate(owners):
        numbers_by_owner.setdefault(owner, []).append(number)
    if len(numbers_by_owner) != num_clients:
        raise UsageError(
            f"the examples are of {len(numbers_by_owner)} clients; federation.clients is "
            f"{num_clients}"
        )
    return [torch.tensor(numbers_by_owner[owner]) for owner in sorted(numbers_by_owner)]


def _dirichlet(
    targets: torch.Tensor, num_clients: int, options: PartitionOptions, seed: int
) -> list[torch.Tensor]:
    """Cut each class where shares drawn for it end, all anew until every client has enough."""
    generator = np.random.default_rng(derive_seed(seed, "partition") % 2**32)
    classes = targets.numpy()
    by_class = [np.flatnonzero(classes == number) for number in np.unique(classes)]
    for _ in range(_MOST_DRAWS):
        parts = []
        for numbers in by_class:
            ends = generator.dirichlet([options.alpha] * num_clients).cumsum() * len(numbers)
            parts.append(np.split(numbers, ends[:-1].astype(int)))
        shares = [np.concatenate(of_client) for of_client in zip(*parts, strict=True)]
        if min(map(len, shares)) >= options.min_examples:
            for share in shares:
                generator.shuffle(share)
            return [torch.from_numpy(share) for share in shares]
    raise ValueError(
        f"in {_MOST_DRAWS} draws a client had fewer than min_examples = {options.min_examples}; "
        "use fewer clients, a larger alpha or a smaller min_examples"
    )


def _shards(
    targets: torch.Tensor, num_clients: int, options: PartitionOptions, seed: int
) -> list[torch.Tensor]:
    num_shards = num_clients * options.shards_per_client
    if num_shards > len(targets):
        raise ValueError(
            f"{options.shards_per_client} shards for each of them are {num_shards} shards"
        )
    shards = targets.argsort(stable=True).tensor_split(num_shards)
    order = torch.randperm(num_shards, generator=make_generator(seed, "partition"))
    hands = order.reshape(num_clients, -1).tolist()
    return [torch.cat([shards[shard] for shard in hand]) for hand in hands]


def _classes(
    targets: torch.Tensor, num_clients: int, options: PartitionOptions, seed: int
) -> list[torch.Tensor]:
    """Give each client classes of a shuffled deck of all, which is replaced when it is used up."""
    generator, each = make_generator(seed, "partition"), options.classes_per_client
    classes = sorted(set(targets.tolist()))
    least = -(-len(classes) // num_clients)
    if not least <= each <= len(classes):
        raise ValueError(
            f"{each} classes for each of them, and there are {len(classes)}; "
            f"allowed are {least} to {len(classes)}"
        )
    deck: list[int] = []
    clients_by_class: dict[int, list[int]] = {number: [] for number in classes}
    for client in range(num_clients):
        if len(deck) < each:
            order = torch.randperm(len(classes), generator=generator).tolist()
            # Those that are left in the deck come last, so that no hand has a class twice.
            deck += sorted((classes[n] for n in order), key=deck.count)
        for number in deck[:each]:
            clients_by_class[number].append(client)
        del deck[:each]
    shares: list[list[torch.Tensor]] = [[] for _ in range(num_clients)]
    for number, clients in clients_by_class.items():
        numbers = (targets == number).nonzero().flatten()
        if len(numbers) < len(clients):
            raise ValueError(
                f"class {number} has {len(numbers)} examples for {len(clients)} clients"
            )
        for client, part in zip(clients, numbers.tensor_split(len(clients)), strict=True):
            shares[client].append(part)
    return [torch.cat(parts) for parts in shares]


def partition_iid(num_examples: int, num_clients: int, *, seed: int = 0) -> list[torch.Tensor]:
    """Share out examples at random in shares that differ by at most one.

    Args:
        num_examples: how many there are.
        num_clients: how many shares.
        seed: the run's seed.

    Returns:
        The numbers of each client's examples, int64, shape (examples of the client,) each.

    Raises:
        UsageError: there are more clients than examples, or no clients.
    """
    _check_count(num_examples, num_clients)
    order = torch.randperm(num_examples, generator=make_generator(seed, "partition"))
    return list(order.tensor_split(num_clients))


def _check_count(num_examples: int, num_clients: int) -> None:
    if not 1 <= num_clients <= num_examples:
        raise UsageError(
            f"{num_examples} examples cannot be shared among {num_clients} clients; "
            f"allowed are 1 to {num_examples} clients"
        )


def set_aside(
    num_examples: int, test_fraction: float, *, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a test set.

    Args:
        num_examples: how many examples there are.
        test_fraction: share of them that no client gets, in (0, 1).
        seed: the run's seed.

    Returns:
        The numbers of the other examples and those of the test set, int64, one dimension each.

    Raises:
        UsageError: the fraction is out of range.
    """
    if not 0 < test_fraction < 1:
        raise UsageError(f"test_fraction is {test_fraction}; allowed are 0 < fraction < 1")
    order = torch.randperm(num_examples, generator=make_generator(seed, "test split"))
    num_test = max(1, round(test_fraction * num_examples))
    return order[num_test:], order[:num_test]


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
    rest, test = set_aside(len(examples), test_fraction, seed=seed)
    shares = [rest[share] for share in partition_iid(len(rest), num_clients, seed=seed)]
    return FederatedData(
        share_out(examples, shares, validation_fraction), Selection(examples, test)
    )


def share_out(
    examples: ExampleSet,
    shares: Sequence[torch.Tensor],
    validation_fraction: float,
    *,
    prepare: Prepare | None = None,
) -> tuple[ClientData, ...]:
    """Give each client its share of a data set.

    Args:
        examples: all examples, which stay where they are.
        shares: the numbers of each client's examples, int64, shape (n,) each.
        validation_fraction: share of each that is held out for validation, in [0, 1).
        prepare: what is done to inputs when they are taken.
    """
    return tuple(
        hold_out(Selection(examples, share, prepare), validation_fraction) for share in shares
    )


def hold_out(examples: ExampleSet, validation_fraction: float) -> ClientData:
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
        train=select(examples, numbers[count:]),
        validation=select(examples, numbers[:count]),
    )
