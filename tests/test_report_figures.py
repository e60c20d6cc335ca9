"""The report's figures: sections of runs whose every number is written down here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedobd import ModelSchema, decompose
from fedobd.models import build_model
from fedobd.report._content import headline
from fedobd.report._curves import curve_of
from fedobd.report._gather import Section, Variant
from fedobd.report._links import round_seconds
from fedobd.report._run import Results, Round, Run, TrafficByBlock
from fedobd.report._summary_tables import (
    Table,
    best_baseline,
    block_table,
    link_table,
    part_table,
    reference,
    run_table,
    summary_table,
)
from fedobd.report._traffic import stack_by_block
from fedobd.report._uploads import upload_shares
from tests.toy import config

NB = "\N{NO-BREAK SPACE}"
SCHEMA: ModelSchema = decompose(build_model("tests.toy:make_model"))
"""Blocks of 48, 520 and 36 parameters."""


def played(number: int, **changes: Any) -> Round:
    """Return a round of four clients, of which two sent an upload that was taken."""
    values: dict[str, Any] = {
        "number": number,
        "stage": 1,
        "cohort": 4,
        "clients": 2,
        "broadcasts": 5,
        "uplink_bytes": 1000,
        "downlink_bytes": 3000,
        "uplink_parts": {"header": 400, "levels": 600},
        "downlink_parts": {"header": 1000, "raw": 2000},
        "test_metric": 0.5,
        "train_s": 2.0,
    }
    return Round(**{**values, **changes})


def results(final: float | None, megabytes: int, **changes: Any) -> Results:
    """Return results of so many megabytes, of which a quarter went up."""
    values: dict[str, Any] = {
        "final_metric": final,
        "best_metric": 0.95,
        "uplink_bytes": 250_000 * megabytes,
        "downlink_bytes": 750_000 * megabytes,
        "refusals": 0,
        "round_s": 7.0,
        "stops_on_test": False,
    }
    return Results(**{**values, **changes})


def a_run(method: str, outcome: Results, seed: int = 0, **changes: Any) -> Run:
    values: dict[str, Any] = {
        "folder": Path(f"{method}-seed{seed}"),
        "name": f"{method}-seed{seed}",
        "config": config(method).for_method(method, seed),
        "toml": "",
        "environment": {},
        "schema": SCHEMA,
        "rounds": (played(1), played(2)),
        "uploads": np.ones((2, 3)),
        "rare_blocks": (),
        "differences": None,
        "uplink": TRAFFIC,
        "downlink": TRAFFIC,
        "results": outcome,
        "is_finished": True,
    }
    return Run(**{**values, **changes})


def section(*runs: Sequence[Run]) -> Section:
    variants = tuple(
        Variant(label=own[0].method, number=number, runs=tuple(own))
        for number, own in enumerate(runs)
    )
    return Section(title="", settings="", metric="test accuracy", variants=variants, notes=())


def comparison() -> Section:
    """Two seeds of FedOBD, and three baselines, two of them equally accurate."""
    return section(
        [
            a_run("fedobd", results(0.9, 1, best_metric=0.9)),
            a_run("fedobd", results(0.7, 3, best_metric=0.8), seed=1),
        ],
        [a_run("fedavg", results(0.6, 10, best_metric=0.6))],
        [a_run("fedpaq", results(0.75, 8, best_metric=0.75))],
        [a_run("smafd", results(0.75, 4, best_metric=0.96))],
    )


def column(table: Table, name: str) -> list[str]:
    return [row[table.head.index(name)].text for row in table.rows]


def best(table: Table, name: str) -> list[bool]:
    return [row[table.head.index(name)].is_best for row in table.rows]


def test_the_summary_has_means_deviations_and_reductions_of_totals() -> None:
    table = summary_table(comparison())
    assert column(table, "test accuracy\nfinal") == [
        f"0.8000{NB}±{NB}0.1414", "0.6000", "0.7500", "0.7500"
    ]  # fmt: skip
    assert column(table, "test accuracy\nbest")[1:] == ["0.6000", "0.7500", "0.9600"]
    assert column(table, "sent\ntotal, MB") == [f"2.00{NB}±{NB}1.41", "10.00", "8.00", "4.00"]
    assert column(table, "up, MB")[1:] == ["2.50", "2.00", "1.00"]
    assert column(table, "down, MB")[1:] == ["7.50", "6.00", "3.00"]
    assert column(table, "less than\nFedAvg") == ["80.0 %", "–", "20.0 %", "60.0 %"]
    assert column(table, "less than\nsmafd") == ["50.0 %", "-150.0 %", "-100.0 %", "–"]


def test_the_best_is_the_largest_metric_and_the_fewest_bytes() -> None:
    table = summary_table(comparison())
    assert best(table, "test accuracy\nfinal") == [True, False, False, False]
    assert best(table, "test accuracy\nbest") == [False, False, False, True]
    for name in ("sent\ntotal, MB", "up, MB", "down, MB"):
        assert best(table, name) == [True, False, False, False]


def test_of_equally_accurate_baselines_the_best_sent_less() -> None:
    found = best_baseline(comparison())
    assert found is not None
    assert found.label == "smafd"


def test_a_baseline_of_which_a_run_was_not_tested_is_not_the_best() -> None:
    made = section(
        [a_run("fedavg", results(0.5, 1))],
        [a_run("smafd", results(0.9, 1)), a_run("smafd", results(None, 1), seed=1)],
    )
    found = best_baseline(made)
    assert found is not None
    assert found.label == "fedavg"


def test_fedavg_is_what_others_are_measured_by_once_it_has_ended() -> None:
    ended = section([a_run("fedavg", results(0.5, 1))], [a_run("smafd", results(0.9, 1))])
    found = reference(ended)
    assert found is not None
    assert found.label == "fedavg"
    running = section(
        [a_run("fedavg", results(0.5, 1), is_finished=False)], [a_run("smafd", results(0.9, 1))]
    )
    found = reference(running)
    assert found is not None
    assert found.label == "smafd"


def test_the_headline_is_of_fedobd_and_else_of_what_sent_least() -> None:
    assert headline(comparison()) == (
        "fedobd sent 2.00 MB, 80.0 % less than the 10.00 MB of fedavg, and ends with test "
        "accuracy 0.8000, where fedavg ends with 0.6000."
    )
    others = section(
        [a_run("fedavg", results(0.5, 10))],
        [a_run("smafd", results(0.9, 4))],
        [a_run("fedpaq", results(0.8, 2), is_finished=False)],
        [a_run("feddropoutavg", results(0.7, 8))],
    )
    assert headline(others) == (
        "smafd sent 4.00 MB, 60.0 % less than the 10.00 MB of fedavg, and ends with test "
        "accuracy 0.9000, where fedavg ends with 0.5000."
    )
    more = section([a_run("fedobd", results(0.5, 3))], [a_run("fedavg", results(0.5, 2))])
    assert headline(more).startswith("fedobd sent 3.00 MB, 50.0 % more than the 2.00 MB of fedavg")


def test_a_run_has_its_own_row() -> None:
    table = run_table(section([a_run("fedavg", results(0.5, 8, refusals=3, best_metric=0.625))]))
    assert [cell.text for cell in table.rows[0]] == [
        "fedavg", "0", "2 of 3", "0.5000", "8.00", "2.00", "6.00", "0.6250", "7.0", "3", "yes",
        "fedavg-seed0",
    ]  # fmt: skip


def test_a_client_of_the_cohort_gets_its_share_of_a_rounds_bytes() -> None:
    """A round of 4,000 bytes and 4 clients takes 8,000 bits on each link, and 2 s of training."""
    assert round_seconds(played(1), 1000.0) == 8 + 2
    long = a_run("fedavg", results(0.5, 1), rounds=(played(1),) * 3)
    slow = played(1, uplink_bytes=5000, train_s=4.0)
    short = a_run("fedavg", results(0.5, 1), seed=1, rounds=(slow,))
    table = link_table(section([long, short], [a_run("smafd", results(0.5, 1))]))
    texts = [cell.text for cell in table.rows[0]]
    assert texts[1:3] == ["3.01 s", "5.02 s"]  # (2.008 + 4.016) / 2, (3 · 2.008 + 4.016) / 2
    assert texts[-3:] == ["3.00 s", "750 B", "750 B"]  # up: 250 and 1,250 bytes a client
    two = section([long], [short])
    assert best(link_table(two), f"1{NB}Mbit/s\nthe run") == [False, True]


def test_parts_are_summed_over_rounds_and_are_means_over_seeds() -> None:
    one = a_run("fedavg", results(0.5, 1), rounds=(played(1),) * 2)
    two = a_run("fedavg", results(0.5, 1), seed=1, rounds=(played(1),) * 4)
    table = part_table(section([one, two]))
    assert table.head == ("method", "header", "levels", "raw")
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["fedavg, up", "1.20 kB", "1.80 kB", "0 B"],
        ["fedavg, down", "3.00 kB", "0 B", "6.00 kB"],
    ]


TRAFFIC = TrafficByBlock(
    payloads=np.array([[2.0, 1.0, 0.0], [2.0, 3.0, 0.0]]),
    num_bytes=np.array([[96.0, 260.0, 0.0], [48.0, 780.0, 0.0]]),
    nominal_bits=np.array([[480.0, 1040.0, 0.0], [480.0, 3120.0, 0.0]]),
    levels=np.array([[3.0, 10.0, 0.0], [0.0, 2.0, 0.0]]),
)
"""What blocks of 48, 520 and 36 parameters took in two rounds."""


def test_bits_of_a_block_are_means_over_the_payloads_that_held_it() -> None:
    bits = TRAFFIC.bits(SCHEMA)
    assert [block.num_parameters for block in SCHEMA.blocks] == [48, 520, 36]
    assert bits.real[:2].tolist() == [8 * 144 / (4 * 48), 8 * 1040 / (4 * 520)]
    assert bits.nominal[:2].tolist() == [960 / (4 * 48), 4160 / (4 * 520)]
    assert bits.levels is not None
    assert bits.levels[:2].tolist() == [3.0, (1 * 10 + 3 * 2) / 4]  # rounds with levels alone
    assert np.isnan([bits.real[2], bits.nominal[2], bits.levels[2]]).all()


def test_the_blocks_of_stage_one_are_counted_among_its_accepted_uploads() -> None:
    rounds = (played(1, clients=2), played(2, clients=3), played(3, clients=4, stage=2))
    run = a_run(
        "fedobd",
        results(0.5, 1),
        rounds=rounds,
        uploads=np.array([[2.0, 1.0, 0.0], [3.0, 0.0, 1.0], [4.0, 4.0, 4.0]]),
        differences=np.array([[0.5, 0.25, 0.0], [0.25, 0.75, 0.5], [9.0, 9.0, 9.0]]),
    )
    (variant,) = section([run]).variants
    table = block_table(variant, None)
    assert column(table, "uploads\nin stage 1") == ["5 of 5", "1 of 5", "1 of 5"]
    assert column(table, "mean block\ndifference") == ["0.375", "0.5", "0.25"]
    assert upload_shares(run)[:2].tolist() == [[1.0, 0.5, 0.0], [1.0, 0.0, pytest.approx(1 / 3)]]


def test_what_no_block_took_is_all_else() -> None:
    rounds = (
        played(1, uplink_bytes=500, downlink_bytes=2000, broadcasts=5),
        played(2, uplink_bytes=900, downlink_bytes=2500, broadcasts=3),
    )
    run = a_run("fedobd", results(0.5, 1), rounds=rounds, uplink=TRAFFIC, downlink=TRAFFIC)
    stacks = stack_by_block(run)
    assert stacks is not None
    up, down = ([values.tolist() for _, _, values in stack] for stack in stacks)
    assert up == [[500 - 356, 900 - 828], [96, 48], [260, 780], [0, 0]]
    assert down == [[2000 - 5 * 356, 2500 - 3 * 828], [5 * 96, 3 * 48], [5 * 260, 3 * 780], [0, 0]]


def test_a_curve_ends_with_the_final_metric_of_a_run_that_has_ended() -> None:
    rounds = (played(1, test_metric=0.25), played(2, test_metric=None), played(3))
    ended = a_run("fedavg", results(0.75, 1), rounds=rounds)
    assert curve_of(ended).metric.tolist() == [0.25, 0.75]
    assert curve_of(ended).sent[0].tolist() == pytest.approx([0.004, 0.012])
    running = a_run("fedavg", results(0.75, 1), rounds=rounds, is_finished=False)
    assert curve_of(running).metric.tolist() == [0.25, 0.5]
