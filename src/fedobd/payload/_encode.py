"""Encoding: model states to payloads, block by block, with what each block took.

Payloads are made one at a time, or those of several clients together: their values then lie
stacked, with the clients first, and each segment is measured and quantized for all of them at
once, on whatever device it lies. The bytes of a payload are the same either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import numpy as np
import torch
from zlib_ng.zlib_ng import crc32

from fedobd._errors import UsageError
from fedobd.blocks import ModelSchema, Role, Segment, TensorSpec
from fedobd.codec import (
    MASKED,
    RAW,
    Float32,
    Levels,
    Quantizer,
    SegmentCode,
    Unquantized,
    Words,
    compress,
    encode_levels,
    to_words,
    write_varint,
)
from fedobd.payload._cursor import Bytes
from fedobd.payload._frames import (
    BlockLayout,
    PlainPart,
    check_finite,
    frozen_parts,
    lay_out,
    plain_dtype,
)
from fedobd.payload._header import Header
from fedobd.payload._traffic import PayloadTraffic
from fedobd.payload._wire import CHECKSUM, pack_header

Source = Callable[[Segment], torch.Tensor]
"""Gives the elements of a segment, 1-D, or (clients, elements) where there are several."""

Codes = list[list[SegmentCode]]


@dataclass(frozen=True, slots=True)
class EncodedPayload:
    """A payload in chunks, with its traffic.

    A chunk may be a view of the values that were encoded, so that those of a large model are not
    copied to be sent: it is good for as long as they do not change.
    """

    chunks: tuple[Bytes, ...]
    _count: Callable[[], PayloadTraffic] = field(repr=False, compare=False)

    @property
    def traffic(self) -> PayloadTraffic:
        """What it takes, from the frames that were made."""
        return self._count()

    @property
    def data(self) -> bytes:
        """The whole payload."""
        return b"".join(self.chunks)

    def copied(self) -> EncodedPayload:
        """Return the payload with bytes of its own, which stay when the values change."""
        return EncodedPayload((self.data,), self._count)


def encode_payload(
    schema: ModelSchema,
    header: Header,
    source: Source,
    quantizer: Quantizer,
    *,
    generator: torch.Generator | None = None,
    frozen: Callable[[TensorSpec], torch.Tensor] | None = None,
    executor: Executor | None = None,
) -> EncodedPayload:
    """Encode a payload, block by block; its chunks may be views of what the source gave.

    The source gives the elements of a segment, 1-D, on any device: values, or for parameters of a
    payload of differences the float32 differences. `generator` is for draws of a stochastic
    quantizer; `frozen` gives the values of frozen tensors, wanted in an initial payload alone. An
    executor spreads the work on large blocks; the bytes are the same with and without.

    Raises:
        UsageError: a value is NaN or infinite; the message names the tensor.
    """
    (payload,) = encode_payloads(
        schema,
        [header],
        lambda segment: source(segment).unsqueeze(0),
        [quantizer],
        generator=lambda _: generator,
        frozen=frozen,
        executor=executor,
    )
    return payload


def encode_payloads(
    schema: ModelSchema,
    headers: Sequence[Header],
    source: Source,
    quantizers: Sequence[Quantizer],
    *,
    generator: Callable[[int], torch.Generator | None],
    frozen: Callable[[TensorSpec], torch.Tensor] | None = None,
    executor: Executor | None = None,
) -> list[EncodedPayload]:
    """Encode one payload a client, block by block for all of them.

    All is as in `encode_payload`, but headers and quantizers are one a client, all headers of one
    kind and method; the source gives floats of shape (clients, elements); and the generator gives
    a client's draws, by its place among the headers.

    Raises:
        UsageError: a value is NaN or infinite; the message names the tensor.
    """
    encoding = _Encoding(schema, headers, source, quantizers, generator, executor)
    # All segments are measured before the first is quantized: their codes stand in the header.
    codes = encoding.measure()
    writers = [
        _Writer(pack_header(schema, header, of_payload))
        for header, of_payload in zip(headers, codes, strict=True)
    ]
    for header, writer in zip(headers, writers, strict=True):
        if header.holds_frozen(schema):
            _write_frozen(writer, schema, header, frozen)
    encoding.write_blocks(codes, writers)
    return [writer.finish() for writer in writers]


class _Writer:
    """Puts a payload together after the bytes of its header, and counts what it takes."""

    def __init__(self, header: bytes) -> None:
        self._chunks: list[Bytes] = []
        self._num_bytes = 0
        self._checksum = 0
        # Counted when somebody asks: nobody does for uploads, which the server counts.
        self._frozen: tuple[int, Sequence[PlainPart]] = 0, ()
        self._blocks: list[tuple[int, BlockLayout, list[int], int]] = []
        self._add(header)

    def _add(self, chunk: Bytes) -> None:
        self._checksum = crc32(chunk, self._checksum)
        self._chunks.append(chunk)
        self._num_bytes += memoryview(chunk).nbytes

    def _add_frame(self, pieces: Sequence[Bytes]) -> int:
        """Add a frame and return its bytes; its length stands before it, and counts as header."""
        length = sum([memoryview(piece).nbytes for piece in pieces])
        self._add(write_varint(length))
        for piece in pieces:
            self._add(piece)
        return length

    def add_frozen(self, pieces: Sequence[Bytes], parts: Sequence[PlainPart]) -> None:
        """Add the frame of the frozen tensors."""
        self._frozen = self._add_frame(pieces), parts

    def add_block(
        self, number: int, layout: BlockLayout, frames: Sequence[Sequence[Bytes]]
    ) -> None:
        """Add a block's frames of levels, values, buffers; those that its layout lacks are not."""
        start = self._num_bytes
        wanted = layout.levels, layout.raw, layout.buffers
        sizes = [self._add_frame(f) if of else 0 for f, of in zip(frames, wanted, strict=True)]
        self._blocks.append((number, layout, sizes, self._num_bytes - start))

    def finish(self) -> EncodedPayload:
        """Return the payload, its checksum added."""
        self._add(CHECKSUM.pack(self._checksum))
        return EncodedPayload(
            tuple(self._chunks), partial(_count, self._frozen, self._blocks, self._num_bytes)
        )


def _count(
    frozen: tuple[int, Sequence[PlainPart]],
    blocks: Sequence[tuple[int, BlockLayout, list[int], int]],
    num_bytes: int,
) -> PayloadTraffic:
    """Return what a payload of these frames takes."""
    traffic = PayloadTraffic()
    traffic.add_frozen(*frozen)
    for block in blocks:
        traffic.add_block(*block)
    traffic.close(num_bytes)
    return traffic


@dataclass(frozen=True, slots=True)
class _Encoding:
    """The arguments of `encode_payloads`."""

    schema: ModelSchema
    headers: Sequence[Header]
    source: Source
    quantizers: Sequence[Quantizer]
    generator: Callable[[int], torch.Generator | None]
    executor: Executor | None

    def _holders(self) -> Iterator[tuple[int, list[int]]]:
        """Yield the number of each block that is held, and the places of those that hold it."""
        holders: list[list[int]] = [[] for _ in self.schema.blocks]
        for place, header in enumerate(self.headers):
            for number in header.coded:
                holders[number].append(place)
        for number, places in enumerate(holders):
            if places:
                yield number, places

    def _values(self, segment: Segment, places: Sequence[int]) -> torch.Tensor:
        """Return the elements of a segment of some clients, shape (places, elements)."""
        values = self.source(segment)
        return values if len(places) == len(self.headers) else values[list(places)]

    def measure(self) -> list[Codes]:
        """Return the codes of each client: of its blocks, of their segments."""
        codes: list[Codes] = [[] for _ in self.headers]
        for number, places in self._holders():
            by_segment = [self._codes(s, places) for s in self.schema.blocks[number].segments]
            for place, *of_block in zip(places, *by_segment, strict=True):
                codes[place].append(of_block)
        return codes

    def _codes(self, segment: Segment, places: Sequence[int]) -> list[SegmentCode]:
        """Return a segment's code for some clients."""
        spec = self.schema.tensors[segment.tensor]
        values = self._values(segment, places)
        dtype = plain_dtype(self.schema, self.headers[places[0]].is_difference, segment)
        plain = [self._plain_code(spec, place) for place in places]
        extremes: Float32 | None = None
        if None in plain:
            extremes = _extremes(values.to(torch.float32))
        # NaN and infinities show in the extremes; a type of less range can have more of them
        if extremes is None or dtype != torch.float32 or not np.isfinite(extremes).all():
            check_finite(spec.name, values.to(dtype))
        codes = []
        for row, (place, code) in enumerate(zip(places, plain, strict=True)):
            if code is None:
                assert extremes is not None
                code = self.quantizers[place].measure(extremes[row], spec.repr_bits)
            codes.append(code)
        return codes

    def _plain_code(self, spec: TensorSpec, place: int) -> SegmentCode | None:
        """Return the code of what a client sends as it is; None for what is quantized."""
        if spec.role is not Role.PARAMETER:
            return RAW
        if self.headers[place].mask is not None:
            return MASKED
        return RAW if isinstance(self.quantizers[place], Unquantized) else None

    def write_blocks(self, codes: Sequence[Codes], writers: Sequence[_Writer]) -> None:
        """Quantize block by block and add the frames to the payloads of those that hold it."""
        coming = [iter(of_payload) for of_payload in codes]
        for number, places in self._holders():
            layouts = [
                lay_out(self.schema, self.headers[place], number, next(coming[place]))
                for place in places
            ]
            levels = self._levels(number, places, layouts)
            words: dict[Segment, Words] = {}
            for row, (place, layout) in enumerate(zip(places, layouts, strict=True)):
                stream = encode_levels(levels[row], self.executor) if layout.levels else b""
                raw = self._plain(layout.raw, words, places, row)
                buffers = self._plain(layout.buffers, words, places, row)
                writers[place].add_block(number, layout, ([stream], raw, buffers))

    def _plain(
        self,
        parts: Sequence[PlainPart],
        words: dict[Segment, Words],
        places: Sequence[int],
        row: int,
    ) -> Sequence[Bytes]:
        """Return the frame of a client's plain values; `words` keeps those of all clients."""
        for part in parts:
            if part.segment not in words:
                words[part.segment] = to_words(self._values(part.segment, places), part.dtype)
        rows = [words[part.segment][row] for part in parts]
        return _plain_frame(self.headers[places[row]], parts, rows)

    def _levels(
        self, number: int, places: Sequence[int], layouts: Sequence[BlockLayout]
    ) -> list[list[Levels]]:
        """Return the levels of a block's segments for each client, quantized all at once."""
        codes = [dict(layout.levels) for layout in layouts]
        levels: list[list[Levels]] = [[] for _ in places]
        for segment in self.schema.blocks[number].segments if any(codes) else ():
            coded = [row for row, of_block in enumerate(codes) if segment in of_block]
            for _, group in groupby(coded, lambda row: self.quantizers[places[row]]):
                rows = list(group)
                segment_codes = [codes[row][segment] for row in rows]
                made = self._quantize(segment, [places[row] for row in rows], segment_codes)
                for row, quantized in zip(rows, made, strict=True):
                    levels[row].append(quantized)
        return levels

    def _quantize(
        self, segment: Segment, places: Sequence[int], codes: Sequence[SegmentCode]
    ) -> list[Levels]:
        """Return the levels of a segment of clients that share a quantizer."""
        return self.quantizers[places[0]].quantize_all(
            self._values(segment, places).to(torch.float32),
            codes,
            lambda row: self.generator(places[row]),
            self.executor,
        )


def _plain_frame(
    header: Header, parts: Sequence[PlainPart], words: Sequence[Words]
) -> Sequence[Bytes]:
    """Return a frame of plain values in pieces; nothing for no parts."""
    plain = [
        (values if part.mask is None else values[part.mask.numpy()]).view(np.uint8).data
        for part, values in zip(parts, words, strict=True)
    ]
    if parts and header.is_lossless:
        return [compress(plain, [part.dtype.itemsize for part in parts])]
    return plain


def _write_frozen(
    writer: _Writer,
    schema: ModelSchema,
    header: Header,
    frozen: Callable[[TensorSpec], torch.Tensor] | None,
) -> None:
    """Add the frame of the frozen tensors."""
    if frozen is None:
        raise UsageError("an initial payload needs the values of the frozen tensors")
    parts, words = frozen_parts(schema), []
    for part in parts:
        spec = schema.tensors[part.segment.tensor]
        values = frozen(spec).reshape(-1)
        check_finite(spec.name, values)
        words.append(to_words(values, part.dtype))
    writer.add_frozen(_plain_frame(header, parts, words), parts)


def _extremes(values: torch.Tensor) -> Float32:
    """Return the least and the largest value of each client, all that is measured."""
    if values.shape[1] == 0:
        return values.cpu().numpy()
    if values.device.type == "cpu":
        array, extremes = values.numpy(), np.empty((len(values), 2), np.float32)
        array.min(axis=1, out=extremes[:, 0])
        array.max(axis=1, out=extremes[:, 1])
        return extremes
    return torch.stack(torch.aminmax(values, dim=1), dim=1).cpu().numpy()
