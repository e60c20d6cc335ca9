"""ModelCodec: a strategy's arrays as payloads, and clients' uploads as arrays again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from flwr.app import Array, ArrayRecord
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
from fedobd.flower._handshake import Handshake, describe
from fedobd.flower._messages import BROADCAST, HANDSHAKE, as_array, carry
from fedobd.methods import FedOBD
from fedobd.payload import Header, Kind, Limits, Payload, encode_payload, refuse_not_finite
from fedobd.sessions import all_blocks, check_addressed


@dataclass(frozen=True, slots=True)
class EncodedModel:
    """A model as it is sent, and what is needed to decode replies to it.

    Args:
        number: counts the models that were encoded, from 1.
        state: W's values, in the shapes of the schema; floats never coarser than W or the model.
        payload: the broadcast.
        record: carries the broadcast.
        with_handshake: carries the broadcast and the handshake.
    """

    number: int
    state: ModelState
    payload: bytes
    record: ArrayRecord
    with_handshake: ArrayRecord


@dataclass(frozen=True, slots=True)
class _Described:
    """What is known of the model since its first values were encoded."""

    handshake: Handshake
    packed: Array
    fingerprint: bytes | None


class ModelCodec:
    """Encodes the arrays W of one model, and decodes what clients make of them.

    Args:
        method: the method; its codec quantizes.
        model_factory: makes the model; None to go by the names and shapes of the arrays.
        rules: how it is cut into blocks.
        shared_start: the first arrays are the initial model, which clients hold already.
        seed: of random selection and stochastic rounding.
        limits: what an upload may take at most.
    """

    def __init__(
        self,
        method: FedOBD,
        *,
        model_factory: Callable[[], nn.Module] | None,
        rules: BlockRules | None,
        shared_start: bool,
        seed: int,
        limits: Limits,
    ) -> None:
        self._method = method
        self._model_factory = model_factory
        self._rules = rules
        self._shared_start = shared_start
        self._seed = seed
        self._limits = limits
        self._described: _Described | None = None
        self._number = 0
        self._last: tuple[dict[str, Array], EncodedModel] | None = None

    def encode(self, record: ArrayRecord) -> EncodedModel:
        """Encode a model, or return what was made of it the last time.

        Args:
            record: all values of the model, in the shapes of its state dict.

        Raises:
            UsageError: arrays are not finite, or not those of the model that was encoded before.
        """
        if self._last is not None and _same_arrays(self._last[0], record):
            return self._last[1]
        known = self._described = self._described or self._describe(record)
        schema = known.handshake.schema
        values = known.handshake.keys.to_state(record, schema, cast=False)
        self._number += 1
        payload = self._payload(
            schema,
            Header(
                kind=Kind.BROADCAST,
                method=self._method.wire_id,
                round=self._number,
                stage=1,
                block_ids=all_blocks(schema),
                start=known.fingerprint if self._number == 1 else None,
            ),
            master_state(schema, values),
        )
        encoded = EncodedModel(
            self._number,
            {spec.name: _shown(spec, values[spec.name]) for spec in schema.tensors},
            payload,
            carry(payload, BROADCAST),
            carry(payload, BROADCAST, known.packed),
        )
        self._last = (dict(record), encoded)
        return encoded

    def _describe(self, record: ArrayRecord) -> _Described:
        schema, keys = describe(record, self._model_factory, self._rules)
        handshake = Handshake(
            method=self._method,
            schema=schema,
            keys=keys,
            seed=self._seed,
            shared_start=self._shared_start,
        )
        state = keys.to_state(record, schema)
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
        return _Described(handshake, as_array(handshake.pack(payload), HANDSHAKE), start)

    def _payload(self, schema: ModelSchema, header: Header, state: ModelState) -> bytes:
        return encode_payload(
            schema,
            header,
            lambda segment: segment_of(state, schema.tensors[segment.tensor], segment),
            self._method.codec.downlink,
            generator=make_generator(self._seed, "downlink", header.round),
            frozen=lambda spec: state[spec.name],
        ).data

    def decode(self, upload: bytes, sent: EncodedModel) -> ArrayRecord:
        """Return W plus the differences of an upload; buffers are taken as they came.

        W, and not Ŵ on which the client trained: that would add the broadcast's error to the
        model in every round.

        Args:
            upload: a client's payload.
            sent: the model that the client got.

        Returns:
            Arrays under W's keys, in their shapes; see `EncodedModel` for element types.

        Raises:
            DecodeError: it is cut, altered, no answer to this model, or not finite.
        """
        assert self._described is not None
        handshake = self._described.handshake
        schema = handshake.schema
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
        return handshake.keys.to_arrays(state)


def _same_arrays(first: Mapping[str, Array], second: Mapping[str, Array]) -> bool:
    """Whether two records hold the same objects; a record may be changed in place."""
    return list(first) == list(second) and all(first[key] is second[key] for key in first)


def _shown(spec: TensorSpec, values: torch.Tensor) -> torch.Tensor:
    """Return W's values as replies show them: never coarser than W or the model."""
    if not spec.is_floating:
        return values.to(spec.dtype)
    return values.to(torch.promote_types(values.dtype, spec.dtype))
