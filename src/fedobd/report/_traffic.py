"""Traffic: bytes of each round, up and down, stacked by block or by what they are for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedobd.experiments import BYTE_PARTS
from fedobd.report import _vega as vega
from fedobd.report._chart import (
    Chart,
    Spec,
    Switch,
    View,
    block_color,
    block_names,
    byte_column,
    grid_columns,
    stage_columns,
    step_note,
    thin,
)
from fedobd.report._gather import Section
from fedobd.report._run import Run, Values

PARTS = (*BYTE_PARTS, "initial payloads", "refused or repeated")
"""What the bytes of a round are for."""

PART_COLORS = ("#7a7f87", "#1c7ed6", "#a67c00", "#2b9348", "#ae3ec9", "#d9480f")

WAYS = ("up", "down")

BYTE_AXIS = {"format": "~s", "minExtent": 45, "maxExtent": 45}
"""Numbers such as 20M; both panels leave them the same room, so that rounds stand above rounds."""

Stack = list[tuple[str, str, Values]]
"""Name, color and bytes of each round, bottom first."""


def stack_by_block(run: Run) -> tuple[Stack, Stack]:
    """Return the bytes of blocks up and down."""
    broadcasts = np.array([[played.broadcasts] for played in run.rounds])
    blocks = run.uplink.num_bytes, run.downlink.num_bytes * broadcasts
    totals = (
        [played.uplink_bytes for played in run.rounds],
        [played.downlink_bytes for played in run.rounds],
    )
    names = block_names(run.schema)
    stacks: list[Stack] = []
    for num_bytes, total in zip(blocks, totals, strict=True):
        rest = np.array(total) - num_bytes.sum(axis=1)
        stack: Stack = [("all else", PART_COLORS[0], rest)]
        for number, name in enumerate(names):
            stack.append((name, block_color(number, len(names)), num_bytes[:, number]))
        stacks.append(stack)
    return stacks[0], stacks[1]


def stack_by_part(run: Run) -> tuple[Stack, Stack]:
    """Return the bytes up and down by what they are for; parts without any are left out."""

    def stack(rounds: Sequence[dict[str, int]]) -> Stack:
        parts = [
            (part, color, np.array([num_bytes.get(part, 0) for num_bytes in rounds], np.float64))
            for part, color in zip(PARTS, PART_COLORS, strict=True)
        ]
        return [part for part in parts if part[2].any()]

    return (
        stack([played.uplink_parts for played in run.rounds]),
        stack([played.downlink_parts for played in run.rounds]),
    )


def traffic_chart(section: Section, step: int) -> Chart:
    """Return the chart of bytes by round, for one run of each variant.

    Args:
        section: whose runs.
        step: draw each so many-th round.
    """
    kinds = (("block", stack_by_block), ("use", stack_by_part))
    seeds = ", ".join(dict.fromkeys(f"{v.shown.seed}" for v in section.variants))
    return Chart(
        name="traffic",
        title="Bytes of each round",
        caption=f"Measured bytes of each round, all clients together, seed {seeds}: above what "
        "went up, below what went down; k is 1,000 bytes, M 1,000,000. By use: headers, levels, "
        "raw values and buffers, initial payloads and what was refused or sent again. By block: "
        "frames of each block, from the input (blue) to the output (red); all else is headers, "
        f"initial payloads, and what was refused or sent again.{step_note(step)}",
        switches=(
            Switch("method", tuple(variant.label for variant in section.variants)),
            Switch("stacked by", tuple(kind for kind, _ in kinds)),
        ),
        views={
            (number, place): _view(
                variant.shown, stacks(variant.shown), step, (f"bytes-by-{kind}", variant.label)
            )
            for number, variant in enumerate(section.variants)
            for place, (kind, stacks) in enumerate(kinds)
        },
        height=520,
    )


def _view(run: Run, stacks: tuple[Stack, Stack], step: int, figure: tuple[str, str]) -> View:
    rounds = thin(len(run.rounds), step)
    stages = stage_columns(run, rounds)
    colors = {name: color for stack in stacks for name, color, _ in stack}
    data = {
        way: {
            **grid_columns(run, rounds, [name for name, _, _ in stack]),
            "bytes": byte_column([values[rounds] for _, _, values in stack]),
        }
        for way, stack in zip(WAYS, stacks, strict=True)
    }
    panels = [_panel(way, colors, stages) for way in WAYS]
    return View(
        spec=vega.panels_of(panels, tuple(colors)), data={**data, "stages": stages}, figure=figure
    )


def _panel(way: str, colors: dict[str, str], stages: dict[str, Any]) -> list[Spec]:
    """Return layers: a rectangle for each name in each round, and where stage 2 begins."""
    names, title = tuple(colors), "round" if way == "down" else None
    bars: Spec = {
        "data": {"name": way},
        "transform": [{"stack": "bytes", "groupby": ["round"], "as": ["low", "high"]}],
        "mark": {"type": "rect"},
        "encoding": {
            "x": vega.rounds_across("left", title),
            "x2": {"field": "right"},
            "y": vega.quantity("low", f"bytes {way}", axis=BYTE_AXIS),
            "y2": {"field": "high"},
            "color": vega.category("name", names, list(colors.values()), **vega.legend(names)),
            "opacity": vega.unless_hidden(1),
            "tooltip": vega.tooltip(
                name=("part", ""), bytes=(f"bytes {way}", ",d"), round=("round", "d")
            ),
        },
    }
    if way == "up":  # a parameter stands in one place and holds in both
        bars["params"] = [vega.legend_choice("name")]
    return [bars, *vega.stage_layers(stages, title=title, worded=way == "up")]
