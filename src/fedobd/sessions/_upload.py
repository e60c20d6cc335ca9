"""Uploads: what clients that were trained send back, encoded for all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cache, partial

import torch

from fedobd._errors import UsageError
from fedobd._seeds import derive_seed, make_generator
from fedobd.blocks import ModelSchema, ModelState, Role, Segment, StateStack
from fedobd.payload import (
    EncodedPayload,
    Header,
    Kind,
    Report,
    Source,
    check_finite,
    encode_payloads,
)
from fedobd.sessions._clipping import bound_norms
from fedobd.sessions._method import Method, TransferSpec, UplinkContext
from fedobd.sessions._selection import mean_block_differences, subtract

_CACHED_BYTES = 2**26
"""Of differences that are kept: blocks are ranked, measured and quantized by them in turn."""


@dataclass(frozen=True, slots=True)
class Received:
    """What a client received in a round: the broadcast's header and the state Ŵ to train from."""

    client: int
    header: Header
    start: ModelState


def encode_uploads(
    method: Method,
    schema: ModelSchema,
    received: Sequence[Received],
    trained: StateStack,
    reports: Sequence[Report],
    *,
    seed: int,
    executor: Executor | None = None,
) -> list[EncodedPayload]:
    """Encode the uploads of clients that were trained together, each with the bytes it has alone.

    Blocks are selected and segments quantized for all clients at once, where their values lie:
    `trained` holds tensors of shape (clients, ...). All of them received one broadcast. Returns an
    upload a client, in the order given, whose chunks may be views of the trained values.

    Raises:
        UsageError: as `ClientSession.upload` raises it.
    """
    for one, report in zip(received, reports, strict=True):
        if report.num_examples < 1:
            raise UsageError(f"client {one.client} trained on no examples; at least 1 is wanted")
    changes = _Changes(schema, [one.start for one in received], trained)
    transfers = _decide(method, schema, received, changes, seed)
    changes.check_dropped(transfers)
    source: Source = changes.difference_or_value if method.sends_differences else changes.value
    if any(transfer.bound_norm for transfer in transfers):
        bounded = [one.quantizer if one.bound_norm else None for one in transfers]
        source = bound_norms(source, schema, bounded)
    number = received[0].header.round
    headers = [
        Header(
            kind=Kind.UPLOAD,
            method=method.wire_id,
            round=number,
            stage=one.header.stage,
            block_ids=transfer.block_ids,
            is_difference=method.sends_differences,
            is_lossless=transfer.lossless,
            client=one.client,
            report=report,
            mask=transfer.mask,
            block_differences=transfer.block_differences,
        )
        for one, report, transfer in zip(received, reports, transfers, strict=True)
    ]
    return encode_payloads(
        schema,
        headers,
        source,
        [transfer.quantizer for transfer in transfers],
        # Cached: one generator a client draws for all of its segments, block after block.
        generator=cache(
            lambda place: make_generator(seed, "rounding", number, received[place].client)
        ),
        executor=executor,
    )


def _decide(
    method: Method,
    schema: ModelSchema,
    received: Sequence[Received],
    changes: _Changes,
    seed: int,
) -> list[TransferSpec]:
    """Return how each client's state is to travel."""
    broadcast = received[0].header
    # Computed for all clients when the first is asked for; FedAvg asks for none.
    means = cache(lambda: mean_block_differences(schema, changes.squared_norms))
    return [
        method.uplink(
            UplinkContext(
                schema=schema,
                round=broadcast.round,
                stage=broadcast.stage,
                received=broadcast.block_ids,
                seed=derive_seed(seed, "uplink", broadcast.round, one.client),
                block_differences=partial(lambda place: means()[place], place),
            )
        )
        for place, one in enumerate(received)
    ]


class _Changes:
    """What training has made of the values that clients received, segment by segment."""

    def __init__(
        self, schema: ModelSchema, starts: Sequence[ModelState], trained: StateStack
    ) -> None:
        self._schema = schema
        self._starts = starts
        self._trained = trained
        self._before = cache(self._start_of)
        self._now = cache(self._trained_of)
        # A model's differences are wanted three times, but those of a large model would take as
        # much memory as the model: what does not fit is subtracted again.
        self._cached: dict[Segment, tuple[torch.Tensor, torch.Tensor]] = {}
        self._room = _CACHED_BYTES

    def _start_of(self, number: int) -> torch.Tensor:
        """Return a tensor as received, shape (clients, elements); (1, elements) if all alike."""
        spec = self._schema.tensors[number]
        starts = [start[spec.name] for start in self._starts]
        alike = all(start is starts[0] for start in starts)
        together = starts[0].unsqueeze(0) if alike else torch.stack(starts)
        return together.reshape(-1, spec.num_elements)

    def _trained_of(self, number: int) -> torch.Tensor:
        """Return a tensor as trained, shape (clients, elements)."""
        spec = self._schema.tensors[number]
        whole = self._trained.values[spec.name].detach()
        return whole.reshape(len(self._starts), spec.num_elements)

    def value(self, segment: Segment) -> torch.Tensor:
        """Return the trained values, shape (clients, elements)."""
        return self._now(segment.tensor)[:, segment.start : segment.stop]

    def squared_norms(self, segment: Segment) -> torch.Tensor:
        """Return the sums of squares of differences, float64, shape (clients,)."""
        return self._subtracted(segment)[1]

    def _subtracted(self, segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
        change = self._cached.get(segment)
        if change is None:
            now, before = self._now(segment.tensor), self._before(segment.tensor)
            change = subtract(now, before, segment.start, segment.stop)
            if change[0].nbytes <= self._room:
                self._room -= change[0].nbytes
                self._cached[segment] = change
        return change

    def difference_or_value(self, segment: Segment) -> torch.Tensor:
        """Return the difference of a parameter, float32, the value of a buffer."""
        is_parameter = self._schema.tensors[segment.tensor].role is Role.PARAMETER
        return self._subtracted(segment)[0] if is_parameter else self.value(segment)

    def check_dropped(self, transfers: Sequence[TransferSpec]) -> None:
        """Refuse values that are not finite in blocks that stay; the encoder sees the others."""
        sent = [set(transfer.block_ids) for transfer in transfers]
        for number, block in enumerate(self._schema.blocks):
            staying = [place for place, ids in enumerate(sent) if number not in ids]
            for segment in block.segments if staying else ():
                values = self.value(segment)
                check_finite(
                    self._schema.tensors[segment.tensor].name,
                    values if len(staying) == len(sent) else values[staying],
                )
