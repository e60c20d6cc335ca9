from __future__ import annotations

import math
import struct

import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fedobd import DecodeError, DecodeReason
from fedobd.codec import compress, decompress, from_bytes, to_words
from tests.helpers import law

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)

Parts = list[tuple[bytes, int]]
"""The bytes of each segment and of one of its elements."""


def compressed(parts: Parts) -> bytes:
    return compress([part for part, _ in parts], [itemsize for _, itemsize in parts])


def decompressed(frame: bytes, parts: Parts) -> bytes:
    lengths = [len(part) for part, _ in parts]
    return decompress(memoryview(frame), lengths, [itemsize for _, itemsize in parts])


@st.composite
def part_lists(draw: st.DrawFn) -> Parts:
    parts = []
    for _ in range(draw(st.integers(0, 4))):
        itemsize = draw(st.sampled_from([1, 2, 4, 8]))
        num_bytes = draw(st.integers(0, 30)) * itemsize
        parts.append((draw(st.binary(min_size=num_bytes, max_size=num_bytes)), itemsize))
    return parts


SAMPLE: Parts = [(struct.pack("<5f", 1, -2, 3.5, 0, 1e-3), 4), (b"", 8), (bytes(range(6)), 2)]


def refuse(frame: bytes, parts: Parts, match: str = ".") -> None:
    with pytest.raises(DecodeError, match=match) as caught:
        decompressed(frame, parts)
    assert caught.value.reason is DecodeReason.STREAM


def bytes_or_stream_error(frame: bytes, parts: Parts) -> None:
    """Decompress; anything but as many bytes as were wanted, or a stream error, fails the test."""
    try:
        came = decompressed(frame, parts)
    except DecodeError as error:
        if error.reason is not DecodeReason.STREAM:
            raise
    else:
        assert len(came) == sum(len(part) for part, _ in parts)


@law(100)
@given(part_lists())
def test_round_trip(parts: Parts) -> None:
    assert decompressed(compressed(parts), parts) == b"".join(part for part, _ in parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_values_of_each_type_come_back(dtype: torch.dtype, count: int) -> None:
    values = (torch.randn(count, generator=torch.Generator().manual_seed(1)) * 50).to(dtype)
    part = to_words(values, dtype).tobytes()
    assert len(part) == count * dtype.itemsize
    parts: Parts = [(b"abcd", 4), (part, dtype.itemsize), (b"ef", 1)]
    came = decompressed(compressed(parts), parts)[4:-2]
    assert torch.equal(from_bytes(memoryview(came), dtype), values)
    assert from_bytes(memoryview(came), dtype).dtype is dtype


def test_bits_of_each_float_come_back() -> None:
    values = torch.tensor([0.0, -0.0, math.inf, -math.nan, 1e-45, 3.4e38])
    parts: Parts = [(to_words(values, torch.float32).tobytes(), 4)]
    came = from_bytes(memoryview(decompressed(compressed(parts), parts)), torch.float32)
    assert torch.equal(came.view(torch.int32), values.view(torch.int32))


def test_boolean_is_true_for_any_byte_but_0() -> None:
    assert from_bytes(memoryview(b"\0\1\2\xff"), torch.bool).tolist() == [False, True, True, True]


def test_planes_are_as_documented() -> None:
    frame = compressed([(b"\1\2\3\4\5\6", 2), (b"\7\x08", 1), (b"abcdefgh", 4)])
    planes = zstandard.ZstdDecompressor().decompress(frame)
    assert planes == b"\1\3\5\2\4\6" + b"\7\x08" + b"aebfcgdh"
    assert zstandard.frame_content_size(frame) == 16


def test_planes_of_weights_are_smaller_than_the_weights() -> None:
    weights = torch.randn(300_000, generator=torch.Generator().manual_seed(1)) * 0.05
    part = to_words(weights, torch.float32).tobytes()
    as_they_are = zstandard.ZstdCompressor(level=3).compress(part)
    assert len(compressed([(part, 4)])) < 0.87 * len(part)
    assert len(compressed([(part, 4)])) < 0.95 * len(as_they_are)


def test_values_that_do_not_compress_stay_within_the_cap_of_a_frame() -> None:
    noise = torch.randint(256, (1_000_000,), generator=torch.Generator().manual_seed(1))
    part = to_words(noise, torch.uint8).tobytes()
    assert len(compressed([(part, 4)])) <= len(part) + len(part) // 128 + 1024
    assert len(compressed([])) <= 1024


def test_cut_frame_is_refused() -> None:
    frame = compressed(SAMPLE)
    for length in range(len(frame)):
        refuse(frame[:length], SAMPLE)


@pytest.mark.parametrize("extra", [b"\0", b"junk", compressed(SAMPLE), compressed([])])
def test_bytes_after_a_frame_are_refused(extra: bytes) -> None:
    refuse(compressed(SAMPLE) + extra, SAMPLE)
    refuse(compressed([]) + extra, [])


def test_altered_frame_gives_bytes_or_a_stream_error() -> None:
    frame = compressed(SAMPLE)
    for position in range(len(frame)):
        for bit in range(8):
            altered = bytearray(frame)
            altered[position] ^= 1 << bit
            bytes_or_stream_error(bytes(altered), SAMPLE)


@law(100)
@given(st.binary(max_size=60), part_lists())
def test_foreign_bytes_are_refused(data: bytes, parts: Parts) -> None:
    for frame in (data, b"\x28\xb5\x2f\xfd" + data):
        bytes_or_stream_error(frame, parts)


def test_frame_of_another_length_is_refused() -> None:
    refuse(compressed([(b"abcd", 4)]), [(b"12345", 1)], "says it holds 4 bytes; .* want 5")
    refuse(compressed([(b"abcd", 4)]), [], "says it holds 4 bytes; its segments want 0")
    refuse(compressed([]), [(b"1", 1)], "says it holds 0 bytes; its segments want 1")


def test_frame_without_content_size_is_refused() -> None:
    compressor = zstandard.ZstdCompressor(write_content_size=False)
    refuse(compressor.compress(b"12345"), [(b"12345", 1)])


@pytest.mark.parametrize("claimed", [2**20, 2**40, 2**63, 2**64 - 3])
def test_huge_claim_is_refused_without_decompressing(
    claimed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # magic, a descriptor that says "single segment, eight bytes of content size", and the claim
    bomb = b"\x28\xb5\x2f\xfd" + bytes([0b1110_0000]) + struct.pack("<Q", claimed) + b"\1\0\0"

    def no_decompressor(*args: object, **kwargs: object) -> None:
        raise AssertionError("the frame was opened")

    monkeypatch.setattr(zstandard, "ZstdDecompressor", no_decompressor)
    refuse(bomb, [(b"12345", 1)], "wanted|want")


@pytest.mark.parametrize("claimed", [4, 6])
def test_frame_that_holds_another_number_than_it_claims_is_refused(claimed: int) -> None:
    honest = zstandard.ZstdCompressor().compress(b"12345")
    assert honest[4] & 0b0010_0000, "a single segment with a content size of one byte"
    lying = honest[:5] + bytes([claimed]) + honest[6:]
    refuse(lying, [(b"1" * claimed, 1)], "a compressed frame is damaged|holds")
