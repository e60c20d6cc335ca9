"""A second reader of payloads, slow and independent, in plain Python from docs/format.md.

It shares no code with the package and uses neither NumPy nor PyTorch. Values come out as
little-endian bytes, so that two readers can be compared bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import zstandard

ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
EXPONENT_BITS = {"float64": (52, 11), "float32": (23, 8), "float16": (10, 5), "bfloat16": (7, 8)}

OPENING, BROADCAST, UPLOAD, DELIVERY = range(4)
CONSTANT, LEVELS, RAW, MASKED = range(4)
HAS_REPORT, HAS_MASK, HAS_BLOCK_DIFFERENCES, DIFFERENCES, LOSSLESS, START = (
    1 << bit for bit in range(6)
)
MOST_LEVELS = 1 << 22
LARGEST_RANGE = 2.0**126
LOWEST_STATE = 1 << 31
NOTHING_COMPRESSED = bytes.fromhex("28b52ffd2000010000")


class RefusedError(Exception):
    """The payload is refused, for the reason that docs/format.md names."""

    def __init__(self, reason: str, where: str) -> None:
        super().__init__(f"{where} [{reason}]")
        self.reason = reason


@dataclass(frozen=True)
class Values:
    """Values of elements `start` to `stop - 1` of a tensor, in a type, as little-endian bytes."""

    block: int
    tensor: str
    start: int
    stop: int
    dtype: str
    data: bytes
    mask: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class Code:
    """What the header says of a segment."""

    coding: int
    num_levels: int = 0
    offset: float = 0.0
    range: float = 0.0


@dataclass(frozen=True)
class Plain:
    """Plain values within a frame."""

    tensor: int
    start: int
    stop: int
    dtype: str
    mask: tuple[bool, ...] | None

    @property
    def num_bytes(self) -> int:
        count = self.stop - self.start if self.mask is None else sum(self.mask)
        return count * ITEM_BYTES[self.dtype]


@dataclass
class Payload:
    """All that a payload says."""

    header: dict[str, Any] = field(default_factory=dict)
    frozen: list[Values] = field(default_factory=list)
    values: list[Values] = field(default_factory=list)


def to_float32(value: float) -> float:
    """Round a float64 to the nearest float32, half to even."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def decoded_level(level: int, code: Code) -> float:
    """Return level · (d / s) + a, each operation rounded to float32.

    Python computes each operation in float64 and `to_float32` rounds a second time. That gives
    what float32 arithmetic gives, rounding once:

    - d / s, of significands X, Y < 2^24: a point half-way between two float32 numbers has a
      significand M < 2^25, and unless X / Y equals it, they are apart by a share of more than
      1 / (M · Y) > 2^-49 or 1 / X > 2^-24 of it (the numerator of X / Y - M is a nonzero whole
      number, times the smaller of both units). The first rounding moves the quotient by at most
      2^-53 of it, so it neither reaches nor crosses such a point. Subnormal results have coarser
      points and smaller M.
    - level · step, of significands below 2^24: the product has less than 48 bits and is exact in
      float64, and so only the second rounding rounds.
    - x + a: where the exponents are no more than 28 apart, the sum has at most 53 bits and is
      exact. Else the smaller is below 2^-5 of the larger one's last place, so the sum is closer to
      the larger one than to any point half-way, before and after the first rounding.
      Sums in the range of subnormal numbers are whole multiples of 2^-149, and exact.
    """
    step = to_float32(code.range / code.num_levels)
    return to_float32(to_float32(level * step) + code.offset)


class Bytes:
    """Bytes that are read from front to back."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def take(self, count: int, where: str) -> bytes:
        if count > len(self.data) - self.position:
            raise RefusedError("truncated", where)
        self.position += count
        return self.data[self.position - count : self.position]

    def unpack(self, layout: str, where: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout), where))

    def varint(self, where: str) -> int:
        value = 0
        for place in range(9):
            byte = self.take(1, where)[0]
            value |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                if byte == 0 and place:
                    break
                return value
        raise RefusedError("field", where)


# --- schema --------------------------------------------------------------------------------------


def fingerprint_of(schema: dict[str, Any]) -> bytes:
    canonical = json.dumps(schema, separators=(",", ":"), sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(canonical.encode(), digest_size=16).digest()


def is_floating(dtype: str) -> bool:
    return dtype in EXPONENT_BITS


def plain_type(schema: dict[str, Any], tensor: int, flags: int) -> str:
    _, _, dtype, role = schema["tensors"][tensor]
    if role == "parameter" and flags & DIFFERENCES:
        return "float32"
    if not is_floating(dtype):
        return str(dtype)
    return str(dtype) if role != "buffer" and dtype in ("float16", "bfloat16") else "float32"


def kept_by(seed: int, threshold: int, number: int) -> bool:
    """Whether the mask keeps a trainable element: output `number` of SplitMix64, from 0."""
    full = (1 << 64) - 1
    z = ((number + 1) * 0x9E3779B97F4A7C15 + seed) & full
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & full
    z = (z ^ z >> 27) * 0x94D049BB133111EB & full
    return (z ^ z >> 31) >= threshold


def mask_of(
    schema: dict[str, Any], mask: tuple[int, int], tensor: int, start: int, stop: int
) -> tuple[bool, ...]:
    before = sum(
        math.prod(shape) for _, shape, _, role in schema["tensors"][:tensor] if role == "parameter"
    )
    return tuple(kept_by(*mask, before + i) for i in range(start, stop))


# --- header --------------------------------------------------------------------------------------


def read_header(source: Bytes, schema: dict[str, Any]) -> dict[str, Any]:
    header: dict[str, Any] = {}
    names = ("magic", "version", "kind", "method", "flags", "round", "stage", "fingerprint")
    header.update(zip(names, source.unpack("4sBBBBIB16s", "the header"), strict=True))
    kind, flags, num_blocks = header["kind"], header["flags"], len(schema["blocks"])
    if kind > DELIVERY:
        raise RefusedError("kind", "the kind")
    if flags >= 1 << 6:
        raise RefusedError("field", "the flags")
    if header["fingerprint"] != fingerprint_of(schema):
        raise RefusedError("schema", "the fingerprint")
    if (kind == UPLOAD) is not bool(flags & HAS_REPORT):
        raise RefusedError("field", "the report")
    if flags & HAS_REPORT:
        read_report(source, header)
    if flags & HAS_MASK:
        header["mask"] = source.unpack("QQ", "the mask")
    if flags & START:
        if kind not in (OPENING, BROADCAST):
            raise RefusedError("field", "the start")
        (header["start"],) = source.unpack("16s", "the start")
    if flags & HAS_BLOCK_DIFFERENCES:
        differences = source.unpack(f"{num_blocks}f", "the block differences")
        if not all(math.isfinite(value) and value >= 0 for value in differences):
            raise RefusedError("field", "the block differences")
        header["block_differences"] = differences
    bitmap = source.take((num_blocks + 7) // 8, "the bitmap")
    bits = [bitmap[i // 8] >> i % 8 & 1 for i in range(8 * len(bitmap))]
    if any(bits[num_blocks:]):
        raise RefusedError("field", "the bitmap")
    header["kept"] = tuple(i for i in range(num_blocks) if bits[i])
    return header


def read_report(source: Bytes, header: dict[str, Any]) -> None:
    names = (
        "client",
        "num_examples",
        "train_loss",
        "num_validation_examples",
        "validation_loss",
        "validation_metric",
    )
    report = dict(zip(names, source.unpack("IQfQff", "the report"), strict=True))
    whole = report["num_examples"], report["num_validation_examples"]
    real = report["train_loss"], report["validation_loss"], report["validation_metric"]
    if any(value >= 1 << 63 for value in whole) or not all(map(math.isfinite, real)):
        raise RefusedError("field", "the report")
    header.update(report)


def read_code(source: Bytes, header: dict[str, Any], role: str, num_elements: int) -> Code:
    (coding,) = source.unpack("B", "a coding")
    if role == "buffer":
        allowed = [RAW]
    elif "mask" in header:
        allowed = [MASKED]
    else:
        allowed = [CONSTANT, LEVELS, RAW] if num_elements else [RAW]
    if coding not in allowed:
        raise RefusedError("field", "a coding")
    if coding == CONSTANT:
        (offset,) = source.unpack("f", "an offset")
        if not math.isfinite(offset):
            raise RefusedError("not finite", "an offset")
        return Code(CONSTANT, offset=offset)
    if coding == LEVELS:
        num_levels = source.varint("a number of levels")
        offset, span = source.unpack("ff", "a range")
        if not 1 <= num_levels <= MOST_LEVELS:
            raise RefusedError("limit", "a number of levels")
        if not 0 < span <= LARGEST_RANGE or not abs(offset) <= LARGEST_RANGE:
            raise RefusedError("field", "a range")
        return Code(LEVELS, num_levels, offset, span)
    return Code(coding)


# --- plain values --------------------------------------------------------------------------------


def take_plain(source: Bytes, parts: list[Plain], flags: int, where: str) -> bytes:
    """Take a frame of plain values off the payload, unopened."""
    wanted = sum(part.num_bytes for part in parts)
    length = source.varint(where)
    if flags & LOSSLESS:
        if length > wanted + wanted // 128 + 1024:
            raise RefusedError("limit", where)
    elif length != wanted:
        raise RefusedError("field", where)
    return source.take(length, where)


def opened(frame: bytes, parts: list[Plain], flags: int) -> list[bytes]:
    """Give the bytes of each part of a frame of plain values."""
    planes = frame
    if flags & LOSSLESS:
        planes = decompressed(frame, sum(part.num_bytes for part in parts))
    result, position = [], 0
    for part in parts:
        mine = planes[position : position + part.num_bytes]
        position += part.num_bytes
        if flags & LOSSLESS and mine:
            count = len(mine) // ITEM_BYTES[part.dtype]
            mine = bytes(
                mine[i::count][j] for i in range(count) for j in range(len(mine) // count)
            )
        if is_floating(part.dtype):
            refuse_not_finite(mine, part.dtype)
        if part.dtype == "bool":
            mine = bytes(int(byte != 0) for byte in mine)
        result.append(mine)
    return result


def decompressed(frame: bytes, wanted: int) -> bytes:
    if wanted == 0:
        if frame != NOTHING_COMPRESSED:
            raise RefusedError("stream", "a compressed frame")
        return b""
    try:
        if zstandard.frame_content_size(frame) != wanted:
            raise RefusedError("stream", "a compressed frame")
        planes: bytes = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise RefusedError("stream", "a compressed frame") from error
    return planes


def refuse_not_finite(data: bytes, dtype: str) -> None:
    place, width = EXPONENT_BITS[dtype]
    full = (1 << width) - 1
    for i in range(0, len(data), ITEM_BYTES[dtype]):
        number = int.from_bytes(data[i : i + ITEM_BYTES[dtype]], "little")
        if number >> place & full == full:
            raise RefusedError("not finite", "a value")


# --- levels --------------------------------------------------------------------------------------


class Bits:
    """Bits of a stream, the lowest of each byte first."""

    def __init__(self, data: bytes, position: int) -> None:
        self.data = data
        self.position = position

    def take(self, count: int) -> int:
        if self.position + count > 8 * len(self.data):
            raise RefusedError("stream", "a table")
        value = 0
        for place in range(count):
            value |= (self.data[self.position >> 3] >> (self.position & 7) & 1) << place
            self.position += 1
        return value

    def gamma(self) -> int:
        length = 0
        while not self.take(1):
            length += 1
            if length > 16:
                raise RefusedError("stream", "a gamma code")
        return (1 << length) + self.take(length)


def low_bits(num_levels: int) -> int:
    return max(0, (2 * num_levels).bit_length() - 12)


def read_table(bits: Bits, num_levels: int) -> tuple[list[int], int]:
    """Return the frequencies of all symbols and k."""
    size = (2 * num_levels >> low_bits(num_levels)) + 1
    if not bits.take(1):
        return [((i + 1) << 16) // size - (i << 16) // size for i in range(size)], 16
    k = bits.take(4) + 1
    m = bits.take(4)
    unwritten = bits.take(max(1, (size - 1).bit_length()))
    num_written = bits.gamma() - 1
    if unwritten >= size or num_written >= size:
        raise RefusedError("stream", "a table")
    frequencies = [0] * size
    place = length = 0
    for _ in range(num_written):
        if bits.take(1):
            place += bits.gamma()
        folded = 0
        while bits.take(1):
            folded += 1
        length += folded // 2 if folded % 2 == 0 else -((folded + 1) // 2)
        symbol = place + (place >= unwritten)
        if not 0 <= length <= 15 or symbol >= size:
            raise RefusedError("stream", "a table")
        kept = min(m, length)
        frequencies[symbol] = ((1 << kept) + bits.take(kept)) << (length - kept)
        place += 1
    frequencies[unwritten] = (1 << k) - sum(frequencies)
    if frequencies[unwritten] < 1:
        raise RefusedError("stream", "a table")
    return frequencies, k


def decode_stream(stream: bytes, segments: list[tuple[int, Code]]) -> list[bytes]:
    """Give the values of each segment of a level stream."""
    if not stream or not 12 <= stream[0] <= 40:
        raise RefusedError("stream", "the chunk size")
    bits = Bits(stream, 8)
    tables = [read_table(bits, code.num_levels) for _, code in segments]
    if bits.take(-bits.position % 8):
        raise RefusedError("stream", "the bits after the tables")
    source = Bytes(stream)
    source.position = bits.position // 8
    total, size = sum(count for count, _ in segments), 1 << stream[0]
    chunks = []
    for start in range(0, total, size):
        is_last = start + size >= total
        num_bytes = len(stream) - source.position
        if not is_last:
            try:
                num_bytes = 24 + 2 * source.varint("a chunk's length")
            except RefusedError as error:
                raise RefusedError("stream", "a chunk's length") from error
        if num_bytes < 24 or num_bytes % 2 or num_bytes > len(stream) - source.position:
            raise RefusedError("stream", "a chunk")
        chunks.append(source.take(num_bytes, "a chunk"))
    owners = [number for number, (count, _) in enumerate(segments) for _ in range(count)]
    starts = [[0, *accumulate(frequencies)] for frequencies, _ in tables]
    values: list[list[bytes]] = [[] for _ in segments]
    for number, chunk in enumerate(chunks):
        lanes = Lanes(chunk)
        for i, owner in enumerate(owners[number * size : (number + 1) * size]):
            code = segments[owner][1]
            level = lanes.symbol(i % 4, starts[owner], tables[owner][1], code) - code.num_levels
            if level > code.num_levels:
                raise RefusedError("stream", "a level")
            values[owner].append(struct.pack("<f", decoded_level(level, code)))
        lanes.close()
    return [b"".join(parts) for parts in values]


class Lanes:
    """The four lanes of a chunk and its words."""

    def __init__(self, chunk: bytes) -> None:
        self.states = [int.from_bytes(chunk[6 * i : 6 * i + 6], "little") for i in range(4)]
        self.words = struct.unpack(f"<{(len(chunk) - 24) // 2}H", chunk[24:])
        self.position = 0
        if not all(LOWEST_STATE <= x < LOWEST_STATE << 16 for x in self.states):
            raise RefusedError("stream", "a lane's state")

    def filled(self, x: int) -> int:
        if x >= LOWEST_STATE:
            return x
        if self.position == len(self.words):
            raise RefusedError("stream", "the words")
        word: int = self.words[self.position]
        self.position += 1
        return x << 16 | word

    def symbol(self, lane: int, starts: list[int], k: int, code: Code) -> int:
        x = self.states[lane]
        slot = x & ((1 << k) - 1)
        symbol = bisect_right(starts, slot) - 1
        frequency = starts[symbol + 1] - starts[symbol]
        x = self.filled(frequency * (x >> k) + slot - starts[symbol])
        b = low_bits(code.num_levels)
        if b:
            symbol = symbol << b | x & ((1 << b) - 1)
            x = self.filled(x >> b)
        self.states[lane] = x
        return symbol

    def close(self) -> None:
        if self.position != len(self.words) or self.states != [LOWEST_STATE] * 4:
            raise RefusedError("stream", "the end of a chunk")


# --- the whole payload ---------------------------------------------------------------------------


@dataclass
class BlockFrames:
    """A block's segments with their codes, and its frames, unopened."""

    number: int
    codes: list[tuple[list[int], Code]]
    levels: bytes = b""
    raw: bytes = b""
    buffers: bytes = b""
    raw_parts: list[Plain] = field(default_factory=list)
    buffer_parts: list[Plain] = field(default_factory=list)

    def level_segments(self) -> list[tuple[int, Code]]:
        return [(stop - start, c) for (_, start, stop), c in self.codes if c.coding == LEVELS]


def take_frames(source: Bytes, schema: dict[str, Any], header: dict[str, Any]) -> Any:
    """Take codes and frames of the held blocks; give the frozen frame and each block's."""
    flags = header["flags"]
    tensors = schema["tensors"]
    blocks = []
    for number in header["kept"] if not flags & START else ():
        codes = []
        for span in schema["blocks"][number][3]:
            role, count = tensors[span[0]][3], span[2] - span[1]
            codes.append((span, read_code(source, header, role, count)))
        blocks.append(BlockFrames(number, codes))
    ice = [
        Plain(i, 0, math.prod(shape), dtype, None)
        for i, (_, shape, dtype, role) in enumerate(tensors)
        if role == "frozen" and header["kind"] == OPENING and not flags & START
    ]
    frozen_frame = take_plain(source, ice, flags, "the frozen tensors") if ice else b""
    for block in blocks:
        for (tensor, start, stop), code in block.codes:
            if code.coding in (RAW, MASKED):
                mask = None
                if code.coding == MASKED:
                    mask = mask_of(schema, header["mask"], tensor, start, stop)
                part = Plain(tensor, start, stop, plain_type(schema, tensor, flags), mask)
                is_buffer = tensors[tensor][3] == "buffer"
                (block.buffer_parts if is_buffer else block.raw_parts).append(part)
        segments = block.level_segments()
        if segments:
            bits = sum(count * (code.num_levels.bit_length() + 1) for count, code in segments)
            length = source.varint("the levels")
            if length > bits // 8 + bits // 32 + 4096:
                raise RefusedError("limit", "the levels")
            block.levels = source.take(length, "the levels")
        if block.raw_parts:
            block.raw = take_plain(source, block.raw_parts, flags, "the values")
        if block.buffer_parts:
            block.buffers = take_plain(source, block.buffer_parts, flags, "the buffers")
    return (ice, frozen_frame), blocks


def block_values(block: BlockFrames, schema: dict[str, Any], flags: int) -> list[Values]:
    found: dict[tuple[int, ...], tuple[str, bytes, tuple[bool, ...] | None]] = {}
    segments = block.level_segments()
    decoded = iter(decode_stream(block.levels, segments) if segments else ())
    for span, code in block.codes:
        if code.coding == LEVELS:
            found[tuple(span)] = "float32", next(decoded), None
        elif code.coding == CONSTANT:
            one = struct.pack("<f", code.offset)
            found[tuple(span)] = "float32", one * (span[2] - span[1]), None
    for frame, parts in ((block.raw, block.raw_parts), (block.buffers, block.buffer_parts)):
        if parts:
            for part, data in zip(parts, opened(frame, parts, flags), strict=True):
                found[part.tensor, part.start, part.stop] = part.dtype, data, part.mask
    return [
        Values(block.number, schema["tensors"][span[0]][0], span[1], span[2], *found[tuple(span)])
        for span, _ in block.codes
    ]


def read_payload(data: bytes, schema: dict[str, Any]) -> Payload:
    """Read a payload for a model whose schema is given as JSON values.

    Raises:
        RefusedError: it is not a payload of version 2 for this model.
    """
    if len(data) < 33:
        raise RefusedError("truncated", "the header")
    if data[:5] != b"FOBD\2":
        raise RefusedError("version", "magic or version")
    if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise RefusedError("checksum", "the checksum")
    source = Bytes(data[:-4])
    header = read_header(source, schema)
    (ice, frozen_frame), blocks = take_frames(source, schema, header)
    if source.position != len(source.data):
        raise RefusedError("trailing bytes", "the end")
    payload = Payload(header)
    if ice:
        for part, part_data in zip(ice, opened(frozen_frame, ice, header["flags"]), strict=True):
            name = schema["tensors"][part.tensor][0]
            payload.frozen.append(Values(-1, name, 0, part.stop, part.dtype, part_data))
    for block in blocks:
        payload.values += block_values(block, schema, header["flags"])
    return payload
