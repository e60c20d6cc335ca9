"""Figures of the page of results, as SVG files beside it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from records import ROOT

FOLDER = ROOT / "docs" / "figures"
Record = dict[str, Any]

_STYLES = {
    "FedOBD": ("#c1272d", "o"),
    "FedAvg, all clients": ("#0000a7", "s"),
    "FedAvg": ("#5a7bd8", "s"),
    "FedPAQ": ("#008176", "^"),
    "FedDropoutAvg": ("#eecc16", "v"),
    "SMAFD": ("#777777", "D"),
}


def accuracy_by_bytes(preset: str, variants: list[tuple[str, list[Record]]]) -> str:
    """Draw mean test accuracy against megabytes sent; return the picture's Markdown."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, found in variants:
        color, marker = _STYLES[name]
        curves = [_curve(record) for record in found]
        megabytes = np.mean([curve[0] for curve in curves], axis=0)
        accuracies = np.mean([curve[1] for curve in curves], axis=0)
        axes.plot(megabytes, accuracies, color=color, marker=marker, markersize=4, label=name)
    axes.set(xlabel="MB sent, up and down", ylabel="test accuracy", xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _save(figure, f"{preset}-accuracy", f"Test accuracy against megabytes, {preset}")


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
    figure = Figure(figsize=(7, 2.6 * len(variants)), layout="constrained")
    rows = figure.subplots(len(variants), squeeze=False)[:, 0]
    for axes, (name, found) in zip(rows, variants, strict=True):
        shares = np.mean([_shares(record) for record in found], axis=0).T
        count, rounds = shares.shape
        image = axes.imshow(
            shares, aspect="auto", cmap="viridis", vmin=0, vmax=1,
            extent=(0.5, rounds + 0.5, count - 0.5, -0.5),
        )  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        labels = [f"{b['name']} ({b['parameters']:,})" for b in found[0]["blocks"]]
        axes.set_yticks(range(len(labels)), labels, fontsize=6)
        axes.set(xlabel="round of stage 1", title=name)
        figure.colorbar(image, label="share of clients")
    return _save(figure, f"{preset}-uploads", f"Share of clients that uploaded a block, {preset}")


def _shares(record: Record) -> list[list[float]]:
    """Return by round of stage 1 and block which share of the clients uploaded it."""
    stage = [r for r in record["rounds"] if r["stage"] == 1]
    return [[count / r["clients"] for count in r["uploads_by_block"]] for r in stage]


def _save(figure: Figure, name: str, title: str) -> str:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": name}):  # the same file for the same records
        figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
    return f"![{title}](figures/{name}.svg)"
