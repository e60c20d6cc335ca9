"""Share: the part of a round's uploads that one worker takes in itself.

The worker adds what it has encoded to sums in memory that the main process sees too, and sends
back records. So uploads are neither carried nor decoded by one process for all, which with many
workers, or tiny models, would be what a round waits for.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedobd.blocks import ModelSchema, ModelState, Role, TensorSpec
from fedobd.payload import Bytes
from fedobd.sessions import Aggregator, Method, Sums, UploadRules
from fedobd.simulation._files import write_over

_ALIGNMENT = 64  # bytes


@dataclass(frozen=True, slots=True)
class ShareTerms:
    """What an aggregator in another process needs to do as the server's.

    Args:
        rules: those of the server's aggregator.
        reference: the file with the server's values.
    """

    rules: UploadRules
    reference: Path

    @classmethod
    def write(cls, aggregator: Aggregator, file: Path) -> ShareTerms:
        """Write the server's values to a file, over what was there."""
        chunks: list[Bytes] = []
        end = 0
        for spec, _, start in _places(aggregator.schema):
            values = aggregator.reference[spec.name].contiguous().reshape(-1).numpy()
            chunks += bytes(start - end), values.view(np.uint8).data
            end = start + values.nbytes
        write_over(file, chunks)
        return cls(aggregator.rules, file)

    def open(self, method: Method, schema: ModelSchema, memory: Sums) -> Aggregator:
        """Return an aggregator whose sums lie in some memory, which is set to 0."""
        memory.fill(0)
        with self.reference.open("rb") as stream:
            whole = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        reference: ModelState = {}
        for spec, dtype, start in _places(schema):
            count = spec.num_elements
            values = torch.empty(0, dtype=dtype)  # which `frombuffer` refuses to make
            if count:
                values = torch.frombuffer(whole, dtype=dtype, count=count, offset=start)
            reference[spec.name] = values.reshape(spec.shape)
        return Aggregator(method, schema, self.rules, reference, memory=memory)


def _places(schema: ModelSchema) -> Iterator[tuple[TensorSpec, torch.dtype, int]]:
    """Yield all but the frozen tensors, the type of each and where its bytes begin."""
    start = 0
    for spec in schema.tensors:
        if spec.role is not Role.FROZEN:
            dtype = torch.float32 if spec.is_floating else spec.dtype
            yield spec, dtype, start
            start += -(-spec.num_elements * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
