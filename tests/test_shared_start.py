"""Runs whose clients hold the initial model already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedobd import (
    SMAFD,
    Broadcast,
    DecodeError,
    DecodeReason,
    Payload,
    SavedSession,
    ServerSession,
    UsageError,
)
from fedobd.blocks import state_fingerprint
from fedobd.experiments import run
from tests.session_helpers import (
    MODELS,
    NUM_CLIENTS,
    SEED,
    SHORT_METHODS,
    Engine,
    RoundLog,
    bits,
    every_method,
    make_state,
    set_up,
)
from tests.test_runner import records, results
from tests.toy import Interrupted, Stopper, config

every_model = pytest.mark.parametrize("kind", sorted(MODELS))


def shared(name: str, kind: str) -> tuple[ServerSession, Engine]:
    return set_up(SHORT_METHODS[name], MODELS[kind](), shared_start=True)


def header_bytes(engine: Engine) -> int:
    """The most bytes that a payload which holds no value may have."""
    return 200 + (len(engine.schema.blocks) + 7) // 8


@every_method
def test_a_client_keeps_no_more_of_the_initial_model_than_without_it(name: str) -> None:
    server, engine = shared(name, "frozen")
    plan = server.begin_round()
    assert plan is not None
    client = engine.session(plan.cohort[0])
    client.initialize(server.initial_payload(plan.cohort[0]).data)
    names = {spec.name for spec in engine.schema.tensors}
    assert set(client.state) == (names if name == "smafd" else {"0.weight"})


@every_method
@every_model
def test_the_first_broadcast_and_openings_are_a_fingerprint(name: str, kind: str) -> None:
    server, engine = shared(name, kind)
    logs = engine.run(server)
    assert len(logs) > 2
    initial = make_state(MODELS[kind]())
    wanted = state_fingerprint(engine.schema, initial)
    first = Payload.parse(logs[0].broadcast, engine.schema)
    assert first.header.start == wanted
    assert list(first.blocks()) == []
    assert len(logs[0].broadcast) < header_bytes(engine)
    for values in logs[0].starts.values():
        assert bits(values) == bits(initial)
    for log in logs:
        assert log.record is not None
        for opening in log.openings.values():
            assert len(opening) < header_bytes(engine)
            assert Payload.parse(opening, engine.schema).header.start == wanted
    for log in logs[1:]:
        header = Payload.parse(log.broadcast, engine.schema).header
        assert header.start is None
        assert len(log.broadcast) > header_bytes(engine) / 2
    assert Payload.parse(server.delivery().data, engine.schema).header.start is None


@pytest.mark.parametrize("name", ["fedavg", "feddropoutavg"])
@every_model
def test_uploads_equal_those_of_clients_that_got_the_exact_values(name: str, kind: str) -> None:
    ours, theirs = shared(name, kind), set_up(SHORT_METHODS[name], MODELS[kind]())
    for one, other in zip(ours[1].run(ours[0]), theirs[1].run(theirs[0]), strict=True):
        assert one.uploads == other.uploads
        assert one.plan == other.plan
        if one.plan.round > 1:
            assert one.broadcast == other.broadcast
    assert bits(ours[0].state) == bits(theirs[0].state)


@every_method
def test_a_client_with_another_model_is_refused(name: str) -> None:
    server, engine = shared(name, "frozen")
    assert engine.start is not None
    wanted = state_fingerprint(engine.schema, engine.start)
    other = {key: value.clone() for key, value in engine.start.items()}
    next(iter(other.values())).reshape(-1)[0] += 1e-3
    own = state_fingerprint(engine.schema, other)
    assert own != wanted
    engine.start = other
    plan = server.begin_round()
    assert plan is not None
    number = plan.cohort[0]
    match = f"client {number} holds another initial model .*{own.hex()}, wanted {wanted.hex()}"
    with pytest.raises(DecodeError, match=match) as caught:
        engine.session(number).receive(server.broadcast().data)
    assert caught.value.reason is DecodeReason.START
    with pytest.raises(DecodeError, match=match) as caught:
        engine.session(number).initialize(server.initial_payload(number).data)
    assert caught.value.reason is DecodeReason.START


@every_method
def test_a_client_without_the_model_is_told_so(name: str) -> None:
    server, engine = shared(name, "frozen")
    engine.start = None
    plan = server.begin_round()
    assert plan is not None
    number = plan.cohort[0]
    match = f"client {number}: this run starts from a model that its clients hold already"
    with pytest.raises(UsageError, match=match):
        engine.session(number).receive(server.broadcast().data)
    with pytest.raises(UsageError, match=match):
        engine.session(number).initialize(server.initial_payload(number).data)


def test_a_start_that_does_not_fit_the_schema_is_refused() -> None:
    server, engine = shared("fedavg", "bf16")
    assert engine.start is not None
    engine.start = dict(list(engine.start.items())[1:])
    plan = server.begin_round()
    assert plan is not None
    with pytest.raises(UsageError, match="the state holds no value for tensor"):
        engine.session(plan.cohort[0]).receive(server.broadcast().data)


@every_model
def test_a_client_of_smafd_that_joins_later_has_the_initial_values(kind: str) -> None:
    method = SMAFD(rounds=6, epochs=1, cohort=2)
    server, engine = set_up(method, MODELS[kind](), num_clients=8, shared_start=True)
    initial = make_state(MODELS[kind]())
    joined = 0
    for log in engine.run(server):
        if log.plan.round == 1:
            continue
        sent = Broadcast.decode(log.broadcast, method, engine.schema)
        in_broadcast = {
            segment.tensor
            for number in sent.header.block_ids
            for segment in engine.schema.blocks[number].segments
        }
        for client in log.openings:
            for number, spec in enumerate(engine.schema.tensors):
                came = log.starts[client][spec.name]
                source = sent.values if number in in_broadcast else initial
                assert torch.equal(came, source[spec.name])
            joined += len(in_broadcast) < len(engine.schema.tensors)
    assert joined


def played(logs: list[RoundLog]) -> list[Any]:
    return [(log.emitted(), log.record) for log in logs]


@every_method
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_run_goes_on_from_a_saved_session(name: str, after: int) -> None:
    server, engine = shared(name, "frozen")
    wanted = played(engine.run(server))

    first, engine = shared(name, "frozen")
    logs = [engine.play(first) for _ in range(after)]
    saved = first.save()
    values = json.loads(json.dumps(saved.values))
    second = ServerSession(
        engine.method,
        engine.schema,
        make_state(MODELS["frozen"](), 99),  # what it begins with does not matter
        num_clients=NUM_CLIENTS,
        seed=SEED,
    )
    second.restore(SavedSession(saved.tensors, values))
    logs += engine.run(second)
    assert played([log for log in logs if log is not None]) == wanted
    assert bits(second.state) == bits(server.state)


@pytest.mark.parametrize("name", ["fedobd", "smafd", "fedavg"])
def test_a_configured_run_shares_its_start_and_resumes(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "federation": {"shared_start": True},
        "model": {"options": {"frozen": True}},
    }
    chosen = config(name, **options, output={"keep_payloads": True})
    run(chosen, tmp_path / "whole")
    broadcast = tmp_path / "whole" / "payloads" / "round-0001" / "broadcast.fobd"
    assert broadcast.stat().st_size < 200
    with pytest.raises(Interrupted):
        run(chosen, tmp_path / "cut", callbacks=[Stopper(1)])
    assert len(records(tmp_path / "cut")) == 1
    run(chosen, tmp_path / "cut", resume=True)
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


def test_a_configured_run_of_fedavg_ends_with_the_same_model(tmp_path: Path) -> None:
    run(config("fedavg"), tmp_path / "sent")
    run(config("fedavg", federation={"shared_start": True}), tmp_path / "shared", workers=2)
    sent, held = (records(tmp_path / which) for which in ("sent", "shared"))
    assert sent[0]["downlink_bytes"] > 10 * held[0]["downlink_bytes"]
    assert [r["uplink_bytes"] for r in sent] == [r["uplink_bytes"] for r in held]
    models = [(tmp_path / w / "model.safetensors").read_bytes() for w in ("sent", "shared")]
    assert models[0] == models[1]
