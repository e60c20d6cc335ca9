"""The demonstration: what it prints, and that it leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedobd.experiments import RunFolder, read_summary
from tests.deployment.conftest import EXAMPLES
from tests.deployment.scene import processes_of
from tests.helpers import heed_ctrl_c

pytestmark = pytest.mark.deployment

TIMEOUT_S = 480
INTERRUPTED = 130


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(EXAMPLES / "demo.py"), "--folder", str(folder)],
        env={**os.environ, "COLUMNS": "100"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=heed_ctrl_c,
    )


def row(output: str, name: str) -> tuple[int, int]:
    """Return bytes up and down of a row of the table."""
    (line,) = (line for line in output.splitlines() if name in line)
    up, down, both, _ = (int(found.replace(",", "")) for found in re.findall(r"[\d,]*\d", line))
    assert up + down == both
    return up, down


def test_the_demonstration_counts_traffic_three_ways(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    with start(folder) as demo:
        output, _ = demo.communicate(timeout=TIMEOUT_S)

    print(output)
    assert demo.returncode == 0, output
    summary = read_summary(RunFolder(folder / "run"))
    assert summary.rounds == 5
    assert summary.final_metric is not None
    assert f"Accuracy on the test set: {summary.final_metric:.1%}" in output
    assert summary.final_metric > 0.9
    payloads, flower, sockets = (
        row(output, name) for name in ("payloads, by", "Flower's network", "sockets, by")
    )
    around, transport, idle = (
        row(output, name) for name in ("around the payloads", "HTTP, TLS", "idle polling")
    )
    assert payloads == (summary.uplink_bytes, summary.downlink_bytes)
    for way in (0, 1):
        assert payloads[way] + around[way] == flower[way]
        assert flower[way] + transport[way] == sockets[way]
        assert 0 < around[way] < 100_000
        assert 0 < idle[way] < transport[way]
    assert processes_of(folder) == []


def test_an_interrupted_demonstration_stops_what_it_started(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    with start(folder) as demo:
        deadline = time.monotonic() + 240
        while not (folder / "run" / "config.toml").exists():
            assert demo.poll() is None, demo.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert len(processes_of(folder)) > 4  # SuperLink, SuperNodes, ServerApp
        demo.send_signal(signal.SIGINT)
        output, _ = demo.communicate(timeout=120)

    assert demo.returncode == INTERRUPTED, output
    assert "Interrupted; everything that was started has been stopped." in output
    assert processes_of(folder) == []
