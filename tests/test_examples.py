"""The examples run, and show what they say they show."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"

ROUND = re.compile(
    r"round +(\d+) stage (\d): +(?:\d clients, +)?([\d,]+) bytes up, +([\d,]+) down, \w+ (\d\.\d+)"
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are tiny
    yield
    torch.set_num_threads(before)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rounds_in(text: str) -> list[tuple[int, int, int, int, float]]:
    """Return round, stage, bytes up, bytes down and figure of each line of a round."""
    return [
        (int(n), int(s), int(up.replace(",", "")), int(down.replace(",", "")), float(figure))
        for n, s, up, down, figure in ROUND.findall(text)
    ]


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.stem)
def test_an_example_says_how_to_run_it(file: Path) -> None:
    doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    assert f"    python examples/{file.name}\n" in doc
    assert "\nIt prints" in doc
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 130


def test_own_training_loop(capsys: pytest.CaptureFixture[str]) -> None:
    load("own_training_loop").main()
    shown = capsys.readouterr().out
    rounds = rounds_in(shown)
    assert [(number, stage) for number, stage, *_ in rounds] == [
        *((number, 1) for number in range(1, 9)), *((number, 2) for number in range(9, 13))
    ]  # fmt: skip
    (before,) = re.findall(r"error before: (\d\.\d+)", shown)
    after, total = re.findall(r"error after: (\d\.\d+), ([\d,]+) bytes in all", shown)[0]
    assert float(after) < 0.3 * float(before)
    assert int(total.replace(",", "")) == sum(up + down for _, _, up, down, _ in rounds)


def test_lora_language_model(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    example = load("lora_language_model")
    example.main()
    shown = capsys.readouterr().out
    rounds = rounds_in(shown)
    assert [stage for _, stage, *_ in rounds] == [1, 1, 1, 1, 2, 2, 2]
    frozen, trained = (
        int(count.replace(",", ""))
        for count in re.findall(r"([\d,]+) parameters are frozen, ([\d,]+) are trained", shown)[0]
    )
    assert frozen > 20 * trained
    for number, stage, up, down, _ in rounds:  # adapters alone travel, in less than float32
        clients = 2 if stage == 1 else 4
        assert up < 4 * trained * clients
        assert down < 4 * trained * clients
        assert down > 16 * clients or number > 1
    (before,) = re.findall(r"before: loss (\d\.\d+)", shown)
    assert rounds[-1][-1] < 0.6 * float(before)


def results_of(name: str, capsys: pytest.CaptureFixture[str]) -> tuple[float, list[int]]:
    """Play a Flower app in this process and return its accuracy and bytes up, a client."""
    from flwr.app import Context, RecordDict

    from tests.flower_grid import InProcessGrid

    app = load(name)
    nodes = [{"partition-id": number} for number in range(app.NUM_NODES)]
    grid = InProcessGrid(app.client_app, nodes)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    app.server_app(grid, context)
    shown = capsys.readouterr().out
    up = [int(count.replace(",", "")) for count in re.findall(r", ([\d,]+) up", shown)]
    assert app.NUM_NODES * sum(up) < grid.bytes_up  # what is counted did travel, and more around
    assert len(up) == app.NUM_ROUNDS
    (accuracy,) = re.findall(r"accuracy (\d\.\d+)", shown)
    return float(accuracy), up


def test_flower_before_and_after(capsys: pytest.CaptureFixture[str]) -> None:
    accuracy_before, before = results_of("flower_before", capsys)
    accuracy_after, after = results_of("flower_after", capsys)
    assert all(count > 4 * 19_204 for count in before)  # whole models in float32
    assert all(20 * small < large for small, large in zip(after, before, strict=True))
    assert accuracy_before > 0.85
    assert accuracy_after > accuracy_before - 0.05


@pytest.mark.deployment
@pytest.mark.parametrize("name", ["flower_before", "flower_after"])
def test_the_flower_apps_run_in_flowers_simulation(name: str, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        cwd=tmp_path,
        env={**os.environ, **quiet, "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^round (\d)", done.stdout, re.M) == list("123456")
