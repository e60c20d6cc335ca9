"""CodecGrid: a Grid on which any of Flower's strategies sends and receives compressed payloads."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from logging import WARNING, getLogger
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import nn

from fedobd._errors import DecodeError, DecodeReason
from fedobd._seeds import make_generator
from fedobd.blocks import (
    BlockRules,
    ModelSchema,
    ModelState,
    Role,
    TensorSpec,
    master_state,
    segment_of,
    state_fingerprint,
)
from fedobd.flower._carrier import (
    BROADCAST,
    NEEDS_OPENING,
    OPENING,
    UPLOAD,
    as_array,
    carried,
    carrier,
    carry,
    refusal,
)
from fedobd.flower._exchange import POLL_SECONDS, collect
from fedobd.flower._layout import describe
from fedobd.flower._opening import Opening
from fedobd.methods import Codec, FedOBD
from fedobd.payload import (
    DEFAULT_LIMITS,
    Header,
    Kind,
    Limits,
    Payload,
    encode_payload,
    refuse_not_finite,
)
from fedobd.sessions import MAX_EXAMPLES, all_blocks, check_addressed

logger = getLogger("flwr")  # where Flower shows what a ServerApp says


@dataclass(slots=True)
class Traffic:
    """Bytes of payloads that were really sent and received.

    Args:
        broadcasts: to all nodes together.
        openings: to all nodes together.
        uploads: from all nodes, refused ones included.
        refused: uploads that were refused.
        reopened: openings that were sent again to nodes that had lost theirs.
    """

    broadcasts: int = 0
    openings: int = 0
    uploads: int = 0
    refused: int = 0
    reopened: int = 0


@dataclass(frozen=True, slots=True)
class _Sent:
    """An encoded model, and what is needed to decode replies to it."""

    number: int
    state: ModelState
    payload: bytes
    record: ArrayRecord
    with_opening: ArrayRecord


@dataclass(slots=True)
class _Pending:
    """A message that has not been answered.

    Args:
        message: as it was sent; its reply is shown to the strategy as an answer to it.
        sent: the model in it; None where the message went out as it was.
        was_reopened: whether it was sent a second time, with the opening.
    """

    message: Message
    sent: _Sent | None
    was_reopened: bool = False


@dataclass(slots=True)
class _Model:
    """What is known of the model since its first values were sent."""

    opening: Opening
    array: Array
    fingerprint: bytes | None
    opened: set[int] = field(default_factory=set)


class CodecGrid(Grid):
    """A Grid around another, which compresses what a strategy sends and rebuilds what comes back.

    `strategy.start(grid=CodecGrid(grid), ...)` with any stock strategy; clients have
    `CompressionMod`. The arrays W go out quantized, once for all messages that share them. A reply
    reaches the strategy as an ordinary ArrayRecord: W plus the difference that the client sent; a
    block that it left out as W. A reply that cannot be decoded reaches it as an error reply with
    the reason.

    Args:
        grid: the grid that a ServerApp is given.
        codec: quantizers, β, selection and λ.
        model_factory: makes the model, so that blocks and frozen parameters are known; None to go
            by the names and shapes of the arrays, where everything but buffers is trained.
        rules: how the model is cut into blocks.
        shared_start: the first arrays are the initial model, which clients hold already: its
            fingerprint is sent instead. Clients need `CompressionMod(model_factory=...)`.
        seed: of random selection and stochastic rounding.
        arrayrecord_key: the key of the ArrayRecord that is compressed; others pass as they are.
        max_examples: the largest `num-examples` that a client may report.
        limits: what an upload may take at most.
        poll_seconds: pause between two looks for replies.
    """

    def __init__(
        self,
        grid: Grid,
        codec: Codec | None = None,
        *,
        model_factory: Callable[[], nn.Module] | None = None,
        rules: BlockRules | None = None,
        shared_start: bool = False,
        seed: int = 0,
        arrayrecord_key: str = "arrays",
        max_examples: int = MAX_EXAMPLES,
        limits: Limits = DEFAULT_LIMITS,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self._grid = grid
        self._method = FedOBD(codec=codec or Codec())
        self._model_factory = model_factory
        self._rules = rules
        self._shared_start = shared_start
        self._seed = seed
        self._key = arrayrecord_key
        self._max_examples = max_examples
        self._limits = limits
        self._poll_seconds = poll_seconds
        self._model: _Model | None = None
        self._broadcasts = 0
        self._last: tuple[dict[str, Array], _Sent] | None = None
        self._pending: dict[str, _Pending] = {}
        self._moved: dict[str, str] = {}
        self._has_warned = False
        self.traffic = Traffic()

    # --- what passes through

    def set_run(self, run: Any) -> None:
        """See `Grid.set_run`."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """See `Grid.run`."""
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """See `Grid.create_message`."""
        return self._grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """See `Grid.get_node_ids`."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        """See `Grid.get_nodes`."""
        return self._grid.get_nodes()

    # --- what is encoded

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Encode and send messages; see `Grid.push_messages`.

        Raises:
            UsageError: arrays are not finite, or not those of the model that was sent before.
        """
        self._forget_expired()
        pending = self._encode(list(messages))
        ids = list(self._grid.push_messages([entry.message for entry in pending]))
        for number, entry in zip(ids, pending, strict=False):
            if number:
                self._pending[number] = entry
                self._note(entry.message, entry.sent)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have come, rebuilt; see `Grid.pull_messages`."""
        asked = {self._moved.get(number, number): number for number in message_ids}
        replies = []
        for reply in self._grid.pull_messages(list(asked)):
            number = reply.metadata.reply_to_message_id
            first = asked.get(number, number)
            pending = self._pending.pop(first, None)
            self._moved.pop(first, None)
            if pending is None and _holds_upload(reply):
                continue  # its message was given up, and the model in it let go
            answer = reply if pending is None else self._answer(reply, pending)
            if answer is not None:
                replies.append(answer)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and return their replies; see `Grid.send_and_receive`."""
        ids = {number for number in self.push_messages(messages) if number}
        deadline = None if timeout is None else time.monotonic() + timeout
        replies = list(collect(self, ids, deadline, self._poll_seconds))
        for late in ids:
            self._pending.pop(late, None)
        return replies

    def _forget_expired(self) -> None:
        """Let go of models that are kept for replies that cannot come any more."""
        now = time.time()
        for number, pending in list(self._pending.items()):
            metadata = pending.message.metadata
            if metadata.created_at + metadata.ttl < now:
                del self._pending[number]

    def _encode(self, messages: list[Message]) -> list[_Pending]:
        """Return the messages to send; those that shared a content share the new one too."""
        contents: dict[tuple[int, bool], RecordDict] = {}
        encoded: dict[int, _Sent] = {}
        pending = []
        for original in messages:
            record = original.content.get(self._key) if original.has_content() else None
            if record is None:
                self._warn_of_other_keys(original)
            if not isinstance(record, ArrayRecord) or not _can_be_averaged(record):
                pending.append(_Pending(original, None))
                continue
            if id(record) not in encoded:
                encoded[id(record)] = self._sent(record)
            sent = encoded[id(record)]
            assert self._model is not None
            node = original.metadata.dst_node_id
            is_new = node not in self._model.opened
            shared = contents.setdefault(
                (id(original.content), is_new),
                RecordDict(
                    {
                        **original.content,
                        self._key: sent.with_opening if is_new else sent.record,
                    }
                ),
            )
            pending.append(_Pending(_copy(original, shared), sent))
        return pending

    def _warn_of_other_keys(self, message: Message) -> None:
        """Say once that arrays under another key than the grid's are not compressed."""
        keys = list(message.content.array_records) if message.has_content() else []
        if keys and not self._has_warned:
            self._has_warned = True
            logger.log(
                WARNING,
                "fedobd: a message holds arrays under %s, which are not compressed; "
                "CodecGrid(arrayrecord_key=...) is %r",
                ", ".join(map(repr, keys)),
                self._key,
            )

    def _sent(self, record: ArrayRecord) -> _Sent:
        """Encode a model, or find what was made of it for the messages before."""
        if self._last is not None and _same_arrays(self._last[0], record):
            return self._last[1]
        if self._model is None:
            self._model = self._describe(record)
        opening = self._model.opening
        schema = opening.schema
        values = opening.layout.to_state(record, schema, cast=False)
        state = master_state(schema, values)
        self._broadcasts += 1
        is_start = self._shared_start and self._broadcasts == 1
        header = Header(
            kind=Kind.BROADCAST,
            method=self._method.wire_id,
            round=self._broadcasts,
            stage=1,
            block_ids=all_blocks(schema),
            start=self._model.fingerprint if is_start else None,
        )
        payload = self._payload(schema, header, state)
        sent = _Sent(
            self._broadcasts,
            {spec.name: _own(spec, values[spec.name]) for spec in schema.tensors},
            payload,
            carry(payload, BROADCAST),
            carry(payload, BROADCAST, self._model.array),
        )
        self._last = (dict(record), sent)
        return sent

    def _describe(self, record: ArrayRecord) -> _Model:
        schema, layout = describe(record, self._model_factory, self._rules)
        opening = Opening(
            method=self._method,
            schema=schema,
            layout=layout,
            seed=self._seed,
            shared_start=self._shared_start,
        )
        state = layout.to_state(record, schema)
        start = state_fingerprint(schema, state) if self._shared_start else None
        payload = b""
        if schema.frozen():
            header = Header(
                kind=Kind.INITIAL,
                method=self._method.wire_id,
                round=1,
                stage=1,
                block_ids=(),
                start=start,
            )
            payload = self._payload(schema, header, master_state(schema, state))
        return _Model(opening, as_array(opening.pack(payload), OPENING), start)

    def _payload(self, schema: ModelSchema, header: Header, state: ModelState) -> bytes:
        return encode_payload(
            schema,
            header,
            lambda segment: segment_of(state, schema.tensors[segment.tensor], segment),
            self._method.codec.downlink,
            generator=make_generator(self._seed, "downlink", header.round),
            frozen=lambda spec: state[spec.name],
        ).data

    def _note(self, message: Message, sent: _Sent | None) -> None:
        """Count what was sent."""
        if sent is None or self._model is None:
            return
        self.traffic.broadcasts += len(sent.payload)
        if carried(message.content[self._key], OPENING) is not None:
            self.traffic.openings += len(self._model.array.data)
            self._model.opened.add(message.metadata.dst_node_id)

    # --- what is decoded

    def _answer(self, reply: Message, pending: _Pending) -> Message | None:
        """Return what the strategy sees of a reply; None where the message was sent again."""
        message, sent = pending.message, pending.sent
        if sent is None:
            return reply
        if reply.has_error():
            reason = reply.error.reason or ""
            if reason.startswith(NEEDS_OPENING) and self._reopen(pending, sent):
                return None
            return Message(reply.error, reply_to=message)
        content = reply.content
        is_train = message.metadata.message_type.partition(".")[0] == "train"
        try:
            self._check_examples(content)
            if is_train or carried(content.get(self._key), UPLOAD) is not None:
                content = self._rebuild(content, sent)
        except DecodeError as error:
            self.traffic.refused += 1
            node = message.metadata.dst_node_id
            logger.log(WARNING, "fedobd: the upload of node %d is refused: %s", node, error)
            return refusal(f"fedobd refused the upload: {error}", message)
        return Message(content, reply_to=message)

    def _reopen(self, pending: _Pending, sent: _Sent) -> bool:
        """Send a message again, once, with the opening; say whether it was sent."""
        if pending.was_reopened:
            return False
        content = RecordDict({**pending.message.content, self._key: sent.with_opening})
        again = _copy(pending.message, content)
        number = next(iter(self._grid.push_messages([again])), None)
        if not number:
            return False
        pending.was_reopened = True
        asked = pending.message.metadata.message_id
        self._pending[asked] = pending
        self._moved[asked] = number
        self.traffic.reopened += 1
        self._note(again, sent)
        return True

    def _rebuild(self, content: RecordDict, sent: _Sent) -> RecordDict:
        """Return a reply's content with the client's arrays in place of its upload."""
        assert self._model is not None
        opening = self._model.opening
        upload = carried(content.get(self._key), UPLOAD)
        if upload is None:
            raise DecodeError(
                DecodeReason.KIND,
                f"the reply holds no upload at {self._key!r}; is CompressionMod the first mod of "
                "its ClientApp?",
            )
        self.traffic.uploads += len(upload)
        if list(content.array_records) != [self._key]:
            raise DecodeError(
                DecodeReason.KIND,
                f"the reply holds the ArrayRecords {list(content.array_records)}; wanted one, "
                f"{self._key!r}",
            )
        state = self._decode(upload, opening.schema, sent)
        arrays = opening.layout.to_arrays(state)
        return RecordDict({**content, self._key: arrays})

    def _decode(self, upload: bytes, schema: ModelSchema, sent: _Sent) -> ModelState:
        """Return W plus the differences of an upload; buffers are taken as they came."""
        payload = Payload.parse(upload, schema, self._limits)
        check_addressed(payload.header, Kind.UPLOAD, self._method, sent.number, 1)
        if not payload.header.is_difference:
            raise DecodeError(DecodeReason.METHOD, "the upload holds values, not differences")
        self._method.check_upload(payload.header, schema, all_blocks(schema))
        state = {name: values.clone() for name, values in sent.state.items()}
        for _, segments in payload.blocks():
            for decoded in segments:
                spec = schema.tensors[decoded.segment.tensor]
                target = segment_of(state, spec, decoded.segment)
                if spec.role is Role.PARAMETER:
                    target += decoded.values
                else:
                    target.copy_(decoded.values)
                refuse_not_finite(spec, target.to(spec.dtype))
        return state

    def _check_examples(self, content: RecordDict) -> None:
        for record in content.metric_records.values():
            claimed = record.get("num-examples", 1)
            legal = isinstance(claimed, int | float) and math.isfinite(claimed)
            if not legal or not 1 <= claimed <= self._max_examples:  # type: ignore[operator]
                raise DecodeError(
                    DecodeReason.LIMIT,
                    f"the client reports {claimed!r} examples; allowed are 1 to "
                    f"{self._max_examples}",
                )


def _holds_upload(reply: Message) -> bool:
    return reply.has_content() and carrier(reply.content, UPLOAD) is not None


def _can_be_averaged(record: ArrayRecord) -> bool:
    """Whether there is anything to train; trees of XGBoost are bytes, and pass as they are."""
    return any("float" in array.dtype or "complex" in array.dtype for array in record.values())


def _same_arrays(first: Mapping[str, Array], second: Mapping[str, Array]) -> bool:
    """Whether two records hold the same objects; a record may be changed in place."""
    return list(first) == list(second) and all(first[key] is second[key] for key in first)


def _own(spec: TensorSpec, values: torch.Tensor) -> torch.Tensor:
    """Return W's values as replies show them: never coarser than W or the model."""
    if not spec.is_floating:
        return values.to(spec.dtype)
    return values.to(torch.promote_types(values.dtype, spec.dtype))


def _copy(message: Message, content: RecordDict) -> Message:
    """Return a message like another one, with another content."""
    meta = message.metadata
    return Message(
        content,
        meta.dst_node_id,
        meta.message_type,
        ttl=meta.ttl,
        group_id=meta.group_id,
    )
