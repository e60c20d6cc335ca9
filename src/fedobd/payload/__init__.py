"""Payload: the byte format of `docs/format.md`: header, frames, encoding, decoding, checksum."""

from __future__ import annotations

from fedobd.payload._cursor import DEFAULT_LIMITS, MAX_EXAMPLES, Bytes, Limits
from fedobd.payload._decode import (
    DecodedBlock,
    DecodedSegment,
    Payload,
    PayloadStream,
    SegmentView,
    refuse_not_finite,
)
from fedobd.payload._encode import (
    EncodedPayload,
    Source,
    encode_payload,
    encode_payloads,
)
from fedobd.payload._frames import check_finite
from fedobd.payload._header import Header, Kind, Report
from fedobd.payload._traffic import BlockTraffic, ByteCount, PayloadTraffic, add_traffic
from fedobd.payload._wire import VERSION

__all__ = [
    "DEFAULT_LIMITS",
    "MAX_EXAMPLES",
    "VERSION",
    "BlockTraffic",
    "ByteCount",
    "Bytes",
    "DecodedBlock",
    "DecodedSegment",
    "EncodedPayload",
    "Header",
    "Kind",
    "Limits",
    "Payload",
    "PayloadStream",
    "PayloadTraffic",
    "Report",
    "SegmentView",
    "Source",
    "add_traffic",
    "check_finite",
    "encode_payload",
    "encode_payloads",
    "refuse_not_finite",
]
