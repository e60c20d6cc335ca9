"""Payload: bytes back to values, verified before they are used.

`Payload.parse` takes a whole payload and verifies all that can be verified before the first value
is handed out: checksum, header, lengths that tile it. `PayloadStream` takes one chunk after
another and keeps no more than a block; what it hands out counts only when it has come to its end,
where the checksum is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import chain
from typing import cast

import numpy as np
import torch
from zlib_ng.zlib_ng import crc32

from fedobd._errors import DecodeError, DecodeReason, UsageError
from fedobd.blocks import ModelSchema, Role, Segment, TensorSpec
from fedobd.codec import Coding, Float32, SegmentCode, decode_levels, decompress, from_bytes
from fedobd.payload._cursor import DEFAULT_LIMITS, Bytes, Cursor, Limits
from fedobd.payload._frames import BlockLayout, PlainPart, check_finite, frozen_parts, lay_out
from fedobd.payload._header import Header
from fedobd.payload._traffic import ByteCount, PayloadTraffic
from fedobd.payload._wire import (
    CHECKSUM,
    check_checksum,
    check_length,
    check_version,
    read_code,
    read_header,
)

_FLOAT32 = np.dtype("<f4")


@dataclass(frozen=True, slots=True)
class DecodedSegment:
    """One segment of a payload: a 1-D tensor of values or differences.

    With a mask, bool, shape (n,), they belong to the elements that it keeps alone.
    """

    segment: Segment
    values: torch.Tensor
    mask: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class SegmentView:
    """A segment of float32 values, shape (n,), as they lie in a payload: of any bits, NaN too.

    They are read-only, at any address; else it is as `DecodedSegment`.
    """

    segment: Segment
    values: Float32
    mask: torch.Tensor | None = None


DecodedBlock = tuple[int, Sequence[DecodedSegment | SegmentView]]
"""A block's number and its segments."""


@dataclass(frozen=True, slots=True)
class _BlockFrames:
    """The frames of one block, found but not decoded."""

    number: int
    codes: tuple[SegmentCode, ...]
    layout: BlockLayout
    levels: memoryview | None
    raw: memoryview | None
    buffers: memoryview | None


class _Decoder:
    """What a payload of known frames and one that comes by and by share."""

    def __init__(self, schema: ModelSchema, header: Header, frozen: memoryview | None) -> None:
        self.schema = schema
        self.header = header
        self._frozen = frozen

    def frozen(self) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
        """Yield the frozen tensors of an initial payload."""
        for decoded in self._plain(frozen_parts(self.schema), self._frozen):
            spec = self.schema.tensors[decoded.segment.tensor]
            yield spec, cast(torch.Tensor, decoded.values).reshape(spec.shape)

    def _decode(
        self, frames: _BlockFrames, executor: Executor | None, *, in_place: bool = False
    ) -> list[DecodedSegment | SegmentView]:
        """Return a block's segments; plain float32 ones as views, where they may stay in place."""
        levels: Iterator[Float32] = iter(())
        if frames.levels is not None:
            counts = [(segment.num_elements, code) for segment, code in frames.layout.levels]
            levels = iter(decode_levels(frames.levels, counts, executor))
        raw = self._plain(frames.layout.raw, frames.raw, in_place)
        buffers = self._plain(frames.layout.buffers, frames.buffers, in_place)
        segments: list[DecodedSegment | SegmentView] = []
        held = self.schema.blocks[frames.number].segments
        for segment, code in zip(held, frames.codes, strict=True):
            if code.coding is Coding.LEVELS:
                segments.append(DecodedSegment(segment, torch.from_numpy(next(levels))))
            elif code.coding is Coding.CONSTANT:
                constant = torch.full((segment.num_elements,), code.offset, dtype=torch.float32)
                segments.append(DecodedSegment(segment, constant))
            else:
                is_buffer = self.schema.tensors[segment.tensor].role is Role.BUFFER
                segments.append(next(buffers if is_buffer else raw))
        return segments

    def _plain(
        self, parts: tuple[PlainPart, ...], frame: memoryview | None, in_place: bool = False
    ) -> Iterator[DecodedSegment | SegmentView]:
        """Yield the segments of a frame of plain values."""
        if frame is None:
            return
        if self.header.is_lossless:
            lengths = [part.num_bytes for part in parts]
            frame = memoryview(decompress(frame, lengths, [part.dtype.itemsize for part in parts]))
        position = 0
        for part in parts:
            part_bytes = frame[position : position + part.num_bytes]
            position += part.num_bytes
            # As NumPy, since torch warns of read-only memory; aggregation looks for NaN itself.
            if in_place and part.dtype is torch.float32:
                yield SegmentView(part.segment, np.frombuffer(part_bytes, _FLOAT32), part.mask)
            else:
                values = from_bytes(part_bytes, part.dtype)
                refuse_not_finite(self.schema.tensors[part.segment.tensor], values)
                yield DecodedSegment(part.segment, values, part.mask)


def refuse_not_finite(spec: TensorSpec, values: torch.Tensor) -> None:
    """Raise DecodeError where values, of any shape and floating type, are NaN or infinite."""
    try:
        check_finite(spec.name, values)
    except UsageError as error:
        raise DecodeError(
            DecodeReason.NOT_FINITE, f"tensor {spec.name!r} holds NaN or an infinity"
        ) from error


class _FrameReader:
    """Reads header and frames from a cursor, whether all bytes are there or come by and by."""

    def __init__(self, cursor: Cursor, schema: ModelSchema) -> None:
        self._cursor = cursor
        self.schema = schema
        self.header = read_header(cursor, schema)
        self._codes = [
            tuple(read_code(cursor, schema, self.header, s) for s in schema.blocks[n].segments)
            for n in self.header.coded
        ]
        self.traffic = PayloadTraffic()

    def frozen(self) -> memoryview | None:
        """Return the frame of the frozen tensors, None where there is none."""
        if not self.header.holds_frozen(self.schema):
            return None
        parts = frozen_parts(self.schema)
        frame = self._plain_frame(parts, "the frame of frozen tensors")
        self.traffic.add_frozen(len(frame or b""), parts)
        return frame

    def blocks(self) -> Iterator[_BlockFrames]:
        """Yield the frames of the held blocks."""
        for number, codes in zip(self.header.coded, self._codes, strict=True):
            name, start = self.schema.blocks[number].name, self._cursor.position
            layout = lay_out(self.schema, self.header, number, codes)
            levels = self._level_frame(layout, f"the levels of block {name!r}")
            raw = self._plain_frame(layout.raw, f"the values of block {name!r}")
            buffers = self._plain_frame(layout.buffers, f"the buffers of block {name!r}")
            sizes = [len(frame or b"") for frame in (levels, raw, buffers)]
            self.traffic.add_block(number, layout, sizes, self._cursor.position - start)
            yield _BlockFrames(number, codes, layout, levels, raw, buffers)

    def _level_frame(self, layout: BlockLayout, what: str) -> memoryview | None:
        if not layout.levels:
            return None
        # Lengths are limited before their bytes are waited for: a stream could name any.
        length = self._cursor.varint(f"the length of {what}")
        if length > layout.most_level_bytes:
            raise DecodeError(
                DecodeReason.LIMIT,
                f"{what} say they take {length} bytes; wanted at most {layout.most_level_bytes}",
            )
        return self._cursor.take(length, what)

    def _plain_frame(self, parts: tuple[PlainPart, ...], what: str) -> memoryview | None:
        if not parts:
            return None
        wanted = sum(part.num_bytes for part in parts)
        length = self._cursor.varint(f"the length of {what}")
        if self.header.is_lossless:
            # zstandard grows what it cannot compress by less than 1 part in 128.
            if length > wanted + wanted // 128 + 1024:
                raise DecodeError(
                    DecodeReason.LIMIT, f"{what} say they take {length} bytes for {wanted}"
                )
        elif length != wanted:
            raise DecodeError(
                DecodeReason.FIELD, f"{what}: {length} bytes came; the schema wants {wanted}"
            )
        return self._cursor.take(length, what)


class Payload(_Decoder):
    """A whole payload that has been verified.

    Lengths tile it, fields are legal, the checksum holds. Values are decoded on demand; `blocks`
    can still find a damaged level stream or a value that is not finite.
    """

    def __init__(self, reader: _FrameReader, frozen: memoryview | None) -> None:
        super().__init__(reader.schema, reader.header, frozen)
        self._frames = tuple(reader.blocks())
        self.traffic = reader.traffic

    @property
    def num_bytes(self) -> ByteCount:
        """Its bytes by what they are for."""
        return self.traffic.total

    @classmethod
    def parse(cls, data: Bytes, schema: ModelSchema, limits: Limits = DEFAULT_LIMITS) -> Payload:
        """Verify a whole payload for a model's schema, and find its frames.

        Raises:
            DecodeError: it is cut, altered, of another version, for another model, or too large.
        """
        buffer = memoryview(data).cast("B")
        check_length(buffer, limits)
        # Before the checksum: another version may have another one.
        check_version(bytes(buffer[:4]), buffer[4])
        check_checksum(crc32(buffer[: -CHECKSUM.size]), buffer[-CHECKSUM.size :])
        cursor = Cursor(buffer[: -CHECKSUM.size], limits)
        reader = _FrameReader(cursor, schema)
        payload = cls(reader, reader.frozen())
        left = len(buffer) - CHECKSUM.size - cursor.position
        if left:
            raise DecodeError(
                DecodeReason.TRAILING,
                f"{left} bytes follow the last frame at offset {cursor.position}",
            )
        payload.traffic.close(len(buffer))
        return payload

    def blocks(
        self, executor: Executor | None = None
    ) -> Iterator[tuple[int, list[DecodedSegment]]]:
        """Yield numbers and segments of the blocks; an executor spreads the work on large ones.

        Levels and constants give float32; plain values the type in which they travelled.

        Raises:
            DecodeError: a stream is damaged or a value is not finite.
        """
        for frames in self._frames:
            yield frames.number, cast(list[DecodedSegment], self._decode(frames, executor))

    def views(self, executor: Executor | None = None) -> Iterator[DecodedBlock]:
        """Decode block by block, but leave plain float32 values where they lie.

        Whoever takes them looks for values that are not finite; else see `blocks`.
        """
        for frames in self._frames:
            yield frames.number, self._decode(frames, executor, in_place=True)

    def codes(self) -> Iterator[tuple[int, Segment, SegmentCode]]:
        """Yield block number, segment and code of all that the payload holds."""
        for frames in self._frames:
            segments = self.schema.blocks[frames.number].segments
            for segment, code in zip(segments, frames.codes, strict=True):
                yield frames.number, segment, code


class _ChunkCursor(Cursor):
    """Reads chunks of bytes as they come, and keeps what it has not given out."""

    def __init__(self, chunks: Iterable[Bytes], limits: Limits) -> None:
        super().__init__(memoryview(b""), limits)
        self._chunks = iter(chunks)
        self.checksum = 0

    def take(self, count: int, what: str) -> memoryview:
        if self.position + count > self.limits.max_payload_bytes:
            raise DecodeError(
                DecodeReason.LIMIT,
                f"{what} would end past {self.limits.max_payload_bytes} bytes, the most taken",
            )
        # A view of the chunk where it holds them all; else they are copied together.
        whole, self._buffer = self._buffer[:count], self._buffer[count:]
        if len(whole) < count:
            whole = memoryview(self._gathered(bytearray(whole), count, what))
        self.position += count
        self.checksum = crc32(whole, self.checksum)
        return whole

    def _gathered(self, parts: bytearray, count: int, what: str) -> bytearray:
        """Add chunks until there are as many bytes as wanted; the rest of the last one waits."""
        for chunk in self._chunks:
            view = memoryview(chunk).cast("B")
            missing = count - len(parts)
            parts += view[:missing]
            if len(parts) == count:
                self._buffer = view[missing:]
                return parts
        raise DecodeError(
            DecodeReason.TRUNCATED,
            f"the payload ends inside {what}: {count} bytes wanted at offset "
            f"{self.position}, {len(parts)} came",
        )

    def close(self) -> None:
        """Raise DecodeError unless the checksum, and nothing else, is left."""
        came = self.checksum
        check_checksum(came, self.take(CHECKSUM.size, "the checksum"))
        for rest in chain([self._buffer], self._chunks):
            if len(memoryview(rest)):  # no more is read of what may have no end
                raise DecodeError(DecodeReason.TRAILING, "bytes follow the checksum")


class PayloadStream(_Decoder):
    """A payload that is decoded while it comes in, with memory for its largest block alone.

    It comes in pieces of any size, and is to be for the model of a schema.

    Raises:
        DecodeError: its header is not legal, or for another model.
    """

    def __init__(
        self, chunks: Iterable[Bytes], schema: ModelSchema, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        cursor = _ChunkCursor(chunks, limits)
        reader = _FrameReader(cursor, schema)
        super().__init__(schema, reader.header, reader.frozen())
        self._cursor = cursor
        self._reader = reader

    def blocks(
        self, executor: Executor | None = None
    ) -> Iterator[tuple[int, list[DecodedSegment]]]:
        """Decode block by block, once; see `Payload.blocks`.

        Nothing of it may be used before the last block has come: only then has the checksum been
        seen.

        Raises:
            DecodeError: a frame is cut or damaged, a value is not finite, the checksum does not
                hold, or something follows it.
        """
        for frames in self._reader.blocks():
            yield frames.number, cast(list[DecodedSegment], self._decode(frames, executor))
        self._cursor.close()
