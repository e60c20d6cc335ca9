"""Tables: sections as rows of plain text, for every format of the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from fedobd.display import format_bytes, format_share
from fedobd.report._delivery import LevelBits
from fedobd.report._gather import Section, Variant
from fedobd.report._links import ASSUMPTION, LINKS, run_seconds, train_seconds
from fedobd.report._run import Results, Run, Values

NONE = "–"
NO_BREAK = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell.

    Args:
        text: what it shows.
        is_best: whether it is the best of its column.
    """

    text: str
    is_best: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table; the first column names the rows.

    Args:
        caption: what it shows, in a sentence.
        head: names of the columns, in one line or two.
        rows: as many cells each.
        notes: what has to be known to read it.
    """

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of figures over the seeds.

    Args:
        name: its head.
        value: the figure of one run; None where there is none.
        digits: decimals of a mean.
        best: picks the best mean of the rows; None where none is better.
    """

    name: str
    value: Callable[[Results], float | None]
    digits: Callable[[float], int]
    best: Callable[[Sequence[float]], float] | None = None

    def text(self, value: float | None) -> str:
        """Return the figure of one run."""
        return NONE if value is None else f"{value:,.{self.digits(value)}f}"

    def spread(self, values: Sequence[float]) -> str:
        """Return mean ± standard deviation of a sample."""
        if len(values) < 2:
            return self.text(values[0] if values else None)
        mean = fmean(values)
        return f"{self.text(mean)}{NO_BREAK}±{NO_BREAK}{stdev(values):,.{self.digits(mean)}f}"


def _columns(metric: str) -> tuple[_Column, ...]:
    def fine(value: float) -> int:
        return 2 if value >= 0.1 else 5

    return (
        _Column(f"{metric}\nfinal", lambda r: r.final_metric, lambda _: 4, max),
        _Column("best", lambda r: r.best_metric, lambda _: 4, max),
        _Column("up, MB", lambda r: r.uplink_bytes / 1e6, fine, min),
        _Column("down, MB", lambda r: r.downlink_bytes / 1e6, fine, min),
        _Column("total, MB", lambda r: r.total_bytes / 1e6, fine, min),
        _Column("time, s", lambda r: r.round_s, lambda _: 1),
    )


def summary_table(section: Section) -> Table:
    """Return a row for each variant: mean ± standard deviation of a sample, over its seeds."""
    columns = _columns(section.metric)
    fedavg = next((v for v in section.variants if v.method == "fedavg"), None)
    baseline = best_baseline(section)
    references = [] if fedavg is None else [("FedAvg", fedavg)]
    if baseline is not None and baseline is not fedavg:
        references.append((baseline.label, baseline))
    if len(section.variants) == 1:
        references = []
    bests = [_best(section, column) for column in columns]
    rows = []
    for variant in section.variants:
        mark = "" if variant.is_finished else " †"
        cells = [
            Cell(variant.label + mark),
            Cell(_seeds([run.seed for run in variant.counted])),
            Cell(_range([len(run.rounds) for run in variant.counted])),
        ]
        for column, best in zip(columns, bests, strict=True):
            values = _values(variant, column)
            is_best = variant.is_finished and bool(values) and fmean(values) == best
            cells.append(Cell(column.spread(values), is_best))
        cells[-1:-1] = [Cell(_reduction(variant, other)) for _, other in references]
        rows.append(tuple(cells))
    *names, last = (column.name for column in columns)
    less = [f"less than\n{name}" for name, _ in references]
    return Table(
        caption=_caption(section),
        head=("method", "seeds", "rounds", *names, *less, last),
        rows=tuple(rows),
        notes=tuple(_summary_notes(section)),
    )


def _caption(section: Section) -> str:
    seeds = {run.seed for variant in section.variants for run in variant.counted}
    caption = f"{section.metric.capitalize()} and measured traffic, openings included"
    if len(seeds) > 1:
        caption += "; mean ± standard deviation over the seeds"
    if len(section.variants) > 1:
        caption += "; the best value of a column is marked"
    return caption


def _summary_notes(section: Section) -> Iterator[str]:
    if not all(variant.is_finished for variant in section.variants):
        yield "† not finished: the figures are those of the rounds so far, and not marked as best."
    yield from section.notes


def best_baseline(section: Section) -> Variant | None:
    """Return the most accurate finished method other than FedOBD; of equal ones, fewer bytes."""

    def rank(variant: Variant) -> tuple[float, float]:
        finals = [run.results.final_metric or 0.0 for run in variant.counted]
        return fmean(finals), -_mean_total(variant)

    found = [v for v in section.variants if v.method != "fedobd" and v.is_finished]
    tested = [v for v in found if all(r.results.final_metric is not None for r in v.counted)]
    return max(tested, key=rank, default=None)


def _values(variant: Variant, column: _Column) -> list[float]:
    found = [column.value(run.results) for run in variant.counted]
    return [value for value in found if value is not None]


def _best(section: Section, column: _Column) -> float | None:
    if column.best is None or len(section.variants) == 1:
        return None
    found = [_values(variant, column) for variant in section.variants if variant.is_finished]
    means = [fmean(values) for values in found if values]
    return column.best(means) if means else None


def _seeds(seeds: Sequence[int]) -> str:
    """Return seeds as text, many in a row by the first and the last."""
    if len(seeds) > 3 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _mean_total(variant: Variant) -> float:
    return fmean([run.results.total_bytes for run in variant.counted])


def _reduction(variant: Variant, other: Variant) -> str:
    if variant is other or not (variant.is_finished and other.is_finished):
        return NONE
    return format_share(1 - _mean_total(variant) / _mean_total(other))


def run_table(section: Section) -> Table:
    """Return a row for each run."""
    columns = _columns(section.metric)
    rows = []
    for variant in section.variants:
        for run in variant.runs:
            rows.append(
                (
                    Cell(variant.label),
                    Cell(str(run.seed)),
                    Cell(f"{len(run.rounds)} of {run.planned_rounds}"),
                    *(Cell(column.text(column.value(run.results))) for column in columns),
                    Cell(str(run.results.refusals)),
                    Cell("yes" if run.is_finished else "no"),
                    Cell(run.folder.name),
                )
            )
    head = ("method", "seed", "rounds", *(column.name for column in columns))
    return Table(
        caption="Every run; a run that leaves a stage early has fewer rounds than planned",
        head=(*head, "refused uploads", "finished", "folder"),
        rows=tuple(rows),
    )


def link_table(section: Section) -> Table:
    """Return how long a round and the whole run would take over links of several speeds."""
    rows = []
    for variant in section.variants:
        runs = variant.counted
        trained = [train_seconds(run) for run in runs]
        known = [spent for spent in trained if spent is not None]
        cells = [
            Cell(variant.label),
            Cell(format_bytes(fmean([_client_bytes(run, "downlink") for run in runs]))),
            Cell(format_bytes(fmean([_client_bytes(run, "uplink") for run in runs]))),
            Cell(_duration(fmean(known)) if len(known) == len(runs) else "not measured"),
        ]
        for bits_per_s in LINKS.values():
            whole = fmean([run_seconds(run, bits_per_s) for run in runs])
            one = fmean([run_seconds(run, bits_per_s) / len(run.rounds) for run in runs])
            cells += [Cell(_duration(one)), Cell(_duration(whole))]
        rows.append(tuple(cells))
    names = [name.replace(" ", NO_BREAK) for name in LINKS]
    links = [f"{name}\n{what}" for name in names for what in ("a round", "the run")]
    return Table(
        caption="Time over a link: transfers and training of a mean round, and of the whole run",
        head=("method", "down\na round", "up\na round", "training\na round", *links),
        rows=tuple(rows),
        notes=(ASSUMPTION,),
    )


def _client_bytes(run: Run, direction: str) -> float:
    """Return the mean bytes of a client in a round."""
    return fmean([getattr(played, f"{direction}_bytes") / played.cohort for played in run.rounds])


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


def block_table(variant: Variant, delivery: LevelBits | None) -> Table:
    """Return a row for each block of the run that is shown of a variant.

    Args:
        variant: which.
        delivery: bits of the trained model's delivery; None where there are none.
    """
    run, blocks = variant.shown, variant.shown.schema.blocks
    counts = run.uploads[run.in_stage(1)].sum(axis=0)
    asked = sum(played.clients for played in run.rounds if played.stage == 1)
    shares = [block.num_parameters / run.schema.num_parameters for block in blocks]
    columns = {
        "block": [f"{number} {block.name}" for number, block in enumerate(blocks)],
        "kind": [block.kind for block in blocks],
        "parameters": [f"{block.num_parameters:,}" for block in blocks],
        "share": list(map(format_share, shares)),
        "uploaded\nin stage 1": [format_share(count / asked) for count in counts],
    }
    for way, traffic in (("up", run.uplink), ("down", run.downlink)):
        if traffic is not None:
            bits = traffic.bits(run.schema)
            columns[f"{way}\nreal bits"] = _bits_texts(bits.real)
            columns[f"{way}\nnominal bits"] = _bits_texts(bits.nominal)
            columns[f"{way}\nlevels s"] = _bits_texts(bits.levels)
    if delivery is not None:
        columns["delivery\nreal bits"] = _bits_texts(delivery.real)
        columns["delivery\nnominal bits"] = _bits_texts(delivery.nominal)
        columns["delivery\nentropy"] = _bits_texts(delivery.entropy)
    return Table(
        caption=f"Blocks of {variant.label}, seed {run.seed}, the input first; bits are for each "
        "parameter",
        head=tuple(columns),
        rows=tuple(tuple(map(Cell, row)) for row in zip(*columns.values(), strict=True)),
    )


def _bits_texts(values: Values) -> list[str]:
    return [NONE if math.isnan(value) else f"{value:,.2f}" for value in values]


def environment_table(section: Section) -> Table:
    """Return versions and machine of all runs; values that differ stand beside each other."""
    found: dict[str, list[str]] = {}
    for run in section.runs:
        packages = run.environment.get("packages", {})
        plain = {k: v for k, v in run.environment.items() if k != "packages"}
        for key, value in {**plain, **packages}.items():
            texts = found.setdefault(str(key), [])
            text = NONE if value is None else str(value)
            if text not in texts:
                texts.append(text)
    if "started" in found:
        first, last = min(found["started"]), max(found["started"])
        found["started"] = [first] if first == last else [f"{first} to {last}"]
    rows = tuple((Cell(key), Cell(", ".join(texts))) for key, texts in found.items())
    return Table(caption="Versions and machine", head=("", "value"), rows=rows)
