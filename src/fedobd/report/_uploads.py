"""Uploads: which blocks clients sent in which round, the picture of the method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedobd.display import format_share
from fedobd.report._gather import Section, Variant
from fedobd.report._plot import (
    Layout,
    Plot,
    Switch,
    axis,
    plain,
    shorten,
    stage_marks,
    step_note,
    thin,
    typed,
)
from fedobd.report._run import Run, Values


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


def upload_map(section: Section, step: int) -> Plot:
    """Return the heat map of blocks by rounds, for one run of each variant.

    Args:
        section: whose runs.
        step: draw each so many-th round.
    """
    seeds = ", ".join(dict.fromkeys(f"{v.shown.seed}" for v in section.variants))
    order = sorted(section.variants, key=lambda variant: not drops_blocks(variant))
    return Plot(
        name="uploads",
        title="Which blocks were uploaded",
        caption=f"Share of a round's clients that uploaded a block, seed {seeds}. Blocks stand "
        "with their number of parameters, the input at the bottom. The mean block difference is "
        "the mean over the round's clients, of blocks that were dropped too." + step_note(step),
        switches=(Switch("method", tuple(variant.label for variant in order)),),
        views={(number,): _view(variant.shown, step) for number, variant in enumerate(order)},
        height=map_height(section.variants),
    )


def drops_blocks(variant: Variant) -> bool:
    """Whether clients of a variant choose blocks, so that its picture says something."""
    return bool((variant.shown.uploads.min(axis=0) < variant.shown.uploads.max(axis=0)).any())


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
        "hovertemplate": "%{y} parameters<br>round %{x}: %{z} % of the clients",
    }
    if run.differences is not None:
        trace["customdata"] = typed(run.differences[rounds].T)
        trace["hovertemplate"] += "<br>mean block difference %{customdata:.3g}"
    return {
        "data": [trace],
        "layout": {
            "xaxis": axis("round"),
            "yaxis": block_axis(run),
            **stage_marks(run, rounds, color="black"),
        },
    }


def warning(variant: Variant) -> str | None:
    """Return a warning of blocks that no client uploaded in stage 1, None without any."""
    sentences = []
    for run in variant.runs:
        blocks = run.never_uploaded()
        if blocks:
            total = run.schema.num_parameters
            shares = {block.name: block.num_parameters / total for block in blocks}
            named = ", ".join(f"{name} ({format_share(share)})" for name, share in shares.items())
            whole = format_share(sum(shares.values()))
            sentences.append(f"seed {run.seed}: {named}, {whole} of the parameters in all")
    if not sentences:
        return None
    return (
        f"{variant.label}: no client uploaded these blocks in stage 1, so they were not trained "
        f"on the server in it. {'; '.join(sentences)}. Split large blocks with "
        "model.blocks.max_block_fraction, or lower dropout_rate."
    )
