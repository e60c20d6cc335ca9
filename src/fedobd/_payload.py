"""Payload: model states to bytes and back.

Encoding goes block by block and yields chunks. Decoding verifies all that can be verified
(checksum, header, lengths that tile the payload) before the first value is handed out, and then
goes block by block.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

import torch

from fedobd._entropy import decode_levels, encode_levels
from fedobd._errors import DecodeError, DecodeReason, UsageError
from fedobd._quantization import Coding, Levels, Quantizer, SegmentCode
from fedobd._schema import Block, ModelSchema, Role, Segment, TensorSpec
from fedobd._varint import write_varint
from fedobd._wire import (
    CHECKSUM,
    ByteCount,
    Bytes,
    Cursor,
    Header,
    Kind,
    check_envelope,
    pack_header,
    read_code,
    read_header,
)

Source = Callable[[Segment], torch.Tensor]


def encode_payload(
    schema: ModelSchema,
    header: Header,
    source: Source,
    quantizer: Quantizer,
    *,
    generator: torch.Generator | None = None,
    frozen: Callable[[TensorSpec], torch.Tensor] | None = None,
    executor: Executor | None = None,
) -> Iterator[bytes]:
    """Encode a payload, block by block.

    Args:
        schema: the model's schema.
        header: what it says.
        source: gives the elements of a segment, 1-D, on the CPU: values, or for parameters of a
            payload of differences the float32 differences.
        quantizer: how parameters are coded.
        generator: draws of a stochastic quantizer.
        frozen: gives the values of frozen tensors; wanted in an opening payload, and only there.
        executor: spreads the work on large blocks; the bytes are the same with and without.

    Yields:
        Chunks; the payload is their concatenation.

    Raises:
        UsageError: a value is NaN or infinite; the message names the tensor.
    """
    encoding = _Encoding(schema, header, source, quantizer, generator, executor)
    checksum = 0
    codes = encoding.measure()
    for chunk in encoding.chunks(codes, frozen):
        checksum = zlib.crc32(chunk, checksum)
        yield chunk
    yield CHECKSUM.pack(checksum)


@dataclass(frozen=True, slots=True)
class _Encoding:
    """The arguments of `encode_payload`."""

    schema: ModelSchema
    header: Header
    source: Source
    quantizer: Quantizer
    generator: torch.Generator | None
    executor: Executor | None

    def measure(self) -> list[list[SegmentCode]]:
        """Return the codes of the segments of each held block."""
        return [
            [self._code(segment) for segment in self.schema.blocks[number].segments]
            for number in self.header.kept
        ]

    def _code(self, segment: Segment) -> SegmentCode:
        spec = self.schema.tensors[segment.tensor]
        values = self.source(segment)
        check_finite(spec.name, values.to(_plain_dtype(self.schema, self.header, segment)))
        if spec.role is not Role.PARAMETER:
            return SegmentCode(Coding.RAW)
        if self.header.mask is not None:
            return SegmentCode(Coding.MASKED)
        return self.quantizer.measure(values.to(torch.float32).numpy(), spec.repr_bits)

    def chunks(
        self,
        codes: Sequence[Sequence[SegmentCode]],
        frozen: Callable[[TensorSpec], torch.Tensor] | None,
    ) -> Iterator[bytes]:
        """Yield everything but the checksum."""
        schema, header = self.schema, self.header
        yield pack_header(schema, header, codes)
        if header.kind is Kind.OPENING and schema.frozen():
            if frozen is None:
                raise UsageError("an opening payload needs the values of the frozen tensors")
            specs = [schema.tensors[i] for i in schema.frozen()]
            for spec in specs:
                check_finite(spec.name, frozen(spec))
            yield write_varint(sum(_frozen_bytes(spec) for spec in specs))
            for spec in specs:
                yield _to_bytes(frozen(spec).reshape(-1), spec.dtype)
        for number, block_codes in zip(header.kept, codes, strict=True):
            yield from self._frames(schema.blocks[number], block_codes)

    def _frames(self, block: Block, codes: Sequence[SegmentCode]) -> Iterator[bytes]:
        levels: list[Levels] = []
        plain: list[bytes] = []
        for segment, code in zip(block.segments, codes, strict=True):
            values = self.source(segment)
            if code.coding is Coding.LEVELS:
                as_float = values.to(torch.float32).numpy()
                levels.append(
                    self.quantizer.quantize(as_float, code, self.generator, self.executor)
                )
            elif code.coding is not Coding.CONSTANT:
                if code.coding is Coding.MASKED:
                    values = values[_mask_of(self.schema, self.header, segment)]
                plain.append(_to_bytes(values, _plain_dtype(self.schema, self.header, segment)))
        if levels:
            stream = encode_levels(levels, self.executor)
            yield write_varint(len(stream)) + stream
        if plain:
            yield write_varint(sum(map(len, plain)))
            yield from plain


def check_finite(name: str, values: torch.Tensor) -> None:
    """Raise UsageError where a floating tensor holds NaN or an infinity."""
    if values.is_floating_point() and values.numel():
        low, high = map(float, torch.aminmax(values))
        if not (math.isfinite(low) and math.isfinite(high)):
            kind = "NaN" if math.isnan(low) else "an infinity"
            raise UsageError(
                f"tensor {name!r} holds {kind} as {values.dtype}; "
                "training has diverged, or the model was wrong at the start"
            )


def _plain_dtype(schema: ModelSchema, header: Header, segment: Segment) -> torch.dtype:
    """Return the type of plain values.

    It is that of the tensor on the wire, and float32 for differences of parameters.
    """
    spec = schema.tensors[segment.tensor]
    if header.is_difference and spec.role is Role.PARAMETER:
        return torch.float32
    return spec.wire_dtype


def _mask_of(schema: ModelSchema, header: Header, segment: Segment) -> torch.Tensor:
    assert header.mask is not None
    start = schema.mask_offset(segment)
    return torch.from_numpy(header.mask.kept(start, start + segment.num_elements))


def _frozen_bytes(spec: TensorSpec) -> int:
    return spec.num_elements * spec.dtype.itemsize


def _to_bytes(values: torch.Tensor, dtype: torch.dtype) -> bytes:
    """Return the little-endian bytes of a 1-D tensor in an element type."""
    dense = torch.empty(
        values.numel(), dtype=dtype
    )  # `contiguous` leaves odd strides of 1 element
    dense.copy_(values)
    return dense.view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True, slots=True)
class DecodedSegment:
    """One segment of a payload.

    Args:
        segment: which elements.
        values: 1-D tensor of the segment's values or differences; with a mask only the kept ones.
        mask: which elements the values belong to, bool, shape (n,); None where it is all.
    """

    segment: Segment
    values: torch.Tensor
    mask: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class _BlockFrames:
    number: int
    codes: tuple[SegmentCode, ...]
    levels: memoryview | None
    plain: memoryview | None
    num_bytes: int


@dataclass(frozen=True)
class Payload:
    """A payload that has been verified: lengths tile it, fields are legal, the checksum holds.

    Values are decoded on demand; `blocks` can still find a damaged level stream or a value that is
    not finite.
    """

    schema: ModelSchema
    header: Header
    num_bytes: ByteCount
    _frames: tuple[_BlockFrames, ...] = field(repr=False)
    _frozen: memoryview | None = field(repr=False)

    @classmethod
    def parse(cls, data: Bytes, schema: ModelSchema) -> Payload:
        """Verify a payload and find its frames.

        Args:
            data: the whole payload.
            schema: the schema of the model that it is to be for.

        Raises:
            DecodeError: it is cut, altered, of another version or for another model.
        """
        buffer = memoryview(data).cast("B")
        check_envelope(buffer)
        cursor = Cursor(buffer[: -CHECKSUM.size])
        header = read_header(cursor, schema)
        codes = [
            tuple(read_code(cursor, schema, header, s) for s in schema.blocks[number].segments)
            for number in header.kept
        ]
        count = ByteCount()
        frozen = _read_frozen(cursor, schema, header, count)
        frames = tuple(
            _read_frames(cursor, schema, header, number, block_codes, count)
            for number, block_codes in zip(header.kept, codes, strict=True)
        )
        left = len(buffer) - CHECKSUM.size - cursor.position
        if left:
            raise DecodeError(
                DecodeReason.TRAILING,
                f"{left} bytes follow the last frame at offset {cursor.position}",
            )
        count.header = len(buffer) - count.levels - count.raw - count.buffers
        return cls(schema, header, count, frames, frozen)

    def frozen(self) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
        """Yield the frozen tensors of an opening payload."""
        if self._frozen is None:
            return
        position = 0
        for number in self.schema.frozen():
            spec = self.schema.tensors[number]
            stop = position + _frozen_bytes(spec)
            values = _from_bytes(self._frozen[position:stop], spec.dtype)
            refuse_not_finite(spec, values)
            yield spec, values.reshape(spec.shape)
            position = stop

    def blocks(
        self, executor: Executor | None = None
    ) -> Iterator[tuple[int, list[DecodedSegment]]]:
        """Decode block by block.

        Args:
            executor: spreads the work on large blocks.

        Yields:
            The block's number and its segments. Levels and constants give float32; plain values
            the type in which they travelled.

        Raises:
            DecodeError: a level stream is damaged or a value is not finite.
        """
        for frames in self._frames:
            yield frames.number, self._decode(frames, executor)

    def codes(self) -> Iterator[tuple[int, Segment, SegmentCode]]:
        """Yield block number, segment and code of all that the payload holds."""
        for frames in self._frames:
            segments = self.schema.blocks[frames.number].segments
            for segment, code in zip(segments, frames.codes, strict=True):
                yield frames.number, segment, code

    def block_bytes(self) -> dict[int, int]:
        """Return the bytes of each held block's frames, with their lengths, by block number."""
        return {frames.number: frames.num_bytes for frames in self._frames}

    def _decode(self, frames: _BlockFrames, executor: Executor | None) -> list[DecodedSegment]:
        pairs = list(zip(self.schema.blocks[frames.number].segments, frames.codes, strict=True))
        levels = iter(
            decode_levels(
                frames.levels,
                [
                    (segment.num_elements, code)
                    for segment, code in pairs
                    if code.coding is Coding.LEVELS
                ],
                executor,
            )
            if frames.levels is not None
            else ()
        )
        position = 0
        result = []
        for segment, code in pairs:
            spec = self.schema.tensors[segment.tensor]
            mask = None
            if code.coding is Coding.CONSTANT:
                values = torch.full((segment.num_elements,), code.offset, dtype=torch.float32)
            elif code.coding is Coding.LEVELS:
                values = torch.from_numpy(next(levels))
            else:
                assert frames.plain is not None
                if code.coding is Coding.MASKED:
                    mask = _mask_of(self.schema, self.header, segment)
                dtype = _plain_dtype(self.schema, self.header, segment)
                count = segment.num_elements if mask is None else int(mask.sum())
                stop = position + count * dtype.itemsize
                values = _from_bytes(frames.plain[position:stop], dtype)
                refuse_not_finite(spec, values)
                position = stop
            result.append(DecodedSegment(segment, values, mask))
        return result


def _read_frame(cursor: Cursor, what: str, wanted: int | None = None) -> memoryview:
    length = cursor.varint(f"the length of {what}")
    if wanted is not None and length != wanted:
        raise DecodeError(
            DecodeReason.FIELD, f"{what} says it has {length} bytes; its schema wants {wanted}"
        )
    return cursor.take(length, what)


def _read_frozen(
    cursor: Cursor, schema: ModelSchema, header: Header, count: ByteCount
) -> memoryview | None:
    if header.kind is not Kind.OPENING or not schema.frozen():
        return None
    wanted = sum(_frozen_bytes(schema.tensors[i]) for i in schema.frozen())
    frame = _read_frame(cursor, "the frame of frozen tensors", wanted)
    count.raw += wanted
    count.nominal_bits += wanted * 8
    return frame


def _read_frames(
    cursor: Cursor,
    schema: ModelSchema,
    header: Header,
    number: int,
    codes: tuple[SegmentCode, ...],
    count: ByteCount,
) -> _BlockFrames:
    block = schema.blocks[number]
    start = cursor.position
    raw = buffers = 0
    has_levels = has_plain = False
    for segment, code in zip(block.segments, codes, strict=True):
        itemsize = _plain_dtype(schema, header, segment).itemsize
        num_elements = segment.num_elements
        if code.coding is Coding.MASKED:
            num_elements = int(_mask_of(schema, header, segment).sum())
        count.nominal_bits += code.nominal_bits(num_elements, itemsize * 8)
        has_levels |= code.coding is Coding.LEVELS
        if code.coding in (Coding.RAW, Coding.MASKED):
            has_plain = True
            if schema.tensors[segment.tensor].role is Role.BUFFER:
                buffers += num_elements * itemsize
            else:
                raw += num_elements * itemsize
    levels = _read_frame(cursor, f"the levels of block {block.name!r}") if has_levels else None
    plain = (
        _read_frame(cursor, f"the plain values of block {block.name!r}", raw + buffers)
        if has_plain
        else None
    )
    count.levels += len(levels) if levels is not None else 0
    count.raw += raw
    count.buffers += buffers
    return _BlockFrames(number, codes, levels, plain, cursor.position - start)


def _from_bytes(part: memoryview, dtype: torch.dtype) -> torch.Tensor:
    if len(part) == 0:
        return torch.empty(0, dtype=dtype)
    if dtype is torch.bool:
        return torch.frombuffer(bytearray(part), dtype=torch.uint8) != 0
    return torch.frombuffer(bytearray(part), dtype=dtype)


def refuse_not_finite(spec: TensorSpec, values: torch.Tensor) -> None:
    """Raise DecodeError where what came for a tensor holds NaN or an infinity."""
    try:
        check_finite(spec.name, values)
    except UsageError as error:
        raise DecodeError(
            DecodeReason.NOT_FINITE, f"tensor {spec.name!r} holds NaN or an infinity"
        ) from error
