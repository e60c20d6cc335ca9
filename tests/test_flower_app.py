"""The ready-made Flower app: the run folder of `fedobd run`, made with the nodes of a grid."""

from __future__ import annotations

import importlib
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedobd import EmptyRoundError, FedOBDError, Payload, UsageError, __version__
from fedobd.data import ClientData, Examples, ExampleSet, gather, load_arrays
from fedobd.experiments import (
    RunConfig,
    RunFolder,
    build_experiment,
    load_config,
    parse_config,
    run,
)
from fedobd.flower import make_client_app, make_server_app, write_app
from fedobd.flower._messages import IDENTIFY, UPLOAD, carried
from fedobd.simulation import Callback
from tests.data_helpers import fedobd
from tests.flower_grid import FIRST_NODE_ID, RUN_ID, SUPERLINK_NODE_ID, InProcessGrid
from tests.toy import CONFIG
from tests.toy import config as toy_config

ROOT = Path(__file__).parent.parent

METHODS = ["fedavg", "feddropoutavg", "fedobd", "fedpaq", "smafd"]


class Killed(BaseException):
    """The ServerApp's end; no Exception, so that nothing answers for it."""


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What Flower's logger said; it hands nothing on."""
    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


class App:
    """The ready-made app of a configuration, in this process."""

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        *,
        nodes: Sequence[Mapping[str, Any]] | None = None,
        **run_config: Any,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "config.toml"
        self.file.write_text(config.to_toml(), encoding="utf-8")
        self.output = folder / "run"
        self.nodes = nodes or [{"partition-id": i} for i in range(config.federation.clients)]
        self.run_config = {
            "output": str(self.output), "resume": False, "set": "", "round-timeout": 60.0,
            "join-timeout": 0.05, "min-replies": 1, **run_config,
        }  # fmt: skip
        self.grid = self.new_grid()

    def new_grid(self) -> InProcessGrid:
        """Start the nodes anew."""
        self.grid = InProcessGrid(make_client_app(self.file), self.nodes, self.run_config)
        return self.grid

    def run(self, **run_config: Any) -> Path:
        """Run the ServerApp and return its run folder."""
        context = Context(
            run_id=RUN_ID,
            node_id=SUPERLINK_NODE_ID,
            node_config={},
            state=RecordDict(),
            run_config={**self.run_config, **run_config},
        )
        make_server_app(self.file)(self.grid, context)
        return self.output

    def kill_after(self, uploads: int) -> None:
        """End the server when so many uploads have come."""
        left = [uploads]

        def tamper(reply: Message) -> Message:
            if reply.has_content() and "arrays" in reply.content:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
            return reply

        self.grid.tamper = tamper


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def summary_of(folder: Path) -> dict[str, Any]:
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert isinstance(summary, dict)
    return {k: v for k, v in summary.items() if k not in ("seconds", "overhead")}


def results(folder: Path) -> tuple[Any, ...]:
    """Return all that two equal runs have in common, which is everything but times."""
    return rows(folder), (folder / "model.safetensors").read_bytes(), summary_of(folder)


def payloads(folder: Path, *kinds: str) -> dict[str, bytes]:
    """Return the payloads that were kept, by round and name."""
    kept = folder / "payloads"
    return {
        str(file.relative_to(kept)): file.read_bytes()
        for file in sorted(kept.rglob("*.fobd"))
        if file.name.startswith(kinds)
    }


# --- the same as the local engine


FROZEN = {"model": {"options": {"frozen": True}}}
SHARED = {"federation": {"shared_start": True}}
SPARSE = {"output": {"evaluate_every": 2}, "training": {"schedule": "cosine-run"}}


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        *((method, {}) for method in METHODS),
        ("fedobd", FROZEN),
        ("smafd", FROZEN),
        ("smafd", SHARED),
        ("fedobd", SHARED | FROZEN),
        ("fedobd", SPARSE),
    ],
)
def test_the_app_leaves_the_folder_of_the_local_engine_byte_for_byte(
    method: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    output = {"keep_payloads": True, **changes.get("output", {})}
    config = toy_config(method, **{**changes, "output": output})
    folder = App(tmp_path / "app", config).run()
    run(config, tmp_path / "local")
    assert results(folder) == results(tmp_path / "local")
    assert payloads(folder, "") == payloads(tmp_path / "local", "")
    assert len(payloads(folder, "upload")) == sum(len(r["clients"]) for r in rows(folder))
    for name in ("config.toml", "schema.json"):
        assert (folder / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


@pytest.mark.parametrize("source", ["validation", "test"])
def test_early_stop_is_that_of_the_local_engine(source: str, tmp_path: Path) -> None:
    stop = {"source": source, "patience": 1, "min_gain": 0.2}
    fedobd_options = {
        "stage_one_rounds": 4, "stage_one_epochs": 1, "stage_two_epochs": 4, "cohort": 2,
        "stop": stop,
    }  # fmt: skip
    config = toy_config(methods={"fedobd": fedobd_options})
    folder = App(tmp_path / "app", config).run()
    run(config, tmp_path / "local")
    assert results(folder) == results(tmp_path / "local")
    stages = [record["stage"] for record in rows(folder)]
    assert stages.count(1) < 4
    assert 2 in stages


# --- a server that is killed


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_server_goes_on_to_the_same_end(method: str, tmp_path: Path) -> None:
    config = toy_config(method)
    whole = App(tmp_path / "whole", config).run()
    num_uploads = sum(len(record["clients"]) for record in rows(whole))
    for uploads in {"fedobd": (0, 3, num_uploads - 1)}.get(method, (5,)):
        app = App(tmp_path / f"killed after {uploads}", config)
        app.kill_after(uploads)
        with pytest.raises(Killed):
            app.run()
        with pytest.raises(UsageError, match="holds another run"):
            app.run()
        app.new_grid()
        folder = app.run(resume=True)
        if method != "smafd":
            assert results(folder) == results(whole)
        else:  # clients lost what they kept, and are given the model of then
            assert len(rows(folder)) == len(rows(whole))
        assert summary_of(folder)["refusals"] == 0


def test_smafd_clients_that_kept_their_state_are_initialized_again_by_a_resumed_server(
    tmp_path: Path,
) -> None:
    config = toy_config("smafd")
    app = App(tmp_path, config)
    app.kill_after(5)  # in round 3
    with pytest.raises(Killed):
        app.run()
    app.grid.tamper = None
    records = rows(app.run(resume=True))
    assert records[2]["opened"] == records[2]["cohort"]
    assert all(record["refusals"] == [] for record in records)


def test_a_finished_run_is_read_back_without_a_message(tmp_path: Path) -> None:
    app = App(tmp_path, toy_config())
    before = results(app.run())
    app.new_grid()
    assert results(app.run(resume=True)) == before
    assert app.grid.sent == []


def test_a_changed_configuration_cannot_be_resumed(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    app = App(tmp_path, toy_config())
    app.run()
    with pytest.raises(UsageError, match=r"training\.learning_rate was 0\.05, is 0\.2"):
        app.run(resume=True, set="training.learning_rate=0.2")
    assert "fedobd: the run in" in log.text  # Flower's log says it too


# --- options of the app


def test_output_is_by_default_a_folder_named_after_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    App(tmp_path / "app", toy_config(), output="").run()
    assert summary_of(tmp_path / "runs" / str(RUN_ID))["rounds"] == 5


def test_set_changes_keys_on_server_and_clients_alike(tmp_path: Path) -> None:
    words = (
        "training.learning_rate=0.2 methods.fedobd.stage_one_rounds=1 'model.options={width=3}'"
    )
    folder = App(tmp_path / "app", toy_config(), set=words).run()
    changed = toy_config(training={"learning_rate": 0.2}, model={"options": {"width": 3}})
    values = changed.to_dict()
    values["methods"]["fedobd"]["stage_one_rounds"] = 1
    run(parse_config(values), tmp_path / "local")
    assert results(folder) == results(tmp_path / "local")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"set": "training.lr=1"}, r"key 'training.lr' is unknown"),
        ({"set": "federation.clients=0"}, r"federation.clients: 0 is not allowed"),
        ({"set": "federation"}, r"wanted key=value"),
        ({"set": "simulation.stack=2"}, r"simulation\.stack is 2"),
        ({"min-replies": 0}, r"min_replies is 0"),
        (
            {"min-replies": 5},
            r"min_replies is 5; the smallest cohort of \w+ with 4",
        ),
        ({"round-timeout": 0.0}, r"round_timeout is 0"),
        ({"join-timeout": -1}, r"join_timeout is -1"),
        ({"round-timeout": "soon"}, r"round-timeout"),
        ({"set": "'"}, r"set"),
    ],
)
def test_a_wrong_option_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    app = App(tmp_path, toy_config())
    with pytest.raises(UsageError, match=message):
        app.run(**options)
    assert app.grid.sent == []
    assert "fedobd: " in log.text


def test_after_a_wrong_option_the_same_folder_can_be_used(tmp_path: Path) -> None:
    app = App(tmp_path, toy_config())
    with pytest.raises(UsageError, match="min_replies"):
        app.run(**{"min-replies": 5})
    app.run()


def test_a_configuration_that_cannot_be_read_is_said_to_be_one(tmp_path: Path) -> None:
    app = App(tmp_path, toy_config())
    app.file.write_text("method = ", encoding="utf-8")
    with pytest.raises(UsageError, match="is not TOML"):
        app.run()
    app.file.unlink()
    with pytest.raises(UsageError, match=r"config.toml' cannot be read"):
        app.run()


def test_too_few_nodes_end_the_run_with_a_message(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    app = App(tmp_path, toy_config(), nodes=[{"partition-id": 0}, {"partition-id": 8}])
    with pytest.raises(FedOBDError, match=r"1 clients are online.*Refused: node 1001: its client"):
        app.run(**{"min-replies": 2})
    assert "allowed are 0 to 3" in log.text


def test_a_server_and_a_client_of_other_configurations_do_not_mix(tmp_path: Path) -> None:
    app = App(tmp_path / "a", toy_config())
    other = App(tmp_path / "b", toy_config(model={"options": {"width": 3}}))
    app.grid = other.grid
    with pytest.raises(EmptyRoundError, match=r"shape|arrays|tensor"):
        app.run()


def test_the_log_says_how_the_run_goes(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    folder = App(tmp_path, toy_config()).run()
    for record in rows(folder):
        assert (
            f"fedobd: round {record['round']}, stage {record['stage']}: "
            f"metric {record['test_metric']:.4f}" in log.text
        )
    assert "round 1: 1 of 2 uploads" in log.text
    assert "5 rounds, final metric" in log.text


# --- nodes that misbehave


def test_the_folder_says_who_was_left_out_and_why(tmp_path: Path) -> None:
    app = App(tmp_path, toy_config("fedavg", output={"keep_payloads": True}))

    def tamper(reply: Message) -> Message:
        node = reply.metadata.src_node_id - FIRST_NODE_ID
        if reply.has_content() and "arrays" in reply.content and node == 2:
            record = reply.content.array_records["arrays"]
            record["payload"].data = record["payload"].data[:-9]
        return reply

    app.grid.tamper = tamper
    folder = app.run()
    for record in rows(folder):
        (refusal,) = record["refusals"]
        assert (refusal["client"], refusal["reason"]) == (2, "checksum")
        cut = payloads(folder, "upload-2")[f"round-{record['round']:04d}/upload-2.fobd"]
        assert refusal["uplink_bytes"] == len(cut)
        assert record["uplink_bytes"] == len(cut) + sum(
            client["uplink_bytes"] for client in record["clients"]
        )
    assert summary_of(folder)["refusals"] == 3


def test_a_client_that_trains_to_nan_is_left_out(tmp_path: Path) -> None:
    config = toy_config("fedavg", training={"function": "tests.toy:train_to_nan"})
    with pytest.raises(EmptyRoundError, match=r"(?s)client 0: error 6.*0\.weight"):
        App(tmp_path, config).run()


# --- data of the nodes


def save_arrays(file: Path, data: ClientData | ExampleSet) -> str:
    """Write examples as an institution has them: in one file, what is held out first."""
    if isinstance(data, ClientData):
        inputs = torch.cat([gather(data.validation).inputs, gather(data.train).inputs])
        targets = torch.cat([gather(data.validation).targets, gather(data.train).targets])
    else:
        inputs, targets = gather(data).inputs, gather(data).targets
    np.savez(file, inputs=inputs.numpy(), targets=targets.numpy())
    return str(file)


@pytest.fixture
def shares(tmp_path: Path) -> tuple[list[dict[str, Any]], str]:
    """The toy data's shares as files: the nodes' configs, and the test file."""
    from tests.toy import make_data

    data = make_data(4, 1)
    nodes = [
        {"client-id": number, "data-path": save_arrays(tmp_path / f"own-{number}.npz", client)}
        for number, client in enumerate(data.clients)
    ]
    return nodes, save_arrays(tmp_path / "test.npz", data.test)


@pytest.mark.parametrize(("method", "with_test"), [("smafd", True), ("fedobd", False)])
def test_nodes_train_on_their_own_files_with_no_central_split(
    method: str,
    with_test: bool,
    shares: tuple[list[dict[str, Any]], str],
    tmp_path: Path,
) -> None:
    nodes, test_file = shares
    data = {"name": "nodes", "validation_fraction": 0.1}
    config = toy_config(method, data=data | ({"test_path": test_file} if with_test else {}))
    folder = App(tmp_path / "app", config, nodes=nodes).run()
    run(toy_config(method), tmp_path / "local")
    if with_test:
        assert results(folder) == results(tmp_path / "local")
        return
    tests = ("test_loss", "test_metric")
    bare = [{k: v for k, v in r.items() if k not in tests} for r in rows(tmp_path / "local")]
    assert [{k: v for k, v in r.items() if k not in tests} for r in rows(folder)] == bare
    assert all(record["test_metric"] is None for record in rows(folder))
    summary = summary_of(folder)
    assert [summary[f"{what}_metric"] for what in ("final", "best", "broadcast")] == [None] * 3


def test_one_node_may_have_a_file_of_its_own_beside_a_split(
    shares: tuple[list[dict[str, Any]], str], tmp_path: Path
) -> None:
    inputs = torch.randn(40, 1, 6, 6, generator=torch.Generator().manual_seed(5))
    own = save_arrays(tmp_path / "own.npz", Examples(inputs, torch.arange(40) % 4))
    nodes: list[dict[str, Any]] = [{"partition-id": i} for i in range(4)]
    nodes[0]["data-path"] = own
    config = toy_config("fedavg", output={"keep_payloads": True})
    folder = App(tmp_path / "app", config, nodes=nodes).run()
    run(config, tmp_path / "local")
    first, local = rows(folder)[0], rows(tmp_path / "local")[0]
    examples = [client["num_examples"] for client in first["clients"]]
    assert examples[0] == 36
    assert first["clients"][1:] == local["clients"][1:]
    name = "round-0001/upload-{}.fobd"
    ours, theirs = payloads(folder, ""), payloads(tmp_path / "local", "")
    assert ours[name.format(1)] == theirs[name.format(1)]
    assert ours[name.format(0)] != theirs[name.format(0)]


def _arrays(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def _npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros((3, 1, 6, 6)))
    return stream.getvalue()


def _damaged() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("inputs.npy", "targets.npy"):
            archive.writestr(name, _npy() * 20)
    data = bytearray(stream.getvalue())
    data[60:90] = b"\xff" * 30
    return bytes(data)


IMAGES = np.zeros((5, 1, 6, 6), np.float32)
LABELS = np.zeros(5, np.int64)

BAD_FILES: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, r"own.npz' cannot be read: .*No such file"),
    "text": (b"inputs,targets\n1,2\n", r"own.npz' cannot be read"),
    "array": (_npy(), r"own.npz' cannot be read"),
    "cut": (_arrays(inputs=IMAGES, targets=LABELS)[:-30], r"own.npz' cannot be read"),
    "pickle": (
        _arrays(inputs=np.array([{}], object), targets=LABELS), r"own.npz' cannot be read.*pickle",
    ),
    "no targets": (_arrays(inputs=IMAGES), r"own.npz' holds inputs; targets lacks"),
    "nothing": (_arrays(), r"own.npz' holds no arrays; inputs and targets lacks"),
    "words": (_arrays(inputs=IMAGES, targets=np.array(["a"] * 5)), r"own.npz' cannot be read"),
    "uneven": (_arrays(inputs=IMAGES, targets=LABELS[:4]), r"different numbers of examples"),
    "no dimension": (_arrays(inputs=np.float32(1), targets=np.int64(1)), r"own\.npz"),
    "empty": (_arrays(inputs=IMAGES[:0], targets=LABELS[:0]), r"no .*examples"),
    "no bytes": (b"", r"own.npz' cannot be read"),
    "damaged": (_damaged(), r"own.npz' cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD_FILES))
def test_a_bad_data_file_is_refused_with_a_clear_reason(name: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[name]
    file = tmp_path / "own.npz"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_arrays(file)
    with pytest.raises(UsageError, match="cannot be read"):
        load_arrays(tmp_path)


UNFIT_FILES: dict[str, tuple[bytes, str]] = {
    "NaN": (_arrays(inputs=IMAGES + np.nan, targets=LABELS), r"NaN|finite"),
    "other shape": (_arrays(inputs=IMAGES[:, :, :3, :3], targets=LABELS), r"shape"),
    "other labels": (_arrays(inputs=IMAGES, targets=LABELS + 9), r"out of bounds|range"),
    "cut": (_arrays(inputs=IMAGES, targets=LABELS)[:-30], r"own.npz' cannot be read"),
}


@pytest.mark.parametrize("name", list(UNFIT_FILES))
def test_a_data_file_that_does_not_fit_leaves_its_node_out_with_the_reason(
    name: str, tmp_path: Path
) -> None:
    content, message = UNFIT_FILES[name]
    file = tmp_path / "own.npz"
    file.write_bytes(content)
    nodes = [{"client-id": i} for i in range(3)] + [{"client-id": 3, "data-path": str(file)}]
    folder = App(tmp_path / "app", toy_config("fedavg"), nodes=nodes).run()
    for record in rows(folder):
        (refusal,) = record["refusals"]
        assert (refusal["client"], refusal["reason"]) == (3, "failed")
        assert [client["client"] for client in record["clients"]] == [0, 1, 2]
        assert re.search(message, refusal["message"]), refusal["message"]


def test_a_node_without_a_file_is_left_out_where_data_lies_on_nodes(
    shares: tuple[list[dict[str, Any]], str], tmp_path: Path
) -> None:
    nodes, _ = shares
    del nodes[2]["data-path"]
    folder = App(tmp_path / "app", toy_config("fedavg", data={"name": "nodes"}), nodes=nodes).run()
    for record in rows(folder):
        (refusal,) = record["refusals"]
        assert refusal["client"] == 2
        assert "client 2 has no data" in refusal["message"]
        assert "data-path in its node config" in refusal["message"]


def test_the_local_engine_refuses_data_that_lies_on_nodes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data 'nodes' lies on the nodes of a deployment"):
        run(toy_config("fedavg", data={"name": "nodes"}), tmp_path / "run")


def test_the_simulation_refuses_data_that_lies_on_nodes_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedobd.flower import _launch, run_in_simulation

    def start(*words: object, **options: object) -> None:
        raise AssertionError("Flower was started")

    monkeypatch.setattr(_launch, "_super_link", start)
    with pytest.raises(UsageError, match="nodes"):
        run_in_simulation(toy_config("fedavg", data={"name": "nodes"}), tmp_path / "run")


def link_that_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *answers: str | Exception
) -> Any:
    """Return a SuperLink, which runs, with what `flwr` will answer; the last one ever after."""
    from fedobd.flower import _launch

    left = list(answers)

    def answer(*_: object, timeout: float, **__: object) -> Any:
        given = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(given, Exception):
            raise given
        return subprocess.CompletedProcess([], 0, given, "")

    monkeypatch.setattr("subprocess.run", answer)
    monkeypatch.setattr(_launch, "_command", str)  # `flwr` may lie in another environment
    running = SimpleNamespace(poll=lambda: None)
    return _launch._SuperLink(folder, running, {})  # type: ignore[arg-type]


RUNNING = '{"success": true, "runs": [{"status": "running"}]}'
FAILED = '{"success": false, "error-message": "the link is busy"}'


def test_what_flower_answers_is_read_and_a_failure_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert link_that_answers(tmp_path, monkeypatch, RUNNING).status() == "running"
    with pytest.raises(FedOBDError, match=r"^flwr list failed: the link is busy$"):
        link_that_answers(tmp_path, monkeypatch, FAILED).status()
    with pytest.raises(FedOBDError, match=r"flwr list answered 'no'"):
        link_that_answers(tmp_path, monkeypatch, "no").status()
    late = subprocess.TimeoutExpired("flwr", 120)
    with pytest.raises(FedOBDError, match=r"flwr list has not answered within 120 s"):
        link_that_answers(tmp_path, monkeypatch, late).status()
    with pytest.raises(FedOBDError, match=r"flwr run failed: the link is busy"):
        link_that_answers(tmp_path, monkeypatch, FAILED).start_run(
            tmp_path, {}, clients=1, workers=1
        )


@pytest.mark.parametrize("failures", [2, 3])
def test_two_looks_at_a_run_may_fail_and_no_more(
    failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedobd.flower import _launch

    monkeypatch.setattr(_launch, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(_launch, "STATUS_SECONDS", 0.0)
    run(toy_config("fedavg"), tmp_path / "run")
    ended = RUNNING.replace("running", "finished:completed")
    link = link_that_answers(tmp_path, monkeypatch, *[FAILED] * failures, RUNNING, ended)
    folder = RunFolder(tmp_path / "run")
    if failures == 2:
        _launch._follow(folder, link, Callback())
    else:
        with pytest.raises(FedOBDError, match="the link is busy"):
            _launch._follow(folder, link, Callback())


def test_a_negative_number_of_workers_is_refused_before_flower_starts(tmp_path: Path) -> None:
    from fedobd.flower import run_in_simulation

    with pytest.raises(UsageError, match=r"workers is -1; allowed are whole numbers from 0"):
        run_in_simulation(toy_config("fedavg"), tmp_path / "run", workers=-1)
    assert not (tmp_path / "run").exists()


def test_a_test_file_is_for_data_on_nodes_alone_and_a_bad_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data.test_path is for data 'nodes'"):
        build_experiment(toy_config(data={"test_path": str(tmp_path / "test.npz")}))
    app = App(
        tmp_path, toy_config(data={"name": "nodes", "test_path": str(tmp_path / "none.npz")})
    )
    with pytest.raises(UsageError, match=r"none.npz' cannot be read"):
        app.run()
    assert app.grid.sent == []


# --- the app that is written


def load_app(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ServerApp, ClientApp]:
    """Import what an app's pyproject.toml names, as Flower does."""
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    monkeypatch.syspath_prepend(folder)
    for name in [name for name in sys.modules if name.startswith("fedobd_app")]:
        monkeypatch.delitem(sys.modules, name)
    components = project["tool"]["flwr"]["app"]["components"]
    loaded = []
    for kind in ("serverapp", "clientapp"):
        module, _, name = components[kind].partition(":")
        loaded.append(getattr(importlib.import_module(module), name))
    for name in [name for name in sys.modules if name.startswith("fedobd_app")]:
        monkeypatch.delitem(sys.modules, name)
    server, client = loaded
    assert isinstance(server, ServerApp)
    assert isinstance(client, ClientApp)
    return server, client


def test_a_written_app_runs_with_the_results_of_the_local_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config("smafd")
    write_app(tmp_path / "app", config)
    server, client = load_app(tmp_path / "app", monkeypatch)
    project = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text(encoding="utf-8"))
    options = project["tool"]["flwr"]["app"]["config"]
    options |= {"output": str(tmp_path / "run")}
    grid = InProcessGrid(client, [{"partition-id": i} for i in range(4)], options)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=options)
    server(grid, context)
    run(config, tmp_path / "local")
    assert results(tmp_path / "run") == results(tmp_path / "local")


@pytest.mark.parametrize("method", ["fedobd", "smafd"])
def test_a_written_app_is_what_flower_wants(method: str, tmp_path: Path) -> None:
    write_app(tmp_path / "app", load_config("digits").for_method(method, 7))
    project = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text(encoding="utf-8"))
    app = project["tool"]["flwr"]["app"]
    assert app["publisher"]
    assert set(app) == {"publisher", "components", "config"}
    assert all(isinstance(value, str | int | float | bool) for value in app["config"].values())
    assert all("_" not in key for key in app["config"])
    assert f"fedobd[flower]=={__version__}" in project["project"]["dependencies"]
    assert project["project"]["license"]
    written = tomllib.loads((tmp_path / "app/fedobd_app/config.toml").read_text(encoding="utf-8"))
    assert parse_config(written) == load_config("digits").for_method(method, 7)
    readme = (tmp_path / "app" / "README.md").read_text(encoding="utf-8")
    for fact in (
        method,
        "num-supernodes=10",
        "client-id",
        "data-path",
        "FLWR_TELEMETRY_ENABLED=0",
    ):
        assert fact in readme
    assert "{" not in readme
    total = sum(file.stat().st_size for file in (tmp_path / "app").rglob("*") if file.is_file())
    assert total < 100_000


def test_a_written_app_passes_flowers_own_check(tmp_path: Path) -> None:
    try:
        from flwr.cli.config_utils import load_and_validate
    except ImportError:
        pytest.skip("this flwr has its check elsewhere")
    write_app(tmp_path / "app", load_config("digits"))
    checked: Any = load_and_validate
    found, *complaints = checked(tmp_path / "app" / "pyproject.toml", check_module=False)
    assert found["project"]["name"] == "fedobd-fedobd"
    assert not any(complaints)  # older versions return errors beside warnings


def test_an_app_is_written_into_a_new_or_empty_folder_only(tmp_path: Path) -> None:
    config = toy_config()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place in ("full", "file"):
        with pytest.raises(UsageError, match="is there already and not empty; choose a new"):
            write_app(tmp_path / place, config)
    with pytest.raises(UsageError, match="cannot be made"):
        write_app(tmp_path / "file" / "app", config)
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    write_app(tmp_path / "empty", config)
    with pytest.raises(UsageError, match="is there already"):
        write_app(tmp_path / "empty", config)
    write_app(tmp_path / "deep" / "er" / "app", config)
    assert (tmp_path / "deep/er/app/fedobd_app/server_app.py").exists()


# --- the command line


@pytest.fixture
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.toml").write_text(CONFIG, encoding="utf-8")


@pytest.mark.usefixtures("_in_a_folder_of_its_own")
def test_flower_new_writes_an_app(capsys: pytest.CaptureFixture[str]) -> None:
    done = fedobd(capsys, "flower", "new", "mine")
    assert done.status == 0, done.err
    assert "wrote mine; its README.md says how to run it" in done.out
    written = parse_config(tomllib.loads(Path("mine/fedobd_app/config.toml").read_text()))
    assert written == load_config("digits").for_method("fedobd", 0)
    done = fedobd(
        capsys, "flower", "new", "other", "toy.toml", "--method", "smafd", "--seed", "5",
        "--set", "federation.clients=3",
    )  # fmt: skip
    assert done.status == 0, done.err
    changed = parse_config(tomllib.loads(Path("other/fedobd_app/config.toml").read_text()))
    assert (changed.method, changed.federation.seed, changed.federation.clients) == ("smafd", 5, 3)


@pytest.mark.usefixtures("_in_a_folder_of_its_own")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["flower", "new", "."], r"'.' is there already and not empty; choose a new folder"),
        (["flower", "new", "app", "digts"], r"preset 'digts' is unknown"),
        (["flower", "new", "app", "digits", "--method", "fedx"], r"method 'fedx' is unknown"),
        (["flower", "new", "app", "digits", "--set", "a=1"], r"key 'a' is unknown"),
        (["run", "toy.toml", "--engine", "bogus"], r"--engine 'bogus': allowed are local and"),
        (["run", "toy.toml", "--engine", ""], r"--engine '': allowed are local and flower"),
    ],
)
def test_mistakes_end_with_status_2_and_one_message(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    done = fedobd(capsys, *words)
    assert done.status == 2
    assert done.err.startswith("error: ")
    assert message.replace("\\", "") in done.err
    assert not Path("runs").exists()
    assert not Path("app").exists()


@pytest.mark.usefixtures("_in_a_folder_of_its_own")
def test_without_flower_the_message_says_what_to_install() -> None:
    code = """
import sys
from fedobd.cli import main

sys.modules["flwr"] = None
for words in (["flower", "new", "app"], ["run", "toy.toml", "--engine", "flower"]):
    sys.argv[:] = ["fedobd", *words]
    try:
        main()
    except SystemExit as end:
        print("ended with", end.code)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split("\n") == ["ended with 2", "ended with 2", ""], done.stderr
    shown = " ".join(done.stderr.split())
    missing = r"'flwr(\.app)?' is not installed; pip install 'fedobd\[flower\]'"
    assert len(re.findall(missing, shown)) == 2
    assert "Traceback" not in done.stderr
    assert not Path("app").exists()


# --- Flower's simulation, for real


def marked(mark: str) -> dict[int, str]:
    """Return the processes, with their commands, whose environment holds a mark."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if mark.encode() in (folder / "environ").read_bytes():
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(folder.name)] = command.decode(errors="replace")
            except OSError:
                continue
    return found


HANGS_S = 240
"""After so long a test that waits for processes fails; no other time matters."""


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for an event, or until something must hang."""
    deadline = time.monotonic() + HANGS_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def ignores_ctrl_c(process: subprocess.Popen[str]) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    (ignored,) = re.findall(r"SigIgn:\s*([0-9a-f]+)", status)
    return bool(int(ignored, 16) & 1 << signal.SIGINT - 1)


def all_gone(mark: str) -> dict[int, str]:
    """Return what is left of the processes with a mark, if they do not end."""
    wait_until(lambda: not marked(mark))
    left = marked(mark)
    for number in left:
        os.kill(number, signal.SIGKILL)
    return left


SHORT_DIGITS = [
    "--set", "federation.clients=4", "--set", "output.keep_payloads=true",
    "--set", "methods.fedobd.stage_one_rounds=2", "--set", "methods.fedobd.stage_one_epochs=1",
    "--set", "methods.fedobd.stage_two_epochs=2", "--set", "methods.fedobd.cohort=2",
]  # fmt: skip

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="processes are found in /proc"
)


@needs_proc
@pytest.mark.deployment
def test_engine_flower_gives_the_bytes_of_the_local_engine_and_leaves_no_process(
    tmp_path: Path,
) -> None:
    pytest.importorskip("ray")
    mark = f"FEDOBD_TEST_MARK_{uuid.uuid4().hex}"
    command = [sys.executable, "-m", "fedobd", "run", "digits", *SHORT_DIGITS]
    environment = {**os.environ, mark: "1"}
    done = subprocess.run(
        [*command, "--engine", "flower", "--output", str(tmp_path / "flower")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        timeout=HANGS_S,
    )  # fmt: skip
    left = all_gone(mark)
    assert done.returncode == 0, done.stderr
    assert left == {}
    assert "fedobd: round 4/4" in done.stdout
    subprocess.run(
        [*command, "--output", str(tmp_path / "local")],
        cwd=tmp_path, capture_output=True, check=True,
    )  # fmt: skip
    assert results(tmp_path / "flower") == results(tmp_path / "local")
    assert payloads(tmp_path / "flower", "") == payloads(tmp_path / "local", "")
    assert payloads(tmp_path / "flower", "upload")


@needs_proc
@pytest.mark.deployment
@pytest.mark.parametrize(
    ("way", "moment"),
    [
        ("ctrl-c", "while Flower starts"),
        ("ctrl-c", "in a round"),
        ("ctrl-c twice", "in a round"),
        ("kill", "in a round"),
    ],
)  # fmt: skip
def test_an_interrupted_simulation_leaves_no_process(
    way: str, moment: str, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    mark = f"FEDOBD_TEST_MARK_{uuid.uuid4().hex}"
    folder = tmp_path / "run"
    command = [
        sys.executable, "-m", "fedobd", "run", "digits", *SHORT_DIGITS, "--engine", "flower",
        "--output", str(folder), "--set", "methods.fedobd.stage_one_rounds=200",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, mark: "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:

        def has_come() -> bool:
            if process.poll() is not None:
                return True
            if moment == "while Flower starts":
                return len(marked(mark)) > 2
            return (folder / "rounds.jsonl").exists() and bool(rows(folder))

        wait_until(has_come)
        if way == "kill":
            process.terminate()
        else:  # a terminal sends it to all processes of its foreground group
            os.killpg(process.pid, signal.SIGINT)
        if way == "ctrl-c twice":
            # the second comes while the first is seen to: it is ignored by then
            wait_until(lambda: process.poll() is not None or ignores_ctrl_c(process))
            os.killpg(process.pid, signal.SIGINT)
        ended = process.wait(timeout=HANGS_S)
    finally:
        left = all_gone(mark)
        assert process.stdout is not None
        output = process.stdout.read()
        process.stdout.close()
    assert left == {}, left
    if way == "ctrl-c":
        assert ended == 130, output
        assert "--resume goes on" in output


def test_kept_uploads_are_what_went_over_the_grid(tmp_path: Path) -> None:
    app = App(tmp_path, toy_config("fedpaq", output={"keep_payloads": True}))
    folder = app.run()
    schema = build_experiment(toy_config("fedpaq")).schema
    sent = {}
    for reply in app.grid.replies:
        if IDENTIFY in reply.content:
            continue
        upload = carried(reply.content["arrays"], UPLOAD) or b""
        header = Payload.parse(upload, schema).header
        sent[f"round-{header.round:04d}/upload-{header.client}.fobd"] = upload
    assert sent == payloads(folder, "upload")
    assert sum(map(len, sent.values())) == summary_of(folder)["uplink_bytes"]
