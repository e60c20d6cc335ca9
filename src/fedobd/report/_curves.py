"""Curves: test accuracy against what was sent, and against rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedobd.report._gather import Section, Variant
from fedobd.report._plot import (
    COLORS,
    MOST_NAMED,
    Layout,
    Plot,
    Switch,
    Trace,
    axis,
    plain,
    round_axis,
    typed,
)
from fedobd.report._run import Round, Run, Values


@dataclass(frozen=True, slots=True)
class Measure:
    """What stands on the horizontal axis.

    Args:
        name: as an option of the switch.
        title: of the axis.
        of_round: what a round adds to it.
    """

    name: str
    title: str
    of_round: Callable[[Round], float]


MEASURES = (
    Measure("total", "MB sent, up and down", lambda r: (r.uplink_bytes + r.downlink_bytes) / 1e6),
    Measure("up", "MB sent up", lambda r: r.uplink_bytes / 1e6),
    Measure("down", "MB sent down", lambda r: r.downlink_bytes / 1e6),
    Measure("rounds", "round", lambda _: 1.0),
)
"""The axes of the picture; the first is the default."""

ROUNDS = MEASURES[-1]


@dataclass(frozen=True, slots=True)
class Curve:
    """A figure over the rounds of a run, or its mean over several runs; all shapes are (points,).

    Args:
        x: what was sent so far, or the round.
        y: the figure.
        number: the round of each point.
        stage: its stage.
    """

    x: Values
    y: Values
    number: Values
    stage: Values

    def at(self, points: NDArray[np.bool_] | NDArray[np.intp]) -> Curve:
        """Return the curve of some of the points, by a mask or by their numbers."""
        return Curve(self.x[points], self.y[points], self.number[points], self.stage[points])

    def part(self, stage: int) -> Curve:
        """Return the points of a stage; those of stage 2 begin with the last of stage 1."""
        inside = np.flatnonzero(self.stage == stage)
        if stage == 2 and inside.size and inside[0] > 0:
            inside = np.concatenate([[inside[0] - 1], inside])
        return self.at(inside)


def curve_of(run: Run, measure: Measure) -> Curve:
    """Return the metric of a run where it was tested; the last point is the final metric."""
    metrics = [played.test_metric for played in run.rounds]
    if run.is_finished:
        metrics[-1] = run.results.final_metric
    whole = Curve(
        x=np.cumsum([measure.of_round(played) for played in run.rounds]),
        y=np.array([np.nan if metric is None else metric for metric in metrics], np.float64),
        number=np.array([played.number for played in run.rounds], np.float64),
        stage=np.array([played.stage for played in run.rounds], np.float64),
    )
    return whole.at(~np.isnan(whole.y))


def curves_of(runs: Sequence[Run], measure: Measure) -> list[tuple[Run, Curve]]:
    """Return the runs that were tested, with their curves."""
    found = [(run, curve_of(run, measure)) for run in runs]
    return [(run, curve) for run, curve in found if curve.x.size]


def common_rounds(curves: Sequence[Curve]) -> list[Curve]:
    """Return the curves at the rounds that all of them have, in the same stage."""
    places = [list(zip(curve.number, curve.stage, strict=True)) for curve in curves]
    common = set(places[0]).intersection(*places)
    return [
        curve.at(np.array([place in common for place in own], bool))
        for curve, own in zip(curves, places, strict=True)
    ]


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the mean of curves over the rounds that all of them have."""
    cut = common_rounds(curves)
    return Curve(
        x=np.mean([curve.x for curve in cut], axis=0),
        y=np.mean([curve.y for curve in cut], axis=0),
        number=cut[0].number,
        stage=cut[0].stage,
    )


def accuracy_plot(section: Section) -> Plot | None:
    """Return the plot, None where nothing was tested."""
    if all(run.results.final_metric is None for run in section.runs):
        return None
    many = any(len(variant.runs) > 1 for variant in section.variants)
    stages = any(played.stage == 2 for run in section.runs for played in run.rounds)
    caption = f"{section.metric.capitalize()} of the server's model after each tested round"
    if many:
        caption += "; thick lines are means over the seeds, thin ones single runs"
    if stages:
        caption += "; solid lines and filled markers are stage 1, dotted and open ones stage 2"
    named = len(section.variants) <= MOST_NAMED
    if not named:
        caption += "; hovering names a line"
    scales = ("linear", "log")
    longest = max(len(run.rounds) for run in section.runs)
    return Plot(
        name="accuracy",
        title=f"{section.metric.capitalize()} against traffic",
        caption=caption + ".",
        switches=(
            Switch("horizontal axis", tuple(measure.name for measure in MEASURES)),
            Switch("scale", scales),
        ),
        views={
            (number, kind): {
                "data": [
                    trace
                    for variant in section.variants
                    for trace in _traces(variant, measure, section.metric)
                ],
                "layout": {
                    "xaxis": _axis(measure, scale, longest),
                    "yaxis": _metric_axis(section),
                    "hovermode": "closest",
                    "showlegend": named,
                    "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
                },
            }
            for number, measure in enumerate(MEASURES)
            for kind, scale in enumerate(scales)
        },
        height=480,
    )


def _axis(measure: Measure, scale: str, longest: int) -> Layout:
    if scale == "log":
        return axis(measure.title, type="log")
    if measure is ROUNDS:
        return {**round_axis(longest), "rangemode": "tozero"}
    return axis(measure.title, rangemode="tozero")


def _metric_axis(section: Section) -> Layout:
    """Return the vertical axis; around a single value it would reach one to each side."""
    found = {played.test_metric for run in section.runs for played in run.rounds}
    values = found - {None} | {run.results.final_metric for run in section.runs} - {None}
    if len(values) > 1:
        return axis(section.metric)
    (value,) = values
    assert value is not None
    return axis(section.metric, range=[value - 0.05, value + 0.05])


def _traces(variant: Variant, measure: Measure, metric: str) -> Iterator[Trace]:
    hover = f"%{{fullData.name}}<br>{plain(metric)} %{{y:.4f}}"
    if measure is not ROUNDS:
        hover += f"<br>%{{x:,.3f}} {measure.title}"
    curves = curves_of(variant.runs, measure)
    if len(variant.runs) > 1:
        for run, curve in curves:
            name = f"{variant.label}, seed {run.seed}"
            yield from _lines(variant, curve, name, hover, is_main=False)
    counted = curves_of(variant.counted, measure)
    if counted:
        mean = mean_curve([curve for _, curve in counted])
        yield from _lines(variant, mean, variant.label, hover, is_main=True)


def _lines(
    variant: Variant, curve: Curve, name: str, hover: str, *, is_main: bool
) -> Iterator[Trace]:
    """Yield a line for each stage that the curve has."""
    shown = False
    for stage, dash, opened in ((1, "solid", 0), (2, "dot", 100)):
        part = curve.part(stage)
        if not part.x.size:
            continue
        marked = is_main and len(curve.x) <= 60
        yield {
            "type": "scatter",
            "mode": "lines+markers" if marked or len(curve.x) == 1 else "lines",
            "x": typed(part.x),
            "y": typed(part.y),
            "customdata": typed(np.stack([part.number, part.stage], axis=1), "i4"),
            "name": plain(name),
            "legendgroup": str(variant.number),
            "showlegend": is_main and not shown,
            "opacity": 1 if is_main else 0.4,
            "line": {
                "color": COLORS[variant.number % len(COLORS)],
                "width": 2.5 if is_main else 1,
                "dash": dash,
            },
            "marker": {
                "symbol": (variant.number + variant.number // len(COLORS)) % 8 + opened,
                "size": typed(np.where(part.stage == stage, 7, 0), "u1"),  # the joint has its mark
            },
            "hovertemplate": f"{hover}<br>round %{{customdata[0]}}, stage %{{customdata[1]}}"
            "<extra></extra>",
        }
        shown = True
