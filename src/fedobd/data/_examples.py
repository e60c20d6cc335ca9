"""Examples: inputs and targets, in memory or picked from a larger set, and who has which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fedobd._errors import UsageError

Prepare = Callable[[torch.Tensor], torch.Tensor]
"""Turns stored inputs of some examples, shape (n, ...), into what the model takes, (n, ...)."""


class ExampleSet(Protocol):
    """Examples that are given out by their numbers."""

    def __len__(self) -> int: ...

    @property
    def targets(self) -> torch.Tensor:
        """The targets of all of them, shape (n, ...)."""
        ...

    def take(self, indices: torch.Tensor) -> Examples:
        """Return the examples with these numbers, int64, shape (n,)."""
        ...


@dataclass(frozen=True, slots=True)
class Examples:
    """Inputs with their targets.

    Args:
        inputs: what the model takes, any type, shape (n, ...).
        targets: what the loss takes, shape (n,) or (n, ...); classes are int64.

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
        """See `ExampleSet.take`; images stay laid out as they are, channels last too."""
        indices = indices.to(self.inputs.device)
        return Examples(_pick(self.inputs, indices), self.targets.index_select(0, indices))


def _pick(inputs: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return rows of a tensor, laid out as it is: `index_select` would put channels first."""
    if inputs.dim() == 4 and inputs.is_contiguous(memory_format=torch.channels_last):
        return inputs.permute(0, 2, 3, 1).index_select(0, indices).permute(0, 3, 1, 2)
    return inputs.index_select(0, indices)


@dataclass(frozen=True, slots=True)
class Selection:
    """Some examples of a larger set, which stays where it is.

    Args:
        whole: the set.
        numbers: which of its examples, int64, shape (n,).
        prepare: what is done to inputs when they are taken; None for nothing.
    """

    whole: ExampleSet
    numbers: torch.Tensor
    prepare: Prepare | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def targets(self) -> torch.Tensor:
        """See `ExampleSet.targets`."""
        return self.whole.targets[self.numbers]

    def take(self, indices: torch.Tensor) -> Examples:
        """See `ExampleSet.take`."""
        return Selection(self.whole, self.numbers[indices], self.prepare).all()

    def all(self) -> Examples:
        """Return all of them, in memory."""
        taken = self.whole.take(self.numbers)
        if self.prepare is None:
            return taken
        return Examples(self.prepare(taken.inputs), taken.targets)


def select(examples: ExampleSet, numbers: torch.Tensor) -> Selection:
    """Return some examples of a set, of a selection those of the set that it is made of.

    Args:
        examples: the set.
        numbers: which of its examples, int64, shape (n,).
    """
    if isinstance(examples, Selection):
        return Selection(examples.whole, examples.numbers[numbers], examples.prepare)
    return Selection(examples, numbers)


def gather(examples: ExampleSet) -> Examples:
    """Return all examples of a set, in memory."""
    return examples.take(torch.arange(len(examples)))


def take_together(sets: Sequence[ExampleSet], numbers: Sequence[torch.Tensor]) -> Examples:
    """Return equally many examples of each of some sets, stacked: shape (sets, n, ...).

    Selections from one whole, as clients' sets usually are, cost one look at it.

    Args:
        sets: at least one.
        numbers: of each set's examples, int64, shape (n,) each.

    Raises:
        UsageError: the examples of two sets have different shapes.
    """
    selections = [each for each in sets if isinstance(each, Selection)]
    sources = {(id(each.whole), id(each.prepare)) for each in selections}
    if len(selections) == len(sets) and len(sources) == 1:
        places = [each.numbers[taken] for each, taken in zip(selections, numbers, strict=True)]
        first, counts = selections[0], (len(sets), len(numbers[0]))
        flat = Selection(first.whole, torch.cat(places), first.prepare).all()
        inputs, targets = (t.reshape(*counts, *t.shape[1:]) for t in (flat.inputs, flat.targets))
        return Examples(inputs, targets)
    parts = [each.take(taken) for each, taken in zip(sets, numbers, strict=True)]
    shapes = {tuple(part.inputs.shape[1:]) for part in parts}
    if len(shapes) > 1:
        raise UsageError(
            f"clients' examples have the shapes {sorted(shapes)}; stacked ones need one shape"
        )
    return Examples(
        torch.stack([part.inputs for part in parts]), torch.stack([part.targets for part in parts])
    )


@dataclass(frozen=True, slots=True)
class ClientData:
    """What one client has.

    Args:
        train: examples to train on; their number is the client's weight.
        validation: examples on which it validates the model that it receives; may be empty.
    """

    train: ExampleSet
    validation: ExampleSet


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
    test: ExampleSet

    def __post_init__(self) -> None:
        for number, client in enumerate(self.clients):
            if len(client.train) == 0:
                raise UsageError(
                    f"client {number} has no training examples; "
                    f"use fewer clients than {len(self.clients)} or more data"
                )
