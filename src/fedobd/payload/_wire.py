"""The layout of a payload, format version 2, and its header.

A payload is, in this order, all numbers little endian:

1. the fixed fields of `HEADER_FIELDS`;
2. if `Flag.UPLOAD`: the fields of `UPLOAD_FIELDS`; if `Flag.MASK`: those of `MASK_FIELDS`; if
   `Flag.START`: those of `START_FIELDS`, and then 5 and 6 are left out;
3. if `Flag.BLOCK_DIFFERENCES`: one float32 for each block of the schema;
4. a bitmap of the blocks that it holds, block 0 in the lowest bit of the first byte; unused bits
   are 0;
5. for each segment of each held block a coding (u8) with its fields: CONSTANT offset f32; LEVELS
   number of levels (LEB128), offset f32, range f32; RAW and MASKED none;
6. frames, each with its length (LEB128) before it: in an initial payload first one with the frozen
   tensors, if the model has any; then for each held block one with its levels, one with the plain
   values of its parameters and one with its buffers, each only if the block has such segments;
   with `Flag.LOSSLESS` frames of plain values are compressed;
7. CRC-32 (the one of zlib and PNG) of all bytes before it, u32.

Names and shapes do not travel: the fingerprint of the schema does.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from fedobd._errors import DecodeError, DecodeReason, UsageError
from fedobd.blocks import ModelSchema, Role, Segment
from fedobd.codec import (
    MASKED,
    MAX_LEVELS,
    MAX_RANGE,
    MAX_VARINT_BYTES,
    RAW,
    Coding,
    Mask,
    SegmentCode,
    read_varint,
    write_varint,
)

MAGIC = b"FOBD"
VERSION = 2

HEADER_FIELDS = (
    ("magic", "4s"),
    ("version", "B"),
    ("kind", "B"),
    ("method", "B"),
    ("flags", "B"),
    ("round", "I"),
    ("stage", "B"),
    ("fingerprint", "16s"),
)
"""Name and `struct` code of the fields that open every payload."""

UPLOAD_FIELDS = (
    ("client", "I"),
    ("num_examples", "Q"),
    ("train_loss", "f"),
    ("num_validation_examples", "Q"),
    ("validation_loss", "f"),
    ("validation_metric", "f"),
)
"""Fields that only an upload has."""

MASK_FIELDS = (("seed", "Q"), ("threshold", "Q"))
"""Fields of a payload whose parameters are masked."""

START_FIELDS = (("start", "16s"),)
"""Field of a payload that stands for the initial model: the fingerprint of its values."""

_REPORTED = tuple(name for name, _ in UPLOAD_FIELDS[1:])
_HEADER = struct.Struct("<" + "".join(code for _, code in HEADER_FIELDS))
_UPLOAD = struct.Struct("<" + "".join(code for _, code in UPLOAD_FIELDS))
_MASK = struct.Struct("<" + "".join(code for _, code in MASK_FIELDS))
_START = struct.Struct("<" + "".join(code for _, code in START_FIELDS))
_OFFSET = struct.Struct("<f")
_LEVELS = struct.Struct("<ff")
CHECKSUM = struct.Struct("<I")
"""The CRC-32 that ends a payload."""

_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_NEEDS_ELEMENTS = (Coding.CONSTANT, Coding.LEVELS)

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a reader takes at most; a caller may lower it.

    Args:
        max_payload_bytes: length of a payload.
        max_levels: number of levels s of a segment, at most 2^22.

    Raises:
        UsageError: a limit is below 1, or above what the format allows.
    """

    max_payload_bytes: int = 2**62
    max_levels: int = MAX_LEVELS

    def __post_init__(self) -> None:
        for name, most in (("max_payload_bytes", 2**62), ("max_levels", MAX_LEVELS)):
            if not 1 <= getattr(self, name) <= most:
                raise UsageError(f"{name} is {getattr(self, name)}; allowed are 1 to {most}")


DEFAULT_LIMITS = Limits()
"""What a reader takes unless its caller lowers it: all that the format allows."""


class Kind(IntEnum):
    """What a payload is for."""

    INITIAL = 0
    BROADCAST = 1
    UPLOAD = 2
    DELIVERY = 3


class Flag(IntEnum):
    """Which optional parts a payload has, and what its parameters are."""

    UPLOAD = 1
    MASK = 2
    BLOCK_DIFFERENCES = 4
    DIFFERENCES = 8
    LOSSLESS = 16
    START = 32


_ALL_FLAGS = sum(Flag)

_KINDS = {int(kind): kind for kind in Kind}
_CODINGS = frozenset(map(int, Coding))
_CODING_BYTES = {coding: bytes([coding]) for coding in Coding}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a client says of its local training.

    Args:
        num_examples: training examples, the client's weight in the mean; at least 1.
        train_loss: mean training loss of the last local epoch.
        num_validation_examples: examples on which the received model was validated; 0 for none.
        validation_loss: mean loss of the received model on them.
        validation_metric: its metric, such as accuracy in [0, 1].
    """

    num_examples: int
    train_loss: float
    num_validation_examples: int = 0
    validation_loss: float = 0.0
    validation_metric: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_examples", "num_validation_examples"):
            value = getattr(self, name)
            if not 0 <= value < 2**63:
                raise UsageError(f"{name} is {value}; allowed are 0 to 2^63 - 1")
        for name in ("train_loss", "validation_loss", "validation_metric"):
            if not abs(getattr(self, name)) <= _MAX_FLOAT32:
                raise UsageError(f"{name} is {getattr(self, name)}; wanted a finite float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a payload says before its values.

    Args:
        kind: opening, broadcast, upload or delivery.
        method: the method's number in the format.
        round: round number, from 1; 0 in an initial payload that belongs to none.
        stage: stage number, from 1.
        block_ids: numbers of the blocks that it holds, ascending.
        is_lossless: whether plain values are compressed.
        is_difference: whether parameters are differences to the round's broadcast; else they are
            values.
        client: the uploading client; None in other payloads.
        report: the client's report; None in other payloads.
        mask: the mask over parameters, if they are masked.
        block_differences: mean block difference of each block, if the method sends it.
        start: fingerprint of the initial model, if the payload stands for it and holds no values.
    """

    kind: Kind
    method: int
    round: int
    stage: int
    block_ids: tuple[int, ...]
    is_difference: bool = False
    is_lossless: bool = False
    client: int | None = None
    report: Report | None = None
    mask: Mask | None = None
    block_differences: tuple[float, ...] | None = None
    start: bytes | None = None

    def __post_init__(self) -> None:
        limits = {"method": 2**8, "round": 2**32, "stage": 2**8, "client": 2**32}
        for name, limit in limits.items():
            value = getattr(self, name)
            if value is not None and not 0 <= value < limit:
                raise UsageError(f"{name} is {value}; allowed are 0 to {limit - 1}")

    def holds_frozen(self, schema: ModelSchema) -> bool:
        """Whether the payload has a frame of frozen tensors."""
        return self.kind is Kind.INITIAL and self.start is None and bool(schema.frozen())

    @property
    def coded(self) -> tuple[int, ...]:
        """Numbers of the blocks whose values it holds."""
        return self.block_ids if self.start is None else ()


@dataclass(slots=True)
class ByteCount:
    """Bytes of a payload by what they are for; `total` is the length of the payload.

    Args:
        header: header, lengths and checksum.
        levels: compressed levels.
        raw: plain parameter values, frozen ones included.
        buffers: buffers.
        nominal_bits: bits by the papers' formula, which counts levels and plain values only.
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


def add_traffic(found: Iterable[BlockTraffic]) -> BlockTraffic:
    """Return what a block took in several groups of payloads together."""
    found = list(found)
    payloads = sum(traffic.payloads for traffic in found)
    levels = math.fsum(traffic.levels * traffic.payloads for traffic in found)
    return BlockTraffic(
        payloads=payloads,
        num_bytes=sum(traffic.num_bytes for traffic in found),
        nominal_bits=sum(traffic.nominal_bits for traffic in found),
        levels=levels / payloads if payloads else 0.0,
    )


def pack_header(
    schema: ModelSchema, header: Header, codes: Iterable[Iterable[SegmentCode]]
) -> bytes:
    """Return the bytes of a header with the codes of its segments, block by block."""
    flags = 0  # a number: unions of enum members take their time
    parts = []
    if header.report is not None and header.client is not None:
        flags |= Flag.UPLOAD
        report = header.report
        parts.append(
            _UPLOAD.pack(
                header.client,
                report.num_examples,
                report.train_loss,
                report.num_validation_examples,
                report.validation_loss,
                report.validation_metric,
            )
        )
    if header.mask is not None:
        flags |= Flag.MASK
        parts.append(_MASK.pack(header.mask.seed, header.mask.threshold))
    if header.is_difference:
        flags |= Flag.DIFFERENCES
    if header.is_lossless:
        flags |= Flag.LOSSLESS
    if header.start is not None:
        flags |= Flag.START
        parts.append(_START.pack(header.start))
    if header.block_differences is not None:
        flags |= Flag.BLOCK_DIFFERENCES
        parts.append(np.asarray(header.block_differences, "<f4").tobytes())
    bitmap = sum(1 << number for number in header.block_ids)
    parts.append(bitmap.to_bytes((len(schema.blocks) + 7) // 8, "little"))
    for code in (code for block_codes in codes for code in block_codes):
        parts.append(_CODING_BYTES[code.coding])
        if code.coding is Coding.CONSTANT:
            parts.append(_OFFSET.pack(code.offset))
        elif code.coding is Coding.LEVELS:
            parts.append(write_varint(code.num_levels) + _LEVELS.pack(code.offset, code.range))
    fixed = _HEADER.pack(
        MAGIC,
        VERSION,
        header.kind,
        header.method,
        flags,
        header.round,
        header.stage,
        schema.fingerprint,
    )
    return b"".join([fixed, *parts])


class Cursor:
    """Reads a buffer from front to back, never past its end.

    Args:
        buffer: the bytes.
        limits: what is taken at most.
    """

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


def check_length(buffer: memoryview, limits: Limits) -> None:
    """Refuse what is shorter than any payload, or longer than is taken."""
    if len(buffer) > limits.max_payload_bytes:
        raise DecodeError(
            DecodeReason.LIMIT,
            f"{len(buffer)} bytes came; at most {limits.max_payload_bytes} are taken",
        )
    if len(buffer) < _HEADER.size + CHECKSUM.size:
        raise DecodeError(
            DecodeReason.TRUNCATED,
            f"{len(buffer)} bytes came; the shortest payload has {_HEADER.size + CHECKSUM.size}",
        )


def check_version(magic: bytes, version: int) -> None:
    """Refuse what is no payload of this version."""
    if magic != MAGIC:
        raise DecodeError(
            DecodeReason.VERSION,
            f"this is no payload of fedobd: it starts with {magic!r}, not {MAGIC!r}",
        )
    if version != VERSION:
        raise DecodeError(
            DecodeReason.VERSION, f"format version {version} came; this side reads {VERSION}"
        )


def check_checksum(came: int, field: memoryview) -> None:
    """Refuse a payload that was cut or altered on its way.

    Raises:
        DecodeError: the checksum of what came is not the one in the field.
    """
    (wanted,) = CHECKSUM.unpack(field)
    if came != wanted:
        raise DecodeError(
            DecodeReason.CHECKSUM,
            f"the payload was cut or altered: its checksum is {came:08x}, it says {wanted:08x}",
        )


def read_header(cursor: Cursor, schema: ModelSchema) -> Header:
    """Read all of the header before the codes.

    Raises:
        DecodeError: a field is illegal, or the payload is for another model.
    """
    magic, version, kind_number, method, flags, number, stage, fingerprint = cursor.unpack(
        _HEADER, "the header"
    )
    check_version(magic, version)
    kind = _KINDS.get(kind_number)
    if kind is None:
        raise DecodeError(DecodeReason.KIND, f"payload kind {kind_number} is not known")
    if flags & ~_ALL_FLAGS:
        raise DecodeError(DecodeReason.FIELD, f"flags {flags:#x} hold an unknown bit")
    if fingerprint != schema.fingerprint:
        raise DecodeError(
            DecodeReason.SCHEMA,
            f"the payload is for another model or other blocks: its schema has fingerprint "
            f"{fingerprint.hex()}, wanted {schema.fingerprint.hex()}",
        )
    if (kind is Kind.UPLOAD) is not bool(flags & Flag.UPLOAD):
        raise DecodeError(
            DecodeReason.FIELD, "a client's report stands where none belongs, or lacks"
        )
    client, report = _read_report(cursor) if flags & Flag.UPLOAD else (None, None)
    mask = Mask(*cursor.unpack(_MASK, "the mask")) if flags & Flag.MASK else None
    start = None
    if flags & Flag.START:
        if kind not in (Kind.INITIAL, Kind.BROADCAST):
            raise DecodeError(DecodeReason.FIELD, "only a server's payload stands for a model")
        (start,) = cursor.unpack(_START, "the start")
    differences = None
    if flags & Flag.BLOCK_DIFFERENCES:
        part = cursor.take(4 * len(schema.blocks), "the block differences")
        as_array = np.frombuffer(part, "<f4")
        if not bool((np.isfinite(as_array) & (as_array >= 0)).all()):
            raise DecodeError(
                DecodeReason.FIELD, "a mean block difference is negative or not finite"
            )
        differences = tuple(map(float, as_array))
    return Header(
        kind=kind,
        method=method,
        round=number,
        stage=stage,
        block_ids=_read_bitmap(cursor, len(schema.blocks)),
        is_difference=bool(flags & Flag.DIFFERENCES),
        is_lossless=bool(flags & Flag.LOSSLESS),
        client=client,
        report=report,
        mask=mask,
        block_differences=differences,
        start=start,
    )


def _read_report(cursor: Cursor) -> tuple[int, Report]:
    client, *values = cursor.unpack(_UPLOAD, "the report")
    fields = dict(zip(_REPORTED, values, strict=True))
    try:
        return client, Report(**fields)
    except UsageError as error:
        raise DecodeError(DecodeReason.FIELD, f"client {client}: {error}") from error


def _read_bitmap(cursor: Cursor, num_blocks: int) -> tuple[int, ...]:
    part = cursor.take((num_blocks + 7) // 8, "the block bitmap")
    if int.from_bytes(part, "little") == (1 << num_blocks) - 1:
        return tuple(range(num_blocks))
    bits = np.unpackbits(np.frombuffer(part, np.uint8), bitorder="little")
    if bits[num_blocks:].any():
        raise DecodeError(DecodeReason.FIELD, "the block bitmap names a block past the last")
    return tuple(map(int, np.flatnonzero(bits)))


def read_code(
    cursor: Cursor, schema: ModelSchema, header: Header, segment: Segment
) -> SegmentCode:
    """Read the code of a segment.

    Raises:
        DecodeError: it is one that no encoder makes for this tensor.
    """
    spec = schema.tensors[segment.tensor]
    (coding,) = cursor.take(1, "the codings")
    if coding == Coding.RAW and header.mask is None:
        return RAW
    where = f"of tensor {spec.name!r} at offset {cursor.position - 1}"
    if coding not in _CODINGS:
        raise DecodeError(
            DecodeReason.FIELD, f"the coding {where} is {coding}, which is not known"
        )
    if spec.role is Role.BUFFER:
        allowed: tuple[Coding, ...] = (Coding.RAW,)
    elif header.mask is not None:
        allowed = (Coding.MASKED,)
    else:
        allowed = (Coding.CONSTANT, Coding.LEVELS, Coding.RAW)
    if coding not in allowed or (segment.num_elements == 0 and coding in _NEEDS_ELEMENTS):
        raise DecodeError(
            DecodeReason.FIELD, f"coding {Coding(coding).name} {where} is not allowed there"
        )
    if coding == Coding.CONSTANT:
        (offset,) = cursor.unpack(_OFFSET, f"the offset {where}")
        code = SegmentCode(Coding.CONSTANT, offset=offset)
    elif coding == Coding.LEVELS:
        num_levels = cursor.varint(f"the number of levels {where}")
        offset, span = cursor.unpack(_LEVELS, f"the range {where}")
        if not 1 <= num_levels <= cursor.limits.max_levels:
            raise DecodeError(
                DecodeReason.LIMIT,
                f"{num_levels} levels {where}; allowed are 1 to {cursor.limits.max_levels}",
            )
        if not 0 < span <= MAX_RANGE or not abs(offset) <= MAX_RANGE:
            raise DecodeError(
                DecodeReason.FIELD, f"range {span} and offset {offset} {where} are out of range"
            )
        code = SegmentCode(Coding.LEVELS, num_levels, offset, span)
    else:
        code = RAW if coding == Coding.RAW else MASKED
    if not math.isfinite(code.offset):
        raise DecodeError(DecodeReason.NOT_FINITE, f"the offset {where} is {code.offset}")
    return code
