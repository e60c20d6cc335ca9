from __future__ import annotations

import copy
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedobd import DecodeError, DecodeReason, EmptyRoundError
from fedobd.blocks import ModelSchema, ModelState, Role, master_state
from fedobd.codec import NNADQ, Mask, Quantizer, Unquantized
from fedobd.payload import DecodedSegment, Kind, Payload
from fedobd.sessions import Sums
from fedobd.sessions._mean import WeightedMean, num_sums
from tests.helpers import (
    buffer,
    encode,
    frozen,
    header_of,
    law,
    make_schema,
    parameter,
    random_state,
    source_of,
    ulp_of,
    with_checksum,
)

Blocks = list[tuple[int, list[DecodedSegment]]]

SCHEMA = make_schema(
    [
        parameter("w", 3, 2),
        parameter("b", dtype=torch.bfloat16),
        buffer("mean", 2),
        buffer("seen", dtype=torch.int64),
        frozen("ice", 2),
        parameter("v", 5),
        parameter("none", 0),
    ],
    [0, 1],
    [2, 3],
    [(5, 0, 2), 6],
    [(5, 2, 5)],
)


def blocks_of(
    schema: ModelSchema,
    state: Mapping[str, torch.Tensor],
    kept: Sequence[int] | None = None,
    mask: Mask | None = None,
) -> Blocks:
    """Give a state as a decoded upload would: the mask on parameters only."""
    source = source_of(schema, state)
    blocks: Blocks = []
    for number in range(len(schema.blocks)) if kept is None else kept:
        blocks.append((number, []))
        for segment in schema.blocks[number].segments:
            spec, values, kept_here = schema.tensors[segment.tensor], source(segment), None
            if mask is not None and spec.role is Role.PARAMETER:
                start = schema.mask_offset(segment)
                kept_here = torch.from_numpy(mask.kept(start, start + segment.num_elements))
                values = values[kept_here]
            blocks[-1][1].append(DecodedSegment(segment, values, kept_here))
    return blocks


def fold(mean: WeightedMean, blocks: Blocks, num_examples: int, *, differences: bool) -> None:
    """Fold blocks as decoding gives them: differences of parameters are float32."""
    if differences:
        blocks = as_differences(blocks)
    mean.accumulate(lambda: blocks, num_examples, differences=differences)


def as_differences(blocks: Blocks) -> Blocks:
    def cast(decoded: DecodedSegment) -> DecodedSegment:
        if decoded.values.dtype is not torch.bfloat16:
            return decoded
        return replace(decoded, values=decoded.values.to(torch.float32))

    return [(number, [cast(decoded) for decoded in segments]) for number, segments in blocks]


def finished(mean: WeightedMean) -> ModelState:
    """Finish a copy, since finishing gives up the sums."""
    return copy.deepcopy(mean).finish()


def snapshot(mean: WeightedMean) -> dict[str, Any]:
    if not mean._memory:
        mean._begin()  # as the first upload does
    return copy.deepcopy(vars(mean))


def assert_same(first: Any, second: Any) -> None:
    """Compare plain values, arrays and tensors to the last bit."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    elif isinstance(first, np.ndarray):
        assert first.dtype == second.dtype
        assert np.array_equal(first, second)
    else:
        assert first == second


def assert_same_state(first: ModelState, second: ModelState) -> None:
    assert list(first) == list(second)
    for name in first:
        assert first[name].dtype == second[name].dtype
        assert first[name].shape == second[name].shape
        # bits, so that 0.0 and -0.0 are told apart
        one, other = (s[name].reshape(-1).numpy().tobytes() for s in (first, second))
        assert one == other, name


@dataclass(frozen=True)
class Round:
    """A round's uploads, each a state of values or differences with what of it arrives."""

    reference: ModelState
    uploads: list[tuple[Blocks, int]]
    differences: bool
    per_element: bool
    cohort_size: int
    max_examples: int

    def mean(self, order: Sequence[int], memory: Sums | None = None) -> WeightedMean:
        mean = WeightedMean(
            SCHEMA,
            self.reference,
            cohort_size=self.cohort_size,
            max_examples=self.max_examples,
            per_element=self.per_element,
            memory=memory,
        )
        for number in order:
            blocks, num_examples = self.uploads[number]
            fold(mean, blocks, num_examples, differences=self.differences)
        return mean


@st.composite
def rounds(draw: st.DrawFn) -> Round:
    seed = draw(st.integers(0, 2**32))
    scale = 10.0 ** draw(st.integers(-6, 4))
    reference = master_state(SCHEMA, random_state(SCHEMA, seed, scale))
    differences = draw(st.booleans())
    per_element = draw(st.booleans())
    max_examples = draw(st.sampled_from([1, 7, 10_000, 10_000_000, 2**40 - 1]))
    uploads = []
    for number in range(draw(st.integers(1, 6))):
        state = random_state(SCHEMA, seed + 1 + number, scale / 3 if differences else scale)
        kept = [n for n in range(4) if draw(st.booleans())]
        mask = Mask.of_rate(seed + number, 0.5) if draw(st.booleans()) else None
        num_examples = draw(st.integers(1, max_examples))
        uploads.append((blocks_of(SCHEMA, state, kept, mask), num_examples))
    cohort_size = len(uploads) + draw(st.sampled_from([0, 1, 50]))
    return Round(reference, uploads, differences, per_element, cohort_size, max_examples)


@law(150)
@given(rounds(), st.data())
def test_order_of_uploads_does_not_change_a_bit(case: Round, data: st.DataObject) -> None:
    wanted = case.mean(range(len(case.uploads))).finish()
    order = data.draw(st.permutations(range(len(case.uploads))))
    assert_same_state(case.mean(order).finish(), wanted)


@law(150)
@given(rounds(), st.data())
def test_sums_of_several_means_merge_to_the_same_bits(case: Round, data: st.DataObject) -> None:
    wanted = case.mean(range(len(case.uploads))).finish()
    places = data.draw(st.lists(st.integers(0, 2), min_size=len(case.uploads)))
    own, *shares = ([n for n in range(len(case.uploads)) if places[n] == m] for m in range(3))
    mean = case.mean(own)
    for share in shares:
        memory = np.zeros(num_sums(SCHEMA, per_element=case.per_element), np.int64)
        if share:  # a worker that has folded nothing has no sums to merge
            case.mean(share, memory)
            mean.merge(memory, sum(case.uploads[number][1] for number in share))
    assert_same_state(mean.finish(), wanted)


def exponent_of(spec_role: Role, largest: float) -> int:
    """Exponent of the largest legal difference, as the module describes it."""
    floor, room = (-4, 10) if spec_role is Role.PARAMETER else (0, 20)
    return max(math.frexp(largest)[1] if largest else floor, floor) + room


def exact_mean(case: Round, name: str, element: int) -> tuple[Fraction, int]:
    """The weighted mean of an element in exact arithmetic, and the weight it is divided by."""
    number = [spec.name for spec in SCHEMA.tensors].index(name)
    is_parameter = SCHEMA.tensors[number].role is Role.PARAMETER
    before = Fraction(float(case.reference[name].reshape(-1)[element]))
    total, weight = Fraction(0), 0
    for blocks, num_examples in case.uploads:
        came: Fraction | None = None
        for decoded in (d for _, segments in blocks for d in segments):
            segment = decoded.segment
            if segment.tensor != number or not segment.start <= element < segment.stop:
                continue
            place = element - segment.start
            if decoded.mask is not None:
                if not bool(decoded.mask[place]):
                    continue
                place = int(decoded.mask[:place].sum())
            came = Fraction(float(decoded.values[place]))
            if not (case.differences and is_parameter):
                came -= before
        if came is not None:
            total += came * num_examples
        if came is not None or not (case.per_element and is_parameter):
            weight += num_examples
    return before + total / max(weight, 1), weight


@law(100)
@given(rounds())
def test_mean_is_within_its_bound(case: Round) -> None:
    state = case.mean(range(len(case.uploads))).finish()
    for spec in SCHEMA.tensors:
        if not spec.is_floating or spec.role is Role.FROZEN or spec.num_elements == 0:
            continue
        largest = float(case.reference[spec.name].abs().max())
        exponent = exponent_of(spec.role, largest)
        bits = (case.cohort_size - 1).bit_length() + (case.max_examples - 1).bit_length()
        unit = Fraction(2) ** (exponent + bits - 62)
        for element in range(spec.num_elements):
            wanted, weight = exact_mean(case, spec.name, element)
            came = float(state[spec.name].reshape(-1)[element])
            bound = case.cohort_size * unit / 2 / max(weight, 1)
            # then comes one rounding to float32, after a few in float64
            bound += Fraction(ulp_of(came)) / 2 + Fraction(2) ** (exponent - 50)
            assert abs(Fraction(came) - wanted) <= bound, (spec.name, element)


def simple_mean(value: float = 1.0, **options: Any) -> tuple[ModelSchema, WeightedMean]:
    schema = make_schema([parameter("w", 2), parameter("v", 1)])
    reference = {"w": torch.full((2,), value), "v": torch.full((1,), value)}
    settings = {"cohort_size": 10, "max_examples": 100, **options}
    return schema, WeightedMean(schema, reference, **settings)


def test_mean_is_weighted_by_examples() -> None:
    schema, mean = simple_mean()
    fold(
        mean,
        blocks_of(schema, {"w": torch.tensor([2.0, 4.0]), "v": torch.tensor([1.0])}),
        1,
        differences=True,
    )
    fold(
        mean,
        blocks_of(schema, {"w": torch.tensor([-2.0, 0.0]), "v": torch.tensor([5.0])}),
        3,
        differences=True,
    )
    state = mean.finish()
    # two of a cohort of ten arrived: only their four examples count
    assert state["w"].tolist() == [1.0 + (2 - 6) / 4, 1.0 + 4 / 4]
    assert state["v"].tolist() == [1.0 + (1 + 15) / 4]


def test_values_and_differences_give_the_same_mean() -> None:
    schema, mean = simple_mean()
    _, other = simple_mean()
    for weight, value in ((1, 2.5), (4, -0.75)):
        values = {"w": torch.full((2,), value), "v": torch.full((1,), value)}
        differences = {name: tensor - 1.0 for name, tensor in values.items()}
        fold(mean, blocks_of(schema, values), weight, differences=False)
        fold(other, blocks_of(schema, differences), weight, differences=True)
    assert_same_state(mean.finish(), other.finish())


def test_dropped_block_counts_as_unchanged() -> None:
    schema, mean = simple_mean()
    full = {"w": torch.tensor([2.0, 4.0]), "v": torch.tensor([8.0])}
    fold(mean, blocks_of(schema, full, kept=[0]), 1, differences=True)
    fold(mean, blocks_of(schema, full, kept=[1]), 3, differences=True)
    state = mean.finish()
    assert state["w"].tolist() == [1.5, 2.0]
    assert state["v"].tolist() == [7.0]


def test_upload_of_no_block_counts_as_unchanged() -> None:
    schema, mean = simple_mean()
    full = {"w": torch.tensor([2.0, 4.0]), "v": torch.tensor([8.0])}
    fold(mean, blocks_of(schema, full), 1, differences=True)
    fold(mean, [], 1, differences=True)
    assert mean.finish()["v"].tolist() == [5.0]


def masked(schema: ModelSchema, values: Sequence[float], kept: Sequence[bool]) -> Blocks:
    segment = schema.blocks[0].segments[0]
    sent = [v for v, k in zip(values, kept, strict=True) if k]
    return [(0, [DecodedSegment(segment, torch.tensor(sent), torch.tensor(kept))])]


def test_mean_per_element_is_over_those_who_sent_it() -> None:
    schema = make_schema([parameter("w", 4), buffer("mean", 1)])
    reference = {"w": torch.full((4,), 10.0), "mean": torch.zeros(1)}
    uploads = [
        (masked(schema, [1.0, 2.0, 3.0, 4.0], [True, True, False, False]), 1),
        (masked(schema, [5.0, 6.0, 7.0, 8.0], [True, False, True, False]), 3),
    ]
    means = {}
    for per_element in (True, False):
        mean = WeightedMean(
            schema, reference, cohort_size=2, max_examples=3, per_element=per_element
        )
        for blocks, num_examples in uploads:
            fold(mean, blocks, num_examples, differences=False)
        means[per_element] = mean.finish()["w"].tolist()
    # (1 + 15)/4; one sender; one sender; nobody, so the old value
    assert means[True] == [4.0, 2.0, 7.0, 10.0]
    # without, what was not sent counts as 10
    assert means[False] == [4.0, (2 + 30) / 4, (10 + 21) / 4, 10.0]


def test_buffers_are_averaged_over_all_uploads_even_per_element() -> None:
    schema = make_schema([parameter("w", 1), buffer("mean", 1)])
    reference = {"w": torch.zeros(1), "mean": torch.zeros(1)}
    mean = WeightedMean(schema, reference, cohort_size=2, max_examples=4, per_element=True)
    state = {"w": torch.full((1,), 4.0), "mean": torch.full((1,), 4.0)}
    fold(mean, blocks_of(schema, state), 1, differences=False)
    fold(mean, [], 3, differences=False)
    result = mean.finish()
    assert result["mean"].tolist() == [1.0]
    assert result["w"].tolist() == [4.0]


@pytest.mark.parametrize("differences", [False, True])
def test_buffers_are_values_in_an_upload_of_differences(differences: bool) -> None:
    schema = make_schema([parameter("w", 1), buffer("mean", 1)])
    reference = {"w": torch.full((1,), 2.0), "mean": torch.full((1,), 8.0)}
    mean = WeightedMean(schema, reference, cohort_size=1, max_examples=1)
    state = {"w": torch.full((1,), 4.0), "mean": torch.full((1,), 4.0)}
    fold(mean, blocks_of(schema, state), 1, differences=differences)
    result = mean.finish()
    assert result["mean"].tolist() == [4.0]
    assert result["w"].tolist() == [6.0 if differences else 4.0]


@pytest.mark.parametrize(
    ("dtype", "before", "sent", "wanted"),
    [
        (torch.int64, [5, 5], [[3, 9], [7, 2**62]], [7, 2**62]),
        (torch.uint8, [0, 200], [[255, 3]], [255, 200]),
        (torch.int8, [-128, 127], [[-127, -128], [-126, 0]], [-126, 127]),
        (torch.bool, [False, True], [[True, False], [False, False]], [True, True]),
    ],
)
def test_integers_take_the_largest(
    dtype: torch.dtype, before: list[int], sent: list[list[int]], wanted: list[int]
) -> None:
    schema = make_schema([parameter("w", 1), buffer("seen", 1, 2, dtype=dtype)])
    reference = {"w": torch.zeros(1), "seen": torch.tensor([before], dtype=dtype)}
    for order in (sent, sent[::-1]):
        mean = WeightedMean(schema, reference, cohort_size=3, max_examples=9)
        for number, values in enumerate(order):
            state = {"w": torch.zeros(1), "seen": torch.tensor([values], dtype=dtype)}
            fold(mean, blocks_of(schema, state), number + 1, differences=True)
        result = mean.finish()["seen"]
        assert result.dtype == dtype
        assert result.tolist() == [wanted]


def test_tensors_that_nobody_sent_and_frozen_ones_stay() -> None:
    reference = master_state(SCHEMA, random_state(SCHEMA, 1))
    mean = WeightedMean(SCHEMA, reference, cohort_size=2, max_examples=5)
    fold(mean, [], 5, differences=True)
    assert_same_state(mean.finish(), reference)


def test_reference_and_uploads_are_not_changed() -> None:
    reference = master_state(SCHEMA, random_state(SCHEMA, 1))
    before = {name: tensor.clone() for name, tensor in reference.items()}
    upload = blocks_of(SCHEMA, random_state(SCHEMA, 2))
    values = [d.values.clone() for _, segments in upload for d in segments]
    mean = WeightedMean(SCHEMA, reference, cohort_size=2, max_examples=5)
    fold(mean, upload, 3, differences=False)
    mean.finish()
    assert_same_state(reference, before)
    came = [d.values for _, segments in upload for d in segments]
    assert all(torch.equal(a, b) for a, b in zip(values, came, strict=True))


def breaks_off(blocks: Blocks, after: int) -> Iterator[tuple[int, list[DecodedSegment]]]:
    yield from blocks[:after]
    raise DecodeError(DecodeReason.STREAM, "damaged on purpose")


@pytest.mark.parametrize("per_element", [False, True])
@pytest.mark.parametrize("after", range(5))
@pytest.mark.parametrize("use_mask", [False, True])
def test_upload_that_breaks_off_leaves_no_trace(
    per_element: bool, after: int, use_mask: bool
) -> None:
    reference = master_state(SCHEMA, random_state(SCHEMA, 1))
    mask = Mask.of_rate(3, 0.4) if use_mask else None
    good, bad = (blocks_of(SCHEMA, random_state(SCHEMA, s, 3.0), None, mask) for s in (2, 3))
    mean = WeightedMean(SCHEMA, reference, cohort_size=4, max_examples=9, per_element=per_element)
    fold(mean, good, 2, differences=True)
    before, state = snapshot(mean), finished(mean)
    with pytest.raises(DecodeError, match="damaged on purpose"):
        mean.accumulate(lambda: breaks_off(as_differences(bad), after), 5, differences=True)
    assert_same(snapshot(mean), before)
    assert_same_state(finished(mean), state)
    # and it can still come, whole
    fold(mean, bad, 5, differences=True)
    assert mean.finish()["w"].tolist() != state["w"].tolist()


def test_difference_beyond_the_legal_range_leaves_no_trace() -> None:
    reference = master_state(SCHEMA, random_state(SCHEMA, 1))
    mean = WeightedMean(SCHEMA, reference, cohort_size=4, max_examples=9)
    fold(mean, blocks_of(SCHEMA, random_state(SCHEMA, 2)), 2, differences=True)
    before = snapshot(mean)
    for name, position in (("w", 0), ("b", 0), ("mean", 1), ("v", 4)):
        state = random_state(SCHEMA, 3)
        state[name].reshape(-1)[position] = -1e9
        with pytest.raises(
            DecodeError, match=rf"tensor '{name}' would change by \S+e\+0[89] in one round; "
        ) as caught:
            fold(mean, blocks_of(SCHEMA, state), 1, differences=True)
        assert caught.value.reason is DecodeReason.LIMIT
        assert_same(snapshot(mean), before)


def test_damaged_payload_leaves_no_trace() -> None:
    schema = make_schema([parameter("w", 3), parameter("v", 3)])
    state = random_state(schema, 1)
    data = encode(schema, state, header_of(schema, Kind.UPLOAD), NNADQ(0.01))
    # the last byte of the last stream is in the second block
    altered = with_checksum(data[:-5] + bytes([data[-5] ^ 0xFF]) + data[-4:])
    payload = Payload.parse(altered, schema)
    assert next(payload.blocks())[0] == 0
    mean = WeightedMean(schema, random_state(schema, 2), cohort_size=2, max_examples=9)
    before = snapshot(mean)
    with pytest.raises(DecodeError, match="a level"):
        mean.accumulate(payload.blocks, 5, differences=False)
    assert_same(snapshot(mean), before)
    mean.accumulate(Payload.parse(data, schema).blocks, 5, differences=False)
    assert torch.allclose(mean.finish()["v"], state["v"], atol=0.1)


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("quantizer", [Unquantized(), NNADQ(0.01)])
@pytest.mark.parametrize("mask", [None, Mask.of_rate(3, 0.4)])
@pytest.mark.parametrize("differences", [False, True])
def test_views_into_a_payload_add_up_as_decoded_values(
    differences: bool, mask: Mask | None, quantizer: Quantizer, lossless: bool
) -> None:
    reference = master_state(SCHEMA, random_state(SCHEMA, 1))
    start = random_state(SCHEMA, 0) if differences else None
    header = header_of(
        SCHEMA, Kind.UPLOAD, is_difference=differences, mask=mask, is_lossless=lossless
    )
    one, other = (
        WeightedMean(SCHEMA, reference, cohort_size=3, max_examples=9, per_element=True)
        for _ in range(2)
    )
    for seed in (2, 3, 4):
        data = encode(SCHEMA, random_state(SCHEMA, seed), header, quantizer, start=start)
        payload = Payload.parse(data, SCHEMA)
        one.accumulate(payload.blocks, seed, differences=differences)
        other.accumulate(payload.views, seed, differences=differences)
    assert_same_state(one.finish(), other.finish())


@pytest.mark.parametrize("differences", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["w", "mean", "v"])
def test_a_view_that_is_not_finite_leaves_no_trace(
    name: str, bad: float, masked: bool, differences: bool
) -> None:
    reference = master_state(SCHEMA, random_state(SCHEMA, 1))
    mean = WeightedMean(SCHEMA, reference, cohort_size=4, max_examples=9, per_element=True)
    state = {name: value.contiguous() for name, value in random_state(SCHEMA, 2).items()}
    mark = struct.pack("<f", 0.123)
    state[name].reshape(-1)[-1] = 0.123
    mask = Mask(0, 0) if masked else None
    header = header_of(SCHEMA, Kind.UPLOAD, is_difference=differences, mask=mask)
    data = encode(SCHEMA, state, header)
    mean.accumulate(Payload.parse(data, SCHEMA).views, 2, differences=differences)
    before = snapshot(mean)
    assert data.count(mark) == 1
    forged = with_checksum(data.replace(mark, struct.pack("<f", bad)))
    with pytest.raises(DecodeError, match=f"tensor '{name}' holds NaN or an infinity") as caught:
        mean.accumulate(Payload.parse(forged, SCHEMA).views, 2, differences=differences)
    assert caught.value.reason is DecodeReason.NOT_FINITE
    assert_same(snapshot(mean), before)


@pytest.mark.parametrize("per_element", [False, True])
@pytest.mark.parametrize("differences", [False, True])
def test_fault_in_the_last_level_stream_leaves_no_trace(
    per_element: bool, differences: bool
) -> None:
    schema = make_schema(
        [
            parameter("w", 300),
            buffer("mean", 20),
            buffer("seen", dtype=torch.int64),
            parameter("half", 40, dtype=torch.bfloat16),
            parameter("last", 500),
        ],
        [0, 1, 2],
        [3],
        [4],
    )
    reference = master_state(schema, random_state(schema, 1))
    header = header_of(schema, Kind.UPLOAD, is_difference=differences)
    mean = WeightedMean(schema, reference, cohort_size=4, max_examples=99, per_element=per_element)

    def upload(seed: int) -> bytes:
        start = random_state(schema, 0) if differences else None
        return encode(schema, random_state(schema, seed), header, NNADQ(1e-4), start=start)

    def fold_payload(data: bytes, num_examples: int) -> None:
        payload = Payload.parse(data, schema)
        mean.accumulate(payload.blocks, num_examples, differences=differences)

    for seed in (2, 3):
        fold_payload(upload(seed), 10 * seed)
    before, state = snapshot(mean), finished(mean)
    data = upload(4)
    for place in (5, 100, 300):
        altered = with_checksum(
            data[: -4 - place] + bytes([data[-4 - place] ^ 0x40]) + data[-3 - place :]
        )
        blocks = Payload.parse(altered, schema).blocks()
        assert [next(blocks)[0], next(blocks)[0]] == [0, 1]
        with pytest.raises(DecodeError, match="a level stream"):
            next(blocks)
        with pytest.raises(DecodeError, match="a level stream") as caught:
            fold_payload(altered, 77)
        assert caught.value.reason is DecodeReason.STREAM
        assert_same(snapshot(mean), before)
        assert_same_state(finished(mean), state)
    fold_payload(data, 77)
    assert finished(mean)["last"].tolist() != state["last"].tolist()


@pytest.mark.parametrize(
    ("largest", "limit"), [(0.0, 64.0), (0.01, 64.0), (1.0, 2048.0), (3.0, 4096.0)]
)
def test_legal_range_follows_the_servers_values(largest: float, limit: float) -> None:
    above = float(np.nextafter(np.float32(limit), np.float32(np.inf)))
    for sign in (1, -1):
        schema, mean = simple_mean(largest)
        values = {"w": torch.tensor([0.0, sign * limit]), "v": torch.zeros(1)}
        fold(mean, blocks_of(schema, values), 1, differences=True)
        values["w"][1] = sign * above
        with pytest.raises(DecodeError, match=re.escape(f"; at most {limit:.3g} is accepted")):
            fold(mean, blocks_of(schema, values), 1, differences=True)


@pytest.mark.parametrize("cohort_size", [1, 2, 3, 16, 1000])
@pytest.mark.parametrize("max_examples", [1, 10_000_000, 2**40 - 1])
def test_largest_legal_uploads_do_not_overflow(cohort_size: int, max_examples: int) -> None:
    for sign in (1, -1):
        # values just below the floor of 2^-4 make the limit 2^6
        schema, mean = simple_mean(2.0**-5, cohort_size=cohort_size, max_examples=max_examples)
        limit = {"w": torch.full((2,), sign * 64.0), "v": torch.full((1,), sign * 64.0)}
        upload = blocks_of(schema, limit)
        for _ in range(cohort_size):
            fold(mean, upload, max_examples, differences=True)
        assert mean.finish()["w"].tolist() == [2.0**-5 + sign * 64.0] * 2


def test_extreme_cohort_keeps_the_bound() -> None:
    cohort_size, max_examples = 2**20, 2**40 - 1
    schema, mean = simple_mean(2.0**-5, cohort_size=cohort_size, max_examples=max_examples)
    values = {"w": torch.tensor([0.5, -64.0]), "v": torch.zeros(1)}
    for num_examples in (max_examples, max_examples // 3):
        fold(mean, blocks_of(schema, values), num_examples, differences=True)
    # p = 62 - 20 - 40 - 6 = -4; two uploads err by 2^3 each
    bound = 2 * 2.0**3 / (max_examples + max_examples // 3) + 2.0**-24
    wanted = [0.5 + 2.0**-5, -64.0 + 2.0**-5]
    assert mean.finish()["w"].tolist() == pytest.approx(wanted, rel=0, abs=bound)


def test_nothing_folded_is_an_empty_round() -> None:
    schema, mean = simple_mean()
    with pytest.raises(EmptyRoundError, match="no upload was accepted in this round"):
        mean.finish()
    whole = blocks_of(schema, random_state(schema, 1))
    with pytest.raises(DecodeError):
        mean.accumulate(lambda: breaks_off(whole, 1), 5, differences=True)
    with pytest.raises(EmptyRoundError, match="no upload was accepted in this round"):
        mean.finish()
