"""The comparison on real data: what is planned, and what its page says of records."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fedobd.experiments import load_config

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "comparison"))

from page import collect, table
from plan import COARSE, SMALL, equal_participation, plan
from records import read_record


def test_each_planned_run_has_a_name_of_its_own_and_a_configuration() -> None:
    runs = list(plan())
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        changes = [change for change in run.changes if not change.startswith("data.")]
        config = load_config(run.preset, overrides=changes).for_method(run.method, run.seed)
        assert config.method == run.method


@pytest.mark.parametrize("preset", SMALL)
def test_coarse_is_ten_times_the_weight_of_the_preset_in_both_directions(preset: str) -> None:
    codec = load_config(preset).to_dict()["methods"]["fedobd"]["codec"]
    (run, *_) = (
        r for r in plan() if r.preset == preset and r.variant == f"weight-{COARSE[preset]:g}"
    )
    changed = load_config(preset, overrides=run.changes).to_dict()["methods"]["fedobd"]["codec"]
    for key in ("uplink_weight", "downlink_weight"):
        assert changed[key] == pytest.approx(10 * codec[key])


@pytest.mark.parametrize("preset", SMALL)
def test_baselines_get_at_least_the_client_epochs_of_fedobd(preset: str) -> None:
    config = load_config(preset)
    method: Any = config.methods["fedobd"]
    rounds, cohort = equal_participation(config)
    assert cohort == method.cohort
    first = method.stage_one_rounds * method.cohort * method.stage_one_epochs
    whole = first + config.federation.clients * method.stage_two_epochs
    a_round = cohort * method.stage_one_epochs
    assert whole <= rounds * a_round < whole + a_round


def test_records_are_of_the_runs_that_are_planned_now() -> None:
    found = 0
    for run in plan():
        record = read_record(run)
        if record is not None:
            found += 1
            named = (record["preset"], record["variant"], record["method"], record["seed"])
            assert named == (run.preset, run.variant, run.method, run.seed)
            assert record["changes"] == list(run.changes)
            numbers = [played["round"] for played in record["rounds"]]
            assert numbers == list(range(1, record["summary"]["rounds"] + 1))
    assert found > 0


def record(*, tested_on: int | None, final: float = 0.9) -> dict[str, Any]:
    """Return a record of four rounds, the second and fourth tested."""
    rounds = [
        {
            "uplink_bytes": 10 * n,
            "downlink_bytes": n,
            "test_metric": metric,
            "seconds": {"round": 2.0 * n},
        }
        for n, metric in enumerate((None, 0.5, None, 0.4), start=1)
    ]
    return {
        "rounds": rounds,
        "summary": {"final_metric": final},
        "config": {"output": {"evaluate_every": 2, "evaluate_examples": tested_on}},
    }


def test_figures_of_a_whole_run_are_its_last_and_those_of_a_part_are_marked() -> None:
    whole = collect("fedpaq", [record(tested_on=100), record(tested_on=100, final=0.7)])
    assert (whole.final, whole.best) == ([0.9, 0.7], [0.9, 0.7])
    assert (whole.uplink, whole.downlink, whole.seconds) == ([100] * 2, [10] * 2, [20.0] * 2)
    cut = collect("fedavg", [record(tested_on=100)], 2)
    assert (cut.final, cut.best, cut.uplink, cut.seconds) == ([0.5], [0.5], [30], [6.0])
    assert (whole.is_part, cut.is_part) == (False, True)
    assert not collect("fedavg", [record(tested_on=None)], 2).is_part
    text = table([whole, cut], cut, whole)
    assert "| FedPAQ | 2 | 0.8000 ± 0.1414 | 0.8000 ± 0.1414 | 0.00 | 0.00 | 0.00 |" in text
    assert "| FedAvg, all clients | 1 | 0.5000 \\* | 0.5000 |" in text
    assert "| -233.3 % | – | 20 |" in text
    assert text.splitlines()[-1].startswith("\\* Of a run that goes on")
    assert "\\*" not in table([whole], whole, None)
