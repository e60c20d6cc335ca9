"""Curves: test accuracy against what was sent, and against rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedobd.report._gather import Section, Variant
from fedobd.report._plot import COLORS, Plot, Switch, Trace, axis, plain, typed
from fedobd.report._run import Round, Run, Values

_MOST_NAMED = 12  # variants that a legend names


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

    def at(self, points: NDArray[np.bool_]) -> Curve:
        """Return the curve of some of the points."""
        return Curve(self.x[points], self.y[points], self.number[points], self.stage[points])

    def part(self, stage: int) -> tuple[Values, Values]:
        """Return the points of a stage; those of stage 2 begin with the last of stage 1."""
        inside = np.flatnonzero(self.stage == stage)
        if stage == 2 and inside.size and inside[0] > 0:
            inside = np.concatenate([[inside[0] - 1], inside])
        return self.x[inside], self.y[inside]


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


def curves_of(variant: Variant, measure: Measure) -> dict[str, Curve]:
    """Return the curves of the runs of a variant that were tested, by label and seed."""
    found = {f"{variant.label}, seed {run.seed}": curve_of(run, measure) for run in variant.runs}
    return {name: curve for name, curve in found.items() if curve.x.size}


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
        caption += "; thick lines are means over the seeds, thin ones single seeds"
    if stages:
        caption += "; solid lines and filled markers are stage 1, dotted and open ones stage 2"
    named = len(section.variants) <= _MOST_NAMED
    if not named:
        caption += "; hovering names a line"
    scales = ("linear", "log")
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
                "data": [t for variant in section.variants for t in _traces(variant, measure)],
                "layout": {
                    "xaxis": axis(measure.title, type=scale, **_range_of(scale)),
                    "yaxis": axis(section.metric),
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


def _range_of(scale: str) -> dict[str, str]:
    return {"rangemode": "tozero"} if scale == "linear" else {}


def _traces(variant: Variant, measure: Measure) -> Iterator[Trace]:
    curves = curves_of(variant, measure)
    if len(curves) > 1:
        for name, curve in curves.items():
            yield from _lines(variant, curve, name, measure, is_main=False)
    if curves:
        mean = mean_curve(list(curves.values()))
        yield from _lines(variant, mean, variant.label, measure, is_main=True)


def _lines(
    variant: Variant, curve: Curve, name: str, measure: Measure, *, is_main: bool
) -> Iterator[Trace]:
    """Yield a line for each stage that the curve has."""
    digits = ",.0f" if measure.of_round is MEASURES[-1].of_round else ",.3f"
    shown = False
    for stage, dash, opened in ((1, "solid", 0), (2, "dot", 100)):
        x, y = curve.part(stage)
        if not len(x):
            continue
        marked = is_main and len(curve.x) <= 60
        yield {
            "type": "scatter",
            "mode": "lines+markers" if marked or len(curve.x) == 1 else "lines",
            "x": typed(x),
            "y": typed(y),
            "name": plain(name),
            "legendgroup": str(variant.number),
            "showlegend": is_main and not shown,
            "opacity": 1 if is_main else 0.4,
            "line": {
                "color": COLORS[variant.number % len(COLORS)],
                "width": 2.5 if is_main else 1,
                "dash": dash,
            },
            "marker": {"symbol": variant.number % 8 + opened, "size": 6},
            "hovertemplate": f"%{{y:.4f}} at %{{x:{digits}}}, stage {stage}",
        }
        shown = True
