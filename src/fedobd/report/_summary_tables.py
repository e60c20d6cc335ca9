"""Tables: sections as rows of plain text, for every format of the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from fedobd._format import format_bytes, format_duration, format_metric, format_share
from fedobd.methods import FedAvg
from fedobd.report._delivery import LevelBits
from fedobd.report._gather import Section, Variant
from fedobd.report._links import ASSUMPTION, LINKS, run_seconds, train_seconds
from fedobd.report._run import Results, Run, Values
from fedobd.report._traffic import PARTS

NONE = "–"
NO_BREAK = "\N{NO-BREAK SPACE}"
_SENT = 2  # columns before those that compare what was sent


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


def _cells(rows: Iterable[Sequence[str]]) -> tuple[tuple[Cell, ...], ...]:
    """Return rows of cells of which none is the best."""
    return tuple(tuple(map(Cell, row)) for row in rows)


def _columns(metric: str) -> tuple[_Column, ...]:
    def fine(value: float) -> int:
        return 2 if value >= 0.1 else 5

    return (
        _Column(f"{metric}\nfinal", lambda r: r.final_metric, lambda _: 4, max),
        _Column("sent\ntotal, MB", lambda r: r.total_bytes / 1e6, fine, min),
        _Column("up, MB", lambda r: r.uplink_bytes / 1e6, fine, min),
        _Column("down, MB", lambda r: r.downlink_bytes / 1e6, fine, min),
        _Column(f"{metric}\nbest", lambda r: r.best_metric, lambda _: 4, max),
        _Column("wall-clock\ntime, s", lambda r: r.round_s, lambda _: 1),
    )


def summary_table(section: Section) -> Table:
    """Return a row for each variant: mean ± standard deviation of a sample, over its seeds."""
    columns = _columns(section.metric)
    references = _references(section)
    bests = [_best(section, column) for column in columns]
    rows = []
    for variant in section.variants:
        cells = []
        for column, best in zip(columns, bests, strict=True):
            values = _values(variant, column)
            is_best = variant.is_finished and bool(values) and fmean(values) == best
            cells.append(Cell(column.spread(values), is_best))
        cells[_SENT:_SENT] = [Cell(_reduction(variant, other)) for other in references.values()]
        rows.append(
            (
                Cell(variant.label + ("" if variant.is_finished else " †")),
                *cells,
                Cell(_range([len(run.rounds) for run in variant.counted])),
                Cell(_seeds([run.seed for run in variant.counted])),
            )
        )
    names = [column.name for column in columns]
    names[_SENT:_SENT] = [f"less than\n{name}" for name in references]
    return Table(
        caption=_caption(section),
        head=("method", *names, "rounds", "seeds"),
        rows=tuple(rows),
        notes=tuple(_summary_notes(section)),
    )


def _references(section: Section) -> dict[str, Variant]:
    """Return what bytes are compared with, by name: FedAvg and the most accurate baseline."""
    if len(section.variants) == 1:
        return {}
    fedavg, baseline = _fedavg(section), best_baseline(section)
    variants = {} if fedavg is None else {"FedAvg": fedavg}
    if baseline is not None and baseline is not fedavg:
        variants[baseline.label] = baseline
    return variants


def _fedavg(section: Section) -> Variant | None:
    return next((v for v in section.variants if v.method == FedAvg.name), None)


def reference(section: Section) -> Variant | None:
    """Return what a method is measured by: FedAvg, or without its results the best baseline."""
    fedavg = _fedavg(section)
    return fedavg if fedavg is not None and fedavg.is_finished else best_baseline(section)


def _caption(section: Section) -> str:
    seeds = {run.seed for variant in section.variants for run in variant.counted}
    caption = f"{section.metric.capitalize()} and measured traffic, initial payloads included"
    if len(seeds) > 1:
        caption += "; mean ± standard deviation over the seeds"
    if len(section.variants) > 1:
        caption += "; the best value of a column is marked"
    return caption


def _summary_notes(section: Section) -> Iterator[str]:
    if not all(variant.is_finished for variant in section.variants):
        yield "† not finished: the figures are those of the rounds so far, and not marked as best."
    for name in _references(section):
        if name != "FedAvg":
            yield f"{name} is the baseline with the best final {section.metric}."
    yield from section.notes


def best_baseline(section: Section) -> Variant | None:
    """Return the most accurate finished method other than FedOBD; of equal ones, fewer bytes."""

    def rank(variant: Variant) -> tuple[float, float]:
        return mean_final(variant) or 0.0, -mean_total(variant)

    rivals = [v for v in section.variants if v.method != "fedobd" and v.is_finished]
    return max((v for v in rivals if mean_final(v) is not None), key=rank, default=None)


def _values(variant: Variant, column: _Column) -> list[float]:
    values = [column.value(run.results) for run in variant.counted]
    return [value for value in values if value is not None]


def _best(section: Section, column: _Column) -> float | None:
    if column.best is None or len(section.variants) == 1:
        return None
    by_variant = [_values(variant, column) for variant in section.variants if variant.is_finished]
    means = [fmean(values) for values in by_variant if values]
    return column.best(means) if means else None


def _seeds(seeds: Sequence[int]) -> str:
    """Return seeds as text, many in a row by the first and the last."""
    if len(seeds) > 3 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def mean_total(variant: Variant) -> float:
    """Return the bytes of a variant's runs, both directions, a mean over the seeds."""
    return fmean([run.results.total_bytes for run in variant.counted])


def mean_final(variant: Variant) -> float | None:
    """Return the final metric of a variant's runs, a mean; None where one was not tested."""
    finals = [run.results.final_metric for run in variant.counted]
    tested = [final for final in finals if final is not None]
    return fmean(tested) if len(tested) == len(finals) else None


def _reduction(variant: Variant, other: Variant) -> str:
    if variant is other or not (variant.is_finished and other.is_finished):
        return NONE
    return format_share(1 - mean_total(variant) / mean_total(other))


def run_table(section: Section) -> Table:
    """Return a row for each run."""
    columns = _columns(section.metric)
    rows = [
        (
            *(variant.label, str(run.seed), f"{len(run.rounds)} of {run.planned_rounds}"),
            *(column.text(column.value(run.results)) for column in columns),
            *(str(run.results.refusals), "yes" if run.is_finished else "no", run.name),
        )
        for variant in section.variants
        for run in variant.runs
    ]
    head = ("method", "seed", "rounds", *(column.name for column in columns))
    return Table(
        caption="Every run; a run that leaves a stage early has fewer rounds than planned",
        head=(*head, "refused or missing", "finished", "folder"),
        rows=_cells(rows),
    )


def link_table(section: Section) -> Table:
    """Return how long a round and the whole run would take over links of several speeds."""
    whole = [_mean_seconds(variant) for variant in section.variants]
    timed = [_is_timed(variant) for variant in section.variants]
    rivals = [
        variant.is_finished and (is_timed or not any(timed))
        for variant, is_timed in zip(section.variants, timed, strict=True)
    ]
    finished = [times for times, is_rival in zip(whole, rivals, strict=True) if is_rival]
    bests = [min(times) for times in zip(*finished, strict=True)] if len(whole) > 1 else []
    rows = []
    for variant, times, is_rival in zip(section.variants, whole, rivals, strict=True):
        cells = [Cell(variant.label)]
        for number, bits_per_s in enumerate(LINKS.values()):
            runs = variant.counted
            one = fmean([run_seconds(run, bits_per_s) / len(run.rounds) for run in runs])
            is_best = bool(bests) and is_rival and times[number] == bests[number]
            cells += [Cell(format_duration(one)), Cell(format_duration(times[number]), is_best)]
        rows.append((*cells, *_of_a_round(variant)))
    names = [name.replace(" ", NO_BREAK) for name in LINKS]
    links = [f"{name}\n{what}" for name in names for what in ("a round", "the run")]
    caption = "Time over a link: transfers and training of a mean round, and of the whole run"
    return Table(
        caption=caption + ("; the shortest run is marked" if bests else ""),
        head=("method", *links, "training\na round", "down\na round", "up\na round"),
        rows=tuple(rows),
        notes=(ASSUMPTION, *([] if all(timed) else [_UNTIMED])),
    )


_UNTIMED = (
    "Where training was not measured, as by Flower, times are those of the transfers alone, and "
    "are not compared with others."
)


def _is_timed(variant: Variant) -> bool:
    """Whether training was measured in all runs."""
    return all(train_seconds(run) is not None for run in variant.counted)


def _mean_seconds(variant: Variant) -> list[float]:
    """Return the seconds of a run over each of the links, a mean."""
    return [
        fmean([run_seconds(run, speed) for run in variant.counted]) for speed in LINKS.values()
    ]


def _of_a_round(variant: Variant) -> Iterator[Cell]:
    """Yield training time and bytes of a client in a mean round."""
    trained = [train_seconds(run) for run in variant.counted]
    known = [spent for spent in trained if spent is not None]
    yield Cell(format_duration(fmean(known)) if len(known) == len(trained) else "not measured")
    for direction in ("downlink", "uplink"):
        yield Cell(format_bytes(fmean([_client_bytes(run, direction) for run in variant.counted])))


def _client_bytes(run: Run, direction: str) -> float:
    """Return the mean bytes of a client in a round."""
    return fmean([getattr(played, f"{direction}_bytes") / played.cohort for played in run.rounds])


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
        "uploads\nin stage 1": [f"{count:.0f} of {asked}" for count in counts],
    }
    if run.differences is not None:
        means = run.differences[run.in_stage(1)].mean(axis=0)
        columns["mean block\ndifference"] = [f"{mean:.3g}" for mean in means]
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
        rows=_cells(zip(*columns.values(), strict=True)),
    )


def part_table(section: Section) -> Table:
    """Return what the bytes of each variant were for, up and down, means over its seeds."""
    parts = [
        (f"{variant.label}, {way}", _mean_parts(variant, way))
        for variant in section.variants
        for way in ("up", "down")
    ]
    used = [part for part in PARTS if any(num_bytes[part] for _, num_bytes in parts)]
    rows = tuple(
        (Cell(name), *(Cell(format_bytes(num_bytes[part])) for part in used))
        for name, num_bytes in parts
    )
    caption = "Measured bytes of the whole run by what they are for"
    return Table(caption=caption, head=("method", *used), rows=rows)


def _mean_parts(variant: Variant, way: str) -> dict[str, float]:
    """Return the bytes of a whole run by what they are for, means over the seeds."""
    totals = []
    for run in variant.counted:
        rounds = [r.uplink_parts if way == "up" else r.downlink_parts for r in run.rounds]
        totals.append(
            {part: sum(num_bytes.get(part, 0) for num_bytes in rounds) for part in PARTS}
        )
    return {part: fmean(total[part] for total in totals) for part in PARTS}


def round_table(variant: Variant, metric: str) -> Table:
    """Return a row for each round of the run that is shown of a variant."""
    run = variant.shown
    rows = [
        (
            *(str(played.number), str(played.stage), str(played.clients)),
            format_metric(played.test_metric),
            *(format_bytes(played.uplink_bytes), format_bytes(played.downlink_bytes)),
            " ".join(f"{count:.0f}" for count in uploads),
        )
        for played, uploads in zip(run.rounds, run.uploads, strict=True)
    ]
    return Table(
        caption=f"Rounds of {variant.label}, seed {run.seed}; the last column counts the clients "
        "that uploaded each block, the input first",
        head=("round", "stage", "clients", metric, "up", "down", "uploads by block"),
        rows=_cells(rows),
    )


def _bits_texts(values: Values) -> list[str]:
    return [NONE if math.isnan(value) else f"{value:,.2f}" for value in values]


def environment_table(section: Section) -> Table:
    """Return versions and machine of all runs; values that differ stand beside each other."""
    versions: dict[str, list[str]] = {}
    for run in section.runs:
        packages = run.environment.get("packages", {})
        plain = {k: v for k, v in run.environment.items() if k != "packages"}
        for key, value in {**plain, **packages}.items():
            texts = versions.setdefault(str(key), [])
            text = NONE if value is None else str(value)
            if text not in texts:
                texts.append(text)
    if "started" in versions:
        first, last = min(versions["started"]), max(versions["started"])
        versions["started"] = [first] if first == last else [f"{first} to {last}"]
    rows = _cells((key, ", ".join(texts)) for key, texts in versions.items())
    return Table(caption="Versions and machine", head=("", "value"), rows=rows)
