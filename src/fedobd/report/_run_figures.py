"""Run figures: bytes, bits and levels of one run, for papers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from fedobd.report._bits import MARK_HEIGHTS, bits_series
from fedobd.report._delivery import LevelBits
from fedobd.report._plot import MOST_NAMED, block_color, shorten
from fedobd.report._run import Run, Traffic
from fedobd.report._traffic import Stack, stack_by_block, stack_by_part
from fedobd.report._uploads import block_labels

_WIDTH, _HEIGHT = 5.0, 2.6  # inches
_COLORS = {"up": "#d55e00", "down": "#0072b2", "delivery": "#009e73"}
_MARKERS = {"nominal": ("o", "none"), "real": ("o", "full"), "entropy": ("|", "full")}


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure; sizes are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def count_rounds(axes: Any) -> None:
    """Let the horizontal axis count rounds, so that no tick stands between two."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="round")


def run_figures(run: Run, delivery: LevelBits | None) -> Iterator[tuple[str, Any]]:
    """Yield name and figure of what a run's folder says.

    Args:
        run: which.
        delivery: bits of the trained model's delivery; None where there are none.
    """
    yield "bytes-by-use", _stacked(run, stack_by_part(run))
    by_block = stack_by_block(run)
    if by_block is not None:
        yield "bytes-by-block", _stacked(run, by_block)
        yield "bits", _bits(run, delivery)
    for way, traffic in (("up", run.uplink), ("down", run.downlink)):
        if traffic is not None and traffic.levels.any():
            yield f"levels-{way}", _levels(run, traffic)


def _stacked(run: Run, stacks: tuple[Stack, Stack]) -> Any:
    """Draw bytes of each round, up and down, one above the other."""
    figure = new_figure(_WIDTH, 1.6 * _HEIGHT)
    panels = figure.subplots(2, sharex=True)
    edges = run.rounds[0].number - 0.5 + np.arange(len(run.rounds) + 1)
    names: dict[str, Any] = {}
    for axes, title, stack in zip(panels, ("MB up", "MB down"), stacks, strict=True):
        bottom = np.zeros(len(edges))
        for name, color, values in stack:
            top = bottom + np.append(values, values[-1]) / 1e6
            area = axes.fill_between(edges, bottom, top, step="post", color=color, linewidth=0)
            names.setdefault(shorten(name), area)
            bottom = top
        axes.set(ylabel=title)
        axes.set_ylim(bottom=0)
        axes.grid(visible=False, axis="x")
    count_rounds(panels[1])
    if len(names) <= MOST_NAMED:
        figure.legend(names.values(), names, ncols=3, loc="outside upper center")
    return figure


def _bits(run: Run, delivery: LevelBits | None) -> Any:
    """Draw bits for each parameter by block; open marks are nominal, bars the entropy."""
    labels = block_labels(run)
    figure = new_figure(_WIDTH, min(9.0, 1.2 + 0.2 * len(labels)))
    axes = figure.subplots()
    places = np.arange(len(labels))
    for way, kind, values in bits_series(run, delivery):
        marker, fill = _MARKERS[kind]
        axes.plot(
            values,
            places + MARK_HEIGHTS[way],
            linestyle="",
            marker=marker,
            fillstyle=fill,
            color=_COLORS[way],
            label=f"{way}, {kind}",
        )
    axes.set_yticks(places, labels, fontsize=7)
    axes.set(xlabel="bits for each parameter")
    axes.set_xlim(left=0)
    figure.legend(ncols=4, loc="outside upper center")
    return figure


def _levels(run: Run, traffic: Traffic) -> Any:
    """Draw the levels s of each block over the rounds that quantized it."""
    figure = new_figure(_WIDTH, _HEIGHT)
    axes = figure.subplots()
    rounds = np.array([played.number for played in run.rounds])
    blocks = run.schema.blocks
    for number, block in enumerate(blocks):
        held = traffic.levels[:, number] > 0
        if held.any():
            values, color = traffic.levels[held, number], block_color(number, len(blocks))
            axes.plot(rounds[held], values, color=color, marker=".", label=shorten(block.name))
    axes.set(ylabel="levels s")
    axes.set_ylim(bottom=0)
    count_rounds(axes)
    if len(blocks) <= MOST_NAMED:
        figure.legend(ncols=3, loc="outside upper center")
    return figure
