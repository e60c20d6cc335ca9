"""Chart: one picture, defined once for the page and for papers.

A chart has a view for each combination of its switches. A view is a specification of Vega-Lite,
whose data stand beside it as columns: the page's script and `_figures` put the two together, each
with a look of its own (fonts, colors of text and grid).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedobd.blocks import ModelSchema
from fedobd.report._run import Run

Spec = dict[str, Any]
"""A specification of Vega-Lite, or a part of one."""

COLORS = ("#d9480f", "#1c7ed6", "#2b9348", "#ae3ec9", "#a67c00", "#0c8599", "#e03177", "#7a7f87")
"""Colors of variants; each has a contrast of 3:1 and more on white and on the dark page."""

DEPTH = ((28, 126, 214), (12, 133, 153), (43, 147, 72), (166, 124, 0), (217, 72, 15))
"""Colors of blocks from input, blue, to output, red; with the same contrast."""


@dataclass(frozen=True, slots=True)
class Labels:
    """A column of texts, few of which differ.

    Args:
        texts: those that differ.
        codes: the number of each row's text.
    """

    texts: tuple[str, ...]
    codes: NDArray[Any]


Columns = Mapping[str, NDArray[Any] | Labels]
"""A data set by column; all columns have the same length."""


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
class View:
    """A drawing.

    Args:
        spec: what is drawn of the data; of several panels, in a `vconcat`.
        data: data sets by the names that `spec` calls them by.
        figure: the stem of its file among the figures for papers, and the label of the variant
            that it is of, empty where it is of all; None for a view that the page alone shows.
    """

    spec: Spec = field(repr=False)
    data: Mapping[str, Columns] = field(repr=False)
    figure: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A picture.

    Args:
        name: short, for the page's links; letters and hyphens.
        title: its heading.
        caption: exactly what is shown.
        views: by the numbers of the chosen options, such as `(0, 2)`.
        switches: what can be chosen.
        height: in pixels of the page.
    """

    name: str
    title: str
    caption: str
    views: Mapping[tuple[int, ...], View] = field(repr=False)
    switches: tuple[Switch, ...] = ()
    height: int = 420


def shorten(name: str, most: int = 20) -> str:
    """Return the end of a long name, where the names of a model's blocks differ."""
    return name if len(name) <= most else "…" + name[1 - most :]


def block_names(schema: ModelSchema) -> tuple[str, ...]:
    """Return number and short name of each block; the number tells equal endings apart."""
    return tuple(f"{number} {shorten(block.name)}" for number, block in enumerate(schema.blocks))


def block_color(number: int, num_blocks: int) -> str:
    """Return the color of a block, by its place between input and output, as `#rrggbb`."""
    place = number / max(num_blocks - 1, 1) * (len(DEPTH) - 1)
    left = min(int(place), len(DEPTH) - 2)
    parts = np.array(DEPTH[left]) * (left + 1 - place) + np.array(DEPTH[left + 1]) * (place - left)
    return "#" + "".join(f"{round(part):02x}" for part in parts)


def thin(num_rounds: int, step: int) -> list[int]:
    """Return the indices of the rounds that are drawn: each `step`-th one, and the last."""
    drawn = list(range(0, num_rounds, step))
    return drawn if drawn[-1] == num_rounds - 1 else [*drawn, num_rounds - 1]


def step_note(step: int) -> str:
    """Return a sentence on rounds that are not drawn."""
    return f" One of {step} rounds is drawn." if step > 1 else ""


def grid_columns(run: Run, rounds: Sequence[int], names: Sequence[str]) -> Columns:
    """Return round, its edges, and name, for a value of each name in each round, name by name.

    Args:
        run: whose rounds.
        rounds: those that are drawn, as indices; a round reaches half way to its neighbors.
        names: as many as there are rows of values.
    """
    numbers = np.array([run.rounds[index].number for index in rounds])
    middles = (numbers[1:] + numbers[:-1]) / 2
    edges = np.concatenate([[numbers[0] - 0.5], middles, [numbers[-1] + 0.5]])
    repeat = len(names)
    codes = np.repeat(np.arange(repeat, dtype="u2"), len(rounds))
    return {
        "round": np.tile(numbers.astype("u2"), repeat),
        "left": np.tile(edges[:-1].astype("f4"), repeat),
        "right": np.tile(edges[1:].astype("f4"), repeat),
        "name": Labels(tuple(names), codes),
    }


def stage_columns(run: Run, rounds: Sequence[int]) -> dict[str, NDArray[Any]]:
    """Return where stage 2 begins, as the one row of a data set, which has none without stage 2.

    Args:
        run: whose stages.
        rounds: which of its rounds are drawn, as indices.
    """
    second = [run.rounds[index].number for index in rounds if run.rounds[index].stage == 2]
    first = [run.rounds[index].number for index in rounds if run.rounds[index].stage == 1]
    has_border = bool(first and second)
    has_room = len(second) > 0.3 * len(rounds)  # for the words on the right of the line
    return {
        "border": np.array([(second[0] + first[-1]) / 2] if has_border else [], "f4"),
        "room": np.array([has_room] if has_border else [], "u1"),
    }


def byte_column(values: ArrayLike) -> NDArray[Any]:
    """Return numbers of bytes, one after the other, in 4 bytes each where they fit."""
    array = np.asarray(values).ravel()
    return array.astype("i4" if array.max(initial=0) < 2**31 else "f8")
