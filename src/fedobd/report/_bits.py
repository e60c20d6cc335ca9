"""Bits: what a parameter of each block took, and how many levels it had over the rounds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedobd.report._chart import (
    Chart,
    Columns,
    Labels,
    Switch,
    View,
    block_colors,
    block_names,
    rounds_view,
    step_note,
    thin,
)
from fedobd.report._delivery import bits_by_way
from fedobd.report._gather import Section, Variant
from fedobd.report._run import BlockBits, Run, TrafficByBlock
from fedobd.report._templates import make_spec
from fedobd.report._uploads import block_labels, map_height

Deliveries = Mapping[str, BlockBits | None]
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
_KINDS = {
    "nominal": "M-1,0A1,1,0,1,1,1,0A1,1,0,1,1,-1,0Z"
    "M-.65,0A.65,.65,0,1,0,.65,0A.65,.65,0,1,0,-.65,0Z",
    "real": "M-.65,0A.65,.65,0,1,1,.65,0A.65,.65,0,1,1,-.65,0Z",
    "entropy": "M-.17,-1H.17V1H-.17Z",
}
"""A ring, a disc that fits into it, and a bar, as paths of SVG within a square of 2 by 2."""

_MOST_LEVELS_MARKED = 60  # rounds; more and marks hide the lines


def bits_chart(section: Section, deliveries: Deliveries) -> Chart:
    """Return bits for each parameter by block."""
    return Chart(
        name="bits",
        title="Bits for each parameter, by block",
        caption="Filled marks are real bits, open ones nominal bits, bars the entropy; further "
        f"left is less. {' '.join(MEANING)}",
        switches=(Switch("method", tuple(variant.label for variant in section.variants)),),
        views={
            (number,): _bits_view(variant, deliveries[variant.label])
            for number, variant in enumerate(section.variants)
        },
        height=map_height(section.variants),
    )


def _bits_view(variant: Variant, delivery: BlockBits | None) -> View:
    labels, ways, kinds = block_labels(variant.shown), tuple(_COLORS), tuple(_KINDS)
    series = [
        (way, kind, values)
        for way, bits in bits_by_way(variant.shown, delivery).items()
        for kind in kinds
        if (values := getattr(bits, kind)) is not None
    ]
    way_codes = np.array([ways.index(way) for way, _, _ in series], "u1")
    kind_codes = np.array([kinds.index(kind) for _, kind, _ in series], "u1")
    marks: Columns = {
        "name": Labels(tuple(labels), np.tile(np.arange(len(labels), dtype="u2"), len(series))),
        "way": Labels(ways, np.repeat(way_codes, len(labels))),
        "kind": Labels(kinds, np.repeat(kind_codes, len(labels))),
        "bits": np.concatenate([values for _, _, values in series]).astype("f4"),
    }
    colors, shapes = list(_COLORS.values()), list(_KINDS.values())
    return View(
        spec=make_spec(
            "bits", labels=labels, ways=ways, kinds=kinds, colors=colors, shapes=shapes
        ),
        data={"marks": marks},
        figure=("bits", variant.label),
    )


def levels_chart(section: Section, step: int) -> Chart | None:
    """Return levels s over the rounds, each `step`-th one, of what is quantized; None without."""
    quantized = [
        (variant, way, traffic)
        for variant in section.variants
        for way, traffic in (("up", variant.shown.uplink), ("down", variant.shown.downlink))
        if traffic.levels.any()
    ]
    if not quantized:
        return None
    return Chart(
        name="levels",
        title="Levels s over the rounds, by block",
        caption="Number of levels on one side of the offset, a mean over a block's quantized "
        "elements and, upwards, over the clients that uploaded it; lines leave out rounds without "
        "the block. Colors go from the input (blue) to the output (red)." + step_note(step),
        switches=(Switch("what is sent", tuple(f"{v.label}, {way}" for v, way, _ in quantized)),),
        views={
            (number,): _levels_view(variant.shown, traffic, step, (f"levels-{way}", variant.label))
            for number, (variant, way, traffic) in enumerate(quantized)
        },
    )


def _levels_view(run: Run, traffic: TrafficByBlock, step: int, figure: tuple[str, str]) -> View:
    names = block_names(run.schema)
    levels = np.where(traffic.levels > 0, traffic.levels, np.nan).astype("f4")
    return rounds_view(
        *("levels", figure, run, step, {"points": (names, {"levels": levels})}),
        names=names,
        colors=block_colors(len(names)),
        has_marks=len(thin(len(run.rounds), step)) <= _MOST_LEVELS_MARKED,
    )
