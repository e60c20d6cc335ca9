"""Figures: the pictures of a report for papers, as PNG and SVG.

They have the width of a column, serifs, no title, and can be read in grey: methods differ in
marker and dash, stage 2 has open markers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedobd._lookup import not_installed
from fedobd.report._chart import Chart, Columns, Labels, View
from fedobd.report._content import charts_of, read_deliveries
from fedobd.report._curves import method_traffic_chart
from fedobd.report._gather import Section
from fedobd.report._templates import Spec, make_spec

VEGA_LITE = "6.4"
"""The version that is drawn with, of those that vl-convert brings."""

_POINTS = 72  # in an inch: the unit of a figure's sizes
_DPI = 300
_COLUMN, _WIDE = 3.5, 5.0  # inches: a column of a paper in two columns, and figures of blocks
_HEIGHT = 2.6
_TALLEST = 9.0
_CHARACTER = 4.0  # points of a letter of a legend, and what its mark and the gap take
_MARK = 22

_IDS = re.compile(r"\b(?:clip|gradient_)\d+\b")


def draw_figures(sections: Sequence[Section], folder: Path) -> tuple[Path, ...]:
    """Draw the figures of all sections; of several, file names begin with a section's number."""
    try:
        from vl_convert import svg_to_png, vegalite_to_svg
    except ModuleNotFoundError as error:
        raise not_installed("this", error, "report") from error

    def draw(spec: Spec) -> str:
        svg: str = vegalite_to_svg(spec, vl_version=VEGA_LITE)
        ids = dict.fromkeys(_IDS.findall(svg))  # they count on from one drawing to the next
        numbers = {name: f"id{number}" for number, name in enumerate(ids)}
        return _IDS.sub(lambda match: numbers[match[0]], svg)

    files = []
    for number, section in enumerate(sections, start=1):
        prefix = f"section-{number}-" if len(sections) > 1 else ""
        for name, spec in _figures(section):
            svg = draw(spec)
            if "vconcat" in spec:  # whose panels have the size that is asked for, without axes
                wanted, width = (
                    spec["usermeta"]["width"],
                    float(re.findall(r'\bwidth="([\d.]+)"', svg)[0]),
                )
                for panel in spec["vconcat"]:
                    panel["width"] += wanted - width
                svg = draw(spec)
            file = folder / f"{prefix}{name}"
            png = svg_to_png(svg, ppi=_DPI)
            file.with_name(f"{file.name}.png").write_bytes(png)
            # A number without a unit would be pixels, of which an inch has 96.
            sized = re.sub(r'(width|height)="([\d.]+)"', r'\1="\2pt"', svg, count=2)
            file.with_name(f"{file.name}.svg").write_text(sized, encoding="utf-8")
            files += [file.with_name(f"{file.name}.{kind}") for kind in ("png", "svg")]
    return tuple(files)


def _figures(section: Section) -> Iterator[tuple[str, Spec]]:
    """Yield name and specification, with its data, of each figure."""
    names = [re.sub(r"[^\w.]+", "-", variant.label).strip("-") for variant in section.variants]
    unique = {
        variant.label: name if names.count(name) == 1 else f"{name}-{number}"
        for number, (variant, name) in enumerate(zip(section.variants, names, strict=True))
    }
    for chart in (method_traffic_chart(section), *charts_of(section, read_deliveries(section), 1)):
        for view in chart.views.values():
            if view.figure is not None:
                kind, label = view.figure
                yield f"{kind}-{unique[label]}" if label else kind, _on_paper(chart, view)


def _on_paper(chart: Chart, view: View) -> Spec:
    """Return the specification of a view as it stands in a paper, in points."""
    width = _POINTS * (_WIDE if view.figure and view.figure[1] else _COLUMN)
    height = _POINTS * _HEIGHT
    columns = max(1, int(width / (_CHARACTER * view.spec["usermeta"]["legend"] + _MARK)))
    spec = {
        **view.spec,
        "usermeta": {"width": width},
        "config": make_spec("paper", columns=columns),
        "params": [{"name": "paper", "value": "white"}],
        "datasets": {name: rows_of(columns) for name, columns in view.data.items()},
    }
    if "vconcat" in spec:
        sizes = {"width": width - 60, "height": 0.6 * height}
        spec["vconcat"] = [{**panel, **sizes} for panel in spec["vconcat"]]
        return spec
    if chart.name in ("uploads", "bits"):  # a line for each block
        names = spec["layer"][0]["encoding"]["y"]["scale"]["domain"]
        height = min(_POINTS * _TALLEST, 80 + 13 * len(names))
    # Nobody hovers over paper, and of many seeds the mean and its band are enough.
    layers = [layer for layer in view.spec["layer"] if layer.get("name") not in ("hover", "runs")]
    spec["autosize"] = {"type": "fit", "contains": "padding"}
    return {**spec, "layer": layers, "width": width, "height": height}


def rows_of(columns: Columns) -> list[dict[str, Any]]:
    """Return columns as rows, which may be written as JSON; what is no number is None."""
    lists = []
    for column in columns.values():
        if isinstance(column, Labels):
            lists.append([column.texts[code] for code in column.codes])
        else:
            values = column.astype(object)
            values[np.isnan(column)] = None
            lists.append(values.tolist())
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]
