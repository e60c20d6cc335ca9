"""The level coder: the integer levels of a block to one compressed stream and back.

A level l of a segment with s levels becomes the symbol l + s, from 0 to 2 s, in as many byte
planes as 2 s needs (lowest byte first). The planes of a block's segments, one after another, are
one zstandard frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import zstandard

from fedobd._errors import DecodeError, DecodeReason
from fedobd._quantization import Int32

_ZSTD_LEVEL = 3


def _plane_count(num_levels: int) -> int:
    return ((2 * num_levels).bit_length() + 7) // 8


def encode_levels(segments: Sequence[tuple[Int32, int]]) -> bytes:
    """Compress the levels of a block.

    Args:
        segments: for each segment its levels, int32, shape (n,), and its number of levels s ≥ 1.
    """
    planes: list[bytes] = []
    for levels, num_levels in segments:
        symbols = (levels + np.int32(num_levels)).astype("<u4", copy=False)
        by_byte = symbols.view(np.uint8).reshape(-1, 4)
        planes += [by_byte[:, p].tobytes() for p in range(_plane_count(num_levels))]
    return zstandard.ZstdCompressor(
        level=_ZSTD_LEVEL, write_checksum=False, write_content_size=True
    ).compress(b"".join(planes))


def decode_levels(stream: memoryview, segments: Sequence[tuple[int, int]]) -> list[Int32]:
    """Recover the levels of a block.

    Args:
        stream: what `encode_levels` returned.
        segments: for each segment its number of elements n and its number of levels s.

    Returns:
        The levels of each segment, int32, shape (n,).

    Raises:
        DecodeError: the stream is not such a frame, holds another number of bytes, or a level
            beyond ±s.
    """
    wanted = sum(count * _plane_count(num_levels) for count, num_levels in segments)
    try:
        came = zstandard.frame_content_size(stream)
        if came != wanted:
            raise DecodeError(
                DecodeReason.STREAM,
                f"a level stream says it holds {came} bytes; its segments want {wanted}",
            )
        planes = zstandard.ZstdDecompressor().decompress(
            stream, max_output_size=wanted, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise DecodeError(DecodeReason.STREAM, f"a level stream is damaged: {error}") from error
    if wanted == 0 and bytes(stream) != encode_levels([]):
        raise DecodeError(DecodeReason.STREAM, "bytes follow an empty level stream")
    if len(planes) != wanted:
        raise DecodeError(
            DecodeReason.STREAM, f"a level stream holds {len(planes)} bytes; wanted {wanted}"
        )
    result: list[Int32] = []
    position = 0
    for count, num_levels in segments:
        symbols = np.zeros(count, dtype="<u4")
        by_byte = symbols.view(np.uint8).reshape(-1, 4)
        for plane in range(_plane_count(num_levels)):
            by_byte[:, plane] = np.frombuffer(planes, np.uint8, count, position)
            position += count
        if count and int(symbols.max()) > 2 * num_levels:
            raise DecodeError(
                DecodeReason.STREAM,
                f"a level of {int(symbols.max()) - num_levels} came; {num_levels} is the largest",
            )
        result.append(symbols.astype(np.int32) - np.int32(num_levels))
    return result
