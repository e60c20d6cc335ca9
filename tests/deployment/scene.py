"""What the tests of the deployment share: apps, the gate that holds clients, a replay."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fedobd import ModelState, ServerSession
from fedobd.experiments import RunConfig, RunFolder, build_experiment, load_config
from fedobd.flower import write_app

HERE = Path(__file__).parent
PACKAGE = "fedobd_app"

NUM_CLIENTS = 3

START_TIMEOUT_S = 180.0
"""For a run to start and reach a place; on a busy machine a message takes half a minute."""

RUN_TIMEOUT_S = 420.0

Record = dict[str, Any]


def digits(*overrides: str, method: str = "fedobd") -> RunConfig:
    """Return the digits preset for the three clients, all payloads kept."""
    changes = [f"federation.clients={NUM_CLIENTS}", "output.keep_payloads=true"]
    config = load_config("digits", overrides=[*changes, *overrides])
    return config.for_method(method, seed=0)


def rounds(stage_one: int, stage_two: int, *, cohort: int = NUM_CLIENTS) -> list[str]:
    """Return the overrides for so many rounds of FedOBD, one epoch each."""
    values = {
        "cohort": cohort,
        "stage_one_rounds": stage_one,
        "stage_one_epochs": 1,
        "stage_two_epochs": stage_two,
    }
    return [f"methods.fedobd.{key}={value}" for key, value in values.items()]


def make_app(
    folder: Path, config: RunConfig, *, client: str | None = None, modules: Sequence[str] = ()
) -> Path:
    """Write an app with modules of this folder in it, one of them in place of the client."""
    write_app(folder, config)
    if client is not None:
        shutil.copy(HERE / client, folder / PACKAGE / "client_app.py")
    for module in modules:
        shutil.copy(HERE / module, folder / PACKAGE / module)
    return folder


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"wanted {what} within {timeout_s:.0f} s"
        time.sleep(0.1)


def wait_for_record(output: Path, number: int, timeout_s: float) -> None:
    """Wait until a round has ended."""
    folder = RunFolder(output)
    wait_for(lambda: len(folder.records()) >= number, f"the end of round {number}", timeout_s)


class Gate:
    """Holds clients of an app with `gated_client.py` before they train."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def hold(self, client: int, number: int) -> None:
        """Have a client wait in a round."""
        (self._folder / f"hold-{client}-{number}").touch()

    def wait(self, client: int, number: int, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until a client waits in a round."""
        place = self._folder / f"waits-{client}-{number}"
        wait_for(place.exists, f"client {client} in round {number}", timeout_s)

    def clear(self) -> None:
        """Let everyone go on."""
        for file in self._folder.iterdir():
            file.unlink()


def read_records(output: Path) -> list[Record]:
    """Return a run's records without what depends on the clock."""
    return [
        {key: value for key, value in record.items() if key != "seconds"}
        for record in RunFolder(output).records()
    ]


def uploaders(record: Record) -> list[int]:
    """Return the clients whose uploads were accepted."""
    return sorted(client["client"] for client in record["clients"])


def assert_is_replay(config: RunConfig, output: Path) -> None:
    """Check a run's model against a session that is fed nothing but the accepted uploads."""
    experiment = build_experiment(config)
    server = ServerSession(
        experiment.method,
        experiment.schema,
        experiment.initial,
        num_clients=config.federation.clients,
        seed=config.federation.seed,
    )
    for record in RunFolder(output).records():
        plan = server.begin_round(record["cohort"])
        assert plan is not None
        assert list(plan.cohort) == record["cohort"]
        payloads = output / "payloads" / f"round-{plan.round:04d}"
        assert server.broadcast().data == (payloads / "broadcast.fobd").read_bytes()
        for client in reversed(uploaders(record)):
            server.receive(client, (payloads / f"upload-{client}.fobd").read_bytes())
        server.end_round()
    assert server.is_finished
    assert_same_state(load_file(output / "model.safetensors"), server.state)


def assert_same_state(one: ModelState, other: ModelState) -> None:
    """Check that two states are equal, bit for bit."""
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert torch.equal(values.reshape(-1).view(torch.uint8), _bits(other[name])), name


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().reshape(-1).view(torch.uint8)


def processes_of(folder: Path) -> list[str]:
    """Return the live processes that were started to work in a folder, by number and command."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if str(folder).encode() in (entry / "environ").read_bytes():
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found.append(f"{entry.name}: {command}")
    return found
