"""Uploads: which blocks clients sent in which round, the picture of the method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedobd.report._gather import Section, Variant
from fedobd.report._plot import (
    Layout,
    Plot,
    Switch,
    axis,
    plain,
    round_axis,
    shorten,
    stage_marks,
    step_note,
    thin,
    typed,
)
from fedobd.report._run import Run, Values
from fedobd.tracking import rare_blocks_warning


def upload_shares(run: Run) -> Values:
    """Return the share of a round's clients that sent a block, shape (rounds, blocks)."""
    shares: Values = run.uploads / np.array([[played.clients] for played in run.rounds])
    return shares


def block_labels(run: Run) -> list[str]:
    """Return the end of each block's name, and its parameters."""
    return [f"{shorten(block.name)} · {block.num_parameters:,}" for block in run.schema.blocks]


def block_axis(run: Run) -> Layout:
    """Return an axis of the blocks of a run, by number."""
    labels = list(map(plain, block_labels(run)))
    return axis("", tickmode="array", tickvals=list(range(len(labels))), ticktext=labels)


def map_height(variants: Sequence[Variant]) -> int:
    """Return a height in pixels for a plot with a line for each block."""
    most = max(len(variant.shown.schema.blocks) for variant in variants)
    return max(320, min(1000, 160 + 18 * most))


def upload_map(section: Section, step: int) -> Plot | None:
    """Return the heat map of blocks by rounds, for each run that leaves out blocks.

    Args:
        section: whose runs.
        step: draw each so many-th round.

    Returns:
        The plot, None where every client uploaded every block.
    """
    variants = [variant for variant in section.variants if drops_blocks(variant)]
    if not variants:
        return None
    shown = [(variant, run) for variant in variants for run in variant.counted]
    labels = [v.label + (f", seed {r.seed}" if len(v.counted) > 1 else "") for v, r in shown]
    others = [v.label for v in section.variants if v not in variants]
    left_out = f" Not shown: {', '.join(others)}, where all upload every block." if others else ""
    hover = (
        " The mean block difference, on hovering, is the mean over the round's clients, of blocks "
        "that were dropped too."
        if any(run.differences is not None for _, run in shown)
        else ""
    )
    return Plot(
        name="uploads",
        title="Which blocks were uploaded",
        caption="How many of a round's clients uploaded a block: dark blocks stayed behind. "
        "Blocks stand with their number of parameters, the input at the bottom."
        f"{hover}{left_out}{step_note(step)}",
        switches=(Switch("run", tuple(labels)),),
        views={(number,): _view(run, step) for number, (_, run) in enumerate(shown)},
        height=map_height(variants),
    )


def drops_blocks(variant: Variant) -> bool:
    """Whether clients of a variant choose blocks, so that its picture says something."""
    uploads = variant.shown.uploads  # of each block in each round
    return bool((uploads.min(axis=1) < uploads.max(axis=1)).any())


def _view(run: Run, step: int) -> dict[str, Any]:
    rounds = thin(len(run.rounds), step)
    count = len(run.schema.blocks)
    numbers = [run.rounds[index].number for index in rounds]
    trace: dict[str, Any] = {
        "type": "heatmap",
        "x": typed(numbers, "i4"),
        "y": typed(range(count), "i4"),
        "z": typed(np.round(100 * upload_shares(run)[rounds].T), "u1"),
        "zmin": 0,
        "zmax": 100,
        "colorscale": "Viridis",
        "colorbar": {
            "title": {"text": "% of the clients", "side": "top"},
            "tickvals": [0, 50, 100],
            "orientation": "h",
            "thickness": 10,
            "y": 1.02,
            "yanchor": "bottom",
        },
        "name": "",
        "text": typed(run.uploads[rounds].T, "u2"),
        "hovertemplate": "%{y} parameters<br>round %{x}: %{text} clients, %{z} %",
    }
    if run.differences is not None:
        trace["customdata"] = typed(run.differences[rounds].T)
        trace["hovertemplate"] += "<br>mean block difference %{customdata:.3g}"
    return {
        "data": [trace],
        "layout": {
            "xaxis": round_axis(len(run.rounds)),
            "yaxis": block_axis(run),
            **stage_marks(run, rounds, color="black"),
        },
    }


def warning(variant: Variant) -> str | None:
    """Return a warning of blocks that starved in stage 1, None without any."""
    runs = variant.counted
    return rare_blocks_warning(runs[0].config.chosen, {run.seed: run.starved for run in runs})
