"""ClientSession: one client's side of a round, without any input or output.

A broadcast goes in, the state to train from comes out; the trained state goes in, the upload comes
out. What a client must keep between rounds is the plain state that `ClientSession.state` gives and
the constructor takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cache

import torch

from fedobd._errors import DecodeError, DecodeReason, UsageError
from fedobd._seeds import derive_seed, make_generator
from fedobd.blocks import (
    ModelSchema,
    ModelState,
    Role,
    Segment,
    StateStack,
    check_state,
    segment_of,
    state_fingerprint,
)
from fedobd.payload import (
    Bytes,
    Header,
    Kind,
    Payload,
    PayloadStream,
    Report,
    Source,
    check_finite,
    encode_payloads,
    refuse_not_finite,
)
from fedobd.sessions._clipping import bound_norms
from fedobd.sessions._intake import check_addressed
from fedobd.sessions._method import Method, Shipment, UplinkContext
from fedobd.sessions._selection import mean_block_differences, subtract

_KEPT_BYTES = 2**26
"""Of differences that are kept: blocks are ranked, measured and quantized by them in turn."""


@dataclass(frozen=True)
class Broadcast:
    """A decoded broadcast, which all clients of a round that share a process can share.

    Args:
        header: what it says.
        values: tensors by name, in the model's element types; only the segments of held blocks
            have meaning.
    """

    header: Header
    values: ModelState

    @classmethod
    def decode(
        cls,
        payload: Bytes | Iterable[Bytes],
        method: Method,
        schema: ModelSchema,
        kind: Kind = Kind.BROADCAST,
        executor: Executor | None = None,
    ) -> Broadcast:
        """Decode a broadcast, opening or delivery.

        Args:
            payload: the whole of it, or its chunks as they come in, of which no more is kept than
                a block.
            method: the run's method.
            schema: the model's schema.
            kind: what is wanted.
            executor: spreads the work on large blocks.

        Raises:
            DecodeError: it is cut, altered, or of another kind, method or model.
        """
        parsed: Payload | PayloadStream
        if isinstance(payload, bytes | bytearray | memoryview):
            parsed = Payload.parse(payload, schema)
        else:
            parsed = PayloadStream(payload, schema)
        check_addressed(parsed.header, kind, method, None, None)
        values: ModelState = {spec.name: tensor for spec, tensor in parsed.frozen()}
        for _, segments in parsed.blocks(executor):
            for decoded in segments:
                spec = schema.tensors[decoded.segment.tensor]
                if decoded.segment.num_elements == spec.num_elements:
                    target = decoded.values.to(spec.dtype)
                    values[spec.name] = target.reshape(spec.shape)
                else:
                    if spec.name not in values:
                        values[spec.name] = torch.zeros(spec.shape, dtype=spec.dtype)
                    target = segment_of(values, spec, decoded.segment)
                    target.copy_(decoded.values)
                if target.dtype != decoded.values.dtype:
                    refuse_not_finite(spec, target)
        return cls(parsed.header, values)


class ClientSession:
    """One client's side of a run.

    Args:
        method: the method with its options, the same as the server's.
        schema: the model's schema.
        client: the client's number.
        seed: the run's seed.
        state: what the client kept from its last round; None for a client that takes part for the
            first time.
        start: the initial model, in a run whose clients hold it already.
        executor: spreads the work on large blocks; the bytes are the same with and without.
    """

    def __init__(
        self,
        method: Method,
        schema: ModelSchema,
        *,
        client: int,
        seed: int = 0,
        state: Mapping[str, torch.Tensor] | None = None,
        start: Mapping[str, torch.Tensor] | None = None,
        executor: Executor | None = None,
    ) -> None:
        self.method = method
        self.schema = schema
        self.client = client
        self.seed = seed
        self._kept: ModelState = dict(state or {})
        self._initial = start
        self._executor = executor
        self._received: Header | None = None
        self._start: ModelState = {}

    @property
    def state(self) -> ModelState:
        """What the client must keep for its next round.

        These are the frozen tensors, and for some methods all it last received.
        """
        return dict(self._kept)

    def open(self, payload: Bytes | Iterable[Bytes] | Broadcast) -> None:
        """Take in the opening payload that comes before a client's first broadcast.

        Raises:
            DecodeError: it is cut, altered, or not for this run's model and method.
        """
        opening = (
            payload
            if isinstance(payload, Broadcast)
            else Broadcast.decode(payload, self.method, self.schema, Kind.OPENING, self._executor)
        )
        if opening.header.start is None:
            self._kept.update(opening.values)
        else:
            kept = self._held_start(opening.header.start)
            names = (self.schema.tensors[number].name for number in self.schema.frozen())
            whole = self.method.keeps_client_state
            self._kept.update(kept if whole else {name: kept[name] for name in names})

    def _held_start(self, fingerprint: bytes) -> ModelState:
        """Return the initial model that this client holds, once it is the run's."""
        if self._initial is None:
            raise UsageError(
                f"client {self.client}: this run starts from a model that its clients hold "
                "already, and this client was given none"
            )
        own = state_fingerprint(self.schema, self._initial)
        if own != fingerprint:
            raise DecodeError(
                DecodeReason.START,
                f"client {self.client} holds another initial model than the server: fingerprint "
                f"{own.hex()}, wanted {fingerprint.hex()}",
            )
        return {spec.name: self._initial[spec.name] for spec in self.schema.tensors}

    def receive(self, payload: Bytes | Iterable[Bytes] | Broadcast) -> ModelState:
        """Take in the round's broadcast.

        Args:
            payload: its bytes, chunks of them, or what `Broadcast.decode` made of them.

        Returns:
            The state Ŵ to train from, by name, in the model's element types. The tensors are the
            session's own; train on copies.

        Raises:
            DecodeError: it is cut, altered, or not for this run's model and method.
            UsageError: it holds only a part of the model, and the client has not kept the rest.
        """
        broadcast = (
            payload
            if isinstance(payload, Broadcast)
            else Broadcast.decode(payload, self.method, self.schema, executor=self._executor)
        )
        header = broadcast.header
        held = set(header.kept)
        if header.start is not None:
            start = self._held_start(header.start)
        else:
            start = dict(broadcast.values)
            for number in self.schema.frozen():
                self._take_kept(start, number)
            for number, block in enumerate(self.schema.blocks):
                if number not in held:
                    for segment in block.segments:
                        self._take_kept(start, segment.tensor, segment)
        self._start, self._received = start, header
        if self.method.keeps_client_state:
            self._kept = dict(start)
        return dict(start)

    def _take_kept(self, start: ModelState, number: int, segment: Segment | None = None) -> None:
        spec = self.schema.tensors[number]
        if spec.name not in self._kept:
            raise UsageError(
                f"client {self.client} has not kept tensor {spec.name!r}, which this broadcast "
                f"does not hold; "
                "it needs an opening payload"
            )
        kept = self._kept[spec.name]
        if segment is None or segment.num_elements == spec.num_elements:
            start[spec.name] = kept
        else:
            mixed = start.get(spec.name, kept).clone()
            segment_of(mixed_state := {spec.name: mixed}, spec, segment).copy_(
                segment_of(self._kept, spec, segment)
            )
            start.update(mixed_state)

    def upload(self, trained: Mapping[str, torch.Tensor], report: Report) -> Iterator[bytes]:
        """Encode the trained state.

        Args:
            trained: the values after local training, by name; on another device than the CPU they
                are quantized there.
            report: examples, losses and validation figures.

        Yields:
            Chunks of the upload.

        Raises:
            UsageError: nothing was received in this round, a tensor is missing or holds NaN, or no
                example was trained on.
        """
        check_state(self.schema, trained)
        stack = StateStack.of([dict(trained)])
        return (bytes(chunk) for _, chunk in encode_uploads([self], stack, [report]))

    def _check_report(self, report: Report) -> Header:
        """Return the header of the round's broadcast, once there is something to upload."""
        if self._received is None:
            raise UsageError(
                f"client {self.client} cannot upload before it has received a broadcast"
            )
        if report.num_examples < 1:
            raise UsageError(f"client {self.client} trained on no examples; at least 1 is wanted")
        return self._received

    def _header(self, received: Header, report: Report, shipment: Shipment) -> Header:
        """Return the header of an upload."""
        return Header(
            kind=Kind.UPLOAD,
            method=self.method.wire_id,
            round=received.round,
            stage=received.stage,
            kept=shipment.kept,
            is_difference=self.method.sends_differences,
            is_lossless=shipment.lossless,
            client=self.client,
            report=report,
            mask=shipment.mask,
            block_differences=shipment.block_differences,
        )


def encode_uploads(
    sessions: Sequence[ClientSession], trained: StateStack, reports: Sequence[Report]
) -> Iterator[tuple[int, Bytes]]:
    """Encode the uploads of clients that were trained together, each with the bytes it has alone.

    Blocks are selected and segments quantized for all clients at once, where their values lie.

    Args:
        sessions: the clients' sessions; all of one run, which have received one broadcast.
        trained: their values after local training.
        reports: what each of them reports.

    Yields:
        A client's place among the sessions and a chunk of its upload, which may be a view of the
        trained values.

    Raises:
        UsageError: as `ClientSession.upload` raises it.
    """
    method, schema, seed = sessions[0].method, sessions[0].schema, sessions[0].seed
    for session, report in zip(sessions, reports, strict=True):
        received = session._check_report(report)
    changes = _Changes(schema, [session._start for session in sessions], trained)
    means = cache(lambda: mean_block_differences(schema, changes.squared_norms))

    def ship(place: int) -> Shipment:
        number = sessions[place].client
        context = UplinkContext(
            schema=schema,
            round=received.round,
            stage=received.stage,
            received=received.kept,
            seed=derive_seed(seed, "uplink", received.round, number),
            block_differences=lambda: means()[place],
        )
        return method.uplink(context)

    shipments = [ship(place) for place in range(len(sessions))]
    changes.check_dropped(shipments)
    source: Source = changes.difference_or_value if method.sends_differences else changes.value
    if any(shipment.bound_norm for shipment in shipments):
        bounded = [own.quantizer if own.bound_norm else None for own in shipments]
        source = bound_norms(source, schema, bounded)
    return encode_payloads(
        schema,
        [
            session._header(received, report, shipment)
            for session, report, shipment in zip(sessions, reports, shipments, strict=True)
        ],
        source,
        [shipment.quantizer for shipment in shipments],
        generator=cache(
            lambda place: make_generator(seed, "rounding", received.round, sessions[place].client)
        ),
        executor=sessions[0]._executor,
    )


class _Changes:
    """What training has made of the values that clients received, segment by segment.

    Args:
        schema: the model's schema.
        starts: what each client received.
        trained: what each has now.
    """

    def __init__(
        self, schema: ModelSchema, starts: Sequence[ModelState], trained: StateStack
    ) -> None:
        self._schema = schema
        self._starts = starts
        self._trained = trained
        self._before = cache(self._start_of)
        self._now = cache(self._trained_of)
        self._kept: dict[Segment, tuple[torch.Tensor, torch.Tensor]] = {}
        self._room = _KEPT_BYTES

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

    def difference(self, segment: Segment) -> torch.Tensor:
        """Return trained less received values, float32, shape (clients, elements)."""
        return self._subtracted(segment)[0]

    def squared_norms(self, segment: Segment) -> torch.Tensor:
        """Return the sums of squares of differences, float64, shape (clients,)."""
        return self._subtracted(segment)[1]

    def _subtracted(self, segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
        found = self._kept.get(segment)
        if found is None:
            now, before = self._now(segment.tensor), self._before(segment.tensor)
            found = subtract(now, before, segment.start, segment.stop)
            if found[0].nbytes <= self._room:
                self._room -= found[0].nbytes
                self._kept[segment] = found
        return found

    def difference_or_value(self, segment: Segment) -> torch.Tensor:
        """Return the difference of a parameter, the value of a buffer."""
        is_parameter = self._schema.tensors[segment.tensor].role is Role.PARAMETER
        return self.difference(segment) if is_parameter else self.value(segment)

    def check_dropped(self, shipments: Sequence[Shipment]) -> None:
        """Refuse values that are not finite in blocks that stay; the encoder sees the others."""
        kept = [set(shipment.kept) for shipment in shipments]
        for number, block in enumerate(self._schema.blocks):
            staying = [place for place, own in enumerate(kept) if number not in own]
            for segment in block.segments if staying else ():
                values = self.value(segment)
                check_finite(
                    self._schema.tensors[segment.tensor].name,
                    values if len(staying) == len(kept) else values[staying],
                )
