from __future__ import annotations

import copy
import json
import struct
from typing import Any

import pytest
import torch

from fedobd.blocks import ModelSchema, state_fingerprint
from fedobd.payload import Header, Kind, Payload, PayloadStream, Report
from tests.golden.make import FOLDER, bytes_of, describe, golden_cases, plain_state

CASES: dict[str, Any] = json.loads((FOLDER / "cases.json").read_text())

NAMES = (
    "broadcast_bf16",
    "broadcast_lossless",
    "broadcast_nnadq",
    "broadcast_raw",
    "broadcast_start",
    "broadcast_two_chunks",
    "delivery_tables",
    "opening_frozen",
    "upload_masked",
    "upload_masked_lossless",
    "upload_nnadq_differences",
    "upload_qsgd",
)


def golden(name: str) -> tuple[bytes, ModelSchema]:
    return (FOLDER / f"{name}.bin").read_bytes(), ModelSchema.from_json(CASES[name]["schema"])


def test_every_golden_file_is_listed_and_there() -> None:
    assert tuple(sorted(CASES)) == NAMES
    assert tuple(sorted(path.stem for path in FOLDER.glob("*.bin"))) == NAMES
    assert all((FOLDER / f"{name}.bin").stat().st_size < 300 for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_golden_payload_decodes_to_what_it_always_did(name: str) -> None:
    data, schema = golden(name)
    came = json.loads(json.dumps(describe(data, schema)))
    wanted = {part: value for part, value in CASES[name].items() if part != "schema"}
    assert came == wanted
    assert Payload.parse(data, schema).num_bytes.total == len(data)


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_golden_payload_decodes_alike_in_pieces(name: str, size: int) -> None:
    data, schema = golden(name)
    chunks = (data[start : start + size] for start in range(0, len(data), size))
    stream, whole = PayloadStream(chunks, schema), Payload.parse(data, schema)
    assert stream.header == whole.header
    for (_, came), (_, wanted) in zip(stream.frozen(), whole.frozen(), strict=True):
        assert torch.equal(came, wanted)
    for (number, parts), (same, others) in zip(stream.blocks(), whole.blocks(), strict=True):
        assert number == same
        assert [bytes_of(part.values) for part in parts] == [bytes_of(p.values) for p in others]


# What the coder and zstandard choose may change with their versions, what they mean may not. The
# draws of stochastic quantization are PyTorch's, and are left out.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "upload_qsgd"])
def test_encoder_still_makes_what_the_golden_payload_says(name: str) -> None:
    again, facts = golden_cases()[name]
    came, wanted = json.loads(json.dumps(facts)), copy.deepcopy(CASES[name])
    if "LEVELS" not in wanted["codings"] and not wanted["header"]["is_lossless"]:
        assert again == golden(name)[0]
    del came["num_bytes"], wanted["num_bytes"]
    assert came == wanted


def test_golden_upload_says_what_is_written_here() -> None:
    # Spelled out once in the test, so that the list alone cannot drift.
    data, schema = golden("upload_nnadq_differences")
    assert data[:13] == b"FOBD" + bytes([2, 2, 5, 1 | 4 | 8 | 16]) + struct.pack("<IB", 3, 1)
    assert data[13:29] == schema.fingerprint
    assert Payload.parse(data, schema).header == Header(
        kind=Kind.UPLOAD,
        method=5,
        round=3,
        stage=1,
        block_ids=(0, 1, 3),
        is_difference=True,
        is_lossless=True,
        client=7,
        report=Report(
            num_examples=500,
            train_loss=0.75,
            num_validation_examples=40,
            validation_loss=0.5,
            validation_metric=0.875,
        ),
        block_differences=(0.5, 1.0, 0.0, 0.25),
    )


def test_golden_opening_says_what_is_written_here() -> None:
    data, schema = golden("opening_frozen")
    tensors = {spec.name: values for spec, values in Payload.parse(data, schema).frozen()}
    assert [(name, values.dtype) for name, values in tensors.items()] == [
        ("table", torch.float32),
        ("scale", torch.float64),
        ("half", torch.float16),
        ("ids", torch.int32),
    ]
    assert tensors["table"].shape == (2, 3)
    assert tensors["scale"].shape == ()


def test_golden_start_stands_for_the_state_it_was_made_of() -> None:
    data, schema = golden("broadcast_start")
    payload = Payload.parse(data, schema)
    assert payload.header.start == state_fingerprint(schema, plain_state(schema, 4))
    assert payload.header.block_ids == (0,)
    assert list(payload.blocks()) == []
    assert list(payload.frozen()) == []


def test_golden_streams_hold_tables_and_chunks_of_every_sort() -> None:
    def stream_of(name: str) -> tuple[bytes, list[int]]:
        data, schema = golden(name)
        payload = Payload.parse(data, schema)
        num_levels = [code.num_levels for _, _, code in payload.codes() if code.num_levels]
        frame = payload._frames[0].levels
        assert frame is not None
        return bytes(frame), num_levels

    stream, num_levels = stream_of("delivery_tables")
    # a table of frequencies of 60 bits, then twice the uniform one; 5885 has two low bits
    assert num_levels == [49, 5885, 14]
    assert stream[1] & 1 == 1
    assert stream[8] >> 4 == 0
    stream, num_levels = stream_of("broadcast_two_chunks")
    assert num_levels == [3, 5000]
    assert stream[0] == 12
    stream, num_levels = stream_of("broadcast_bf16")
    assert (num_levels, stream[:2]) == ([40], b"\x12\0")
