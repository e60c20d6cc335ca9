"""The contract that every registered method meets, on every kind of model.

A new method is one line in `SHORT_METHODS` of session_helpers.py, and meets all of this.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from fedobd import (
    METHODS,
    SMAFD,
    ClientSession,
    Codec,
    EarlyStop,
    FedAvg,
    FedDropoutAvg,
    FedOBD,
    FedPAQ,
    Method,
    ModelState,
    Payload,
    SavedSession,
    ServerSession,
    Stochastic,
    UsageError,
)
from fedobd.codec import Coding
from fedobd.methods import method_of_wire_id
from fedobd.payload import Kind, Limits
from tests.session_helpers import (
    MODELS,
    NUM_CLIENTS,
    SHORT_METHODS,
    Engine,
    RoundLog,
    bits,
    every_method,
    make_report,
    make_state,
    record_of,
    set_up,
)

every_model = pytest.mark.parametrize("kind", sorted(MODELS))

EXTRA_METHODS: dict[str, Method] = {
    "fedobd-sq": FedOBD(
        codec=Codec(uplink_quantizer="stochastic", downlink_quantizer="stochastic"),
        stage_one_rounds=2,
        stage_two_epochs=1,
    ),
    "fedobd-random-blocks": FedOBD(
        codec=Codec(selection="random"), stage_one_rounds=3, stage_two_epochs=0
    ),
    "fedobd-no-dropout": FedOBD(
        codec=Codec(selection="none", uplink_quantizer="none", downlink_quantizer="none"),
        stage_one_rounds=2,
        stage_two_epochs=1,
    ),
}
"""The paper's ablations, which meet the same laws."""

ALL_METHODS = {**SHORT_METHODS, **EXTRA_METHODS}


def played(
    method: Method, kind: str, order: Callable[[Sequence[int]], Sequence[int]] = tuple, **kw: Any
) -> tuple[ServerSession, Engine, list[RoundLog]]:
    server, engine = set_up(method, MODELS[kind](), **kw)
    return server, engine, engine.run(server, order)


# --- the registry --------------------------------------------------------------------------------


def test_the_registry_holds_the_five_methods_by_name() -> None:
    assert {
        "fedobd": FedOBD,
        "fedavg": FedAvg,
        "fedpaq": FedPAQ,
        "feddropoutavg": FedDropoutAvg,
        "smafd": SMAFD,
    } == METHODS
    assert all(name == method.name for name, method in METHODS.items())


def test_every_registered_method_stands_in_this_contract() -> None:
    assert {name: type(method) for name, method in SHORT_METHODS.items()} == METHODS


def test_wire_ids_are_unique_and_fit_one_byte() -> None:
    ids = [method.wire_id for method in METHODS.values()]
    assert len(set(ids)) == len(ids)
    assert all(1 <= wire_id <= 255 for wire_id in ids)


def test_wire_ids_never_change() -> None:
    assert {name: method.wire_id for name, method in METHODS.items()} == {
        "fedavg": 1,
        "fedpaq": 2,
        "feddropoutavg": 3,
        "smafd": 4,
        "fedobd": 5,
    }


def test_a_method_is_found_by_its_wire_id() -> None:
    assert [method_of_wire_id(m.wire_id) for m in METHODS.values()] == list(METHODS.values())
    with pytest.raises(UsageError, match="no method has the number 255 in the payload format"):
        method_of_wire_id(255)


@every_method
def test_options_are_frozen_comparable_values_with_defaults(name: str) -> None:
    method = METHODS[name]()
    assert method == METHODS[name]()
    assert hash(method) == hash(METHODS[name]())
    assert method != SHORT_METHODS[name]
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.cohort = 3  # type: ignore[attr-defined]


@every_method
def test_the_published_rounds_are_the_defaults(name: str) -> None:
    stages = METHODS[name]().stages()
    assert [(s.number, s.rounds, s.epochs) for s in stages] == (
        [(1, 100, 5), (2, 10, 1)] if name == "fedobd" else [(1, 100, 5)]
    )
    assert stages[0].cohort == (1.0 if name == "fedavg" else 0.5)
    assert FedPAQ().levels == Stochastic().num_levels == 255


# --- whole runs ----------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("name", sorted(ALL_METHODS))
def test_a_short_run_ends_and_changes_what_was_uploaded_and_nothing_else(
    name: str, kind: str
) -> None:
    server, engine, logs = played(ALL_METHODS[name], kind)
    assert len(logs) == server.rounds == server.planned_rounds
    assert [log.plan.round for log in logs] == list(range(1, len(logs) + 1))
    assert server.begin_round() is None
    before, after = make_state(MODELS[kind]()), server.state
    uploads = [upload for log in logs for upload in record_of(log).uploads]
    blocks = [engine.schema.blocks[number] for upload in uploads for number in upload.block_ids]
    sent = {engine.schema.tensors[s.tensor].name for block in blocks for s in block.segments}
    assert list(after) == list(before)
    for spec in engine.schema.tensors:
        old, new = before[spec.name], after[spec.name]
        assert new.dtype is old.dtype is spec.dtype
        assert new.shape == old.shape
        assert not new.is_floating_point() or bool(torch.isfinite(new).all())
        assert torch.equal(old, new) is (spec.name not in sent), spec.name


@every_model
@pytest.mark.parametrize("name", sorted(ALL_METHODS))
def test_the_same_seed_gives_the_same_bytes(name: str, kind: str) -> None:
    server, _, logs = played(ALL_METHODS[name], kind)
    again, _, logs_again = played(ALL_METHODS[name], kind)
    assert [log.emitted() for log in logs] == [log.emitted() for log in logs_again]
    assert [log.record for log in logs] == [log.record for log in logs_again]
    assert bits(server.state) == bits(again.state)


@every_method
def test_another_seed_gives_other_cohorts(name: str) -> None:
    _, _, logs = played(SHORT_METHODS[name], "tied")
    _, _, others = played(SHORT_METHODS[name], "tied", seed=12)
    assert [log.plan.cohort for log in logs] != [log.plan.cohort for log in others]


@every_model
@pytest.mark.parametrize("name", sorted(ALL_METHODS))
@pytest.mark.parametrize("shuffle_seed", [None, 0])
def test_uploads_in_any_order_give_the_same_bits(
    name: str, kind: str, shuffle_seed: int | None
) -> None:
    shuffler = random.Random(shuffle_seed or 0)  # noqa: S311

    def order(cohort: Sequence[int]) -> Sequence[int]:
        if shuffle_seed is None:
            return cohort[::-1]
        return shuffler.sample(cohort, len(cohort))

    server, _, logs = played(ALL_METHODS[name], kind)
    other, _, other_logs = played(ALL_METHODS[name], kind, order)
    assert [log.emitted() for log in logs] == [log.emitted() for log in other_logs]
    assert [log.record for log in logs] == [log.record for log in other_logs]
    assert bits(server.state) == bits(other.state)


def stored(saved: SavedSession) -> SavedSession:
    """What comes back from a disk: tensors by value, everything else by way of JSON."""
    tensors: ModelState = {name: value.clone() for name, value in saved.tensors.items()}
    return SavedSession(tensors, json.loads(json.dumps(saved.values)))


@every_model
@pytest.mark.parametrize("name", sorted(ALL_METHODS))
def test_a_run_resumed_before_every_round_goes_on_with_the_same_bytes(
    name: str, kind: str
) -> None:
    method = ALL_METHODS[name]
    server, _, logs = played(method, kind)
    resumed, engine = set_up(method, MODELS[kind]())
    for log in logs:
        saved = stored(resumed.save())
        resumed, _ = set_up(method, MODELS[kind](), state_seed=99)
        resumed.restore(saved)
        assert resumed.rounds == log.plan.round - 1
        again = engine.play(resumed)
        assert again is not None
        assert again.plan == log.plan
        assert again.emitted() == log.emitted()
        assert again.record == log.record
    assert resumed.begin_round() is None
    assert bits(resumed.state) == bits(server.state)
    assert resumed.never_uploaded() == server.never_uploaded()


@every_method
def test_one_saved_session_can_be_restored_twice(name: str) -> None:
    server, engine = set_up(SHORT_METHODS[name], MODELS["tied"]())
    engine.play(server)
    saved = server.save()
    kept = {number: dict(state) for number, state in engine.kept.items()}
    values = json.dumps(saved.values)
    runs = []
    for _ in range(2):
        resumed, engine = set_up(SHORT_METHODS[name], MODELS["tied"]())
        engine.kept = {number: dict(state) for number, state in kept.items()}
        resumed.restore(saved)
        logs = engine.run(resumed)
        runs.append(([log.record for log in logs], bits(resumed.state), resumed.save().values))
    assert runs[0] == runs[1]
    assert json.dumps(saved.values) == values


@every_method
def test_what_was_saved_is_not_changed_by_the_run_that_goes_on(name: str) -> None:
    server, engine = set_up(SHORT_METHODS[name], MODELS["batch_norm"]())
    engine.play(server)
    saved = server.save()
    tensors, values = bits(saved.tensors), json.dumps(saved.values)
    engine.run(server)
    assert bits(saved.tensors) == tensors
    assert json.dumps(saved.values) == values


@every_method
def test_global_random_state_is_neither_read_nor_set(name: str) -> None:
    drawn = []
    with torch.random.fork_rng():
        for global_seed in (1, 2):
            server, engine = set_up(SHORT_METHODS[name], MODELS["tied"]())
            torch.manual_seed(global_seed)
            before = torch.get_rng_state()
            drawn.append([log.emitted() for log in engine.run(server)])
            assert torch.equal(torch.get_rng_state(), before)
    assert drawn[0] == drawn[1]


@every_method
def test_neither_initial_values_nor_trained_ones_are_changed(name: str) -> None:
    model = MODELS["batch_norm"]()
    method = SHORT_METHODS[name]
    _, engine = set_up(method, model)
    initial = make_state(model)
    before = bits(initial)
    server = ServerSession(method, engine.schema, initial, num_clients=NUM_CLIENTS)
    log = engine.play(server)
    assert log is not None
    trained = {client: bits(state) for client, state in log.trained.items()}
    engine.play(server)
    assert bits(initial) == before
    assert {client: bits(state) for client, state in log.trained.items()} == trained


# --- begin, receive, end -------------------------------------------------------------------------


@every_method
def test_a_round_goes_begin_receive_end(name: str) -> None:
    server, engine = set_up(SHORT_METHODS[name], MODELS["batch_norm"]())
    plan = server.begin_round()
    assert plan is not None
    assert (plan.round, plan.stage, plan.epochs) == (1, 1, 2)
    assert server.rounds == 0
    log = engine.ask(server, plan)
    before = bits(server.state)
    for number in plan.cohort:
        record = server.receive(number, log.uploads[number])
        assert (record.client, record.report.num_examples) == (number, 100 + 37 * number)
    assert bits(server.state) == before, "nothing changes before the round ends"
    ended = server.end_round()
    assert (ended.round, ended.stage, ended.cohort) == (1, 1, plan.cohort)
    assert [upload.client for upload in ended.uploads] == list(plan.cohort)
    assert ended.refusals == ()
    assert server.rounds == 1
    assert bits(server.state) != before
    json.dumps(dataclasses.asdict(ended))


@every_method
def test_the_bytes_of_a_round_are_told_apart_by_block(name: str) -> None:
    server, engine = set_up(SHORT_METHODS[name], MODELS["batch_norm"]())
    while (plan := server.begin_round()) is not None:
        log = engine.ask(server, plan)
        for number in plan.cohort:
            server.receive(number, log.uploads[number])
        record = server.end_round()
        uploads = [Payload.parse(log.uploads[n], server.schema) for n in plan.cohort]
        for number, traffic in enumerate(record.uplink_blocks):
            holding = [u.traffic.blocks[number] for u in uploads if number in u.header.block_ids]
            assert traffic.payloads == len(holding)
            assert traffic.num_bytes == sum(held.num_bytes for held in holding)
            levels = [
                (code.num_levels, segment.num_elements)
                for upload in uploads
                for block, segment, code in upload.codes()
                if block == number and code.coding is Coding.LEVELS
            ]
            least, most = min(levels, default=(0, 0))[0], max(levels, default=(0, 0))[0]
            assert least - 1e-9 <= traffic.levels <= most + 1e-9
        nominal = sum(traffic.nominal_bits for traffic in record.uplink_blocks)
        assert nominal == record.uplink_nominal_bits
        whole = Payload.parse(log.broadcast, server.schema)
        frames = sum(traffic.num_bytes for traffic in record.broadcast_blocks)
        assert [t.payloads for t in record.broadcast_blocks] == [
            int(number in whole.header.coded) for number in range(len(server.schema.blocks))
        ]
        values = record.broadcast.total - record.broadcast.header
        assert values <= frames < record.broadcast.total


@every_method
def test_means_of_a_round_are_weighted_by_training_and_by_validation_examples(name: str) -> None:
    server, engine = set_up(SHORT_METHODS[name], MODELS["tied"]())
    record = record_of(engine.play(server))
    reports = [make_report(client, 1) for client in record.cohort]
    trained = sum(r.num_examples for r in reports)
    validated = sum(r.num_validation_examples for r in reports)
    assert record.train_loss == pytest.approx(
        sum(r.train_loss * r.num_examples for r in reports) / trained, rel=1e-6
    )
    assert record.validation_loss == pytest.approx(
        sum(r.validation_loss * r.num_validation_examples for r in reports) / validated, rel=1e-6
    )
    assert record.validation_metric == pytest.approx(
        sum(r.validation_metric * r.num_validation_examples for r in reports) / validated, rel=1e-6
    )


@every_method
def test_without_validation_examples_there_is_no_validation_mean(name: str) -> None:
    server, engine = set_up(SHORT_METHODS[name], MODELS["tied"]())
    engine.report = lambda client, number: dataclasses.replace(
        make_report(client, number), num_validation_examples=0
    )
    record = record_of(engine.play(server))
    assert (record.validation_loss, record.validation_metric) == (None, None)


# --- bytes ---------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("name", sorted(ALL_METHODS))
def test_every_count_of_bytes_is_the_length_of_what_was_emitted(name: str, kind: str) -> None:
    _, _, logs = played(ALL_METHODS[name], kind)
    for log in logs:
        record = record_of(log)
        lengths = {client: len(upload) for client, upload in log.uploads.items()}
        assert {u.client: u.uplink.total for u in record.uploads} == lengths
        assert record.uplink_bytes == sum(lengths.values())
        opening_bytes = sum(map(len, log.openings.values()))
        assert record.broadcast.total == len(log.broadcast)
        assert record.initial_bytes == opening_bytes
        assert record.downlink_bytes == len(log.broadcast) * len(log.plan.cohort) + opening_bytes
        assert record.initialized == tuple(sorted(log.openings))


@every_method
def test_a_client_is_opened_once_and_only_where_it_must_be(name: str) -> None:
    for kind in MODELS:
        _, engine, logs = played(SHORT_METHODS[name], kind)
        opened = [client for log in logs for client in log.openings]
        taking_part = {client for log in logs for client in log.plan.cohort}
        wanted = name == "smafd" or kind == "frozen"
        assert sorted(opened) == (sorted(taking_part) if wanted else [])
        assert all(bool(state) is wanted for state in engine.kept.values())


@every_method
def test_only_an_opening_holds_frozen_parameters_and_it_holds_them_raw(name: str) -> None:
    server, _, logs = played(SHORT_METHODS[name], "frozen")
    log = logs[0]
    values = make_state(MODELS["frozen"]())["0.weight"].numpy().tobytes()
    assert all(opening.count(values) == 1 for opening in log.openings.values())
    assert all(
        values not in payload
        for each in logs
        for payload in (each.broadcast, *each.uploads.values())
    )
    payload = Payload.parse(log.openings[log.plan.cohort[0]], server.schema)
    assert payload.header.kind is Kind.INITIAL
    assert payload.header.block_ids == (
        tuple(range(len(server.schema.blocks))) if name == "smafd" else ()
    )


@every_method
@pytest.mark.parametrize("kind", ["frozen", "tied"])
def test_a_client_that_was_never_opened_is_told_so(name: str, kind: str) -> None:
    server, _, logs = played(SHORT_METHODS[name], kind)
    client = ClientSession(SHORT_METHODS[name], server.schema, client=4)
    if name != "smafd" and kind != "frozen":
        assert set(client.receive(logs[0].broadcast)) == set(server.state)
        return
    with pytest.raises(
        UsageError, match=r"client 4 has not kept tensor '[\w.]+', .* needs an initial payload"
    ):
        client.receive(logs[0].broadcast)


@every_method
def test_tied_parameters_travel_once(name: str) -> None:
    server, _, logs = played(SHORT_METHODS[name], "tied")
    assert [spec.name for spec in server.schema.tensors].count("embedding.weight") == 1
    assert "output.weight" not in server.state
    if name == "fedavg":
        count = Payload.parse(logs[0].broadcast, server.schema).num_bytes
        assert count.raw == 4 * server.schema.num_parameters
        assert count.nominal_bits == 32 * server.schema.num_parameters


# --- options that are wrong ----------------------------------------------------------------------

WRONG_OPTIONS: list[tuple[Callable[[], object], str]] = [
    (lambda: Codec(dropout_rate=1.0), "dropout_rate λ is 1.0; allowed are 0 <= λ < 1"),
    (lambda: Codec(dropout_rate=-0.1), "dropout_rate λ is -0.1; allowed are 0 <= λ < 1"),
    (lambda: Codec(dropout_rate=float("nan")), "dropout_rate λ is nan"),
    (lambda: FedDropoutAvg(dropout_rate=1.0), "dropout_rate λ is 1.0"),
    (lambda: FedDropoutAvg(dropout_rate=-1e-9), "dropout_rate λ is -1e-09"),
    (lambda: SMAFD(dropout_rate=1.5), "dropout_rate λ is 1.5"),
    (lambda: Codec(uplink_weight=0.0), "uplink_weight is 0.0; allowed are finite numbers above 0"),
    (lambda: Codec(uplink_weight=-1e-3), "uplink_weight is -0.001"),
    (lambda: Codec(downlink_weight=0.0), "downlink_weight is 0.0"),
    (lambda: Codec(downlink_weight=float("inf")), "downlink_weight is inf"),
    (lambda: Codec(downlink_weight=float("nan")), "downlink_weight is nan"),
    (
        lambda: Codec(uplink_quantizer="int8"),  # type: ignore[arg-type]
        "uplink_quantizer is 'int8'; allowed are 'nnadq', 'stochastic' and 'none'",
    ),
    (
        lambda: Codec(downlink_quantizer="qsgd"),  # type: ignore[arg-type]
        "downlink_quantizer is 'qsgd'; allowed are",
    ),
    (
        lambda: Codec(selection="best"),  # type: ignore[arg-type]
        "selection is 'best'; allowed are 'mbd', 'random' and 'none'",
    ),
    (lambda: Codec(stochastic_levels=0), "num_levels is 0; allowed are 1 to 4194304"),
    (lambda: FedPAQ(levels=0), "num_levels is 0; allowed are 1 to 4194304"),
    (lambda: FedPAQ(levels=2**22 + 1), "num_levels is 4194305; allowed are 1 to 4194304"),
    (
        lambda: FedOBD(stage_one_rounds=0),
        "rounds of stage 1 is 0; allowed are numbers from 1",
    ),
    (lambda: FedOBD(stage_one_epochs=0), "epochs of stage 1 is 0; allowed are numbers from 1"),
    (lambda: FedOBD(stage_two_epochs=-1), "stage_two_epochs is -1; allowed are numbers from 0"),
    (
        lambda: EarlyStop(source="train"),
        "the early stop's source is 'train'; allowed are 'off', 'validation' and 'test'",
    ),
    (lambda: EarlyStop(patience=0), "patience is 0; allowed are numbers of rounds from 1"),
]


@pytest.mark.parametrize(("make", "text"), WRONG_OPTIONS, ids=[t for _, t in WRONG_OPTIONS])
def test_a_wrong_option_is_refused_when_the_value_is_made(
    make: Callable[[], object], text: str
) -> None:
    with pytest.raises(UsageError, match=text.replace("|", r"\|")):
        make()


@every_method
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cohort": 0}, r"cohort is 0; allowed are a count of at least 1 \(5\) or a fraction"),
        ({"cohort": -2}, "cohort is -2; allowed are"),
        ({"cohort": 0.0}, "cohort is 0.0; allowed are"),
        ({"cohort": 1.5}, "cohort is 1.5; allowed are"),
        ({"cohort": float("nan")}, "cohort is nan; allowed are"),
        ({"rounds": 0}, "rounds of stage 1 is 0; allowed are numbers from 1"),
        ({"epochs": 0}, "epochs of stage 1 is 0; allowed are numbers from 1"),
    ],
)
def test_every_method_refuses_wrong_rounds_epochs_and_cohorts(
    name: str, options: dict[str, Any], text: str
) -> None:
    prefix = "stage_one_" if name == "fedobd" else ""
    named = {k if k == "cohort" else prefix + k: value for k, value in options.items()}
    with pytest.raises(UsageError, match=text):
        METHODS[name](**named)


@every_method
def test_a_cohort_of_more_clients_than_there_are_is_refused(name: str) -> None:
    method = METHODS[name](cohort=4)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="a cohort of 4 clients was asked for; there are 3"):
        set_up(method, MODELS["tied"](), num_clients=3)
    set_up(method, MODELS["tied"](), num_clients=4)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_examples": 0}, "max_examples is 0; allowed are 1 to 1099511627775"),
        ({"max_examples": 2**40}, "max_examples is 1099511627776; allowed are 1 to 1099511627775"),
    ],
)
def test_limits_refuse_wrong_numbers(options: dict[str, int], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Limits(**options)


def test_a_server_session_wants_clients() -> None:
    with pytest.raises(UsageError, match="num_clients is 0; allowed are numbers from 1"):
        set_up(FedAvg(), MODELS["tied"](), num_clients=0)


def test_an_initial_state_that_does_not_fit_is_refused() -> None:
    model = MODELS["tied"]()
    _, engine = set_up(FedAvg(), model)
    state = make_state(model)
    del state["hidden.bias"]
    with pytest.raises(UsageError, match=r"no value for tensor 'hidden\.bias'"):
        ServerSession(FedAvg(), engine.schema, state, num_clients=2)
    state["hidden.bias"] = torch.zeros(9)
    with pytest.raises(UsageError, match=r"tensor 'hidden\.bias' has shape \(9,\); wanted \(8,\)"):
        ServerSession(FedAvg(), engine.schema, state, num_clients=2)
