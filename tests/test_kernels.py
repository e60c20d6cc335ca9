"""The compiled loops: the laws of tables, and float32 arithmetic without any fused operation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedobd.codec import (
    NNADQ,
    Coding,
    Levels,
    SegmentCode,
    decode_levels,
    dequantize,
    encode_levels,
    kernels,
)
from fedobd.codec import _frequencies as tables
from fedobd.codec._compiled import compiled
from fedobd.codec._quantization import _round_there, level_shift
from tests import rans_reference as slow
from tests.helpers import law
from tests.nnadq_reference import reference_nnadq

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

LOG2: Int64 = tables.log2_table((1 << 16) + 1)


def test_log2_table_is_log2_rounded_down() -> None:
    assert LOG2[0] == 0
    numbers = np.arange(1, LOG2.size)
    exact = np.log2(numbers) * 2**16
    assert bool((LOG2[1:] <= exact + 1e-6).all())
    assert bool((LOG2[1:] > exact - 2).all())  # the squares are rounded down too
    powers = 2 ** np.arange(17)
    assert LOG2[powers].tolist() == [n << 16 for n in range(17)]


# --- frequencies ---------------------------------------------------------------------------------


@st.composite
def histograms(draw: st.DrawFn, max_size: int = 300) -> Int64:
    """Counts of which at least one is not 0."""
    size = draw(st.integers(1, max_size))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["even", "steep", "sparse", "one", "huge"]))
    if kind == "even":
        counts = rng.integers(0, 100, size)
    elif kind == "steep":
        counts = np.floor(10.0 ** rng.uniform(-1, 6, size)).astype(np.int64)
    elif kind == "sparse":
        counts = rng.integers(1, 1000, size) * (rng.random(size) < 0.05)
    elif kind == "one":
        counts = np.zeros(size, np.int64)
    else:
        counts = rng.integers(2**30, 2**34, size)
    whole: Int64 = counts.astype(np.int64)
    whole[rng.integers(size)] += 1
    return whole


def mantissa_bits(frequency: int) -> int:
    """Bits that a number has between its highest and its lowest 1."""
    while frequency % 2 == 0:
        frequency //= 2
    return frequency.bit_length() - 1


@law(100)
@given(histograms(), st.integers(1, 16), st.integers(0, 15))
def test_normalized_frequencies(counts: Int64, k: int, mantissa: int) -> None:
    frequencies = np.full(counts.size, -1, np.int64)
    largest = int(counts.argmax())
    worked = tables.normalize(counts, int(counts.sum()), largest, k, mantissa, frequencies)
    assert int(frequencies.sum()) == 2**k
    assert bool(worked) is (int(frequencies[largest]) >= 1)
    if worked:
        assert frequencies[counts > 0].min() >= 1
        assert not frequencies[counts == 0].any()
    others = [int(f) for symbol, f in enumerate(frequencies) if f and symbol != largest]
    assert all(mantissa_bits(f) <= mantissa for f in others)
    if 2**k >= 4 * int((counts > 0).sum()) and mantissa >= 4:
        assert worked


@law(100)
@given(histograms())
def test_chosen_table(counts: Int64) -> None:
    total, width = int(counts.sum()), max(1, (counts.size - 1).bit_length())
    frequencies = np.full(counts.size, -1, np.int64)
    scratch = np.zeros(64 + 24 * counts.size, np.uint8)
    k, mantissa, largest, bits = tables.choose_table(
        counts, total, width, LOG2, scratch, frequencies
    )
    assert not scratch.any()
    assert int(frequencies.sum()) == 2 ** (k or 16)
    assert frequencies[counts > 0].min() >= 1
    if k == 0:
        assert tuple(frequencies.tolist()) == slow.uniform(counts.size).frequencies
    else:
        assert not frequencies[counts == 0].any()
        assert counts[largest] == counts.max()
    # what it says that table and symbols take is what they take
    there = counts > 0
    symbol_bits = float((counts[there] * ((k or 16) - np.log2(frequencies[there]))).sum())
    written = 1
    if k:
        table = slow.table_bits(frequencies.tolist(), largest, k, mantissa, width)
        assert len(table) <= 8 * scratch.size
        written = len(table)
    assert bits == pytest.approx(symbol_bits + written, rel=1e-4, abs=2)
    assert bits <= total * 16 + 1


@pytest.mark.parametrize("size", [1, 2, 3, 255, 4095, 4096])
def test_uniform_frequencies(size: int) -> None:
    frequencies = np.zeros(size, np.int64)
    tables.uniform(frequencies)
    assert tuple(frequencies.tolist()) == slow.uniform(size).frequencies
    assert int(frequencies.sum()) == 2**16
    assert int(frequencies.max() - frequencies.min()) <= 1


# --- tables as bits ------------------------------------------------------------------------------


def unpacked(buffer: NDArray[np.uint8]) -> list[int]:
    bits: list[int] = np.unpackbits(buffer, bitorder="little").tolist()
    return bits


@law(100)
@given(histograms(), st.integers(1, 16), st.integers(0, 15), st.integers(0, 20))
def test_table_is_written_and_read_as_by_the_slow_reference(
    counts: Int64, k: int, mantissa: int, position: int
) -> None:
    frequencies, largest = np.zeros(counts.size, np.int64), int(counts.argmax())
    if not tables.normalize(counts, int(counts.sum()), largest, k, mantissa, frequencies):
        return
    width = max(1, (counts.size - 1).bit_length())
    buffer = np.zeros(64 + 24 * counts.size, np.uint8)
    end = tables.write_table(frequencies, largest, k, mantissa, width, buffer, position)
    bits = unpacked(buffer)
    wanted = slow.table_bits(frequencies.tolist(), largest, k, mantissa, width)
    assert bits[position:end] == wanted
    assert not any(bits[:position])
    assert not any(bits[end:])

    read = np.zeros(counts.size, np.int64)
    assert tables.read_table(buffer, position, width, read) == (k, end)
    assert np.array_equal(read, frequencies)
    reader = slow.Bits(bits, position)
    assert slow.read_table(reader, counts.size, width) == slow.Table(tuple(read.tolist()), k)
    assert reader.position == end


def read_both_ways(buffer: NDArray[np.uint8], position: int, size: int) -> bool:
    """Read bits with the kernel and with the reference; whether they are a table to both."""
    width = max(1, (size - 1).bit_length())
    frequencies = np.zeros(size, np.int64)
    k, end = tables.read_table(buffer, position, width, frequencies)
    reader = slow.Bits(unpacked(buffer), position)
    try:
        table = slow.read_table(reader, size, width)
    except slow.BadStreamError:
        assert k == -1
        return False
    assert (k or 16, end) == (table.k, reader.position)
    if k:
        assert tuple(frequencies.tolist()) == table.frequencies
    return True


@law(100)
@given(st.binary(max_size=40), st.integers(0, 9), st.sampled_from([1, 2, 3, 19, 300, 4095]))
def test_any_bits_are_read_as_by_the_slow_reference(data: bytes, position: int, size: int) -> None:
    read_both_ways(np.frombuffer(data, np.uint8), min(position, 8 * len(data)), size)


def test_altered_tables_are_read_as_by_the_slow_reference() -> None:
    counts = np.array([0, 3, 100, 0, 0, 40, 7, 1, 0], np.int64)
    frequencies = np.zeros(9, np.int64)
    assert tables.normalize(counts, 151, 2, 10, 2, frequencies)
    buffer = np.zeros(16, np.uint8)
    end = tables.write_table(frequencies, 2, 10, 2, 4, buffer, 0)
    whole = buffer[: (end + 7) // 8]
    read = 0
    for bit in range(end):
        altered = whole.copy()
        altered[bit // 8] ^= np.uint8(1 << bit % 8)
        read += read_both_ways(altered, 0, 9)
    for length in range(len(whole)):
        assert not read_both_ways(whole[:length], 0, 9)
    assert 0 < read < end


# --- one operation at a time ---------------------------------------------------------------------


def test_quantized_symbols_and_counts_equal_the_slow_reference() -> None:
    rng = np.random.default_rng(2)
    for count, weight, scale in ((1, 1e-3, 1.0), (4099, 1e-3, 1.0), (3001, 1e-9, 100.0)):
        values = (rng.standard_normal(count) * scale + 3).astype(np.float32)
        values[-1] = 2 * scale
        quantizer = NNADQ(weight)
        code = quantizer.measure(values, 32)
        wanted = reference_nnadq(values.tolist(), weight, 32)
        if code.coding is not Coding.LEVELS:
            assert wanted.coding == code.coding.name.lower()
            continue
        levels = quantizer.quantize(values, code)
        assert levels.signed().tolist() == list(wanted.levels)
        assert np.array_equal(levels.counts, Levels.of(levels.signed(), code.num_levels).counts)
        assert int(levels.counts.sum()) == count
        assert levels.symbols.dtype == (np.uint16 if code.num_levels < 2**15 else np.uint32)


def quantized_by_numpy(values: Float32, code: SegmentCode) -> NDArray[np.int32]:
    """Each operation in an array of its own."""
    centred = values - np.float32(code.offset)
    share = centred / np.float32(code.range)
    scaled = share * np.float32(code.num_levels)
    limit = np.float32(code.num_levels)
    levels: NDArray[np.int32] = np.clip(np.rint(scaled), -limit, limit).astype(np.int32)
    return levels


@pytest.mark.parametrize("weight", [1e-9, 1e-6, 1e-4, 0.1])
def test_a_million_levels_equal_those_of_numpy(weight: float) -> None:
    values = (np.random.default_rng(4).standard_normal(1_000_000) * 3 + 0.7).astype(np.float32)
    code = NNADQ(weight).measure(values, 32)
    levels = NNADQ(weight).quantize(values, code)
    assert np.array_equal(levels.signed(), quantized_by_numpy(values, code))
    bins = (2 * code.num_levels >> level_shift(code.num_levels)) + 1
    counts = np.bincount(levels.symbols >> level_shift(code.num_levels), minlength=bins)
    assert np.array_equal(levels.counts, counts)


@pytest.mark.parametrize("num_levels", [100, 2000, 5000, 100_000, 2**22])
def test_a_million_values_come_back_without_a_fused_operation(num_levels: int) -> None:
    rng = np.random.default_rng(6)
    levels = rng.integers(-num_levels, num_levels + 1, 1_000_000).astype(np.int32)
    code = SegmentCode(Coding.LEVELS, num_levels, float(np.float32(0.7)), float(np.float32(1.3)))
    stream = encode_levels([Levels.of(levels, num_levels)])
    (came,) = decode_levels(memoryview(stream), [(levels.size, code)])
    step = np.float32(code.range) / np.float32(num_levels)
    scaled = levels.astype(np.float32) * step
    wanted = scaled + np.float32(code.offset)
    assert np.array_equal(came.view(np.uint32), wanted.view(np.uint32))
    assert np.array_equal(dequantize(levels, code).view(np.uint32), wanted.view(np.uint32))
    # fused, one rounding instead of two, many values would be others: float64 holds the product
    fused = (levels * np.float64(step) + np.float64(np.float32(code.offset))).astype(np.float32)
    assert int((fused != wanted).sum()) > (0 if num_levels < 1000 else 1000)


@law(100)
@given(
    st.integers(0, 2**32),
    st.integers(0, 40),
    st.integers(-40, 40),
    st.booleans(),
    st.booleans(),
    st.integers(0, 3),
)
def test_add_differences_rounds_each_product_once(
    seed: int, count: int, exponent: int, has_base: bool, has_mask: bool, address: int
) -> None:
    rng = np.random.default_rng(seed)
    kept = rng.random(count) < (0.5 if has_mask else 2)
    values = rng.standard_normal(int(kept.sum())).astype(np.float32)
    base = rng.standard_normal(count if has_base else 0).astype(np.float32)
    scale = math.ldexp(float(rng.integers(1, 10_000)), exponent)
    sums = rng.integers(-(2**60), 2**60, count)
    whole = np.zeros(count)
    whole[kept] = values.astype(np.float64) - (base[kept] if has_base else 0)
    wanted = [int(s) + round(float(v) * scale) for s, v in zip(sums, whole, strict=True)]
    # as they lie in a payload: read-only, at any address
    view = np.frombuffer(b"\xff" * address + values.tobytes(), np.float32, values.size, address)
    mask = kept if has_mask else np.empty(0, np.bool_)
    came, largest = sums.copy(), float(np.abs(whole).max(initial=0))
    assert kernels.add_differences(view, base, mask, largest, scale, came) == -1
    assert came.tolist() == wanted
    if largest > 0:
        below = math.nextafter(largest, 0)
        bits = kernels.add_differences(view, base, mask, below, scale, came)
        assert np.int64(bits).view(np.float64) == largest
        assert came.tolist() == wanted


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_add_differences_adds_nothing_that_is_not_finite(bad: float) -> None:
    values = np.ones(9, np.float32)
    values[4] = bad
    for base in (np.empty(0, np.float32), np.zeros(9, np.float32)):
        sums = np.zeros(9, np.int64)
        mask = np.empty(0, np.bool_)
        bits = kernels.add_differences(values, base, mask, 1.7e308, 1.0, sums)
        assert not math.isfinite(np.int64(bits).view(np.float64))
        assert not sums.any()


@pytest.mark.parametrize(
    ("scale", "beta"), [(0.005, 1e-3), (1.0, 1e-4), (50.0, 1e-9), (1e-30, 1e-3), (3.0, 1e-7)]
)
def test_a_tensor_is_quantized_where_it_lies_to_the_same_levels(scale: float, beta: float) -> None:
    # on a GPU the same operations run there; here both paths run on the CPU
    values = (np.random.default_rng(1).standard_t(3, 20_001) * scale).astype(np.float32)
    quantizer = NNADQ(beta)
    code = quantizer.measure(values, 32)
    here = quantizer.quantize(values, code)
    (there,) = _round_there(torch.from_numpy(values).unsqueeze(0), [code])
    assert np.array_equal(here.symbols, there.symbols)
    assert here.symbols.dtype == there.symbols.dtype
    assert np.array_equal(here.counts, there.counts)


def test_loops_are_compiled_where_they_cannot_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []

    def refuse(cache: bool = False, **options: object) -> object:
        calls.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr("numba.njit", refuse)
    assert compiled(len)([1, 2]) == 2
    assert calls == [True, False]
