"""Encoding: model states to payloads, block by block, as chunks of bytes.

Payloads are made one at a time, or those of several clients together: their values then lie
stacked, with the clients first, and each segment is measured and quantized for all of them at
once, on whatever device it lies. The bytes of a payload are the same either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

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
from fedobd.payload._checksum import crc32
from fedobd.payload._frames import (
    BlockLayout,
    PlainPart,
    check_finite,
    frozen_parts,
    lay_out,
    plain_dtype,
)
from fedobd.payload._wire import CHECKSUM, Bytes, Header, pack_header

Source = Callable[[Segment], torch.Tensor]
"""Gives the elements of a segment, 1-D, or (clients, elements) where there are several."""

Codes = list[list[SegmentCode]]


def encode_payload(
    schema: ModelSchema,
    header: Header,
    source: Source,
    quantizer: Quantizer,
    *,
    generator: torch.Generator | None = None,
    frozen: Callable[[TensorSpec], torch.Tensor] | None = None,
    executor: Executor | None = None,
) -> Iterator[Bytes]:
    """Encode a payload, block by block.

    Args:
        schema: the model's schema.
        header: what it says.
        source: gives the elements of a segment, 1-D, on any device: values, or for parameters of a
            payload of differences the float32 differences.
        quantizer: how parameters are coded.
        generator: draws of a stochastic quantizer.
        frozen: gives the values of frozen tensors; wanted in an opening payload, and only there.
        executor: spreads the work on large blocks; the bytes are the same with and without.

    Yields:
        Chunks, which may be views of what the source gave; the payload is their concatenation.

    Raises:
        UsageError: a value is NaN or infinite; the message names the tensor.
    """
    chunks = encode_payloads(
        schema,
        [header],
        lambda segment: source(segment).unsqueeze(0),
        [quantizer],
        generator=lambda _: generator,
        frozen=frozen,
        executor=executor,
    )
    for _, chunk in chunks:
        yield chunk


def encode_payloads(
    schema: ModelSchema,
    headers: Sequence[Header],
    source: Source,
    quantizers: Sequence[Quantizer],
    *,
    generator: Callable[[int], torch.Generator | None],
    frozen: Callable[[TensorSpec], torch.Tensor] | None = None,
    executor: Executor | None = None,
) -> Iterator[tuple[int, Bytes]]:
    """Encode one payload a client, block by block for all of them.

    Args:
        schema: the model's schema.
        headers: what each says; all of one kind and method.
        source: as in `encode_payload`, for all clients, shape (clients, elements).
        quantizers: how each one's parameters are coded.
        generator: draws of a stochastic quantizer for a client, by its place among the headers.
        frozen: as in `encode_payload`.
        executor: likewise.

    Yields:
        A client's place and a chunk of its payload, which may be a view of what the source gave.

    Raises:
        UsageError: a value is NaN or infinite; the message names the tensor.
    """
    encoding = _Encoding(schema, headers, source, quantizers, generator, executor)
    checksums = [0] * len(headers)
    codes = encoding.measure()
    for place, chunk in encoding.chunks(codes, frozen):
        checksums[place] = crc32(chunk, checksums[place])
        yield place, chunk
    for place, checksum in enumerate(checksums):
        yield place, CHECKSUM.pack(checksum)


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
            found = [self._codes(s, places) for s in self.schema.blocks[number].segments]
            for place, *own in zip(places, *found, strict=True):
                codes[place].append(own)
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

    def chunks(
        self,
        codes: Sequence[Codes],
        frozen: Callable[[TensorSpec], torch.Tensor] | None,
    ) -> Iterator[tuple[int, Bytes]]:
        """Yield everything but the checksums."""
        schema = self.schema
        for place, header in enumerate(self.headers):
            yield place, pack_header(schema, header, codes[place])
            if header.holds_frozen(schema):
                for chunk in _frozen_frame(schema, header, frozen):
                    yield place, chunk
        coming = [iter(own) for own in codes]
        for number, places in self._holders():
            layouts = [
                lay_out(schema, self.headers[place], number, next(coming[place]))
                for place in places
            ]
            yield from self._frames(number, places, layouts)

    def _frames(
        self, number: int, places: Sequence[int], layouts: Sequence[BlockLayout]
    ) -> Iterator[tuple[int, Bytes]]:
        """Yield the frames of a block, client by client."""
        levels = self._levels(number, places, layouts)
        words: dict[Segment, Words] = {}
        for row, (place, layout) in enumerate(zip(places, layouts, strict=True)):
            if layout.levels:
                stream = encode_levels(levels[row], self.executor)
                yield place, write_varint(len(stream)) + stream
            for parts in (layout.raw, layout.buffers):
                for part in parts:
                    if part.segment not in words:
                        values = self._values(part.segment, places)
                        words[part.segment] = to_words(values, part.dtype)
                own = [words[part.segment][row] for part in parts]
                for chunk in _plain_frame(self.headers[place], parts, own):
                    yield place, chunk

    def _levels(
        self, number: int, places: Sequence[int], layouts: Sequence[BlockLayout]
    ) -> list[list[Levels]]:
        """Return the levels of a block's segments for each client, quantized all at once."""
        codes = [dict(layout.levels) for layout in layouts]
        levels: list[list[Levels]] = [[] for _ in places]
        for segment in self.schema.blocks[number].segments if any(codes) else ():
            coded = [row for row, own in enumerate(codes) if segment in own]
            for _, group in groupby(coded, lambda row: self.quantizers[places[row]]):
                rows = list(group)
                own_codes = [codes[row][segment] for row in rows]
                made = self._quantize(segment, [places[row] for row in rows], own_codes)
                for row, own in zip(rows, made, strict=True):
                    levels[row].append(own)
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
) -> Iterator[Bytes]:
    """Yield a frame of plain values; nothing for no parts."""
    if not parts:
        return
    plain = [
        (own if part.mask is None else own[part.mask.numpy()]).view(np.uint8).data
        for part, own in zip(parts, words, strict=True)
    ]
    if header.is_lossless:
        frame = compress(plain, [part.dtype.itemsize for part in parts])
        yield write_varint(len(frame)) + frame
    else:
        yield write_varint(sum([part.num_bytes for part in parts]))
        yield from plain


def _frozen_frame(
    schema: ModelSchema, header: Header, frozen: Callable[[TensorSpec], torch.Tensor] | None
) -> Iterator[Bytes]:
    """Yield the frame of the frozen tensors."""
    if frozen is None:
        raise UsageError("an opening payload needs the values of the frozen tensors")
    parts, words = frozen_parts(schema), []
    for part in parts:
        spec = schema.tensors[part.segment.tensor]
        values = frozen(spec).reshape(-1)
        check_finite(spec.name, values)
        words.append(to_words(values, part.dtype))
    yield from _plain_frame(header, parts, words)


def _extremes(values: torch.Tensor) -> Float32:
    """Return the least and the largest value of each client, all that is measured."""
    if values.shape[1] == 0:
        return values.cpu().numpy()
    if values.device.type == "cpu":
        array, found = values.numpy(), np.empty((len(values), 2), np.float32)
        array.min(axis=1, out=found[:, 0])
        array.max(axis=1, out=found[:, 1])
        return found
    return torch.stack(torch.aminmax(values, dim=1), dim=1).cpu().numpy()
