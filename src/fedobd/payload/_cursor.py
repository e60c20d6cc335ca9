"""Reading bytes that cannot be trusted: front to back, never past their end, within limits."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from fedobd._errors import DecodeError, DecodeReason, UsageError
from fedobd.codec import MAX_LEVELS, MAX_VARINT_BYTES, read_varint

Bytes = bytes | bytearray | memoryview

MAX_EXAMPLES = 10_000_000
"""Largest number of examples that an upload may claim, unless the operator says otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a reader takes at most; a caller may lower it.

    Args:
        max_payload_bytes: length of a payload.
        max_levels: number of levels s of a segment, at most 2^22.
        max_examples: number of examples that an upload may claim. An honest client has fewer than
            ten million; one that claims more would decide the mean alone.

    Raises:
        UsageError: a limit is below 1, or above what the format allows.
    """

    max_payload_bytes: int = 2**62
    max_levels: int = MAX_LEVELS
    max_examples: int = MAX_EXAMPLES

    def __post_init__(self) -> None:
        for name, most in (
            ("max_payload_bytes", 2**62),
            ("max_levels", MAX_LEVELS),
            ("max_examples", 2**40 - 1),
        ):
            if not 1 <= getattr(self, name) <= most:
                raise UsageError(f"{name} is {getattr(self, name)}; allowed are 1 to {most}")


DEFAULT_LIMITS = Limits()
"""What a reader takes unless its caller lowers it: all that the format allows."""


class Cursor:
    """Reads a buffer from front to back, never past its end."""

    def __init__(self, buffer: memoryview, limits: Limits = DEFAULT_LIMITS) -> None:
        self._buffer = buffer
        self.limits = limits
        self.position = 0

    def take(self, count: int, what: str) -> memoryview:
        """Return the next bytes; DecodeError where fewer are left."""
        left = len(self._buffer) - self.position
        if count > left:
            raise DecodeError(
                DecodeReason.TRUNCATED,
                f"the payload ends inside {what}: {count} bytes wanted at offset "
                f"{self.position}, {left} left",
            )
        part = self._buffer[self.position : self.position + count]
        self.position += count
        return part

    def varint(self, what: str) -> int:
        """Return the LEB128 number that is next; DecodeError where it is no proper one."""
        digits = bytes(self.take(1, what))
        while digits[-1] >= 0x80 and len(digits) < MAX_VARINT_BYTES:
            digits += self.take(1, what)
        try:
            return read_varint(digits, 0, what)[0]
        except DecodeError as error:
            raise DecodeError(
                error.reason, f"{what} before offset {self.position} is not a proper number"
            ) from None

    def unpack(self, layout: struct.Struct, what: str) -> tuple[Any, ...]:
        """Return the fields of the next bytes; DecodeError where too few are left."""
        return layout.unpack(self.take(layout.size, what))
