"""Traffic: bytes of each round, up and down, stacked by block or by what they are for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fedobd.experiments import BYTE_PARTS
from fedobd.report._gather import Section
from fedobd.report._plot import (
    MOST_NAMED,
    Plot,
    Switch,
    Trace,
    axis,
    block_color,
    plain,
    round_axis,
    shorten,
    stage_marks,
    step_note,
    thin,
    typed,
)
from fedobd.report._run import Run, Values

PARTS = (*BYTE_PARTS, "openings", "refused or repeated")
"""What the bytes of a round are for."""

PART_COLORS = ("#7a7f87", "#1c7ed6", "#a67c00", "#2b9348", "#ae3ec9", "#d9480f")

_MOST_BARS = 1500
"""Bars that are drawn at most; areas above, which are drawn faster."""

Stack = list[tuple[str, str, Values]]
"""Name, color and bytes of each round, bottom first."""


def stack_by_block(run: Run) -> tuple[Stack, Stack] | None:
    """Return the bytes of blocks up and down; None in folders that do not say."""
    if run.uplink is None or run.downlink is None:
        return None
    broadcasts = np.array([[played.broadcasts] for played in run.rounds])
    blocks = run.uplink.num_bytes, run.downlink.num_bytes * broadcasts
    totals = (
        [played.uplink_bytes for played in run.rounds],
        [played.downlink_bytes for played in run.rounds],
    )
    count = len(run.schema.blocks)
    stacks: list[Stack] = []
    for own, total in zip(blocks, totals, strict=True):
        stack: Stack = [("all else", PART_COLORS[0], np.array(total) - own.sum(axis=1))]
        for number, block in enumerate(run.schema.blocks):
            stack.append((block.name, block_color(number, count), own[:, number]))
        stacks.append(stack)
    return stacks[0], stacks[1]


def stack_by_part(run: Run) -> tuple[Stack, Stack]:
    """Return the bytes up and down by what they are for; parts without any are left out."""

    def stack(parts: Sequence[dict[str, int]]) -> Stack:
        found = [
            (part, color, np.array([own.get(part, 0) for own in parts], np.float64))
            for part, color in zip(PARTS, PART_COLORS, strict=True)
        ]
        return [one for one in found if one[2].any()]

    return (
        stack([played.uplink_parts for played in run.rounds]),
        stack([played.downlink_parts for played in run.rounds]),
    )


def traffic_plot(section: Section, step: int) -> Plot:
    """Return the plot of bytes by round, for one run of each variant.

    Args:
        section: whose runs.
        step: draw each so many-th round.
    """
    views: dict[tuple[int, ...], dict[str, Any]] = {}
    by_block = [stack_by_block(variant.shown) for variant in section.variants]
    kinds = ["block"] if all(found is not None for found in by_block) else []
    kinds.append("use")
    for number, variant in enumerate(section.variants):
        blocks = by_block[number]
        for kind, name in enumerate(kinds):
            stacks = blocks if name == "block" else stack_by_part(variant.shown)
            assert stacks is not None
            views[number, kind] = _view(variant.shown, stacks, step)
    seeds = ", ".join(dict.fromkeys(f"{v.shown.seed}" for v in section.variants))
    caption = (
        f"Measured bytes of each round, all clients together, seed {seeds}: above what went up, "
        "below what went down; k is 1,000 bytes, M 1,000,000. By use: headers, levels, raw values "
        "and buffers, openings and what was refused or sent again."
    )
    if "block" in kinds:
        caption += (
            " By block: frames of each block, from the input (blue) to the output (red); all "
            "else is headers, openings, and what was refused or sent again."
        )
    return Plot(
        name="traffic",
        title="Bytes of each round",
        caption=caption + step_note(step),
        switches=(
            Switch("method", tuple(variant.label for variant in section.variants)),
            Switch("stacked by", tuple(kinds)),
        ),
        views=views,
        height=520,
    )


def _view(run: Run, stacks: tuple[Stack, Stack], step: int) -> dict[str, Any]:
    rounds = thin(len(run.rounds), step)
    few = len(stacks[0]) <= MOST_NAMED
    return {
        "data": [t for way, stack in enumerate(stacks) for t in _traces(run, stack, way, rounds)],
        "layout": {
            "barmode": "stack",
            "bargap": 0.1,
            "showlegend": few,
            "legend": {"orientation": "h", "y": 1.06, "yanchor": "bottom", "traceorder": "normal"},
            "hovermode": "closest",
            "grid": {"rows": 2, "columns": 1, "pattern": "coupled", "roworder": "top to bottom"},
            "xaxis": round_axis(len(run.rounds)),
            "yaxis": axis("bytes up", domain=[0.54, 1], exponentformat="SI"),
            "yaxis2": axis("bytes down", domain=[0, 0.46], exponentformat="SI"),
            **stage_marks(run, rounds),
        },
    }


def _traces(run: Run, stack: Stack, way: int, rounds: Sequence[int]) -> Iterator[Trace]:
    numbers = typed([run.rounds[index].number for index in rounds], "i4")
    as_bars = len(stack) * len(rounds) <= _MOST_BARS
    for name, color, values in stack:
        shape: Trace = (
            {"type": "bar", "marker": {"color": color}}
            if as_bars
            else {
                "type": "scatter",
                "mode": "lines",
                "line": {"width": 0, "shape": "hvh", "color": color},
                "fillcolor": color,
                "stackgroup": "up" if way == 0 else "down",
            }
        )
        yield shape | {
            "x": numbers,
            "y": typed(values[rounds], "i4" if values.max() < 2**31 else "f8"),
            "yaxis": "y" if way == 0 else "y2",
            "name": plain(shorten(name)),
            "legendgroup": plain(name),
            "showlegend": way == 0,
            "hovertemplate": f"%{{y:,.0f}} bytes {'up' if way == 0 else 'down'}, round %{{x}}",
        }
