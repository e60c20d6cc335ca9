"""The package's reader against one that was written from docs/format.md alone."""

from __future__ import annotations

import ast
import json
import math
import struct
import zlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedobd._errors import DecodeReason
from fedobd.blocks import ModelSchema, ModelState, Role, TensorSpec, state_fingerprint
from fedobd.codec import MAX_LEVELS, NNADQ, Coding, Mask, Quantizer, Stochastic, Unquantized
from fedobd.methods import METHODS
from fedobd.payload import Header, Kind, Report
from fedobd.payload._wire import HEADER_FIELDS, MASK_FIELDS, START_FIELDS, UPLOAD_FIELDS, Flag
from tests import second_reader
from tests.golden.make import FOLDER as GOLDEN
from tests.golden.make import Piece, encode, make_header, make_schema
from tests.golden.slow_coder import varint
from tests.hostile.readers import check_alike, read_again, read_in_pieces, read_whole, schemas

ROOT = Path(__file__).parent.parent
CASES: dict[str, Any] = json.loads((GOLDEN / "cases.json").read_text())
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OTHERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def law(max_examples: int) -> settings:
    return settings(max_examples=max_examples, deadline=None, derandomize=True)


def test_second_reader_is_independent() -> None:
    tree = ast.parse(Path(second_reader.__file__).read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    allowed = "__future__ bisect dataclasses hashlib itertools json math struct typing zlib"
    assert imported == {*allowed.split(), "zstandard"}


@pytest.mark.parametrize("name", sorted(CASES))
def test_golden_payload_is_read_alike(name: str) -> None:
    data, schema = (GOLDEN / f"{name}.bin").read_bytes(), schemas()[name]
    reading = check_alike(data, schema)
    assert reading.reason is None
    assert second_reader.fingerprint_of(CASES[name]["schema"]) == schema.fingerprint
    listed = [entry["hex"] for entry in CASES[name]["values"] if "hex" in entry]
    came = [
        values.data.hex()
        for values, entry in zip(reading.values, CASES[name]["values"], strict=True)
        if "hex" in entry
    ]
    assert came == listed


def test_page_names_what_the_code_knows() -> None:
    page = (ROOT / "docs" / "format.md").read_text()
    offset, types = 0, {"B": "u8", "I": "u32", "Q": "u64", "f": "f32"}
    for name, code in HEADER_FIELDS:
        assert f"| {offset} | `{types.get(code, code)}` | {name} |" in page
        offset += struct.calcsize("<" + code)
    parts = (("report", UPLOAD_FIELDS), ("mask", MASK_FIELDS), ("start", START_FIELDS))
    for name, fields in (("fixed fields", HEADER_FIELDS), *parts):
        size = struct.calcsize("<" + "".join(code for _, code in fields))
        assert f"    {name:<29} {size} bytes" in page
    report = page[page.index("field of the report") : page.index("The mask is `u64` seed")]
    types_there = [line.split("`")[1] for line in report.splitlines() if line.startswith("| `")]
    assert types_there == [types[code] for _, code in UPLOAD_FIELDS]
    assert all(f"`{reason.value}`" in page for reason in DecodeReason)
    assert all(f"{method.wire_id} {name}" in page for name, method in METHODS.items())
    assert all(f"{kind.value} {kind.name.lower()}" in page for kind in Kind)
    for flag in Flag:
        name = (flag.name or "").lower()
        assert f"| {flag.value} | {name.replace('_', ' ')} |" in page
    for coding in Coding:
        assert f"| {coding.name.lower()} | {coding.value} |" in page


def test_examples_of_the_page_are_the_golden_files() -> None:
    page = (ROOT / "docs" / "format.md").read_text()
    for name in ("broadcast_bf16", "delivery_tables"):
        data = (GOLDEN / f"{name}.bin").read_bytes()
        part = page[page.index(f"`tests/golden/{name}.bin`, {len(data)} bytes") :]
        lines = [line for line in part.split("\n###")[0].splitlines() if line.startswith("    ")]
        position = 0
        for line in lines:
            offset, _, rest = line.strip().partition("  ")
            if len(offset) == 2 and not line.startswith("    0  ") and int(offset, 16) == position:
                position += check_dump(rest, data, position)
        assert position == len(data)
        if name == "broadcast_bf16":
            canonical = json.dumps(CASES[name]["schema"], separators=(",", ":"), sort_keys=True)
            assert canonical in page


def check_dump(rest: str, data: bytes, position: int) -> int:
    """Compare a line of a dump with the bytes from a position; give how many it stands for."""
    count = skipped = 0
    for word in rest.replace("  ", " ").split(" "):
        if word == "...":
            skipped = 1
            continue
        if len(word) != 2 or any(digit not in "0123456789abcdef" for digit in word):
            break
        if skipped == 1:
            skipped = data.index(bytes.fromhex("45e004"), position) - position - count
            count += skipped
        assert data[position + count] == int(word, 16), (position + count, rest)
        count += 1
    return count


# --- arithmetic ----------------------------------------------------------------------------------


def rounded_once(value: Fraction) -> float:
    """Round an exact number to float32, half to even, by whole numbers alone."""
    if value == 0:
        return 0.0
    sign, size = (-1.0 if value < 0 else 1.0), abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent = max(exponent - (size < Fraction(2) ** exponent), -126) - 23
    return sign * math.ldexp(round(size / Fraction(2) ** exponent), exponent)


float32s = st.floats(-(2.0**126), 2.0**126, width=32)
spans = st.floats(2.0**-149, 2.0**126, width=32)
level_counts = st.one_of(st.integers(1, MAX_LEVELS), st.sampled_from([1, 2, 3, MAX_LEVELS]))


@law(2000)
@given(spans, float32s, level_counts, st.integers(-MAX_LEVELS, MAX_LEVELS), st.booleans())
def test_rounding_twice_is_rounding_once(
    span: float, offset: float, num_levels: int, level: int, cancels: bool
) -> None:
    level = max(-num_levels, min(num_levels, level))
    step = rounded_once(Fraction(span) / num_levels)
    scaled = rounded_once(Fraction(step) * level)
    if cancels and abs(scaled) <= 2.0**126:
        offset = struct.unpack("<f", struct.pack("<f", -scaled * (1 + 2.0**-23)))[0]
    code = second_reader.Code(second_reader.LEVELS, num_levels, offset, span)
    value = second_reader.decoded_level(level, code)
    assert value == rounded_once(Fraction(scaled) + Fraction(offset))
    one = np.float32(level) * (np.float32(span) / np.float32(num_levels)) + np.float32(offset)
    assert value == float(one)


# --- random payloads -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What a payload is made of."""

    schema: ModelSchema
    header: Header
    state: ModelState
    start: ModelState | None
    quantizer: Quantizer

    def encode(self) -> bytes:
        return encode(self.schema, self.state, self.header, self.quantizer, self.start)


@st.composite
def model_schemas(draw: st.DrawFn) -> ModelSchema:
    specs: list[TensorSpec] = []
    blocks: list[list[Piece]] = []
    for number in range(draw(st.integers(1, 5))):
        role = draw(st.sampled_from([Role.PARAMETER, Role.PARAMETER, Role.BUFFER, Role.FROZEN]))
        role = role if number else Role.PARAMETER
        dtype = draw(st.sampled_from(DTYPES if role is Role.PARAMETER else DTYPES + OTHERS))
        size = draw(st.integers(0 if number else 1, 30))
        shape = draw(st.sampled_from([(size,), (2, size), (size, 1, 3)]))
        specs.append(TensorSpec(f"tensor {number} ä", shape, dtype, role))
        if role is Role.FROZEN:
            continue
        total, cut = math.prod(shape), draw(st.integers(0, math.prod(shape)))
        whole: list[Piece] = [number]
        pieces = [whole]
        is_cut: bool = draw(st.booleans())
        joins: bool = draw(st.booleans())
        if role is Role.PARAMETER and is_cut:
            pieces = [[(number, 0, cut)], [(number, cut, total)]]
        for piece in pieces:
            if blocks and joins:
                blocks[-1] += piece
            else:
                blocks.append(piece)
    return make_schema(specs, *blocks)


def states(schema: ModelSchema, seed: int, scale: float) -> ModelState:
    generator = torch.Generator().manual_seed(seed)
    state: ModelState = {}
    for spec in schema.tensors:
        values = torch.randn(spec.shape, generator=generator) ** 3 * scale
        if spec.dtype is torch.float16:
            values = values.clamp(-6e4, 6e4)
        if not spec.is_floating:
            values = torch.randint(0, 100, spec.shape, generator=generator)
        state[spec.name] = values.to(spec.dtype)
    return state


@st.composite
def cases(draw: st.DrawFn) -> Case:
    schema = draw(model_schemas())
    state = states(schema, draw(st.integers(0, 99)), draw(st.sampled_from([0.0, 1e-40, 0.01, 9])))
    kind = draw(st.sampled_from(Kind))
    options: dict[str, Any] = {"is_lossless": draw(st.booleans())}
    start = None
    options["kept"] = sorted(draw(st.sets(st.integers(0, len(schema.blocks) - 1))))
    if kind is Kind.UPLOAD:
        whole = st.integers(0, 2**63 - 1)
        real = st.floats(allow_nan=False, allow_infinity=False, width=32)
        options["report"] = Report(
            num_examples=draw(whole),
            train_loss=draw(real),
            num_validation_examples=draw(whole),
            validation_loss=draw(real),
            validation_metric=draw(real),
        )
        if draw(st.booleans()):
            start, options["is_difference"] = states(schema, 100, 0.01), True
        if draw(st.booleans()):
            seed, rate = draw(st.integers(0, 2**64 - 1)), draw(st.sampled_from([0, 0.3, 0.999]))
            options["mask"] = Mask.of_rate(seed, rate)
        if draw(st.booleans()):
            share = st.floats(0, 2.0**100, width=32)
            size = len(schema.blocks)
            drawn = draw(st.lists(share, min_size=size, max_size=size))
            options["block_differences"] = tuple(drawn)
    elif kind in (Kind.INITIAL, Kind.BROADCAST) and draw(st.booleans()):
        options["start"] = state_fingerprint(schema, state)
    quantizer: Quantizer = draw(
        st.one_of(
            st.builds(NNADQ, st.sampled_from([1e-9, 1e-4, 1e-2, 1.0, 100.0])),
            st.builds(Stochastic, st.sampled_from([1, 255, 2048, 70000, MAX_LEVELS])),
            st.just(Unquantized()),
        )
    )
    return Case(schema, make_header(schema, kind, **options), state, start, quantizer)


@law(300)
@given(cases())
def test_random_payload_is_read_alike(case: Case) -> None:
    data = case.encode()
    reading = check_alike(data, case.schema)
    assert reading.reason is None
    assert reading.header["kept"] == case.header.block_ids
    assert second_reader.fingerprint_of(case.schema.to_json()) == case.schema.fingerprint


@law(300)
@given(cases(), st.data())
def test_damaged_payload_is_read_or_refused_alike(case: Case, data: st.DataObject) -> None:
    whole = bytearray(case.encode()[:-4])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(29, len(whole) - 1))
        count = data.draw(st.integers(0, 2))
        whole[place : place + count] = data.draw(st.binary(min_size=count, max_size=count))
    body = bytes(whole)
    check_alike(body + struct.pack("<I", zlib.crc32(body)), case.schema)


@law(100)
@given(st.sampled_from(sorted(CASES)), st.binary(max_size=60), st.integers(0, 150))
def test_any_tail_is_read_or_refused_alike(name: str, tail: bytes, keep: int) -> None:
    data = (GOLDEN / f"{name}.bin").read_bytes()
    body = data[: 29 + keep] + tail
    check_alike(body + struct.pack("<I", zlib.crc32(body)), schemas()[name])


@law(200)
@given(st.integers(0, 2**64), st.integers(0, 3))
def test_varints_are_read_alike(value: int, zeros: int) -> None:
    # as the length of the only frame of a payload
    schema = schemas()["opening_frozen"]
    head = (GOLDEN / "opening_frozen.bin").read_bytes()[:30]
    written = bytearray(varint(value))
    for _ in range(zeros):
        written[-1] |= 0x80
        written.append(0)
    body = head + bytes(written) + bytes(48)
    data = body + struct.pack("<I", zlib.crc32(body))
    reasons = {read(data, schema).reason for read in (read_whole, read_again, read_in_pieces)}
    proper = zeros == 0 and value < 2**63
    assert reasons == {None if proper and value == 48 else "field"}
