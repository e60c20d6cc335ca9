"""Writes the golden files: `PYTHONPATH=src python -m tests.golden.make`, by hand and seldom.

A golden file is a promise to those who keep payloads: it is written anew only when the format's
version changes. The expected values come from the inputs (through the slow reference for NNADQ),
not from the decoder under test, apart from the random draws of stochastic quantization.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fedobd.blocks import (
    Block,
    ModelSchema,
    ModelState,
    Role,
    Segment,
    TensorSpec,
    segment_of,
    state_fingerprint,
)
from fedobd.codec import NNADQ, Coding, Mask, Quantizer, SegmentCode, Stochastic, Unquantized
from fedobd.payload import Header, Kind, Payload, Report, encode_payload
from fedobd.payload._wire import pack_header
from tests.golden.slow_coder import Part, encode_stream, make_table, varint
from tests.nnadq_reference import reference_nnadq

FOLDER = Path(__file__).parent

MOST_LISTED = 64
"""Longer values are given by their digest, so that the list stays short."""

Piece = int | tuple[int, int, int]
"""A whole tensor by its number, or tensor number, first and past-the-last element."""


def tensor_spec(
    name: str,
    *shape: int,
    dtype: torch.dtype = torch.float32,
    role: Role = Role.PARAMETER,
) -> TensorSpec:
    return TensorSpec(name, shape, dtype, role)


def make_schema(specs: Sequence[TensorSpec], *blocks: Sequence[Piece]) -> ModelSchema:
    """Build a schema from its tensors and the pieces of each block."""
    built = []
    for number, pieces in enumerate(blocks):
        segments = tuple(
            Segment(piece, 0, specs[piece].num_elements)
            if isinstance(piece, int)
            else Segment(*piece)
            for piece in pieces
        )
        count = sum(s.num_elements for s in segments if specs[s.tensor].role is Role.PARAMETER)
        built.append(Block(f"b{number}", "Test", (f"b{number}",), segments, count))
    return ModelSchema(tuple(specs), tuple(built))


def make_header(schema: ModelSchema, kind: Kind = Kind.BROADCAST, **options: Any) -> Header:
    """Build a header of round 3 that holds all blocks, with a report where one belongs."""
    if kind is Kind.UPLOAD:
        options = {"client": 7, "report": REPORT, **options}
    kept = tuple(options.pop("kept", range(len(schema.blocks))))
    return Header(kind=kind, method=5, round=3, stage=1, block_ids=kept, **options)


REPORT = Report(
    num_examples=500,
    train_loss=0.75,
    num_validation_examples=40,
    validation_loss=0.5,
    validation_metric=0.875,
)


def encode(
    schema: ModelSchema,
    state: Mapping[str, torch.Tensor],
    header: Header,
    quantizer: Quantizer,
    start: Mapping[str, torch.Tensor] | None = None,
) -> bytes:
    """Return the payload; stochastic levels are drawn from one and the same seed."""
    payload = encode_payload(
        schema,
        header,
        lambda segment: values_of(schema, state, segment, start),
        quantizer,
        generator=torch.Generator().manual_seed(0),
        frozen=lambda spec: state[spec.name],
    )
    return payload.data


def values_of(
    schema: ModelSchema,
    state: Mapping[str, torch.Tensor],
    segment: Segment,
    start: Mapping[str, torch.Tensor] | None,
) -> torch.Tensor:
    """Give a segment of a state; with a start, float32 differences to it for parameters."""
    spec = schema.tensors[segment.tensor]
    values = segment_of(state, spec, segment)
    if start is None or spec.role is not Role.PARAMETER:
        return values
    return values.to(torch.float32) - segment_of(start, spec, segment).to(torch.float32)


def bytes_of(values: torch.Tensor) -> bytes:
    """Give the little-endian bytes of a 1-D tensor."""
    return values.contiguous().view(torch.uint8).numpy().tobytes() if values.numel() else b""


def describe_values(values: torch.Tensor) -> dict[str, Any]:
    """Give a 1-D tensor as its type and its little-endian bytes, or their digest."""
    facts: dict[str, Any] = {"dtype": str(values.dtype).removeprefix("torch.")}
    data = bytes_of(values)
    if values.numel() > MOST_LISTED:
        return facts | {"blake2b": hashlib.blake2b(data, digest_size=16).hexdigest()}
    return facts | {"hex": data.hex()}


def describe_header(header: Header) -> dict[str, Any]:
    """Give a header as JSON values."""
    facts = asdict(header)
    facts["kind"] = header.kind.name
    facts["start"] = None if header.start is None else header.start.hex()
    # through JSON once, so that tuples are lists on both sides of a comparison
    plain: dict[str, Any] = json.loads(json.dumps(facts, allow_nan=False))
    return plain


def describe(data: bytes, schema: ModelSchema) -> dict[str, Any]:
    """Give all that a payload says as JSON values, as the decoder sees it."""
    payload = Payload.parse(data, schema)
    values: list[dict[str, Any]] = []
    for number, segments in payload.blocks():
        for decoded in segments:
            entry = {
                "block": number,
                "tensor": schema.tensors[decoded.segment.tensor].name,
                "start": decoded.segment.start,
                "stop": decoded.segment.stop,
                **describe_values(decoded.values),
            }
            if decoded.mask is not None:
                entry["mask"] = "".join("01"[int(kept)] for kept in decoded.mask)
            values.append(entry)
    return {
        "header": describe_header(payload.header),
        "num_bytes": asdict(payload.num_bytes),
        "codings": [code.coding.name for _, _, code in payload.codes()],
        "frozen": [
            {
                "tensor": spec.name,
                "shape": list(values.shape),
                **describe_values(values.reshape(-1)),
            }
            for spec, values in payload.frozen()
        ],
        "values": values,
    }


def expected_segment(
    schema: ModelSchema,
    segment: Segment,
    values: torch.Tensor,
    header: Header,
    quantizer: Quantizer,
) -> dict[str, Any] | None:
    """What a segment must decode to, from the inputs alone; None where draws decide."""
    spec = schema.tensors[segment.tensor]
    is_parameter = spec.role is Role.PARAMETER
    if is_parameter and header.mask is not None:
        start = schema.mask_offset(segment)
        values = values[torch.from_numpy(header.mask.kept(start, start + segment.num_elements))]
    elif is_parameter and isinstance(quantizer, NNADQ):
        floats = [float(v) for v in values]
        reference = reference_nnadq(floats, quantizer.weight, spec.repr_bits)
        if reference.coding != "raw":
            return describe_values(torch.tensor(reference.decoded, dtype=torch.float32))
    elif is_parameter and isinstance(quantizer, Stochastic):
        return None
    plain = torch.float32 if header.is_difference and is_parameter else spec.wire_dtype
    return describe_values(values.to(plain))


def make_case(
    schema: ModelSchema,
    header: Header,
    state: ModelState,
    quantizer: Quantizer,
    start: Mapping[str, torch.Tensor] | None = None,
) -> tuple[bytes, dict[str, Any]]:
    """Encode a payload, and describe it after a check against its inputs."""
    data = encode(schema, state, header, quantizer, start)
    facts = describe(data, schema)
    assert facts["header"] == describe_header(header)
    entries = iter(facts["values"])
    for number in header.coded:
        for segment in schema.blocks[number].segments:
            entry = next(entries)
            values = values_of(schema, state, segment, start)
            wanted = expected_segment(schema, segment, values, header, quantizer)
            if wanted is not None:
                assert {**entry, **wanted} == entry, (entry, wanted)
    for entry in facts["frozen"]:
        wanted = describe_values(state[entry["tensor"]].reshape(-1))
        assert {**entry, **wanted} == entry
    return data, {"schema": schema.to_json(), **facts}


def plain_state(schema: ModelSchema, shift: int, step: int = 37) -> ModelState:
    """Values by arithmetic, exact in every type, so that no library's generator is involved."""
    state: ModelState = {}
    for number, spec in enumerate(schema.tensors):
        steps = torch.arange(spec.num_elements) * step + 17 * number + shift
        values = (steps % 101 - 50) / 64 if spec.is_floating else steps % 2
        state[spec.name] = values.reshape(spec.shape).to(spec.dtype)
    return state


def mixed_schema() -> ModelSchema:
    """Parameters, buffers, and a tensor that two blocks share."""
    return make_schema(
        [
            tensor_spec("conv.weight", 4, 3),
            tensor_spec("conv.bias", 4),
            tensor_spec("norm.running_mean", 2, role=Role.BUFFER),
            tensor_spec("norm.num_batches_tracked", dtype=torch.int64, role=Role.BUFFER),
            tensor_spec("norm.weight"),
            tensor_spec("out.weight", 5, 2),
        ],
        [0, 1],
        [2, 3, 4],
        [(5, 0, 4)],
        [(5, 4, 10)],
    )


def coder_schema() -> ModelSchema:
    """One block whose segments want tables of every sort."""
    return make_schema(
        [
            tensor_spec("skewed", 300),
            tensor_spec("fine", 30),
            tensor_spec("even", 7),
            tensor_spec("flat", 5),
            tensor_spec("empty", 0),
            tensor_spec("wide", 2),
        ],
        [0, 1, 2, 3, 4, 5],
    )


def coder_state() -> ModelState:
    """Many like values, fine ones, few different ones, a constant, none, and too wide ones."""
    skewed = torch.zeros(300)
    skewed[::29], skewed[5::50], skewed[7] = 0.25, -0.125, 1.0
    return {
        "skewed": skewed,
        "fine": (torch.arange(30) * 7919 % 1009 - 500) * 16.0,
        "even": torch.tensor([-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]) / 64,
        "flat": torch.full((5,), -0.375),
        "empty": torch.zeros(0),
        "wide": torch.tensor([3e38, -3e38]),
    }


def two_chunks() -> tuple[bytes, dict[str, Any]]:
    """A payload of the slow coder: the package's own encoder makes larger chunks.

    The first of its chunks ends within a segment and between two lanes' turns; its second segment
    has low bits.
    """
    schema = make_schema([tensor_spec("w", 4101), tensor_spec("v", 6)], [0, 1])
    rows = [[0] * 4101, [-5000, 5000, 0, 1, 2, -3]]
    for i in range(0, 4101, 53):
        rows[0][i] = i // 53 % 7 - 3
    codes = (
        SegmentCode(Coding.LEVELS, 3, 0.5, 0.75),
        SegmentCode(Coding.LEVELS, 5000, -1.0, 2.5),
    )
    parts = []
    for levels, code, (k, m) in zip(rows, codes, ((11, 1), (6, 0)), strict=True):
        symbols = [level + code.num_levels for level in levels]
        table = make_table(symbols, code.num_levels, k, m)
        parts.append(Part(symbols, code.num_levels, table))
    stream = encode_stream(parts, 12)
    header = make_header(schema)
    body = pack_header(schema, header, [codes]) + varint(len(stream)) + stream
    data = body + zlib.crc32(body).to_bytes(4, "little")
    facts = describe(data, schema)
    assert facts["header"] == describe_header(header)
    for entry, levels, code in zip(facts["values"], rows, codes, strict=True):
        step = torch.tensor(code.range) / torch.tensor(float(code.num_levels))
        wanted = torch.tensor(levels, dtype=torch.float32) * step + torch.tensor(code.offset)
        assert {**entry, **describe_values(wanted)} == entry
    return data, {"schema": schema.to_json(), **facts}


def golden_cases() -> dict[str, tuple[bytes, dict[str, Any]]]:
    """The golden payloads by name."""
    mixed = mixed_schema()
    state, start = plain_state(mixed, 1), plain_state(mixed, 2, step=41)
    state["conv.bias"] = torch.full((4,), -0.5)
    bf16 = make_schema(
        [
            tensor_spec("w", 3, 3, dtype=torch.bfloat16),
            tensor_spec("fine", 4, dtype=torch.bfloat16),
            tensor_spec("mean", 3, dtype=torch.bfloat16, role=Role.BUFFER),
            tensor_spec("flags", 3, dtype=torch.bool, role=Role.BUFFER),
        ],
        [0, 2],
        [1, 3],
    )
    bf16_state = plain_state(bf16, 3)
    # so wide a range wants more levels than 16 bits hold, and travels raw
    bf16_state["fine"] = torch.tensor([1e9, -1e9, 3.0, 0.0]).to(torch.bfloat16)
    ice = make_schema(
        [
            tensor_spec("head", 3),
            tensor_spec("table", 2, 3, role=Role.FROZEN),
            tensor_spec("scale", dtype=torch.float64, role=Role.FROZEN),
            tensor_spec("half", 2, dtype=torch.float16, role=Role.FROZEN),
            tensor_spec("ids", 3, dtype=torch.int32, role=Role.FROZEN),
        ],
        [0],
    )
    ice_state = plain_state(ice, 4)
    upload, mask = Kind.UPLOAD, Mask.of_rate(7, 0.3)
    differences = make_header(
        mixed,
        upload,
        kept=[0, 1, 3],
        is_difference=True,
        is_lossless=True,
        block_differences=(0.5, 1.0, 0.0, 0.25),
    )
    stands = make_header(ice, start=state_fingerprint(ice, ice_state))
    opening = make_header(ice, Kind.INITIAL, kept=[])
    qsgd = make_header(mixed, upload, is_difference=True)
    masked = make_header(mixed, upload, mask=mask)
    packed = make_header(mixed, upload, mask=mask, is_lossless=True)
    lossless = make_header(mixed, is_lossless=True)
    coder = coder_schema()
    return {
        "upload_nnadq_differences": make_case(mixed, differences, state, NNADQ(1e-3), start),
        "broadcast_nnadq": make_case(mixed, make_header(mixed), state, NNADQ(1e-2)),
        "upload_qsgd": make_case(mixed, qsgd, state, Stochastic(255), start),
        "broadcast_raw": make_case(mixed, make_header(mixed), state, Unquantized()),
        "broadcast_lossless": make_case(mixed, lossless, state, Unquantized()),
        "upload_masked": make_case(mixed, masked, state, Unquantized()),
        "upload_masked_lossless": make_case(mixed, packed, state, Unquantized()),
        "opening_frozen": make_case(ice, opening, ice_state, Unquantized()),
        "broadcast_start": make_case(ice, stands, ice_state, NNADQ(1e-2)),
        "broadcast_bf16": make_case(bf16, make_header(bf16), bf16_state, NNADQ(1e-2)),
        "delivery_tables": make_case(
            coder, make_header(coder, Kind.DELIVERY), coder_state(), NNADQ(1e-2)
        ),
        "broadcast_two_chunks": two_chunks(),
    }


def write_golden() -> None:
    """Write every golden file and the list of them."""
    cases = golden_cases()
    for path in FOLDER.glob("*.bin"):
        path.unlink()
    for name, (data, _) in cases.items():
        (FOLDER / f"{name}.bin").write_bytes(data)
    facts = {name: fact for name, (_, fact) in cases.items()}
    (FOLDER / "cases.json").write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    write_golden()
