"""ClientSession: one client's side of a round, without any input or output.

A broadcast goes in, the state to train from comes out; the trained state goes in, the upload comes
out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass

import torch

from fedobd._errors import DecodeError, DecodeReason, UsageError
from fedobd.blocks import (
    ModelSchema,
    ModelState,
    Segment,
    StateStack,
    check_state,
    segment_of,
    state_fingerprint,
)
from fedobd.payload import (
    Bytes,
    EncodedPayload,
    Header,
    Kind,
    Payload,
    PayloadStream,
    Report,
    refuse_not_finite,
)
from fedobd.sessions._aggregator import check_addressed
from fedobd.sessions._method import Method
from fedobd.sessions._upload import Received, encode_uploads


@dataclass(frozen=True)
class Broadcast:
    """A decoded broadcast, which all clients of a round that share a process can share.

    Values are tensors by name, in the model's element types; only held blocks' have meaning.
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
        """Decode a broadcast, an initial payload or a delivery, whichever is wanted.

        It comes whole, or in chunks, of which no more is kept than a block.

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
        method, schema, seed: the run's, the same as the server's.
        client: the client's number.
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
        self._received: Received | None = None

    @property
    def state(self) -> ModelState:
        """What the client must keep: frozen tensors; for some methods all it last received."""
        return dict(self._kept)

    def initialize(self, payload: Bytes | Iterable[Bytes] | Broadcast) -> None:
        """Take in the initial payload that comes before a client's first broadcast.

        Raises:
            DecodeError: it is cut, altered, or not for this run's model and method.
        """
        initial = self._decoded(payload, Kind.INITIAL)
        if initial.header.start is None:
            self._kept.update(initial.values)
        else:
            kept = self._held_start(initial.header.start)
            names = (self.schema.tensors[number].name for number in self.schema.frozen())
            whole = self.method.keeps_client_state
            self._kept.update(kept if whole else {name: kept[name] for name in names})

    def _decoded(self, payload: Bytes | Iterable[Bytes] | Broadcast, kind: Kind) -> Broadcast:
        if isinstance(payload, Broadcast):
            return payload
        return Broadcast.decode(payload, self.method, self.schema, kind, self._executor)

    def _held_start(self, fingerprint: bytes) -> ModelState:
        """Return the initial model that this client holds, once it is the run's."""
        if self._initial is None:
            raise UsageError(
                f"client {self.client}: this run starts from a model that its clients hold "
                "already, and this client was given none"
            )
        held = state_fingerprint(self.schema, self._initial)
        if held != fingerprint:
            raise DecodeError(
                DecodeReason.START,
                f"client {self.client} holds another initial model than the server: fingerprint "
                f"{held.hex()}, wanted {fingerprint.hex()}",
            )
        return {spec.name: self._initial[spec.name] for spec in self.schema.tensors}

    def receive(self, payload: Bytes | Iterable[Bytes] | Broadcast) -> ModelState:
        """Take in the round's broadcast; return the state Ŵ to train from.

        Its tensors, by name, in the model's element types, are the session's own; train on copies.

        Raises:
            DecodeError: it is cut, altered, or not for this run's model and method.
            UsageError: it holds only a part of the model, and the client has not kept the rest.
        """
        broadcast = self._decoded(payload, Kind.BROADCAST)
        header = broadcast.header
        held = set(header.block_ids)
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
        self._received = Received(self.client, header, start)
        if self.method.keeps_client_state:
            self._kept = dict(start)
        return dict(start)

    def _take_kept(self, start: ModelState, number: int, segment: Segment | None = None) -> None:
        spec = self.schema.tensors[number]
        if spec.name not in self._kept:
            raise UsageError(
                f"client {self.client} has not kept tensor {spec.name!r}, which this broadcast "
                "does not hold; it needs an initial payload"
            )
        kept = self._kept[spec.name]
        if segment is None or segment.num_elements == spec.num_elements:
            start[spec.name] = kept
        else:
            start[spec.name] = start.get(spec.name, kept).clone()
            segment_of(start, spec, segment).copy_(segment_of(self._kept, spec, segment))

    @property
    def received(self) -> Received:
        """What the client received in this round.

        Raises:
            UsageError: nothing so far.
        """
        if self._received is None:
            raise UsageError(
                f"client {self.client} cannot upload before it has received a broadcast"
            )
        return self._received

    def upload(self, trained: Mapping[str, torch.Tensor], report: Report) -> EncodedPayload:
        """Return the upload of the trained state, with bytes of its own.

        Values are by name, in the model's shapes and any floating type; on another device than
        the CPU they are quantized there.

        Raises:
            UsageError: nothing was received in this round, a tensor is missing or holds NaN, or no
                example was trained on.
        """
        check_state(self.schema, trained)
        (payload,) = encode_uploads(
            self.method,
            self.schema,
            [self.received],
            StateStack.of([dict(trained)]),
            [report],
            seed=self.seed,
            executor=self._executor,
        )
        return payload.copied()
