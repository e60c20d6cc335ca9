"""Trackers and the log: they say what the run folder says, and no result depends on them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fedobd import SMAFD, FedOBD, ModelSchema, UsageError, __version__
from fedobd.experiments import RunConfig, compare, load_config, parse_config, run
from fedobd.tracking import (
    RoundMetrics,
    RunLog,
    TensorBoardTracker,
    Tracker,
    flatten,
    float32_bytes,
    log_to_terminal,
    make_trackers,
    rare_blocks,
    rare_blocks_warning,
)
from tests.toy import Interrupted, Stopper, config, records

ROOT = Path(__file__).parent.parent


Figures = dict[str, list[tuple[int, Any]]]
"""By name: step and value of each point; values are compared as float32 holds them."""


def results(folder: Path) -> tuple[Any, ...]:
    rounds = [{k: v for k, v in r.items() if k != "seconds"} for r in records(folder)]
    return rounds, (folder / "model.safetensors").read_bytes()


def tracked(*names: str, **changes: Any) -> RunConfig:
    return config(output={"trackers": list(names), **changes})


def stopped(settings: RunConfig, folder: Path, after: int) -> None:
    with pytest.raises(Interrupted):
        run(settings, folder, callbacks=[Stopper(after)])


# --- figures


def test_metrics_add_up_the_traffic_and_keep_what_was_not_measured_apart() -> None:
    record = {
        "test_metric": None, "test_loss": None, "train_loss": 0.5, "validation_metric": 0.25,
        "validation_loss": 2.0, "uplink_bytes": 10, "downlink_bytes": 3, "seconds": {"round": 1.5},
    }  # fmt: skip
    metrics = RoundMetrics()
    assert metrics.add(record) == {
        "test/metric": None, "test/loss": None, "train/loss": 0.5, "validation/metric": 0.25,
        "validation/loss": 2.0, "traffic/uplink_bytes": 10, "traffic/downlink_bytes": 3,
        "traffic/total_bytes": 13, "round/seconds": 1.5,
    }  # fmt: skip
    second = metrics.add({**record, "uplink_bytes": 5})
    assert second["traffic/uplink_bytes"] == 15
    assert second["traffic/total_bytes"] == 21


def test_float32_bytes_are_those_of_plain_payloads(tmp_path: Path) -> None:
    run(config("fedavg"), tmp_path / "a")
    schema = ModelSchema.from_json(json.loads((tmp_path / "a" / "schema.json").read_text()))
    record = records(tmp_path / "a")[0]
    assert len(record["cohort"]) == len(record["clients"]) == 4
    # convolution, batch normalization with its buffers, two linear layers
    values = (36 + 4) + (4 + 4 + 4 + 4 + 1) + (64 * 8 + 8) + (8 * 4 + 4)
    assert float32_bytes(record, schema) == 4 * values * 8
    sent = record["uplink_bytes"] + record["downlink_bytes"]
    assert float32_bytes(record, schema) == pytest.approx(sent, rel=0.1)  # FedAvg's, and headers
    late = {"uplink_bytes": 0}
    refused = {**record, "refusals": [{"uplink_bytes": 9}, late], "reopened": [1, 2]}
    assert float32_bytes(refused, schema) == 4 * values * 11


def test_flatten_names_what_is_inside_tables() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [2]}, ".") == {"a.b": 1, "d": [2]}
    assert flatten({"a": 1}, "/", "x/") == {"x/a": 1}


# --- configuration


def test_trackers_are_chosen_by_name() -> None:
    with pytest.raises(UsageError, match=r"output\.trackers\.0.*'wandb'.*tensorboard.*mlflow"):
        tracked("wandb")
    with pytest.raises(UsageError, match=r"tracking_uri is 'http://x', and trackers has no 'mlf"):
        tracked("tensorboard", tracking_uri="http://x")
    assert config().output.trackers == ()
    chosen = tracked("tensorboard", "mlflow", tracking_uri="sqlite:///all.db")
    assert parse_config(chosen.to_dict()) == chosen
    assert load_config("digits", overrides=['output.trackers=["mlflow"]']).output.trackers == (
        "mlflow",
    )


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_tracker_that_is_not_installed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, name, None)
    for variable in (
        "DISABLE_TELEMETRY",
        "LOGGING_LEVEL",
        "SUPPRESS_PRINTING_URL_TO_STDOUT",
        "HTTP_REQUEST_MAX_RETRIES",
    ):
        monkeypatch.setenv(f"MLFLOW_{variable}", "")  # to be as before afterwards
    with pytest.raises(UsageError, match=rf"needs '{name}', which .* 'fedobd\[{name}\]'"):
        run(tracked(name), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_what_tracks_a_run_may_change_when_it_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    stopped(config(), folder, after=2)
    before = (folder / "config.toml").read_bytes()
    run(tracked("tensorboard"), folder, resume=True)
    assert (folder / "config.toml").read_bytes() == before
    run(config(), folder, resume=True)
    with pytest.raises(UsageError, match=r"output\.evaluate_every was 1, is 2"):
        run(tracked("tensorboard", evaluate_every=2), folder, resume=True)


# --- TensorBoard


def events(folder: Path) -> Any:
    """Return what TensorBoard reads."""
    module = import_module("tensorboard.backend.event_processing.event_accumulator")
    return module.EventAccumulator(str(folder / "tensorboard")).Reload()


def scalars(folder: Path) -> Figures:
    read = events(folder)
    return {
        tag: [(event.step, event.value) for event in read.Scalars(tag)]
        for tag in read.Tags()["scalars"]
    }


def expected(folder: Path) -> Figures:
    """Return the figures of each round, from the run folder."""
    metrics, found = RoundMetrics(), Figures()
    for record in records(folder):
        for name, value in metrics.add(record).items():
            if value is not None:
                found.setdefault(name, []).append((record["round"], pytest.approx(value)))
    return found


def test_tensorboard_holds_what_the_run_folder_holds(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    summary = run(tracked("tensorboard", evaluate_every=2), folder)
    found = scalars(folder)
    wanted = expected(folder)
    assert len(wanted["train/loss"]) == 5
    assert [step for step, _ in wanted["test/metric"]] == [2, 4]
    assert {name: found[name] for name in wanted} == wanted
    assert found["summary/final_metric"] == [(0, pytest.approx(summary.final_metric))]
    assert found["summary/total_bytes"] == [(0, summary.total_bytes)]
    assert found["summary/shares/uplink/header"][0][1] > 0
    read = events(folder)
    (text,) = read.Tensors("config/text_summary")
    assert "federation.clients = 4" in text.tensor_proto.string_val[0].decode()
    assert {"_hparams_/session_start_info", "_hparams_/experiment"} <= set(
        read.PluginTagToContent("hparams")
    )


def test_tensorboard_goes_on_where_a_run_was_cut_off(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    stopped(tracked("tensorboard"), folder, after=3)
    assert [step for step, _ in scalars(folder)["train/loss"]] in ([1, 2], [1, 2, 3])
    run(tracked("tensorboard"), folder, resume=True)
    wanted = expected(folder)
    assert {name: scalars(folder)[name] for name in wanted} == wanted
    run(tracked("tensorboard"), folder, resume=True)  # has ended: nothing comes twice
    assert {name: scalars(folder)[name] for name in wanted} == wanted


def test_results_do_not_depend_on_trackers(tmp_path: Path) -> None:
    run(config(), tmp_path / "plain")
    run(tracked("tensorboard"), tmp_path / "tracked")
    assert results(tmp_path / "plain") == results(tmp_path / "tracked")


# --- a tracker that fails


class Failing(Tracker):
    """Fails in a round."""

    name: ClassVar[str] = "failing"

    def __init__(self, fails_in: int) -> None:
        super().__init__()
        self._fails_in = fails_in
        self.seen: list[int] = []
        self.closed = 0

    def _begin(self, parameters: Mapping[str, Any], folder: Path) -> None:
        assert "output.trackers" not in parameters
        assert parameters["federation.clients"] == 4

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == self._fails_in:
            raise OSError("the disk is full")
        self.seen.append(step)

    def _close(self, summary: Mapping[str, float] | None) -> None:
        self.closed += 1


def test_a_tracker_that_fails_costs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Failing(fails_in=3)
    monkeypatch.setattr("fedobd.experiments._runner.make_trackers", lambda *_: [tracker])
    summary = run(config(), tmp_path / "a")
    assert (summary.rounds, tracker.seen, tracker.closed) == (5, [1, 2], 0)
    message = caplog.messages[0]
    assert message == (
        "tracker failing failed and is left out from here on: OSError: the disk is full"
    )
    assert f"WARNING {message}" in (tmp_path / "a" / "run.log").read_text()


def test_trackers_are_closed_once_however_a_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Failing(fails_in=99)
    monkeypatch.setattr("fedobd.experiments._runner.make_trackers", lambda *_: [tracker])
    stopped(config(), tmp_path / "a", after=2)
    assert tracker.closed == 1
    tracker = Failing(fails_in=99)
    run(config(), tmp_path / "a", resume=True)
    assert (tracker.seen, tracker.closed) == ([1, 2, 3, 4, 5], 1)


def test_each_tracker_is_made_once() -> None:
    (tracker,) = make_trackers(("tensorboard", "tensorboard"))
    assert isinstance(tracker, TensorBoardTracker)


# --- the log


def messages(folder: Path) -> list[str]:
    lines = (folder / "run.log").read_text(encoding="utf-8").splitlines()
    return [line.partition(" ")[2] for line in lines]


def test_the_log_of_a_run_is_appended_to_when_it_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    stopped(config(), folder, after=2)
    start = f"INFO fedobd {__version__}: method fedobd, seed 1, at most 5 rounds"
    first = messages(folder)
    assert first[0] == start
    assert first[1].startswith("INFO round 1/5, stage 1: metric 0.")
    assert first[3:] == ["INFO stopped: Interrupted()"]
    summary = run(config(), folder, resume=True)
    second = messages(folder)[len(first) :]
    assert second[:2] == [start, "INFO goes on after round 2"]
    assert [line.split(",")[0] for line in second[2:-2]] == [
        "INFO round 3/5", "INFO round 4/5", "INFO round 5/5"
    ]  # fmt: skip
    assert second[-2].startswith(
        "WARNING fedobd: clients left out some blocks in stage 1, so the server hardly trained "
        "them in it. Seed 1: no client uploaded block 4 (86.1 % of the parameters). Split large"
    )
    assert second[-1] == (
        f"INFO ended after 5 rounds: metric {summary.final_metric:.4f}, "
        f"{summary.uplink_bytes} bytes up, {summary.downlink_bytes} bytes down"
    )
    run(config(), folder, resume=True)
    assert messages(folder)[len(first) + len(second) :] == [start, "INFO has ended before"]


def test_errors_and_refusals_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UsageError, match="NaN"):
        run(config(training={"function": "tests.toy:train_to_nan"}), tmp_path / "a")
    assert messages(tmp_path / "a")[-1].startswith("INFO stopped: UsageError(")
    late = {"client": 3, "reason": "late", "message": "it came too late", "uplink_bytes": 0}
    damaged = {"client": 4, "reason": "limit", "message": "too long", "uplink_bytes": 9}
    record = {
        "round": 1, "stage": 1, "test_metric": None, "train_loss": 1.0, "uplink_bytes": 1,
        "downlink_bytes": 1, "seconds": {"round": 1.0}, "refusals": [late, damaged],
    }  # fmt: skip
    RunLog().on_round_end(record)
    assert caplog.messages == [
        "round 1: the upload of client 3 is missing: it came too late",
        "round 1: the upload of client 4 is refused: too long",
    ]


def test_a_run_leaves_logging_as_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    package = logging.getLogger("fedobd")
    before = (package.level, package.propagate, list(package.handlers))
    with caplog.at_level(logging.WARNING):
        run(config(), tmp_path / "a")
    levels = {record.levelno for record in caplog.records}
    assert levels <= {logging.WARNING}  # the other lines of the file are not for others
    with caplog.at_level(logging.INFO, logger="fedobd"):
        run(config(), tmp_path / "b")
    assert sum(text.startswith("round ") for text in caplog.messages) == 5
    assert (package.level, package.propagate, list(package.handlers)) == before
    with log_to_terminal("info"):
        compare(config(), tmp_path / "c", seeds=[0], methods=["fedobd"])
    assert (package.level, package.propagate, list(package.handlers)) == before
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("info: round ") == 5
    with pytest.raises(UsageError, match=r"'loud' is unknown; allowed are debug, info, warn"):
        log_to_terminal("loud").__enter__()


def test_importing_the_package_sets_up_no_handler_and_imports_no_tracker() -> None:
    code = (
        "import logging, sys\n"
        "import fedobd.cli, fedobd.tracking\n"
        "assert not logging.getLogger().handlers and not logging.getLogger('fedobd').handlers\n"
        "late = {'mlflow', 'tensorboard', 'torch.utils.tensorboard', 'vl_convert'}\n"
        "assert not late & {*sys.modules}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# --- MLflow

_WITHOUT_NETWORK = """
import json, pathlib, socket, sys
def refuse(*words):
    print("a connection was tried:", words, file=sys.stderr)
    raise OSError
socket.socket.connect = socket.getaddrinfo = refuse
from fedobd.experiments import run
from fedobd.tracking import log_to_terminal
from tests.test_tracking import tracked
from tests.toy import Interrupted, Stopper
terminal = log_to_terminal("error")
terminal.__enter__()
folder = pathlib.Path(sys.argv[1])
try:
    run(tracked("mlflow"), folder, callbacks=[Stopper(2)])
except Interrupted:
    pass
from mlflow import MlflowClient
client = MlflowClient(f"sqlite:///{folder.parent / 'mlflow.db'}")
run_id = (folder / "mlflow_run_id.txt").read_text().strip()
status = [client.get_run(run_id).info.status]
for _ in range(2):
    run(tracked("mlflow"), folder, resume=True)
    status.append(client.get_run(run_id).info.status)
found = client.get_run(run_id)
experiment = client.get_experiment_by_name("fedobd")
print(json.dumps({
    "status": status,
    "runs": [r.info.run_id == run_id for r in client.search_runs([experiment.experiment_id])],
    "name": found.info.run_name,
    "parameters": found.data.params,
    "metrics": {
        name: [[m.step, m.value] for m in client.get_metric_history(run_id, name)]
        for name in found.data.metrics
    },
}))
"""


@pytest.mark.deployment
def test_mlflow_holds_what_the_run_folder_holds_and_tries_no_connection(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    # Without what MLflow takes for a sign that it is under test, which turns off its telemetry.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "CI", "MLFLOW"))}
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_NETWORK, str(folder)],
        cwd=ROOT, env=kept, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)  # nothing else was printed
    assert found["status"] == ["KILLED", "FINISHED", "FINISHED"]
    assert found["runs"] == [True]
    assert found["name"] == "a"
    assert found["parameters"]["federation.clients"] == "4"
    assert found["parameters"]["method"] == "fedobd"
    assert "output.trackers" not in found["parameters"]
    wanted = expected(folder)
    metrics = {name: [(step, value) for step, value in found["metrics"][name]] for name in wanted}
    assert metrics == wanted
    summary = json.loads((folder / "summary.json").read_text())
    assert found["metrics"]["summary/final_metric"] == [[5, summary["final_metric"]]]
    assert found["metrics"]["summary/total_bytes"] == [[5, summary["total_bytes"]]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "mlflow.db"]
    run(config(), tmp_path / "plain")
    assert results(tmp_path / "plain") == results(folder)


@pytest.mark.deployment
def test_a_store_that_mlflow_cannot_use(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys\n"
        "from fedobd import UsageError\n"
        "from fedobd.experiments import run\n"
        "from tests.test_tracking import tracked\n"
        "try:\n"
        "    run(tracked('mlflow', tracking_uri=sys.argv[2]), pathlib.Path(sys.argv[1]))\n"
        "except UsageError as error:\n"
        "    print(error)\n"
    )
    for number, uri in enumerate(("ftp://x", "http://127.0.0.1:9")):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / str(number)), uri],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"MLflow cannot use output.tracking_uri {uri!r}: ")
        assert len(done.stdout.splitlines()) == 1
        assert len(done.stdout) < 500


# rare blocks

SCHEMA = ModelSchema.from_json(
    {
        "tensors": [[name, [8], "float32", "parameter"] for name in "abcd"],
        "blocks": [[name, "Linear", [name], [[n, 0, 8]]] for n, name in enumerate("abcd")],
    }
)


def uploads(stage: int, *kept: list[int]) -> dict[str, Any]:
    return {"stage": stage, "clients": [{"blocks_kept": own} for own in kept]}


def test_blocks_starve_below_a_twentieth_of_the_uploads_of_stage_1() -> None:
    """Of 41 uploads, a is in all, b in three, c in two, d in none; stage 2 does not count."""
    rounds = [
        uploads(1, *[[0]] * 38),
        uploads(1, [0, 1, 2], [0, 1, 2], [0, 1]),
        uploads(2, *[[0, 1, 2, 3]] * 9),
    ]
    c, d = rare_blocks(rounds, SCHEMA)
    assert (c.block, c.parameters, c.share, c.uploads) == ("c", 8, 0.25, 2 / 41)
    assert (d.block, d.uploads) == ("d", 0)
    text = rare_blocks_warning(FedOBD(), {0: [c, d], 1: [c, d], 2: [], 3: [d]})
    assert text == (
        "fedobd: clients left out some blocks in stage 1, so the server hardly trained them in "
        "it. Seeds 0, 1: no client uploaded block d (25.0 % of the parameters); fewer than 5 % of "
        "the uploads held block c (25.0 % of the parameters). Seed 3: no client uploaded block d "
        "(25.0 % of the parameters). Split large blocks with model.blocks.max_block_fraction, "
        "lower dropout_rate, or give stage 2 more epochs."
    )
    assert rare_blocks_warning(FedOBD(), {0: [], 1: []}) is None


def test_a_block_in_a_twentieth_of_the_uploads_is_not_rare() -> None:
    """Of 20 uploads, b is in one, and c and d in none."""
    c, d = rare_blocks([uploads(1, [0, 1], *[[0]] * 19)], SCHEMA)
    assert (c.block, d.block) == ("c", "d")


def test_advice_suits_the_method_and_long_lists_are_cut() -> None:
    (found,) = rare_blocks([uploads(1, [0, 1, 2])], SCHEMA)
    text = rare_blocks_warning(SMAFD(), {0: [found] * 10})
    assert text is not None
    assert "d (25.0 %), 2 more, 250.0 % of the parameters in all. Lower dropout_rate." in text
    assert "max_block_fraction" not in text
