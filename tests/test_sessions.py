"""Sessions: in what order they are called, whom they ask, when they stop, what they give out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn

from fedobd import (
    METHODS,
    SMAFD,
    BlockRules,
    Broadcast,
    ClientSession,
    Codec,
    DecodeError,
    EarlyStop,
    FedAvg,
    FedOBD,
    Method,
    ModelSchema,
    ModelState,
    Report,
    Role,
    RoundPlan,
    ServerSession,
    Stochastic,
    UsageError,
    decompose,
    get_state,
)
from fedobd._seeds import make_generator
from fedobd.codec import dequantize
from fedobd.payload import Kind
from fedobd.sessions import cohort_size, sample_cohort
from tests.session_helpers import (
    MODELS,
    NUM_CLIENTS,
    SEED,
    SHORT_METHODS,
    Engine,
    RoundLog,
    Scene,
    big_embedding,
    bits,
    bits_of,
    craft_upload,
    decode_broadcast,
    every_method,
    forge,
    make_report,
    make_state,
    record_of,
    set_up,
)

# --- the order of calls --------------------------------------------------------------------------


def test_calls_that_want_an_open_round() -> None:
    server, _ = set_up(FedAvg(), MODELS["frozen"]())
    calls: list[Callable[[], object]] = [
        server.end_round,
        server.abort_round,
        server.broadcast,
        lambda: server.initial_payload(0),
        lambda: server.needs_initial_payload(0),
        lambda: server.receive(0, b""),
    ]
    for call in calls:
        with pytest.raises(UsageError, match="no round is open; call begin_round first"):
            call()


@every_method
def test_a_round_is_not_begun_twice_nor_saved_while_it_is_open(name: str) -> None:
    server, engine = set_up(SHORT_METHODS[name], MODELS["tied"]())
    server.begin_round()
    with pytest.raises(UsageError, match="round 1 has not been ended"):
        server.begin_round()
    with pytest.raises(UsageError, match="round 1 is open; a session is saved between rounds"):
        server.save()
    server.abort_round()
    server.save()
    engine.run(server)
    assert server.begin_round() is None
    assert server.begin_round() is None
    server.save()


@every_method
def test_a_client_uploads_only_after_it_has_received(name: str) -> None:
    _, engine = set_up(SHORT_METHODS[name], MODELS["tied"]())
    with pytest.raises(
        UsageError, match="client 2 cannot upload before it has received a broadcast"
    ):
        engine.session(2).upload(make_state(MODELS["tied"]()), make_report(2, 1))


def test_only_a_member_of_the_cohort_is_opened() -> None:
    server, _ = set_up(FedAvg(cohort=2), MODELS["frozen"]())
    plan = server.begin_round()
    assert plan is not None
    outsider = next(c for c in range(5) if c not in plan.cohort)
    with pytest.raises(UsageError, match=f"client {outsider} takes no part in round 1"):
        server.needs_initial_payload(outsider)
    with pytest.raises(UsageError, match=f"client {outsider} takes no part in round 1"):
        server.initial_payload(outsider)


@every_method
def test_a_round_that_was_never_broadcast_cannot_end_and_changes_nothing(name: str) -> None:
    """Uploads from before a crash reach a resumed session that has broadcast nothing."""
    server, engine = set_up(SHORT_METHODS[name], MODELS["tied"]())
    twin, _ = set_up(SHORT_METHODS[name], MODELS["tied"]())
    plan = twin.begin_round()
    assert plan is not None
    log = engine.ask(twin, plan)
    server.begin_round()
    for client in plan.cohort:
        server.receive(client, log.uploads[client])
    before = bits(server.state)
    with pytest.raises(UsageError, match="round 1 was ended before its broadcast was made"):
        server.end_round()
    assert bits(server.state) == before
    assert server.broadcast().data == log.broadcast
    assert [u.client for u in server.end_round().uploads] == list(plan.cohort)


@every_method
def test_the_broadcast_is_the_same_each_time_and_may_come_in_chunks(name: str) -> None:
    server, _ = set_up(SHORT_METHODS[name], MODELS["batch_norm"]())
    server.begin_round()
    first = server.broadcast().data
    assert [server.broadcast().data for _ in range(2)] == [first, first]


# --- what a server gives out and a client takes in -----------------------------------------------


@every_method
def test_the_state_that_a_server_gives_out_is_not_its_own(name: str) -> None:
    """A model that runs on it in place (batch normalization does) must not change W."""
    server, _ = set_up(SHORT_METHODS[name], MODELS["batch_norm"]())
    before = bits(server.state)
    for value in server.state.values():
        value.zero_()
    assert bits(server.state) == before


def test_the_initial_model_must_be_finite() -> None:
    model = MODELS["tied"]()
    _, engine = set_up(FedOBD(), model)
    state = make_state(model)
    state["inner.bias"][2] = math.nan
    server = ServerSession(FedOBD(), engine.schema, state, num_clients=5)
    server.begin_round()
    with pytest.raises(UsageError, match=r"tensor 'inner\.bias' holds NaN"):
        server.broadcast()


@every_method
def test_a_client_refuses_what_is_not_for_it(name: str) -> None:
    scene = Scene(SHORT_METHODS[name])
    client = scene.engine.session(scene.villain)
    broadcast = scene.log.broadcast
    other_id = SHORT_METHODS[name].wire_id % 5 + 1
    table: list[tuple[bytes, str, str]] = [
        (broadcast[:-1], "checksum", "was cut or altered"),
        (scene.upload, "kind", "a payload of kind UPLOAD came; wanted BROADCAST"),
        (
            scene.server.initial_payload(scene.villain).data,
            "kind",
            "a payload of kind INITIAL came",
        ),
        (forge(broadcast, method=other_id), "method", f"method number {other_id} came; wanted"),
        (forge(broadcast, version=9), "version", "format version 9 came"),
        (forge(broadcast, flags=8), "field", "what a server sends must be whole values"),
        (forge(broadcast, fingerprint=b"x" * 16), "schema", "for another model or other blocks"),
    ]
    for payload, reason, text in table:
        with pytest.raises(DecodeError, match=text) as refused:
            client.receive(payload)
        assert refused.value.reason.value == reason
    with pytest.raises(DecodeError, match="a payload of kind BROADCAST came; wanted INITIAL"):
        client.initialize(broadcast)
    with pytest.raises(UsageError, match="cannot upload before it has received"):
        client.upload(scene.log.trained[scene.villain], make_report(scene.villain, 2))
    received = client.receive(broadcast)
    assert bits(received) == bits(scene.log.starts[scene.villain])


@every_method
def test_a_broadcast_decoded_once_serves_every_client(name: str) -> None:
    scene = Scene(SHORT_METHODS[name], "frozen")
    shared = Broadcast.decode(scene.log.broadcast, scene.method, scene.schema)
    before = bits(shared.values)
    for number in scene.plan.cohort:
        client = scene.engine.session(number)
        assert bits(client.receive(shared)) == bits(scene.log.starts[number])
        upload = client.upload(scene.log.trained[number], make_report(number, 2)).data
        assert upload == scene.log.uploads[number]
    assert bits(shared.values) == before


# --- cohorts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cohort", "num_clients", "wanted"),
    [
        (0.5, 100, 50),
        (0.5, 5, 2),
        (0.5, 1, 1),
        (0.01, 10, 1),
        (1.0, 7, 7),
        (1, 7, 1),
        (7, 7, 7),
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.7, 10, 7),
    ],
)
def test_size_of_a_cohort(cohort: int | float, num_clients: int, wanted: int) -> None:
    """A count is a count; a fraction, as it is written in decimal, is rounded down and at least
    one client."""
    assert cohort_size(cohort, num_clients) == wanted
    assert len(sample_cohort(cohort, num_clients, 0, 1)) == wanted


def test_cohorts_follow_from_seed_and_round_alone() -> None:
    cohorts = [sample_cohort(4, 10, 0, number) for number in range(1, 30)]
    assert cohorts == [sample_cohort(4, 10, 0, number) for number in range(1, 30)]
    assert len(set(cohorts)) > 20
    assert cohorts != [sample_cohort(4, 10, 1, number) for number in range(1, 30)]
    for cohort in cohorts:
        assert list(cohort) == sorted(set(cohort))
        assert set(cohort) <= set(range(10))
        assert len(cohort) == 4


def test_cohorts_are_even_over_clients_and_pairs() -> None:
    rounds = 3000
    clients: Counter[int] = Counter()
    pairs: Counter[tuple[int, int]] = Counter()
    for number in range(rounds):
        cohort = sample_cohort(3, 10, 4, number)
        clients.update(cohort)
        pairs.update((a, b) for a in cohort for b in cohort if a < b)
    # five standard deviations of a binomial
    for counts, share, kinds in ((clients, 0.3, 10), (pairs, 6 / 90, 45)):
        assert len(counts) == kinds
        allowed = 5 * math.sqrt(rounds * share * (1 - share))
        assert all(abs(n - rounds * share) < allowed for n in counts.values())


def test_a_cohort_is_drawn_whole_from_the_clients_that_can_be_reached() -> None:
    """Those of the usual cohort that can be reached are in it; others take the place of the rest.

    A cohort that is a share is one of all clients, not of those that can be reached.
    """
    reached = {1, 4, 5, 6, 7, 9}
    for number in range(1, 30):
        usual = set(sample_cohort(4, 10, 0, number))
        cohort = sample_cohort(4, 10, 0, number, reached)
        assert list(cohort) == sorted(cohort)
        assert len(cohort) == 4
        assert usual & reached <= set(cohort) <= reached
        assert sample_cohort(0.4, 10, 0, number, reached) == cohort
        assert sample_cohort(4, 10, 0, number, range(10)) == tuple(sorted(usual))
        assert sample_cohort(4, 10, 0, number, [8, 2]) == (2, 8)


def test_a_cohort_is_the_first_of_a_random_order_that_seed_and_round_decide() -> None:
    for number in range(1, 6):
        digest = hashlib.blake2b(f"3/cohort/{number}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        order = torch.randperm(9, generator=generator).tolist()
        assert sample_cohort(4, 9, 3, number) == tuple(sorted(order[:4]))


def test_the_session_samples_as_the_rule_says() -> None:
    server, engine = set_up(FedAvg(rounds=4, cohort=0.5), MODELS["tied"](), num_clients=7)
    for number in range(1, 5):
        log = engine.play(server)
        assert log is not None
        assert log.plan.cohort == sample_cohort(0.5, 7, SEED, number)
        assert len(log.plan.cohort) == 3


# --- plans ---------------------------------------------------------------------------------------


def plans_of(method: Method, num_clients: int = 6) -> list[RoundPlan]:
    server, engine = set_up(method, nn.Linear(3, 2), num_clients=num_clients)
    return [log.plan for log in engine.run(server)]


def test_plans_of_both_stages() -> None:
    method = FedOBD(stage_one_rounds=3, stage_one_epochs=5, stage_two_epochs=4, cohort=0.5)
    plans = plans_of(method)
    first, second = plans[:3], plans[3:]
    assert [plan.round for plan in plans] == [1, 2, 3, 4, 5, 6, 7]
    assert [plan.stage for plan in plans] == [1, 1, 1, 2, 2, 2, 2]
    for plan in first:
        assert (plan.epochs, plan.schedule_start, plan.schedule_epochs) == (5, 0, 5)
        assert len(plan.cohort) == 3
    assert len({plan.cohort for plan in first}) > 1
    for index, plan in enumerate(second):
        assert (plan.epochs, plan.schedule_start, plan.schedule_epochs) == (1, index, 4)
        assert plan.cohort == (0, 1, 2, 3, 4, 5)
    assert [plan.run_start for plan in plans] == [0, 5, 10, 15, 16, 17, 18]
    assert {plan.run_epochs for plan in plans} == {19}


def test_without_stage_two_the_run_ends_after_stage_one() -> None:
    plans = plans_of(FedOBD(stage_one_rounds=2, stage_two_epochs=0))
    assert [(plan.round, plan.stage) for plan in plans] == [(1, 1), (2, 1)]


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"fedobd"}))
def test_baselines_have_one_stage_whose_rounds_start_the_schedule_anew(name: str) -> None:
    plans = plans_of(SHORT_METHODS[name])
    assert len(plans) == (5 if name == "smafd" else 4)
    for plan in plans:
        assert (plan.stage, plan.epochs) == (1, 2)
        assert (plan.schedule_start, plan.schedule_epochs) == (0, 2)


# --- early stop ----------------------------------------------------------------------------------


def run_with_metrics(
    method: Method, metrics: Mapping[int, float], *, test_set: bool = False
) -> list[RoundPlan]:
    """Play a run whose validation metric, or metric on the test set, is scripted by round."""
    server, engine = set_up(method, nn.Linear(3, 2), num_clients=2)
    plans = []

    def report(client: int, number: int) -> Report:
        metric = 0.1 * number if test_set else metrics.get(number, 0.9)
        return Report(
            num_examples=10,
            train_loss=1.0,
            num_validation_examples=5,
            validation_metric=metric,
        )

    engine.report = report
    while (log := engine.play(server)) is not None:
        plans.append(log.plan)
        if test_set:
            server.observe_test_metric(metrics.get(log.plan.round, 0.9))
    return plans


FLAT_FROM_TWO = {number: (0.5 if number == 1 else 0.6) for number in range(1, 50)}


def stages_of(plans: list[RoundPlan]) -> list[int]:
    return [plan.stage for plan in plans]


@pytest.mark.parametrize("source", ["validation", "test"])
def test_early_stop_leaves_each_stage_after_its_patience(source: str) -> None:
    """The metric rises last in round 2; stage 2 has its own patience."""
    stop = EarlyStop(source=source, min_gain=0.01, patience=3)
    method = FedOBD(stage_one_rounds=20, stage_two_epochs=12, cohort=1.0, stop=stop)
    plans = run_with_metrics(method, FLAT_FROM_TWO, test_set=source == "test")
    # stage 1: rounds 1 and 2 rise, 3 do not; stage 2: its first round is the best, 3 are not
    assert stages_of(plans) == [1] * 5 + [2] * 4
    assert [plan.round for plan in plans] == list(range(1, 10))
    assert [plan.schedule_start for plan in plans[5:]] == [0, 1, 2, 3]
    assert {plan.schedule_epochs for plan in plans[5:]} == {12}


@pytest.mark.parametrize("source", ["validation", "test"])
@pytest.mark.parametrize("name", sorted(set(METHODS) - {"fedobd"}))
def test_early_stop_ends_a_run_of_one_stage(name: str, source: str) -> None:
    stop = EarlyStop(source=source, patience=2)
    method = dataclasses.replace(
        SHORT_METHODS[name],  # type: ignore[type-var]
        rounds=30,
        cohort=1.0,
        stop=stop,
    )
    plans = run_with_metrics(method, FLAT_FROM_TWO, test_set=source == "test")
    assert len(plans) == 4


def test_the_patience_is_five_rounds_without_a_rise_of_a_thousandth() -> None:
    assert (EarlyStop().min_gain, EarlyStop().patience) == (0.001, 5)
    stop = EarlyStop(source="validation")
    method = FedOBD(stage_one_rounds=20, stage_two_epochs=0, cohort=1.0, stop=stop)
    flat = dict.fromkeys(range(1, 21), 0.5)
    assert len(run_with_metrics(method, flat)) == 6
    assert len(run_with_metrics(method, flat | {6: 0.5009})) == 6
    assert len(run_with_metrics(method, flat | {6: 0.5011})) == 11


def test_a_rise_by_the_least_gain_counts() -> None:
    stop = EarlyStop(source="test", min_gain=0.25, patience=1)
    method = FedOBD(stage_one_rounds=20, stage_two_epochs=0, cohort=1.0, stop=stop)
    rising = {1: 0.25, 2: 0.5, 3: 0.75, 4: 0.9375}
    assert len(run_with_metrics(method, rising, test_set=True)) == 4


def test_an_early_stop_without_a_least_gain_wants_a_rise_all_the_same() -> None:
    stop = EarlyStop(source="test", min_gain=0, patience=2)
    method = FedOBD(stage_one_rounds=20, stage_two_epochs=0, cohort=1.0, stop=stop)
    assert len(run_with_metrics(method, dict.fromkeys(range(1, 21), 0.5), test_set=True)) == 3


def test_a_metric_that_is_no_number_is_no_rise_and_no_best() -> None:
    stop = EarlyStop(source="test", patience=2)
    method = FedOBD(stage_one_rounds=6, stage_two_epochs=0, cohort=1.0, stop=stop)
    rising = {1: math.nan, 2: 0.5, 3: 0.6, 4: 0.7, 5: 0.8, 6: 0.9}
    assert len(run_with_metrics(method, rising, test_set=True)) == 6
    lost = dict.fromkeys(range(1, 7), math.nan)
    assert len(run_with_metrics(method, lost, test_set=True)) == 2


def test_early_stop_is_off_unless_it_is_asked_for() -> None:
    assert EarlyStop().source == "off"
    for method in METHODS.values():
        assert method().stop == EarlyStop()
    method_ = FedOBD(stage_one_rounds=12, stage_two_epochs=8, cohort=1.0)
    falling = {number: 1 / number for number in range(1, 50)}
    for test_set in (False, True):
        plans = run_with_metrics(method_, falling, test_set=test_set)
        assert stages_of(plans) == [1] * 12 + [2] * 8


def test_small_rises_count_once_they_add_up() -> None:
    stop = EarlyStop(source="validation", min_gain=0.01, patience=2)
    method = FedOBD(stage_one_rounds=9, stage_two_epochs=0, cohort=1.0, stop=stop)
    creeping = {number: 0.5 + 0.006 * number for number in range(1, 20)}
    assert len(run_with_metrics(method, creeping)) == 9


def test_only_the_source_that_was_chosen_counts() -> None:
    stop = EarlyStop(source="validation", patience=2)
    method = FedOBD(stage_one_rounds=8, stage_two_epochs=0, cohort=1.0, stop=stop)
    # validation figures rise by 0.1 a round, the test set's are flat
    assert len(run_with_metrics(method, FLAT_FROM_TWO, test_set=True)) == 8


def test_rounds_without_validation_figures_never_stop_a_run() -> None:
    stop = EarlyStop(source="validation", patience=1)
    server, engine = set_up(FedAvg(rounds=6, stop=stop), nn.Linear(3, 2), num_clients=2)
    engine.report = lambda client, number: Report(num_examples=1, train_loss=1.0)
    assert len(engine.run(server)) == 6


def test_the_watch_is_saved_with_the_session() -> None:
    stop = EarlyStop(source="test", patience=3)
    method = FedOBD(stage_one_rounds=20, stage_two_epochs=1, cohort=1.0, stop=stop)
    server, engine = set_up(method, nn.Linear(3, 2), num_clients=2)
    stages = []
    while (log := engine.play(server)) is not None:
        stages.append(log.plan.stage)
        server.observe_test_metric(0.5)
        saved = server.save()
        server, _ = set_up(method, nn.Linear(3, 2), num_clients=2)
        server.restore(dataclasses.replace(saved, values=json.loads(json.dumps(saved.values))))
    assert stages == [1, 1, 1, 1, 2]


def test_a_test_metric_belongs_between_two_rounds() -> None:
    """In an open round it could leave the stage that the round's plan belongs to."""
    stop = EarlyStop(source="test", patience=1)
    server, engine = set_up(FedAvg(rounds=9, stop=stop), nn.Linear(3, 2), num_clients=2)
    engine.play(server)
    server.observe_test_metric(0.5)
    plan = server.begin_round()
    assert plan is not None
    log = engine.ask(server, plan)
    with pytest.raises(UsageError, match="round 2"):
        server.observe_test_metric(0.4)
    for client in plan.cohort:
        server.receive(client, log.uploads[client])
    assert server.end_round().round == 2


# --- the mean ------------------------------------------------------------------------------------


PLAIN = Codec(uplink_quantizer="none", downlink_quantizer="none", dropout_rate=0.5)


def test_a_dropped_block_counts_as_the_previous_global_one() -> None:
    """Two clients with weights 1 and 3 upload one block each, of three."""
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(4, 2))
    server, engine = set_up(FedOBD(codec=PLAIN, cohort=1.0), model, num_clients=2)
    plan = server.begin_round()
    assert plan is not None
    log = engine.ask(server, plan)
    before = server.state
    for client, (examples, block) in enumerate([(1, 0), (3, 1)]):
        start = log.starts[client]
        trained = {name: value + 1.0 for name, value in start.items()}
        upload = craft_upload(
            engine.method,
            engine.schema,
            plan,
            client,
            start,
            trained,
            kept=(block,),
            num_examples=examples,
        )
        assert server.receive(client, upload).block_ids == (block,)
    server.end_round()
    for name, change in (("0", 0.25), ("1", 0.75), ("2", 0.0)):
        for tensor in (f"{name}.weight", f"{name}.bias"):
            moved = server.state[tensor] - before[tensor]
            assert torch.allclose(moved, torch.full_like(moved, change), rtol=0, atol=1e-6)
    assert bits(server.state)["2.weight"] == bits(before)["2.weight"]


@pytest.mark.parametrize("stage_two_epochs", [0, 20])
def test_the_broadcasts_error_does_not_pile_up(stage_two_epochs: int) -> None:
    """With a coarse downlink and clients that change nothing, W keeps its bits for 20 rounds and
    more; a server that kept Ŵ instead would lose it in the first."""
    model = MODELS["batch_norm"]()
    codec = Codec(downlink_weight=5.0, uplink_weight=1e-3)
    method = FedOBD(codec=codec, stage_one_rounds=20, stage_two_epochs=stage_two_epochs)
    server, engine = set_up(method, model)
    engine.train = lambda schema, start, client, number: dict(start)
    before = bits(server.save().tensors)
    logs = engine.run(server)
    assert len(logs) == 20 + stage_two_epochs
    assert bits(server.save().tensors) == before
    held = decode_broadcast(logs[0], method, engine.schema)
    coarse = (held["3.weight"] - server.state["3.weight"]).abs().max()
    assert float(coarse) > 0.02, "the case must have a coarse downlink"
    assert bits(held) == bits(decode_broadcast(logs[-1], method, engine.schema))


def test_differences_are_added_to_w_and_not_to_what_clients_hold() -> None:
    """Every client moves by the same step from Ŵ; W moves by that step, from W."""
    model = MODELS["tied"]()
    codec = Codec(downlink_weight=5.0, uplink_quantizer="none", selection="none")
    server, engine = set_up(FedOBD(codec=codec, stage_one_rounds=5, stage_two_epochs=0), model)
    engine.train = lambda schema, start, client, number: {n: v + 0.125 for n, v in start.items()}
    before = server.state
    engine.run(server)
    for name, value in server.state.items():
        assert torch.allclose(value, before[name] + 5 * 0.125, rtol=0, atol=2e-6), name


# --- blocks that never travel --------------------------------------------------------------------


def shake(schema: ModelSchema, start: ModelState, client: int, number: int) -> ModelState:
    """Train the embedding most by far, and one of the others more than the other in turn."""
    trained = dict(start)
    for name, value in start.items():
        step = 5.0 if name.startswith("embedding") else 0.1
        if name.startswith("hidden" if number % 2 else "output"):
            step *= 3
        trained[name] = value + step * torch.linspace(-1, 1, value.numel()).reshape(value.shape)
    return trained


def test_a_block_larger_than_the_budget_is_reported() -> None:
    model = big_embedding()
    method = FedOBD(codec=Codec(dropout_rate=0.3), stage_one_rounds=4, stage_two_epochs=2)
    server, engine = set_up(method, model)
    engine.train = lambda schema, start, client, number: shake(schema, dict(start), client, number)
    assert server.never_uploaded() == (0, 1, 2), "before the first round nothing was uploaded"
    before = server.state["embedding.weight"]
    for _ in range(4):
        record = record_of(engine.play(server))
        differences = record.uploads[0].block_differences
        assert differences is not None
        assert max(differences) == differences[0], "the block changed most, and yet:"
        assert server.never_uploaded() == (0,)
    assert bits_of(server.state["embedding.weight"]) == bits_of(before)
    engine.run(server)
    assert bits_of(server.state["embedding.weight"]) != bits_of(before)
    assert server.never_uploaded() == (0,), "stage 2 does not count"


def test_a_block_of_buffers_alone_is_not_said_to_stay_behind() -> None:
    server, engine = set_up(SHORT_METHODS["smafd"], MODELS["batch_norm"]())
    blocks = engine.schema.blocks
    assert blocks[-1].num_parameters == 0
    assert server.never_uploaded() == tuple(range(len(blocks) - 1))


def test_the_remedy_for_a_large_block_is_to_split_it() -> None:
    model = big_embedding()
    schema = decompose(model, BlockRules(max_block_fraction=0.25))
    method = FedOBD(codec=Codec(selection="random"), stage_one_rounds=6, stage_two_epochs=0)
    server, engine = set_up(method, model, schema=schema)
    engine.run(server)
    assert len(schema.blocks) > 3
    assert server.never_uploaded() == ()


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"fedobd", "smafd"}))
def test_methods_that_send_every_block_report_none(name: str) -> None:
    server, engine = set_up(SHORT_METHODS[name], MODELS["batch_norm"]())
    engine.play(server)
    assert server.never_uploaded() == ()


# --- the delivery --------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_the_delivery_holds_the_whole_trained_model(name: str, kind: str) -> None:
    server, engine = set_up(SHORT_METHODS[name], MODELS[kind]())
    engine.run(server)
    payload = server.delivery().data
    delivery = Broadcast.decode(payload, engine.method, engine.schema, kind=Kind.DELIVERY)
    assert delivery.header.round == server.rounds
    assert delivery.header.block_ids == tuple(range(len(engine.schema.blocks)))
    exact = name != "fedobd"
    for spec in engine.schema.tensors:
        if spec.role is Role.FROZEN:
            assert spec.name not in delivery.values, "it travelled in the opening"
            continue
        value, wanted = delivery.values[spec.name], server.state[spec.name]
        assert value.dtype is spec.dtype
        if exact or spec.role is Role.BUFFER:
            assert torch.equal(value, wanted)
        else:
            assert torch.allclose(value.float(), wanted.float(), rtol=0, atol=0.05)
    with pytest.raises(DecodeError, match="kind DELIVERY came; wanted BROADCAST"):
        Broadcast.decode(payload, engine.method, engine.schema)


@every_method
def test_a_delivery_can_be_made_at_any_time_and_changes_nothing(name: str) -> None:
    """For a model that was saved before its last round, or before its first."""
    method = SHORT_METHODS[name]
    server, engine = set_up(method, MODELS["tied"]())
    straight, other = set_up(method, MODELS["tied"]())
    logs: list[RoundLog] = []
    for _ in range(straight.planned_rounds):
        delivery = server.delivery().data
        decoded = Broadcast.decode(delivery, method, engine.schema, kind=Kind.DELIVERY)
        assert set(decoded.values) == set(server.state)
        log = engine.play(server)
        assert log is not None
        logs.append(log)
    assert [log.emitted() for log in logs] == [log.emitted() for log in other.run(straight)]


def test_a_delivery_of_fedobd_is_quantized_like_its_broadcasts() -> None:
    """Stage 2 has begun: the model that a broadcast would hold next, byte for byte in values."""
    method = FedOBD(stage_one_rounds=2, stage_two_epochs=2, cohort=2)
    server, engine = set_up(method, MODELS["batch_norm"]())
    engine.play(server)
    delivery = server.delivery().data
    delivered = Broadcast.decode(delivery, method, engine.schema, kind=Kind.DELIVERY).values
    server.begin_round()
    broadcast = server.broadcast().data
    assert bits(delivered) == bits(Broadcast.decode(broadcast, method, engine.schema).values)
    assert len(delivery) == len(broadcast)


# --- what a client keeps -------------------------------------------------------------------------


def test_stochastic_broadcasts_of_the_same_values_are_drawn_anew_in_each_round() -> None:
    codec = Codec(
        uplink_quantizer="none",
        downlink_quantizer="stochastic",
        stochastic_levels=3,
        selection="none",
    )
    method = FedOBD(codec=codec, stage_one_rounds=4, stage_two_epochs=0, cohort=2)
    server, engine = set_up(method, nn.Linear(8, 1, bias=False))
    engine.train = lambda schema, start, client, number: dict(start)  # so that W stays
    values = server.state["weight"].reshape(-1).numpy()
    code = Stochastic(3).measure(values, 32)
    seen = set()
    for log in engine.run(server):
        generator = make_generator(SEED, "downlink", log.plan.round)
        wanted = dequantize(Stochastic(3).quantize(values, code, generator).signed(), code)
        found = decode_broadcast(log, method, engine.schema)["weight"]
        assert found.reshape(-1).tolist() == wanted.tolist()
        seen.add(log.broadcast)
        assert torch.equal(server.state["weight"].reshape(-1), torch.from_numpy(values))
    assert len(seen) == 4


def test_the_largest_legal_uploads_of_a_whole_cohort_do_not_overflow() -> None:
    """Tensors that start at 0 may change by less than 64 in a round."""
    method = FedAvg(rounds=1, cohort=NUM_CLIENTS)
    model = nn.Linear(3, 2)
    schema = decompose(model)
    initial = {name: torch.zeros_like(value) for name, value in get_state(model).items()}
    most = 10_000_000  # by default
    server = ServerSession(method, schema, initial, num_clients=NUM_CLIENTS, seed=SEED)
    engine = Engine(method, schema)
    engine.train = lambda schema, start, client, number: {
        name: torch.full_like(value, 63.0) for name, value in start.items()
    }
    engine.report = lambda client, number: Report(num_examples=most, train_loss=1.0)
    engine.play(server)
    for value in server.state.values():
        assert torch.equal(value, torch.full_like(value, 63.0))


def test_only_smafd_keeps_what_a_client_received() -> None:
    for name, method in SHORT_METHODS.items():
        server, engine = set_up(method, MODELS["tied"]())
        log = engine.play(server)
        assert log is not None
        for client in log.plan.cohort:
            kept = engine.kept[client]
            wanted = bits(log.starts[client]) if name == "smafd" else {}
            assert bits(kept) == wanted


def test_a_client_of_smafd_without_its_state_is_told_so() -> None:
    method = SMAFD(rounds=6, cohort=5)
    server, engine = set_up(method, MODELS["batch_norm"]())
    engine.play(server)
    server.begin_round()
    broadcast = server.broadcast().data
    assert not server.needs_initial_payload(3)
    lost = ClientSession(method, engine.schema, client=3, seed=SEED)
    with pytest.raises(UsageError, match=r"client 3 has not kept tensor .* initial payload"):
        lost.receive(broadcast)
    found = Engine(method, engine.schema, kept=engine.kept).session(3)
    assert set(found.receive(broadcast)) == set(server.state)
