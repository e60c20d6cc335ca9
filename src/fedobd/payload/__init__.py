"""Payload: the byte format of `docs/format.md`: header, frames, encoding, decoding, checksum."""

from __future__ import annotations

from fedobd.payload._decode import (
    Block,
    DecodedSegment,
    Found,
    Payload,
    PayloadStream,
    refuse_not_finite,
)
from fedobd.payload._encode import (
    EncodedPayload,
    PayloadTraffic,
    Source,
    encode_payload,
    encode_payloads,
)
from fedobd.payload._frames import check_finite
from fedobd.payload._wire import (
    DEFAULT_LIMITS,
    VERSION,
    BlockTraffic,
    ByteCount,
    Bytes,
    Header,
    Kind,
    Limits,
    Report,
    add_traffic,
)

__all__ = [
    "DEFAULT_LIMITS",
    "VERSION",
    "Block",
    "BlockTraffic",
    "ByteCount",
    "Bytes",
    "DecodedSegment",
    "EncodedPayload",
    "Found",
    "Header",
    "Kind",
    "Limits",
    "Payload",
    "PayloadStream",
    "PayloadTraffic",
    "Report",
    "Source",
    "add_traffic",
    "check_finite",
    "encode_payload",
    "encode_payloads",
    "refuse_not_finite",
]
