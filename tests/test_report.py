"""The report: what is gathered from run folders, and what its tables and plots say."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from fedobd import ModelSchema, Payload, Role, ServerSession, UsageError
from fedobd._format import format_bytes
from fedobd.codec import Coding
from fedobd.experiments import compare, load_config
from fedobd.report import _curves, _traffic
from fedobd.report._bits import levels_chart
from fedobd.report._chart import COLORS, Columns, Labels, View, block_colors, shorten, thin
from fedobd.report._content import (
    charts_of,
    drawing_step,
    headline,
    left_out,
    read_deliveries,
    reproductions,
)
from fedobd.report._curves import MEASURES, Curve, accuracy_chart, curve_of, look, mean_curve
from fedobd.report._delivery import delivery_bits
from fedobd.report._figures import rows_of
from fedobd.report._gather import Section, gather
from fedobd.report._links import round_seconds, run_seconds, train_seconds
from fedobd.report._page import _typed
from fedobd.report._run import Run
from fedobd.report._summary_tables import (
    Table,
    block_table,
    environment_table,
    link_table,
    part_table,
    round_table,
    run_table,
    summary_table,
)
from fedobd.report._traffic import PARTS
from fedobd.report._uploads import drops_blocks, upload_map, upload_shares, warning
from tests.toy import CONFIG

METHODS = ("fedobd", "fedavg", "fedpaq")
SEEDS = (0, 1)
PLUS_MINUS = "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison of three methods with two seeds."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "toy.toml").write_text(CONFIG, encoding="utf-8")
    config = load_config(str(folder / "toy.toml"))
    compare(config, folder / "runs", seeds=SEEDS, methods=METHODS)
    return folder / "runs"


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return shutil.copytree(made, tmp_path / "runs")


def only(sections: tuple[Section, ...]) -> Section:
    (section,) = sections
    return section


def summary_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return values


def change_records(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "rounds.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record in records:
        change(record)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def column(table: Table, name: str) -> list[str]:
    number = table.head.index(name)
    return [row[number].text for row in table.rows]


# gathering


def test_a_comparison_is_one_section_with_its_seeds(made: Path) -> None:
    section = only(gather([made]))
    assert section.title == "tests.toy:make_data, tests.toy:make_model"
    assert section.metric == "test accuracy"
    assert [variant.label for variant in section.variants] == list(METHODS)
    assert [[run.seed for run in v.runs] for v in section.variants] == [[0, 1]] * 3
    assert section.notes == ()


def test_runs_that_are_named_twice_count_once(made: Path) -> None:
    section = only(gather([made, made / "fedobd-seed0", made / ".." / "runs" / "fedobd-seed1"]))
    assert len(section.runs) == 6


def test_rounds_are_as_recorded(made: Path) -> None:
    (run,) = only(gather([made / "fedobd-seed0"])).runs
    lines = (made / "fedobd-seed0" / "rounds.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r.stage for r in run.rounds] == [1, 1, 1, 2, 2]
    for played, record in zip(run.rounds, records, strict=True):
        assert (played.uplink_bytes, played.cohort) == (
            record["uplink_bytes"],
            len(record["cohort"]),
        )
        assert sum(played.uplink_parts.values()) == record["uplink_bytes"]
        assert sum(played.downlink_parts.values()) == record["downlink_bytes"]
        assert min(played.uplink_parts.values()) >= 0
        assert min(played.downlink_parts.values()) >= 0
        assert played.train_s == record["seconds"]["train"] / len(record["clients"])
    first = records[0]["clients"]
    for block in range(len(run.schema.blocks)):
        kept = sum(block in client["blocks_kept"] for client in first)
        assert run.uploads[0, block] == kept
        assert upload_shares(run)[0, block] == kept / len(first)
        assert run.differences is not None
        assert run.differences[0, block] == pytest.approx(
            fmean(client["block_differences"][block] for client in first)
        )


def test_other_models_get_sections_of_their_own(runs: Path) -> None:
    for number in SEEDS:
        file = runs / f"fedavg-seed{number}" / "config.toml"
        file.write_text(file.read_text().replace("[model.options]", "[model.options]\nwidth = 4"))
    first, second = gather([runs])
    assert [variant.label for variant in first.variants] == ["fedavg"]
    assert first.title == second.title == "tests.toy:make_data, tests.toy:make_model"
    assert (first.settings, second.settings) == (
        "model.options.width = 4",
        "no model.options.width",
    )
    numbers = [v.number for v in (*first.variants, *second.variants)]
    assert numbers == [1, 0, 2]  # each method has its color, whatever is shown beside it


def test_options_tell_variants_of_a_method_apart(runs: Path) -> None:
    file = runs / "fedobd-seed1" / "config.toml"
    file.write_text(file.read_text().replace("dropout_rate = 0.3", "dropout_rate = 0.5"))
    labels = [variant.label for variant in only(gather([runs])).variants]
    assert labels[:2] == ["fedobd, codec.dropout_rate = 0.3", "fedobd, codec.dropout_rate = 0.5"]
    assert labels[2:] == ["fedavg", "fedpaq"]


def test_equal_runs_are_noted(runs: Path) -> None:
    shutil.copytree(runs / "fedobd-seed0", runs / "again")
    section = only(gather([runs]))
    assert section.notes == (
        "Runs again, fedobd-seed0 have the same configuration and seed 0; each counts.",
    )


def test_a_run_that_stops_on_the_test_set_is_noted(runs: Path) -> None:
    file = runs / "fedavg-seed0" / "summary.json"
    file.write_text(json.dumps({**summary_of(file.parent), "stops_on_test": True}))
    assert only(gather([runs])).notes == (
        "Run fedavg-seed0 stopped on the test set, which flatters its results.",
    )


def refusal(paths: list[Path]) -> str:
    with pytest.raises(UsageError) as caught:
        gather(paths)
    return str(caught.value)


def test_what_is_no_run_is_refused(made: Path, tmp_path: Path) -> None:
    assert refusal([]) == "no run was named; wanted at least one run folder"
    missing = tmp_path / "missing"
    assert refusal([missing]) == (
        f"run {str(missing)!r} does not exist; wanted a run folder, or a comparison's"
    )
    file = made / "config.toml"
    assert refusal([file]).startswith(f"run {str(file)!r} is a file; wanted a run folder")
    (tmp_path / "empty").mkdir()
    assert refusal([made, tmp_path / "empty"]) == (
        f"folder {str(tmp_path / 'empty')!r} is no run and holds none; wanted a run folder, with "
        "config.toml and schema.json, or a comparison's"
    )


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        (
            "rounds.jsonl",
            "{broken\n",
            "rounds.jsonl', line 1, is damaged: Expecting property name",
        ),
        ("rounds.jsonl", '{"round": 1}\n' * 5, "rounds.jsonl is damaged: KeyError"),
        ("rounds.jsonl", "[]\n" * 5, "rounds.jsonl is damaged: TypeError"),
        ("rounds.jsonl", "", "rounds.jsonl holds 0 whole rounds, and summary.json is of 5"),
        ("schema.json", "{}", "this is not a model schema"),
        ("schema.json", "\xff", "is damaged"),
        ("summary.json", "[1]", "summary.json is damaged: TypeError"),
        ("environment.json", "3", "environment.json is damaged: TypeError"),
        ("environment.json", "[]", "environment.json is damaged: TypeError: wanted an object"),
        (
            "environment.json",
            '{"packages": null}',
            "is damaged: TypeError: packages: wanted",
        ),
        ("config.toml", "method = 3", "method"),
        ("config.toml", "lambda = 3", "key 'lambda' is unknown"),
    ],
)
def test_a_damaged_run_is_refused(runs: Path, name: str, text: str, told: str) -> None:
    folder = runs / "fedobd-seed0"
    (folder / name).write_text(text, encoding="latin-1")
    message = refusal([runs])
    assert message.startswith(f"run {str(folder)!r}")
    assert told in message


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"test_metric": "x"}, "rounds.jsonl is damaged: test_metric: Input should be a valid n"),
        ({"clients": []}, "rounds.jsonl is damaged: ValueError: round 1 names no clients"),
        ({"cohort": []}, "rounds.jsonl is damaged: ValueError: round 1 names no clients"),
        ({"seconds": 3}, "rounds.jsonl is damaged: AttributeError: 'int' object has no attribute"),
    ],
)
def test_records_that_say_something_else_are_refused(
    runs: Path, change: dict[str, Any], told: str
) -> None:
    change_records(runs / "fedobd-seed0", lambda record: record.update(change))
    assert told in refusal([runs])


@pytest.mark.parametrize("name", ["final_metric", "uplink_bytes", "stops_on_test"])
def test_a_summary_that_says_something_else_is_refused(runs: Path, name: str) -> None:
    file = runs / "fedobd-seed0" / "summary.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: "abc"}))
    assert f"summary.json is damaged: {name}: Input should be a valid" in refusal([runs])


def test_a_missing_file_is_named(runs: Path) -> None:
    (runs / "fedobd-seed0" / "environment.json").unlink()
    assert refusal([runs]).endswith("environment.json is missing, which `fedobd run` writes")


def test_records_of_other_blocks_are_refused(runs: Path) -> None:
    change_records(runs / "fedobd-seed0", lambda record: record["uplink_blocks"].pop())
    assert "records name other blocks than the" in refusal([runs])


def test_a_damaged_model_is_refused(runs: Path) -> None:
    file = runs / "fedobd-seed0" / "model.safetensors"
    file.write_bytes(b"nonsense")
    with pytest.raises(UsageError, match=r"model .*fedobd-seed0.* cannot be read"):
        read_deliveries(only(gather([runs])))


def test_a_run_that_has_not_finished_is_shown_as_far_as_it_is(runs: Path) -> None:
    for seed in SEEDS:
        (runs / f"fedobd-seed{seed}" / "summary.json").unlink()
    (runs / "fedpaq-seed1" / "summary.json").unlink()
    lines = (runs / "fedobd-seed0" / "rounds.jsonl").read_text().splitlines(keepends=True)
    (runs / "fedobd-seed0" / "rounds.jsonl").write_text("".join(lines[:2]) + lines[2][:40])
    section = only(gather([runs]))
    assert section.notes == (
        "Run fedobd-seed0 has not finished: 2 of 5 planned rounds have ended; the tables take the "
        "rounds that have ended.",
        "Run fedobd-seed1 has not finished: 5 of 5 planned rounds have ended; the tables take the "
        "rounds that have ended.",
        "Run fedpaq-seed1 has not finished: 3 of 3 planned rounds have ended; the tables leave it "
        "out.",
    )
    table = summary_table(section)
    assert table.notes[0].startswith("† not finished")
    assert column(table, "method") == ["fedobd †", "fedavg", "fedpaq"]
    assert column(table, "seeds") == ["0, 1", "0, 1", "0"]
    assert column(table, "rounds") == ["2 to 5", "3", "3"]
    assert not any(cell.is_best for cell in table.rows[0])
    assert column(table, "less than\nFedAvg")[:2] == ["–", "–"]
    records = [json.loads(line) for line in lines[:2]]
    results = section.variants[0].runs[0].results
    assert results.uplink_bytes == sum(record["uplink_bytes"] for record in records)
    assert results.final_metric == records[-1]["test_metric"]
    assert section.variants[0].shown.seed == 1  # it has more rounds
    assert charts_of(section, read_deliveries(section), 1)


def test_the_figures_of_a_run_that_goes_on_are_those_of_its_rounds(runs: Path) -> None:
    folder = runs / "fedavg-seed0"
    (folder / "summary.json").unlink()
    metrics = iter([0.25, 0.75, 0.5])
    refusal = {"client": 0, "reason": "late", "message": "late", "uplink_bytes": 0}

    def change(record: dict[str, Any]) -> None:
        record["test_metric"] = next(metrics)
        record["seconds"]["round"] = float(record["round"])
        record["refusals"] = [refusal] * record["round"]

    change_records(folder, change)
    (run,) = only(gather([folder])).runs
    assert (run.results.final_metric, run.results.best_metric) == (0.5, 0.75)
    assert (run.results.round_s, run.results.refusals) == (1 + 2 + 3, 1 + 2 + 3)


def test_the_figures_of_a_run_that_has_ended_are_those_of_its_summary(runs: Path) -> None:
    file = runs / "fedobd-seed0" / "summary.json"
    values = json.loads(file.read_text())
    values |= {"final_metric": 0.5, "best_metric": 0.75, "broadcast_metric": 0.25, "refusals": 9}
    file.write_text(json.dumps(values))
    results = only(gather([file.parent])).runs[0].results
    assert (results.final_metric, results.best_metric, results.refusals) == (0.5, 0.75, 9)


def test_broadcasts_go_to_the_whole_cohort_and_again_to_those_that_lost_them(runs: Path) -> None:
    """One of four clients was refused with 7 bytes, another was sent its broadcast twice."""
    folder = runs / "fedavg-seed0"

    def change(record: dict[str, Any]) -> None:
        refused = record["clients"].pop()
        record["uplink_bytes"] += 7 - refused["uplink_bytes"]
        record["reopened"] = [record["cohort"][0]]
        record["downlink_bytes"] += sum(record["broadcast"][part] for part in PARTS[:4])

    change_records(folder, change)
    played = only(gather([folder])).runs[0].rounds[0]
    record = json.loads((folder / "rounds.jsonl").read_text().splitlines()[0])
    assert (played.cohort, played.clients, played.broadcasts) == (4, 3, 5)
    assert played.uplink_parts["refused or repeated"] == 7
    assert played.downlink_parts["refused or repeated"] == 0
    for part in PARTS[:4]:
        assert played.downlink_parts[part] == 5 * record["broadcast"][part]


def test_a_run_without_a_round_is_left_out(runs: Path) -> None:
    for seed in SEEDS:
        (runs / f"fedobd-seed{seed}" / "summary.json").unlink()
    (runs / "fedobd-seed0" / "rounds.jsonl").unlink()
    (runs / "fedobd-seed1" / "rounds.jsonl").write_text('{"round": 1')
    section = only(gather([runs]))
    assert [variant.label for variant in section.variants] == ["fedavg", "fedpaq"]
    assert section.notes == (
        "Run fedobd-seed0 is left out: no round of it has ended.",
        "Run fedobd-seed1 is left out: no round of it has ended.",
    )
    assert refusal([runs / "fedobd-seed0"]).startswith("no round has ended in ")


# tables


def test_the_summary_is_that_of_the_runs(made: Path) -> None:
    table = summary_table(only(gather([made])))
    for row, method in enumerate(METHODS):
        found = [summary_of(made / f"{method}-seed{seed}") for seed in SEEDS]
        finals = [summary["final_metric"] for summary in found]
        assert column(table, "test accuracy\nfinal")[row] == (
            f"{fmean(finals):.4f}{PLUS_MINUS}{stdev(finals):.4f}"
        )
        totals = [summary["total_bytes"] / 1e6 for summary in found]
        digits = 2 if fmean(totals) >= 0.1 else 5
        assert column(table, "sent\ntotal, MB")[row] == (
            f"{fmean(totals):.{digits}f}{PLUS_MINUS}{stdev(totals):.{digits}f}"
        )
    totals = [
        fmean(summary_of(made / f"{m}-seed{s}")["total_bytes"] for s in SEEDS) for m in METHODS
    ]
    number = table.head.index("sent\ntotal, MB")
    assert [row[number].is_best for row in table.rows] == [t == min(totals) for t in totals]
    assert column(table, "less than\nFedAvg") == [
        f"{100 * (1 - totals[0] / totals[1]):.1f} %",
        "–",
        f"{100 * (1 - totals[2] / totals[1]):.1f} %",
    ]


def test_the_headline_is_what_fedobd_saved_and_reached(runs: Path) -> None:
    (section,) = gather([runs])
    found = {m: [summary_of(runs / f"{m}-seed{s}") for s in SEEDS] for m in METHODS}
    total = {m: fmean(own["total_bytes"] for own in found[m]) for m in METHODS}
    final = {m: fmean(own["final_metric"] for own in found[m]) for m in METHODS}
    less = 100 * (1 - total["fedobd"] / total["fedavg"])
    assert headline(section) == (
        f"fedobd sent {total['fedobd'] / 1e3:.2f} kB, {less:.1f} % less than the "
        f"{total['fedavg'] / 1e3:.2f} kB of fedavg, and ends with test accuracy "
        f"{final['fedobd']:.4f}, where fedavg ends with {final['fedavg']:.4f}."
    )
    alone = headline(only(gather([runs / "fedavg-seed0"])))
    assert re.fullmatch(r"fedavg sent [\d.]+ kB, and ends with test accuracy 0\.\d{4}\.", alone)
    (runs / "fedavg-seed0" / "summary.json").unlink()
    assert " sent " in headline(only(gather([runs / "fedavg-seed0"])))
    assert "so far" in headline(only(gather([runs / "fedavg-seed0"])))


def test_folders_of_one_name_are_told_apart(runs: Path) -> None:
    again = shutil.copytree(runs / "fedavg-seed0", runs.parent / "again" / "fedavg-seed0")
    section = only(gather([runs / "fedavg-seed0", again]))
    assert column(run_table(section), "folder") == ["again/fedavg-seed0", "runs/fedavg-seed0"]
    assert section.notes == (
        "Runs again/fedavg-seed0, runs/fedavg-seed0 have the same configuration and seed 0; each "
        "counts.",
    )
    chart = accuracy_chart(section)
    assert chart is not None
    names = [point["line"] for point in points_of(chart.views[0, 0]) if point["round"] == 1]
    assert names == ["fedavg, seed 0", "fedavg, seed 0", "fedavg"]  # both runs, and their mean


def test_the_mean_line_is_of_the_runs_that_the_tables_count(runs: Path) -> None:
    cut = runs / "fedavg-seed1"
    (cut / "summary.json").unlink()
    lines = (cut / "rounds.jsonl").read_text().splitlines(keepends=True)
    (cut / "rounds.jsonl").write_text(lines[0])
    plot = accuracy_chart(only(gather([runs / "fedavg-seed0", cut])))
    assert plot is not None
    mean = [point for point in points_of(plot.views[3, 0]) if point["mean"]]
    assert [point["rounds"] for point in mean] == [1, 2, 3]


def test_a_single_run_has_neither_spread_nor_best(made: Path) -> None:
    table = summary_table(only(gather([made / "fedobd-seed1"])))
    (row,) = table.rows
    summary = summary_of(made / "fedobd-seed1")
    assert column(table, "test accuracy\nfinal") == [f"{summary['final_metric']:.4f}"]
    assert not any(cell.is_best for cell in row)
    assert not any("±" in cell.text for cell in row)
    assert not any(name.startswith("less") for name in table.head)


def test_every_run_has_a_row(made: Path) -> None:
    table = run_table(only(gather([made])))
    assert column(table, "folder") == [f"{m}-seed{s}" for m in METHODS for s in SEEDS]
    assert column(table, "rounds") == ["5 of 5"] * 2 + ["3 of 3"] * 4
    assert set(column(table, "finished")) == {"yes"}


def test_time_over_a_link_is_transfers_and_training(made: Path) -> None:
    section = only(gather([made / "fedobd-seed0"]))
    (run,) = section.runs
    first = run.rounds[0]
    assert first.train_s is not None
    transfer = 8 * (first.downlink_bytes + first.uplink_bytes) / 2 / 1e6
    assert round_seconds(first, 1e6) == pytest.approx(transfer + first.train_s)
    assert run_seconds(run, 1e6) == pytest.approx(sum(round_seconds(r, 1e6) for r in run.rounds))
    table = link_table(section)
    assert len(table.head) == 1 + 8 + 3
    assert "at the same time, each on a link of its own" in table.notes[0]
    assert table.rows[0][2].text == f"{run_seconds(run, 1e6):.2f} s"
    untimed = replace(run, rounds=tuple(replace(r, train_s=None) for r in run.rounds))
    assert train_seconds(untimed) is None
    without = replace(section.variants[0], runs=(untimed,))
    assert link_table(replace(section, variants=(without,))).rows[0][9].text == "not measured"
    both = link_table(replace(section, variants=(without, replace(section.variants[0], number=1))))
    best = [[cell.is_best for cell in row[2:9:2]] for row in both.rows]
    assert best == [[False] * 4, [True] * 4]  # though the first, without its training, is shorter
    assert "times are those of the transfers alone" in both.notes[-1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.5, "0.50 s"), (59.94, "59.9 s"), (90, "1.5 min"), (5400, "1.5 h"), (216000, "2.5 d")],
)
def test_durations_have_the_unit_that_suits_them(made: Path, seconds: float, text: str) -> None:
    section = only(gather([made / "fedavg-seed0"]))
    (run,) = section.runs
    still = replace(run.rounds[0], uplink_bytes=0, downlink_bytes=0, train_s=seconds)
    variant = replace(section.variants[0], runs=(replace(run, rounds=(still,)),))
    assert link_table(replace(section, variants=(variant,))).rows[0][9].text == text


def test_blocks_are_a_table(made: Path) -> None:
    section = only(gather([made]))
    deliveries = read_deliveries(section)
    table = block_table(section.variants[0], deliveries["fedobd"])
    run = section.variants[0].shown
    assert column(table, "block") == [f"{n} {b.name}" for n, b in enumerate(run.schema.blocks)]
    sent, held = run.uplink.num_bytes.sum(axis=0), run.uplink.payloads.sum(axis=0)
    for number, block in enumerate(run.schema.blocks):
        if held[number]:
            bits = 8 * sent[number] / (held[number] * block.num_parameters)
            assert column(table, "up\nreal bits")[number] == f"{bits:.2f}"
    assert "delivery\nentropy" in table.head
    plain_table = block_table(section.variants[1], deliveries["fedavg"])
    assert "delivery\nentropy" not in plain_table.head
    assert set(column(plain_table, "down\nlevels s")) == {"–"}
    assert set(column(plain_table, "uploads\nin stage 1")) == {"12 of 12"}
    assert run.differences is not None
    means = run.differences[run.in_stage(1)].mean(axis=0)
    assert column(table, "mean block\ndifference") == [f"{mean:.3g}" for mean in means]
    assert "mean block\ndifference" not in plain_table.head


def test_versions_that_differ_stand_beside_each_other(runs: Path) -> None:
    file = runs / "fedavg-seed1" / "environment.json"
    values = json.loads(file.read_text())
    started = values["started"]
    values["python"], values["started"] = "3.99", "2999-01-01"
    file.write_text(json.dumps(values))
    rows = {row[0].text: row[1].text for row in environment_table(only(gather([runs]))).rows}
    assert rows["python"].endswith(", 3.99")
    assert rows["started"].endswith(" to 2999-01-01")
    assert started[:4] in rows["started"]
    assert rows["cuda"] == "–" or rows["cuda"]


def test_commands_run_it_again(runs: Path) -> None:
    renamed = (runs / "fedobd-seed0").rename(runs / "it's mine")
    (first, *_) = reproductions(only(gather([renamed])))
    assert first["toml"] == (renamed / "config.toml").read_text()
    assert first["commands"] == [
        f"fedobd run '{renamed.parent}/it'\"'\"'s mine/config.toml' "
        "--output 'it'\"'\"'s mine-again'",
    ]


# bits of the delivery


def parsed_delivery(run: Run) -> Payload:
    """Encode the trained model as the server does, through the sessions."""
    server = ServerSession(
        run.config.chosen, run.schema, load_file(run.model_file), num_clients=4, seed=run.seed
    )
    return Payload.parse(server.delivery().data, run.schema)


def test_the_delivery_is_that_of_the_server(made: Path) -> None:
    (run,) = only(gather([made / "fedobd-seed0"])).runs
    bits = delivery_bits(run)
    assert bits is not None
    assert bits.entropy is not None
    payload = parsed_delivery(run)
    codes = {(number, segment): code for number, segment, code in payload.codes()}
    total = 0.0
    for number, segments in payload.blocks():
        entropy, count = 0.0, 0
        for decoded in segments:
            code = codes[number, decoded.segment]
            is_parameter = run.schema.tensors[decoded.segment.tensor].role is Role.PARAMETER
            if is_parameter and code.coding is Coding.LEVELS:
                step = code.range / code.num_levels
                levels = np.rint((decoded.values.numpy() - code.offset) / step)
                _, counts = np.unique(levels, return_counts=True)
                shares = counts / levels.size
                entropy += -(shares * np.log2(shares)).sum() * levels.size
                count += levels.size
        assert bits.entropy[number] == pytest.approx(entropy / count)
        assert bits.nominal[number] >= bits.entropy[number]
        total += bits.real[number] * count / 8
    assert total == pytest.approx(payload.num_bytes.levels)


def test_without_quantized_broadcasts_or_a_model_there_are_no_delivery_bits(runs: Path) -> None:
    (runs / "fedobd-seed0" / "model.safetensors").unlink()
    section = only(gather([runs / "fedobd-seed0", runs / "fedpaq-seed0"]))
    assert dict(read_deliveries(section)) == {"fedobd": None, "fedpaq": None}


# plots


def points_of(view: View) -> list[dict[str, Any]]:
    """Return the rows of a view's one data set of points."""
    return rows_of(view.data["points"])


def texts_of(columns: Columns, name: str) -> tuple[str, ...]:
    labels = columns[name]
    assert isinstance(labels, Labels)
    return labels.texts


def test_arrays_travel_as_the_page_reads_them() -> None:
    for values, kind in (([1.5, 2], "f4"), ([1, 2, 70_000], "i4"), ([0, 255], "u1"), ([3], "f8")):
        sent = _typed(np.array(values, f">{kind}"))
        assert sent["type"] == kind
        assert np.frombuffer(base64.b64decode(sent["data"]), f"<{kind}").tolist() == values


def test_rows_are_those_of_the_columns() -> None:
    columns: Columns = {"a": np.array([1.5, np.nan]), "b": Labels(("x", "y"), np.array([1, 0]))}
    assert rows_of(columns) == [{"a": 1.5, "b": "y"}, {"a": None, "b": "x"}]


def fields_of(spec: Any) -> Iterator[str]:
    """Yield the columns that a specification names."""
    if isinstance(spec, dict):
        yield from (value for key, value in spec.items() if key == "field")
        yield from (name for value in spec.values() for name in fields_of(value))
    elif isinstance(spec, list):
        yield from (name for value in spec for name in fields_of(value))


def test_every_view_is_one_that_vega_lite_draws(made: Path) -> None:
    vl_convert = pytest.importorskip("vl_convert")
    section = only(gather([made]))
    charts = charts_of(section, read_deliveries(section), 1)
    names = [chart.name for chart in charts]
    assert names == ["accuracy", "traffic", "uploads", "bits", "levels"]
    for chart in charts:
        counts = [len(switch.options) for switch in chart.switches]
        assert sorted(chart.views) == sorted(np.ndindex(*counts))
        for view in chart.views.values():
            columns = {name for data in view.data.values() for name in data}
            assert set(fields_of(view.spec)) <= columns | {"low", "high"}  # of a stack
            for data in view.data.values():
                lengths = {len(rows_of({name: values})) for name, values in data.items()}
                assert len(lengths) == 1
        shown = next(iter(chart.views.values()))
        rows = {name: rows_of(columns) for name, columns in shown.data.items()}
        parameters = [{"name": "paper", "value": "white"}]
        svg = vl_convert.vegalite_to_svg({**shown.spec, "datasets": rows, "params": parameters})
        assert svg.count("<path") > 5


def test_curves_add_up_what_was_sent(made: Path) -> None:
    (run,) = only(gather([made / "fedobd-seed0"])).runs
    summary = summary_of(made / "fedobd-seed0")
    curve = curve_of(run)
    total, up, down, rounds = curve.sent
    assert list(MEASURES) == ["total", "up", "down", "rounds"]
    assert total[-1] == pytest.approx(summary["total_bytes"] / 1e6)
    assert up[-1] == pytest.approx(summary["uplink_bytes"] / 1e6)
    assert down[-1] == pytest.approx(summary["downlink_bytes"] / 1e6)
    assert rounds.tolist() == [1, 2, 3, 4, 5]
    assert curve.metric[-1] == summary["final_metric"]
    assert curve.stage.tolist() == [1, 1, 1, 2, 2]


def test_the_mean_of_curves_leaves_out_rounds_of_different_stages() -> None:
    numbers = np.arange(4.0)
    sent = np.tile(numbers, (4, 1))
    long = Curve(sent, np.array([0.0, 1, 2, 3]), numbers, np.array([1.0, 1, 2, 2]))
    short = Curve(sent[:, :3] + 2, np.array([2.0, 3, 4]), numbers[:3], np.array([1.0, 2, 2]))
    mean, spread = mean_curve([long, short])
    assert (mean.sent.tolist(), mean.metric.tolist()) == ([[1, 3]] * 4, [1, 3])
    assert (mean.number.tolist(), mean.stage.tolist()) == ([0, 2], [1, 2])
    assert spread == pytest.approx([stdev([0, 2]), stdev([2, 4])])
    assert mean_curve([long])[1].tolist() == [0, 0, 0, 0]


def test_accuracy_shows_means_seeds_and_stages(made: Path) -> None:
    plot = accuracy_chart(only(gather([made])))
    assert plot is not None
    points = points_of(plot.views[0, 0])
    assert list(dict.fromkeys(p["line"] for p in points if p["mean"])) == list(METHODS)
    assert "thick lines are means over the seeds" in plot.caption
    assert "open ones stage 2" in plot.caption
    mean = [point for point in points if point["line"] == "fedobd"]
    assert [(p["round"], p["stage"]) for p in mean] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)]
    runs = [[p for p in points if p["line"] == f"fedobd, seed {seed}"] for seed in SEEDS]
    for both, point in zip(zip(*runs, strict=True), mean, strict=True):
        metrics = [single["metric"] for single in both]
        assert point["metric"] == pytest.approx(fmean(metrics))
        assert point["high"] - point["metric"] == pytest.approx(stdev(metrics), abs=1e-6)
        assert point["total"] == pytest.approx(fmean(single["total"] for single in both))


def test_marks_are_few_and_show_where_stage_2_begins() -> None:
    marks = _curves._marks(np.array([1.0] * 97 + [2.0] * 3))
    assert 10 <= marks.sum() <= 13
    assert marks[97]
    assert _curves._marks(np.array([1.0])).tolist() == [True]


def test_many_points_are_thinned(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = only(gather([made / "fedobd-seed0"]))
    monkeypatch.setattr(_curves, "MOST_POINTS", 3)
    plot = accuracy_chart(section)
    assert plot is not None
    assert [point["round"] for point in points_of(plot.views[0, 0])] == [1, 3, 5]
    assert plot.caption.endswith(" One of 2 rounds is drawn.")


def test_a_single_accuracy_has_an_axis_around_it(runs: Path) -> None:
    for folder in runs.glob("*-seed*"):
        change_records(folder, lambda record: record.update(test_metric=1.0))
        summary = json.loads((folder / "summary.json").read_text())
        summary["final_metric"] = 1.0
        (folder / "summary.json").write_text(json.dumps(summary))
    plot = accuracy_chart(only(gather([runs])))
    assert plot is not None
    y = plot.views[0, 0].spec["layer"][0]["encoding"]["y"]
    assert y["scale"] == {"domain": [0.95, 1.05]}


def test_parts_and_rounds_are_tables(made: Path) -> None:
    section = only(gather([made]))
    table = part_table(section)
    assert [row[0].text for row in table.rows[:2]] == ["fedobd, up", "fedobd, down"]
    runs = section.variants[0].counted
    levels = sum(r.uplink_parts["levels"] for run in runs for r in run.rounds) / len(runs)
    assert column(table, "levels")[0] == format_bytes(levels)
    rounds = round_table(section.variants[0], section.metric)
    shown = section.variants[0].shown
    assert column(rounds, "round") == ["1", "2", "3", "4", "5"]
    counts = [list(map(int, text.split())) for text in column(rounds, "uploads by block")]
    assert counts == shown.uploads.tolist()


def test_stacks_add_up_to_what_was_measured(made: Path) -> None:
    for folder in ("fedobd-seed0", "fedpaq-seed1"):
        (run,) = only(gather([made / folder])).runs
        for stacks in (_traffic.stack_by_block(run), _traffic.stack_by_part(run)):
            for stack, direction in zip(stacks, ("uplink", "downlink"), strict=True):
                total = sum(values for _, _, values in stack)
                wanted = [getattr(played, f"{direction}_bytes") for played in run.rounds]
                assert np.asarray(total).tolist() == wanted
                assert all((values >= 0).all() for _, _, values in stack)


def test_rounds_show_what_was_sent_of_each_block(made: Path) -> None:
    section = only(gather([made / "fedobd-seed0"]))
    view = _traffic.traffic_chart(section, 2).views[0, 0]
    (run,) = section.runs
    for way, stack in zip(("up", "down"), _traffic.stack_by_block(run), strict=True):
        rows = rows_of(view.data[way])
        assert [row["bytes"] for row in rows] == [
            values[index] for _, _, values in stack for index in (0, 2, 4)
        ]
        assert [(row["left"], row["round"], row["right"]) for row in rows[:3]] == [
            (0.5, 1, 2),
            (2, 3, 4),
            (4, 5, 5.5),
        ]
        assert texts_of(view.data[way], "name") == tuple(name for name, _, _ in stack)


def test_more_bytes_than_4_bytes_count_are_whole() -> None:
    from fedobd.report._chart import byte_column

    assert byte_column([[2**31 - 1], [1]]).dtype == np.int32
    assert byte_column([2.0**31 + 1]).tolist() == [2**31 + 1]


@pytest.mark.parametrize(
    ("uploads", "drops"),
    [
        (
            [[5, 5, 5], [5, 5, 5], [10, 10, 10]],
            False,
        ),  # a larger cohort, and all blocks
        ([[5, 0, 5], [5, 0, 5]], True),  # a block that nobody sends
        ([[5, 5, 5], [5, 4, 5]], True),
    ],
)
def test_blocks_are_dropped_where_a_round_has_more_of_one_than_of_another(
    uploads: list[list[int]], drops: bool, made: Path
) -> None:
    variant = only(gather([made / "fedobd-seed0"])).variants[0]
    run = replace(variant.runs[0], uploads=np.array(uploads))
    assert drops_blocks(replace(variant, runs=(run,))) is drops


def test_the_map_shows_who_uploaded_what(made: Path) -> None:
    section = only(gather([made]))
    plot = upload_map(section, 1)
    assert plot is not None
    assert plot.switches[0].options == ("fedobd, seed 0", "fedobd, seed 1")
    assert "Not shown: fedavg, fedpaq, where all upload every block." in plot.caption
    view = plot.views[1,]
    run = section.variants[0].counted[1]
    cells = rows_of(view.data["cells"])
    assert [cell["clients"] for cell in cells] == run.uploads.T.ravel().tolist()
    shares = np.round(100 * upload_shares(run).T)
    assert [cell["share"] for cell in cells] == shares.ravel().tolist()
    assert run.differences is not None
    differences = [cell["difference"] for cell in cells]
    assert differences == pytest.approx(run.differences.T.ravel())
    (stage,) = rows_of(view.data["stages"])
    assert stage["border"] == 3.5  # stage 2 begins with round 4
    sizes = [label.rpartition(" · ")[2] for label in texts_of(view.data["cells"], "name")]
    assert sizes == [f"{block.num_parameters:,}" for block in run.schema.blocks]
    without = only(gather([made / "fedavg-seed0"]))
    assert upload_map(without, 1) is None
    assert list(left_out(without)) == [
        "Every client uploaded every block in every round, so there is no picture of it."
    ]


def test_levels_are_shown_of_what_is_quantized(made: Path) -> None:
    section = only(gather([made]))
    plot = levels_chart(section, 1)
    assert plot is not None
    assert plot.switches[0].options == ("fedobd, up", "fedobd, down", "fedpaq, up")
    run = section.variants[0].shown
    sent = [point["levels"] for point in points_of(plot.views[1,]) if point["name"][0] == "0"]
    assert sent == pytest.approx(run.downlink.levels[:, 0])
    assert levels_chart(only(gather([made / "fedavg-seed0"])), 1) is None


def test_a_missing_model_is_named_where_its_delivery_would_be_shown(runs: Path) -> None:
    for folder in runs.glob("*-seed*"):
        (folder / "model.safetensors").unlink()
    assert list(left_out(only(gather([runs])))) == [
        "The trained model of fedobd is missing: bits of its delivery and their entropy are left "
        "out."
    ]


def test_without_a_test_set_there_are_no_curves(runs: Path) -> None:
    for folder in runs.glob("*-seed*"):
        change_records(folder, lambda record: record.update(test_metric=None))
        values = {**summary_of(folder), "final_metric": None, "best_metric": None}
        (folder / "summary.json").write_text(json.dumps(values))
    section = only(gather([runs]))
    assert accuracy_chart(section) is None
    assert next(left_out(section)).startswith("Nothing was tested on the server")
    table = summary_table(section)
    assert set(column(table, "test accuracy\nfinal")) == {"–"}
    assert set(column(table, "test accuracy\nbest")) == {"–"}


def never(block: int) -> Callable[[dict[str, Any]], None]:
    def drop(record: dict[str, Any]) -> None:
        for client in record["clients"]:
            if record["stage"] == 1 and block in client["blocks_kept"]:
                client["blocks_kept"].remove(block)

    return drop


def test_a_block_that_was_never_uploaded_is_warned_of(runs: Path) -> None:
    for seed in SEEDS:
        change_records(runs / f"fedobd-seed{seed}", never(0))
    first, second, _ = only(gather([runs])).variants
    schema = ModelSchema.from_json(json.loads((runs / "fedobd-seed0/schema.json").read_text()))
    block = schema.blocks[0]
    share = f"{100 * block.num_parameters / schema.num_parameters:.1f} %"
    text = warning(first)
    assert text is not None
    assert text.startswith("fedobd: clients left out some blocks in stage 1")
    assert f"Seeds 0, 1: no client uploaded blocks {block.name} ({share}), " in text
    assert "model.blocks.max_block_fraction, lower dropout_rate" in text
    assert warning(second) is None


def test_large_reports_draw_fewer_rounds(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sections = gather([made])
    assert drawing_step(sections) == 1
    cells = sum(variant.shown.uploads.size for variant in sections[0].variants)
    monkeypatch.setattr("fedobd.report._content.MOST_CELLS", cells / 1.5)
    assert drawing_step(sections) == 2
    plot = upload_map(sections[0], 2)
    assert plot is not None
    drawn = {cell["round"] for cell in rows_of(plot.views[0,].data["cells"])}
    assert sorted(drawn) == [1, 3, 5]
    assert plot.caption.endswith(" One of 2 rounds is drawn.")
    assert (thin(5, 1), thin(6, 2), thin(1, 3)) == ([0, 1, 2, 3, 4], [0, 2, 4, 5], [0])


def test_long_names_are_shown_by_their_end() -> None:
    assert shorten("encoder.layer.11.attention", 12) == "…1.attention"
    assert len(shorten("x" * 50, 20)) == 20
    assert shorten("short") == "short"


def luminance(color: str) -> float:
    parts = [part / 255 for part in bytes.fromhex(color[1:])]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def colors() -> Iterator[str]:
    yield from (*COLORS, *_traffic.PART_COLORS, *block_colors(40))


@pytest.mark.parametrize("page", ["#ffffff", "#14181d"])
def test_colors_stand_out_on_both_pages(page: str) -> None:
    for color in colors():
        high, low = sorted((luminance(color), luminance(page)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 3, color


def test_no_two_of_64_lines_look_alike() -> None:
    looks = [look(number) for number in range(64)]
    assert len(set(looks)) == 64
