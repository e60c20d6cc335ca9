"""A caller can lower what a reader takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedobd import (
    ClientSession,
    Codec,
    DecodeError,
    DecodeReason,
    FedOBD,
    Limits,
    Payload,
    PayloadStream,
    Report,
    ServerSession,
    UsageError,
    decompose,
    get_state,
)


def made() -> tuple[ServerSession, bytes, Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 3)
    schema, method = decompose(model), FedOBD(codec=Codec(dropout_rate=0.0))
    server = ServerSession(
        method, schema, get_state(model), num_clients=1, limits=Limits(max_payload_bytes=100)
    )
    plan = server.begin_round()
    assert plan is not None
    client = ClientSession(method, schema, client=0)
    start = client.receive(server.broadcast().data)
    trained = {name: value + torch.randn_like(value) for name, value in start.items()}
    return server, client.upload(trained, Report(num_examples=1, train_loss=0)).data, schema


def whole(data: bytes, schema: Any, limits: Limits) -> None:
    Payload.parse(data, schema, limits)


def in_pieces(data: bytes, schema: Any, limits: Limits) -> None:
    for _ in PayloadStream(
        [data[i : i + 7] for i in range(0, len(data), 7)], schema, limits
    ).blocks():
        pass


@pytest.mark.parametrize("read", [whole, in_pieces])
def test_length_and_levels_can_be_limited(read: Callable[[bytes, Any, Limits], None]) -> None:
    server, _, schema = made()
    data = server.broadcast().data
    levels = [code.num_levels for _, _, code in Payload.parse(data, schema).codes()]
    read(data, schema, Limits(max_payload_bytes=len(data), max_levels=max(levels)))
    for limits in (Limits(max_payload_bytes=len(data) - 1), Limits(max_levels=max(levels) - 1)):
        with pytest.raises(DecodeError) as caught:
            read(data, schema, limits)
        assert caught.value.reason is DecodeReason.LIMIT


def test_a_server_refuses_uploads_above_its_limit() -> None:
    server, upload, _ = made()
    assert len(upload) > 100
    with pytest.raises(DecodeError, match=r"bytes came; at most 100 are taken \[limit\]"):
        server.receive(0, upload)


@pytest.mark.parametrize(
    "change", [{"max_levels": 0}, {"max_levels": 2**22 + 1}, {"max_payload_bytes": 0}]
)
def test_wrong_limits_are_refused(change: dict[str, int]) -> None:
    (name,) = change
    with pytest.raises(UsageError, match=f"{name} is {change[name]}; allowed are 1 to"):
        Limits(**change)
