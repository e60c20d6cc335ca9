"""Figures: the pictures of a report for papers, as PNG and SVG.

They have the width of a column, serifs, no title, and can be read in grey: methods differ in
marker and dash, stage 2 has open markers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from fedobd._lookup import not_installed
from fedobd.report._content import read_deliveries
from fedobd.report._curves import MEASURES, Curve, Measure, common_rounds, curves_of, mean_curve
from fedobd.report._gather import Section, Variant
from fedobd.report._run import Round
from fedobd.report._run_figures import count_rounds, new_figure, run_figures
from fedobd.report._uploads import block_labels, drops_blocks, upload_shares

_STYLE: dict[Any, Any] = {
    "font.family": "STIXGeneral",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "text.parse_math": False,
    "svg.hashsalt": "fedobd",
}

_LOOKS = (
    ("#000000", "-", "o"),
    ("#0072b2", "--", "s"),
    ("#d55e00", "-.", "^"),
    ("#009e73", ":", "D"),
    ("#8c5aa8", (0, (5, 1, 1, 1, 1, 1)), "v"),
    ("#7f7f7f", (0, (6, 3)), "P"),
)
"""Color, dash and marker of variants."""

_WIDTH, _HEIGHT = 3.5, 2.6  # inches: a column of a paper in two columns
_MAP_WIDTH = 5.0
_MOST_MARKERS = 12  # on a line


def draw_figures(sections: Sequence[Section], folder: Path) -> tuple[Path, ...]:
    """Draw the figures of all sections and return their files.

    Args:
        sections: what to draw; of several, each has its number in the names of its files.
        folder: an existing folder.

    Raises:
        UsageError: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    try:
        from matplotlib import rc_context
    except ModuleNotFoundError as error:
        raise not_installed("this", error, "report") from error
    files = []
    with rc_context(_STYLE):
        for number, section in enumerate(sections, start=1):
            prefix = f"section-{number}-" if len(sections) > 1 else ""
            for name, figure in _figures(section):
                for suffix in ("png", "svg"):
                    file = folder / f"{prefix}{name}.{suffix}"
                    dated = {"metadata": {"Date": None}} if suffix == "svg" else {}
                    figure.savefig(file, dpi=300, **dated)
                    files.append(file)
    return tuple(files)


def _looks() -> Iterator[tuple[Any, Any, str]]:
    """Yield color, dash and marker of one variant after another; the first 36 all differ."""
    for shift in count():
        for number, (color, dash, _) in enumerate(_LOOKS):
            yield color, dash, _LOOKS[(number + shift) % len(_LOOKS)][2]


def _figures(section: Section) -> Iterator[tuple[str, Any]]:
    """Yield name and figure."""
    if any(run.results.final_metric is not None for run in section.runs):
        for measure, name in zip(MEASURES, ("bytes", "up", "down", "rounds"), strict=True):
            yield f"accuracy-{name}", _accuracy(section, measure)
    yield "bytes-per-round", _traffic(section)
    deliveries = read_deliveries(section)
    names = [re.sub(r"[^\w.]+", "-", variant.label).strip("-") for variant in section.variants]
    for number, (variant, name) in enumerate(zip(section.variants, names, strict=True)):
        unique = name if names.count(name) == 1 else f"{name}-{number}"
        if drops_blocks(variant):
            yield f"uploads-{unique}", _upload_map(variant)
        for kind, figure in run_figures(variant.shown, deliveries[variant.label]):
            yield f"{kind}-{unique}", figure


def _accuracy(section: Section, measure: Measure) -> Any:
    """Draw means over the seeds, with a band of one standard deviation on each side."""
    figure = new_figure(_WIDTH, _HEIGHT)
    axes = figure.subplots()
    for variant, look in zip(section.variants, _looks(), strict=False):
        tested = curves_of(variant.counted, measure)
        if not tested:
            continue
        curves = common_rounds([curve for _, curve in tested])
        mean = mean_curve(curves)
        _line(axes, mean, look, variant.label)
        if len(curves) > 1:
            spread = np.std([curve.y for curve in curves], axis=0, ddof=1)
            band = mean.y - spread, mean.y + spread
            axes.fill_between(mean.x, *band, color=look[0], alpha=0.15, linewidth=0)
    axes.set(xlabel=measure.title, ylabel=section.metric)
    axes.legend()
    return figure


def _line(axes: Any, curve: Curve, look: tuple[Any, ...], label: str) -> None:
    color, dash, marker = look
    axes.plot(curve.x, curve.y, color=color, linestyle=dash)
    every = math.ceil(len(curve.x) / _MOST_MARKERS)
    marked = np.arange(len(curve.x)) % max(every, 1) == 0
    for stage, face in ((1, color), (2, "white")):
        own = marked & (curve.stage == stage)
        points = {"color": color, "marker": marker, "markerfacecolor": face, "linestyle": ""}
        axes.plot(curve.x[own], curve.y[own], **points)
    axes.plot([], [], color=color, linestyle=dash, marker=marker, label=label)


def _traffic(section: Section) -> Any:
    """Draw bytes of each round of the run that is shown of each variant, up and down."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = new_figure(_WIDTH, 1.6 * _HEIGHT)
    panels = figure.subplots(2, sharex=True)
    ways: tuple[tuple[str, Callable[[Round], int]], ...] = (
        ("MB up", lambda r: r.uplink_bytes),
        ("MB down", lambda r: r.downlink_bytes),
    )
    for axes, (title, num_bytes) in zip(panels, ways, strict=True):
        for variant, look in zip(section.variants, _looks(), strict=False):
            rounds = variant.shown.rounds
            curve = Curve(
                x=np.array([played.number for played in rounds], np.float64),
                y=np.array([num_bytes(played) / 1e6 for played in rounds]),
                number=np.array([played.number for played in rounds], np.float64),
                stage=np.array([played.stage for played in rounds], np.float64),
            )
            _line(axes, curve, look, variant.label)
        axes.set(ylabel=title, yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    count_rounds(panels[1])
    figure.legend(*panels[0].get_legend_handles_labels(), ncols=3, loc="outside upper center")
    return figure


def _upload_map(variant: Variant) -> Any:
    """Draw the share of each round's clients that uploaded a block."""
    run = variant.shown
    count = len(run.schema.blocks)
    figure = new_figure(_MAP_WIDTH, min(9.0, 1.0 + 0.17 * count))
    axes = figure.subplots()
    rounds = len(run.rounds)
    image = axes.imshow(
        upload_shares(run).T,
        aspect="auto",
        cmap="viridis",
        vmin=0,
        vmax=1,
        origin="lower",
        interpolation="none",
        extent=(0.5, rounds + 0.5, -0.5, count - 0.5),
    )
    second = np.flatnonzero(run.in_stage(2))
    if 0 < second.size < rounds:
        for color, dash in (("white", "-"), ("black", "--")):  # seen on dark and on light cells
            axes.axvline(second[0] + 0.5, color=color, linestyle=dash, linewidth=1)
    axes.set_yticks(range(count), block_labels(run), fontsize=7)
    axes.grid(visible=False)
    count_rounds(axes)
    figure.colorbar(image, label="share of the clients")
    return figure
