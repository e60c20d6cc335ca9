"""Reads a payload whole, in pieces and with the second reader, and compares what they say."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from fedobd._errors import DecodeError
from fedobd.blocks import ModelSchema, TensorSpec
from fedobd.payload import DecodedSegment, Header, Payload, PayloadStream
from tests import second_reader
from tests.golden.make import FOLDER as GOLDEN
from tests.golden.make import bytes_of


@dataclass(frozen=True)
class Reading:
    """What a reader made of a payload: its values, or why it was refused."""

    header: dict[str, Any]
    frozen: tuple[second_reader.Values, ...] = ()
    values: tuple[second_reader.Values, ...] = ()
    reason: str | None = None


@cache
def schemas() -> dict[str, ModelSchema]:
    """The schemas of the golden payloads, by the names of these."""
    cases = json.loads((GOLDEN / "cases.json").read_text())
    return {name: ModelSchema.from_json(case["schema"]) for name, case in cases.items()}


@cache
def schemas_by_fingerprint() -> dict[bytes, ModelSchema]:
    return {schema.fingerprint: schema for schema in schemas().values()}


@cache
def schema_as_json(fingerprint: bytes) -> dict[str, Any]:
    return schemas_by_fingerprint()[fingerprint].to_json()


def facts_of(header: Header) -> dict[str, Any]:
    """Give a header's fields under the names of the second reader, those that are there."""
    facts: dict[str, Any] = {
        "kind": int(header.kind),
        "method": header.method,
        "round": header.round,
        "stage": header.stage,
        "kept": header.block_ids,
    }
    if header.report is not None:
        report = header.report
        facts |= {
            "client": header.client,
            "num_examples": report.num_examples,
            "train_loss": report.train_loss,
            "num_validation_examples": report.num_validation_examples,
            "validation_loss": report.validation_loss,
            "validation_metric": report.validation_metric,
        }
    if header.mask is not None:
        facts["mask"] = (header.mask.seed, header.mask.threshold)
    if header.start is not None:
        facts["start"] = header.start
    if header.block_differences is not None:
        facts["block_differences"] = header.block_differences
    return facts


def as_values(schema: ModelSchema, block: int, decoded: DecodedSegment) -> second_reader.Values:
    segment = decoded.segment
    return second_reader.Values(
        block,
        schema.tensors[segment.tensor].name,
        segment.start,
        segment.stop,
        str(decoded.values.dtype).removeprefix("torch."),
        bytes_of(decoded.values),
        None if decoded.mask is None else tuple(decoded.mask.tolist()),
    )


def as_frozen(spec: TensorSpec, values: torch.Tensor) -> second_reader.Values:
    dtype = str(values.dtype).removeprefix("torch.")
    return second_reader.Values(
        -1, spec.name, 0, spec.num_elements, dtype, bytes_of(values.reshape(-1))
    )


def all_finite(values: Iterable[torch.Tensor]) -> bool:
    return all(
        math.isfinite(float(part.double().abs().max()))
        for part in values
        if part.is_floating_point() and part.numel()
    )


def reading_of(payload: Payload | PayloadStream, schema: ModelSchema) -> Reading:
    """Decode all of a payload."""
    frozen = list(payload.frozen())
    decoded = [(number, part) for number, parts in payload.blocks() for part in parts]
    assert all_finite([values for _, values in frozen] + [part.values for _, part in decoded])
    return Reading(
        facts_of(payload.header),
        tuple(as_frozen(spec, values) for spec, values in frozen),
        tuple(as_values(schema, number, part) for number, part in decoded),
    )


def read_whole(data: bytes, schema: ModelSchema) -> Reading:
    """Read with `Payload`; any exception but DecodeError passes through."""
    try:
        return reading_of(Payload.parse(data, schema), schema)
    except DecodeError as error:
        return Reading({}, reason=error.reason.value)


def read_in_pieces(data: bytes, schema: ModelSchema, size: int = 7) -> Reading:
    """Read with `PayloadStream`; any exception but DecodeError passes through."""
    chunks = (data[start : start + size] for start in range(0, len(data), size))
    try:
        return reading_of(PayloadStream(chunks, schema), schema)
    except DecodeError as error:
        return Reading({}, reason=error.reason.value)


def read_again(data: bytes, schema: ModelSchema) -> Reading:
    """Read with the second reader; any exception but its own passes through."""
    if schema.fingerprint in schemas_by_fingerprint():
        as_json = schema_as_json(schema.fingerprint)
    else:
        as_json = json.loads(json.dumps(schema.to_json()))
    try:
        payload = second_reader.read_payload(data, as_json)
    except second_reader.RefusedError as error:
        return Reading({}, reason=error.reason)
    unsaid = ("magic", "version", "flags", "fingerprint")
    header = {name: value for name, value in payload.header.items() if name not in unsaid}
    return Reading(header, tuple(payload.frozen), tuple(payload.values))


def check_alike(data: bytes, schema: ModelSchema) -> Reading:
    """Read a payload three ways: all give the same values, or all refuse.

    A payload with several faults may be refused for any of them, so reasons are not compared.
    """
    whole, again = read_whole(data, schema), read_again(data, schema)
    same = whole == again if whole.reason is None else again.reason is not None
    assert same, (data.hex(), whole.reason, again.reason)
    pieces = read_in_pieces(data, schema)
    if whole.reason is None:
        assert pieces == whole, (data.hex(), pieces.reason)
    else:
        assert pieces.reason is not None, (data.hex(), whole.reason)
    return whole
