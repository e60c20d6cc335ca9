"""A deployment as its users have it: traffic, kills, strangers, hostile clients, stragglers.

The tests share three SuperNodes behind TLS and keys (`conftest.py`). Where one needs a client at a
certain place, it holds it there (`gated_client.py`), so that nothing depends on the machine's
speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from federation import REFUSED, Federation, Run, Traffic

from fedobd.experiments import RunConfig, RunFolder, Summary, load_config, read_summary, run
from tests.deployment.hostile_client import CLAIMED_EXAMPLES, FAULTS
from tests.deployment.scene import (
    NUM_CLIENTS,
    PACKAGE,
    RUN_TIMEOUT_S,
    Gate,
    Record,
    assert_is_replay,
    digits,
    make_app,
    read_records,
    rounds,
    uploaders,
    wait_for_record,
)

pytestmark = pytest.mark.deployment

EVERYONE = list(range(NUM_CLIENTS))


# --- 1. traffic

TINY, LARGE = 8, 576  # widths of the model


def traffic_config(method: str, width: int) -> RunConfig:
    """Return two rounds of all clients, by either method."""
    module = f"{PACKAGE}.large_model"
    overrides = [
        f"data.name={module}:make_data",
        f"model.name={module}:make_model",
        f"model.options.width={width}",
        f"federation.clients={NUM_CLIENTS}",
        *rounds(1, 1),
        "methods.fedavg.rounds=2",
        "methods.fedavg.epochs=1",
    ]
    others = [f"methods.{name}.cohort=1.0" for name in ("fedpaq", "feddropoutavg", "smafd")]
    return load_config("digits", overrides=[*overrides, *others]).for_method(method, seed=0)


def measure(
    deployment: Federation, folder: Path, method: str, width: int
) -> tuple[Summary, Run, Traffic]:
    """Run the app and return its summary, what Flower says of it, and the sockets' bytes."""
    config = traffic_config(method, width)
    app = make_app(folder / "app", config, modules=["large_model.py"])
    deployment.reset_socket_bytes()
    ended = deployment.run(app, {"output": str(folder / "run")}, timeout_s=RUN_TIMEOUT_S)
    sockets = deployment.socket_bytes()
    assert ended.completed, deployment.log(ended.run_id)
    records = read_records(folder / "run")
    assert [uploaders(record) for record in records] == [EVERYONE] * 2
    return read_summary(RunFolder(folder / "run")), ended, sockets


def test_our_count_is_flowers_and_fedobd_sends_a_quarter_of_fedavg(
    deployment: Federation, tmp_path: Path
) -> None:
    tiny, tiny_run, _ = measure(deployment, tmp_path / "tiny", "fedobd", TINY)
    ours, ours_run, ours_sockets = measure(deployment, tmp_path / "fedobd", "fedobd", LARGE)
    plain, plain_run, plain_sockets = measure(deployment, tmp_path / "fedavg", "fedavg", LARGE)

    fixed = Traffic(
        tiny_run.traffic.up_bytes - tiny.uplink_bytes,
        tiny_run.traffic.down_bytes - tiny.downlink_bytes,
    )
    print(f"fixed: {fixed}")
    for summary, ended, sockets in (
        (ours, ours_run, ours_sockets),
        (plain, plain_run, plain_sockets),
    ):
        print(
            f"{summary.method}: payloads {summary.uplink_bytes} up, {summary.downlink_bytes} "
            f"down; Flower {ended.traffic}; sockets {sockets}; {ended.elapsed_s:.0f} s"
        )
        up, down = (
            ended.traffic.up_bytes - fixed.up_bytes,
            ended.traffic.down_bytes - fixed.down_bytes,
        )
        assert summary.uplink_bytes == pytest.approx(up, rel=0.02)
        assert summary.downlink_bytes == pytest.approx(down, rel=0.02)
        assert sockets.up_bytes > ended.traffic.up_bytes
        assert sockets.down_bytes > ended.traffic.down_bytes
    assert 0 < fixed.up_bytes < 100_000
    assert 0 < fixed.down_bytes < 100_000
    assert total(ours_sockets) < 0.25 * total(plain_sockets)


def total(traffic: Traffic) -> int:
    return traffic.up_bytes + traffic.down_bytes


# --- 2. a node is killed


def test_a_killed_node_is_left_out_and_comes_back(
    deployment: Federation, gate: Gate, tmp_path: Path
) -> None:
    config = digits(*rounds(4, 1))
    app = make_app(tmp_path / "app", config, client="gated_client.py")
    output = tmp_path / "run"
    gate.hold(1, 2)
    gate.hold(0, 3)
    run_id = deployment.start_run(app, {"output": str(output), "round-timeout": 180.0})
    gate.wait(1, 2)
    deployment.kill_node(1)
    gate.wait(0, 3, timeout_s=240)  # Flower needs a minute to see it
    deployment.start_node(1)
    gate.clear()
    ended = deployment.wait(run_id, timeout_s=RUN_TIMEOUT_S)

    assert ended.completed, deployment.log(run_id)
    first, second, third, fourth, fifth = read_records(output)
    assert uploaders(first) == EVERYONE
    assert uploaders(second) == [0, 2]
    (refusal,) = second["refusals"]
    assert (refusal["client"], refusal["reason"]) == (1, "failed")
    assert "Node Unavailable" in refusal["message"]
    assert third["cohort"] == uploaders(third) == [0, 2]
    assert third["refusals"] == []
    for record in (fourth, fifth):
        assert record["cohort"] == uploaders(record) == EVERYONE
    assert [record["reopened"] for record in (first, second, third, fourth, fifth)] == [
        *([], [], []),
        [1],  # it has lost what it was told in round 1
        [],
    ]
    assert_is_replay(config, output)


# --- 3. the server is killed


def test_a_killed_server_resumes_in_either_stage(
    deployment: Federation, gate: Gate, tmp_path: Path
) -> None:
    config = digits(*rounds(3, 2, cohort=2))
    whole = tmp_path / "whole"
    run(config, whole)  # on this machine, in one process
    cohorts = [record["cohort"] for record in read_records(whole)]
    app = make_app(tmp_path / "app", config, client="gated_client.py")
    output = tmp_path / "run"

    killed = []
    for number, stage in ((2, 1), (5, 2)):
        client = cohorts[number - 1][0]
        gate.hold(client, number)
        killed.append(deployment.start_run(app, {"output": str(output), "resume": number > 2}))
        gate.wait(client, number)
        deployment.kill_server_app()
        gate.clear()
        records = read_records(output)
        assert [record["round"] for record in records] == list(range(1, number))
        assert not RunFolder(output).is_finished
        assert read_records(whole)[number - 1]["stage"] == stage
    ended = deployment.run(app, {"output": str(output), "resume": True}, timeout_s=RUN_TIMEOUT_S)

    assert ended.completed, deployment.log(ended.run_id)
    assert read_records(output) == read_records(whole)
    model = "model.safetensors"
    assert (output / model).read_bytes() == (whole / model).read_bytes()
    for run_id in killed:
        assert deployment.wait(run_id, timeout_s=180).status == "finished:failed"


# --- 4. strangers and hostile clients


def test_an_unregistered_key_is_refused(deployment: Federation) -> None:
    node = deployment.add_node({"client-id": 0}, registered=False)

    assert deployment.exit_code(node, timeout_s=120) == REFUSED


def test_hostile_uploads_are_left_out_with_their_reason(
    deployment: Federation, tmp_path: Path
) -> None:
    config = digits(*rounds(len(FAULTS), 1))
    app = make_app(tmp_path / "app", config, client="hostile_client.py")
    output = tmp_path / "run"
    ended = deployment.run(app, {"output": str(output)}, timeout_s=RUN_TIMEOUT_S)

    assert ended.completed, deployment.log(ended.run_id)
    hostile = NUM_CLIENTS - 1
    *spoiled, last = read_records(output)
    found = {}
    for fault, record in zip(FAULTS, spoiled, strict=True):
        assert record["cohort"] == EVERYONE
        assert uploaders(record) == EVERYONE[:-1]
        (refusal,) = record["refusals"]
        assert refusal["client"] == hostile
        found[fault] = (refusal["reason"], refusal["message"])
    reasons = {fault: reason for fault, (reason, _) in found.items()}
    assert reasons == {
        "truncated": "checksum",  # "cut or altered"
        "altered": "checksum",
        "another-model": "schema",
        "nan": "not finite",
        "examples": "limit",
        "raises": "failed",
        "silent": "failed",
    }, found
    assert str(CLAIMED_EXAMPLES) in found["examples"][1]
    assert "this client does not want to" in found["raises"][1]
    assert uploaders(last) == EVERYONE
    assert_is_replay(config, output)


# --- 5. a straggler

ROUND_TIMEOUT_S = 120.0
"""Long enough for the two that are not held, also on a busy machine; the round takes all of it."""


@dataclass(frozen=True, slots=True)
class Straggle:
    """A run in which client 1 answers in round 2 only when the round is over."""

    config: RunConfig
    output: Path
    ended: Run

    @property
    def records(self) -> list[Record]:
        return RunFolder(self.output).records()


@pytest.fixture(scope="module")
def straggle(federation: Federation, tmp_path_factory: pytest.TempPathFactory) -> Straggle:
    folder, gate = tmp_path_factory.mktemp("straggle"), Gate(federation.folder.parent / "gate")
    config, output = digits(*rounds(3, 1)), folder / "run"
    app = make_app(folder / "app", config, client="gated_client.py")
    gate.hold(1, 2)
    try:
        run_id = federation.start_run(
            app, {"output": str(output), "round-timeout": ROUND_TIMEOUT_S}
        )
        gate.wait(1, 2)
        wait_for_record(output, 2, RUN_TIMEOUT_S)
    finally:
        gate.clear()  # its upload of round 2 comes now, in round 3
    return Straggle(config, output, federation.wait(run_id, timeout_s=RUN_TIMEOUT_S))


def test_a_straggler_neither_holds_its_round_nor_poisons_the_next(
    deployment: Federation, straggle: Straggle
) -> None:
    assert straggle.ended.completed, deployment.log(straggle.ended.run_id)
    first, second, *later = straggle.records
    assert uploaders(first) == EVERYONE
    assert uploaders(second) == [0, 2]
    assert [refusal["client"] for refusal in second["refusals"]] == [1]
    assert len(later) == 2
    for record in later:
        assert uploaders(record) == EVERYONE
        assert record["refusals"] == []
    assert_is_replay(straggle.config, straggle.output)


def test_a_straggler_is_recorded_as_late(straggle: Straggle) -> None:
    (refusal,) = straggle.records[1]["refusals"]
    assert (refusal["client"], refusal["reason"]) == (1, "late")
