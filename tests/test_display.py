"""What is seen while runs go on: the live table, plain lines, JSON."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedobd import RoundPlan
from fedobd.cli._json_lines import JsonLines
from fedobd.cli._live import Display
from fedobd.cli._tables import comparison_table
from fedobd.experiments import RunConfig, compare, parse_config, run
from tests.toy import CONFIG, config

HEADINGS = ["round", "st", "acc", "loss", "up MB", "down MB", "saved", "clients", "left"]
PLAN = RoundPlan(
    round=3, stage=1, cohort=(0, 1, 2, 3, 4, 5, 6, 7), epochs=1, schedule_start=0,
    schedule_epochs=1, run_start=0, run_epochs=1,
)  # fmt: skip


def terminal(width: int) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, height=24, color_system=None
    )


def shown(display: Display, width: int) -> list[str]:
    """Return the lines of the live table on a screen of some width."""
    screen = Console(file=io.StringIO(), width=width, color_system=None)
    screen.print(display.table())
    assert isinstance(screen.file, io.StringIO)
    lines = [line.rstrip() for line in screen.file.getvalue().splitlines()]
    assert all(len(line) <= width for line in lines), lines
    return lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run's folder."""
    path = tmp_path_factory.mktemp("display") / "run"
    run(config(), path)
    return path


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def named(method: str, seed: int) -> RunConfig:
    return parse_config({**config().to_dict(), "federation": {"seed": seed}}).for_method(
        method, seed
    )


def test_every_method_has_a_line_from_the_beginning_and_keeps_its_figures(folder: Path) -> None:
    methods = ["fedobd", "fedavg", "feddropoutavg"]
    display = Display(terminal(80), methods=methods, seeds=[0])
    lines = shown(display, 80)
    assert re.split(r"\s{2,}|(?<=round) ", lines[0])[:2] == ["method", "round"]
    assert all(title in lines[0] for title in HEADINGS)
    assert [line.split()[0] for line in lines[1:4]] == methods
    assert lines[4] == "saved: less than the same payloads as plain float32"

    display.on_run_begin(named("fedobd", 0), 50, folder)
    assert shown(display, 80)[1].split() == [
        "fedobd", "1/50", "1", "–", "–", "0.00", "0.00", "–", "0/2", "–"
    ]  # fmt: skip
    display.on_client_end(dataclasses.replace(PLAN, round=1), 2)  # in round 1 of 50
    assert shown(display, 80)[1].split()[-2:] == ["2/8", "–"]
    first, second, *_ = records(folder)
    for record in (first, second):
        record["seconds"] = {"round": 8.0}
        display.on_round_end(record)
    display.on_client_end(PLAN, 2)
    up = first["uplink_bytes"] + second["uplink_bytes"]
    down = first["downlink_bytes"] + second["downlink_bytes"]
    payloads = sum(len(r["clients"]) + len(r["cohort"]) for r in (first, second))
    values = (36 + 4) + (4 + 4 + 4 + 4 + 1) + (64 * 8 + 8) + (8 * 4 + 4)
    saved = 100 * (1 - (up + down) / (4 * values * payloads))
    assert shown(display, 80)[1].split() == [
        "fedobd", "3/50", "1", f"{second['test_metric']:.4f}", f"{second['train_loss']:.4f}",
        f"{up / 1e6:.2f}", f"{down / 1e6:.2f}", f"{saved:.1f}", "%", "2/8", "6:22",
    ]  # fmt: skip

    display.on_run_begin(named("fedavg", 0), 3, folder)
    assert shown(display, 80)[1].split()[:2] == ["fedobd", "3/50"]
    assert shown(display, 80)[2].split()[:2] == ["fedavg", "1/3"]


def test_narrow_terminals_leave_out_columns_and_break_no_line(folder: Path) -> None:
    display = Display(terminal(60), methods=["fedobd", "feddropoutavg"], seeds=[0])
    display.on_run_begin(named("fedobd", 0), 5, folder)
    for record in records(folder):
        display.on_round_end(record)
    lines = shown(display, 60)
    assert lines[0].split() == [
        "method",
        "round",
        "acc",
        "up",
        "MB",
        "down",
        "MB",
        "saved",
        "left",
    ]
    assert len(lines) == 4
    display = Display(terminal(30), methods=["fedobd", "feddropoutavg"])
    assert shown(display, 30)[0].split() == ["method", "round", "acc"]
    assert [line.split() for line in shown(display, 30)[1:]] == [["fedobd"], ["feddropoutavg"]]


def test_long_names_and_large_numbers_break_no_line(folder: Path) -> None:
    long = "a_method_with_a_name_that_is_longer_than_any_screen_wants_it_to_be_[bold]"
    for width in (60, 80, 200):
        display = Display(terminal(width), methods=[long, "fedobd"], seeds=[0, 20_000_000])
        display.on_run_begin(named("fedobd", 20_000_000), 10_000, folder)
        (record, *_) = records(folder)
        record |= {
            "uplink_bytes": 10**14, "downlink_bytes": 10**11, "train_loss": 123456.789,
            "test_metric": -3.25, "round": 9_999, "seconds": {"round": 100_000.0},
        }  # fmt: skip
        display.on_round_end(record)
        lines = shown(display, width)
        assert "a_method_with_a" in lines[1]
        assert "…" in lines[1]
        words = lines[2].split()
        assert words[:2] == ["fedobd", "20000000"]
        assert "9999/10000" in words
        if width == 200:
            assert {"-3.250", "123457", "1e+08", "100000", "27:46:40"} <= {*words}
        assert len(lines) in (3, 4)


def test_the_live_table_ends_with_the_figures_of_the_summaries(tmp_path: Path) -> None:
    methods = ["fedobd", "fedavg"]

    def last_screen(*, resume: bool) -> list[str]:
        console = terminal(80)
        with Display(console, methods=methods, seeds=[0, 1]) as display:
            compare(
                parse_config(tomllib.loads(CONFIG)),
                tmp_path / "all",
                seeds=[0, 1],
                methods=methods,
                callbacks=[display],
                resume=resume,
            )
        assert isinstance(console.file, io.StringIO)
        _, _, screen = console.file.getvalue().rpartition("\x1b[2K")
        *lines, cursor = screen.splitlines()
        assert cursor == "\x1b[?25h"  # shown again
        return lines

    final = last_screen(resume=False)
    assert len(final) == 4
    assert final[0].startswith("method, seed")
    for line, method, rounds in zip(final[1:], methods, ("5/5", "3/3"), strict=False):
        summary = json.loads((tmp_path / "all" / f"{method}-seed1" / "summary.json").read_text())
        words = line.split()
        assert words[:3] == [method, "1", rounds]
        assert words[4] == f"{summary['final_metric']:.4f}"
        assert words[6:8] == [
            f"{summary[key] / 1e6:.2f}" for key in ("uplink_bytes", "downlink_bytes")
        ]
        assert words[-1] == "done"
    assert last_screen(resume=True) == final


def test_a_json_object_a_round_and_one_a_run(folder: Path) -> None:
    stream = io.StringIO()
    run(config(), folder, resume=True, callbacks=[JsonLines(stream)])
    *rounds, summary = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [found["type"] for found in rounds] == ["round"] * 5
    total = 0
    for found, record in zip(rounds, records(folder), strict=True):
        total += record["uplink_bytes"] + record["downlink_bytes"]
        assert found["traffic/total_bytes"] == total
        assert (found["method"], found["seed"]) == ("fedobd", 1)
        for key in ("round", "stage"):
            assert found[key] == record[key]
        for name, key in (("test/metric", "test_metric"), ("train/loss", "train_loss")):
            assert found[name] == record[key]
        assert not any(isinstance(value, list | dict) for value in found.values())
    assert summary == {"type": "summary", **json.loads((folder / "summary.json").read_text())}


def test_plain_lines_without_a_terminal(folder: Path) -> None:
    console = Console(file=io.StringIO(), width=40)
    with Display(console, methods=["fedobd"], seeds=[1]) as display:
        run(config(), folder, resume=True, callbacks=[display])
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 6
    assert lines[0] == f"fedobd: seed 1, 5 rounds, folder {folder}"
    assert re.fullmatch(
        r"fedobd: round 5/5 stage 2 accuracy [01]\.\d{4} loss \d\.\d{4} sent \d+\.\d\d kB",
        lines[5],
    )


def test_plain_lines_say_that_a_first_round_goes_on(folder: Path) -> None:
    console = Console(file=io.StringIO(), width=40)
    with Display(console, methods=["fedobd"]) as display:
        display.on_run_begin(named("fedobd", 0), 50, folder)
        display.on_client_end(dataclasses.replace(PLAN, round=1), 1)
        display.on_client_end(dataclasses.replace(PLAN, round=1), 2)
        display.on_round_end(records(folder)[0])
        display.on_client_end(dataclasses.replace(PLAN, round=2), 1)
    assert isinstance(console.file, io.StringIO)
    begun, first, ended = console.file.getvalue().splitlines()
    assert begun.startswith("fedobd: seed 0, 50 rounds")
    assert first == "fedobd: round 1/50 stage 1 1 of 8 clients done"
    assert ended.startswith("fedobd: round 1/50 stage 1 accuracy")


@pytest.mark.parametrize(("best", "columns"), [("fedavg", 8), ("fedpaq", 9)])
def test_a_comparison_shows_a_baseline_once(best: str, columns: int, tmp_path: Path) -> None:
    methods = ["fedobd", "fedavg", "fedpaq"]
    made = compare(parse_config(tomllib.loads(CONFIG)), tmp_path, seeds=[0], methods=methods)
    table = comparison_table(dataclasses.replace(made, best_baseline=best))
    assert len(table.columns) == columns
    assert (table.caption is None) == (best == "fedavg")
