"""The layout of a payload, format version 2: its header to bytes and back.

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
from enum import IntEnum

import numpy as np

from fedobd._errors import DecodeError, DecodeReason, UsageError
from fedobd.blocks import ModelSchema, Role, Segment
from fedobd.codec import MASKED, MAX_RANGE, RAW, Coding, Mask, SegmentCode, write_varint
from fedobd.payload._cursor import Cursor, Limits
from fedobd.payload._header import Header, Kind, Report

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
_HEADER, _UPLOAD, _MASK, _START = (
    struct.Struct("<" + "".join(code for _, code in fields))
    for fields in (HEADER_FIELDS, UPLOAD_FIELDS, MASK_FIELDS, START_FIELDS)
)
_OFFSET = struct.Struct("<f")
_LEVELS = struct.Struct("<ff")
CHECKSUM = struct.Struct("<I")
"""The CRC-32 that ends a payload."""

_NEEDS_ELEMENTS = (Coding.CONSTANT, Coding.LEVELS)


class Flag(IntEnum):
    """Which optional parts a payload has, and what its parameters are."""

    UPLOAD = 1
    MASK = 2
    BLOCK_DIFFERENCES = 4
    DIFFERENCES = 8
    LOSSLESS = 16
    START = 32


_ALL_FLAGS = sum(Flag)

# Looked up for each segment of each payload: making an enum member of a number takes its time.
_CODINGS = frozenset(map(int, Coding))
_CODING_BYTES = {coding: bytes([coding]) for coding in Coding}


def pack_header(
    schema: ModelSchema, header: Header, codes: Iterable[Iterable[SegmentCode]]
) -> bytes:
    """Return the bytes of a header with the codes of its segments, block by block."""
    flags = 0  # a number: unions of enum members take their time
    parts = []
    if header.report is not None and header.client is not None:
        flags |= Flag.UPLOAD
        reported = [getattr(header.report, name) for name in _REPORTED]
        parts.append(_UPLOAD.pack(header.client, *reported))
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
    which = MAGIC, VERSION, header.kind, header.method, flags, header.round, header.stage
    return b"".join([_HEADER.pack(*which, schema.fingerprint), *parts])


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
    """Refuse a payload whose checksum is not the one in the field: it was cut or altered."""
    (wanted,) = CHECKSUM.unpack(field)
    if came != wanted:
        raise DecodeError(
            DecodeReason.CHECKSUM,
            f"the payload was cut or altered: its checksum is {came:08x}, it says {wanted:08x}",
        )


def read_header(cursor: Cursor, schema: ModelSchema) -> Header:
    """Read all before the codes; DecodeError where a field is illegal, or the model another."""
    fixed = cursor.unpack(_HEADER, "the header")
    magic, version, kind_number, method, flags, round_number, stage, fingerprint = fixed
    check_version(magic, version)
    if kind_number not in list(Kind):
        raise DecodeError(DecodeReason.KIND, f"payload kind {kind_number} is not known")
    kind = Kind(kind_number)
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
    if flags & Flag.START and kind not in (Kind.INITIAL, Kind.BROADCAST):
        raise DecodeError(DecodeReason.FIELD, "only a server's payload stands for a model")
    start = cursor.unpack(_START, "the start")[0] if flags & Flag.START else None
    differences = None
    if flags & Flag.BLOCK_DIFFERENCES:
        differences = _read_differences(cursor, len(schema.blocks))
    return Header(
        kind=kind,
        method=method,
        round=round_number,
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


def _read_differences(cursor: Cursor, num_blocks: int) -> tuple[float, ...]:
    differences = np.frombuffer(cursor.take(4 * num_blocks, "the block differences"), "<f4")
    if not bool((np.isfinite(differences) & (differences >= 0)).all()):
        raise DecodeError(DecodeReason.FIELD, "a mean block difference is negative or not finite")
    return tuple(map(float, differences))


def _read_bitmap(cursor: Cursor, num_blocks: int) -> tuple[int, ...]:
    part = cursor.take((num_blocks + 7) // 8, "the block bitmap")
    bits = np.unpackbits(np.frombuffer(part, np.uint8), bitorder="little")
    if bits[num_blocks:].any():
        raise DecodeError(DecodeReason.FIELD, "the block bitmap names a block past the last")
    return tuple(map(int, np.flatnonzero(bits)))


def read_code(
    cursor: Cursor, schema: ModelSchema, header: Header, segment: Segment
) -> SegmentCode:
    """Read the code of a segment; DecodeError where no encoder makes it for this tensor."""
    spec = schema.tensors[segment.tensor]
    (coding,) = cursor.take(1, "the codings")
    if coding == Coding.RAW and header.mask is None:  # most codes there are, and always legal
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
        if not math.isfinite(offset):
            raise DecodeError(DecodeReason.NOT_FINITE, f"the offset {where} is {offset}")
        return SegmentCode(Coding.CONSTANT, offset=offset)
    if coding == Coding.LEVELS:
        return _read_levels(cursor, where)
    return RAW if coding == Coding.RAW else MASKED


def _read_levels(cursor: Cursor, where: str) -> SegmentCode:
    num_levels = cursor.varint(f"the number of levels {where}")
    offset, span = cursor.unpack(_LEVELS, f"the range {where}")
    if not 1 <= num_levels <= cursor.limits.max_levels:
        raise DecodeError(
            DecodeReason.LIMIT,
            f"{num_levels} levels {where}; allowed are 1 to {cursor.limits.max_levels}",
        )
    # Written so that NaN, which no comparison holds for, is refused too.
    if not 0 < span <= MAX_RANGE or not abs(offset) <= MAX_RANGE:
        raise DecodeError(
            DecodeReason.FIELD, f"range {span} and offset {offset} {where} are out of range"
        )
    return SegmentCode(Coding.LEVELS, num_levels, offset, span)
