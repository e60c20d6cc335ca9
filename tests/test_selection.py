from __future__ import annotations

import math
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedobd import UsageError
from fedobd.blocks import ModelSchema, Segment
from fedobd.codec import NNADQ, Stochastic, Unquantized
from fedobd.methods import Codec, QuantizerName, SelectionName
from fedobd.sessions import (
    fill_budget,
    order_by_difference,
    oversized_blocks,
    parameter_budget,
    random_order,
)
from fedobd.sessions._selection import mean_block_differences, squared_norm, subtract
from tests.helpers import buffer, law, make_schema, parameter, source_of

finite32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def sum_of_squares_in_lanes(values: list[float]) -> float:
    """Eight sums over every eighth value, what is left over to the first, added in pairs."""
    sums = [0.0] * 8
    whole = len(values) // 8 * 8
    for i, v in enumerate(values):
        sums[i % 8 if i < whole else 0] += v * v
    while len(sums) > 1:
        sums = [sums[i] + sums[i + 1] for i in range(0, len(sums), 2)]
    return sums[0]


@law(300)
@given(st.lists(finite32, max_size=70))
def test_squared_norm_has_the_bits_of_eight_lanes(values: list[float]) -> None:
    array = np.array(values, np.float32)
    assert squared_norm(array) == sum_of_squares_in_lanes(values)
    assert array.tolist() == values
    # all terms have one sign, so each addition adds at most half an ulp of the sum
    assert squared_norm(array) == pytest.approx(math.fsum(v * v for v in values), rel=1e-14)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 9, 1023, 1024, 1025, 100_000])
def test_squared_norm_of_many(count: int) -> None:
    values = np.random.default_rng(count).standard_normal(count).astype(np.float32)
    as_list = [float(v) for v in values]
    assert squared_norm(values) == sum_of_squares_in_lanes(as_list)
    # 12,500 additions in a lane, each off by half an ulp of the sum so far at most
    rel = 1e-14 if count < 10_000 else (count / 8 + 10) * 2.0**-53
    assert squared_norm(values) == pytest.approx(math.fsum(v * v for v in as_list), rel=rel)


def test_squared_norm_does_not_overflow_or_underflow() -> None:
    assert squared_norm(np.full(4, 3e38, np.float32)) == 4 * float(np.float32(3e38)) ** 2
    assert squared_norm(np.full(4, 1e-45, np.float32)) == 4 * 2.0**-298


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shared", [False, True])
def test_subtract_part_of_each_row(dtype: torch.dtype, shared: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    now = torch.randn(3, 40, generator=generator).to(dtype)
    before = torch.randn(1 if shared else 3, 40, generator=generator).to(dtype)
    differences, norms = subtract(now, before, 5, 27)
    wanted = now[:, 5:27].to(torch.float32) - before[:, 5:27].to(torch.float32)
    assert differences.dtype == torch.float32
    assert torch.equal(differences, wanted)
    assert norms.tolist() == [sum_of_squares_in_lanes(row.tolist()) for row in wanted]


def test_mean_block_differences_by_hand() -> None:
    schema = make_schema(
        [parameter("w", 2, 2), parameter("b", 1), buffer("mean", 2), parameter("v", 4)],
        [0, 1],
        [2],
        [(3, 0, 1)],
        [(3, 1, 4)],
    )
    state = {
        "w": torch.tensor([[1.0, 2.0], [2.0, 4.0]]),
        "b": torch.zeros(1),
        "mean": torch.ones(2),
        "v": torch.tensor([-3.0, 2.0, 0.0, 0.0]),
    }
    # 5/5 elements; a block of buffers; 3/1; 2/3: the norm is divided by |b|, not by its root
    wanted = (1.0, 0.0, 3.0, 2.0 / 3.0)
    source = source_of(schema, state)
    twice = torch.tensor([[1.0], [-2.0]])

    def squared_norms(segment: Segment) -> torch.Tensor:
        return (source(segment) * twice).to(torch.float64).square().sum(dim=1)

    found = mean_block_differences(schema, squared_norms)
    assert found == [wanted, tuple(2 * mean for mean in wanted)]


def test_mean_block_differences_does_not_ask_for_buffers() -> None:
    schema = make_schema([parameter("w", 2), buffer("seen", dtype=torch.int64)], [0, 1])
    asked = []

    def squared_norms(segment: Segment) -> torch.Tensor:
        asked.append(segment)
        return torch.ones(1, dtype=torch.float64)

    mean_block_differences(schema, squared_norms)
    assert asked == [schema.blocks[0].segments[0]]


@pytest.mark.parametrize(
    ("count", "rate", "wanted"),
    [
        (10, 0.0, 10),
        (10, 0.3, 7),
        (10, 0.9, 1),  # (1 - 0.9) * 10 is 0.99... in floating point
        (100, 0.29, 71),
        (1000, 0.7, 300),
        (3, 0.5, 1),
        (1, 0.3, 0),
        (100_000, 1e-05, 99_999),
        (176_122, 0.3, 123_285),
        (10**18, 0.1, 9 * 10**17),
    ],
)
def test_budget_by_hand(count: int, rate: float, wanted: int) -> None:
    assert parameter_budget(count, rate) == wanted


@law(200)
@given(st.integers(0, 10**9), st.integers(0, 9999))
def test_budget_is_exact_for_decimal_rates(count: int, ten_thousandths: int) -> None:
    rate = ten_thousandths / 10_000
    wanted = int((1 - Decimal(ten_thousandths) / 10_000) * count)
    assert parameter_budget(count, rate) == wanted


def schema_of_sizes(sizes: list[int]) -> ModelSchema:
    """One block for each size; 0 stands for a block of a buffer alone."""
    return make_schema(
        [parameter(f"p{i}", n) if n else buffer(f"m{i}", 3) for i, n in enumerate(sizes)]
    )


def test_only_a_block_above_the_budget_is_too_large_for_any_upload() -> None:
    schema = schema_of_sizes([8, 0, 2])
    assert oversized_blocks(schema, 0.2) == ()  # 8 of 10 may be kept
    assert fill_budget(schema, [0, 1, 2], 8) == (0, 1)
    assert oversized_blocks(schema, 0.3) == (0,)
    assert oversized_blocks(schema, 0.9) == (0, 2)


def test_block_that_does_not_fit_is_skipped_and_the_scan_goes_on() -> None:
    schema = schema_of_sizes([5, 3, 4, 2])
    assert fill_budget(schema, [0, 2, 1, 3], 8) == (0, 1)
    assert fill_budget(schema, [0, 2, 1, 3], 7) == (0, 3)
    assert fill_budget(schema, [2, 0, 1, 3], 8) == (1, 2)
    assert fill_budget(schema, [3, 2, 1, 0], 14) == (0, 1, 2, 3)
    assert fill_budget(schema, [0, 1, 2, 3], 1) == ()


@pytest.mark.parametrize("budget", [0, 1, 4, 100])
def test_blocks_of_buffers_are_always_kept(budget: int) -> None:
    schema = schema_of_sizes([4, 0, 9, 0])
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        assert {1, 3} <= set(fill_budget(schema, order, budget))


@law(200)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 40), st.data())
def test_greedy_rule(sizes: list[int], budget: int, data: st.DataObject) -> None:
    sizes = [*sizes, 1]
    order = data.draw(st.permutations(range(len(sizes))))
    kept = fill_budget(schema_of_sizes(sizes), order, budget)
    assert list(kept) == sorted(set(kept))
    assert sum(sizes[number] for number in kept) <= budget
    for place, number in enumerate(order):
        used_before = sum(sizes[n] for n in order[:place] if n in kept)
        assert (number in kept) is (used_before + sizes[number] <= budget)


def test_ties_go_to_the_lower_number() -> None:
    assert order_by_difference([1.0, 2.0, 2.0, 0.0]) == [1, 2, 0, 3]
    assert order_by_difference([0.0, -0.0, 0.0]) == [0, 1, 2]
    assert order_by_difference([]) == []
    codec = Codec(dropout_rate=0.5)
    assert codec.select(schema_of_sizes([2, 2, 2, 2]), (0.5,) * 4, 0) == (0, 1)


def test_codec_selects_the_largest_differences() -> None:
    schema = schema_of_sizes([4, 3, 2, 1, 0])
    differences = (0.1, 0.4, 0.2, 0.3, 0.0)
    assert Codec(dropout_rate=0.3).budget(schema) == 7
    assert Codec(dropout_rate=0.3).select(schema, differences, 0) == (1, 2, 3, 4)
    assert Codec(dropout_rate=0.9).select(schema, differences, 0) == (3, 4)
    assert Codec(dropout_rate=0.0).select(schema, differences, 0) == (0, 1, 2, 3, 4)


def test_codec_without_selection_keeps_all() -> None:
    schema = schema_of_sizes([4, 3, 0])
    codec = Codec(selection="none", dropout_rate=0.9)
    assert codec.budget(schema) == 7
    assert codec.select(schema, (0.1, 0.2, 0.0), 0) == (0, 1, 2)


def test_random_selection_follows_the_seed_alone() -> None:
    schema = schema_of_sizes([1] * 20)
    codec = Codec(selection="random", dropout_rate=0.5)
    first = codec.select(schema, (0.0,) * 20, 1)
    assert len(first) == 10
    assert first == codec.select(schema, tuple(map(float, range(20))), 1)
    assert first != codec.select(schema, (0.0,) * 20, 2)
    order = random_order(20, torch.Generator().manual_seed(3))
    assert sorted(order) == list(range(20))
    assert order == random_order(20, torch.Generator().manual_seed(3))


def test_random_selection_favours_no_block() -> None:
    schema = schema_of_sizes([1] * 10)
    codec = Codec(selection="random", dropout_rate=0.5)
    draws = 2000
    counts = np.zeros(10)
    for seed in range(draws):
        counts[list(codec.select(schema, (0.0,) * 10, seed))] += 1
    # binomial with p = 1/2: five sigmas
    assert float(np.abs(counts - draws / 2).max()) <= 5 * math.sqrt(draws / 4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"uplink_quantizer": "nnadc"}, "uplink_quantizer is 'nnadc'; allowed are 'nnadq'"),
        ({"downlink_quantizer": ""}, "downlink_quantizer is ''; allowed are 'nnadq'"),
        ({"uplink_weight": 0.0}, "uplink_weight is 0.0; allowed are finite numbers above 0"),
        ({"downlink_weight": math.nan}, "downlink_weight is nan; allowed are finite numbers"),
        ({"stochastic_levels": 0}, "num_levels is 0; allowed are 1 to 4194304"),
        ({"selection": "best"}, "selection is 'best'; allowed are 'mbd', 'random' and 'none'"),
        ({"dropout_rate": 1.0}, r"dropout_rate λ is 1\.0; allowed are 0 <= λ < 1"),
        ({"dropout_rate": -0.1}, r"dropout_rate λ is -0\.1; allowed are 0 <= λ < 1"),
        ({"dropout_rate": math.nan}, "dropout_rate λ is nan; allowed are 0 <= λ < 1"),
    ],
)
def test_bad_codec_is_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Codec(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("nnadq", NNADQ(0.5)), ("stochastic", Stochastic(7)), ("none", Unquantized())],
)
def test_codec_names_its_quantizers(name: QuantizerName, wanted: object) -> None:
    codec = Codec(uplink_quantizer=name, uplink_weight=0.5, stochastic_levels=7)
    assert codec.uplink == wanted
    assert codec.downlink == NNADQ(1e-3)
    codec = Codec(downlink_quantizer=name, downlink_weight=0.5, stochastic_levels=7)
    assert codec.downlink == wanted
    assert codec.uplink == NNADQ(1e-3)


@pytest.mark.parametrize("selection", ["mbd", "random"])
def test_selection_is_within_the_budget(selection: SelectionName) -> None:
    schema = schema_of_sizes([9, 1, 30, 7, 22])
    codec = Codec(selection=selection, dropout_rate=0.3)
    for seed in range(20):
        kept = codec.select(schema, (0.1, 0.2, 0.3, 0.4, 0.5), seed)
        assert sum(schema.blocks[n].num_parameters for n in kept) <= codec.budget(schema) == 48
