"""Worker processes: those that die are replaced, errors come through, none outlives its pool."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from fedobd import (
    EmptyRoundError,
    FedOBDError,
    RoundPlan,
    RoundRecord,
    ServerSession,
    UsageError,
)
from fedobd._seeds import derive_seed
from fedobd.blocks import ModelState
from fedobd.data import ClientData
from fedobd.experiments import Experiment, build_experiment, run
from fedobd.sessions import Aggregator
from fedobd.simulation import (
    ClientPool,
    ClientResult,
    ClientSetup,
    ClientTask,
    ProcessPool,
    SequentialPool,
    StackedTraining,
    _pool,
    _worker,
    simulate,
)
from fedobd.training import ClientStart, LocalResult
from tests import toy
from tests.helpers import heed_ctrl_c
from tests.toy import PayloadKeeper, config

ROOT = Path(__file__).parent.parent
Played = tuple[dict[str, bytes], ModelState]
"""Payloads by name, and the server's last state."""

ROUNDS: dict[str, dict[str, int]] = {
    "fedobd": {
        "stage_one_rounds": 2, "stage_one_epochs": 1, "stage_two_epochs": 1, "cohort": 4
    },
    "smafd": {"rounds": 3, "epochs": 1, "cohort": 4},
}  # fmt: skip
LARGE = {"options": {"width": 3000}}  # 1.9 MB


HANGS_S = 600
"""Where two processes wait for each other, a test fails after so long; no other time matters."""


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"not done after {HANGS_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(HANGS_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert multiprocessing.active_children() == []


# How they start


def name_start(
    model: nn.Module, data: ClientData, plan: RoundPlan, seed: int, *, folder: Path
) -> LocalResult:
    """Train, and leave how this worker was started as a file's name."""
    is_forked = "fedobd.simulation._preload" in sys.modules
    (folder / ("forked" if is_forked else "spawned")).touch()
    return toy.train(model, data, plan, seed)


@pytest.mark.parametrize(
    ("has_long_path", "wanted"),
    [
        pytest.param(False, "forked", marks=pytest.mark.skipif("sys.platform != 'linux'")),
        (True, "spawned"),
    ],
)
def test_workers_are_forked_from_a_process_that_has_imported_all_where_that_can_be(
    has_long_path: bool, wanted: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if has_long_path:  # of a socket among temporary files
        folder = tmp_path / ("x" * 80)
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    seen = tmp_path / "seen"
    seen.mkdir()
    experiment = build_experiment(config("fedavg"))
    setup = replace(experiment.setup, train=partial(name_start, folder=seen))
    played = play(experiment, ProcessPool(setup, 1))
    assert [file.name for file in seen.iterdir()] == [wanted]
    assert played[0] == play(experiment, SequentialPool(experiment.setup))[0]


def test_workers_are_not_forked_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _worker._context().get_start_method() == "spawn"


# Training functions that misbehave in a worker


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(
    model: nn.Module, data: ClientData, plan: RoundPlan, seed: int, *, marker: Path
) -> LocalResult:
    """Die in the middle of the second round's training, the first time."""
    result = toy.train(model, data, plan, seed)
    if plan.round == 2 and not marker.exists():
        marker.touch()
        die()
    return result


def die_once_together(
    model: nn.Module,
    clients: Sequence[ClientStart],
    plan: RoundPlan,
    *,
    marker: Path,
    together: StackedTraining,
) -> tuple[Sequence[ModelState], list[LocalResult]]:
    trained = together(model, clients, plan)
    if plan.round == 2 and not marker.exists():
        marker.touch()
        die()
    return trained


def die_always(
    model: nn.Module, data: ClientData, plan: RoundPlan, seed: int, *, folder: Path
) -> LocalResult:
    (folder / f"attempt-{len(list(folder.iterdir()))}").touch()
    die()
    raise AssertionError


def die_second(
    model: nn.Module, data: ClientData, plan: RoundPlan, seed: int, *, folder: Path
) -> LocalResult:
    """Die in the second round's second training of a process, the first time."""
    result = toy.train(model, data, plan, seed)
    mine = folder / f"{os.getpid()}"
    if plan.round == 2 and mine.exists() and not (folder / "died").exists():
        (folder / "died").touch()
        die()
    if plan.round == 2:
        mine.touch()
    return result


def overshoot(
    model: nn.Module, data: ClientData, plan: RoundPlan, seed: int, *, every: bool
) -> LocalResult:
    """Train, and make values too large; for every client, or for one in two."""
    result = toy.train(model, data, plan, seed)
    if every or seed % 2:
        with torch.no_grad():
            next(model.parameters()).mul_(1e6)
    return result


def leave(model: nn.Module, data: ClientData, plan: RoundPlan, seed: int) -> LocalResult:
    sys.exit(3)


def fail(
    model: nn.Module, data: ClientData, plan: RoundPlan, seed: int, *, error: Exception
) -> LocalResult:
    raise error


def finish_last(
    model: nn.Module, data: ClientData, plan: RoundPlan, seed: int, *, folder: Path
) -> LocalResult:
    """Train; of a cohort of two, the first client is done when the second is."""
    result = toy.train(model, data, plan, seed)
    second_is_done = folder / str(plan.round)
    if seed == derive_seed(1, "train", plan.round, plan.cohort[0]):
        wait_for(second_is_done.exists)
    else:
        second_is_done.touch()
    return result


def never_finish(
    model: nn.Module, data: ClientData, plan: RoundPlan, seed: int, *, folder: Path
) -> LocalResult:
    (folder / str(os.getpid())).touch()
    signal.pause()
    raise AssertionError


# Running


def play(
    experiment: Experiment,
    pool: ClientPool,
    *,
    num_clients: int = 4,
    after_round: Callable[[], None] = lambda: None,
) -> Played:
    """Play a run; return all its payloads and the last state."""
    server = ServerSession(
        experiment.method, experiment.schema, experiment.initial, num_clients=num_clients, seed=1
    )
    keeper = PayloadKeeper()
    with pool:
        for played in simulate(server, pool, callback=keeper):
            assert not played.record.refusals
            after_round()
    return keeper.kept, server.state


def same(
    one: tuple[dict[str, bytes], ModelState], two: tuple[dict[str, bytes], ModelState]
) -> bool:
    return one[0] == two[0] and all(torch.equal(one[1][name], two[1][name]) for name in one[1])


def play_unseen(experiment: Experiment, pool: ClientPool) -> tuple[list[RoundRecord], ModelState]:
    """Play a run whose payloads nobody wants to see, so that workers take the uploads in."""
    server = ServerSession(
        experiment.method, experiment.schema, experiment.initial, num_clients=4, seed=1
    )
    with pool:
        records = [played.record for played in simulate(server, pool)]
    return records, server.state


def assert_same_runs(
    one: tuple[list[RoundRecord], ModelState], other: tuple[list[RoundRecord], ModelState]
) -> None:
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])


def tasks_of(
    experiment: Experiment, clients: Sequence[int], cohort: tuple[int, ...] | None = None
) -> Iterator[ClientTask]:
    """Yield the tasks of the first round for these clients."""
    server = ServerSession(
        experiment.method, experiment.schema, experiment.initial, num_clients=4, seed=1
    )
    plan = server.begin_round()
    assert plan is not None
    broadcast = server.broadcast().data
    for client in clients:
        yield ClientTask(
            plan=replace(plan, cohort=cohort or plan.cohort), client=client, broadcast=broadcast
        )


# Workers that die


@pytest.mark.parametrize(("method", "stack"), [("fedobd", 1), ("smafd", 3)])
def test_a_worker_that_dies_is_replaced_and_the_bytes_are_the_same(
    method: str, stack: int, tmp_path: Path
) -> None:
    experiment = build_experiment(
        config(method, simulation={"stack": stack}, methods={method: ROUNDS[method]})
    )
    marker = tmp_path / "died"
    setup = experiment.setup
    if stack == 1:
        setup = replace(setup, train=toy.train)
        dying = replace(setup, train=partial(die_once, marker=marker))
    else:
        assert setup.train_together is not None
        together = partial(die_once_together, marker=marker, together=setup.train_together)
        dying = replace(setup, train_together=together)
    wanted = play(experiment, SequentialPool(setup))
    workers = 2 if stack == 1 else 1
    assert same(play(experiment, ProcessPool(dying, workers)), wanted)
    assert marker.exists()


def test_a_worker_that_dies_each_time_ends_the_run(tmp_path: Path) -> None:
    experiment = build_experiment(config("fedavg"))
    setup = replace(experiment.setup, train=partial(die_always, folder=tmp_path))
    message = r"client \d, round 1: its worker process died 4 times, with exit status"
    with pytest.raises(FedOBDError, match=message):
        play(experiment, ProcessPool(setup, 1))
    assert _pool.MAX_ATTEMPTS == 4  # the first time and three more
    assert len(list(tmp_path.iterdir())) == 4
    assert multiprocessing.active_children() == []


def test_the_exit_status_of_a_worker_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipe ends before the process does: by much after sys.exit, by little after a signal."""
    monkeypatch.setattr(_pool, "MAX_ATTEMPTS", 1)
    experiment = build_experiment(config("fedavg"))
    with pytest.raises(FedOBDError, match=r"died 1 times, with exit status 3$"):
        play(experiment, ProcessPool(replace(experiment.setup, train=leave), 1))


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (UsageError("no such loss"), UsageError, r"^client \d, round 1: no such loss$"),
        (
            ValueError("wrong shape"),
            FedOBDError,
            r"^a worker failed: ValueError\('wrong",
        ),
    ],
)
def test_what_training_raises_comes_through_and_ends_the_run(
    error: Exception, kind: type[FedOBDError], message: str
) -> None:
    experiment = build_experiment(config("fedavg"))
    pool = ProcessPool(replace(experiment.setup, train=partial(fail, error=error)), 1)
    folder = Path(pool._folder.name)
    with pytest.raises(kind, match=message):
        play(experiment, pool)
    assert multiprocessing.active_children() == []
    assert not folder.exists()


def test_a_pool_goes_on_after_a_round_that_was_broken_off() -> None:
    experiment = build_experiment(config("fedavg"))
    setup = replace(experiment.setup, train=fail_in_two)
    with ProcessPool(setup, 2) as pool:
        server = ServerSession(
            experiment.method, experiment.schema, experiment.initial, num_clients=4, seed=1
        )
        rounds = simulate(server, pool)
        next(rounds)
        with pytest.raises(UsageError, match=r"round 2: no such loss"):
            next(rounds)
        results = pool.run(tasks_of(experiment, range(4)))
        next(results)
        results.close()  # type: ignore[attr-defined]
        found = {one.client: one.upload for one in pool.run(tasks_of(experiment, (0, 3)))}
    with SequentialPool(setup) as here:
        wanted = {
            result.client: result.upload for result in here.run(tasks_of(experiment, (0, 3)))
        }
    assert found == wanted


def fail_in_two(model: nn.Module, data: ClientData, plan: RoundPlan, seed: int) -> LocalResult:
    if plan.round == 2:
        raise UsageError("no such loss")
    return toy.train(model, data, plan, seed)


def test_a_tensor_without_elements_goes_through_workers() -> None:
    experiment = build_experiment(config("fedavg", model={"options": {"width": 2, "empty": True}}))
    wanted = play_unseen(experiment, SequentialPool(experiment.setup))
    assert wanted[1]["empty"].shape == (0, 3)
    assert_same_runs(play_unseen(experiment, NoUploads(experiment.setup, 1)), wanted)


# Uploads that workers take in


class NoUploads(ProcessPool):
    """Fails where an upload comes back."""

    def run(
        self, tasks: Iterable[ClientTask], aggregator: Aggregator | None = None
    ) -> Iterator[ClientResult]:
        for result in super().run(tasks, aggregator):
            assert result.upload is None
            assert result.outcome is not None
            yield result


@pytest.mark.parametrize(
    ("method", "stack", "dtype"),
    [
        ("fedavg", 1, "float32"),
        ("fedpaq", 1, "bfloat16"),
        ("feddropoutavg", 1, "bfloat16"),
        ("feddropoutavg", 3, "float32"),
        ("fedobd", 1, "float32"),
        ("fedobd", 3, "bfloat16"),
    ],
)
def test_workers_take_uploads_in_as_the_server_does(method: str, stack: int, dtype: str) -> None:
    options = {"dtype": dtype}
    experiment = build_experiment(
        config(method, simulation={"stack": stack}, model={"options": options})
    )
    wanted = play_unseen(experiment, SequentialPool(experiment.setup))
    assert len(wanted[0]) >= 3
    assert_same_runs(play_unseen(experiment, NoUploads(experiment.setup, 2)), wanted)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_dead_worker_had_taken_in_is_played_again(workers: int, tmp_path: Path) -> None:
    experiment = build_experiment(config("fedavg"))
    setup = replace(experiment.setup, train=toy.train)
    dying = replace(setup, train=partial(die_second, folder=tmp_path))
    wanted = play_unseen(experiment, SequentialPool(setup))
    assert_same_runs(play_unseen(experiment, NoUploads(dying, workers)), wanted)
    assert (tmp_path / "died").exists()


@pytest.mark.parametrize("refused", ["some", "all"])
def test_workers_refuse_as_the_server_does(refused: str) -> None:
    """A client's values are too far from the server's; the others' count."""
    experiment = build_experiment(config("fedavg"))
    setup = replace(experiment.setup, train=partial(overshoot, every=refused == "all"))
    if refused == "all":
        for pool in (SequentialPool(setup), NoUploads(setup, 2)):
            with pytest.raises(EmptyRoundError, match=r"would change by .* client 3: "):
                play_unseen(experiment, pool)
        return
    wanted = play_unseen(experiment, SequentialPool(setup))
    assert 0 < sum(len(record.refusals) for record in wanted[0]) < 12
    assert {refusal.reason for record in wanted[0] for refusal in record.refusals} == {"limit"}
    assert_same_runs(play_unseen(experiment, NoUploads(setup, 2)), wanted)


def test_uploads_that_are_taken_in_leave_no_files() -> None:
    experiment = build_experiment(config("fedavg", model=LARGE, training={"learning_rate": 1e-5}))
    pool = ProcessPool(experiment.setup, 2)
    folder, names = Path(pool._folder.name), []
    server = ServerSession(
        experiment.method, experiment.schema, experiment.initial, num_clients=4, seed=1
    )
    with pool:
        for _ in simulate(server, pool):
            names.append({file.name for file in folder.iterdir()})
    assert names[0] == names[1] == names[2]  # written over, round by round
    assert len(names[0]) == 4  # the server's values, the broadcast, and each worker's sums
    assert not folder.exists()


# Any order, any number, any size


def test_more_workers_than_clients_and_results_in_any_order(tmp_path: Path) -> None:
    experiment = build_experiment(
        config("fedavg", methods={"fedavg": {"rounds": 3, "epochs": 1, "cohort": 2}})
    )
    wanted = play(experiment, SequentialPool(replace(experiment.setup, train=toy.train)))
    setup = replace(experiment.setup, train=partial(finish_last, folder=tmp_path))
    assert same(play(experiment, ProcessPool(setup, 3)), wanted)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("method", ["fedavg", "smafd"])
def test_uploads_and_states_of_megabytes_and_no_files_left(method: str) -> None:
    changes: dict[str, Any] = {
        "model": LARGE,
        "training": {"learning_rate": 1e-5},
        "methods": {method: {"cohort": 4, "rounds": 3, "epochs": 1}},
    }
    experiment = build_experiment(config(method, **changes))
    pool = ProcessPool(experiment.setup, 2 if method == "smafd" else 1)
    folder, counts, contents = Path(pool._folder.name), [], []

    def look() -> None:
        assert not any(worker.accumulated for worker in pool._workers)  # tasks hold states
        counts.append(len(list(folder.iterdir())))
        contents.append(sum(file.stat().st_size for file in folder.iterdir()))

    two = play(experiment, pool, after_round=look)
    assert len(counts) == 3
    # The round's broadcast and, in the first, one opening; uploads are gone once they were read.
    assert max(counts) <= 2, counts
    assert max(contents) <= 2 * max(len(data) for name, data in two[0].items())
    assert not folder.exists()
    assert max(len(data) for name, data in two[0].items() if "upload" in name) > 1_000_000
    assert same(two, play(experiment, SequentialPool(experiment.setup)))


def test_a_message_that_fills_a_pipe_is_no_deadlock() -> None:
    """Tasks name the round's whole cohort: here 2 MB each, sent ahead to a worker at work."""
    experiment = build_experiment(config("fedavg", model=LARGE))
    with ProcessPool(experiment.setup, 1) as pool:
        results = list(pool.run(tasks_of(experiment, [0, 1, 2, 3], tuple(range(500_000)))))
    assert [result.client for result in results] == [0, 1, 2, 3]


def test_tasks_are_drawn_as_they_are_wanted() -> None:
    """A task holds what its client kept, which for a whole round need not fit into memory."""
    experiment = build_experiment(config("fedavg"))
    drawn: list[int] = []

    def watched() -> Iterator[ClientTask]:
        for task in tasks_of(experiment, [0, 1, 2, 3] * 5):
            drawn.append(task.client)
            yield task

    with ProcessPool(experiment.setup, 1) as pool:
        results = pool.run(watched())
        next(results)
        assert len(drawn) <= 6
        list(results)


def test_many_clients_do_not_take_an_open_file_each() -> None:
    chosen = config(
        "fedavg",
        federation={"clients": 300},
        data={"options": {"num_examples": 900}},
        methods={"fedavg": {"cohort": 2, "rounds": 1}},
    )
    experiment = build_experiment(chosen)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        with ProcessPool(experiment.setup, 1) as pool:
            list(pool.run(tasks_of(experiment, [0])))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# Ends


def test_closing_a_pool_in_mid_round_ends_its_workers(tmp_path: Path) -> None:
    experiment = build_experiment(config("fedavg"))
    pool = ProcessPool(replace(experiment.setup, train=partial(never_finish, folder=tmp_path)), 2)
    folder = Path(pool._folder.name)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    def interrupt_when_both_train() -> None:
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
        os.kill(os.getpid(), signal.SIGUSR1)

    with pool:
        # not SIGINT, which a job that a shell starts in the background ignores
        before = signal.signal(signal.SIGUSR1, interrupt)
        watch = threading.Thread(target=interrupt_when_both_train)
        watch.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                next(pool.run(tasks_of(experiment, [0, 1, 2, 3])))
        finally:
            watch.join()
            signal.signal(signal.SIGUSR1, before)
        assert len(multiprocessing.active_children()) == 2
    assert multiprocessing.active_children() == []
    assert not folder.exists()


def test_an_unused_pool_closes() -> None:
    setup: ClientSetup = build_experiment(config("fedavg")).setup
    with ProcessPool(setup, 2) as pool:
        folder = Path(pool._folder.name)
        assert folder.is_dir()
    assert not folder.exists()


def records(folder: Path) -> list[dict[str, Any]]:
    file = folder / "rounds.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANGS_S
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def group_is_empty(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


GATED = config(
    "fedobd",
    methods={"fedobd": {**ROUNDS["fedobd"], "stage_one_rounds": 4}},
    training={"function": "tests.toy:train_at_gate"},
)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(GATED, folder)
    return folder


def start(
    words: Sequence[str | Path], gate: Path | None = None, **options: Any
) -> subprocess.Popen[str]:
    """Start `fedobd run`, in a process group of its own, with two workers."""
    environment = {**os.environ, **({"TOY_GATE": str(gate)} if gate else {})}
    return subprocess.Popen(
        [sys.executable, "-m", "fedobd", "run", *words, "--workers", "2"],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, **options,
    )  # fmt: skip


@contextmanager
def gated_run(folder: Path, gate: Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Start a run that stands still in round 3 until the gate's file is gone; wait for that."""
    file = gate.with_name("config.toml")
    file.write_text(GATED.to_toml(), encoding="utf-8")
    gate.touch()
    process = start([file, "-o", folder], gate, **options)
    try:
        wait_for(lambda: len(records(folder)) == 2 or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        yield process
    finally:
        gate.unlink(missing_ok=True)
        if not group_is_empty(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def test_a_worker_that_dies_after_some_results_of_its_group() -> None:
    """Each upload is above a megabyte, so that it comes back on its own."""
    experiment = build_experiment(config("fedavg", model=LARGE, simulation={"stack": 4}))
    with SequentialPool(experiment.setup) as pool:
        wanted = {r.client: r.upload for r in pool.run(tasks_of(experiment, range(4)))}
    assert all(len(upload or b"") > 2**20 for upload in wanted.values())
    with ProcessPool(experiment.setup, 1) as processes:
        results = processes.run(tasks_of(experiment, range(4)))
        found = [next(results)]
        os.kill(processes._workers[0]._process.pid or 0, signal.SIGKILL)
        found += results
    assert sorted(result.client for result in found) == [0, 1, 2, 3]
    assert {result.client: result.upload for result in found} == wanted


def test_ctrl_c_while_workers_start(tmp_path: Path) -> None:
    process = start(["digits", "-o", tmp_path], preexec_fn=heed_ctrl_c)
    main = psutil.Process(process.pid)
    try:
        wait_for(lambda: process.poll() is not None or bool(main.children(recursive=True)))
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=HANGS_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 130, said
    assert "interrupted; the same command with --output" in said
    wait_for(lambda: group_is_empty(process.pid))


def test_ctrl_c_inside_an_exec_of_text_ends_with_the_usual_status(tmp_path: Path) -> None:
    """As when it comes while an import makes a dataclass."""
    program = """
from pathlib import Path
import typer
from fedobd.cli._run import interruptible

def command() -> None:
    with interruptible(Path("a")):
        exec("raise KeyboardInterrupt")

typer.run(command)
"""
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    words = [sys.executable, "-m", "program"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.startswith("interrupted; the same command with --output a --resume")


@pytest.mark.parametrize("whom", ["main process", "process group"])
def test_ctrl_c_ends_all_workers_and_leaves_a_run_that_resumes(
    whom: str, whole_run: Path, tmp_path: Path
) -> None:
    """A terminal sends SIGINT to the process group, workers included; `kill` to one process.

    The gate stays shut, so that nothing but the interruption can end workers and run.
    """
    folder = tmp_path / "a"
    with gated_run(folder, tmp_path / "gate", preexec_fn=heed_ctrl_c) as process:
        if whom == "main process":
            process.send_signal(signal.SIGINT)
        else:
            os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=HANGS_S)
        wait_for(lambda: group_is_empty(process.pid))
    assert process.returncode == 130, said
    assert "interrupted; the same command with --output" in said
    assert "Traceback" not in said
    assert len(records(folder)) == 2
    run(GATED, folder, resume=True)
    assert records(folder) == records(whole_run)
    model = [(at / "model.safetensors").read_bytes() for at in (folder, whole_run)]
    assert model[0] == model[1]


def test_workers_end_in_silence_when_the_main_process_is_killed(tmp_path: Path) -> None:
    """They are done with their clients, and find nobody to tell."""
    gate = tmp_path / "gate"
    with gated_run(tmp_path / "a", gate) as process:
        process.kill()
        process.wait()
        gate.unlink()
        _, said = process.communicate(timeout=HANGS_S)
        wait_for(lambda: group_is_empty(process.pid))
    assert "Traceback" not in said
