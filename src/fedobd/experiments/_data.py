"""From a configuration's `data` to examples that are shared out among clients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedobd._errors import UsageError
from fedobd._lookup import build_object, find_object
from fedobd.data import (
    Examples,
    ExampleSet,
    FederatedData,
    LoadedData,
    Prepare,
    Selection,
    StoredExamples,
    draw_numbers,
    load_arrays,
    load_data,
    load_digits,
    move_to,
    partition,
    set_aside,
    share_out,
)
from fedobd.experiments._config import RunConfig

_Whole = Examples | StoredExamples
_NO_EXAMPLES = Examples(torch.empty(0), torch.empty(0))


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltData:
    """The data of a run.

    Args:
        federated: who has which examples.
        classes: the names of the classes; None where they are not known.
        vocabulary: the tokens of texts in the order of their numbers; None where there are none.
        padding: the number of the token that texts are padded with.
    """

    federated: FederatedData
    classes: tuple[str, ...] | None = None
    vocabulary: tuple[str, ...] | None = None
    padding: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pool:
    """Examples that are not shared out yet.

    Args:
        train: training examples.
        numbers: which of them are used.
        targets: of the training examples, in memory.
        test: what is tested on; None to set a part aside.
        prepare: what is done to inputs when they are taken.
        owners: whose each training example is.
        classes, vocabulary, padding: see `BuiltData`.
    """

    train: ExampleSet
    numbers: torch.Tensor
    targets: torch.Tensor
    test: ExampleSet | None
    prepare: Prepare | None = None
    owners: tuple[Any, ...] | None = None
    classes: tuple[str, ...] | None = None
    vocabulary: tuple[str, ...] | None = None
    padding: int | None = None


def build_data(config: RunConfig, device: str = "cpu", workers: int = 0) -> BuiltData:
    """Load the data of a configuration and share it out.

    Args:
        config: the configuration.
        device: where the model is trained; on a GPU data that fit lie there too.
        workers: further processes that will have a copy of what lies on a GPU.

    Raises:
        UsageError: it is not there or cannot be used, there are more clients than examples, or the
            user's function gives something else.
    """
    data = config.data
    place = partial(_place, device=torch.device(device), copies=1 + workers)
    if data.options and ":" not in data.name:
        raise UsageError(f"data.options is for your own function; data is {data.name!r}")
    if data.name == "nodes":
        test = load_arrays(data.test_path) if data.test_path else _NO_EXAMPLES
        return BuiltData(federated=FederatedData((), test))
    if data.test_path is not None:
        raise UsageError(f"data.test_path is for data 'nodes'; data is {data.name!r}")
    if data.name == "digits":
        digits = load_digits()
        pool = _Pool(
            train=place(digits),
            numbers=draw_numbers(len(digits), data.splits.max_train),
            targets=digits.targets,
            test=None,
            classes=tuple(map(str, range(10))),
        )
        return _share(config, pool)
    if ":" in data.name:
        return BuiltData(federated=_from_function(config))
    if "/" not in data.name and not Path(data.name).exists():
        find_object(
            data.name, "data set", dict.fromkeys(("digits", "nodes"))
        )  # says what there is
    loaded = load_data(
        data.name,
        columns=data.columns,
        splits=data.splits,
        image=data.image,
        text=data.text,
        channels_last=config.model.memory_format == "channels_last",
    )
    return _share(config, _pool_of(loaded, place))


def _pool_of(loaded: LoadedData, place: Callable[[_Whole], _Whole]) -> _Pool:
    test = None
    if loaded.test is not None:
        test = Selection(place(loaded.test), loaded.test_numbers, loaded.prepare)
    return _Pool(
        train=place(loaded.train),
        numbers=loaded.train_numbers,
        targets=loaded.train.targets,
        test=test,
        prepare=loaded.prepare,
        owners=loaded.clients,
        classes=loaded.classes,
        vocabulary=loaded.vocabulary,
        padding=loaded.padding,
    )


def _place(examples: _Whole, device: torch.device, copies: int) -> _Whole:
    """Move a set to a GPU where its copies take at most a quarter of what is free there."""
    if device.type != "cuda":
        return examples
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return move_to(examples, device, most_bytes=free_bytes // (4 * copies))


def _share(config: RunConfig, pool: _Pool) -> BuiltData:
    data, federation = config.data, config.federation
    numbers, test = pool.numbers, pool.test
    if test is None:
        rest, aside = set_aside(len(numbers), data.test_fraction, seed=federation.seed)
        test = Selection(pool.train, numbers[aside[: data.splits.max_test]], pool.prepare)
        numbers = numbers[rest]
    owners = None if pool.owners is None else [pool.owners[n] for n in numbers.tolist()]
    shares = partition(
        pool.targets[numbers],
        federation.clients,
        data.partition,
        owners=owners,
        seed=federation.seed,
    )
    clients = share_out(
        pool.train,
        [numbers[share] for share in shares],
        data.validation_fraction,
        prepare=pool.prepare,
    )
    return BuiltData(
        federated=FederatedData(clients, test),
        classes=pool.classes,
        vocabulary=pool.vocabulary,
        padding=pool.padding,
    )


def _from_function(config: RunConfig) -> FederatedData:
    """Call the user's own function."""
    data, federation = config.data, config.federation
    wanted = {"num_clients": federation.clients, "seed": federation.seed}
    made = build_object(data.name, "data set", {}, {**data.options, **wanted})
    if not isinstance(made, FederatedData):
        raise UsageError(f"data {data.name!r} gave {type(made).__name__}; wanted FederatedData")
    if len(made.clients) != federation.clients:
        raise UsageError(
            f"data {data.name!r} gave {len(made.clients)} clients; "
            f"federation.clients is {federation.clients}"
        )
    return made
