"""Varints: whole numbers from 0 as LEB128, in no more bytes than they need."""

from __future__ import annotations

from fedobd._errors import DecodeError, DecodeReason

MAX_VARINT_BYTES = 9
"""Bytes of the largest varint, 2^63 - 1."""


def write_varint(value: int) -> bytes:
    """Return a number from 0 as LEB128: 7 bits a byte, the lowest first, more to come at 0x80."""
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def read_varint(buffer: bytes | memoryview, position: int, what: str) -> tuple[int, int]:
    """Return a LEB128 number below 2^63 and the position after it.

    Raises:
        DecodeError: it is cut, too large, or longer than it has to be.
    """
    value = 0
    for length in range(MAX_VARINT_BYTES):
        if position + length >= len(buffer):
            raise DecodeError(DecodeReason.TRUNCATED, f"the payload ends inside {what}")
        byte = buffer[position + length]
        value |= (byte & 0x7F) << (7 * length)
        if byte < 0x80:
            if byte == 0 and length:
                break
            return value, position + length + 1
    raise DecodeError(DecodeReason.FIELD, f"{what} at offset {position} is not a proper number")
