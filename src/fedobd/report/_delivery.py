"""Delivery: what the levels of the trained model hold, block by block, in bits a parameter.

The model of a run that has ended is quantized as its method's broadcasts are, and coded as its
delivery is; beside what that takes stands the entropy of its levels.
"""

from __future__ import annotations

import math

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file

from fedobd._errors import UsageError
from fedobd._seeds import make_generator
from fedobd.blocks import Block, Role, master_state, segment_of
from fedobd.codec import Coding, Levels, Unquantized, encode_levels, level_bits
from fedobd.report._run import BlockBits, Run


def delivery_bits(run: Run) -> BlockBits | None:
    """Return the bits of each block in the delivery of a run's trained model.

    They are None where there is no such model, or the method does not quantize broadcasts.
    """
    quantizer = run.config.chosen.downlink({}, run.schema).quantizer
    if isinstance(quantizer, Unquantized) or not run.model_file.is_file():
        return None
    try:
        state = master_state(run.schema, load_file(run.model_file))
    except (SafetensorError, OSError, UsageError) as error:
        raise UsageError(f"model {str(run.model_file)!r} cannot be read: {error}") from error
    generator = make_generator(run.seed, "downlink", len(run.rounds))

    def levels_of(block: Block) -> list[Levels]:
        quantized = []
        for segment in block.segments:
            spec = run.schema.tensors[segment.tensor]
            if spec.role is Role.PARAMETER:
                values = segment_of(state, spec, segment).numpy()
                code = quantizer.measure(values, spec.repr_bits)
                if code.coding is Coding.LEVELS:
                    quantized.append(quantizer.quantize(values, code, generator))
        return quantized

    rows = np.array([_bits(levels_of(block)) for block in run.schema.blocks])
    return BlockBits(real=rows[:, 0], nominal=rows[:, 1], entropy=rows[:, 2])


def _bits(levels: list[Levels]) -> tuple[float, float, float]:
    """Return real and nominal bits and entropy of a quantized parameter of a block."""
    if not levels:
        return math.nan, math.nan, math.nan
    count = sum(tensor.symbols.size for tensor in levels)
    nominal = sum(tensor.symbols.size * level_bits(tensor.num_levels) for tensor in levels)
    entropy = sum(map(_entropy_bits, levels))
    return 8 * len(encode_levels(levels)) / count, nominal / count, entropy / count


def _entropy_bits(levels: Levels) -> float:
    """Return the entropy of all elements of a tensor together, in bits."""
    counts = np.bincount(levels.symbols)
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / levels.symbols.size)).sum())


def bits_by_way(run: Run, delivery: BlockBits | None) -> dict[str, BlockBits]:
    """Return the bits of each block up, down, and in the delivery where there is one."""
    ways = {"up": run.uplink.bits(run.schema), "down": run.downlink.bits(run.schema)}
    return ways if delivery is None else {**ways, "delivery": delivery}
