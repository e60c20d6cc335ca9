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
from fedobd.report._templates import Spec, make_spec

COLORS = ("#d9480f", "#1c7ed6", "#2b9348", "#ae3ec9", "#a67c00", "#0c8599", "#e03177", "#7a7f87")
"""Colors of variants; each has a contrast of 3:1 and more on white and on the dark page."""

DEPTH = ((28, 126, 214), (12, 133, 153), (43, 147, 72), (166, 124, 0), (217, 72, 15))
"""Colors of blocks from input, blue, to output, red; with the same contrast."""


@dataclass(frozen=True, slots=True)
class Labels:
    """A column of texts, few of which differ: those, and the number of each row's text."""

    texts: tuple[str, ...]
    codes: NDArray[Any]


Columns = Mapping[str, NDArray[Any] | Labels]
"""A data set by column; all columns have the same length."""


@dataclass(frozen=True, slots=True)
class Switch:
    """A choice between views; the first option is shown at first."""

    name: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A drawing.

    Args:
        spec: what is drawn of the data; of several panels, in a `vconcat`.
        data: data sets by their names in `spec`.
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
        views: by the numbers of the chosen options, such as `(0, 2)`.
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


def block_colors(num_blocks: int) -> list[str]:
    """Return the color of each block, by its place between input and output, as `#rrggbb`."""
    places = np.linspace(0, len(DEPTH) - 1, num_blocks)
    channels = [np.interp(places, range(len(DEPTH)), values) for values in np.transpose(DEPTH)]
    return ["#" + color.tobytes().hex() for color in np.transpose(channels).round().astype("u1")]


def thin(num_rounds: int, step: int) -> list[int]:
    """Return the indices of the rounds that are drawn: each `step`-th one, and the last."""
    drawn = list(range(0, num_rounds, step))
    return drawn if drawn[-1] == num_rounds - 1 else [*drawn, num_rounds - 1]


def step_note(step: int) -> str:
    """Return a sentence on rounds that are not drawn."""
    return f" One of {step} rounds is drawn." if step > 1 else ""


def rounds_view(
    chart: str,
    figure: tuple[str, str] | None,
    run: Run,
    step: int,
    grids: Mapping[str, tuple[Sequence[str], Mapping[str, NDArray[Any]]]],
    **values: Any,
) -> View:
    """Return a view of values by name and round, with a line where stage 2 begins.

    Args:
        chart: whose template it is drawn by.
        figure: as in `View`.
        run: whose rounds.
        step: draw each so many-th round; it reaches half way to its neighbors.
        grids: by data set, names and columns, each of shape (rounds, names).
        values: what else the template is filled in with.
    """
    drawn = thin(len(run.rounds), step)
    numbers = np.array([run.rounds[index].number for index in drawn])
    middles = (numbers[1:] + numbers[:-1]) / 2
    edges = np.concatenate([[numbers[0] - 0.5], middles, [numbers[-1] + 0.5]]).astype("f4")
    data: dict[str, Columns] = {
        grid: {
            "round": np.tile(numbers.astype("u2"), len(names)),
            "left": np.tile(edges[:-1], len(names)),
            "right": np.tile(edges[1:], len(names)),
            "name": Labels(tuple(names), np.repeat(np.arange(len(names), dtype="u2"), len(drawn))),
            **{name: column[drawn].T.ravel() for name, column in columns.items()},
        }
        for grid, (names, columns) in grids.items()
    }
    is_second = np.array([run.rounds[index].stage == 2 for index in drawn])
    has_stages = bool(is_second.any() and not is_second.all())
    border = [(numbers[is_second][0] + numbers[~is_second][-1]) / 2] if has_stages else []
    has_room = [is_second.mean() > 0.3] if has_stages else []  # for the words right of the line
    data["stages"] = {"border": np.array(border, "f4"), "room": np.array(has_room, "u1")}
    spec = make_spec(chart, has_stages=has_stages, **values)
    return View(spec=spec, data=data, figure=figure)


def byte_column(values: ArrayLike) -> NDArray[Any]:
    """Return numbers of bytes in 4 bytes each where they fit."""
    array = np.asarray(values)
    return array.astype("i4" if array.max(initial=0) < 2**31 else "f8")
