"""Tables of summaries: a comparison and a run whose figures are written down here."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from rich.table import Table
from torch import nn

from fedobd import Codec, FedOBD, ModelSchema, Payload, UsageError, decompose
from fedobd.cli._console_tables import block_table, comparison_table, payload_tables, summary_table
from fedobd.experiments import Summary
from fedobd.experiments._compare import Comparison, tabulate
from fedobd.models import build_model
from tests.session_helpers import set_up


def summary(method: str, seed: int = 0, **changes: Any) -> Summary:
    """Return a summary in which no two figures are the same."""
    parts = {"levels": 0.2, "raw": 0.3}
    values: dict[str, Any] = {
        "method": method,
        "seed": seed,
        "rounds": 7,
        "final_metric": 0.5,
        "best_metric": 0.75,
        "broadcast_metric": 0.25,
        "uplink_bytes": 1_000_000,
        "downlink_bytes": 3_000_000,
        "total_bytes": 4_000_000,
        "uplink_nominal_bits": 8_000_000,
        "downlink_nominal_bits": 32_000_000,
        "shares": {
            "uplink": {**parts, "header": 0.4, "buffers": 0.1},
            "downlink": {**parts, "header": 0.12, "buffers": 0.38},
        },
        "delivery_bytes": 11,
        "never_uploaded": (),
        "rarely_uploaded": (),
        "refusals": 2,
        "stops_on_test": False,
        "seconds": {"round": 20.0, "train": 15.0},
        "overhead": 0.15,
    }
    return Summary(**{**values, **changes})


def total(method: str, final: float, megabytes: int, **changes: Any) -> Summary:
    """Return a summary by its final metric and its bytes, of which a quarter went up."""
    return summary(
        method,
        final_metric=final,
        uplink_bytes=250_000 * megabytes,
        downlink_bytes=750_000 * megabytes,
        total_bytes=1_000_000 * megabytes,
        **changes,
    )


def test_a_row_is_means_over_the_seeds_with_deviations_of_a_sample() -> None:
    never = {"block": "a", "parameters": 1, "share": 0.25}
    one = total("fedavg", 0.5, 4, best_metric=0.625, never_uploaded=(never,), overhead=0.1)
    two = total("fedavg", 0.75, 8, best_metric=0.875, overhead=0.2, seconds={"round": 40.0})
    three = total("fedavg", 0.25, 12, best_metric=1.0, never_uploaded=(never, never), overhead=0.3)
    (row,) = tabulate({"fedavg": [one, two, three]}, (0, 1, 2)).rows
    assert (row.final_metric, row.final_metric_std) == (0.5, 0.25)
    assert row.best_metric == pytest.approx(2.5 / 3)
    assert row.best_metric_std == pytest.approx(0.19094, abs=1e-5)
    assert (row.uplink_bytes, row.downlink_bytes, row.total_bytes) == (2e6, 6e6, 8e6)
    assert row.nominal_bytes == 5e6
    assert row.seconds == pytest.approx(80 / 3)
    assert row.header_share == pytest.approx((0.4 + 3 * 0.12) / 4)
    assert row.buffer_share == pytest.approx((0.1 + 3 * 0.38) / 4)
    assert row.overhead == pytest.approx(0.2)
    assert row.never_uploaded_share == 0.5


def test_a_single_seed_has_no_deviation_and_workers_no_overhead() -> None:
    (row,) = tabulate({"fedavg": [summary("fedavg", overhead=None)]}, (3,)).rows
    assert (row.final_metric_std, row.best_metric_std) == (0.0, 0.0)
    assert row.overhead is None


def comparison() -> Comparison:
    """Return FedOBD, FedAvg and three baselines, two of them equally accurate."""
    made = (
        total("fedobd", 0.9, 1, best_metric=0.9),
        total("fedavg", 0.7, 10),
        total("fedpaq", 0.8, 4),
        total("smafd", 0.8, 2, best_metric=0.85),
        total("feddropoutavg", 0.6, 5, best_metric=0.95),
    )
    return tabulate({own.method: [own] for own in made}, (0,))


def test_the_best_baseline_is_accurate_in_the_end_and_of_equal_ones_sent_less() -> None:
    made = comparison()
    assert made.best_baseline == "smafd"
    rows = {row.method: row for row in made.rows}
    assert [rows[name].reduction_fedavg for name in rows] == pytest.approx([0.9, 0, 0.6, 0.8, 0.5])
    assert [rows[name].reduction_baseline for name in rows] == pytest.approx(
        [0.5, -4, -1, 0, -1.5]
    )


def test_reductions_are_of_both_directions_together() -> None:
    less = summary("fedobd", uplink_bytes=0, downlink_bytes=1_000_000, total_bytes=1_000_000)
    first, _ = tabulate({"fedobd": [less], "fedavg": [summary("fedavg")]}, (0,)).rows
    assert first.reduction_fedavg == 0.75


def test_what_was_not_tested_is_not_compared() -> None:
    untested = summary("fedavg", final_metric=None, best_metric=None)
    with pytest.raises(UsageError, match="method 'fedavg' was not tested"):
        tabulate({"fedavg": [untested]}, (0,))


def rows_of(table: Table) -> list[list[str]]:
    return [list(map(str, row)) for row in zip(*(c.cells for c in table.columns), strict=True)]


def test_the_table_of_a_comparison_marks_the_best_of_each_column() -> None:
    assert rows_of(comparison_table(comparison())) == [
        ["fedobd", "[bold]0.9000[/bold]", "0.9000", "0.25", "0.75", "[bold]1.00[/bold]",
         "90.0 %", "50.0 %", "20"],
        ["fedavg", "0.7000", "0.7500", "2.50", "7.50", "10.00", "–", "-400.0 %", "20"],
        ["fedpaq", "0.8000", "0.7500", "1.00", "3.00", "4.00", "60.0 %", "-100.0 %", "20"],
        ["smafd", "0.8000", "0.8500", "0.50", "1.50", "2.00", "80.0 %", "–", "20"],
        ["feddropoutavg", "0.6000", "[bold]0.9500[/bold]", "1.25", "3.75", "5.00",
         "50.0 %", "-150.0 %", "20"],
    ]  # fmt: skip


def test_the_table_of_a_comparison_has_the_deviation_of_each_metric() -> None:
    one, two = total("fedavg", 0.5, 4, best_metric=0.7), total("fedavg", 0.7, 4, best_metric=0.8)
    (row,) = rows_of(comparison_table(tabulate({"fedavg": [one, two]}, (0, 1))))
    assert row[1:3] == ["[bold]0.6000\n±.1414[/bold]", "[bold]0.7500\n±.0707[/bold]"]


def test_the_table_of_a_run_says_its_summary() -> None:
    assert dict(rows_of(summary_table(summary("fedobd")))) == {
        "rounds": "7",
        "test accuracy, final": "0.5000",
        "test accuracy, best": "0.7500",
        "test accuracy of what clients hold": "0.2500",
        "uplink": "1.00 MB",
        "downlink": "3.00 MB",
        "total": "4.00 MB",
        "total, nominal bits / 8": "5.00 MB",
        "headers, of the uplink": "40.0 %",
        "buffers, of the uplink": "10.0 %",
        "refused or missing uploads": "2",
        "seconds": "20.0",
        "the core's share of the time": "15.0 %",
    }
    told = dataclasses.replace(summary("fedobd"), stops_on_test=True)
    assert dict(rows_of(summary_table(told)))["note"] == "stopped on the test set"


def test_blocks_above_the_budget_never_fit() -> None:
    schema: ModelSchema = decompose(build_model("tests.toy:make_model", width=8))
    sizes = [block.num_parameters for block in schema.blocks]
    assert sizes == [96, 1032, 36]  # of 1164; the budget is 1,047.6, then 931.2
    fits = [row[-1] for row in rows_of(block_table(schema, 0.1))]
    assert fits == ["yes", "yes", "yes"]
    fits = [row[-1] for row in rows_of(block_table(schema, 0.2))]
    assert fits == ["yes", "[red]never[/red]", "yes"]


def test_the_tables_of_a_payload_are_of_the_blocks_that_it_holds() -> None:
    """Of 21 parameters half may be uploaded: the block of 18 stays, that of 3 travels as it is.

    Its values take 12 bytes, and the length of their frame another.
    """
    codec = Codec(uplink_quantizer="none", dropout_rate=0.5)
    method = FedOBD(codec=codec, stage_one_rounds=1, cohort=1)
    server, engine = set_up(method, nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 1)))
    log = engine.play(server)
    assert log is not None
    (upload,) = log.uploads.values()
    facts, blocks = payload_tables(Payload.parse(upload, engine.schema))
    told = dict(rows_of(facts))
    assert told["blocks kept"] == "1 of 2"
    assert told["parameters kept"] == "3 of 21 (14.3 %)"
    assert (told["raw values"], told["nominal bytes"]) == ("12", "12")
    assert rows_of(blocks) == [["1", "1", "3", "raw", "–", "13", f"{8 * 13 / 3:.2f}"]]
