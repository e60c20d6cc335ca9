"""The deployment that the tests share: one SuperLink with TLS and keys, three SuperNodes."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "deployment"
sys.path.insert(0, str(EXAMPLES))

from federation import Federation, FederationError, Scalar  # noqa: E402 - an example, not a package

from tests.deployment.hostile_client import FAULTS  # noqa: E402
from tests.deployment.scene import NUM_CLIENTS, Gate, processes_of  # noqa: E402


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Nodes with two sorts of extra configuration, which only the apps of these tests heed."""
    folder = tmp_path_factory.mktemp("deployment")
    gate = folder / "gate"
    gate.mkdir()
    nodes: list[dict[str, Scalar]] = [
        {"client-id": client, "gate": str(gate)} for client in range(NUM_CLIENTS)
    ]
    nodes[-1]["faults"] = " ".join(FAULTS)
    # what ends pytest must be its own interrupt, since a SystemExit would only fail one test
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Federation(folder / "federation", nodes=nodes) as federation:
            yield federation
    finally:
        signal.signal(signal.SIGTERM, before)
    assert processes_of(folder) == []


@pytest.fixture
def deployment(federation: Federation) -> Iterator[Federation]:
    """The shared deployment; a run that a failed test leaves behind would keep its nodes busy."""
    yield federation
    with contextlib.suppress(FederationError):
        federation.kill_server_app()


@pytest.fixture
def gate(deployment: Federation) -> Iterator[Gate]:
    gate = Gate(deployment.folder.parent / "gate")
    yield gate
    gate.clear()
