"""Starts a real Flower deployment on this machine, and stops everything that it started.

One SuperLink and several SuperNodes run as processes of their own, over TLS, with the nodes' keys
registered; apps are started with the ``flwr`` command, as a user would. Rules that it keeps:

- Every process runs in a session of its own and carries a mark in its environment, which its
  children inherit. Stopping looks for the mark in ``/proc`` (so: Linux), because the SuperLink
  puts ``flower-superexec`` into another session, which no signal to its own group reaches.
- Ctrl-C, SIGTERM and SIGHUP stop everything; only SIGKILL of this process leaves it running.
- Everything written (keys, certificates, logs, each process's ``FLWR_HOME``) lies in one folder.
- Nothing but loopback, or the given host, is contacted.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Self

from counting_proxy import CountingProxy, Traffic
from credentials import write_certificates, write_node_key

__all__ = ["REFUSED", "Federation", "FederationError", "Run", "Scalar", "Traffic"]

Scalar = str | int | float | bool

REFUSED = 305
"""Flower's exit code of a SuperNode that the SuperLink did not let in."""

_MARK = "FEDERATION_MEMBER"
_CONNECTION = "federation"
_STARTED = r"Uvicorn running on"
_ONLINE = r"SuperNode ID: \d+"
_START_TIMEOUT_S = 120.0
_STOP_GRACE_S = 5.0
_STOP_TIMEOUT_S = 30.0
_RETRY_DELAY_S = 5.0
_TAIL_CHARACTERS = 3000


class FederationError(RuntimeError):
    """The deployment did something else than was asked of it."""


@dataclass(frozen=True, slots=True)
class Run:
    """What Flower says of a run; the traffic is its own count, without HTTP headers and TLS."""

    run_id: int
    status: str
    details: str
    elapsed_s: float
    traffic: Traffic

    @property
    def completed(self) -> bool:
        """Whether the run has ended well."""
        return self.status == "finished:completed"


@dataclass(eq=False)
class Federation:
    """A SuperLink and its SuperNodes, running for the length of a ``with`` block.

    Args:
        folder: Where keys, certificates and logs (``superlink.log``, ``node-0.log``) are written.
        nodes: The node configuration of each SuperNode.
        tls: Whether the SuperLink's connections are encrypted.
        authenticate: Whether the SuperLink admits only registered keys; needs ``tls``.
        node_prefix: Put before the command of each SuperNode, such as ``ip netns exec ns1``.
        link_prefix: Put before the commands of the SuperLink and of ``flwr``.
        host: The address that the SuperLink listens on.
        proxy_host: The address that the counting proxy listens on, in this process: ``host``
            unless a ``link_prefix`` moves the SuperLink away from it.
        count_bytes: Whether the SuperNodes connect through the counting proxy.

    Example:
        with Federation(folder, nodes=[{"partition-id": 0, "num-partitions": 1}]) as federation:
            run = federation.run(app, {"num-server-rounds": 2}, timeout_s=120)
    """

    folder: Path
    _: KW_ONLY
    nodes: Sequence[Mapping[str, Scalar]]
    tls: bool = True
    authenticate: bool = True
    node_prefix: Sequence[str] = ()
    link_prefix: Sequence[str] = ()
    host: str = "127.0.0.1"
    proxy_host: str | None = None
    count_bytes: bool = True

    def __post_init__(self) -> None:
        if self.authenticate and not self.tls:
            raise ValueError("authenticate=True needs tls=True: Flower refuses keys without TLS")
        self.folder = self.folder.resolve()
        self._configs = list(self.nodes)
        self._proxy_host = self.proxy_host or self.host
        self._hosts = sorted({"localhost", "127.0.0.1", self.host, self._proxy_host})
        self._mark = f"{_MARK}={uuid.uuid4().hex}/"
        self._processes: list[_Process] = []
        self._nodes: list[_Process] = []
        self._proxy: CountingProxy | None = None
        self._signals: list[signal.Signals] = []

    def __enter__(self) -> Self:
        if _in_main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is signal.SIG_DFL:
                    signal.signal(number, _leave)
                    self._signals.append(number)
        try:
            self._start()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def run(
        self, app: Path, config: Mapping[str, Scalar] | None = None, *, timeout_s: float
    ) -> Run:
        """Runs the Flower app in the folder ``app`` and waits for its end, good or bad."""
        return self.wait(self.start_run(app, config), timeout_s=timeout_s)

    def start_run(self, app: Path, config: Mapping[str, Scalar] | None = None) -> int:
        """Starts the app, with ``config`` over its own run configuration; returns the run's id."""
        overrides = _write_toml(self.folder / "run-config.toml", config or {})
        command = ["run", str(app.resolve()), _CONNECTION]
        return int(self._ask(*command, *(["-c", str(overrides)] if config else []))["run-id"])

    def wait(self, run_id: int, *, timeout_s: float) -> Run:
        """Waits until the run has ended, good or bad.

        Raises:
            FederationError: The run has not ended within ``timeout_s`` seconds.
        """
        deadline = time.monotonic() + timeout_s
        while not (run := self.describe(run_id)).status.startswith("finished"):
            if time.monotonic() > deadline:
                raise FederationError(
                    f"run {run_id}: wanted its end within {timeout_s:g} s, "
                    f"but it is {run.status!r}; log of the SuperLink:\n{self._link.tail()}"
                )
            # Each look costs a second of processor time, so look when a ServerApp has ended.
            running, look = self._server_apps(), min(deadline, time.monotonic() + 30)
            time.sleep(0.5)
            while running and self._server_apps() == running and time.monotonic() < look:
                time.sleep(0.2)
        return run

    def describe(self, run_id: int) -> Run:
        """Returns what Flower says of the run now."""
        (answer,) = self._ask("list", _CONNECTION, "--run-id", str(run_id))["runs"]
        traffic = answer["network-traffic"]
        return Run(
            run_id=run_id,
            status=answer["status"],
            details=answer["status-details"],
            elapsed_s=float(answer["elapsed"]),
            traffic=Traffic(traffic["inbound-bytes"], traffic["outbound-bytes"]),
        )

    def traffic(self, run_id: int) -> Traffic:
        """Returns Flower's own count of the run's message bytes, over all nodes."""
        return self.describe(run_id).traffic

    def log(self, run_id: int) -> str:
        """Returns what the run's ServerApp has logged so far."""
        return self._flwr("log", str(run_id), _CONNECTION, "--show")

    def socket_bytes(self) -> Traffic:
        """Returns the bytes that crossed the nodes' sockets, HTTP and TLS included."""
        return self._counting_proxy().traffic

    def reset_socket_bytes(self) -> None:
        """Starts the count of ``socket_bytes`` again at zero."""
        self._counting_proxy().reset()

    def add_node(self, config: Mapping[str, Scalar], *, registered: bool = True) -> int:
        """Starts one more SuperNode and returns its index.

        Waits until a registered node is online; of one whose key is not registered, ``exit_code``
        tells how it was refused.
        """
        i = len(self._configs)
        self._configs.append(config)
        self._prepare_node(i, registered=registered)
        self._nodes.append(self._launch_node(i))
        if registered:
            self._nodes[i].expect(_ONLINE, _START_TIMEOUT_S)
        return i

    def kill_node(self, i: int) -> None:
        """Kills SuperNode ``i`` and its children with SIGKILL."""
        self._end(self._nodes[i].mark, grace_s=0)

    def start_node(self, i: int, *, timeout_s: float = 180.0) -> None:
        """Starts SuperNode ``i`` again with its own key, and waits until it is online.

        The SuperLink refuses a node that was killed until its old session has expired, about a
        minute later, so this tries again until then. What it had not answered may stay unanswered,
        without an error: Flower notices a lost node only if the ServerApp asks while it is away.
        """
        if self._nodes[i].popen.poll() is None:
            raise FederationError(f"node {i}: wanted it stopped before a start, but it runs")
        deadline = time.monotonic() + timeout_s
        while True:
            self._nodes[i] = self._launch_node(i)
            try:
                return self._nodes[i].expect(_ONLINE, deadline - time.monotonic())
            except FederationError:
                if self._nodes[i].exit_code() != REFUSED or time.monotonic() > deadline:
                    raise
            time.sleep(_RETRY_DELAY_S)

    def exit_code(self, i: int, *, timeout_s: float = 60.0) -> int:
        """Waits for the end of SuperNode ``i`` and returns the exit code that Flower logged.

        Flower's own codes (such as ``REFUSED``) are only in its log: the process ends with 1.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._nodes[i].popen.wait(timeout_s)
        if (code := self._nodes[i].exit_code()) is None:
            raise FederationError(
                f"node {i}: wanted its end within {timeout_s:g} s, but it runs; "
                f"its log:\n{self._nodes[i].tail()}"
            )
        return code

    def kill_server_app(self) -> None:
        """Kills the running ServerApp's process with SIGKILL."""
        if not (pids := self._server_apps()):
            raise FederationError("wanted a running flwr-serverapp, but there is none")
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        port = _free_port("127.0.0.1" if self.link_prefix else self.host)
        self._superlink_address = self._node_target = f"{self.host}:{port}"
        if self.tls:
            write_certificates(self.folder, self._hosts)
        self._link = self._launch_link(port)
        self._link.expect(_STARTED, _START_TIMEOUT_S)
        if self.count_bytes:
            self._proxy = CountingProxy(self._proxy_host, (self.host, port))
            self._node_target = f"{self._proxy_host}:{self._proxy.server_address[1]}"
        everyone = range(len(self._configs))
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._prepare_node, everyone))
        self._nodes = [self._launch_node(i) for i in everyone]
        for node in self._nodes:
            node.expect(_ONLINE, _START_TIMEOUT_S)

    def _launch_link(self, port: int) -> _Process:
        trust = "insecure = true"
        options = ["--insecure"]
        if self.tls:
            trust = f"root-certificates = {json.dumps(str(self.folder / 'ca.crt'))}"
            options = ["--ssl-ca-certfile", "ca.crt"]
            options += ["--ssl-certfile", "server.crt", "--ssl-keyfile", "server.key"]
        if self.authenticate:
            options.append("--enable-supernode-auth")
        address = json.dumps(self._superlink_address)
        Path(self._environment("flwr")["FLWR_HOME"], "config.toml").write_text(
            f'[superlink]\ndefault = "{_CONNECTION}"\n'
            f"[superlink.{_CONNECTION}]\naddress = {address}\n{trust}\n"
        )
        options += ["--disable-runtime-dependency-installation", "--port", str(port)]
        command = ["flower-superlink", "--host", self.host, *options]
        return self._spawn("superlink", command, self.link_prefix)

    def _prepare_node(self, i: int, *, registered: bool = True) -> None:
        """Writes a node's configuration and key, and registers the key."""
        _write_toml(self.folder / f"node-{i}.toml", self._configs[i])
        if self.authenticate:
            public_key = write_node_key(self.folder / f"node-{i}.key")
            if registered:
                self._ask("supernode", "register", str(public_key), _CONNECTION)

    def _launch_node(self, i: int) -> _Process:
        command = ["flower-supernode", "--superlink", self._node_target]
        command += ["--port", str(_free_port("127.0.0.1")), "--node-config", f"node-{i}.toml"]
        command += ["--root-certificates", "ca.crt"] if self.tls else ["--insecure"]
        if self.authenticate:
            command += ["--auth-supernode-private-key", f"node-{i}.key"]
        return self._spawn(f"node-{i}", command, self.node_prefix)

    def _flwr(self, *arguments: str) -> str:
        """Runs a ``flwr`` command and returns what it wrote."""
        try:
            done = subprocess.run(  # noqa: S603
                [*self.link_prefix, "flwr", *arguments],
                env=self._environment("flwr"),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_START_TIMEOUT_S,
                check=False,
                start_new_session=True,
                text=True,
            )
        except subprocess.TimeoutExpired as error:
            raise FederationError(str(error)) from error
        if done.returncode != 0:
            raise FederationError(
                f"flwr {' '.join(arguments)}: wanted exit code 0, got {done.returncode}:\n"
                f"{done.stdout}{done.stderr}"
            )
        return done.stdout

    def _ask(self, *arguments: str) -> Any:
        """Runs a ``flwr`` command and returns the JSON object that it answers."""
        output = self._flwr(*arguments, "--format", "json")
        answer = json.loads(output)
        if not answer["success"]:
            raise FederationError(f"flwr {' '.join(arguments)}: wanted success, got:\n{output}")
        return answer

    def _spawn(self, member: str, command: Sequence[str], prefix: Sequence[str]) -> _Process:
        """Starts a process in a session of its own, with the mark and a log file."""
        path = self.folder / f"{member}.log"
        with path.open("ab") as log:
            popen = subprocess.Popen(  # noqa: S603
                [*prefix, *command],
                cwd=self.folder,
                env=self._environment(member),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            process = _Process(popen, f"{self._mark}{member}/", path, log.tell())
            self._processes.append(process)
        return process

    def _environment(self, member: str) -> dict[str, str]:
        home = self.folder / "home" / member
        home.mkdir(parents=True, exist_ok=True)
        binaries = str(Path(sys.executable).parent)
        return os.environ | {
            _MARK: f"{self._mark}{member}/".removeprefix(f"{_MARK}="),
            "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": ",".join(self._hosts),
            "no_proxy": ",".join(self._hosts),
        }

    def _server_apps(self) -> list[int]:
        return _marked(f"{self._mark}superlink/", "flwr-serverapp")

    def _counting_proxy(self) -> CountingProxy:
        if self._proxy is None:
            raise FederationError("wanted the bytes on the sockets, but count_bytes is False")
        return self._proxy

    def _end(self, mark: str, *, grace_s: float) -> None:
        """Ends every process that carries ``mark``: SIGTERM, then SIGKILL after ``grace_s``."""
        start = time.monotonic()
        asked: set[int] = set()
        while left := _marked(mark):
            spent_s = time.monotonic() - start
            if spent_s > grace_s + _STOP_TIMEOUT_S:
                raise FederationError(f"wanted the processes {left} ended, but SIGKILL did not")
            for pid in left:
                if spent_s >= grace_s or pid not in asked:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL if spent_s >= grace_s else signal.SIGTERM)
                    asked.add(pid)
            time.sleep(0.05)
        for process in self._processes:
            if process.mark.startswith(mark):
                process.popen.wait()

    def _close(self) -> None:
        """Ends everything; another Ctrl-C meanwhile is ignored, so that nothing is left."""
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN) if _in_main_thread() else None
        for number in self._signals:
            signal.signal(number, signal.SIG_IGN)
        try:
            self._end(self._mark, grace_s=_STOP_GRACE_S)
            if self._proxy is not None:
                self._proxy.close()
        finally:
            for number in self._signals:
                signal.signal(number, signal.SIG_DFL)
            if interrupt is not None:
                signal.signal(signal.SIGINT, interrupt)


@dataclass(frozen=True, slots=True)
class _Process:
    """A process that was started, and the part of its log file that is its own."""

    popen: subprocess.Popen[bytes]
    mark: str
    log: Path
    log_start: int

    def text(self) -> str:
        return self.log.read_bytes()[self.log_start :].decode(errors="replace")

    def tail(self) -> str:
        return self.text()[-_TAIL_CHARACTERS:]

    def exit_code(self) -> int | None:
        """The exit code that Flower logged, else the process's own; None while it runs."""
        code = self.popen.poll()
        logged = re.findall(r"Exit Code: (\d+)", self.text())
        return int(logged[-1]) if code is not None and logged else code

    def expect(self, pattern: str, timeout_s: float) -> None:
        """Waits until the log matches ``pattern``."""
        deadline = time.monotonic() + timeout_s
        while True:
            code = self.exit_code()
            if re.search(pattern, self.text()):
                return
            if code is not None or time.monotonic() > deadline:
                state = f"still runs after {timeout_s:.0f} s" if code is None else f"ended: {code}"
                raise FederationError(
                    f"{self.log.stem}: wanted {pattern!r} in its log, but it {state}; "
                    f"its log:\n{self.tail()}"
                )
            time.sleep(0.1)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _marked(mark: str, program: str = "") -> list[int]:
    """Ids of the live processes whose environment holds ``mark`` and whose command ``program``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if (
                    mark.encode() in (entry / "environ").read_bytes()
                    and program.encode() in (entry / "cmdline").read_bytes()
                ):
                    found.append(int(entry.name))
    return found


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Turns a signal that would end this process at once into an exception."""
    raise SystemExit(128 + number)


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as server:
        return int(server.getsockname()[1])


def _write_toml(path: Path, values: Mapping[str, Scalar]) -> Path:
    """Writes a flat table; JSON's strings, numbers and booleans are TOML's too."""
    lines = (f"{json.dumps(key)} = {json.dumps(value)}\n" for key, value in values.items())
    path.write_text("".join(lines))
    return path
