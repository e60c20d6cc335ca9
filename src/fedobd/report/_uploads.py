"""Uploads: which blocks clients sent in which round, the picture of the method."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedobd.report._chart import Chart, Switch, View, block_names, rounds_view, step_note
from fedobd.report._gather import Section, Variant
from fedobd.report._run import Run, Values
from fedobd.tracking import rare_blocks_warning


def upload_shares(run: Run) -> Values:
    """Return the share of a round's clients that sent a block, shape (rounds, blocks)."""
    shares: Values = run.uploads / np.array([[played.clients] for played in run.rounds])
    return shares


def block_labels(run: Run) -> list[str]:
    """Return number and short name of each block, and its parameters."""
    named = zip(block_names(run.schema), run.schema.blocks, strict=True)
    return [f"{name} · {block.num_parameters:,}" for name, block in named]


def map_height(variants: Sequence[Variant]) -> int:
    """Return a height in pixels for a chart with a line for each block."""
    most = max(len(variant.shown.schema.blocks) for variant in variants)
    return max(320, min(1000, 160 + 18 * most))


def upload_map(section: Section, step: int) -> Chart | None:
    """Return the heat map of blocks by rounds, each `step`-th one, for runs that drop blocks.

    It is None where every client uploaded every block.
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
    return Chart(
        name="uploads",
        title="Which blocks were uploaded",
        caption="How many of a round's clients uploaded a block: dark blocks stayed behind. "
        "Blocks stand with their number of parameters, the input at the bottom."
        f"{hover}{left_out}{step_note(step)}",
        switches=(Switch("run", tuple(labels)),),
        views={
            (number,): _view(run, step, ("uploads", v.label) if run is v.shown else None)
            for number, (v, run) in enumerate(shown)
        },
        height=map_height(variants),
    )


def drops_blocks(variant: Variant) -> bool:
    """Whether clients of a variant choose blocks, so that its picture says something."""
    uploads = variant.shown.uploads  # of each block in each round
    return bool((uploads.min(axis=1) < uploads.max(axis=1)).any())


def _view(run: Run, step: int, figure: tuple[str, str] | None) -> View:
    labels, has_differences = block_labels(run), run.differences is not None
    cells = {
        "share": np.round(100 * upload_shares(run)).astype("u1"),
        "clients": run.uploads.astype("u2"),
    }
    if run.differences is not None:
        cells["difference"] = run.differences.astype("f4")
    return rounds_view(
        *("uploads", figure, run, step, {"cells": (labels, cells)}),
        labels=labels,
        has_differences=has_differences,
    )


def warning(variant: Variant) -> str | None:
    """Return a warning of blocks that stage 1 left out, None without any."""
    runs = variant.counted
    return rare_blocks_warning(runs[0].config.chosen, {run.seed: run.rare_blocks for run in runs})
