"""Curves: test accuracy against what was sent, and against rounds; and bytes beside each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedobd.report._chart import (
    COLORS,
    Chart,
    Columns,
    Labels,
    Switch,
    View,
    step_note,
    thin,
)
from fedobd.report._gather import Section, Variant
from fedobd.report._run import Run, Values
from fedobd.report._templates import MOST_NAMED, Spec, make_spec
from fedobd.report._traffic import WAYS

MEASURES = {
    "total": "MB sent, up and down",
    "up": "MB sent up",
    "down": "MB sent down",
    "rounds": "round",
}
"""Titles of the horizontal axes of the picture; the first is the default."""

MOST_POINTS = 4_000
"""Points of all lines that are drawn at most, so that a page of many runs opens soon."""

_SHAPES = (
    *("circle", "square", "triangle-up", "diamond"),
    *("triangle-down", "cross", "triangle-left", "triangle-right"),
)
_DASHES = ([1, 0], [6, 3], [2, 2], [8, 2, 2, 2], [10, 4], [4, 2, 1, 2, 1, 2])
_MOST_MARKS = 12  # on a line; more and the dashes are hidden


def look(number: int) -> tuple[str, str]:
    """Return color and shape of a variant by its number; the first 64 all differ."""
    shape = _SHAPES[(number + number // len(COLORS)) % len(_SHAPES)]
    return COLORS[number % len(COLORS)], shape


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric over the rounds of a run, or its mean over several runs; points are rounds.

    Args:
        sent: what was sent so far by each of `MEASURES`, in MB or rounds, shape (4, points).
        metric: of the server's model, shape (points,).
    """

    sent: Values
    metric: Values
    number: Values
    stage: Values

    def at(self, points: NDArray[np.bool_] | list[int]) -> Curve:
        """Return the curve of some of the points, by a mask or by their numbers."""
        return Curve(
            self.sent[:, points], self.metric[points], self.number[points], self.stage[points]
        )


def curve_of(run: Run) -> Curve:
    """Return the metric of a run where it was tested; the last point is the final metric."""
    metrics = [played.test_metric for played in run.rounds]
    if run.is_finished:
        metrics[-1] = run.results.final_metric
    up = np.array([played.uplink_bytes / 1e6 for played in run.rounds])
    down = np.array([played.downlink_bytes / 1e6 for played in run.rounds])
    whole = Curve(
        sent=np.cumsum([up + down, up, down, np.ones(len(up))], axis=1),
        metric=np.array([np.nan if metric is None else metric for metric in metrics], np.float64),
        number=np.array([played.number for played in run.rounds], np.float64),
        stage=np.array([played.stage for played in run.rounds], np.float64),
    )
    return whole.at(~np.isnan(whole.metric))


def mean_curve(curves: Sequence[Curve]) -> tuple[Curve, Values]:
    """Return the mean of curves, and the metric's standard deviation of a sample.

    Both are over the rounds that all curves have, in the same stage.
    """
    places = [list(zip(curve.number, curve.stage, strict=True)) for curve in curves]
    common = set(places[0]).intersection(*places)
    cut = [
        curve.at(np.array([place in common for place in rounds], bool))
        for curve, rounds in zip(curves, places, strict=True)
    ]
    metrics = np.array([curve.metric for curve in cut])
    mean = Curve(
        sent=np.mean([curve.sent for curve in cut], axis=0),
        metric=metrics.mean(axis=0),
        number=cut[0].number,
        stage=cut[0].stage,
    )
    return mean, metrics.std(axis=0, ddof=1) if len(cut) > 1 else np.zeros(len(mean.metric))


def accuracy_chart(section: Section) -> Chart | None:
    """Return the chart, None where nothing was tested."""
    if all(run.results.final_metric is None for run in section.runs):
        return None
    caption = f"{section.metric.capitalize()} of the server's model after each tested round"
    if any(len(variant.runs) > 1 for variant in section.variants):
        caption += (
            "; thick lines are means over the seeds, shades one standard deviation to each side, "
            "thin lines single runs"
        )
    if any(played.stage == 2 for run in section.runs for played in run.rounds):
        caption += "; filled marks are stage 1, open ones stage 2"
    if len(section.variants) > MOST_NAMED:
        caption += "; hovering names a line"
    lines = _accuracy_lines(section)
    step = max(1, math.ceil(sum(len(line.spread) for line in lines) / MOST_POINTS))
    data = {"points": _accuracy_data(section, [line.thinned(step) for line in lines])}
    return Chart(
        name="accuracy",
        title=f"{section.metric.capitalize()} against traffic",
        caption=f"{caption}.{step_note(step)}",
        switches=(Switch("horizontal axis", tuple(MEASURES)), Switch("scale", ("linear", "log"))),
        views={
            (number, kind): View(
                spec=_accuracy_spec(section, measure, scale),
                data=data,
                figure=(f"accuracy-{measure.replace('total', 'bytes')}", "")
                if kind == 0
                else None,
            )
            for number, measure in enumerate(MEASURES)
            for kind, scale in enumerate(("linear", "log"))
        },
        height=480,
    )


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of the picture, with the standard deviation that a mean has."""

    variant: Variant
    name: str
    curve: Curve
    spread: Values
    is_mean: bool

    def thinned(self, step: int) -> _Line:
        """Return the line at each `step`-th point, and the last."""
        drawn = thin(len(self.spread), step)
        return replace(self, curve=self.curve.at(drawn), spread=self.spread[drawn])


def _accuracy_lines(section: Section) -> list[_Line]:
    """Return the lines of single runs, where there are several seeds, and of means."""
    lines = []
    for variant in section.variants:
        for run in variant.runs if len(variant.runs) > 1 else ():
            curve, name = curve_of(run), f"{variant.label}, seed {run.seed}"
            if curve.metric.size:
                spread = np.zeros(len(curve.metric))
                lines.append(_Line(variant, name, curve, spread, is_mean=False))
        counted = [curve for curve in map(curve_of, variant.counted) if curve.metric.size]
        if counted:
            lines.append(_Line(variant, variant.label, *mean_curve(counted), is_mean=True))
    return lines


def _accuracy_data(section: Section, lines: Sequence[_Line]) -> Columns:
    """Return the points of the lines, line by line."""
    curves = [line.curve for line in lines]
    lengths = [len(line.spread) for line in lines]
    numbers = np.repeat(np.arange(len(lines), dtype="u2"), lengths)
    sent = np.concatenate([curve.sent for curve in curves], axis=1).astype("f4")
    metric = np.concatenate([curve.metric for curve in curves])
    spread = np.concatenate([line.spread for line in lines])
    return {
        **dict(zip(MEASURES, sent, strict=True)),
        "metric": metric.astype("f4"),
        "low": (metric - spread).astype("f4"),
        "high": (metric + spread).astype("f4"),
        "round": np.concatenate([curve.number for curve in curves]).astype("u2"),
        "mean": np.repeat([np.uint8(line.is_mean) for line in lines], lengths),
        "line": Labels(tuple(line.name for line in lines), numbers),
        "number": numbers,  # two runs of one seed have the same name
        **_look_columns(section, [(line.variant, line.curve.stage) for line in lines]),
    }


def _look_columns(section: Section, lines: Sequence[tuple[Variant, Values]]) -> Columns:
    """Return variant, dash, stage and mark of each point of lines with these stages."""
    labels = tuple(variant.label for variant in section.variants)
    stages = [stage for _, stage in lines]
    lengths = list(map(len, stages))
    methods = np.array([labels.index(variant.label) for variant, _ in lines], "u2")
    dashes = np.array([variant.number % len(_DASHES) for variant, _ in lines], "u1")
    return {
        "method": Labels(labels, np.repeat(methods, lengths)),
        "dash": np.repeat(dashes, lengths),
        "stage": np.concatenate(stages).astype("u1"),
        "mark": np.concatenate(list(map(_marks, stages))).astype("u1"),
    }


def _marks(stage: Values) -> NDArray[np.bool_]:
    """Return which points of a line have a mark: few, the first of stage 2 among them."""
    every = max(math.ceil(len(stage) / _MOST_MARKS), 1)
    marks: NDArray[np.bool_] = np.arange(len(stage)) % every == 0
    if (stage == 2).any():
        marks[np.argmax(stage == 2)] = True
    return marks


def _looks(section: Section) -> dict[str, Any]:
    """Return how lines of all variants look, for their templates."""
    colors, shapes = zip(*(look(variant.number) for variant in section.variants), strict=True)
    labels = [variant.label for variant in section.variants]
    return {"labels": labels, "colors": colors, "shapes": shapes, "dashes": _DASHES}


def _accuracy_spec(section: Section, measure: str, scale: str) -> Spec:
    return make_spec(
        "accuracy",
        **_looks(section),
        measure=measure,
        title=MEASURES[measure],
        scale=scale,
        metric=section.metric,
        metric_scale=_metric_scale(section),
        has_seeds=any(len(variant.runs) > 1 for variant in section.variants),
    )


def _metric_scale(section: Section) -> Spec:
    """Return the vertical scale; around a single value it reaches a little to each side."""
    metrics = {played.test_metric for run in section.runs for played in run.rounds}
    values = metrics - {None} | {run.results.final_metric for run in section.runs} - {None}
    if len(values) > 1:
        return {"zero": False}
    (value,) = values
    assert value is not None
    return {"domain": [value - 0.05, value + 0.05]}


def method_traffic_chart(section: Section) -> Chart:
    """Return bytes of each round, a line for each variant, for the run that is shown of it."""
    shown = [(variant, variant.shown.rounds) for variant in section.variants]
    played = [one for _, rounds in shown for one in rounds]
    stages = [(variant, np.array([one.stage for one in rounds])) for variant, rounds in shown]
    looks = _look_columns(section, stages)
    numbers = np.array([one.number for one in played])
    data: dict[str, Columns] = {
        way: {
            **looks,
            "round": numbers,
            "bytes": np.array([getattr(one, f"{way}link_bytes") for one in played]),
        }
        for way in WAYS
    }
    return Chart(
        name="methods",
        title="Bytes of each round, by method",
        caption="Measured bytes of each round, all clients together; open marks are stage 2.",
        views={
            (): View(
                spec=make_spec("methods", **_looks(section)),
                data=data,
                figure=("bytes-per-round", ""),
            )
        },
    )
