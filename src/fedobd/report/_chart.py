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

from fedobd._schema import ModelSchema
from fedobd.report._run import Run

Spec = dict[str, Any]
"""A specification of Vega-Lite, or a part of one."""

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

NEAREST: Spec = {
    "name": "near",
    "select": {"type": "point", "on": "pointermove", "nearest": True, "clear": "pointerout"},
}
"""A parameter: the mark nearest to the mouse, whose tooltip is shown."""

MOST_NAMED = 12
"""Names that a legend holds at most; more would take the picture's room."""


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


def quantity(name: str, title: str | None = None, **more: Any) -> Spec:
    """Return an encoding of a column of numbers."""
    return {"field": name, "type": "quantitative", "title": title, **more}


def category(name: str, texts: Sequence[str], values: Sequence[Any] = (), **more: Any) -> Spec:
    """Return an encoding that gives each text of a column its own value, such as a color.

    Args:
        name: of the column.
        texts: all texts, in the order of the legend.
        values: as many; without any it is left to the channel.
        more: further properties of the encoding.
    """
    scale = {"domain": list(texts)} | ({"range": list(values)} if values else {})
    return {"field": name, "type": "nominal", "title": None, "scale": scale, **more}


def legend(texts: Sequence[str]) -> Spec:
    """Return a property `legend`, which leaves out legends that nobody could read."""
    return {} if len(texts) <= MOST_NAMED else {"legend": None}


def tooltip(**titles: tuple[str, str]) -> list[Spec]:
    """Return what hovering tells: title and format of each column; texts have an empty format.

    That empty format has to stand there: without one, Vega-Lite 6.4 looks for the text in the
    wrong place where the nearest mark is told of, and says `undefined`.
    """
    return [
        {
            "field": name,
            "title": title,
            "type": "quantitative" if kind else "nominal",
            "format": kind,
        }
        for name, (title, kind) in titles.items()
    ]


def hover_layer(**encoding: Any) -> Spec:
    """Return a layer that tells of the point nearest to the mouse, and marks it.

    Its points are seen while they are hovered over, so that a line without marks can be read.
    """
    shown = {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0}
    return {
        "name": "hover",
        "params": [NEAREST],
        "mark": {"type": "point", "size": 90, "strokeWidth": 2},
        "encoding": {**encoding, "opacity": shown},
    }


def legend_choice(name: str) -> Spec:
    """Return a parameter: a click on the legend leaves that text's marks alone in the picture."""
    return {"name": "chosen", "select": {"type": "point", "fields": [name]}, "bind": "legend"}


def unless_hidden(value: float) -> Spec:
    """Return an opacity for what `legend_choice` has not put out."""
    return {"condition": {"param": "chosen", "value": value}, "value": 0.06}


def zoom(*channels: str) -> Spec:
    """Return a parameter: dragging moves the axes, Ctrl and the wheel zoom, two clicks reset."""
    select = {"type": "interval", "encodings": list(channels), "zoom": "wheel![event.ctrlKey]"}
    return {"name": "zoom", "select": select, "bind": "scales"}


def spec_of(layers: Sequence[Spec], texts: Sequence[str] = ()) -> Spec:
    """Return the specification of a single panel.

    Args:
        layers: from back to front.
        texts: of the legend, whose columns depend on the longest.
    """
    return {"layer": list(layers), "usermeta": {"legend": max(map(len, texts), default=0)}}


def panels_of(panels: Sequence[Sequence[Spec]], texts: Sequence[str]) -> Spec:
    """Return the specification of panels of layers, one below the other."""
    return {
        "vconcat": [{"layer": list(layers)} for layers in panels],
        "usermeta": {"legend": max(map(len, texts), default=0)},
    }


def rounds_across(name: str, title: str | None = "round", padding: int = 0) -> Spec:
    """Return the horizontal encoding of a column of rounds; no tick stands between two.

    Args:
        name: of the column.
        title: of the axis.
        padding: pixels to the left and right, for marks on the first and the last round.
    """
    scale = {"zero": False, "nice": False, "padding": padding}
    return quantity(name, title, axis={"tickMinStep": 1, "format": "d"}, scale=scale)


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


def stage_columns(run: Run, rounds: Sequence[int]) -> Columns:
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


def stage_layers(
    stages: Columns, *colors: str, title: str | None = "round", worded: bool = True
) -> list[Spec]:
    """Return a line where stage 2 begins; nothing without stage 2.

    Args:
        stages: of `stage_columns`, which the view has as its data set `stages`.
        colors: of the line, from back to front; without any it has that of text.
        title: of the axis, the same as in the layers below; else both would stand there.
        worded: whether words stand above the line.
    """
    if not np.size(stages["border"]):
        return []
    data, x = {"name": "stages"}, quantity("border", title)
    dashed = {"type": "rule", "strokeDash": [5, 4], "strokeWidth": 1.5}
    solid = {"type": "rule", "strokeWidth": 1.5}
    marks = [solid, *([dashed] * (len(colors) - 1))] if colors else [dashed]
    layers: list[Spec] = [
        {"data": data, "mark": mark | ({"color": color} if color else {}), "encoding": {"x": x}}
        for mark, color in zip(marks, colors or ("",), strict=True)
    ]
    if worded:
        words: Spec = {"type": "text", "text": "stage 2 →", "baseline": "bottom"}
        words["align"] = {"expr": "datum.room ? 'left' : 'right'"}
        layers.append({"data": data, "mark": words, "encoding": {"x": x, "y": {"value": -2}}})
    return layers


def byte_column(values: ArrayLike) -> NDArray[Any]:
    """Return numbers of bytes, one after the other, in 4 bytes each where they fit."""
    array = np.asarray(values).ravel()
    return array.astype("i4" if array.max(initial=0) < 2**31 else "f8")
