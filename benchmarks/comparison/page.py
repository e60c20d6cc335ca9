"""The page of results: tables and figures from the records, and nothing by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import figures
from plan import ABLATIONS, COARSE, LARGE_MODEL, SEEDS, SMALL, SWEPT, plan, weight_variant
from records import ROOT, read_record

PAGE = ROOT / "docs" / "results.md"
NOTES = ROOT / "docs" / "results-notes.md"
Record = dict[str, Any]

TITLES = {
    "cifar10-small": "CIFAR-10 (15,000 training images)",
    "cifar100-small": "CIFAR-100 (15,000 training images)",
    "imdb-small": "IMDB",
    LARGE_MODEL: "MiniLM-L6 on IMDB, fine-tuned",
}
NAMES = {
    "fedobd": "FedOBD",
    "fedavg": "FedAvg, all clients",
    "fedavg-cohort": "FedAvg",
    "fedpaq": "FedPAQ",
    "feddropoutavg": "FedDropoutAvg",
    "smafd": "SMAFD",
}
DIRICHLET = "dirichlet-"
"""How the variants with unequal clients begin."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What is shown of one variant over its seeds.

    Args:
        variant: which.
        final: test accuracies after the last round that is looked at.
        best: best ones up to there.
        uplink, downlink: bytes up to there.
        seconds: wall-clock seconds up to there.
        is_part: whether final accuracies are on a part of the test set, as between rounds.
    """

    variant: str
    final: list[float]
    best: list[float]
    uplink: list[int]
    downlink: list[int]
    seconds: list[float]
    is_part: bool

    @property
    def total_bytes(self) -> float:
        """Mean bytes of both directions."""
        return fmean(self.uplink) + fmean(self.downlink)

    @property
    def accuracy(self) -> float:
        """Mean final accuracy."""
        return fmean(self.final)


def records() -> dict[tuple[str, str], list[Record]]:
    """Return all records by preset and variant, in the order of their seeds."""
    found: dict[tuple[str, str], list[Record]] = {}
    for run in plan():
        record = read_record(run)
        if record is not None:
            found.setdefault((run.preset, run.variant), []).append(record)
    return found


def collect(variant: str, found: list[Record], rounds: int | None = None) -> Figures:
    """Return the figures of a variant, of so many rounds; None for all."""
    final, best, uplink, downlink, seconds = [], [], [], [], []
    is_part = False
    for record in found:
        past = record["rounds"] if rounds is None else record["rounds"][:rounds]
        tested = [r["test_metric"] for r in past if r["test_metric"] is not None]
        if len(past) == len(record["rounds"]):
            tested.append(record["summary"]["final_metric"])
        else:
            is_part |= record["config"]["output"].get("evaluate_examples") is not None
        final.append(tested[-1])
        best.append(max(tested))
        uplink.append(sum(r["uplink_bytes"] for r in past))
        downlink.append(sum(r["downlink_bytes"] for r in past))
        seconds.append(sum(r["seconds"]["round"] for r in past))
    return Figures(variant, final, best, uplink, downlink, seconds, is_part)


def spread(values: list[float]) -> str:
    """Return mean ± standard deviation of a sample."""
    deviation = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{fmean(values):.4f}{deviation}"


def table(rows: list[Figures], reference: Figures | None, baseline: Figures | None) -> str:
    """Return a table of variants, with the reduction against two of them, and its footnote."""
    others = [] if reference is None else [(reference, "")]
    if baseline is not None and baseline is not reference:
        others.append((baseline, ", the most accurate"))
    head = ["", "seeds", "final accuracy", "best", "up MB", "down MB", "total MB"]
    head += [f"less than {_name(other)}{what}" for other, what in others]
    lines = [_line([*head, "s a run"]), _line(["---"] * (len(head) + 1))]
    for row in rows:
        cells = [
            _name(row),
            str(len(row.final)),
            spread(row.final) + (" \\*" if row.is_part else ""),
            spread(row.best),
            f"{fmean(row.uplink) / 1e6:.2f}",
            f"{fmean(row.downlink) / 1e6:.2f}",
            f"{row.total_bytes / 1e6:.2f}",
        ]
        for other, _ in others:
            less = 1 - row.total_bytes / other.total_bytes
            cells.append("–" if row is other else f"{100 * less:.1f} %")
        lines.append(_line([*cells, f"{fmean(row.seconds):.0f}"]))
    if any(row.is_part for row in rows):
        lines += [
            "",
            "\\* Of a run that goes on, tested on the part of the test set that is tested on "
            "between rounds, as are the best figures.",
        ]
    return "\n".join(lines)


def _name(row: Figures) -> str:
    variant = row.variant.removeprefix(DIRICHLET)
    return NAMES.get(variant, variant)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write() -> None:
    """Write the page and its figures."""
    found = records()
    parts = [
        "# Results on real data",
        "Made by `make results` from the records in `benchmarks/comparison/records`; nothing in "
        "the tables is written by hand. Mean ± standard deviation over the seeds. Bytes are "
        "`len()` of payloads that were encoded and decoded, initial payloads included.",
    ]
    if NOTES.exists():
        parts.append(NOTES.read_text(encoding="utf-8").strip())
    for preset in SMALL:
        parts += _preset(preset, found)
    parts += _large_model(found)
    parts += _ablations(found)
    parts += _dirichlet(found)
    parts += _sweeps(found)
    parts += _provenance(found)
    PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


def _preset(preset: str, found: dict[tuple[str, str], list[Record]]) -> Iterator[str]:
    mine = {variant: rs for (name, variant), rs in found.items() if name == preset}
    if "fedobd" not in mine:
        return
    yield f"## {TITLES[preset]}: `{preset}`"
    published = mine["fedobd"][0]["config"]["methods"]["fedobd"]["stage_one_rounds"]
    as_published = [collect("fedobd", mine["fedobd"])]
    for variant in ("fedavg", "fedpaq", "feddropoutavg", "smafd"):
        if variant in mine:
            as_published.append(collect(variant, mine[variant], published))
    yield (
        f"**As published**: FedAvg on all clients, the other baselines on FedOBD's cohort, "
        f"{published} rounds; FedOBD as many rounds of stage 1, and stage 2."
    )
    yield table(as_published, _of(as_published, "fedavg"), _best(as_published))
    equal = [collect("fedobd", mine["fedobd"])]
    for variant in ("fedavg-cohort", "fedpaq", "feddropoutavg", "smafd"):
        if variant in mine:
            equal.append(collect(variant, mine[variant]))
    if len(equal) > 1:
        yield (
            "**At equal participation**: every baseline on FedOBD's cohort, with further rounds "
            "until it has had as many client-epochs as FedOBD with its stage 2."
        )
        yield table(equal, _of(equal, "fedavg-cohort"), _best(equal))
    named = [(NAMES[v], rs) for v, rs in mine.items() if v in NAMES]
    yield figures.accuracy_by_bytes(preset, named)
    variants = [(v, mine[v]) for v in ("fedobd", "larger-parts", "whole-blocks") if v in mine]
    yield figures.uploads(preset, variants)


def _of(rows: list[Figures], variant: str) -> Figures | None:
    return next((row for row in rows if row.variant == variant), None)


def _best(rows: list[Figures]) -> Figures | None:
    """Return the most accurate baseline."""
    return max(rows[1:], key=lambda row: (row.accuracy, -row.total_bytes), default=None)


def _large_model(found: dict[tuple[str, str], list[Record]]) -> Iterator[str]:
    rows = [
        collect(variant, found[LARGE_MODEL, variant])
        for variant in ("fedobd", "fedavg", "fedpaq")
        if (LARGE_MODEL, variant) in found
    ]
    if rows:
        yield f"## {TITLES[LARGE_MODEL]}: `{LARGE_MODEL}`"
        yield table(rows, _of(rows, "fedavg"), None)


def _ablations(found: dict[tuple[str, str], list[Record]]) -> Iterator[str]:
    for preset in SMALL:
        rows = _rows(found, preset, ("fedobd", *ABLATIONS, weight_variant(COARSE[preset])))
        if len(rows) > 1:
            yield f"## Ablations of FedOBD on `{preset}`"
            yield table(rows, rows[0], None)


def _dirichlet(found: dict[tuple[str, str], list[Record]]) -> Iterator[str]:
    rows = _rows(found, SWEPT, tuple(f"{DIRICHLET}{name}" for name in NAMES))
    if rows:
        yield f"## Unequal clients: Dirichlet 0.5 on `{SWEPT}`, as published"
        yield table(rows, _of(rows, f"{DIRICHLET}fedavg"), _best(rows))


def _sweeps(found: dict[tuple[str, str], list[Record]]) -> Iterator[str]:
    base = found.get((SWEPT, "fedobd"))
    if base is None:
        return
    sweeps: tuple[tuple[tuple[str, ...], str, Callable[[Record], float]], ...] = (
        (
            ("dropout-", "no-dropout"),
            "λ, the dropout rate",
            lambda codec: 0 if codec["selection"] == "none" else codec["dropout_rate"],
        ),
        (
            ("weight-",),
            "β, the weight of bits, both directions",
            lambda codec: codec["uplink_weight"],
        ),
    )
    for prefixes, title, value in sweeps:
        some = [
            rs[0]
            for (preset, variant), rs in found.items()
            if preset == SWEPT and variant.startswith(prefixes)
        ]
        if not some:
            continue
        chosen = sorted([*some, base[0]], key=lambda r: value(_codec(r)))
        lines = [
            _line([title, "final accuracy", "up MB", "down MB", "total MB"]),
            _line(["---"] * 5),
        ]
        for record in chosen:
            figures_of = collect("", [record])
            lines.append(
                _line(
                    [
                        f"{value(_codec(record)):g}",
                        f"{figures_of.accuracy:.4f}",
                        f"{fmean(figures_of.uplink) / 1e6:.2f}",
                        f"{fmean(figures_of.downlink) / 1e6:.2f}",
                        f"{figures_of.total_bytes / 1e6:.2f}",
                    ]
                )
            )
        yield f"## Sweep over {title.partition(',')[0]} on `{SWEPT}`, seed {SEEDS[0]}"
        yield "\n".join(lines)


def _codec(record: Record) -> Record:
    codec: Record = record["config"]["methods"]["fedobd"]["codec"]
    return codec


def _rows(
    found: dict[tuple[str, str], list[Record]], preset: str, variants: tuple[str, ...]
) -> list[Figures]:
    return [
        collect(variant, found[preset, variant])
        for variant in variants
        if (preset, variant) in found
    ]


def _provenance(found: dict[tuple[str, str], list[Record]]) -> Iterator[str]:
    """Say with what each preset's runs were made."""
    lines = [
        _line(["preset", "runs", "commits", "dates", "machine", "seconds", "not learning"]),
        _line(["---"] * 7),
    ]
    for preset in (*SMALL, LARGE_MODEL):
        mine = [record for (name, _), rs in found.items() if name == preset for record in rs]
        if not mine:
            continue
        environment = mine[0]["environment"]
        machine = (
            f"{environment['cpus']} cores of {environment['cpu']}, Python "
            f"{environment['python']}, torch {environment['packages']['torch']}"
        )
        lines.append(
            _line(
                [
                    f"`{preset}`",
                    str(len(mine)),
                    ", ".join(sorted({r["commit"] for r in mine})),
                    " to ".join(sorted({min(_dates(mine)), max(_dates(mine))})),
                    machine,
                    f"{sum(r['summary']['seconds']['round'] for r in mine):.0f}",
                    f"{100 * _core_share(mine):.1f} %",
                ]
            )
        )
    planned = sum(1 for _ in plan())
    made = sum(len(rs) for rs in found.values())
    yield "## With what it was made"
    yield (
        f"{made} of {planned} planned runs have a record. *Not learning* is the share of "
        "broadcast, decode, encode, fold and mean in the time that all processes worked; the rest "
        "is training, validation and evaluation."
    )
    if made:
        yield "\n".join(lines)


def _core_share(mine: list[Record]) -> float:
    """Return the share of the core's phases in the summed phases of some runs."""
    spent: Counter[str] = Counter()
    for record in mine:
        spent.update(record["summary"]["seconds"])
    core = sum(spent[phase] for phase in ("broadcast", "decode", "encode", "fold", "mean"))
    return core / (core + spent["train"] + spent["validate"] + spent["evaluate"])


def _dates(mine: list[Record]) -> list[str]:
    return [record["date"] for record in mine]
