"""fedobd: federated training of large networks with little traffic, in bytes really sent."""

from __future__ import annotations

from fedobd._blocks import BlockRules, decompose
from fedobd._client import Broadcast, ClientSession
from fedobd._codec import Codec
from fedobd._errors import DecodeError, DecodeReason, EmptyRoundError, FedOBDError, UsageError
from fedobd._method import Method, Shipment, UplinkContext
from fedobd._naming import decompose_names, guess_roles
from fedobd._payload import Payload, PayloadStream
from fedobd._quantization import NNADQ, Stochastic, Unquantized
from fedobd._rounds import (
    EarlyStop,
    Refusal,
    RoundPlan,
    RoundRecord,
    Stage,
    UploadRecord,
)
from fedobd._schema import Block, ModelSchema, Role, Segment, TensorSpec
from fedobd._server import SavedSession, ServerSession
from fedobd._state import ModelState, get_state, load_state
from fedobd._wire import BlockTraffic, ByteCount, Header, Limits, Report
from fedobd.methods import METHODS, SMAFD, FedAvg, FedDropoutAvg, FedOBD, FedPAQ

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
    "Shipment",
    "Stage",
    "Stochastic",
    "TensorSpec",
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
