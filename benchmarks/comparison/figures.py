"""Figures of the page of results, as SVG files beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import vl_convert
from records import ROOT

FOLDER = ROOT / "docs" / "figures"
Record = dict[str, Any]

_STYLES = {
    "FedOBD": ("#c1272d", "circle"),
    "FedAvg, all clients": ("#0000a7", "square"),
    "FedAvg": ("#5a7bd8", "square"),
    "FedPAQ": ("#008176", "triangle-up"),
    "FedDropoutAvg": ("#b8960c", "triangle-down"),
    "SMAFD": ("#777777", "diamond"),
}
_WIDTH = 560  # pixels within the axes
_LOOK = {"background": "white", "aria": False, "legend": {"title": None, "labelLimit": 0}}


def accuracy_by_bytes(preset: str, variants: list[tuple[str, list[Record]]]) -> str:
    """Draw mean test accuracy against megabytes sent; return the picture's Markdown."""
    rows = []
    for name, records in variants:
        curves = [_curve(record) for record in records]
        megabytes = np.mean([curve[0] for curve in curves], axis=0)
        accuracies = np.mean([curve[1] for curve in curves], axis=0)
        rows += [
            {"name": name, "MB": x, "accuracy": y}
            for x, y in zip(megabytes.tolist(), accuracies.tolist(), strict=True)
        ]
    names = [name for name, _ in variants]
    colors, shapes = zip(*(_STYLES[name] for name in names), strict=True)
    x_axis = {"format": "~g", "labelOverlap": True}
    spec = {
        "data": {"values": rows},
        "width": _WIDTH,
        "height": 320,
        "encoding": {
            "x": _number(
                "MB", "MB sent, up and down", axis=x_axis, scale={"type": "log", "nice": False}
            ),
            "y": _number("accuracy", "test accuracy", scale={"zero": False}),
            "color": {"field": "name", "scale": {"domain": names, "range": colors}},
        },
        "layer": [
            {"mark": "line"},
            {
                "mark": {"type": "point", "filled": True, "size": 35, "opacity": 1},
                "encoding": {
                    "shape": {"field": "name", "scale": {"domain": names, "range": shapes}}
                },
            },
        ],
    }
    return _save(spec, f"{preset}-accuracy", f"Test accuracy against megabytes, {preset}")


def _number(field: str, title: str, **more: Any) -> dict[str, Any]:
    return {"field": field, "type": "quantitative", "title": title, **more}


def _curve(record: Record) -> tuple[list[float], list[float]]:
    totals = accumulate(r["uplink_bytes"] + r["downlink_bytes"] for r in record["rounds"])
    points = [
        (total / 1e6, r["test_metric"])
        for total, r in zip(totals, record["rounds"], strict=True)
        if r["test_metric"] is not None
    ]
    if record["rounds"][-1]["test_metric"] is None:
        points.append((record["summary"]["total_bytes"] / 1e6, record["summary"]["final_metric"]))
    return [x for x, _ in points], [y for _, y in points]


def uploads(preset: str, variants: Sequence[tuple[str, list[Record]]]) -> str:
    """Draw how often each block was uploaded in each round of stage 1."""
    panels = [_upload_map(name, records) for name, records in variants]
    spec = {"vconcat": panels}
    return _save(spec, f"{preset}-uploads", f"Share of clients that uploaded a block, {preset}")


def _upload_map(name: str, records: list[Record]) -> dict[str, Any]:
    shares = np.mean([_shares(record) for record in records], axis=0)
    labels = [f"{b['name']} ({b['parameters']:,})" for b in records[0]["blocks"]]
    rows = [
        {"from": number + 0.5, "to": number + 1.5, "block": label, "share": round(share, 4)}
        for number, row in enumerate(shares.tolist())
        for label, share in zip(labels, row, strict=True)
    ]
    x_axis = {"tickMinStep": 1, "format": "d", "grid": False}
    scale = {"nice": False, "zero": False}
    color = {"domain": [0, 1], "scheme": "viridis"}
    return {
        "title": name,
        "data": {"values": rows},
        "width": _WIDTH,
        "height": max(120, 9 * len(labels)),
        "mark": {"type": "rect"},
        "encoding": {
            "x": _number("from", "round of stage 1", axis=x_axis, scale=scale),
            "x2": {"field": "to"},
            "y": {
                "field": "block",
                "sort": None,
                "title": None,
                "axis": {"labelFontSize": 8, "labelLimit": 0, "labelOverlap": False},
            },
            "color": _number("share", "", scale=color, legend={"title": "share of clients"}),
        },
    }


def _shares(record: Record) -> list[list[float]]:
    """Return by round of stage 1 and block which share of the clients uploaded it."""
    stage = [r for r in record["rounds"] if r["stage"] == 1]
    return [[count / r["clients"] for count in r["uploads_by_block"]] for r in stage]


def _save(spec: dict[str, Any], name: str, title: str) -> str:
    FOLDER.mkdir(parents=True, exist_ok=True)
    svg = vl_convert.vegalite_to_svg({**spec, "config": _LOOK}, vl_version="6.4")
    # Numbers of clips and gradients count on from one drawing to the next in a process.
    ids = dict.fromkeys(re.findall(r"\b(?:clip|gradient_)\d+\b", svg))
    for number, old in enumerate(ids):
        svg = re.sub(rf"\b{old}\b", f"id{number}", svg)
    (FOLDER / f"{name}.svg").write_text(svg + "\n", encoding="utf-8")
    return f"![{title}](figures/{name}.svg)"
