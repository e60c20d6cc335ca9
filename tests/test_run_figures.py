"""The figures of a run: of which model they are, W or Ŵ, and what its record and summary count.

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

from fedobd import (
    BlockTraffic,
    ByteCount,
    EmptyRoundError,
    Report,
    RoundPlan,
    RoundRecord,
    ServerSession,
    UploadRecord,
)
from fedobd._seeds import derive_seed
from fedobd.data import ClientData, Examples, FederatedData
from fedobd.experiments import Experiment, RunConfig, Summary, make_record, run
from fedobd.sessions import sample_cohort
from fedobd.simulation import RoundResult, open_pool, simulate
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
    """Clients train on all examples, and validate on 0, 1, 2 and 7."""
    examples = Examples(torch.eye(8), torch.ones(8))
    validation = Examples(torch.eye(8)[[0, 1, 2, 7]], torch.ones(4))
    return FederatedData((ClientData(examples, validation),) * num_clients, examples)


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


def walk_or_run_away(
    model: nn.Module, data: ClientData, plan: RoundPlan, seed: int
) -> LocalResult:
    """Do the same, but send a client beyond the legal range, in round 1 two of them."""
    result = walk(model, data, plan, seed)
    for client in ((0, 1), (2,), ())[plan.round - 1]:
        if seed == derive_seed(1, "train", plan.round, client):
            with torch.no_grad():
                next(model.parameters()).fill_(1e9)
    return result


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
    """Of their four examples W has 1, 3 and 3 right before the rounds, Ŵ 1, 2 and 2."""
    played = records(folder)
    assert [record["validation_metric"] for record in played] == [1 / 4, 2 / 4, 2 / 4]
    for client in played[0]["clients"]:
        assert (client["num_examples"], client["num_validation_examples"]) == (8, 4)


def test_the_cohorts_are_those_of_the_runs_seed(folder: Path) -> None:
    cohorts = [tuple(record["cohort"]) for record in records(folder)]
    assert cohorts == [sample_cohort(2, 4, 1, number) for number in (1, 2, 3)]
    assert cohorts != [sample_cohort(2, 4, 0, number) for number in (1, 2, 3)]


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


def test_the_test_loss_of_a_round_is_of_w_after_it(folder: Path) -> None:
    weights, wanted = torch.tensor(START), []
    for step in STEPS:
        weights = weights + torch.tensor(step)
        wanted.append(float(torch.log1p(torch.exp(-weights)).mean()))  # of class 1
    assert [record["test_loss"] for record in records(folder)] == pytest.approx(wanted)


def test_totals_and_nominal_bits_are_those_of_all_payloads(folder: Path) -> None:
    """Two clients a round; 8 values of 2 bits go down, of one level, and 8 of 32 bits up."""
    summary = summary_of(folder)
    assert summary.downlink_nominal_bits == 3 * 2 * 8 * 2
    assert summary.uplink_nominal_bits == 3 * 2 * 8 * 32
    played = records(folder)
    assert summary.uplink_bytes == sum(record["uplink_bytes"] for record in played)
    assert summary.downlink_bytes == sum(record["downlink_bytes"] for record in played)
    assert summary.total_bytes == summary.uplink_bytes + summary.downlink_bytes
    assert summary.delivery_bytes % 4 == 0  # one to each of four clients
    size = summary.delivery_bytes / 4
    assert size == pytest.approx(summary.downlink_bytes / 6, abs=8)  # as large as a broadcast


def test_refused_uploads_are_counted_and_their_broadcasts_too(tmp_path: Path) -> None:
    """The first broadcast is a fingerprint, nothing but header; four clients got each."""
    changed = walking(
        federation={"shared_start": True},
        training={
            "function": f"{__name__}:walk_or_run_away",
            "loss": "binary-cross-entropy",
        },
        methods={
            "fedobd": {
                "stage_one_rounds": 3,
                "stage_one_epochs": 1,
                "stage_two_epochs": 0,
                "cohort": 4,
                "codec": {"uplink_quantizer": "none", "selection": "none"},
            }
        },
    )
    summary = run(changed, tmp_path / "run")
    played = records(tmp_path / "run")
    assert [len(record["clients"]) for record in played] == [2, 3, 4]
    assert summary.refusals == 3
    for record in played:
        assert record["downlink_nominal_bits"] == 4 * record["broadcast"]["nominal_bits"]
    sizes = [record["broadcast"] for record in played]
    assert sizes[0]["levels"] == 0 < sizes[1]["levels"]
    for part, share in summary.shares["downlink"].items():
        wanted = sum(size[part] for size in sizes) / (summary.downlink_bytes / 4)
        assert share == pytest.approx(wanted), part


def test_uploads_of_more_examples_than_are_allowed_are_refused(tmp_path: Path) -> None:
    assert run(walking(federation={"max_examples": 8}), tmp_path / "run").refusals == 0
    with pytest.raises(EmptyRoundError, match="allowed are 1 to 7"):
        run(walking(federation={"max_examples": 7}), tmp_path / "none")


@pytest.mark.parametrize("source", ["off", "validation", "test"])
def test_a_run_says_whether_the_test_set_decided_when_to_stop(source: str, tmp_path: Path) -> None:
    codec = {"uplink_quantizer": "none", "downlink_weight": 1e3, "selection": "none"}
    stages = {"stage_one_rounds": 3, "stage_one_epochs": 1, "stage_two_epochs": 0, "cohort": 2}
    stop = {"source": source, "patience": 1}
    methods = {"fedobd": {**stages, "codec": codec, "stop": stop}}
    summary = run(walking(methods=methods), tmp_path / "run")
    assert summary.stops_on_test is (source == "test")


class Elsewhere:
    """An engine of one's own, whose clients may overlap."""

    def __call__(self, experiment: Experiment, server: ServerSession, **options: Any) -> Any:
        with open_pool(experiment.setup) as pool:
            yield from simulate(server, pool, evaluate=experiment.evaluate_part, **options)


def test_the_overhead_is_the_cores_share_where_clients_are_played_one_at_a_time(
    folder: Path, tmp_path: Path
) -> None:
    summary = summary_of(folder)
    spent = [record["seconds"] for record in records(folder)]
    core = sum(s[p] for s in spent for p in ("broadcast", "decode", "encode", "fold", "mean"))
    assert summary.overhead == pytest.approx(core / sum(s["round"] for s in spent))
    assert run(walking(), tmp_path / "run", engine=Elsewhere()).overhead is None


def test_a_client_is_charged_its_broadcasts_and_openings() -> None:
    """A broadcast of 100 bytes, openings of 40: client 0 is new, client 1 had lost its own."""
    uploads = tuple(
        UploadRecord(
            client=client,
            report=Report(num_examples=1, train_loss=1.0),
            block_ids=(0,),
            block_differences=None,
            uplink=ByteCount(header=1, levels=2, raw=4, buffers=8, nominal_bits=99),
            uplink_blocks=(BlockTraffic(),),
        )
        for client in range(3)
    )
    played = RoundRecord(
        round=2,
        stage=1,
        cohort=(0, 1, 2),
        uploads=uploads,
        refusals=(),
        train_loss=1.0,
        validation_loss=None,
        validation_metric=None,
        uplink_bytes=45,
        downlink_bytes=480,
        uplink_nominal_bits=297,
        downlink_nominal_bits=0,
        uplink_blocks=(BlockTraffic(),),
        broadcast=ByteCount(header=100),
        broadcast_blocks=(BlockTraffic(),),
        initial_bytes=80,
        initialized=(0,),
        reinitialized=(1,),
    )
    record = make_record(RoundResult(record=played, test=None, seconds={}))
    assert [c["uplink_bytes"] for c in record["clients"]] == [15, 15, 15]
    assert [c["downlink_bytes"] for c in record["clients"]] == [140, 240, 100]
