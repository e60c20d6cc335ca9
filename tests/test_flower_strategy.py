"""FedOBDStrategy over a grid in this process: its rounds are the core's, whatever nodes do."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Result
from torch import nn

from fedobd import (
    SMAFD,
    DecodeError,
    EarlyStop,
    EmptyRoundError,
    FedAvg,
    FedOBD,
    FedOBDError,
    Method,
    ModelSchema,
    ModelState,
    Payload,
    Report,
    RoundRecord,
    ServerSession,
    UsageError,
    get_state,
)
from fedobd.experiments import RunFolder
from fedobd.flower import CompressionMod, FedOBDStrategy, MetricKeys, _roster
from fedobd.flower._carrier import (
    BROADCAST,
    IDENTIFY,
    KEPT_ROUND,
    NEEDS_OPENING,
    OPENING,
    UPLOAD,
    carried,
    carry,
)
from fedobd.flower._identity import client_id
from fedobd.flower._layout import Layout, describe
from fedobd.flower._opening import Opening
from fedobd.flower._plan import plan_config, read_plan
from fedobd.flower._roster import Roster
from tests.flower_grid import FIRST_NODE_ID, InProcessGrid
from tests.session_helpers import (
    MODELS,
    NUM_CLIENTS,
    SEED,
    SHORT_METHODS,
    Engine,
    bits,
    craft_upload,
    every_method,
    field_of,
    forge,
    make_report,
    make_schema,
    make_state,
    seal,
    set_up,
    train,
)

SHORT = 0.2
"""Round timeout in seconds of tests in which a reply comes too late."""

Fate = bytes | tuple[str, str]
"""What becomes of an upload: other bytes that came, or reason and message of none."""


def arrays_of(message: Message) -> ArrayRecord:
    return message.content.array_records["arrays"]


def config_of(message: Message) -> ConfigRecord:
    return message.content.config_records["config"]


class Killed(BaseException):
    """The ServerApp's end; no Exception, so that the grid does not answer for it."""


class Fleet:
    """Nodes with the made-up training of `session_helpers`, and the same run of the core alone.

    The hooks may be set at any time; they run inside the app's functions.
    """

    def __init__(
        self,
        name: str = "fedobd",
        kind: str = "batch_norm",
        *,
        method: Method | None = None,
        make_model: Callable[[], nn.Module] | None = None,
        num_clients: int = NUM_CLIENTS,
        configs: Sequence[Mapping[str, Any]] | None = None,
        report: Callable[[int, int], Report] = make_report,
        keys: MetricKeys | None = None,
        mod: CompressionMod | None = None,
    ) -> None:
        self.method = method or SHORT_METHODS[name]
        self.make_model = make_model or MODELS[kind]
        self.model = self.make_model()
        self.schema = make_schema(self.model, self.method)
        self.state = make_state(self.model)
        self.report = report
        self.keys = keys or MetricKeys()
        self.num_clients = num_clients
        self.layout = self._describe()
        self.arrays = self.layout.to_arrays(self.state)
        self.mod = mod or CompressionMod()
        self.configs = configs or [{"partition-id": i} for i in range(num_clients)]
        self.on_train: Callable[[int, int], None] = lambda client, number: None
        self.on_evaluate: Callable[[int, int], None] = lambda client, number: None
        self.metrics: Callable[[MetricRecord], None] = lambda metrics: None
        self.received: dict[tuple[int, int], ModelState] = {}
        self.evaluated: dict[tuple[int, int], ModelState] = {}
        self.configs_seen: dict[tuple[int, int], ConfigRecord] = {}
        self.grid = self.new_grid()
        self.result = Result()

    def _describe(self) -> Layout:
        model = self.make_model()
        record = ArrayRecord(
            {
                key: Array(value.detach().to(torch.float32).numpy())
                if value.dtype == torch.bfloat16
                else Array(value.detach().numpy())
                for key, value in model.state_dict().items()
            }
        )
        return describe(record, self.make_model)[1]

    def new_grid(self) -> InProcessGrid:
        """Return a grid whose nodes remember nothing."""
        self.grid = InProcessGrid(self.app(), self.configs)
        return self.grid

    def app(self) -> ClientApp:
        app = ClientApp(mods=[self.mod])

        @app.train()
        def train_function(message: Message, context: Context) -> Message:
            client, config, state = self._read(message, context)
            number = int(str(config["server-round"]))
            self.received[number, client] = state
            self.configs_seen[number, client] = config
            self.on_train(client, number)
            trained = train(self.schema, state, client, number)
            report, keys = self.report(client, number), self.keys
            metrics = MetricRecord(
                {
                    keys.num_examples: report.num_examples,
                    keys.train_loss: report.train_loss,
                    keys.num_eval_examples: report.num_validation_examples,
                    keys.eval_loss: report.validation_loss,
                    keys.eval_metric: report.validation_metric,
                }
            )
            self.metrics(metrics)
            content = RecordDict({"arrays": self.layout.to_arrays(trained), "metrics": metrics})
            return Message(content, reply_to=message)

        @app.evaluate()
        def evaluate_function(message: Message, context: Context) -> Message:
            client, config, state = self._read(message, context)
            number = int(str(config["server-round"]))
            self.evaluated[number, client] = state
            self.on_evaluate(client, number)
            metrics = MetricRecord({"num-examples": 10 + client, "eval_acc": 0.1 * client})
            return Message(RecordDict({"metrics": metrics}), reply_to=message)

        return app

    def _read(self, message: Message, context: Context) -> tuple[int, ConfigRecord, ModelState]:
        arrays, config = arrays_of(message), config_of(message)
        client = client_id(context)
        assert client is not None
        return client, config, self.layout.to_state(arrays, self.schema)

    def strategy(self, **options: Any) -> FedOBDStrategy:
        return FedOBDStrategy(
            self.method,
            **{
                "num_clients": self.num_clients,
                "model_factory": self.make_model,
                "seed": SEED,
                "poll_seconds": 0.001,
                "join_timeout": 0.05,
                "round_timeout": 60.0,
                "metric_keys": self.keys,
                **options,
            },
        )

    def run(self, *, num_rounds: int | None = None, **options: Any) -> FedOBDStrategy:
        """Run to the end, over the nodes as they are."""
        strategy = self.strategy(**options)
        self.result = strategy.start(self.grid, self.arrays, num_rounds)
        return strategy

    @property
    def final(self) -> ModelState:
        return self.layout.to_state(self.result.arrays, self.schema)

    def node(self, client: int) -> int:
        return FIRST_NODE_ID + [
            int(config.get("client-id", config.get("partition-id", -1))) for config in self.configs
        ].index(client)

    # --- what travelled

    def uploads(self) -> dict[tuple[int, int], bytes]:
        """Return the uploads by round and client."""
        found = {}
        for reply in self.grid.replies:
            upload = reply.has_content() and carried(reply.content.get("arrays"), UPLOAD)
            if upload:
                header = Payload.parse(upload, self.schema).header
                found[header.round, header.client or 0] = upload
        return found

    def messages(self, kind: str = "train") -> list[Message]:
        """Return the messages of rounds that were sent."""
        return [
            m
            for m in self.grid.sent
            if m.metadata.message_type == kind and IDENTIFY not in m.content
        ]

    def broadcasts(self) -> dict[int, set[bytes]]:
        """Return the broadcasts of each round."""
        found: dict[int, set[bytes]] = {}
        for message in self.messages():
            payload = carried(arrays_of(message), BROADCAST) or b""
            found.setdefault(int(message.metadata.group_id), set()).add(payload)
        return found

    # --- the same of the core alone

    def reference(
        self,
        fates: Mapping[tuple[int, int], Fate] | None = None,
        *,
        available: Mapping[int, Iterable[int]] | None = None,
        saved: ServerSession | None = None,
    ) -> tuple[ServerSession, list[RoundRecord], dict[tuple[int, int], bytes]]:
        """Return session, records and uploads of a run of the sessions without Flower."""
        server, engine = set_up(
            self.method, self.model, schema=self.schema, num_clients=self.num_clients
        )
        engine.report = self.report
        if saved is not None:
            values = saved.save()
            server.restore(replace(values, values={**values.values, "opened": []}))
        return self._play(server, engine, fates or {}, available or {})

    def _play(
        self,
        server: ServerSession,
        engine: Engine,
        fates: Mapping[tuple[int, int], Fate],
        available: Mapping[int, Iterable[int]],
    ) -> tuple[ServerSession, list[RoundRecord], dict[tuple[int, int], bytes]]:
        records, uploads = [], {}
        while not server.is_finished:
            number = server.rounds + 1
            there = available.get(number)
            plan = server.begin_round(None if there is None else list(there))
            assert plan is not None
            log = engine.ask(server, plan)
            for client in plan.cohort:
                fate = fates.get((number, client), log.uploads[client])
                if isinstance(fate, tuple):
                    server.report_missing(client, *fate)
                    continue
                uploads[number, client] = fate
                with suppress(DecodeError):
                    server.receive(client, fate)
            records.append(server.end_round())
        return server, records, uploads


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What Flower's logger said; it hands nothing on."""
    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


# --- rounds


@every_method
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_a_run_is_that_of_the_sessions_byte_for_byte(name: str, kind: str) -> None:
    fleet = Fleet(name, kind)
    strategy = fleet.run()
    server, records, uploads = fleet.reference()
    assert strategy.records == records
    assert fleet.uploads() == uploads
    assert bits(fleet.final) == bits(server.state)
    assert len(records) == server.rounds > 3


def test_two_stages_ask_whom_and_for_what_the_method_says() -> None:
    fleet = Fleet()
    strategy = fleet.run()
    assert [(r.round, r.stage, len(r.cohort)) for r in strategy.records] == [
        (1, 1, 3), (2, 1, 3), (3, 1, 3), (4, 2, 5), (5, 2, 5),
    ]  # fmt: skip
    for (number, client), config in fleet.configs_seen.items():
        plan = read_plan(config, client)
        assert plan.epochs == (2 if number <= 3 else 1)
        assert (plan.round, plan.stage) == (number, 1 if number <= 3 else 2)
        assert (plan.run_start, plan.run_epochs) == (
            2 * (number - 1) if number <= 3 else 6 + number - 4,
            8,
        )
        if number > 3:
            assert (plan.schedule_start, plan.schedule_epochs) == (number - 4, 2)
        assert plan_config(plan).items() <= dict(config).items()


@every_method
def test_a_round_has_one_broadcast_object_and_payloads_ride_alone(name: str) -> None:
    fleet = Fleet(name, "frozen")
    fleet.run()
    by_round: dict[str, list[Message]] = {}
    for message in fleet.messages():
        by_round.setdefault(message.metadata.group_id, []).append(message)
    for messages in by_round.values():
        arrays = [arrays_of(m) for m in messages]
        assert len({id(record["payload"].data) for record in arrays}) == 1
        for message, record in zip(messages, arrays, strict=True):
            assert list(message.content.array_records) == ["arrays"]
            assert len(message.content.config_records) == 1
            kinds = [array.stype for array in record.values()]
            assert kinds in ([BROADCAST], [BROADCAST, OPENING])
    for reply in fleet.grid.replies:
        if IDENTIFY not in reply.content:
            (record,) = reply.content.array_records.values()
            assert [array.stype for array in record.values()] == [UPLOAD]


def test_a_node_is_opened_once_and_apart_from_the_broadcast() -> None:
    fleet = Fleet("smafd")
    strategy = fleet.run()
    opened: dict[int, int] = {}
    for message in fleet.messages():
        opening = carried(arrays_of(message), OPENING)
        node = message.metadata.dst_node_id
        assert (opening is not None) == (node not in opened)
        if opening is not None:
            opened[node] = int(message.metadata.group_id)
            terms, payload = Opening.unpack(opening)
            assert terms.schema == fleet.schema
            assert terms.method == fleet.method
            assert Payload.parse(payload, fleet.schema).num_bytes.total == len(payload)
    for record in strategy.records:
        assert [fleet.node(c) for c in record.initialized] == sorted(
            node for node, number in opened.items() if number == record.round
        )
        assert record.reinitialized == ()


def flat_report(client: int, number: int) -> Report:
    return replace(make_report(client, number), validation_metric=0.5)


def test_a_stage_ends_early_on_the_validation_figures_of_the_train_function() -> None:
    method = FedOBD(
        stage_one_rounds=6, stage_one_epochs=1, stage_two_epochs=6, cohort=3,
        stop=EarlyStop(source="validation", patience=2),
    )  # fmt: skip
    fleet = Fleet(method=method, report=flat_report)
    strategy = fleet.run()
    assert [record.stage for record in strategy.records] == [1, 1, 1, 2, 2, 2]
    assert strategy.records == fleet.reference()[1]
    own = MetricKeys(
        num_examples="n", train_loss="l", num_eval_examples="v", eval_loss="vl", eval_metric="va"
    )
    renamed = Fleet(method=method, report=flat_report, keys=own)
    assert renamed.run().records == strategy.records
    rising = Fleet(method=method)
    assert len(rising.run().records) == 12


def test_without_validation_figures_a_run_goes_on_to_its_end() -> None:
    method = FedOBD(
        stage_one_rounds=2, stage_two_epochs=1, stop=EarlyStop(source="validation", patience=1)
    )
    fleet = Fleet(method=method)

    def leave_out(metrics: MetricRecord) -> None:
        for key in ("num-eval-examples", "eval_loss", "eval_acc"):
            del metrics[key]

    fleet.metrics = leave_out
    records = fleet.run().records
    assert [record.stage for record in records] == [1, 1, 2]
    assert all(record.validation_metric is None for record in records)
    assert "eval_loss" not in fleet.result.train_metrics_clientapp[1]


def test_a_stop_on_the_test_set_that_start_cannot_see_is_refused() -> None:
    method = FedOBD(
        stage_one_rounds=4, stage_two_epochs=1, stop=EarlyStop(source="test", patience=1)
    )
    fleet = Fleet(method=method)
    with pytest.raises(UsageError, match="test"):
        fleet.run()


def test_the_result_has_the_figures_of_each_round() -> None:
    fleet = Fleet()
    asked: list[int] = []

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord | None:
        asked.append(number)
        fleet.layout.to_state(arrays, fleet.schema)
        return MetricRecord({"accuracy": 0.1 * number}) if number != 2 else None

    strategy = fleet.strategy()
    result = strategy.start(fleet.grid, fleet.arrays, evaluate_fn=evaluate)
    assert asked == [0, 1, 2, 3, 4, 5]
    assert sorted(result.evaluate_metrics_serverapp) == [0, 1, 3, 4, 5]
    for record in strategy.records:
        figures = dict(result.train_metrics_clientapp[record.round])
        assert figures["num-replies"] == len(record.uploads)
        assert figures["uplink-bytes"] == record.uplink_bytes
        assert figures["downlink-bytes"] == record.downlink_bytes
        assert figures["train_loss"] == pytest.approx(record.train_loss, rel=1e-6)
        assert {"eval_loss", "eval_acc"} <= figures.keys()
    assert result.evaluate_metrics_clientapp == {}


def test_validation_figures_weigh_by_the_examples_that_were_evaluated() -> None:
    fleet = Fleet(method=FedAvg(rounds=1))
    (record,) = fleet.run().records
    figures = fleet.result.train_metrics_clientapp[1]
    assert figures["eval_loss"] == pytest.approx(record.validation_loss, rel=1e-6)
    assert figures["eval_acc"] == pytest.approx(record.validation_metric, rel=1e-6)


def test_a_users_own_config_entries_reach_clients_and_the_plan_has_the_last_word() -> None:
    fleet = Fleet()
    fleet.strategy(evaluate=True).start(
        fleet.grid,
        fleet.arrays,
        train_config=ConfigRecord({"lr": 0.5, "epochs": 99}),
        evaluate_config=ConfigRecord({"batch": 7}),
    )
    assert all(config["lr"] == 0.5 for config in fleet.configs_seen.values())
    assert {config["epochs"] for config in fleet.configs_seen.values()} == {1, 2}
    assert all(config_of(m)["batch"] == 7 for m in fleet.messages("evaluate"))


def test_a_model_is_known_by_names_and_shapes_alone_too() -> None:
    fleet = Fleet("fedavg")
    fleet.run(model_factory=None)
    assert bits(fleet.final) == bits(fleet.reference()[0].state)


def test_the_bytes_of_the_record_are_those_on_the_grid() -> None:
    for name in ("fedobd", "smafd"):
        fleet = Fleet(name)
        strategy = fleet.run()
        for record in strategy.records:
            down = up = 0
            for message in fleet.messages():
                if message.metadata.group_id == str(record.round):
                    down += len(carried(arrays_of(message), BROADCAST) or b"")
                    opening = carried(arrays_of(message), OPENING)
                    down += len(Opening.unpack(opening)[1]) if opening else 0
            for (number, _), upload in fleet.uploads().items():
                up += len(upload) if number == record.round else 0
            assert (record.uplink_bytes, record.downlink_bytes) == (up, down)


# --- evaluation on the clients


@every_method
def test_clients_evaluate_the_model_that_they_trained_from_and_it_travels_once(
    name: str,
) -> None:
    fleet = Fleet(name, "frozen")
    strategy = fleet.run(evaluate=True)
    assert fleet.evaluated.keys() == fleet.received.keys()
    for place, state in fleet.received.items():
        assert bits(fleet.evaluated[place]) == bits(state)
    for message in fleet.messages("evaluate"):
        assert not message.content.array_records
    for record in strategy.records:
        weights = [10 + upload.client for upload in record.uploads]
        values = [0.1 * upload.client for upload in record.uploads]
        mean = math.fsum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
        assert fleet.result.evaluate_metrics_clientapp[record.round]["eval_acc"] == mean
    assert strategy.records == fleet.reference()[1]


def test_an_evaluation_message_is_small_however_large_the_model() -> None:
    fleet = Fleet(method=FedAvg(rounds=2), make_model=lambda: nn.Linear(300, 300))
    fleet.run()
    without = fleet.grid.bytes_down
    fleet.new_grid()
    fleet.run(evaluate=True)
    num_messages = len(fleet.messages("evaluate"))
    assert num_messages == 2 * NUM_CLIENTS
    assert 0 < fleet.grid.bytes_down - without < 2000 * num_messages


def test_only_clients_whose_upload_was_accepted_evaluate_and_a_failure_is_left_out(
    log: pytest.LogCaptureFixture,
) -> None:
    fleet = Fleet(method=FedAvg(rounds=1))

    def on_train(client: int, number: int) -> None:
        if client == 1:
            raise RuntimeError("no data")

    def on_evaluate(client: int, number: int) -> None:
        if client == 2:
            raise RuntimeError("no test data")

    fleet.on_train, fleet.on_evaluate = on_train, on_evaluate
    fleet.run(evaluate=True)
    assert set(fleet.evaluated) == {(1, client) for client in (0, 2, 3, 4)}
    expected = math.fsum(0.1 * c * (10 + c) for c in (0, 3, 4)) / (10 + 13 + 14)
    assert fleet.result.evaluate_metrics_clientapp[1]["eval_acc"] == pytest.approx(expected)
    assert "no test data" in log.text


def test_a_node_that_forgets_before_it_evaluates_does_not_end_the_run() -> None:
    fleet = Fleet(method=FedAvg(rounds=2))

    def on_evaluate(client: int, number: int) -> None:
        if (client, number) == (0, 1):
            fleet.grid.forget(fleet.node(3))

    fleet.on_evaluate = on_evaluate
    strategy = fleet.run(evaluate=True)
    assert len(strategy.records) == 2
    assert {client for number, client in fleet.evaluated if number == 1} == {0, 1, 2, 4}
    assert strategy.records[1].reinitialized == (3,)


def test_absurd_evaluation_metrics_do_not_end_the_run() -> None:
    fleet = Fleet(method=FedAvg(rounds=1))
    hostile: list[MetricRecord | None] = [
        MetricRecord({"num-examples": -5, "eval_acc": 1.0}),
        MetricRecord({"num-examples": [3, 4], "eval_acc": 1.0}),
        MetricRecord({"num-examples": 0, "eval_acc": 1.0}),
        None,
    ]

    def tamper(reply: Message) -> Message:
        node = reply.metadata.src_node_id - FIRST_NODE_ID
        if reply.metadata.message_type == "evaluate" and node < 4:
            record = hostile[node]
            reply.content = RecordDict({} if record is None else {"metrics": record})
        return reply

    fleet.grid.tamper = tamper
    fleet.run(evaluate=True)
    assert dict(fleet.result.evaluate_metrics_clientapp[1]) == {"eval_acc": pytest.approx(0.4)}


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_huge_metrics_of_one_client_do_not_end_the_run(kind: str) -> None:
    fleet = Fleet(method=FedAvg(rounds=1))
    huge = {"num-examples": 1, "train_loss": 1.7e308, "eval_acc": 1.7e308}

    def tamper(reply: Message) -> Message:
        if reply.metadata.message_type == kind and reply.metadata.src_node_id == fleet.node(2):
            reply.content["metrics"] = MetricRecord(dict(huge))
            reply.content["more"] = MetricRecord(dict(huge))
        return reply

    fleet.grid.tamper = tamper
    (record,) = fleet.run(evaluate=True).records
    assert len(record.uploads) == NUM_CLIENTS


def test_a_client_cannot_outweigh_the_others_in_the_metrics() -> None:
    fleet = Fleet(method=FedAvg(rounds=1))

    def tamper(reply: Message) -> Message:
        if reply.metadata.src_node_id == fleet.node(2) and "metrics" in reply.content:
            metrics = reply.content.metric_records["metrics"]
            metrics["num-examples"], metrics["train_loss"] = 2**62, 99.0
        return reply

    fleet.grid.tamper = tamper
    (record,) = fleet.run().records
    assert record.train_loss < 1
    assert fleet.result.train_metrics_clientapp[1]["train_loss"] < 2  # type: ignore[operator]


# --- identity


def test_a_client_is_known_by_its_number_and_not_by_its_node() -> None:
    plain = Fleet("smafd")
    records = plain.run().records
    for configs in (
        [{"partition-id": i} for i in (3, 0, 4, 1, 2)],
        [{"client-id": i, "partition-id": 77} for i in (4, 3, 2, 1, 0)],
        [{"client-id": str(i)} for i in (0, 2, 4, 1, 3)],
    ):
        fleet = Fleet("smafd", configs=configs)
        assert fleet.run().records == records
        assert fleet.uploads() == plain.uploads()
        assert bits(fleet.final) == bits(plain.final)


def roster_of(grid: InProcessGrid, num_clients: int = 4, **options: Any) -> Roster:
    return Roster(grid, num_clients, poll_seconds=0.001, **options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "gives neither client-id nor partition-id as a whole number"),
        ({"client-id": "first"}, "gives neither client-id nor partition-id as a whole number"),
        ({"client-id": ""}, "gives neither client-id nor partition-id as a whole number"),
        ({"client-id": 4}, "its client-id is 4; allowed are 0 to 3"),
        ({"client-id": -1}, "its client-id is -1; allowed are 0 to 3"),
        ({"client-id": 2**70}, None),
        ({"client-id": "9" * 5000}, None),
        ({"client-id": "x", "partition-id": 1}, "as a whole number"),
        ({"client-id": math.nan}, None),
        ({"client-id": 1.5}, "as a whole number"),
        ({"client-id": True}, "as a whole number"),
        ({"client-id": math.inf}, "as a whole number"),
    ],
)
def test_a_node_without_a_legal_number_is_refused(
    config: dict[str, Any], message: str | None, log: pytest.LogCaptureFixture
) -> None:
    grid = InProcessGrid(Fleet().app(), [{"client-id": 0}, config], serialize=False)
    roster = roster_of(grid)
    assert roster.online() == {0: FIRST_NODE_ID}
    reason = roster.refused[FIRST_NODE_ID + 1]
    assert message is None or message in reason
    assert f"node {FIRST_NODE_ID + 1} is refused" in log.text
    before = len(grid.sent)
    roster.online()
    assert len(grid.sent) == before  # it is not asked over and over


def test_nodes_without_the_mod_are_refused_with_a_hint() -> None:
    bare = ClientApp()

    @bare.train()
    def train_function(message: Message, context: Context) -> Message:
        if context.node_config["kind"] == "raises":
            raise KeyError("arrays")
        return Message(RecordDict({"metrics": MetricRecord({"loss": 1.0})}), reply_to=message)

    roster = roster_of(InProcessGrid(bare, [{"kind": "raises"}, {"kind": "answers"}]))
    with pytest.raises(FedOBDError) as caught:
        roster.gather(1, 1, 0.01)
    assert "0 clients are online after 0 s; wanted at least 1" in str(caught.value)
    assert f"node {FIRST_NODE_ID}: it answered with error 2" in str(caught.value)
    assert "mods=[fedobd.flower.CompressionMod()]?" in str(caught.value)
    assert f"node {FIRST_NODE_ID + 1}: its answer holds no identity" in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"client-id": 0, "format": 99, "has-model": False}, "payload format 99, this server"),
        ({"client-id": 0, "has-model": False}, "no identity that this version understands"),
        ({"client-id": 0, "format": "1", "has-model": False}, "no identity that this version"),
        ({"client-id": "0", "format": 1, "has-model": False}, "no identity that this version"),
        ({"client-id": 0.0, "format": 1, "has-model": False}, "no identity that this version"),
        ({"client-id": [0], "format": 1, "has-model": False}, "no identity that this version"),
        ({"client-id": True, "format": 1, "has-model": False}, "no identity that this version"),
    ],
)
def test_an_answer_of_another_version_is_refused(answer: dict[str, Any], message: str) -> None:
    grid = InProcessGrid(Fleet().app(), [{"client-id": 0}, {"client-id": 1}])

    def tamper(reply: Message) -> Message:
        if reply.metadata.src_node_id == FIRST_NODE_ID:
            reply.content = RecordDict({IDENTIFY: ConfigRecord(answer)})
        return reply

    grid.tamper = tamper
    roster = roster_of(grid)
    assert roster.online() == {1: FIRST_NODE_ID + 1}
    assert message in roster.refused[FIRST_NODE_ID]


def test_a_duplicate_waits_until_the_first_has_gone() -> None:
    grid = InProcessGrid(Fleet().app(), [{"client-id": i} for i in (2, 1, 2)])
    roster = roster_of(grid)
    other = FIRST_NODE_ID + 1
    first = roster.online()[2]  # who answers first is first
    twin = 2 * FIRST_NODE_ID + 2 - first
    assert roster.online() == {2: first, 1: other}
    assert roster.refused == {twin: f"its client-id 2 is that of node {first}"}
    grid.offline = {first}
    assert roster.online() == {2: twin, 1: other}
    assert roster.refused == {}
    grid.offline = {first, twin}
    assert roster.online() == {1: other}
    assert len(grid.sent) == 3  # each was asked once


def test_a_duplicate_takes_over_in_mid_run_and_is_opened_itself() -> None:
    for name in ("fedobd", "smafd"):
        configs = [{"client-id": i} for i in (0, 1, 2, 3, 4, 3)]
        fleet = Fleet(name, configs=configs)

        twins = {FIRST_NODE_ID + 3, FIRST_NODE_ID + 5}

        def evaluate(
            number: int, arrays: ArrayRecord, fleet: Fleet = fleet, twins: set[int] = twins
        ) -> None:
            if number == 2:
                fleet.grid.offline = {m.metadata.dst_node_id for m in fleet.messages()} & twins

        strategy = fleet.strategy()
        strategy.start(fleet.grid, fleet.arrays, evaluate_fn=evaluate)
        (first_twin,) = fleet.grid.offline
        (twin,) = twins - {first_twin}
        first = next(m for m in fleet.messages() if m.metadata.dst_node_id == twin)
        assert carried(first.content["arrays"], OPENING) is not None
        took_part = {r.round for r in strategy.records if 3 in r.cohort and r.round > 2}
        assert took_part
        accepted = {r.round for r in strategy.records for u in r.uploads if u.client == 3}
        assert took_part <= accepted


def test_a_silent_new_node_does_not_hold_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the node is waited for would end with the machine, if anything waited for it."""
    monkeypatch.setattr(_roster, "IDENTIFY_SECONDS", 1e6)
    fleet = Fleet(method=FedAvg(rounds=2))
    fleet.grid.silent = {fleet.node(4)}
    strategy = fleet.run(join_timeout=0.05, round_timeout=1e6)
    assert [record.cohort for record in strategy.records] == [(0, 1, 2, 3)] * 2


def test_a_node_that_could_not_answer_at_first_is_asked_again() -> None:
    fleet = Fleet(method=FedAvg(rounds=3))

    def tamper(reply: Message) -> Message:
        if reply.metadata.src_node_id == fleet.node(4) and len(fleet.grid.sent) <= NUM_CLIENTS:
            error = Error(code=5, reason="Node Unavailable")
            return Message(error, reply_to=fleet.grid.sent[4])
        return reply

    fleet.grid.tamper = tamper
    strategy = fleet.run()
    assert strategy.records[-1].cohort == (0, 1, 2, 3, 4)


def test_a_node_that_was_refused_and_started_again_with_a_right_number_takes_part() -> None:
    configs = [{"client-id": i} for i in (0, 1, 2, 3, 77)]
    fleet = Fleet(method=FedAvg(rounds=3), configs=configs)
    node = FIRST_NODE_ID + 4

    def on_train(client: int, number: int) -> None:
        fleet.grid.offline = {node} if number == 1 else set()
        fleet.grid.contexts[node].node_config = {"client-id": 4}

    fleet.on_train = on_train
    strategy = fleet.run()
    assert strategy.records[-1].cohort == (0, 1, 2, 3, 4)


def test_a_node_that_appears_later_takes_part_from_then_on() -> None:
    for name in ("fedobd", "smafd"):
        fleet = Fleet(name)
        fleet.grid.offline = {fleet.node(2), fleet.node(4)}

        def on_train(client: int, number: int, fleet: Fleet = fleet) -> None:
            if number == 2:
                fleet.grid.offline = set()

        fleet.on_train = on_train
        strategy = fleet.run()
        server, records, uploads = fleet.reference(available={1: {0, 1, 3}, 2: {0, 1, 3}})
        assert strategy.records == records
        assert fleet.uploads() == uploads
        assert bits(fleet.final) == bits(server.state)


def test_too_few_nodes_are_an_error_that_says_how_many() -> None:
    fleet = Fleet()
    fleet.grid.offline = {fleet.node(client) for client in (0, 1, 2)}
    with pytest.raises(FedOBDError, match=r"^2 clients are online after 0 s; wanted at least 3"):
        fleet.run(min_replies=3)


# --- clients that fail


def test_an_upload_that_fails_is_recorded_and_the_rest_weighs_as_it_should() -> None:
    for name in sorted(SHORT_METHODS):
        fleet = Fleet(name)
        cohort = fleet.reference()[1][1].cohort

        def on_train(client: int, number: int, cohort: tuple[int, ...] = cohort) -> None:
            if (number, client) == (2, cohort[1]):
                raise RuntimeError("no data")

        fleet.on_train = on_train
        strategy = fleet.run()
        (refusal,) = strategy.records[1].refusals
        assert (refusal.client, refusal.reason) == (cohort[1], "failed")
        assert refusal.message == "error 2: <class 'RuntimeError'>:<'no data'>"
        fates = {(2, cohort[1]): (refusal.reason, refusal.message)}
        server, records, _ = fleet.reference(fates)
        assert strategy.records == records
        assert bits(fleet.final) == bits(server.state)


def test_a_late_reply_is_left_out_and_does_not_poison_the_next_round() -> None:
    for way in ("late", "silent"):
        fleet = Fleet()
        straggler = fleet.reference()[1][1].cohort[0]
        node = fleet.node(straggler)

        def on_train(
            client: int, number: int, way: str = way, node: int = node, fleet: Fleet = fleet
        ) -> None:
            grid = fleet.grid
            if way == "late":
                grid.late = {node: math.inf} if number == 2 else {}
                if number == 3:
                    grid.release()

        fleet.on_train = on_train

        def evaluate(
            number: int,
            arrays: ArrayRecord,
            way: str = way,
            node: int = node,
            fleet: Fleet = fleet,
        ) -> None:
            if way == "silent":
                fleet.grid.silent = {node} if number == 1 else set()

        strategy = fleet.strategy(round_timeout=SHORT)
        fleet.result = strategy.start(fleet.grid, fleet.arrays, evaluate_fn=evaluate)
        (refusal,) = (r for record in strategy.records for r in record.refusals)
        assert (refusal.client, refusal.reason) == (straggler, "late")
        assert refusal.message == f"no reply within {SHORT:g} seconds"
        fates = {(2, straggler): (refusal.reason, refusal.message)}
        server, records, _ = fleet.reference(fates)
        assert strategy.records == records
        assert bits(fleet.final) == bits(server.state)


def test_messages_live_no_longer_than_their_round() -> None:
    fleet = Fleet()
    fleet.run(round_timeout=7.0, evaluate=True)
    for message in (*fleet.messages(), *fleet.messages("evaluate")):
        assert message.metadata.ttl == 7.0
    fleet.new_grid()
    fleet.strategy().start(fleet.grid, fleet.arrays, timeout=5.0)
    assert {message.metadata.ttl for message in fleet.messages()} == {5.0}


def test_a_node_that_goes_in_mid_round_is_recorded_left_out_and_taken_back() -> None:
    fleet = Fleet()
    cohort = fleet.reference()[1][1].cohort
    gone = cohort[-1]

    def on_train(client: int, number: int) -> None:
        if number == 2:
            fleet.grid.offline = {fleet.node(gone)}
        if number == 4:
            fleet.grid.offline = set()

    fleet.on_train = on_train
    strategy = fleet.run()
    (refusal,) = strategy.records[1].refusals
    assert (refusal.client, refusal.reason) == (gone, "failed")
    assert refusal.message.startswith("error 5: Node Unavailable")
    there = set(range(NUM_CLIENTS)) - {gone}
    server, records, _ = fleet.reference(
        {(2, gone): (refusal.reason, refusal.message)}, available={3: there, 4: there}
    )
    assert strategy.records == records
    assert gone in strategy.records[4].cohort
    assert bits(fleet.final) == bits(server.state)


def test_a_smafd_node_that_never_got_its_opening_is_sent_it_when_it_is_back() -> None:
    fleet = Fleet("smafd")
    cohort = fleet.reference()[1][0].cohort
    gone = cohort[-1]

    def on_train(client: int, number: int) -> None:
        fleet.grid.offline = {fleet.node(gone)} if number == 1 else set()

    fleet.on_train = on_train
    strategy = fleet.run()
    again = [record for record in strategy.records[1:] if gone in record.cohort]
    assert again
    assert again[0].reinitialized == (gone,)
    assert all(not record.refusals for record in strategy.records[1:])


def test_a_long_reason_is_cut_and_an_absent_one_is_no_crash() -> None:
    fleet = Fleet(method=FedAvg(rounds=1))

    def tamper(reply: Message) -> Message:
        client = reply.metadata.src_node_id - FIRST_NODE_ID
        if client < 2 and reply.has_content() and IDENTIFY not in reply.content:
            message = next(
                m
                for m in fleet.messages()
                if m.metadata.message_id == reply.metadata.reply_to_message_id
            )
            reason = None if client else "x" * 10_000_000
            return Message(Error(code=2, reason=reason), reply_to=message)
        return reply

    fleet.grid.tamper = tamper
    (record,) = fleet.run().records
    assert [refusal.client for refusal in record.refusals] == [0, 1]
    assert len(record.refusals[0].message) < 3000
    assert record.refusals[1].message == "error 2: no reason"


def test_a_long_reason_is_cut_in_the_roster_and_in_the_log_too(
    log: pytest.LogCaptureFixture,
) -> None:
    app = ClientApp()

    @app.train()
    def train_function(message: Message, context: Context) -> Message:
        raise RuntimeError("x" * 1_000_000)

    roster = roster_of(InProcessGrid(app, [{"client-id": 0}]))
    roster.online()
    assert len(roster.refused[FIRST_NODE_ID]) < 5000
    assert len(log.text) < 10_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num-examples": None}, "reports no whole number 'num-examples'"),
        ({"num-examples": 10.5}, "reports no whole number 'num-examples'"),
        ({"num-examples": 0}, "trained on no examples"),
        ({"num-examples": -7}, "num_examples is -7"),
        ({"num-examples": 2**39}, "claims 549755813888 examples; allowed are 1 to"),
        ({"num-examples": 2**62}, "examples"),
        ({"train_loss": math.nan}, ""),
        ({"train_loss": math.inf}, ""),
        ({"train_loss": [0.5, 0.6]}, ""),
        ({"num-eval-examples": -1}, ""),
        ({"num-eval-examples": 2**62}, ""),
        ({"num-eval-examples": math.nan}, ""),
        ({"eval_acc": math.nan}, ""),
        ({"eval_loss": [1.0]}, ""),
    ],
)
def test_a_clients_absurd_figures_leave_it_out_with_a_reason(
    change: dict[str, Any], message: str
) -> None:
    fleet = Fleet(method=FedAvg(rounds=1))
    villains: list[int] = []

    def on_train(client: int, number: int) -> None:
        villains.append(client)

    def metrics(record: MetricRecord) -> None:
        if villains[-1] == 3:
            for key, value in change.items():
                if value is None:
                    del record[key]
                else:
                    record[key] = value

    fleet.on_train, fleet.metrics = on_train, metrics
    (record,) = fleet.run().records
    (refusal,) = record.refusals
    assert refusal.client == 3
    assert message in refusal.message
    assert [upload.client for upload in record.uploads] == [0, 1, 2, 4]
    assert math.isfinite(record.train_loss)


# --- hostile uploads


def tampered(fleet: Fleet, number: int, client: int, make: Callable[[bytes], Any]) -> list[bytes]:
    """Have a client's upload of a round changed on its way; return what was made of it."""
    made: list[bytes] = []

    def tamper(reply: Message) -> Message:
        if reply.metadata.src_node_id == fleet.node(client) and reply.has_content():
            upload = carried(reply.content.get("arrays"), UPLOAD)
            if upload is not None and Payload.parse(upload, fleet.schema).header.round == number:
                changed = make(upload)
                if isinstance(changed, bytes):
                    made.append(changed)
                    reply.content["arrays"] = carry(changed, UPLOAD)
                else:
                    reply.content = changed
        return reply

    fleet.grid.tamper = tamper
    return made


HOSTILE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda upload: b"", "truncated"),
    "one byte": (lambda upload: upload[:1], "truncated"),
    "half": (lambda upload: upload[: len(upload) // 2], "checksum"),
    "last byte cut": (lambda upload: upload[:-1], "checksum"),
    "a byte more": (lambda upload: upload + b"\0", "checksum"),
    "twice": (lambda upload: upload + upload, "checksum"),
    "first bit": (lambda upload: bytes([upload[0] ^ 1]) + upload[1:], ""),
    "middle bit": (
        lambda u: u[: len(u) // 2] + bytes([u[len(u) // 2] ^ 16]) + u[len(u) // 2 + 1 :],
        "checksum",
    ),
    "another client": (
        lambda upload: forge(upload, client=(int(field_of(upload, "client")) + 1) % NUM_CLIENTS),
        "client",
    ),
    "no examples": (lambda upload: forge(upload, num_examples=0), ""),
    "absurd examples": (lambda upload: forge(upload, num_examples=10_000_001), "limit"),
    "all examples": (lambda upload: forge(upload, num_examples=2**40 - 1), ""),
    "another round": (lambda upload: forge(upload, round=1), "round"),
    "another stage": (lambda upload: forge(upload, stage=2), "round"),
    "another method": (lambda upload: forge(upload, method=1), "method"),
    "loss NaN": (lambda upload: forge(upload, train_loss=math.nan), ""),
    "garbage": (lambda upload: bytes(range(256)) * 400, ""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_upload_is_refused_and_the_round_goes_on(name: str) -> None:
    make, reason = HOSTILE[name]
    fleet = Fleet()
    cohort = fleet.reference()[1][1].cohort
    villain = cohort[1]
    made = tampered(fleet, 2, villain, make)
    strategy = fleet.run()
    (refusal,) = strategy.records[1].refusals
    assert refusal.client == villain
    assert refusal.reason == reason or not reason
    assert refusal.uplink_bytes == len(made[0])
    server, records, _ = fleet.reference({(2, villain): made[0]})
    assert strategy.records == records
    assert bits(fleet.final) == bits(server.state)


def test_an_upload_of_another_model_or_full_of_nan_is_refused() -> None:
    other = Fleet(method=FedAvg(rounds=1), make_model=lambda: nn.Linear(3, 2))
    other.run()
    foreign = other.uploads()[1, 1]
    fleet = Fleet(method=FedAvg(rounds=1))
    tampered(fleet, 1, 1, lambda upload: foreign)
    (record,) = fleet.run().records
    assert [(r.client, r.reason) for r in record.refusals] == [(1, "schema")]

    def nan(upload: bytes) -> bytes:
        raw = fleet.received[1, 2]["0.weight"]
        trained = train(fleet.schema, fleet.received[1, 2], 2, 1)["0.weight"]
        assert raw.shape == trained.shape
        before = trained.numpy().tobytes()
        assert upload.count(before) == 1
        after = torch.full_like(trained, math.nan).numpy().tobytes()
        return seal(upload[:-4].replace(before, after))

    fleet.new_grid()
    tampered(fleet, 1, 2, nan)
    (record,) = fleet.run().records
    assert [(r.client, r.reason) for r in record.refusals] == [(2, "not finite")]
    assert all(value.isfinite().all() for value in fleet.final.values())


def test_training_that_gives_nan_leaves_the_client_out_with_that_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet = Fleet(method=FedAvg(rounds=1))

    def bad(schema: ModelSchema, start: ModelState, client: int, number: int) -> ModelState:
        trained = honest(schema, start, client, number)
        if client == 3:
            trained["0.bias"].fill_(math.nan)
        return trained

    honest = train
    monkeypatch.setitem(globals(), "train", bad)
    (record,) = fleet.run().records
    (refusal,) = record.refusals
    assert (refusal.client, refusal.reason) == (3, "failed")
    assert "NaN" in refusal.message or "finite" in refusal.message
    assert "0.bias" in refusal.message


def _replace(content: RecordDict, upload: bytes) -> RecordDict:
    return content


def test_replies_without_an_upload_are_recorded_as_such() -> None:
    shapes: list[RecordDict] = [
        RecordDict(),
        RecordDict({"arrays": ConfigRecord({"a": 1})}),
        RecordDict({"arrays": ArrayRecord()}),
        RecordDict({"arrays": ArrayRecord([torch.zeros(3).numpy()])}),
        RecordDict({"arrays": carry(b"x" * 100, BROADCAST)}),
        RecordDict({"arrays": carry(b"x" * 100, OPENING)}),
        RecordDict({"metrics": MetricRecord({"num-examples": 3})}),
    ]
    for content in shapes:
        fleet = Fleet(method=FedAvg(rounds=1))
        tampered(fleet, 1, 2, partial(_replace, content))
        (record,) = fleet.run().records
        (refusal,) = record.refusals
        assert (refusal.client, refusal.reason, refusal.message) == (
            2, "failed", "the reply holds no upload",
        )  # fmt: skip
        assert len(record.uploads) == 4


def test_an_upload_of_more_than_its_budget_is_refused() -> None:
    fleet = Fleet()
    cohort = fleet.reference()[1][0].cohort
    villain = cohort[0]

    def everything(upload: bytes) -> bytes:
        state = fleet.received[1, villain]
        plan = replace(read_plan(fleet.configs_seen[1, villain], villain), cohort=cohort)
        return craft_upload(
            fleet.method, fleet.schema, plan, villain, state,
            train(fleet.schema, state, villain, 1),
            kept=tuple(range(len(fleet.schema.blocks))),
        )  # fmt: skip

    tampered(fleet, 1, villain, everything)
    record = fleet.run().records[0]
    assert [(r.client, r.reason) for r in record.refusals] == [(villain, "method")]


def test_a_hostile_client_cannot_ask_for_its_opening_for_ever() -> None:
    fleet = Fleet("smafd")

    def tamper(reply: Message) -> Message:
        if reply.metadata.src_node_id == fleet.node(3) and len(fleet.messages()) > 0:
            message = next(
                m
                for m in fleet.grid.sent
                if m.metadata.message_id == reply.metadata.reply_to_message_id
            )
            if IDENTIFY not in message.content:
                return Message(Error(code=6, reason=NEEDS_OPENING), reply_to=message)
        return reply

    fleet.grid.tamper = tamper
    strategy = fleet.run(round_timeout=5.0)
    took_part = [record for record in strategy.records if 3 in record.cohort]
    assert took_part
    for record in took_part:
        assert [(r.client, r.reason) for r in record.refusals] == [(3, "failed")]
        assert record.reinitialized.count(3) <= 1


# --- nodes that forget


@every_method
def test_what_a_client_keeps_lies_in_its_context_each_as_one_array(name: str) -> None:
    fleet = Fleet(name)
    fleet.run()
    for context in fleet.grid.contexts.values():
        kept = {"fedobd.opening"} | ({"fedobd.state"} if name == "smafd" else set())
        assert set(context.state) == kept
        for key, record in context.state.array_records.items():
            (array,) = record.values()
            assert array.stype == key


@pytest.mark.parametrize(("name", "kind"), [("smafd", "batch_norm"), ("fedobd", "frozen")])
def test_a_node_that_forgot_is_opened_again_within_the_round(name: str, kind: str) -> None:
    fleet = Fleet(name, kind)
    reference = fleet.reference()[1]
    both = [c for c in reference[1].cohort if c in reference[0].cohort]
    lost = both[0]

    def evaluate(number: int, arrays: ArrayRecord) -> None:
        if number == 1:
            fleet.grid.forget(fleet.node(lost))

    strategy = fleet.strategy()
    fleet.result = strategy.start(fleet.grid, fleet.arrays, evaluate_fn=evaluate)
    second = strategy.records[1]
    assert second.reinitialized == (lost,)
    assert second.refusals == ()
    assert lost in {upload.client for upload in second.uploads}
    sent = [m for m in fleet.messages() if m.metadata.group_id == "2"]
    assert len(sent) == len(second.cohort) + 1
    broadcasts = sum(len(carried(arrays_of(m), BROADCAST) or b"") for m in sent)
    openings = [carried(arrays_of(m), OPENING) for m in sent]
    opening = sum(len(Opening.unpack(data)[1]) for data in openings if data)
    assert second.initial_bytes == opening > 0
    assert second.downlink_bytes == broadcasts + opening
    others = (strategy.records[0], *strategy.records[2:])
    assert all(record.reinitialized == () for record in others)
    if name == "fedobd":  # nothing is lost that the opening does not bring back
        assert bits(fleet.final) == bits(fleet.reference()[0].state)


def test_all_nodes_may_forget_after_every_round() -> None:
    for name in sorted(SHORT_METHODS):
        fleet = Fleet(name)

        def evaluate(number: int, arrays: ArrayRecord, fleet: Fleet = fleet) -> None:
            for node in fleet.grid.contexts:
                fleet.grid.forget(node)

        strategy = fleet.strategy()
        fleet.result = strategy.start(fleet.grid, fleet.arrays, evaluate_fn=evaluate)
        assert all(not record.refusals for record in strategy.records)
        seen: set[int] = set()
        for record in strategy.records:
            assert set(record.reinitialized) == set(record.cohort) & seen
            seen |= set(record.cohort)
        if not fleet.method.keeps_client_state:
            assert bits(fleet.final) == bits(fleet.reference()[0].state)


# --- too few uploads


def test_a_round_with_too_few_uploads_is_repeated_and_its_bytes_count() -> None:
    for name in ("fedobd", "smafd", "fedavg"):
        fleet = Fleet(name)
        cohort = fleet.reference()[1][1].cohort
        trained: list[int] = []

        def on_train(
            client: int, number: int, trained: list[int] = trained, villain: int = cohort[0]
        ) -> None:
            if number == 2:
                trained.append(client)
                if trained.count(client) == 1 and client == villain:
                    raise RuntimeError("not now")

        fleet.on_train = on_train
        strategy = fleet.run(min_replies=3)
        server, records, uploads = fleet.reference()
        assert sorted(trained) == sorted(cohort * 2)
        assert bits(fleet.final) == bits(server.state)
        repeated, once = strategy.records[1], records[1]
        assert repeated.uplink_bytes == once.uplink_bytes + sum(
            len(uploads[2, client]) for client in cohort[1:]
        )
        broadcast = once.broadcast.total
        extra = broadcast * len(cohort)
        openings = once.initial_bytes  # sent in the first attempt, and not again
        assert repeated.downlink_bytes == once.downlink_bytes + extra
        assert strategy.records[2:] == [
            replace(r, initialized=s.initialized)
            for r, s in zip(records[2:], strategy.records[2:], strict=True)
        ]
        assert repeated.uploads == once.uploads
        assert openings >= 0


def test_a_round_that_never_has_enough_uploads_ends_the_run_with_the_reasons(
    log: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    fleet = Fleet()
    cohort = fleet.reference()[1][1].cohort
    attempts: list[int] = []

    def on_train(client: int, number: int) -> None:
        if number == 2 and client == cohort[0]:
            attempts.append(client)
            raise RuntimeError(f"disk full {len(attempts)}")

    fleet.on_train = on_train
    strategy = fleet.strategy(min_replies=3, max_attempts=2, checkpoint_dir=tmp_path)
    with pytest.raises(EmptyRoundError, match=r"round 2 had fewer than 3 uploads in 2 attempts"):
        strategy.start(fleet.grid, fleet.arrays)
    assert len(attempts) == 2
    assert "disk full 1" in log.text
    assert "disk full 2" in log.text
    assert len(strategy.records) == 1
    fleet.on_train = lambda client, number: None
    resumed = fleet.run(min_replies=3, checkpoint_dir=tmp_path, resume=True)
    assert bits(fleet.final) == bits(fleet.reference()[0].state)
    assert [record.round for record in resumed.records] == [2, 3, 4, 5]


def test_the_error_of_a_failed_run_says_why_each_client_was_left_out() -> None:
    fleet = Fleet(method=FedAvg(rounds=1))

    def on_train(client: int, number: int) -> None:
        raise RuntimeError(f"disk {client} full")

    fleet.on_train = on_train
    with pytest.raises(EmptyRoundError, match="disk 3 full"):
        fleet.run(max_attempts=1)


def test_all_late_is_a_repeated_round_and_the_late_replies_are_not_mixed_in() -> None:
    fleet = Fleet(method=FedAvg(rounds=2))
    fleet.grid.late = {}
    tries: list[tuple[int, int]] = []

    def on_train(client: int, number: int) -> None:
        tries.append((number, client))
        first = tries.count((number, client)) == 1
        late = number == 2 and first
        fleet.grid.late = dict.fromkeys(fleet.grid.contexts, math.inf if late else 0)
        if not late:
            fleet.grid.release()

    fleet.on_train = on_train
    strategy = fleet.run(round_timeout=SHORT)
    server, records, _ = fleet.reference()
    assert bits(fleet.final) == bits(server.state)
    assert strategy.records[1].uploads == records[1].uploads
    assert len(tries) == 3 * NUM_CLIENTS


# --- checkpoints


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@every_method
def test_a_run_killed_in_any_round_goes_on_to_the_same_end(name: str, tmp_path: Path) -> None:
    whole = Fleet(name)
    whole.run(checkpoint_dir=tmp_path / "whole")
    for number in range(1, len(rows(tmp_path / "whole")) + 1):
        folder = tmp_path / f"killed in {number}"
        fleet = Fleet(name)
        done: list[int] = []

        def on_train(
            client: int, current: int, number: int = number, done: list[int] = done
        ) -> None:
            if current == number:
                done.append(client)
                if len(done) == 2:
                    raise Killed

        fleet.on_train = on_train
        with pytest.raises(Killed):
            fleet.run(checkpoint_dir=folder)
        assert len(rows(folder)) == number - 1 if number > 1 else True
        fleet.on_train = lambda client, current: None
        fleet.new_grid()
        strategy = fleet.run(checkpoint_dir=folder, resume=True)
        assert [record.round for record in strategy.records] == list(
            range(number, whole_rounds(tmp_path) + 1)
        )
        if fleet.method.keeps_client_state and number > 1:
            first = strategy.records[0]
            assert first.initialized == first.cohort  # clients have lost what they kept
            expected = resumed_reference(fleet, number)
            assert bits(fleet.final) == bits(expected)
        else:
            assert bits(fleet.final) == bits(whole.final)
            assert rows(folder) == rows(tmp_path / "whole")


def whole_rounds(tmp_path: Path) -> int:
    return len(rows(tmp_path / "whole"))


def resumed_reference(fleet: Fleet, number: int) -> ModelState:
    """Return what the core alone makes of a run whose clients lost their states at a round."""
    server, engine = set_up(fleet.method, fleet.model, schema=fleet.schema)
    for _ in range(number - 1):
        engine.play(server)
    return fleet.reference(saved=server)[0].state


@pytest.mark.parametrize("number", [2, 5])
def test_a_kill_between_record_and_checkpoint_leaves_no_record_twice(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Fleet()
    whole.run(checkpoint_dir=tmp_path / "whole")
    fleet = Fleet()
    save = RunFolder.save_checkpoint

    def die(folder: RunFolder, saved: Any) -> None:
        if saved.values["rounds"] == number:
            raise Killed
        save(folder, saved)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_checkpoint", die)
        with pytest.raises(Killed):
            fleet.run(checkpoint_dir=tmp_path / "killed")
    assert len(rows(tmp_path / "killed")) == number
    with (tmp_path / "killed" / "rounds.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"round": ')
    fleet.new_grid()
    fleet.run(checkpoint_dir=tmp_path / "killed", resume=True)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert bits(fleet.final) == bits(whole.final)


def test_a_kill_while_the_server_evaluates_loses_nothing(tmp_path: Path) -> None:
    fleet, whole = Fleet(), Fleet()
    whole.run()

    def die(number: int, arrays: ArrayRecord) -> None:
        if number == 4:
            raise Killed

    with pytest.raises(Killed):
        fleet.strategy(checkpoint_dir=tmp_path).start(fleet.grid, fleet.arrays, evaluate_fn=die)
    fleet.new_grid()
    strategy = fleet.run(checkpoint_dir=tmp_path, resume=True)
    assert [record.round for record in strategy.records] == [5]
    assert bits(fleet.final) == bits(whole.final)


def test_a_resumed_run_stops_early_where_the_whole_one_did(tmp_path: Path) -> None:
    method = FedOBD(
        stage_one_rounds=6, stage_one_epochs=1, stage_two_epochs=6, cohort=3,
        stop=EarlyStop(source="validation", patience=2),
    )  # fmt: skip
    whole = Fleet(method=method, report=flat_report)
    whole.run(checkpoint_dir=tmp_path / "whole")
    for after in range(1, 6):
        folder = tmp_path / str(after)
        fleet = Fleet(method=method, report=flat_report)
        fleet.run(num_rounds=after, checkpoint_dir=folder)
        fleet.new_grid()
        fleet.run(checkpoint_dir=folder, resume=True)
        assert rows(folder) == rows(tmp_path / "whole")


def test_num_rounds_is_a_cap_and_resume_goes_on(tmp_path: Path) -> None:
    whole, fleet = Fleet("fedavg"), Fleet("fedavg")
    whole.run()
    assert fleet.run(num_rounds=0, checkpoint_dir=tmp_path).records == []
    assert bits(fleet.final) == bits(fleet.state)
    for expected in (1, 3, 4, 4):
        fleet.new_grid()
        fleet.run(num_rounds=2 if expected > 1 else 1, checkpoint_dir=tmp_path, resume=True)
        assert len(rows(tmp_path)) == expected
    assert bits(fleet.final) == bits(whole.final)


def test_a_negative_num_rounds_is_refused() -> None:
    with pytest.raises(UsageError, match="num_rounds"):
        Fleet("fedavg").run(num_rounds=-1)


def test_the_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    fleet = Fleet()
    fleet.run(num_rounds=1, checkpoint_dir=tmp_path / "run")
    before = rows(tmp_path / "run")
    with pytest.raises(UsageError, match=r"holds another run; choose another, or --resume"):
        fleet.run(checkpoint_dir=tmp_path / "run")
    for changes, message in (
        ({"seed": SEED + 1}, rf"seed was {SEED}, is {SEED + 1}"),
        ({"num_clients": 4}, r"clients was 5, is 4"),
    ):
        with pytest.raises(UsageError, match=message):
            fleet.run(checkpoint_dir=tmp_path / "run", resume=True, **changes)
    for other in (
        Fleet("smafd"), Fleet(kind="tied"),
        Fleet(method=replace(fleet.method, stage_one_rounds=9)),  # type: ignore[type-var]
    ):  # fmt: skip
        with pytest.raises(UsageError, match=r"another configuration and cannot be resumed"):
            other.run(checkpoint_dir=tmp_path / "run", resume=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        fleet.run(checkpoint_dir=tmp_path / "file")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(UsageError, match=r"other files|no run to resume"):
            fleet.run(checkpoint_dir=tmp_path / "own", resume=resume)
    assert rows(tmp_path / "run") == before


def test_a_run_cannot_go_on_with_another_kind_of_start(tmp_path: Path) -> None:
    fleet = Fleet("smafd")
    fleet.mod = holding_mod(fleet)
    fleet.new_grid()
    fleet.run(num_rounds=1, checkpoint_dir=tmp_path, shared_start=True)
    with pytest.raises(UsageError, match="shared_start"):
        fleet.run(checkpoint_dir=tmp_path, resume=True)


def test_a_damaged_checkpoint_is_said_to_be_one(tmp_path: Path) -> None:
    fleet = Fleet()
    fleet.run(num_rounds=2, checkpoint_dir=tmp_path)
    file = tmp_path / "checkpoint" / "server.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(UsageError, match=r"server.safetensors' is damaged"):
        fleet.run(checkpoint_dir=tmp_path, resume=True)


# --- a shared start


def holding_mod(fleet: Fleet, seed: int = 0) -> CompressionMod:
    """Return a mod that makes the initial model, or with another seed another one."""

    def make() -> nn.Module:
        model = fleet.make_model()
        state = make_state(model, seed)
        model.load_state_dict({key: state[name] for key, name in fleet.layout.keys}, strict=True)
        return model

    return CompressionMod(make)


@every_method
@pytest.mark.parametrize("kind", ["batch_norm", "frozen", "tied"])
def test_a_shared_start_sends_a_fingerprint_and_ends_with_the_same_model(
    name: str, kind: str
) -> None:
    fleet = Fleet(name, kind)
    fleet.mod = holding_mod(fleet)
    fleet.new_grid()
    strategy = fleet.run(shared_start=True)
    assert strategy.records[0].downlink_bytes < 250 * len(strategy.records[0].cohort)
    server, engine = set_up(fleet.method, fleet.model, schema=fleet.schema, shared_start=True)
    logs = engine.run(server)
    assert strategy.records == [log.record for log in logs]
    assert bits(fleet.final) == bits(server.state)


def test_a_shared_start_is_refused_for_nodes_without_the_model() -> None:
    fleet = Fleet()
    with pytest.raises(FedOBDError) as caught:
        fleet.run(shared_start=True)
    assert "its mod has no model; wanted CompressionMod(model_factory=...)" in str(caught.value)
    assert str(caught.value).count("node ") == NUM_CLIENTS


def test_a_client_with_another_initial_model_is_left_out_with_that_reason() -> None:
    fleet = Fleet(method=FedAvg(rounds=1))
    right, wrong = holding_mod(fleet), holding_mod(fleet, seed=1)

    class Mixed(CompressionMod):
        @property
        def has_model(self) -> bool:
            return True

        def initial_state(self, context: Context) -> ModelState:
            mod = wrong if context.node_config["partition-id"] == 2 else right
            return mod.initial_state(context)

    fleet.mod = Mixed()
    fleet.new_grid()
    (record,) = fleet.run(shared_start=True).records
    (refusal,) = record.refusals
    assert (refusal.client, refusal.reason) == (2, "failed")
    assert "holds another initial model than the server" in refusal.message


# --- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_replies": 0}, "min_replies is 0; allowed are numbers from 1"),
        ({"max_attempts": 0}, "max_attempts is 0; allowed are numbers from 1"),
        (
            {"min_replies": 6},
            "min_replies is 6; the smallest cohort of fedobd with 5 clients has 3",
        ),
        ({"round_timeout": 0}, "round_timeout is 0; allowed are seconds above 0"),
        ({"round_timeout": -1.0}, "round_timeout is -1.0"),
        ({"round_timeout": math.nan}, "round_timeout is nan"),
        ({"join_timeout": 0}, "join_timeout is 0; allowed are seconds above 0"),
        ({"resume": True}, "resume needs checkpoint_dir"),
        ({"num_clients": 0}, "0 clients|num_clients is 0"),
        ({"max_examples": 0}, "max_examples is 0"),
        ({"min_replies": 4}, "min_replies is 4.*cohort"),
        ({"poll_seconds": -1.0}, "poll_seconds is -1.0"),
        ({"poll_seconds": math.nan}, "poll_seconds is nan"),
    ],
)
def test_a_wrong_option_is_refused_with_what_is_allowed(
    options: dict[str, Any], message: str
) -> None:
    fleet = Fleet()
    with pytest.raises(UsageError, match=message):
        fleet.run(**options)
    assert fleet.grid.sent == []


def test_a_wrong_timeout_of_start_is_refused_too() -> None:
    fleet = Fleet()
    with pytest.raises(UsageError, match="timeout is 0"):
        fleet.strategy().start(fleet.grid, fleet.arrays, timeout=0)


def test_arrays_that_do_not_fit_are_refused_before_anything_is_sent() -> None:
    fleet = Fleet()
    for arrays, message in (
        (ArrayRecord(), "0.bias"),
        (ArrayRecord({**fleet.arrays, "extra": Array(torch.zeros(1).numpy())}), "'extra' unknown"),
        (ArrayRecord({**fleet.arrays, "0.bias": Array(torch.zeros(9).numpy())}), r"shape \(9,\)"),
        (
            ArrayRecord({**fleet.arrays, "0.bias": Array("float32", (4,), "odd", b"1")}),
            "cannot be read",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            fleet.strategy().start(fleet.grid, arrays)
    assert fleet.grid.sent == []


def test_a_model_of_nan_is_refused_before_it_is_sent() -> None:
    fleet = Fleet()
    state = {**fleet.state, "0.bias": torch.full((4,), math.nan)}
    with pytest.raises(UsageError, match=r"0\.bias"):
        fleet.strategy().start(fleet.grid, fleet.layout.to_arrays(state))
    assert fleet.messages() == []


def test_fedobd_is_the_default_method_and_a_stray_strategy_hook_is_harmless() -> None:
    strategy = FedOBDStrategy(num_clients=3)
    assert strategy.method == FedOBD()
    assert isinstance(Fleet("smafd").strategy().method, SMAFD)


def test_the_evaluation_names_the_round_that_was_kept() -> None:
    fleet = Fleet()
    fleet.run(evaluate=True)
    for message in fleet.messages("evaluate"):
        config = config_of(message)
        assert config[KEPT_ROUND] == config["server-round"]
        assert message.metadata.group_id == str(config["server-round"])


def test_two_runs_with_one_grid_do_not_mix_their_models() -> None:
    fleet = Fleet("smafd")
    fleet.run()
    first = fleet.final
    fleet.run()  # the nodes still keep what the first left them
    assert bits(fleet.final) == bits(first)
    other = Fleet("fedobd", "frozen")
    other.grid = fleet.grid
    with suppress(FedOBDError):
        fleet.run(seed=SEED + 1)
    fleet.run()
    assert bits(fleet.final) == bits(first)


def test_start_does_not_change_what_it_was_given() -> None:
    fleet = Fleet()
    before = {key: array.data for key, array in fleet.arrays.items()}
    config = ConfigRecord({"lr": 0.1})
    fleet.strategy().start(fleet.grid, fleet.arrays, train_config=config)
    assert {key: array.data for key, array in fleet.arrays.items()} == before
    assert dict(config) == {"lr": 0.1}
    assert get_state(fleet.model).keys() == fleet.state.keys()
