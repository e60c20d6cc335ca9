"""Tables: sections as columns of plain text, for every format of the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import NamedTuple

from fedobd._format import format_bytes, format_duration, format_metric, format_share
from fedobd.methods import FedAvg
from fedobd.report._delivery import bits_by_way
from fedobd.report._gather import Section, Variant
from fedobd.report._links import ASSUMPTION, LINKS, run_seconds, train_seconds
from fedobd.report._run import BlockBits, Results, Values
from fedobd.report._traffic import PARTS, WAYS

NONE = "–"
NO_BREAK = "\N{NO-BREAK SPACE}"


class Cell(NamedTuple):
    """What a cell shows, and whether it is the best of its column."""

    text: str
    is_best: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table; the first column names the rows.

    Args:
        caption: what it shows, in a sentence.
        columns: cells, or texts of which none is the best, by their heading in one line or two.
        notes: what has to be known to read it.
    """

    caption: str
    columns: Mapping[str, Sequence[Cell | str]]
    notes: Sequence[str] = ()

    @property
    def head(self) -> tuple[str, ...]:
        """Headings of the columns."""
        return tuple(self.columns)

    @property
    def rows(self) -> list[list[Cell]]:
        """Rows, of as many cells each."""
        return [
            [Cell(cell) if isinstance(cell, str) else cell for cell in row]
            for row in zip(*self.columns.values(), strict=True)
        ]


@dataclass(frozen=True, slots=True)
class _Figure:
    """A figure of a run, or over seeds: its heading, value, decimals, and what picks the best."""

    name: str
    value: Callable[[Results], float | None]
    digits: Callable[[float], int]
    best: Callable[[Sequence[float]], float] | None = None

    def text(self, value: float | None) -> str:
        """Return the figure of one run."""
        return NONE if value is None else f"{value:,.{self.digits(value)}f}"

    def cells(self, section: Section) -> list[Cell]:
        """Return a mean ± standard deviation of a sample for each variant."""
        columns = [[self.value(run.results) for run in v.counted] for v in section.variants]
        known = [[value for value in values if value is not None] for values in columns]
        means = [fmean(values) if values else None for values in known]
        texts = [
            self.text(mean)
            if mean is None or len(values) < 2
            else f"{self.text(mean)}{NO_BREAK}±{NO_BREAK}{stdev(values):,.{self.digits(mean)}f}"
            for mean, values in zip(means, known, strict=True)
        ]
        return _marked(section, texts, means, self.best)


def _marked(
    section: Section,
    texts: Iterable[str],
    values: Iterable[float | None],
    best: Callable[[Sequence[float]], float] | None,
) -> list[Cell]:
    """Return a cell for each variant, the best of several that have ended marked."""
    rivals = [
        value if variant.is_finished else None
        for variant, value in zip(section.variants, values, strict=True)
    ]
    known = [value for value in rivals if value is not None]
    wanted = best(known) if best and known and len(rivals) > 1 else math.nan
    return [Cell(text, value == wanted) for text, value in zip(texts, rivals, strict=True)]


def _figures(metric: str) -> tuple[_Figure, ...]:
    def fine(value: float) -> int:
        return 2 if value >= 0.1 else 5

    return (
        _Figure(f"{metric}\nfinal", lambda r: r.final_metric, lambda _: 4, max),
        _Figure("sent\ntotal, MB", lambda r: r.total_bytes / 1e6, fine, min),
        _Figure("up, MB", lambda r: r.uplink_bytes / 1e6, fine, min),
        _Figure("down, MB", lambda r: r.downlink_bytes / 1e6, fine, min),
        _Figure(f"{metric}\nbest", lambda r: r.best_metric, lambda _: 4, max),
        _Figure("wall-clock\ntime, s", lambda r: r.round_s, lambda _: 1),
    )


def summary_table(section: Section) -> Table:
    """Return a row for each variant: mean ± standard deviation of a sample, over its seeds."""
    variants, references = section.variants, _references(section)
    figures = {figure.name: figure.cells(section) for figure in _figures(section.metric)}
    (final, metrics), (total, num_bytes), *others = figures.items()
    columns: dict[str, Sequence[Cell | str]] = {
        "method": [v.label + ("" if v.is_finished else " †") for v in variants],
        final: metrics,
        total: num_bytes,
        **{
            f"less than\n{name}": [_reduction(variant, other) for variant in variants]
            for name, other in references.items()
        },
        **dict(others),
        "rounds": [_range([len(run.rounds) for run in v.counted]) for v in variants],
        "seeds": [_seeds([run.seed for run in v.counted]) for v in variants],
    }
    caption = f"{section.metric.capitalize()} and measured traffic, initial payloads included"
    if len({run.seed for variant in variants for run in variant.counted}) > 1:
        caption += "; mean ± standard deviation over the seeds"
    if len(variants) > 1:
        caption += "; the best value of a column is marked"
    notes = [
        f"{name} is the baseline with the best final {section.metric}."
        for name in references
        if name != "FedAvg"
    ]
    if not all(variant.is_finished for variant in variants):
        notes.insert(0, _UNFINISHED)
    return Table(caption, columns, [*notes, *section.notes])


_UNFINISHED = "† not finished: the figures are those of the rounds so far, and not marked as best."


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


def best_baseline(section: Section) -> Variant | None:
    """Return the most accurate finished method other than FedOBD; of equal ones, fewer bytes."""

    def rank(variant: Variant) -> tuple[float, float]:
        return mean_final(variant) or 0.0, -mean_total(variant)

    rivals = [v for v in section.variants if v.method != "fedobd" and v.is_finished]
    return max((v for v in rivals if mean_final(v) is not None), key=rank, default=None)


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
    return fmean(run.results.total_bytes for run in variant.counted)


def mean_final(variant: Variant) -> float | None:
    """Return the final metric of a variant's runs, a mean; None where one was not tested."""
    return _mean_known([run.results.final_metric for run in variant.counted])


def _mean_known(values: Sequence[float | None]) -> float | None:
    """Return the mean, None where a value is missing."""
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _reduction(variant: Variant, other: Variant) -> str:
    if variant is other or not (variant.is_finished and other.is_finished):
        return NONE
    return format_share(1 - mean_total(variant) / mean_total(other))


def run_table(section: Section) -> Table:
    """Return a row for each run."""
    labels = [variant.label for variant in section.variants for _ in variant.runs]
    columns = {
        "method": labels,
        "seed": [str(run.seed) for run in section.runs],
        "rounds": [f"{len(run.rounds)} of {run.planned_rounds}" for run in section.runs],
        **{
            figure.name: [figure.text(figure.value(run.results)) for run in section.runs]
            for figure in _figures(section.metric)
        },
        "refused or missing": [str(run.results.refusals) for run in section.runs],
        "finished": ["yes" if run.is_finished else "no" for run in section.runs],
        "folder": [run.name for run in section.runs],
    }
    return Table(
        "Every run; a run that leaves a stage early has fewer rounds than planned", columns
    )


def link_table(section: Section) -> Table:
    """Return how long a round and the whole run would take over links of several speeds."""
    variants = section.variants
    trained = [_mean_known([train_seconds(run) for run in v.counted]) for v in variants]
    is_untimed = None in trained
    are_rivals = [t is not None or not any(t is not None for t in trained) for t in trained]
    columns: dict[str, Sequence[Cell | str]] = {"method": [v.label for v in variants]}
    for link, bits_per_s in LINKS.items():
        name = link.replace(" ", NO_BREAK)
        times = [[run_seconds(run, bits_per_s) for run in v.counted] for v in variants]
        columns[f"{name}\na round"] = [
            format_duration(
                fmean(t / len(run.rounds) for t, run in zip(ts, v.counted, strict=True))
            )
            for v, ts in zip(variants, times, strict=True)
        ]
        whole = [fmean(ts) for ts in times]
        compared = [t if is_rival else None for t, is_rival in zip(whole, are_rivals, strict=True)]
        columns[f"{name}\nthe run"] = _marked(section, map(format_duration, whole), compared, min)
    columns["training\na round"] = [
        "not measured" if t is None else format_duration(t) for t in trained
    ]
    for way in reversed(WAYS):
        columns[f"{way}\na round"] = [_client_bytes(variant, way) for variant in variants]
    caption = "Time over a link: transfers and training of a mean round, and of the whole run"
    if len(variants) > 1 and any(
        v.is_finished and is_rival for v, is_rival in zip(variants, are_rivals, strict=True)
    ):
        caption += "; the shortest run is marked"
    return Table(caption, columns, (ASSUMPTION, *([_UNTIMED] if is_untimed else [])))


_UNTIMED = (
    "Where training was not measured, as by Flower, times are those of the transfers alone, and "
    "are not compared with others."
)


def _client_bytes(variant: Variant, way: str) -> str:
    """Return the mean bytes of a client in a round, a mean over the seeds."""
    return format_bytes(
        fmean(
            fmean(getattr(played, f"{way}link_bytes") / played.cohort for played in run.rounds)
            for run in variant.counted
        )
    )


def block_table(variant: Variant, delivery: BlockBits | None) -> Table:
    """Return a row for each block of the run that is shown of a variant, and of its delivery."""
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
    for way, bits in bits_by_way(run, delivery).items():
        columns[f"{way}\nreal bits"] = _bits_texts(bits.real)
        columns[f"{way}\nnominal bits"] = _bits_texts(bits.nominal)
        if bits.levels is not None:
            columns[f"{way}\nlevels s"] = _bits_texts(bits.levels)
        if bits.entropy is not None:
            columns[f"{way}\nentropy"] = _bits_texts(bits.entropy)
    caption = (
        f"Blocks of {variant.label}, seed {run.seed}, the input first; bits are for each parameter"
    )
    return Table(caption, columns)


def _bits_texts(values: Values) -> list[str]:
    return [NONE if math.isnan(value) else f"{value:,.2f}" for value in values]


def part_table(section: Section) -> Table:
    """Return what the bytes of each variant were for, up and down, means over its seeds."""
    rows = [(variant, way) for variant in section.variants for way in WAYS]
    columns = {"method": [f"{variant.label}, {way}" for variant, way in rows]}
    for part in PARTS:
        num_bytes = [
            fmean(
                sum(getattr(played, f"{way}link_parts").get(part, 0) for played in run.rounds)
                for run in variant.counted
            )
            for variant, way in rows
        ]
        if any(num_bytes):
            columns[part] = list(map(format_bytes, num_bytes))
    return Table("Measured bytes of the whole run by what they are for", columns)


def round_table(variant: Variant, metric: str) -> Table:
    """Return a row for each round of the run that is shown of a variant."""
    run = variant.shown
    columns = {
        "round": [str(played.number) for played in run.rounds],
        "stage": [str(played.stage) for played in run.rounds],
        "clients": [str(played.clients) for played in run.rounds],
        metric: [format_metric(played.test_metric) for played in run.rounds],
        "up": [format_bytes(played.uplink_bytes) for played in run.rounds],
        "down": [format_bytes(played.downlink_bytes) for played in run.rounds],
        "uploads by block": [" ".join(f"{count:.0f}" for count in row) for row in run.uploads],
    }
    caption = (
        f"Rounds of {variant.label}, seed {run.seed}; the last column counts the clients that "
        "uploaded each block, the input first"
    )
    return Table(caption, columns)


def environment_table(section: Section) -> Table:
    """Return versions and machine of all runs; values that differ stand beside each other."""
    versions: dict[str, dict[str, None]] = {}  # texts by name, each once, in their order
    for run in section.runs:
        packages = run.environment.get("packages", {})
        plain = {k: v for k, v in run.environment.items() if k != "packages"}
        for key, value in {**plain, **packages}.items():
            versions.setdefault(key, {})[NONE if value is None else str(value)] = None
    if len(versions.get("started", ())) > 1:
        first, last = min(versions["started"]), max(versions["started"])
        versions["started"] = {f"{first} to {last}": None}
    columns = {"": list(versions), "value": [", ".join(texts) for texts in versions.values()]}
    return Table("Versions and machine", columns)
