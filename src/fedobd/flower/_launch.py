"""Launch: a configuration in Flower's simulation (Ray), with one command.

Starts a SuperLink of its own in simulation mode, has Flower run the app there, and stops what it
has started. Flower's own command for that leaves its SuperLink running.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import psutil
import tomli_w

from fedobd._errors import FedOBDError, UsageError
from fedobd.experiments import RunConfig, RunFolder, Summary, build_experiment, read_summary
from fedobd.flower._app import check_stack, write_app
from fedobd.simulation import Callback, Callbacks, check_workers
from fedobd.tracking import RunLog

START_SECONDS = 60.0
STOP_SECONDS = 5.0
LOOK_SECONDS = 0.5
ANSWER_SECONDS = 120.0
MOST_MISSED = 3  # questions for the run's status without an answer, one after another
STATUS_SECONDS = 10.0  # between two questions for the run's status, each a process of its own

_CONNECTION = "fedobd"
_LOG_TAIL = 3000  # characters of Flower's log that an error shows
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""What turns off telemetry, update checks, and installations that would shadow this package."""


def run_in_simulation(
    config: RunConfig,
    path: Path,
    *,
    workers: int = 0,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Summary:
    """Run a configuration in Flower's simulation.

    The run folder is that of `fedobd.experiments.run`, with the same bytes and results. With the
    environment variable `RAY_ADDRESS` clients run on that Ray cluster.

    Args:
        config: what to run.
        path: the run folder.
        workers: how many clients run at a time, one CPU each; 0 for one a CPU.
        resume: go on from the folder's checkpoint.
        callbacks: see the run as it goes; no payloads, and no client that has uploaded.

    Raises:
        UsageError: the configuration cannot be run, or the folder holds another run.
        FedOBDError: the run failed; the message ends with Flower's log.
    """
    check_workers(workers)
    path = path.absolute()
    build_experiment(config)  # so that what cannot be run is said here, and not in Flower's log
    check_stack(config)
    if config.data.name == "nodes":
        raise UsageError("data 'nodes' lies on the nodes of a deployment; a simulation has none")
    folder = RunFolder(path)
    folder.start(config.to_dict(), resume=resume)
    planned = sum(stage.rounds for stage in config.chosen.stages())
    callback: Callback = Callbacks(callbacks)
    callback.on_run_begin(config, planned, path)
    if folder.is_finished:
        for record in folder.records():
            callback.on_round_end(record)
    else:
        log = RunLog()
        log.on_run_begin(config, planned, path)
        callback = Callbacks([log, callback])
        with tempfile.TemporaryDirectory(prefix="fedobd-flower-") as made:
            app = Path(made) / "app"
            write_app(app, config)
            with _super_link(Path(made)) as link:
                settings = {"output": str(path), "resume": True}
                clients = config.federation.clients
                link.start_run(app, settings, clients=clients, workers=workers)
                _follow(folder, link, callback)
    summary = read_summary(folder)
    callback.on_run_end(summary)
    return summary


def _follow(folder: RunFolder, link: _SuperLink, callback: Callback) -> None:
    """Show a run's rounds as they come, until Flower says that it has ended."""
    seen, looked, missed, status = 0, time.monotonic(), 0, "running"
    while True:
        records = folder.records()
        for record in records[seen:]:
            callback.on_round_end(record)
        seen = len(records)
        if status.startswith("finished"):
            break
        if folder.is_finished or time.monotonic() - looked > STATUS_SECONDS:
            try:
                status, missed = link.status(), 0
            except _NoAnswerError:
                missed += 1
                if missed == MOST_MISSED:
                    raise
            looked = time.monotonic()
        time.sleep(LOOK_SECONDS)
    if status != "finished:completed" or not folder.is_finished:
        raise FedOBDError(f"Flower ended the run as {status!r}; its log ends with:\n{link.log()}")


class _NoAnswerError(FedOBDError):
    """`flwr` has failed, or has not answered."""


class _SuperLink:
    """A SuperLink in simulation mode, and the `flwr` command that talks to it.

    Args:
        folder: where its files and logs lie.
        process: the SuperLink.
        env: the environment of the processes.
    """

    def __init__(
        self, folder: Path, process: subprocess.Popen[bytes], env: dict[str, str]
    ) -> None:
        self._folder = folder
        self._process = process
        self._env = env
        self._run = ""

    def start_run(
        self, app: Path, config: Mapping[str, Any], *, clients: int, workers: int
    ) -> None:
        """Have Flower run an app with so many clients, `workers` of them at a time."""
        federation = {"num-supernodes": clients, "client-resources-num-cpus": 1}
        if "RAY_ADDRESS" not in os.environ:
            federation["init-args-num-cpus"] = workers or os.cpu_count() or 1
        settings = self._folder / "run.toml"
        settings.write_text(tomli_w.dumps(dict(config)), encoding="utf-8")
        pairs = " ".join(f"{key}={value}" for key, value in federation.items())
        answer = self._flwr(
            "run", str(app), _CONNECTION, "--run-config", str(settings),
            "--federation-config", pairs, "--format", "json",
        )  # fmt: skip
        self._run = str(answer["run-id"])

    def status(self) -> str:
        """Return what Flower says of the run, such as `finished:completed`."""
        answer = self._flwr("list", _CONNECTION, "--run-id", self._run, "--format", "json")
        return str(answer["runs"][0]["status"])

    def log(self) -> str:
        """Return the end of the run's log."""
        return self._call("log", self._run, _CONNECTION, "--show")[-_LOG_TAIL:]

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        output = self._call(*arguments)
        try:
            answer = json.loads(output[output.index("{") :])
        except ValueError as error:
            raise _NoAnswerError(f"flwr {arguments[0]} answered {output!r}") from error
        assert isinstance(answer, dict)
        if not answer.get("success"):
            reason = answer.get("error-message", answer)
            raise _NoAnswerError(f"flwr {arguments[0]} failed: {reason}")
        return answer

    def _call(self, *arguments: str) -> str:
        if self._process.poll() is not None:
            raise FedOBDError(f"Flower's SuperLink has ended:\n{_tail(self._folder)}")
        try:
            done = subprocess.run(  # noqa: S603 - our own arguments
                [_command("flwr"), *arguments],
                env=self._env,
                capture_output=True,
                text=True,
                check=False,
                timeout=ANSWER_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise _NoAnswerError(
                f"flwr {arguments[0]} has not answered within {ANSWER_SECONDS:.0f} s"
            ) from error
        return done.stdout or done.stderr


@contextmanager
def _super_link(folder: Path) -> Iterator[_SuperLink]:
    """Start a SuperLink and stop it, with all that it has started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = folder / "home"
    home.mkdir()
    connection = {"address": f"127.0.0.1:{port}", "insecure": True}
    superlinks = {"superlink": {"default": _CONNECTION, _CONNECTION: connection}}
    (home / "config.toml").write_text(tomli_w.dumps(superlinks), encoding="utf-8")
    # Where `fedobd run` finds a user's modules, Flower's processes must as well.
    path = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, **_QUIET, "FLWR_HOME": str(home), "PYTHONPATH": path}
    for name in ("no_proxy", "NO_PROXY"):  # a proxy is for what lies outside
        env[name] = ",".join(filter(None, [env.get(name), "127.0.0.1", "localhost"]))
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    with (folder / "superlink.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 - our own arguments
            [
                _command("flower-superlink"), "--simulation", "--insecure",
                "--host", "127.0.0.1", "--port", str(port),
                "--disable-runtime-dependency-installation",
            ],
            env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    before = _on_signal(signal.SIGTERM, _leave)
    try:
        _wait_until_up(folder, process, port)
        yield _SuperLink(folder, process, env)
    finally:
        interrupt = _on_signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C changes nothing
        _stop(process)
        _on_signal(signal.SIGINT, interrupt)
        _on_signal(signal.SIGTERM, before)


def _on_signal(number: signal.Signals, handler: Any) -> Any:
    """Set what a signal does, where that can be set, and return what it did before."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(number, handler)


def _leave(number: int, _: object) -> NoReturn:
    """End this process so that what it has started is stopped."""
    raise SystemExit(128 + number)


def _wait_until_up(folder: Path, process: subprocess.Popen[bytes], port: int) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with direct.open(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise FedOBDError(
        f"Flower's SuperLink did not start within {START_SECONDS:.0f} s:\n{_tail(folder)}"
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and its descendants.

    They are looked for one by one: Ray and Flower's apps are in sessions of their own, so that no
    signal to a process group reaches them.
    """
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        family = [*parent.children(recursive=True), parent]
    process.terminate()
    _, alive = psutil.wait_procs(family, timeout=STOP_SECONDS)
    for member in alive:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def _command(name: str) -> str:
    """Return the path of a command of the same environment as this interpreter."""
    path = Path(sys.executable).parent / name
    if not path.is_file():
        raise FedOBDError(f"{name} is not installed; pip install 'fedobd[flower]'")
    return str(path)


def _tail(folder: Path) -> str:
    return (folder / "superlink.log").read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL:]
