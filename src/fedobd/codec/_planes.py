"""Plain values as bytes, and without loss in fewer: byte planes under zstandard.

The bytes of float values that stand at the same place in each number (exponents above all) are
alike; put together, plane by plane, they compress where the numbers as they are do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from fedobd._errors import DecodeError, DecodeReason

_ZSTD_LEVEL = 3  # zstandard's default
_LEAST_BLOCK = 1024  # bytes of a plane that are worth a block

Words = NDArray[np.unsignedinteger[Any]]


def to_words(values: torch.Tensor, dtype: torch.dtype) -> Words:
    """Return a tensor's elements in an element type, bit for bit as unsigned numbers.

    They have as many bytes, and the tensor's shape; they are views where it lies on the CPU, in
    this type and without gaps.
    """
    values = values.to("cpu", dtype).contiguous()
    if dtype is torch.bfloat16:  # which NumPy lacks
        values = values.view(torch.int16)
    words: Words = values.numpy().view(f"u{dtype.itemsize}")
    return words


def from_bytes(part: memoryview, dtype: torch.dtype) -> torch.Tensor:
    """Return a 1-D tensor of little-endian bytes; a boolean is true for any byte but 0."""
    if len(part) == 0:
        return torch.empty(0, dtype=dtype)
    if dtype is torch.bool:
        return torch.frombuffer(bytearray(part), dtype=torch.uint8) != 0
    return torch.frombuffer(bytearray(part), dtype=dtype)


def compress(parts: Sequence[bytes | memoryview], itemsizes: Sequence[int]) -> bytes:
    """Compress plain values, the bytes of each segment, whose elements have so many bytes.

    Returns one zstandard frame that says how many bytes it holds.
    """
    total = sum(map(len, parts))
    compressor = zstandard.ZstdCompressor(
        level=_ZSTD_LEVEL, write_checksum=False, write_content_size=True
    )
    if total == 0:
        return compressor.compress(b"")
    stream = compressor.compressobj(size=total)
    made = []
    for part, itemsize in zip(parts, itemsizes, strict=True):
        for plane in _transposed(part, itemsize, len(part) // itemsize):
            made.append(stream.compress(plane.tobytes()))
            if plane.size >= _LEAST_BLOCK:  # a block of its own has a code of its own
                made.append(stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    made.append(stream.flush())
    return b"".join(made)


def decompress(frame: memoryview, lengths: Sequence[int], itemsizes: Sequence[int]) -> bytes:
    """Recover plain values, all segments in a row, from what `compress` returned.

    Lengths are the bytes of each segment, itemsizes those of one element of each.

    Raises:
        DecodeError: it is no such frame, or does not hold as many bytes.
    """
    wanted = sum(lengths)
    try:
        came = zstandard.frame_content_size(frame)
        if came != wanted:
            raise DecodeError(
                DecodeReason.STREAM,
                f"a compressed frame says it holds {came} bytes; its segments want {wanted}",
            )
        planes = zstandard.ZstdDecompressor().decompress(
            frame, max_output_size=wanted, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise DecodeError(
            DecodeReason.STREAM, f"a compressed frame is damaged: {error}"
        ) from error
    # Of no bytes there are several frames; one alone is taken, as of any other values.
    if len(planes) != wanted or (wanted == 0 and bytes(frame) != compress([], [])):
        raise DecodeError(
            DecodeReason.STREAM, f"a compressed frame holds {len(planes)} bytes; wanted {wanted}"
        )
    result, position = [], 0
    for length, itemsize in zip(lengths, itemsizes, strict=True):
        part = planes[position : position + length]
        result.append(_transposed(part, length // itemsize, itemsize).tobytes())
        position += length
    return b"".join(result)


def _transposed(part: bytes | memoryview, rows: int, columns: int) -> NDArray[np.uint8]:
    """Return bytes as rows × columns; to make planes, `rows` is the size of an element."""
    return np.frombuffer(part, np.uint8).reshape(columns, rows).T
