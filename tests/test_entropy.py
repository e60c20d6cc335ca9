from __future__ import annotations

import struct

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedobd._entropy import decode_levels, encode_levels
from fedobd._errors import DecodeError, DecodeReason
from fedobd._quantization import MAX_LEVELS
from tests.helpers import law

Int32 = NDArray[np.int32]
Segments = list[tuple[Int32, int]]

level_counts = st.one_of(
    st.sampled_from([1, 2, 127, 128, 255, 256, 32767, 32768, MAX_LEVELS - 1, MAX_LEVELS]),
    st.integers(1, MAX_LEVELS),
)


@st.composite
def segment_lists(draw: st.DrawFn) -> Segments:
    segments = []
    for _ in range(draw(st.integers(0, 5))):
        num_levels = draw(level_counts)
        levels = draw(st.lists(st.integers(-num_levels, num_levels), max_size=20))
        at_extremes: bool = draw(st.booleans())
        if levels and at_extremes:
            levels[:2] = [num_levels, -num_levels]
        segments.append((np.array(levels, np.int32), num_levels))
    return segments


def shapes_of(segments: Segments) -> list[tuple[int, int]]:
    return [(levels.size, num_levels) for levels, num_levels in segments]


def frame(planes: bytes) -> memoryview:
    return memoryview(zstandard.ZstdCompressor().compress(planes))


def expect_stream_error(stream: bytes, shapes: list[tuple[int, int]]) -> None:
    with pytest.raises(DecodeError) as caught:
        decode_levels(memoryview(stream), shapes)
    assert caught.value.reason is DecodeReason.STREAM


def levels_or_stream_error(stream: bytes, shapes: list[tuple[int, int]]) -> list[Int32] | None:
    """Give legal levels, or None where the stream is refused; all else fails the test."""
    try:
        decoded = decode_levels(memoryview(stream), shapes)
    except DecodeError as error:
        if error.reason is not DecodeReason.STREAM:
            raise
        return None
    for levels, (count, num_levels) in zip(decoded, shapes, strict=True):
        assert levels.size == count
        assert not count or int(np.abs(levels).max()) <= num_levels
    return decoded


SAMPLE: Segments = [
    (np.arange(-9, 10, dtype=np.int32), 9),
    (np.array([70000, -3, 0], np.int32), 70000),
]


@law(300)
@given(segment_lists())
def test_round_trip(segments: Segments) -> None:
    decoded = decode_levels(memoryview(encode_levels(segments)), shapes_of(segments))
    assert len(decoded) == len(segments)
    for (levels, _), came in zip(segments, decoded, strict=True):
        assert came.dtype == np.int32
        assert np.array_equal(came, levels)


def test_planes_are_as_documented() -> None:
    # s = 200: symbols 0 to 400 take two planes, the lowest byte first; s = 1 takes one
    segments: Segments = [(np.array([200, -200, 57], np.int32), 200), (np.array([1], np.int32), 1)]
    planes = zstandard.ZstdDecompressor().decompress(encode_levels(segments))
    assert planes == bytes([400 % 256, 0, 257 % 256, 1, 0, 1, 2])


def test_encoding_does_not_change_the_levels() -> None:
    levels = np.arange(-9, 10, dtype=np.int32)
    encode_levels([(levels, 9)])
    assert np.array_equal(levels, np.arange(-9, 10))


@pytest.mark.parametrize("cut", range(len(encode_levels(SAMPLE))))
def test_cut_stream_is_refused(cut: int) -> None:
    expect_stream_error(encode_levels(SAMPLE)[:cut], shapes_of(SAMPLE))


@pytest.mark.parametrize("extra", [b"\0", b"junk", encode_levels(SAMPLE)])
def test_bytes_after_the_frame_are_refused(extra: bytes) -> None:
    expect_stream_error(encode_levels(SAMPLE) + extra, shapes_of(SAMPLE))


def test_bytes_after_an_empty_frame_are_refused() -> None:
    expect_stream_error(encode_levels([]) + b"junk", [])


def test_altered_stream_gives_levels_or_a_stream_error() -> None:
    stream = encode_levels(SAMPLE)
    refused = 0
    for position in range(len(stream)):
        for bit in range(8):
            altered = bytearray(stream)
            altered[position] ^= 1 << bit
            refused += levels_or_stream_error(bytes(altered), shapes_of(SAMPLE)) is None
    assert refused > len(stream)


@law(200)
@given(st.binary(max_size=60), segment_lists())
def test_foreign_bytes_are_refused(data: bytes, segments: Segments) -> None:
    levels_or_stream_error(data, shapes_of(segments))


@law(100)
@given(st.binary(max_size=30))
def test_foreign_bytes_after_the_magic_are_refused(tail: bytes) -> None:
    # The magic number takes the decoder past its first check.
    levels_or_stream_error(b"\x28\xb5\x2f\xfd" + tail, [(5, 3)])


def test_wrong_number_of_bytes_is_refused() -> None:
    with pytest.raises(DecodeError, match="says it holds 4 bytes; its segments want 5"):
        decode_levels(frame(b"\0" * 4), [(5, 1)])


def test_level_beyond_the_largest_is_refused() -> None:
    with pytest.raises(DecodeError, match="a level of 2 came; 1 is the largest"):
        decode_levels(frame(bytes([0, 3])), [(2, 1)])
    # 2 s + 1 = 2^23 + 1 is the first symbol of three bytes that is too large for s = 2^22
    symbol = struct.pack("<I", 2 * MAX_LEVELS + 1)[:3]
    with pytest.raises(DecodeError, match="a level of 4194305 came; 4194304 is the largest"):
        decode_levels(frame(symbol), [(1, MAX_LEVELS)])


def test_frame_without_content_size_is_refused() -> None:
    compressor = zstandard.ZstdCompressor(write_content_size=False)
    expect_stream_error(compressor.compress(b"\0" * 5), [(5, 1)])


@pytest.mark.parametrize("claimed", [2**20, 2**40, 2**63, 2**64 - 3])
def test_huge_claim_is_refused_without_decompressing(
    claimed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # magic, a descriptor that says "single segment, eight bytes of content size", and the claim
    bomb = b"\x28\xb5\x2f\xfd" + bytes([0b1110_0000]) + struct.pack("<Q", claimed) + b"\1\0\0"

    def no_decompressor(*args: object, **kwargs: object) -> None:
        raise AssertionError("the frame was opened")

    monkeypatch.setattr(zstandard, "ZstdDecompressor", no_decompressor)
    expect_stream_error(bomb, [(5, 1)])


def test_frame_that_holds_less_than_it_claims_is_refused() -> None:
    honest = bytes(frame(b"\0" * 5))
    assert honest[4] & 0b0010_0000, "a single segment with a content size of one byte"
    lying = honest[:5] + bytes([6]) + honest[6:]
    with pytest.raises(DecodeError, match="a level stream is damaged"):
        decode_levels(memoryview(lying), [(6, 1)])
