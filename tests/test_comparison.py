"""The comparison on real data: what is planned, and what its page says of records."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fedobd.experiments import load_config

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "comparison"))

import figures
import page
import records
from page import collect, table
from plan import COARSE, SMALL, SWEPT, equal_participation, plan
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


def test_a_run_that_goes_on_ends_with_the_model_of_its_last_round_not_with_the_best() -> None:
    falling = record(tested_on=None, final=0.3)
    falling["summary"]["broadcast_metric"] = 0.2
    whole = collect("fedpaq", [falling])
    assert (whole.final, whole.best) == ([0.3], [0.5])
    cut = collect("fedpaq", [falling], 4)
    assert (cut.final, cut.best) == ([0.3], [0.5])
    assert collect("fedpaq", [record(tested_on=None)], 3).final == [0.5]


def row(variant: str, accuracy: float, total: int) -> page.Figures:
    return page.Figures(variant, [accuracy], [accuracy], [total - 1], [1], [1.0], False)


def test_the_most_accurate_baseline_is_not_fedobd_and_of_equal_ones_sent_less() -> None:
    rows = [row("fedobd", 0.9, 1), row("fedavg", 0.5, 9), row("fedpaq", 0.7, 5)]
    assert page._best(rows) is rows[2]
    rows += [row("smafd", 0.7, 3), row("feddropoutavg", 0.7, 4)]
    assert page._best(rows) is rows[3]
    assert page._best(rows[:1]) is None
    assert rows[3].total_bytes == 3


def test_the_share_of_the_core_is_of_the_time_that_all_processes_worked() -> None:
    core = {"broadcast": 1.0, "decode": 2.0, "encode": 3.0, "fold": 4.0, "mean": 5.0}
    rest = {"train": 20.0, "validate": 7.0, "evaluate": 3.0, "round": 99.0}
    one = {"summary": {"seconds": {**core, **rest}}}
    assert page._core_share([one, one]) == 15 / 45


def whole_record(rounds: int, final: float, **codec: Any) -> dict[str, Any]:
    """Return a record of rounds of 3 MB and 1 MB, each tested with a hundredth more."""
    codec = {"selection": "mbd", "dropout_rate": 0.3, "uplink_weight": 1e-3, **codec}
    return {
        "rounds": [
            {
                "uplink_bytes": 3_000_000,
                "downlink_bytes": 1_000_000,
                "test_metric": n / 100,
                "seconds": {"round": 1.0},
            }
            for n in range(1, rounds + 1)
        ],
        "summary": {"final_metric": final, "total_bytes": 4_000_000 * rounds},
        "config": {
            "output": {},
            "methods": {"fedobd": {"stage_one_rounds": 2, "codec": codec}},
        },
    }


def cells(text: str, name: str) -> list[str]:
    """Return the cells of a table's row."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_baselines_are_shown_after_the_published_rounds_and_after_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("accuracy_by_bytes", "uploads"):
        monkeypatch.setattr(figures, name, lambda *_: "")
    preset = SMALL[0]
    found = {
        (preset, "fedobd"): [whole_record(3, 0.9)],
        (preset, "fedavg"): [whole_record(2, 0.8)],
        (preset, "fedavg-cohort"): [whole_record(5, 0.7)],
        (preset, "fedpaq"): [whole_record(5, 0.6)],
    }
    _, _, published, _, equal, *_ = page._preset(preset, found)
    assert cells(published, "FedOBD")[2:7] == ["0.9000", "0.9000", "9.00", "3.00", "12.00"]
    assert cells(published, "FedPAQ")[2:7] == ["0.0200", "0.0200", "6.00", "2.00", "8.00"]
    assert "less than FedAvg, all clients" in published
    assert cells(equal, "FedPAQ")[2:7] == ["0.6000", "0.6000", "15.00", "5.00", "20.00"]
    assert cells(equal, "FedAvg")[2:7] == ["0.7000", "0.7000", "15.00", "5.00", "20.00"]


def test_a_sweep_holds_the_base_run_and_counts_no_dropout_as_zero() -> None:
    found = {
        (SWEPT, "fedobd"): [whole_record(3, 0.9)],
        (SWEPT, "dropout-0.5"): [whole_record(1, 0.7, dropout_rate=0.5)],
        (SWEPT, "no-dropout"): [whole_record(2, 0.8, selection="none")],
    }
    title, sweep = page._sweeps(found)
    assert title.startswith("## Sweep over λ")
    assert sweep.splitlines()[0] == (
        "| λ, the dropout rate | final accuracy | up MB | down MB | total MB |"
    )
    assert sweep.splitlines()[2:] == [
        "| 0 | 0.8000 | 6.00 | 2.00 | 8.00 |",
        "| 0.3 | 0.9000 | 9.00 | 3.00 | 12.00 |",
        "| 0.5 | 0.7000 | 3.00 | 1.00 | 4.00 |",
    ]


def test_figures_draw_what_was_sent_so_far_and_shares_of_the_clients() -> None:
    tested = whole_record(3, 0.9)
    assert figures._curve(tested) == ([4.0, 8.0, 12.0], [0.01, 0.02, 0.03])
    tested["rounds"][1]["test_metric"] = tested["rounds"][2]["test_metric"] = None
    assert figures._curve(tested) == ([4.0, 12.0], [0.01, 0.9])
    rounds = [
        {"stage": 1, "clients": 4, "uploads_by_block": [4, 1]},
        {"stage": 1, "clients": 2, "uploads_by_block": [1, 2]},
        {"stage": 2, "clients": 9, "uploads_by_block": [9, 9]},
    ]
    assert figures._shares({"rounds": rounds}) == [[1.0, 0.25], [0.5, 1.0]]


def test_a_record_counts_the_uploads_of_each_block() -> None:
    played: dict[str, Any] = dict.fromkeys(
        ("round", "stage", "uplink_bytes", "downlink_bytes", "train_loss", "validation_metric",
         "test_metric", "seconds"), 1,
    )  # fmt: skip
    clients = [{"blocks_kept": [0, 2]}, {"blocks_kept": [2]}, {"blocks_kept": [0, 2]}]
    kept = records._round({**played, "clients": clients}, 4)
    assert (kept["uploads_by_block"], kept["clients"]) == ([2, 0, 3, 0], 3)
