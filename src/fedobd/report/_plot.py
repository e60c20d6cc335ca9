"""Plot: one picture of the page, as plain data for plotly.js.

A plot has a view for each combination of its switches; a view is a figure of plotly. Colors of the
page (text, grid, background) are the page's business, so that plots follow light and dark.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fedobd.report._run import Run

Trace = dict[str, Any]
Layout = dict[str, Any]

COLORS = (
    "#d9480f",
    "#1c7ed6",
    "#2b9348",
    "#ae3ec9",
    "#a67c00",
    "#0c8599",
    "#e03177",
    "#7a7f87",
)
"""Colors of variants; each has a contrast of 3:1 and more on white and on the dark page."""

DEPTH = ((28, 126, 214), (12, 133, 153), (43, 147, 72), (166, 124, 0), (217, 72, 15))
"""Colors of blocks from input, blue, to output, red; with the same contrast."""


MOST_NAMED = 12
"""Names that a legend holds at most."""


@dataclass(frozen=True, slots=True)
class Switch:
    """A choice between views.

    Args:
        name: what is chosen.
        options: what can be chosen; the first is shown at first.
    """

    name: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A picture.

    Args:
        name: short, for the page's links; letters and hyphens.
        title: its heading.
        caption: exactly what is shown.
        views: figures by the numbers of the chosen options, such as `(0, 2)`.
        switches: what can be chosen.
        height: in pixels.
    """

    name: str
    title: str
    caption: str
    views: Mapping[tuple[int, ...], dict[str, Any]] = field(repr=False)
    switches: tuple[Switch, ...] = ()
    height: int = 420


def typed(values: ArrayLike, kind: str = "f4") -> dict[str, str]:
    """Return an array as plotly.js takes it: base64 of its little-endian elements.

    Args:
        values: one or two dimensions.
        kind: element type, such as `f4`, `i4` or `u1`.
    """
    array = np.ascontiguousarray(values, dtype=np.dtype(kind).newbyteorder("<"))
    data = {"dtype": kind, "bdata": base64.b64encode(array.tobytes()).decode("ascii")}
    if array.ndim > 1:
        data["shape"] = ", ".join(map(str, array.shape))
    return data


def plain(text: str) -> str:
    """Return text so that plotly.js shows it as it is and reads no markup in it."""
    return html.escape(text, quote=False)


def shorten(name: str, most: int = 20) -> str:
    """Return the end of a long name, where the names of a model's blocks differ."""
    return name if len(name) <= most else "…" + name[1 - most :]


def block_color(number: int, num_blocks: int) -> str:
    """Return the color of a block, by its place between input and output, as `#rrggbb`."""
    place = number / max(num_blocks - 1, 1) * (len(DEPTH) - 1)
    left = min(int(place), len(DEPTH) - 2)
    parts = np.array(DEPTH[left]) * (left + 1 - place) + np.array(DEPTH[left + 1]) * (place - left)
    return "#" + "".join(f"{round(part):02x}" for part in parts)


def axis(title: str, **more: Any) -> Layout:
    """Return an axis with a title."""
    return {"title": {"text": title}, "automargin": True, **more}


def round_axis(num_rounds: int) -> Layout:
    """Return an axis of rounds; few have a tick each, so that none stands between two."""
    return axis("round", **({"dtick": 1} if num_rounds <= 10 else {}))


def stage_marks(run: Run, rounds: Sequence[int], **line: str) -> Layout:
    """Return a line where stage 2 begins, as part of a layout over rounds.

    Args:
        run: whose stages.
        rounds: which of its rounds are drawn, as indices.
        line: the line's color, where it is not that of text.
    """
    second = [run.rounds[index].number for index in rounds if run.rounds[index].stage == 2]
    if not second or len(second) == len(rounds):
        return {}
    first = [run.rounds[index].number for index in rounds if run.rounds[index].stage == 1]
    border = (second[0] + first[-1]) / 2
    has_room = len(second) > 0.3 * len(rounds)  # for the words on the right of the line
    return {
        "shapes": [
            {"type": "line", "x0": border, "x1": border, "y0": 0, "y1": 1, "yref": "paper"}
            | {"line": {"width": 1.5, "dash": "dash", **line}}
        ],
        "annotations": [
            {"x": border, "y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False}
            | {"text": "stage 2 →", "xanchor": "left" if has_room else "right"}
        ],
    }


def thin(num_rounds: int, step: int) -> list[int]:
    """Return the indices of the rounds that are drawn: each `step`-th one, and the last."""
    kept = list(range(0, num_rounds, step))
    return kept if kept[-1] == num_rounds - 1 else [*kept, num_rounds - 1]


def step_note(step: int) -> str:
    """Return a sentence on rounds that are not drawn."""
    return f" One of {step} rounds is drawn." if step > 1 else ""
