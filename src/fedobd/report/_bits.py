"""Bits: what a parameter of each block took, and how many levels it had over the rounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fedobd.report._delivery import LevelBits
from fedobd.report._gather import Section, Variant
from fedobd.report._plot import (
    Plot,
    Switch,
    Trace,
    axis,
    block_color,
    plain,
    round_axis,
    shorten,
    stage_marks,
    step_note,
    thin,
    typed,
)
from fedobd.report._run import Run, Traffic, Values
from fedobd.report._uploads import block_axis, block_labels, map_height

Deliveries = Mapping[str, LevelBits | None]
"""Bits of the trained model's delivery by the variant's label."""

MEANING = (
    "Real bits, up and down: the block's frames in payloads, with its buffers and the frames' "
    "lengths, a mean over all payloads of the run that held the block, for each of its "
    "parameters; nominal bits: the same payloads by the papers' formula.",
    "Delivery: the levels alone of the trained model, quantized as a broadcast is, coded (real) "
    "and by the formula (nominal). Entropy: of the same levels, each tensor's by their own "
    "frequencies, one by one; the tables of frequencies that a decoder needs are in the real bits "
    "and not in the entropy.",
)
"""What the numbers of bits are."""

_COLORS = {"up": "#d9480f", "down": "#1c7ed6", "delivery": "#2b9348"}
MARK_HEIGHTS = {"up": 0.22, "down": 0.0, "delivery": -0.22}
"""Where marks stand beside a block's place, so that none hides another."""


def bits_plot(section: Section, deliveries: Deliveries) -> Plot | None:
    """Return bits for each parameter by block; None where no run folder says them."""
    variants = [v for v in section.variants if v.shown.uplink is not None]
    if not variants:
        return None
    return Plot(
        name="bits",
        title="Bits for each parameter, by block",
        caption="Filled marks are real bits, open ones nominal bits, bars the entropy; further "
        f"left is less. {' '.join(MEANING)}",
        switches=(Switch("method", tuple(variant.label for variant in variants)),),
        views={
            (number,): _bits_view(variant.shown, deliveries[variant.label])
            for number, variant in enumerate(variants)
        },
        height=map_height(variants),
    )


def bits_series(run: Run, delivery: LevelBits | None) -> Iterator[tuple[str, str, Values]]:
    """Yield direction, kind of bits, and bits of each block."""
    for way, traffic in (("up", run.uplink), ("down", run.downlink)):
        if traffic is not None:
            bits = traffic.bits(run.schema)
            yield way, "nominal", bits.nominal
            yield way, "real", bits.real
    if delivery is not None:
        yield "delivery", "nominal", delivery.nominal
        yield "delivery", "real", delivery.real
        yield "delivery", "entropy", delivery.entropy


def _bits_view(run: Run, delivery: LevelBits | None) -> dict[str, Any]:
    symbols = {
        "nominal": {"symbol": "circle-open", "size": 11},
        "real": {"symbol": "circle", "size": 8},
        "entropy": {"symbol": "line-ns-open", "size": 14},
    }
    labels = list(map(plain, block_labels(run)))
    numbers = np.arange(len(labels))
    traces: list[Trace] = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": typed(values),
            "y": typed(numbers + MARK_HEIGHTS[way]),
            "text": labels,
            "name": f"{way}, {kind}",
            "marker": {
                **symbols[kind],
                "color": _COLORS[way],
                "line": {"width": 2, "color": _COLORS[way]},
            },
            "hovertemplate": "%{x:.2f} bits<br>%{text} parameters",
        }
        for way, kind, values in bits_series(run, delivery)
    ]
    return {
        "data": traces,
        "layout": {
            "xaxis": axis("bits for each parameter", rangemode="tozero"),
            "yaxis": block_axis(run),
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        },
    }


def levels_plot(section: Section, step: int) -> Plot | None:
    """Return levels s over the rounds, of what is quantized; None without any.

    Args:
        section: whose runs.
        step: draw each so many-th round.
    """
    found = list(_quantized(section))
    if not found:
        return None
    return Plot(
        name="levels",
        title="Levels s over the rounds, by block",
        caption="Number of levels on one side of the offset, a mean over a block's quantized "
        "elements and, upwards, over the clients that uploaded it; lines leave out rounds without "
        "the block. Colors go from the input (blue) to the output (red)." + step_note(step),
        switches=(Switch("what is sent", tuple(f"{v.label}, {way}" for v, way, _ in found)),),
        views={
            (number,): _levels_view(variant.shown, traffic, step)
            for number, (variant, _, traffic) in enumerate(found)
        },
    )


def _quantized(section: Section) -> Iterator[tuple[Variant, str, Traffic]]:
    for variant in section.variants:
        for way, traffic in (("up", variant.shown.uplink), ("down", variant.shown.downlink)):
            if traffic is not None and traffic.levels.any():
                yield variant, way, traffic


def _levels_view(run: Run, traffic: Traffic, step: int) -> dict[str, Any]:
    rounds = thin(len(run.rounds), step)
    numbers = typed([run.rounds[index].number for index in rounds], "i4")
    levels = np.where(traffic.levels > 0, traffic.levels, np.nan)[rounds]
    blocks = run.schema.blocks
    return {
        "data": [
            {
                "type": "scatter",
                "mode": "lines+markers" if len(rounds) <= 60 else "lines",
                "x": numbers,
                "y": typed(levels[:, number]),
                "connectgaps": True,
                "name": plain(shorten(block.name)),
                "line": {"color": block_color(number, len(blocks)), "width": 1.5},
                "marker": {"size": 4},
                "hovertemplate": "s = %{y:,.1f}, round %{x}",
            }
            for number, block in enumerate(blocks)
            if not np.isnan(levels[:, number]).all()
        ],
        "layout": {
            "xaxis": round_axis(len(run.rounds)),
            "yaxis": axis("levels s", rangemode="tozero"),
            "showlegend": len(blocks) <= 12,
            "hovermode": "closest",
            "legend": {"orientation": "h", "y": 1.06, "yanchor": "bottom"},
            **stage_marks(run, rounds),
        },
    }
