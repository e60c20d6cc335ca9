"""What a payload says before its values: its kind and place in a run, and a client's report."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from fedobd._errors import UsageError
from fedobd.blocks import ModelSchema
from fedobd.codec import Mask

_MAX_FLOAT32 = float(np.finfo(np.float32).max)


class Kind(IntEnum):
    """What a payload is for."""

    INITIAL = 0
    BROADCAST = 1
    UPLOAD = 2
    DELIVERY = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a client says of its local training.

    Its examples, at least 1, are its weight in the mean; the training loss is the last local
    epoch's mean. Validation loss and metric, such as accuracy in [0, 1], are the received model's,
    on so many examples; 0 for none.
    """

    num_examples: int
    train_loss: float
    num_validation_examples: int = 0
    validation_loss: float = 0.0
    validation_metric: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_examples", "num_validation_examples"):
            value = getattr(self, name)
            if not 0 <= value < 2**63:
                raise UsageError(f"{name} is {value}; allowed are 0 to 2^63 - 1")
        for name in ("train_loss", "validation_loss", "validation_metric"):
            if not abs(getattr(self, name)) <= _MAX_FLOAT32:
                raise UsageError(f"{name} is {getattr(self, name)}; wanted a finite float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a payload says before its values.

    Args:
        kind: initial, broadcast, upload or delivery.
        method: the method's number in the format.
        round: round number, from 1; 0 in an initial payload that belongs to none.
        stage: stage number, from 1.
        block_ids: numbers of the blocks that it holds, ascending.
        is_lossless: whether plain values are compressed.
        is_difference: whether parameters are differences to the round's broadcast; else they are
            values.
        client: the uploading client; None in other payloads.
        report: the client's report; None in other payloads.
        mask: the mask over parameters, if they are masked.
        block_differences: mean block difference of each block, if the method sends it.
        start: fingerprint of the initial model, if the payload stands for it and holds no values.
    """

    kind: Kind
    method: int
    round: int
    stage: int
    block_ids: tuple[int, ...]
    is_difference: bool = False
    is_lossless: bool = False
    client: int | None = None
    report: Report | None = None
    mask: Mask | None = None
    block_differences: tuple[float, ...] | None = None
    start: bytes | None = None

    def __post_init__(self) -> None:
        limits = {"method": 2**8, "round": 2**32, "stage": 2**8, "client": 2**32}
        for name, limit in limits.items():
            value = getattr(self, name)
            if value is not None and not 0 <= value < limit:
                raise UsageError(f"{name} is {value}; allowed are 0 to {limit - 1}")

    def holds_frozen(self, schema: ModelSchema) -> bool:
        """Whether the payload has a frame of frozen tensors."""
        return self.kind is Kind.INITIAL and self.start is None and bool(schema.frozen())

    @property
    def coded(self) -> tuple[int, ...]:
        """Numbers of the blocks whose values it holds."""
        return self.block_ids if self.start is None else ()
