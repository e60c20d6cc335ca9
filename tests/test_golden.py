from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from fedobd._payload import Payload
from fedobd._schema import ModelSchema
from fedobd._wire import Header, Kind, Report
from tests.golden.make import FOLDER, describe, golden_cases

CASES: dict[str, Any] = json.loads((FOLDER / "cases.json").read_text())

NAMES = (
    "broadcast_bf16",
    "broadcast_nnadq",
    "broadcast_raw",
    "opening_frozen",
    "upload_masked",
    "upload_nnadq_differences",
    "upload_qsgd",
)


def test_every_golden_file_is_listed_and_there() -> None:
    assert tuple(sorted(CASES)) == NAMES
    assert tuple(sorted(path.stem for path in FOLDER.glob("*.bin"))) == NAMES
    assert all((FOLDER / f"{name}.bin").stat().st_size < 2000 for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_golden_payload_decodes_to_what_it_always_did(name: str) -> None:
    case = CASES[name]
    schema = ModelSchema.from_json(case["schema"])
    data = (FOLDER / f"{name}.bin").read_bytes()
    came = json.loads(json.dumps(describe(data, schema)))
    for part, wanted in case.items():
        if part != "schema":
            assert came[part] == wanted, part
    assert set(came) == set(case) - {"schema"}
    assert Payload.parse(data, schema).num_bytes.total == len(data)


# Levels go through zstandard, whose output may change with its version; the rest may not. The
# draws of stochastic quantization are PyTorch's, and are left out.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "upload_qsgd"])
def test_encoder_still_makes_the_golden_payload(name: str) -> None:
    data = (FOLDER / f"{name}.bin").read_bytes()
    again, facts = golden_cases()[name]
    came, wanted = json.loads(json.dumps(facts)), copy.deepcopy(CASES[name])
    if wanted["num_bytes"].pop("levels") == 0:
        assert again == data
    del came["num_bytes"]["levels"]
    assert came == wanted


def test_golden_upload_says_what_is_written_here() -> None:
    # Spelled out once in the test, so that the list alone cannot drift.
    schema = ModelSchema.from_json(CASES["upload_nnadq_differences"]["schema"])
    data = (FOLDER / "upload_nnadq_differences.bin").read_bytes()
    assert data[:12] == b"FOBD" + bytes([1, 2, 1, 1 | 4 | 8]) + bytes([3, 0, 0, 0])
    assert Payload.parse(data, schema).header == Header(
        kind=Kind.UPLOAD,
        method=1,
        round=3,
        stage=1,
        kept=(0, 1, 3),
        is_difference=True,
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
    schema = ModelSchema.from_json(CASES["opening_frozen"]["schema"])
    payload = Payload.parse((FOLDER / "opening_frozen.bin").read_bytes(), schema)
    tensors = {spec.name: values for spec, values in payload.frozen()}
    assert [(name, values.dtype) for name, values in tensors.items()] == [
        ("table", torch.float32),
        ("scale", torch.float64),
        ("half", torch.float16),
        ("ids", torch.int32),
    ]
    assert tensors["table"].shape == (2, 3)
    assert tensors["scale"].shape == ()
