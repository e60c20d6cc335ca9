"""Codec: numbers to bits and back: quantizers, the level coder, lossless planes, masks.

`codec.kernels` holds the compiled loops. It is imported when first needed, since numba takes its
time, and so it is no part of this face.
"""

from __future__ import annotations

from fedobd.codec._entropy import decode_levels, encode_levels
from fedobd.codec._masks import Mask
from fedobd.codec._planes import Words, compress, decompress, from_bytes, to_words
from fedobd.codec._quantization import (
    MASKED,
    MAX_LEVELS,
    MAX_RANGE,
    NNADQ,
    RAW,
    Coding,
    Float32,
    Levels,
    Quantizer,
    SegmentCode,
    Stochastic,
    Unquantized,
    check_positive,
    dequantize,
    level_bits,
)
from fedobd.codec._varint import MAX_VARINT_BYTES, read_varint, write_varint

__all__ = [
    "MASKED",
    "MAX_LEVELS",
    "MAX_RANGE",
    "MAX_VARINT_BYTES",
    "NNADQ",
    "RAW",
    "Coding",
    "Float32",
    "Levels",
    "Mask",
    "Quantizer",
    "SegmentCode",
    "Stochastic",
    "Unquantized",
    "Words",
    "check_positive",
    "compress",
    "decode_levels",
    "decompress",
    "dequantize",
    "encode_levels",
    "from_bytes",
    "level_bits",
    "read_varint",
    "to_words",
    "write_varint",
]
