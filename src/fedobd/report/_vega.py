"""Vega: parts of specifications of Vega-Lite that several charts have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from fedobd.report._chart import Spec

MOST_NAMED = 12
"""Names that a legend holds at most; more would take the picture's room."""


NEAREST: Spec = {
    "name": "near",
    "select": {"type": "point", "on": "pointermove", "nearest": True, "clear": "pointerout"},
}
"""A parameter: the mark nearest to the mouse, whose tooltip is shown."""


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


def stage_layers(
    stages: Mapping[str, NDArray[Any]],
    *colors: str,
    title: str | None = "round",
    worded: bool = True,
) -> list[Spec]:
    """Return a line where stage 2 begins; nothing without stage 2.

    Args:
        stages: of `stage_columns`, which the view has as its data set `stages`.
        colors: of the line, from back to front; without any it has that of text.
        title: of the axis, the same as in the layers below; else both would stand there.
        worded: whether words stand above the line.
    """
    if not stages["border"].size:
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
