"""The client of a test app: the product's, which spoils its uploads.

What it does in rounds 1, 2, … stands in `faults` of the node config, one word of `FAULTS` for each
round; a node without it is honest, and so is each after its last word.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from unittest import mock

import torch
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from torch import nn

from fedobd import (
    ClientSession,
    FedOBD,
    Report,
    Role,
    Segment,
    ServerSession,
    decompose,
    get_state,
)
from fedobd.codec import Unquantized
from fedobd.experiments import build_experiment, load_config
from fedobd.flower import make_client_app
from fedobd.payload import Payload, encode_payload
from fedobd.payload._wire import HEADER_FIELDS

FAULTS = ("truncated", "altered", "another-model", "nan", "examples", "raises", "silent")

CLAIMED_EXAMPLES = 10**9

CONFIG = Path(__file__).with_name("config.toml")


class HostileClient(ClientApp):
    """Hands each message on to another app, and spoils the answer."""

    def __init__(self, inner: ClientApp) -> None:
        super().__init__()
        self._inner = inner

    def __call__(self, message: Message, context: Context) -> Message:
        number = message.metadata.group_id
        faults = str(context.node_config.get("faults", "")).split()
        if not number.isdigit() or int(number) > len(faults):
            return self._inner(message, context)
        fault = faults[int(number) - 1]
        if fault == "raises":
            raise RuntimeError("this client does not want to")
        reply = self._inner(message, context)
        array = reply.content.array_records["arrays"]["payload"]
        del reply.content["arrays"]
        if fault != "silent":
            spoiled = spoil(array.data, fault)
            upload = Array(array.dtype, (len(spoiled),), array.stype, spoiled)
            reply.content["arrays"] = ArrayRecord({"payload": upload})
        return reply


def spoil(upload: bytes, fault: str) -> bytes:
    """Return what a hostile client sends in place of an upload."""
    match fault:
        case "truncated":
            return upload[: len(upload) // 2]
        case "altered":
            middle = len(upload) // 2
            return upload[:middle] + bytes([upload[middle] ^ 1]) + upload[middle + 1 :]
        case "another-model":
            return upload_of_another_model()
        case "nan":
            return upload_of_nan(upload)
        case "examples":
            return with_num_examples(upload, CLAIMED_EXAMPLES)
    raise ValueError(f"fault {fault!r} is unknown; allowed are {', '.join(FAULTS)}")


def upload_of_another_model() -> bytes:
    """Return what an honest client of another run sends."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    method, schema = FedOBD(cohort=1), decompose(model)
    server = ServerSession(method, schema, get_state(model), num_clients=1)
    server.begin_round()
    client = ClientSession(method, schema, client=0)
    received = client.receive(server.broadcast().data)
    trained = {name: values + 1 for name, values in received.items()}
    return client.upload(trained, Report(num_examples=1, train_loss=0.0)).data


def upload_of_nan(upload: bytes) -> bytes:
    """Return an upload whose parameters are all NaN, under a checksum that holds."""
    schema = build_experiment(load_config(str(CONFIG))).schema
    header = Payload.parse(upload, schema).header

    def source(segment: Segment) -> torch.Tensor:
        spec, length = schema.tensors[segment.tensor], segment.stop - segment.start
        if spec.role is Role.PARAMETER:
            return torch.full((length,), torch.nan)
        return torch.zeros(length, dtype=spec.dtype)

    with mock.patch("fedobd.payload._encode.check_finite"):  # an honest encoder refuses them
        return encode_payload(schema, header, source, Unquantized()).data


def with_num_examples(upload: bytes, num_examples: int) -> bytes:
    """Return the upload with another number of examples, under a checksum that holds."""
    body = bytearray(upload[:-4])
    fields = "<" + "".join(code for _, code in HEADER_FIELDS) + "I"  # the client's number
    struct.pack_into("<Q", body, struct.calcsize(fields), num_examples)
    return bytes(body) + struct.pack("<I", zlib.crc32(body))


app = HostileClient(make_client_app(CONFIG))
