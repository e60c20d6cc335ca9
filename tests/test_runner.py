"""Runs: the run folder, resuming after a kill at any moment, comparing methods."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedobd import FedOBDError, ModelSchema, Payload, RoundPlan, UsageError
from fedobd.blocks import ModelState, load_state
from fedobd.experiments import (
    RunConfig,
    RunFolder,
    Summary,
    build_experiment,
    compare,
    parse_config,
    run,
)
from fedobd.models import build_model
from fedobd.payload import Bytes
from fedobd.simulation import Callback
from fedobd.training import Evaluation
from tests import toy
from tests.toy import CONFIG, Interrupted, PayloadKeeper, Stopper, config

ROOT = Path(__file__).parent.parent


def records(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in toy.records(folder)]


def results(folder: Path) -> tuple[Any, ...]:
    """Return all that two equal runs have in common, which is everything but times."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    del summary["seconds"], summary["overhead"]
    return records(folder), (folder / "model.safetensors").read_bytes(), summary


def test_the_folder_holds_what_it_promises(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    summary = run(config(output={"keep_payloads": True}), folder)
    rounds = records(folder)
    assert [r["round"] for r in rounds] == [1, 2, 3, 4, 5]
    assert [r["stage"] for r in rounds] == [1, 1, 1, 2, 2]
    schema = ModelSchema.from_json(json.loads((folder / "schema.json").read_text()))
    up = down = 0
    for record in rounds:
        kept = folder / "payloads" / f"round-{record['round']:04d}"
        broadcast = (kept / "broadcast.fobd").stat().st_size
        assert {c["client"] for c in record["clients"]} == set(record["cohort"])
        for client in record["clients"]:
            data = (kept / f"upload-{client['client']}.fobd").read_bytes()
            assert client["uplink_bytes"] == len(data)
            assert client["downlink_bytes"] == broadcast
            payload = Payload.parse(data, schema)
            assert list(payload.header.block_ids) == client["blocks_kept"]
            assert len(client["block_differences"]) == len(schema.blocks)
            up, down = up + len(data), down + broadcast
    assert (summary.uplink_bytes, summary.downlink_bytes) == (up, down)
    assert summary.total_bytes == up + down
    assert sum(summary.shares["uplink"].values()) == pytest.approx(1)
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["torch"]
    again = parse_config(tomllib.loads((folder / "config.toml").read_text()))
    assert again == config(output={"keep_payloads": True})
    model = build_model("tests.toy:make_model")
    load_state(model, load_file(folder / "model.safetensors"))


def test_the_same_configuration_gives_the_same_results_with_workers_too(tmp_path: Path) -> None:
    run(config(), tmp_path / "a")
    run(config(), tmp_path / "b", workers=2)
    assert results(tmp_path / "a") == results(tmp_path / "b")
    other = config()
    run(other.for_method("fedobd", 2), tmp_path / "c")
    assert results(tmp_path / "a") != results(tmp_path / "c")


@pytest.mark.parametrize(
    ("method", "round_number", "frozen"),
    [("fedobd", 2, True), ("fedobd", 5, False), ("smafd", 4, False)],
)
def test_a_killed_run_goes_on_to_the_same_end(
    method: str, round_number: int, frozen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = config(
        method,
        training={"function": "tests.toy:train_and_die"},
        model={"options": {"frozen": frozen}},
    )
    file = tmp_path / "config.toml"
    file.write_text(changes.to_toml(), encoding="utf-8")
    order = tmp_path / "kill"
    order.write_text(str(round_number), encoding="utf-8")
    command = [sys.executable, "-m", "fedobd", "run", str(file), "--output", str(tmp_path / "a")]
    environment = {**os.environ, "TOY_KILL": str(order)}
    killed = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(records(tmp_path / "a")) == round_number - 1
    # What a kill elsewhere leaves: a record beyond the checkpoint, one cut short, half a file.
    with (tmp_path / "a" / "rounds.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"round": round_number, "stale": True}) + '\n{"round": ')
    (tmp_path / "a" / "checkpoint" / "clients" / "0@99.safetensors").write_bytes(b"stale")
    (tmp_path / "a" / "checkpoint" / "server.safetensors.part").write_bytes(b"half")
    monkeypatch.setenv("TOY_KILL", str(tmp_path / "never"))
    with pytest.raises(UsageError, match="holds another run"):
        run(changes, tmp_path / "a")
    run(changes, tmp_path / "a", resume=True)
    run(changes, tmp_path / "b")
    assert results(tmp_path / "a") == results(tmp_path / "b")
    assert not (tmp_path / "a" / "checkpoint" / "clients" / "0@99.safetensors").exists()


def test_callbacks_see_a_run_and_are_given_payloads_where_they_want_them(tmp_path: Path) -> None:
    seen: list[tuple[Any, ...]] = []

    class Everything(Callback):
        def on_run_begin(self, config: RunConfig, planned_rounds: int, folder: Path) -> None:
            seen.append(("begin", config.method, planned_rounds, folder))

        def on_payload(self, round_number: int, name: str, payload: Bytes) -> None:
            seen.append(("payload", name))

        def on_client_end(self, plan: RoundPlan, done: int) -> None:
            seen.append(("client", plan.round, done))

        def on_round_end(self, record: dict[str, Any]) -> None:
            seen.append(("round", record["round"]))

        def on_run_end(self, summary: Summary) -> None:
            seen.append(("end", summary.rounds))

    keeper, folder = PayloadKeeper(), tmp_path / "run"
    values = config("fedpaq", methods={"fedpaq": {"rounds": 1, "cohort": 2}})
    run(values, folder, callbacks=[Everything(), keeper])
    begin = ("begin", "fedpaq", 1, folder)
    assert seen == [begin, ("client", 1, 1), ("client", 1, 2), ("round", 1), ("end", 1)]
    (record,) = records(folder)
    assert keeper.kept.keys() == {"1 broadcast", *(f"1 upload-{c}" for c in record["cohort"])}
    assert sum(c["uplink_bytes"] for c in record["clients"]) == sum(
        len(data) for name, data in keeper.kept.items() if "upload" in name
    )
    assert not (folder / "payloads").exists()
    seen.clear()
    run(values, folder, resume=True, callbacks=[Everything()])
    assert seen == [begin, ("round", 1), ("end", 1)]


@pytest.mark.parametrize(("method", "tests"), [("fedavg", 1), ("fedobd", 2)])
def test_what_clients_hold_in_the_end_is_tested_where_it_is_not_what_the_server_has(
    method: str, tests: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = build_experiment(config(method))
    evaluate = experiment.evaluate
    assert evaluate is not None
    seen = []

    def count(state: ModelState) -> Evaluation:
        seen.append(evaluate(state))
        return seen[-1]

    counted = dataclasses.replace(experiment, evaluate=count)
    monkeypatch.setattr("fedobd.experiments._runner.build_experiment", lambda *_: counted)
    summary = run(config(method), tmp_path / "run")
    assert [seen[0].metric, seen[-1].metric] == [summary.final_metric, summary.broadcast_metric]
    assert len(seen) == tests


@pytest.mark.parametrize("method", ["fedavg", "fedpaq", "feddropoutavg", "smafd", "fedobd"])
def test_every_method_resumes_after_every_round(method: str, tmp_path: Path) -> None:
    run(config(method), tmp_path / "whole")
    for after in range(1, 4):
        folder = tmp_path / f"after{after}"
        with pytest.raises(Interrupted):
            run(config(method), folder, callbacks=[Stopper(after)])
        stopper = Stopper(99)
        run(config(method), folder, resume=True, callbacks=[stopper])
        assert stopper.seen == [*range(1, stopper.planned + 1), -1]
        assert results(folder) == results(tmp_path / "whole")


def test_a_finished_run_is_read_back_and_a_changed_one_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    summary = run(config(), folder)
    before = (folder / "rounds.jsonl").read_bytes()
    again = run(config(), folder, resume=True)
    assert again.total_bytes == summary.total_bytes
    assert (folder / "rounds.jsonl").read_bytes() == before
    with pytest.raises(UsageError, match=r"another configuration.*learning_rate was 0.05, is 0.2"):
        run(config(training={"learning_rate": 0.2}), folder, resume=True)
    with pytest.raises(UsageError, match=r"holds another run; choose another, or --resume"):
        run(config(), folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    for resume, message in ((False, "holds other files"), (True, "holds no run to resume")):
        with pytest.raises(UsageError, match=message):
            run(config(), tmp_path / "other", resume=resume)
    with pytest.raises(UsageError, match="is a file; wanted a folder"):
        run(config(), tmp_path / "other" / "thesis.txt")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"


def test_a_damaged_checkpoint_is_said_to_be_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(config(), folder, callbacks=[Stopper(2)])
    file = folder / "checkpoint" / "server.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UsageError, match=r"server.safetensors' is damaged"):
        run(config(), folder, resume=True)


def test_damaged_records_are_said_to_be_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(config(), folder, callbacks=[Stopper(2)])
    records = folder / "rounds.jsonl"
    first, _ = records.read_bytes().splitlines(keepends=True)
    records.write_bytes(first + b"{]\n")
    with pytest.raises(UsageError, match=r"rounds.jsonl', line 2, is damaged"):
        run(config(), folder, resume=True)


@pytest.mark.parametrize("text", ["{]", "[]", '{"rounds": 3}'])
def test_a_damaged_summary_is_said_to_be_one(text: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(config(), folder)
    (folder / "summary.json").write_text(text)
    with pytest.raises(UsageError, match=r"summary.json' is damaged"):
        run(config(), folder, resume=True)


def test_the_trap_of_blocks_that_never_fit_is_reported(tmp_path: Path) -> None:
    summary = run(config(model={"options": {"width": 8}}), tmp_path / "run")
    (block,) = summary.never_uploaded
    assert block["block"] == "4"
    assert block["parameters"] == 16 * 8 * 8 + 8
    assert block["share"] > 0.7
    assert summary.rarely_uploaded == ()  # each other block is in one of six uploads at least
    split = run(
        config(
            model={"options": {"width": 8}, "blocks": {"max_block_fraction": 0.25}},
            methods={"fedobd": {"stage_one_rounds": 6, "stage_two_epochs": 0, "cohort": 4}},
        ),
        tmp_path / "split",
    )
    assert sum(b["share"] for b in split.never_uploaded) < 0.5


def test_a_test_that_ends_with_no_number_is_not_measured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = {"metric": "tests.test_runner:no_number"}
    summary = run(config("fedpaq", training=training), tmp_path / "run")
    assert (summary.final_metric, summary.best_metric, summary.broadcast_metric) == (None,) * 3
    (first, *_) = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    assert json.loads(first)["test_metric"] is None
    assert json.loads(first)["test_loss"] > 0
    assert "a test ended with nan, which is recorded as not measured" in caplog.text


def no_number(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return no number on the test set, which is larger than what clients validate on."""
    return torch.tensor(float("nan") if len(targets) > 10 else 0.5)


@pytest.mark.parametrize(
    ("data", "workers", "message"),
    [("tests.toy:nothing", 0, "nothing"), ("tests.toy:make_data", -1, "workers is -1")],
)
def test_a_comparison_that_cannot_be_run_leaves_no_folder(
    data: str, workers: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        compare(config(data={"name": data}), tmp_path / "c", seeds=[1], workers=workers)
    assert not (tmp_path / "c").exists()


def test_compare_runs_all_and_tabulates(tmp_path: Path) -> None:
    values = parse_config(tomllib.loads(CONFIG))
    folder = tmp_path / "all"
    methods = ["fedobd", "fedavg", "smafd"]
    comparison = compare(values, folder, seeds=[1, 2], methods=methods)
    assert [row.method for row in comparison.rows] == methods
    rows = {row.method: row for row in comparison.rows}
    summaries = {
        name: [
            json.loads((folder / f"{name}-seed{s}" / "summary.json").read_text()) for s in (1, 2)
        ]
        for name in rows
    }
    for name, row in rows.items():
        totals = [s["total_bytes"] for s in summaries[name]]
        assert row.total_bytes == sum(totals) / 2
        fedavg = sum(s["total_bytes"] for s in summaries["fedavg"]) / 2
        assert row.reduction_fedavg == pytest.approx(1 - row.total_bytes / fedavg)
        finals = [s["final_metric"] for s in summaries[name]]
        assert row.final_metric == pytest.approx(sum(finals) / 2)
        assert row.final_metric_std == pytest.approx(abs(finals[0] - finals[1]) / 2**0.5)
    assert comparison.best_baseline is not None
    best = rows[comparison.best_baseline]
    assert all(best.final_metric >= rows[n].final_metric for n in rows if n != "fedobd")
    # cut off: one run is missing, another is not finished
    shutil.rmtree(folder / "smafd-seed2")
    (folder / "fedavg-seed1" / "summary.json").unlink()
    with pytest.raises(UsageError, match="holds another run"):
        compare(values, folder, seeds=[1, 2], methods=methods)
    resumed = compare(values, folder, seeds=[1, 2], methods=methods, resume=True)
    assert [r.total_bytes for r in resumed.rows] == [r.total_bytes for r in comparison.rows]
    assert [r.final_metric for r in resumed.rows] == [r.final_metric for r in comparison.rows]


def test_a_comparison_does_not_go_on_with_a_single_run_or_another_configuration(
    tmp_path: Path,
) -> None:
    values = config("fedavg", methods={"fedavg": {"rounds": 1}})
    run(values, tmp_path / "run")
    before = (tmp_path / "run" / "config.toml").read_bytes()
    with pytest.raises(UsageError, match=r"holds a single run; wanted a comparison"):
        compare(values, tmp_path / "run", seeds=[1], methods=["fedavg"], resume=True)
    assert (tmp_path / "run" / "config.toml").read_bytes() == before
    compare(values, tmp_path / "all", seeds=[1], methods=["fedavg"])
    before = (tmp_path / "all" / "config.toml").read_bytes()
    with pytest.raises(UsageError, match=r"training.batch_size was 8, is 4"):
        compare(
            config("fedavg", methods={"fedavg": {"rounds": 1}}, training={"batch_size": 4}),
            tmp_path / "all",
            seeds=[1],
            methods=["fedavg"],
            resume=True,
        )
    assert (tmp_path / "all" / "config.toml").read_bytes() == before
    (tmp_path / "all" / "config.toml").write_text("=")
    with pytest.raises(UsageError, match=r"config.toml' is damaged: "):
        compare(values, tmp_path / "all", seeds=[1], methods=["fedavg"], resume=True)


def test_two_processes_do_not_work_on_one_run(tmp_path: Path) -> None:
    """Both would add their rounds to the records."""
    folder = tmp_path / "run"
    values = config("fedavg", methods={"fedavg": {"rounds": 2}})
    tried: list[str] = []

    class Second(Callback):
        def on_round_end(self, record: dict[str, Any]) -> None:
            with pytest.raises(UsageError, match=r"another process works on the run in '.*run'"):
                run(values, folder, resume=True)
            tried.append((folder / "rounds.jsonl").read_text())

    run(values, folder, callbacks=[Second()])
    assert [text.count("\n") for text in tried] == [1, 2]
    assert run(values, folder, resume=True).rounds == 2


@pytest.mark.parametrize("stack", [1, "auto"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('method = "fedavg"\n', "data was nothing, is a table"),
        ("method = \n", "config.toml' is damaged: "),
    ],
)
def test_a_folder_with_a_configuration_of_ones_own_is_no_run(
    stack: Any, text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "config.toml"
    file.write_text(text)
    values = config("fedavg", simulation={"stack": stack})
    with pytest.raises(UsageError, match="holds another run"):
        run(values, tmp_path / "run")
    with pytest.raises(UsageError, match=message):
        run(values, tmp_path / "run", resume=True)
    assert list(file.parent.iterdir()) == [file]
    assert file.read_text() == text


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_seeds_must_be_given_once(seeds: list[int], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="wanted at least one, each once"):
        compare(parse_config(tomllib.loads(CONFIG)), tmp_path / "x", seeds=seeds)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"federation": {"clients": 97}}, r"96 examples cannot be shared among 97 clients"),
        ({"data": {"name": "tests.toy:not_data"}}, r"gave int; wanted FederatedData"),
        (
            {"data": {"options": {"fold": 1}}},
            r"set 'tests.toy:make_data' has no option 'fold'",
        ),
        (
            {"data": {"name": "tests.toy:no_data"}},
            r"data set 'tests.toy:no_data' cannot be built: OSError: gone",
        ),
        ({"data": {"name": "tests.toy:nothing"}}, r"module 'tests.toy' has no 'nothing'"),
        ({"data": {"name": "mnist"}}, r"data set 'mnist' is unknown; wanted one of digits, nodes"),
        ({"training": {"loss": "hinge"}}, r"loss 'hinge' is unknown; wanted one of cross-entropy"),
        ({"training": {"metric": "accurracy"}}, r"did you mean 'accuracy'"),
        ({"training": {"device": "gpu"}}, r"training.device is 'gpu'"),
        ({"model": {"options": {"depth": 3}}}, r"depth"),
        (
            {
                "data": {"name": "digits"},
                "model": {"name": "digits-cnn", "options": {"num_classes": 1}},
                "training": {"loss": "binary-cross-entropy"},
            },
            r"tells 2 classes apart; data 'digits' has 10 classes",
        ),
    ],
)
def test_what_cannot_be_built_is_refused_before_a_folder_is_made(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FedOBDError, match=message):
        run(config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_client_states_belong_to_a_round(tmp_path: Path) -> None:
    run(config("smafd"), tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    saved = folder.load_checkpoint()
    assert saved is not None
    files = sorted((tmp_path / "run" / "checkpoint" / "clients").iterdir())
    last = {}
    for record in records(tmp_path / "run"):
        last.update(dict.fromkeys(record["cohort"], record["round"]))
    assert [f.name for f in files] == sorted(f"{c}@{r}.safetensors" for c, r in last.items())
    assert folder.load(99) is None
