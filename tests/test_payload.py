"""Payloads: what goes in comes out, is counted, and is refused by name where it cannot travel."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedobd import UsageError
from fedobd.blocks import ModelSchema, ModelState, Role, Segment, decompose, get_state
from fedobd.codec import NNADQ, Coding, Mask, Quantizer, Stochastic, Unquantized, write_varint
from fedobd.payload import Header, Kind, Payload, Report, encode_payload
from tests.helpers import (
    Piece,
    as_float32,
    buffer,
    encode,
    error_bound,
    frozen,
    header_of,
    law,
    make_schema,
    parameter,
    random_state,
    source_of,
    tiny_model,
    ulp_of,
    with_checksum,
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Case:
    """What is encoded; the same table drives the encoder and the decoder."""

    schema: ModelSchema
    header: Header
    state: ModelState
    quantizer: Quantizer
    start: ModelState | None = None

    def encode(self) -> bytes:
        return encode(self.schema, self.state, self.header, self.quantizer, start=self.start)

    def check(self, data: bytes) -> None:
        """Compare all that a payload holds with what went in."""
        payload = Payload.parse(data, self.schema)
        assert payload.header == self.header
        assert payload.num_bytes.total == len(data)
        source = source_of(self.schema, self.state, self.start)
        codes = payload.codes()
        numbers = []
        for number, segments in payload.blocks():
            numbers.append(number)
            assert tuple(d.segment for d in segments) == self.schema.blocks[number].segments
            for decoded in segments:
                came_number, came_segment, code = next(codes)
                assert (came_number, came_segment) == (number, decoded.segment)
                self._check_segment(
                    decoded.segment, code.coding, decoded.values, decoded.mask, source
                )
                if code.coding in (Coding.LEVELS, Coding.CONSTANT):
                    wanted = as_float32(source(decoded.segment))
                    error = np.abs(wanted.astype(np.float64) - as_float32(decoded.values))
                    if isinstance(self.quantizer, NNADQ):
                        bound = error_bound(wanted, code.range, max(1, code.num_levels))
                    else:
                        bound = code.range / max(1, code.num_levels) + 5 * ulp_of(code.range)
                    assert float(error.max()) <= bound
        assert next(codes, None) is None
        assert tuple(numbers) == self.header.coded
        self._check_frozen(payload)
        self._check_bytes(payload)

    def _check_segment(
        self,
        segment: Segment,
        coding: Coding,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        source: object,
    ) -> None:
        spec = self.schema.tensors[segment.tensor]
        wanted = source_of(self.schema, self.state, self.start)(segment)
        is_parameter = spec.role is Role.PARAMETER
        assert (mask is not None) is (is_parameter and self.header.mask is not None)
        if mask is not None:
            assert self.header.mask is not None
            # offsets count the trainable elements of the tensors before, in tensor order
            first = segment.start + sum(
                t.num_elements
                for t in self.schema.tensors[: segment.tensor]
                if t.role is Role.PARAMETER
            )
            kept = self.header.mask.kept(0, first + segment.num_elements)[first:]
            assert mask.tolist() == kept.tolist()
            wanted = wanted[mask]
        assert values.shape == wanted.shape
        if coding in (Coding.RAW, Coding.MASKED):
            narrow = torch.float32 if self.start is not None and is_parameter else spec.wire_dtype
            assert values.dtype == narrow
            assert torch.equal(values, wanted.to(narrow))
        else:
            assert values.dtype == torch.float32
            assert is_parameter

    def _check_frozen(self, payload: Payload) -> None:
        came = dict(payload.frozen())
        if self.header.kind is not Kind.INITIAL or self.header.start is not None:
            assert came == {}
            return
        assert list(came) == [t for t in self.schema.tensors if t.role is Role.FROZEN]
        for spec, values in came.items():
            assert values.dtype == spec.dtype
            assert torch.equal(values, self.state[spec.name])

    def _check_bytes(self, payload: Payload) -> None:
        raw = buffers = lengths = 0
        if self.header.holds_frozen(self.schema):
            raw = sum(self.state[t.name].nbytes for t, _ in payload.frozen())
            lengths = len(write_varint(raw))
        in_frames = raw + lengths
        for _, segments in payload.blocks():
            for decoded in segments:
                if self.schema.tensors[decoded.segment.tensor].role is Role.BUFFER:
                    buffers += decoded.values.nbytes
        for (_, segment, code), values in zip(
            payload.codes(), [d.values for _, ds in payload.blocks() for d in ds], strict=True
        ):
            is_buffer = self.schema.tensors[segment.tensor].role is Role.BUFFER
            if code.coding in (Coding.RAW, Coding.MASKED) and not is_buffer:
                raw += values.nbytes
        count = payload.num_bytes
        in_blocks = {n: t.num_bytes for n, t in payload.traffic.blocks.items()}
        assert sum(t.nominal_bits for t in payload.traffic.blocks.values()) <= count.nominal_bits
        assert tuple(in_blocks) == self.header.coded
        if self.header.is_lossless:
            frames = count.levels + count.raw + count.buffers
            assert sum(in_blocks.values()) <= frames + 9 * 3 * len(in_blocks)
            assert bool(raw) <= bool(count.raw)  # a frame of nothing has bytes too
            assert bool(buffers) <= bool(count.buffers)
            return
        assert (count.raw, count.buffers) == (raw, buffers)
        without_frames = count.total - in_frames - sum(in_blocks.values())
        assert 29 + 4 <= without_frames <= count.header


def table() -> dict[str, Case]:
    mixed = make_schema(
        [
            parameter("w", 3, 4),
            parameter("b", 4),
            buffer("mean", 2),
            buffer("seen", dtype=torch.int64),
            parameter("scalar"),
            parameter("none", 0, 3),
            parameter("big", 6, 2),
        ],
        [0, 1],
        [2, 3, 4, 5],
        [(6, 0, 4)],
        [(6, 4, 12)],
    )
    mixed_state, mixed_start = random_state(mixed, 1), random_state(mixed, 2)
    mixed_state["b"] = torch.full((4,), 0.25)
    types = make_schema(
        [
            *(parameter(f"p{i}", 2, 3, dtype=dtype) for i, dtype in enumerate(FLOATS)),
            *(buffer(f"f{i}", 2, dtype=dtype) for i, dtype in enumerate(FLOATS)),
            buffer("i8", 3, dtype=torch.int8),
            buffer("u8", 3, dtype=torch.uint8),
            buffer("i16", 3, dtype=torch.int16),
            buffer("i32", 3, dtype=torch.int32),
            buffer("flags", 5, dtype=torch.bool),
        ],
        [0, 4, 8, 9],
        [1, 5, 10],
        [2, 6, 11],
        [3, 7, 12],
    )
    types_state, types_start = random_state(types, 3), random_state(types, 4)
    ice = make_schema(
        [
            parameter("w", 3),
            frozen("f32", 2, 2),
            frozen("f64", 1, dtype=torch.float64),
            frozen("bf16", 3, dtype=torch.bfloat16),
            frozen("ids", 2, dtype=torch.int64),
            frozen("nothing", 0),
        ]
    )
    model = tiny_model()
    tied = decompose(model)
    upload = Kind.UPLOAD
    report = Report(
        num_examples=2**40,
        train_loss=0.25,
        num_validation_examples=9,
        validation_loss=1.5,
        validation_metric=0.75,
    )
    return {
        "broadcast nnadq": Case(mixed, header_of(mixed), mixed_state, NNADQ(1e-3)),
        "upload nnadq of differences": Case(
            mixed,
            header_of(
                mixed,
                upload,
                kept=(0, 1, 3),
                is_difference=True,
                block_differences=(0.5, 0.0, 0.125, 2.0),
                report=report,
            ),
            mixed_state,
            NNADQ(1e-3),
            mixed_start,
        ),
        "upload stochastic": Case(
            mixed,
            header_of(mixed, upload, is_difference=True),
            mixed_state,
            Stochastic(255),
            mixed_start,
        ),
        "upload masked": Case(
            mixed,
            header_of(mixed, upload, mask=Mask.of_rate(11, 0.5)),
            mixed_state,
            Unquantized(),
        ),
        "upload masked differences": Case(
            types,
            header_of(types, upload, mask=Mask.of_rate(12, 0.3), is_difference=True),
            types_state,
            Unquantized(),
            types_start,
        ),
        "broadcast raw": Case(types, header_of(types), types_state, Unquantized()),
        "broadcast of all types": Case(types, header_of(types), types_state, NNADQ(1e-3)),
        "differences of all types": Case(
            types,
            header_of(types, upload, is_difference=True),
            types_state,
            NNADQ(1e-2),
            types_start,
        ),
        "opening with frozen": Case(
            ice, header_of(ice, Kind.INITIAL, kept=()), random_state(ice, 5), Unquantized()
        ),
        "opening with all": Case(
            tied, header_of(tied, Kind.INITIAL), get_state(model), NNADQ(1e-2)
        ),
        "broadcast lossless": Case(
            types, header_of(types, is_lossless=True), types_state, NNADQ(1e-3)
        ),
        "upload masked lossless": Case(
            mixed,
            header_of(mixed, upload, mask=Mask.of_rate(11, 0.5), is_lossless=True),
            mixed_state,
            Unquantized(),
        ),
        "opening lossless": Case(
            ice,
            header_of(ice, Kind.INITIAL, is_lossless=True),
            random_state(ice, 5),
            Unquantized(),
        ),
        "broadcast of the start": Case(
            mixed, header_of(mixed, start=bytes(range(16))), mixed_state, NNADQ(1e-3)
        ),
        "opening of the start": Case(
            ice,
            header_of(ice, Kind.INITIAL, kept=(), start=bytes(range(16))),
            random_state(ice, 5),
            Unquantized(),
        ),
        "broadcast of no block": Case(
            mixed, header_of(mixed, kept=()), mixed_state, Unquantized()
        ),
        "delivery": Case(tied, header_of(tied, Kind.DELIVERY), get_state(model), Unquantized()),
    }


CASES = table()

every_case = pytest.mark.parametrize("name", CASES)


@every_case
def test_whole(name: str) -> None:
    CASES[name].check(CASES[name].encode())


@every_case
def test_encoding_is_stable(name: str) -> None:
    case = CASES[name]
    payload = encode_payload(
        case.schema,
        case.header,
        source_of(case.schema, case.state, case.start),
        case.quantizer,
        generator=torch.Generator().manual_seed(0),
        frozen=lambda spec: case.state[spec.name],
    )
    assert len(payload.chunks) >= 2
    assert all(isinstance(chunk, bytes | memoryview) for chunk in payload.chunks)
    assert payload.data == case.encode() == case.encode()
    assert with_checksum(case.encode()) == case.encode()
    assert payload.copied().chunks == (payload.data,)


@every_case
def test_what_the_encoder_counts_is_what_the_decoder_finds(name: str) -> None:
    case = CASES[name]
    payload = encode_payload(
        case.schema,
        case.header,
        source_of(case.schema, case.state, case.start),
        case.quantizer,
        generator=torch.Generator().manual_seed(0),
        frozen=lambda spec: case.state[spec.name],
    )
    parsed = Payload.parse(payload.data, case.schema)
    assert payload.traffic.total == parsed.num_bytes
    assert payload.traffic.total.total == len(payload.data)
    assert payload.traffic.blocks == parsed.traffic.blocks


@every_case
def test_other_buffers_are_read_alike(name: str) -> None:
    data = CASES[name].encode()
    padded = b"\0" + data + b"\0"
    for other in (bytearray(data), memoryview(data), memoryview(padded)[1:-1]):
        payload = Payload.parse(other, CASES[name].schema)
        assert payload.header == CASES[name].header
        assert len(list(payload.blocks())) == len(CASES[name].header.coded)


shapes = st.sampled_from([(), (0,), (1,), (5,), (2, 3), (2, 0), (4, 2), (3, 1, 2)])

weights = st.sampled_from([1e-6, 1e-4, 1e-2, 10.0])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    specs = [parameter("first", *draw(st.sampled_from([(1,), (3, 2)])))]
    for number in range(draw(st.integers(0, 5))):
        role = draw(st.sampled_from(["parameter", "parameter", "buffer", "frozen"]))
        shape = draw(shapes)
        if role == "parameter":
            specs.append(parameter(f"t{number}", *shape, dtype=draw(st.sampled_from(FLOATS))))
        else:
            dtype = draw(st.sampled_from([*FLOATS, torch.int64, torch.bool]))
            build = buffer if role == "buffer" else frozen
            specs.append(build(f"t{number}", *shape, dtype=dtype))
    blocks: list[list[Piece]] = [[]]
    for number, spec in enumerate(specs):
        if spec.role is Role.FROZEN:
            continue
        cuts = [0, spec.num_elements]
        if spec.role is Role.PARAMETER and spec.num_elements > 1 and draw(st.booleans()):
            cuts.insert(1, draw(st.integers(1, spec.num_elements - 1)))
        for start, stop in pairwise(cuts):
            opens_block: bool = draw(st.booleans())
            if blocks[-1] and opens_block:
                blocks.append([])
            blocks[-1].append((number, start, stop))
    schema = make_schema(specs, *blocks)
    seed = draw(st.integers(0, 2**32))
    scale = 10.0 ** draw(st.integers(-4, 2))
    state = random_state(schema, seed, scale, draw(st.sampled_from([0.0, 1.0, -300.0])))
    kind = draw(st.sampled_from(list(Kind)))
    is_difference = kind is Kind.UPLOAD and draw(st.booleans())
    mask = Mask.of_rate(seed, draw(st.sampled_from([0.0, 0.3, 0.99])))
    chosen = draw(st.lists(st.booleans(), min_size=len(blocks), max_size=len(blocks)))
    header = header_of(
        schema,
        kind,
        kept=[number for number, is_kept in enumerate(chosen) if is_kept],
        is_difference=is_difference,
        mask=mask if kind is Kind.UPLOAD and draw(st.booleans()) else None,
        block_differences=(0.5,) * len(blocks) if draw(st.booleans()) else None,
        is_lossless=draw(st.booleans()),
        start=b"0123456789abcdef" if kind.value < 2 and draw(st.booleans()) else None,
    )
    quantizer: Quantizer = draw(
        st.one_of(
            weights.map(NNADQ),
            st.sampled_from([1, 255, 2**22]).map(Stochastic),
            st.just(Unquantized()),
        )
    )
    before = random_state(schema, seed + 1, scale) if is_difference else None
    return Case(schema, header, state, quantizer, before)


@law(100)
@given(cases())
def test_round_trip(case: Case) -> None:
    case.check(case.encode())


def test_tied_weights_travel_once() -> None:
    model = tiny_model()
    schema = decompose(model)
    names = [spec.name for spec in schema.tensors]
    assert "table.weight" in names
    assert "out.weight" not in names
    payload = Payload.parse(encode(schema, get_state(model)), schema)
    assert payload.num_bytes.raw == 4 * (2 * 9 + 2 + 2 + 2 + 5 * 3)


def test_nominal_bits_of_a_case_worked_by_hand() -> None:
    schema = make_schema(
        [
            parameter("levels", 10),
            parameter("constant", 4),
            parameter("half", 5, dtype=torch.float16),
            buffer("mean", 3),
            buffer("seen", dtype=torch.int64),
        ]
    )
    state = random_state(schema, 1)
    state["constant"] = torch.zeros(4)
    payload = Payload.parse(encode(schema, state, None, Stochastic(255)), schema)
    # 9 bits a level in both types; a constant has none; buffers 3 x 32 and 64
    assert payload.num_bytes.nominal_bits == 10 * 9 + 0 + 5 * 9 + 3 * 32 + 64
    payload = Payload.parse(encode(schema, state, None, Unquantized()), schema)
    assert payload.num_bytes.nominal_bits == 14 * 32 + 5 * 16 + 3 * 32 + 64
    # s = 40000 has 17 bits, more than float16: that tensor travels raw, as 5 x 16
    payload = Payload.parse(encode(schema, state, None, Stochastic(40000)), schema)
    assert payload.num_bytes.nominal_bits == 10 * 17 + 0 + 5 * 16 + 3 * 32 + 64


def test_byte_count_of_a_case_worked_by_hand() -> None:
    schema = make_schema([parameter("w", 3), buffer("seen", dtype=torch.int64)], [0, 1])
    data = encode(schema, random_state(schema, 1), header_of(schema, Kind.UPLOAD))
    count = Payload.parse(data, schema).num_bytes
    # 29 fixed, 32 of the report, 1 of the bitmap, 2 codings, 2 lengths, the checksum
    assert count.header == 29 + 32 + 1 + 2 + 2 + 4
    assert (count.levels, count.raw, count.buffers) == (0, 12, 8)


BAD_VALUES = {"NaN": math.nan, "an infinity": math.inf}


@pytest.mark.parametrize("kind", BAD_VALUES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("role", ["parameter", "buffer", "frozen"])
@pytest.mark.parametrize("quantizer", [Unquantized(), NNADQ(0.01), Stochastic(3)])
def test_value_that_is_not_finite_is_refused_by_name(
    kind: str, dtype: torch.dtype, role: str, quantizer: Quantizer
) -> None:
    build = {"parameter": parameter, "buffer": buffer, "frozen": frozen}[role]
    schema = make_schema([parameter("fine", 2), build("layer.bad", 3, dtype=dtype)])
    state = random_state(schema, 1)
    for sign in (1, -1):
        state["layer.bad"][1] = sign * BAD_VALUES[kind]
        with pytest.raises(UsageError, match=rf"tensor 'layer\.bad' holds {kind}"):
            encode(schema, state, header_of(schema, Kind.INITIAL), quantizer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_value_beyond_a_16_bit_type_is_refused_by_name(dtype: torch.dtype) -> None:
    # The server keeps float32 values, which can be finite there and infinite on the wire.
    schema = make_schema([parameter("layer.bad", 2, dtype=dtype)])
    state = {"layer.bad": torch.tensor([1.0, 3.4e38])}
    with pytest.raises(UsageError, match=r"tensor 'layer\.bad'"):
        encode(schema, state)


def test_difference_that_overflows_is_refused_by_name() -> None:
    schema = make_schema([parameter("layer.bad", 1)])
    header = header_of(schema, Kind.UPLOAD, is_difference=True)
    with pytest.raises(UsageError, match=r"tensor 'layer\.bad' holds an infinity"):
        encode(
            schema,
            {"layer.bad": torch.tensor([3e38])},
            header,
            NNADQ(0.01),
            start={"layer.bad": torch.tensor([-3e38])},
        )


def test_frozen_float64_keeps_its_range() -> None:
    # Frozen tensors travel in their own type, so a value that only float64 holds is legal.
    schema = make_schema([parameter("w", 1), frozen("f", 2, dtype=torch.float64)])
    state = random_state(schema, 1)
    state["f"] = torch.tensor([1e300, -1e-300], dtype=torch.float64)
    Case(schema, header_of(schema, Kind.INITIAL), state, Unquantized()).check(
        encode(schema, state, header_of(schema, Kind.INITIAL))
    )


# Torch calls these contiguous whatever their stride, so `contiguous()` leaves it as it is.
@pytest.mark.parametrize(
    "values",
    [
        torch.from_numpy(np.zeros(0, np.float32)),
        torch.arange(8.0)[::8],
        torch.tensor(2.0).expand(1),
    ],
)
def test_stride_of_a_tiny_tensor_does_not_matter(values: torch.Tensor) -> None:
    schema = make_schema(
        [parameter("w", 1), parameter("p", len(values)), frozen("f", len(values))]
    )
    state = {"w": torch.ones(1), "p": values, "f": values}
    header = header_of(schema, Kind.INITIAL)
    Case(schema, header, state, Unquantized()).check(encode(schema, state, header))


def test_opening_without_frozen_values_is_refused() -> None:
    case = CASES["opening with frozen"]
    with pytest.raises(UsageError, match="needs the values of the frozen tensors"):
        encode_payload(
            case.schema, case.header, source_of(case.schema, case.state), case.quantizer
        )


def report_with(name: str, value: float) -> Report:
    options: dict[str, Any] = {"num_examples": 1, "train_loss": 0.0, name: value}
    return Report(**options)


@pytest.mark.parametrize("name", ["train_loss", "validation_loss", "validation_metric"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_report_that_cannot_travel_is_refused(name: str, value: float) -> None:
    schema = make_schema([parameter("w", 1)])
    with pytest.raises(UsageError, match=f"{name} is "):
        encode(
            schema,
            random_state(schema, 1),
            header_of(
                schema,
                Kind.UPLOAD,
                report=report_with(name, value),
            ),
        )


@pytest.mark.parametrize("name", ["num_examples", "num_validation_examples"])
@pytest.mark.parametrize("value", [-1, 2**63])
def test_report_with_impossible_counts_is_refused(name: str, value: int) -> None:
    with pytest.raises(UsageError, match=rf"{name} is {value}; allowed are 0 to 2\^63 - 1"):
        report_with(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("client", -1), ("client", 2**32), ("round", -1), ("round", 2**32), ("stage", 256)],
)
def test_header_that_cannot_travel_is_refused(name: str, value: int) -> None:
    schema = make_schema([parameter("w", 1)])
    change: dict[str, Any] = {name: value}
    with pytest.raises(UsageError, match=f"{name} is {value}"):
        encode(
            schema,
            random_state(schema, 1),
            replace(header_of(schema, Kind.UPLOAD), **change),
        )


def test_decoded_values_do_not_share_memory_with_the_payload() -> None:
    schema = make_schema([parameter("w", 3)])
    data = bytearray(encode(schema, random_state(schema, 1)))
    _, segments = next(Payload.parse(data, schema).blocks())
    before = segments[0].values.clone()
    data[:] = b"\0" * len(data)
    assert torch.equal(segments[0].values, before)
