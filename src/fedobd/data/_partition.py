"""Partition: who gets which example."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any, Literal

import torch

from fedobd._errors import UsageError
from fedobd._lookup import not_installed
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

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionOptions:
    """How examples are shared out.

    Args:
        name: `iid`: at random, in shares that differ by at most one; `dirichlet`: each class by
            shares drawn from a Dirichlet distribution; `shard`: sorted by class, cut into
            shards that differ by at most one, and so many of them to each client;
            `pathological`: so many classes to each client, and each class in equal parts to so
            many clients, or one more, as any other; `natural`: by the column that says whose an
            example is. `dirichlet` and `natural` are those of Flower Datasets. None leaves an
            example out.
        alpha: concentration of `dirichlet`, above 0; the smaller, the more unequal.
        min_examples: the least of a client's share with `dirichlet`, drawn anew until it is met.
        shards_per_client: with `shard`, from 1.
        classes_per_client: with `pathological`, from 1.

    Raises:
        UsageError: an option is outside what is allowed.

    References:
        Tzu-Ming Harry Hsu, Hang Qi, Matthew Brown. Measuring the Effects of Non-Identical Data
        Distribution for Federated Visual Classification. 2019, arXiv 1909.06335 (`dirichlet`).
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
        if self.alpha <= 0:
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
        owners: whose each example is, for `natural`.
        seed: the run's seed.

    Returns:
        The numbers of each client's examples, int64, in random order.

    Raises:
        UsageError: the examples cannot be shared out so, a client would be left without any, or
            Flower Datasets is not installed.
    """
    _check_count(len(targets), num_clients)
    if options.name == "iid":
        return partition_iid(len(targets), num_clients, seed=seed)
    if options.name == "natural":
        _check_owners(owners)
    try:
        shares = _shares(targets, num_clients, options, owners, seed)
    except ModuleNotFoundError as error:
        raise not_installed(f"the partition {options.name!r}", error, "data") from error
    except ValueError as error:
        raise UsageError(
            f"{len(targets)} examples cannot be shared among {num_clients} clients by "
            f"{options.name!r}: {error}"
        ) from error
    for client, share in enumerate(shares):
        if len(share) == 0:
            raise UsageError(
                f"the partition {options.name!r} leaves client {client} without examples; use "
                "fewer clients, or shares that are more equal"
            )
    return [_shuffled(share, seed, client) for client, share in enumerate(shares)]


def _check_owners(owners: Sequence[Any] | None) -> None:
    if owners is None:
        raise UsageError("the partition 'natural' wants data.columns.client")
    if None in owners:
        raise UsageError(f"example {owners.index(None)} is of no client")


def _shuffled(share: torch.Tensor, seed: int, client: int) -> torch.Tensor:
    generator = make_generator(seed, "partition order", client)
    return share[torch.randperm(len(share), generator=generator)]


def _shares(
    targets: torch.Tensor,
    num_clients: int,
    options: PartitionOptions,
    owners: Sequence[Any] | None,
    seed: int,
) -> list[torch.Tensor]:
    """Share out examples; raises ValueError where that cannot be done."""
    generator = make_generator(seed, "partition")
    if options.name == "shard":
        return _deal_shards(targets, num_clients, options.shards_per_client, generator)
    if options.name == "pathological":
        return _deal_classes(targets, num_clients, options.classes_per_client, generator)
    return _partition_by_library(targets, num_clients, options, owners, seed)


def _deal_shards(
    targets: torch.Tensor, num_clients: int, shards_per_client: int, generator: torch.Generator
) -> list[torch.Tensor]:
    num_shards = num_clients * shards_per_client
    if num_shards > len(targets):
        raise ValueError(f"{shards_per_client} shards for each of them are {num_shards} shards")
    shards = targets.argsort(stable=True).tensor_split(num_shards)
    dealt = torch.randperm(num_shards, generator=generator).reshape(num_clients, -1)
    return [torch.cat([shards[shard] for shard in hand]) for hand in dealt.tolist()]


def _deal_classes(
    targets: torch.Tensor, num_clients: int, classes_per_client: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """Give each client classes of a shuffled deck of all, which is replaced when it is used up."""
    classes = sorted(set(targets.tolist()))
    least = -(-len(classes) // num_clients)
    if not least <= classes_per_client <= len(classes):
        raise ValueError(
            f"{classes_per_client} classes for each of them, and there are {len(classes)}; "
            f"allowed are {least} to {len(classes)}"
        )
    deck: list[int] = []
    shares: list[list[torch.Tensor]] = [[] for _ in range(num_clients)]
    clients_by_class: dict[int, list[int]] = {number: [] for number in classes}
    for client in range(num_clients):
        if len(deck) < classes_per_client:
            order = torch.randperm(len(classes), generator=generator).tolist()
            deck += sorted((classes[n] for n in order), key=deck.count)  # no class twice in a hand
        for number in deck[:classes_per_client]:
            clients_by_class[number].append(client)
        del deck[:classes_per_client]
    for number, clients in clients_by_class.items():
        numbers = (targets == number).nonzero().flatten()
        if len(numbers) < len(clients):
            raise ValueError(
                f"class {number} has {len(numbers)} examples for {len(clients)} clients"
            )
        for client, part in zip(clients, numbers.tensor_split(len(clients)), strict=True):
            shares[client].append(part)
    return [torch.cat(parts) for parts in shares]


def _partition_by_library(
    targets: torch.Tensor,
    num_clients: int,
    options: PartitionOptions,
    owners: Sequence[Any] | None,
    seed: int,
) -> list[torch.Tensor]:
    from datasets import Dataset

    columns: dict[str, Any] = {"target": targets.tolist(), "number": list(range(len(targets)))}
    if owners is not None:
        columns["owner"] = list(owners)
    partitioner = _partitioner(options, num_clients, derive_seed(seed, "partition") % 2**32)
    partitioner.dataset = Dataset.from_dict(columns)
    if partitioner.num_partitions != num_clients:
        raise UsageError(
            f"the examples are of {partitioner.num_partitions} clients; federation.clients is "
            f"{num_clients}"
        )
    with redirect_stderr(StringIO()):  # to which it draws a progress bar, whatever is asked for
        return [
            torch.tensor(partitioner.load_partition(client)["number"][:], dtype=torch.int64)
            for client in range(num_clients)
        ]


def _partitioner(options: PartitionOptions, num_clients: int, seed: int) -> Partitioner:
    from flwr_datasets import partitioner as library

    if options.name == "dirichlet":
        return library.DirichletPartitioner(
            num_partitions=num_clients,
            partition_by="target",
            alpha=options.alpha,
            min_partition_size=options.min_examples,
            seed=seed,
        )
    return library.NaturalIdPartitioner(partition_by="owner")


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
        The numbers of the other examples and those of the test set, int64.

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
        shares: the numbers of each client's.
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
