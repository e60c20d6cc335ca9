"""fedobd: federated training of large networks with little traffic, in bytes really sent."""

from __future__ import annotations

from fedobd._errors import DecodeError, DecodeReason, EmptyRoundError, FedOBDError, UsageError
from fedobd.blocks import (
    Block,
    BlockRules,
    ModelSchema,
    ModelState,
    Role,
    Segment,
    TensorSpec,
    decompose,
    decompose_names,
    get_state,
    guess_roles,
    load_state,
)
from fedobd.codec import NNADQ, Stochastic, Unquantized
from fedobd.methods import METHODS, SMAFD, Codec, FedAvg, FedDropoutAvg, FedOBD, FedPAQ
from fedobd.payload import BlockTraffic, ByteCount, Header, Limits, Payload, PayloadStream, Report
from fedobd.sessions import (
    Broadcast,
    ClientSession,
    EarlyStop,
    Method,
    Refusal,
    RoundPlan,
    RoundRecord,
    SavedSession,
    ServerSession,
    Stage,
    TransferSpec,
    UplinkContext,
    UploadRecord,
)

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "NNADQ",
    "SMAFD",
    "Block",
    "BlockRules",
    "BlockTraffic",
    "Broadcast",
    "ByteCount",
    "ClientSession",
    "Codec",
    "DecodeError",
    "DecodeReason",
    "EarlyStop",
    "EmptyRoundError",
    "FedAvg",
    "FedDropoutAvg",
    "FedOBD",
    "FedOBDError",
    "FedPAQ",
    "Header",
    "Limits",
    "Method",
    "ModelSchema",
    "ModelState",
    "Payload",
    "PayloadStream",
    "Refusal",
    "Report",
    "Role",
    "RoundPlan",
    "RoundRecord",
    "SavedSession",
    "Segment",
    "ServerSession",
    "Stage",
    "Stochastic",
    "TensorSpec",
    "TransferSpec",
    "Unquantized",
    "UplinkContext",
    "UploadRecord",
    "UsageError",
    "decompose",
    "decompose_names",
    "get_state",
    "guess_roles",
    "load_state",
]
