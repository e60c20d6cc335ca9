"""Encoding: a model state to a payload, block by block, as chunks of bytes."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import torch

from fedobd._entropy import encode_levels
from fedobd._errors import UsageError
from fedobd._frames import PlainPart, check_finite, frozen_parts, lay_out, plain_dtype
from fedobd._planes import compress, to_bytes
from fedobd._quantization import Coding, Levels, Quantizer, SegmentCode, Unquantized
from fedobd._schema import Block, ModelSchema, Role, Segment, TensorSpec
from fedobd._varint import write_varint
from fedobd._wire import CHECKSUM, Header, pack_header

Source = Callable[[Segment], torch.Tensor]

_RAW, _MASKED = SegmentCode(Coding.RAW), SegmentCode(Coding.MASKED)


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
        source: gives the elements of a segment, 1-D, on any device: values, or for parameters of a
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
            for number in self.header.coded
        ]

    def _code(self, segment: Segment) -> SegmentCode:
        spec = self.schema.tensors[segment.tensor]
        values = self.source(segment)
        check_finite(spec.name, values.to(plain_dtype(self.schema, self.header, segment)))
        if spec.role is not Role.PARAMETER:
            return _RAW
        if self.header.mask is not None:
            return _MASKED
        if isinstance(self.quantizer, Unquantized):
            return _RAW
        as_float = values.to(torch.float32)
        if as_float.device.type != "cpu" and as_float.numel():
            as_float = torch.stack(torch.aminmax(as_float)).cpu()  # all that is measured
        return self.quantizer.measure(as_float.numpy(), spec.repr_bits)

    def chunks(
        self,
        codes: Sequence[Sequence[SegmentCode]],
        frozen: Callable[[TensorSpec], torch.Tensor] | None,
    ) -> Iterator[bytes]:
        """Yield everything but the checksum."""
        schema, header = self.schema, self.header
        yield pack_header(schema, header, codes)
        if header.holds_frozen(schema):
            if frozen is None:
                raise UsageError("an opening payload needs the values of the frozen tensors")
            values = {}
            for number in schema.frozen():
                spec = schema.tensors[number]
                values[number] = frozen(spec).reshape(-1)
                check_finite(spec.name, values[number])
            yield from self._plain_frame(
                frozen_parts(schema), lambda part: values[part.segment.tensor]
            )
        for number, block_codes in zip(header.coded, codes, strict=True):
            yield from self._frames(schema.blocks[number], block_codes)

    def _frames(self, block: Block, codes: Sequence[SegmentCode]) -> Iterator[bytes]:
        layout = lay_out(self.schema, self.header, block, codes)
        if layout.levels:
            levels = [self._levels(segment, code) for segment, code in layout.levels]
            stream = encode_levels(levels, self.executor)
            yield write_varint(len(stream)) + stream
        for parts in (layout.raw, layout.buffers):
            if parts:
                yield from self._plain_frame(parts, self._plain_values)

    def _levels(self, segment: Segment, code: SegmentCode) -> Levels:
        values = self.source(segment).to(torch.float32)
        return self.quantizer.quantize(
            values.numpy() if values.device.type == "cpu" else values,
            code,
            self.generator,
            self.executor,
        )

    def _plain_values(self, part: PlainPart) -> torch.Tensor:
        values = self.source(part.segment)
        return values if part.mask is None else values[part.mask.to(values.device)]

    def _plain_frame(
        self, parts: Sequence[PlainPart], values: Callable[[PlainPart], torch.Tensor]
    ) -> Iterator[bytes]:
        if self.header.is_lossless:
            plain = [to_bytes(values(part), part.dtype) for part in parts]
            frame = compress(plain, [part.dtype.itemsize for part in parts])
            yield write_varint(len(frame)) + frame
        else:
            yield write_varint(sum(part.num_bytes for part in parts))
            for part in parts:
                yield to_bytes(values(part), part.dtype)
