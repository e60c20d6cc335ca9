"""Writes the golden files: `PYTHONPATH=src python -m tests.golden.make`, by hand and seldom.

A golden file is a promise to those who keep payloads: it is written anew only when the format's
version changes. The expected values come from the inputs (through the slow reference for NNADQ),
not from the decoder under test, apart from the random draws of stochastic quantization.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fedobd._masks import Mask
from fedobd._payload import Payload
from fedobd._quantization import NNADQ, Quantizer, Stochastic, Unquantized
from fedobd._schema import ModelSchema, Role, Segment
from fedobd._state import ModelState
from fedobd._wire import Header, Kind, Report
from tests.helpers import (
    buffer,
    encode,
    frozen,
    header_of,
    make_schema,
    parameter,
    source_of,
)
from tests.nnadq_reference import reference_nnadq

FOLDER = Path(__file__).parent


def describe_values(values: torch.Tensor) -> dict[str, Any]:
    """Give a 1-D tensor as its type and hexadecimal little-endian float32, or a list."""
    dtype = str(values.dtype).removeprefix("torch.")
    if values.dtype is torch.float64 or not values.is_floating_point():
        return {"dtype": dtype, "list": values.tolist()}
    array = values.to(torch.float32).numpy().astype("<f4")
    return {"dtype": dtype, "hex": array.tobytes().hex()}


def describe_header(header: Header) -> dict[str, Any]:
    """Give a header as JSON values."""
    facts = asdict(header)
    facts["kind"] = header.kind.name
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
    data = encode(schema, state, header, quantizer, start=start)
    facts = describe(data, schema)
    assert facts["header"] == describe_header(header)
    source = source_of(schema, state, start)
    entries = iter(facts["values"])
    for number in header.kept:
        for segment in schema.blocks[number].segments:
            entry = next(entries)
            wanted = expected_segment(schema, segment, source(segment), header, quantizer)
            if wanted is not None:
                assert {**entry, **wanted} == entry, (entry, wanted)
    for entry in facts["frozen"]:
        wanted = describe_values(state[entry["tensor"]].reshape(-1))
        assert {**entry, **wanted} == entry
    return data, {"schema": schema.to_json(), **facts}


def plain_state(schema: ModelSchema, shift: int) -> ModelState:
    """Values by arithmetic, exact in every type, so that no library's generator is involved."""
    state: ModelState = {}
    for number, spec in enumerate(schema.tensors):
        steps = torch.arange(spec.num_elements) * 37 + 17 * number + shift
        values = (steps % 101 - 50) / 64 if spec.is_floating else steps % 2
        state[spec.name] = values.reshape(spec.shape).to(spec.dtype)
    return state


def golden_cases() -> dict[str, tuple[bytes, dict[str, Any]]]:
    """The golden payloads by name."""
    mixed = make_schema(
        [
            parameter("conv.weight", 4, 3),
            parameter("conv.bias", 4),
            buffer("norm.running_mean", 2),
            buffer("norm.num_batches_tracked", dtype=torch.int64),
            parameter("norm.weight"),
            parameter("out.weight", 5, 2),
        ],
        [0, 1],
        [2, 3, 4],
        [(5, 0, 4)],
        [(5, 4, 10)],
    )
    state, start = plain_state(mixed, 1), plain_state(mixed, 2)
    state["conv.bias"] = torch.full((4,), -0.5)
    report = Report(
        num_examples=500,
        train_loss=0.75,
        num_validation_examples=40,
        validation_loss=0.5,
        validation_metric=0.875,
    )

    def upload(**options: Any) -> Header:
        return header_of(mixed, Kind.UPLOAD, report=report, **options)

    bf16 = make_schema(
        [
            parameter("w", 3, 3, dtype=torch.bfloat16),
            parameter("fine", 4, dtype=torch.bfloat16),
            buffer("mean", 3, dtype=torch.bfloat16),
            buffer("flags", 3, dtype=torch.bool),
        ],
        [0, 2],
        [1, 3],
    )
    bf16_state = plain_state(bf16, 3)
    # so wide a range wants more levels than 16 bits hold, and travels raw
    bf16_state["fine"] = torch.tensor([1e9, -1e9, 3.0, 0.0]).to(torch.bfloat16)
    ice = make_schema(
        [
            parameter("head", 3),
            frozen("table", 2, 3),
            frozen("scale", dtype=torch.float64),
            frozen("half", 2, dtype=torch.float16),
            frozen("ids", 3, dtype=torch.int32),
        ]
    )
    return {
        "upload_nnadq_differences": make_case(
            mixed,
            upload(kept=[0, 1, 3], is_difference=True, block_differences=(0.5, 1.0, 0.0, 0.25)),
            state,
            NNADQ(1e-3),
            start,
        ),
        "broadcast_nnadq": make_case(mixed, header_of(mixed), state, NNADQ(1e-2)),
        "upload_qsgd": make_case(mixed, upload(is_difference=True), state, Stochastic(255), start),
        "broadcast_raw": make_case(mixed, header_of(mixed), state, Unquantized()),
        "upload_masked": make_case(mixed, upload(mask=Mask.of_rate(7, 0.3)), state, Unquantized()),
        "opening_frozen": make_case(
            ice, header_of(ice, Kind.OPENING, kept=[]), plain_state(ice, 4), Unquantized()
        ),
        "broadcast_bf16": make_case(bf16, header_of(bf16), bf16_state, NNADQ(1e-2)),
    }


def write_golden() -> None:
    """Write every golden file and the list of them."""
    cases = golden_cases()
    for name, (data, _) in cases.items():
        (FOLDER / f"{name}.bin").write_bytes(data)
    facts = {name: fact for name, (_, fact) in cases.items()}
    (FOLDER / "cases.json").write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    write_golden()
