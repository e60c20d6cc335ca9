"""Options of sessions that change no value: lossless plain values, and executors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch import nn

from fedobd import Broadcast, ClientSession, DecodeError, Payload
from fedobd.payload import Kind
from tests.session_helpers import SHORT_METHODS, bits, every_method, make_schema, set_up

# --- lossless ------------------------------------------------------------------------------------


def trained_like() -> nn.Module:
    """Layers large enough for their values to be worth compressing."""
    model = nn.Sequential(
        nn.Embedding(60, 40), nn.Linear(40, 120), nn.BatchNorm1d(120), nn.Linear(120, 130)
    )
    model[0].requires_grad_(False)
    return model


@every_method
@pytest.mark.parametrize("is_shared", [False, True])
def test_lossless_gives_the_same_run_in_fewer_bytes(name: str, is_shared: bool) -> None:
    plain = SHORT_METHODS[name]
    lossless = dataclasses.replace(plain, lossless=True)  # type: ignore[type-var]
    runs = [set_up(method, trained_like(), shared_start=is_shared) for method in (plain, lossless)]
    logs = [engine.run(server) for server, engine in runs]
    schema = runs[0][1].schema
    totals = [0, 0]
    for one, other in zip(*logs, strict=True):
        pairs = [
            (one.broadcast, other.broadcast),
            *((one.openings[c], other.openings[c]) for c in one.openings),
            *((one.uploads[c], other.uploads[c]) for c in one.uploads),
        ]
        for pair in pairs:
            first, second = (Payload.parse(data, schema) for data in pair)
            assert (first.header.is_lossless, second.header.is_lossless) == (False, True)
            assert all_bits(first) == all_bits(second)
            assert first.num_bytes.nominal_bits == second.num_bytes.nominal_bits
            assert first.num_bytes.levels == second.num_bytes.levels
            totals = [total + len(data) for total, data in zip(totals, pair, strict=True)]
    assert bits(runs[0][0].state) == bits(runs[1][0].state)
    quantized = name in ("fedobd", "fedpaq")  # what is left there are raw parts and buffers
    assert totals[1] < (1.0 if quantized else 0.95) * totals[0]


def all_bits(payload: Payload) -> list[Any]:
    found: list[Any] = [bits({spec.name: values}) for spec, values in payload.frozen()]
    for number, segments in payload.blocks():
        found += [(number, d.segment, bits({"": d.values})) for d in segments]
    return found


# --- executors -----------------------------------------------------------------------------------


def large() -> nn.Module:
    """A block of more than 2^18 elements."""
    return nn.Sequential(nn.Linear(520, 520), nn.BatchNorm1d(520), nn.Linear(520, 3))


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.mark.parametrize("name", ["fedobd", "fedpaq", "fedavg"])
def test_an_executor_changes_no_byte(name: str, pool: ThreadPoolExecutor) -> None:
    method = SHORT_METHODS[name]
    alone, spread = set_up(method, large()), set_up(method, large(), executor=pool)
    assert max(block.num_parameters for block in alone[1].schema.blocks) > 1 << 18
    for _ in range(2):
        one, other = alone[1].play(alone[0]), spread[1].play(spread[0])
        assert one is not None
        assert other is not None
        assert one.emitted() == other.emitted()
        assert one.record == other.record
        assert [bits(s) for s in one.starts.values()] == [bits(s) for s in other.starts.values()]
        decoded = Broadcast.decode(one.broadcast, method, alone[1].schema, executor=pool)
        streamed = Broadcast.decode([one.broadcast], method, alone[1].schema, executor=pool)
        assert bits(decoded.values) == bits(streamed.values)
    assert bits(alone[0].state) == bits(spread[0].state)
    deliveries = [server.delivery().data for server in (alone[0], spread[0])]
    assert deliveries[0] == deliveries[1]


def test_a_damaged_block_is_refused_with_an_executor_too(pool: ThreadPoolExecutor) -> None:
    method = SHORT_METHODS["fedobd"]
    server, engine = set_up(method, large(), executor=pool)
    log = engine.play(server)
    assert log is not None
    for place in (len(log.broadcast) // 3, len(log.broadcast) // 2):
        altered = bytearray(log.broadcast)
        altered[place] ^= 0x55
        with pytest.raises(DecodeError):
            Broadcast.decode([bytes(altered)], method, engine.schema, executor=pool)
    session = ClientSession(method, make_schema(large(), method), client=0, executor=pool)
    with pytest.raises(DecodeError, match="kind BROADCAST came; wanted INITIAL"):
        session.initialize(log.broadcast)
    assert Broadcast.decode(log.broadcast, method, engine.schema, Kind.BROADCAST, pool).values
