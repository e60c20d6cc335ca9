"""Traffic: bytes of each round, up and down, stacked by block or by what they are for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedobd.experiments import BYTE_PARTS
from fedobd.report._chart import (
    Chart,
    Switch,
    View,
    block_colors,
    block_names,
    byte_column,
    rounds_view,
    step_note,
)
from fedobd.report._gather import Section
from fedobd.report._run import Run, Values

PARTS = (*BYTE_PARTS, "initial payloads", "refused or repeated")
"""What the bytes of a round are for."""

PART_COLORS = ("#7a7f87", "#1c7ed6", "#a67c00", "#2b9348", "#ae3ec9", "#d9480f")

WAYS = ("up", "down")

Stack = list[tuple[str, str, Values]]
"""Name, color and bytes of each round, bottom first."""


def stack_by_block(run: Run) -> list[Stack]:
    """Return the bytes of blocks up and down."""
    broadcasts = np.array([[played.broadcasts] for played in run.rounds])
    names = block_names(run.schema)
    stacks = []
    for num_bytes, total in (
        (run.uplink.num_bytes, [played.uplink_bytes for played in run.rounds]),
        (run.downlink.num_bytes * broadcasts, [played.downlink_bytes for played in run.rounds]),
    ):
        rest = np.array(total) - num_bytes.sum(axis=1)
        blocks = zip(names, block_colors(len(names)), num_bytes.T, strict=True)
        stacks.append([("all else", PART_COLORS[0], rest), *blocks])
    return stacks


def stack_by_part(run: Run) -> list[Stack]:
    """Return the bytes up and down by what they are for; parts without any are left out."""
    return [
        [
            (part, color, num_bytes)
            for part, color, num_bytes in zip(PARTS, PART_COLORS, _parts(run, way), strict=True)
            if num_bytes.any()
        ]
        for way in WAYS
    ]


def _parts(run: Run, way: str) -> Values:
    """Return the bytes of each round by what they are for, shape (parts, rounds)."""
    parts = [getattr(played, f"{way}link_parts") for played in run.rounds]
    return np.array([[num_bytes.get(part, 0.0) for num_bytes in parts] for part in PARTS])


def traffic_chart(section: Section, step: int) -> Chart:
    """Return the chart of bytes by round, each `step`-th one, for one run of each variant."""
    kinds = {"block": stack_by_block, "use": stack_by_part}
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
            Switch("stacked by", tuple(kinds)),
        ),
        views={
            (number, place): _view(
                variant.shown, stacks(variant.shown), step, (f"bytes-by-{kind}", variant.label)
            )
            for number, variant in enumerate(section.variants)
            for place, (kind, stacks) in enumerate(kinds.items())
        },
        height=520,
    )


def _view(run: Run, stacks: Sequence[Stack], step: int, figure: tuple[str, str]) -> View:
    colors = {name: color for stack in stacks for name, color, _ in stack}
    grids = {}
    for way, stack in zip(WAYS, stacks, strict=True):
        num_bytes = np.array([values for _, _, values in stack]).reshape(-1, len(run.rounds))
        grids[way] = [name for name, _, _ in stack], {"bytes": byte_column(num_bytes.T)}
    return rounds_view(
        *("traffic", figure, run, step, grids), names=list(colors), colors=list(colors.values())
    )
