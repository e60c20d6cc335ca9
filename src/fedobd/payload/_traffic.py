"""What payloads take: bytes that were really made, and bits by the papers' formula beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fedobd.payload._frames import BlockLayout, PlainPart


@dataclass(slots=True)
class ByteCount:
    """Bytes of a payload by what they are for; `total` is the length of the payload.

    Lengths and checksum count as header; frozen values as raw, plain parameter values. Nominal
    bits are by the papers' formula, which counts levels and plain values only.
    """

    header: int = 0
    levels: int = 0
    raw: int = 0
    buffers: int = 0
    nominal_bits: int = 0

    @property
    def total(self) -> int:
        """All bytes."""
        return self.header + self.levels + self.raw + self.buffers


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTraffic:
    """What a block took in some payloads.

    Args:
        payloads: how many of them held it.
        num_bytes: bytes of its frames in all of them, with the frames' lengths.
        nominal_bits: bits by the papers' formula.
        levels: mean number of levels s over its quantized elements; 0 where there are none.
    """

    payloads: int = 0
    num_bytes: int = 0
    nominal_bits: int = 0
    levels: float = 0.0


def add_traffic(parts: Iterable[BlockTraffic]) -> BlockTraffic:
    """Return what a block took in several groups of payloads together.

    `levels` becomes the mean of the payloads' means: each payload counts once, however many of its
    elements were quantized.
    """
    parts = list(parts)
    payloads = sum(part.payloads for part in parts)
    levels = math.fsum(part.levels * part.payloads for part in parts)
    return BlockTraffic(
        payloads=payloads,
        num_bytes=sum(part.num_bytes for part in parts),
        nominal_bits=sum(part.nominal_bits for part in parts),
        levels=levels / payloads if payloads else 0.0,
    )


@dataclass(frozen=True, slots=True)
class PayloadTraffic:
    """What a payload takes: its bytes by what they are for; and each held block, by number."""

    total: ByteCount = field(default_factory=ByteCount)
    blocks: dict[int, BlockTraffic] = field(default_factory=dict)

    def add_frozen(self, num_bytes: int, parts: Sequence[PlainPart]) -> None:
        """Count the frame of the frozen tensors."""
        self.total.raw += num_bytes
        self.total.nominal_bits += 8 * sum(part.num_bytes for part in parts)

    def add_block(
        self, number: int, layout: BlockLayout, sizes: Sequence[int], num_bytes: int
    ) -> None:
        """Count a block: its frames of levels, values and buffers; all with their lengths."""
        total = self.total
        levels, raw, buffers = sizes
        total.levels += levels
        total.raw += raw
        total.buffers += buffers
        total.nominal_bits += layout.nominal_bits
        self.blocks[number] = BlockTraffic(
            payloads=1,
            num_bytes=num_bytes,
            nominal_bits=layout.nominal_bits,
            levels=layout.mean_levels,
        )

    def close(self, num_bytes: int) -> None:
        """Count as header what is in no frame: header, codes, lengths and checksum."""
        total = self.total
        total.header = num_bytes - total.levels - total.raw - total.buffers
