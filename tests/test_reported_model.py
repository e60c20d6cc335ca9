"""Which model the reported figures are of: the server's W, or Ŵ, which clients hold.

A linear model is moved by steps that are written down here, so that W, Ŵ and the accuracy of each
are known without a run: example i has a 1 at place i and belongs to class 1, so that the accuracy
is the share of weights above 0. Broadcasts have one level: offset 0 and range 8 give -8, 0 and 8,
and a weight of 1 is 0 in Ŵ.

    round   W after it                  right   Ŵ of it                     right
    0       -8 8 0 0 0 0 0 0            1/8     -8 8 0 0 0 0 0 0            1/8
    1       -8 8 1 1 1 1 0 5            6/8     -8 8 0 0 0 0 0 8            2/8
    2       -8 8 1 1 1 1 1 5            7/8     -8 8 0 0 0 0 0 8            2/8
    3       -8 8 0 0 0 1 1 1            4/8     -8 8 0 0 0 0 0 0            1/8
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fedobd import RoundPlan
from fedobd.data import ClientData, Examples, FederatedData
from fedobd.experiments import RunConfig, Summary, run
from fedobd.training import LocalResult
from tests.toy import config

START = [-8.0, 8.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
STEPS = [
    [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 5.0],
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0],
    [0.0, 0.0, -1.0, -1.0, -1.0, 0.0, 0.0, -4.0],
]
LAST = [-8.0, 8.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
"""W after the last round."""


def make_model() -> nn.Module:
    model = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([START]))
    return model


def make_data(num_clients: int, seed: int) -> FederatedData:
    examples = Examples(torch.eye(8), torch.ones(8))
    return FederatedData((ClientData(examples, examples),) * num_clients, examples)


def make_ordered_data(num_clients: int, seed: int) -> FederatedData:
    """A test set whose first half is of example 0, which is never right, the rest of example 1."""
    data = make_data(num_clients, seed)
    inputs = torch.eye(8)[torch.tensor([0, 1]).repeat_interleave(100)]
    return FederatedData(data.clients, Examples(inputs, torch.ones(200)))


def walk(model: nn.Module, data: ClientData, plan: RoundPlan, seed: int) -> LocalResult:
    """Move every client by the round's step; differences and their mean are exact."""
    with torch.no_grad():
        next(model.parameters()).add_(torch.tensor([STEPS[plan.round - 1]]))
    return LocalResult(len(data.train), 1.0)


def walking(**changes: Any) -> RunConfig:
    codec = {"uplink_quantizer": "none", "downlink_weight": 1e3, "selection": "none"}
    rounds = {"stage_one_rounds": 3, "stage_one_epochs": 1, "stage_two_epochs": 0, "cohort": 2}
    sections: dict[str, Any] = {
        "data": {"name": f"{__name__}:make_data"},
        "model": {"name": f"{__name__}:make_model"},
        "training": {"function": f"{__name__}:walk", "loss": "binary-cross-entropy"},
        "methods": {"fedobd": {**rounds, "codec": codec}},
    }
    return config(**{**sections, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("walk") / "run"
    run(walking(), path)
    return path


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def summary_of(folder: Path) -> Summary:
    return Summary(**json.loads((folder / "summary.json").read_text()))


def test_the_final_metric_is_of_w_and_the_broadcasts_of_what_clients_hold(folder: Path) -> None:
    summary = summary_of(folder)
    assert summary.final_metric == 4 / 8
    assert summary.broadcast_metric == 1 / 8
    assert summary.best_metric == 7 / 8


def test_the_test_metric_of_a_round_is_of_w_after_it(folder: Path) -> None:
    assert [record["test_metric"] for record in records(folder)] == [6 / 8, 7 / 8, 4 / 8]


def test_clients_validate_what_they_received_before_they_train_on_it(folder: Path) -> None:
    assert [record["validation_metric"] for record in records(folder)] == [1 / 8, 2 / 8, 2 / 8]


def test_the_model_of_the_folder_is_w(folder: Path) -> None:
    assert load_file(folder / "model.safetensors")["weight"].tolist() == [LAST]


def test_between_rounds_a_part_is_tested_and_in_the_end_all_examples(tmp_path: Path) -> None:
    summary = run(walking(output={"evaluate_examples": 3}), tmp_path / "run")
    assert (summary.final_metric, summary.broadcast_metric) == (4 / 8, 1 / 8)
    for record in records(tmp_path / "run"):
        assert 3 * record["test_metric"] == pytest.approx(round(3 * record["test_metric"]))


def test_the_part_that_is_tested_is_drawn_from_all_of_the_test_set(tmp_path: Path) -> None:
    data = {"name": f"{__name__}:make_ordered_data"}
    run(walking(data=data, output={"evaluate_examples": 100}), tmp_path / "run")
    metrics = {record["test_metric"] for record in records(tmp_path / "run")}
    (metric,) = metrics  # the same part in each round
    assert metric == pytest.approx(0.5, abs=0.2)  # 5 standard deviations
    run(walking(data=data, output={"evaluate_examples": 200}), tmp_path / "whole")
    assert {record["test_metric"] for record in records(tmp_path / "whole")} == {0.5}


def test_rounds_are_tested_every_so_often_and_the_last_model_always(tmp_path: Path) -> None:
    summary = run(walking(output={"evaluate_every": 2}), tmp_path / "run")
    tested = [record["test_metric"] for record in records(tmp_path / "run")]
    assert tested == [None, 7 / 8, None]
    assert (summary.final_metric, summary.best_metric) == (4 / 8, 7 / 8)
    summary = run(walking(output={"evaluate_every": 4}), tmp_path / "once")
    assert (summary.final_metric, summary.best_metric) == (4 / 8, 4 / 8)
