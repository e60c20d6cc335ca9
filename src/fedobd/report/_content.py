"""Content: what a report says of each section, whatever the format it is written in."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from fedobd._format import format_bytes, format_share
from fedobd.methods import FedOBD
from fedobd.report._bits import Deliveries, bits_chart, levels_chart
from fedobd.report._chart import Chart
from fedobd.report._curves import accuracy_chart
from fedobd.report._delivery import delivery_bits
from fedobd.report._gather import Section, Variant
from fedobd.report._summary_tables import (
    block_table,
    environment_table,
    link_table,
    mean_final,
    mean_total,
    part_table,
    reference,
    run_table,
    summary_table,
)
from fedobd.report._traffic import traffic_chart
from fedobd.report._uploads import drops_blocks, upload_map, warning

MOST_CELLS = 120_000
"""Blocks times rounds that are drawn in a report at most, so that its page stays small."""


def drawing_step(sections: Sequence[Section]) -> int:
    """Return how many rounds one drawn round stands for, where blocks are drawn by rounds."""
    cells = sum(v.shown.uploads.size for section in sections for v in section.variants)
    return max(1, math.ceil(cells / MOST_CELLS))


def read_deliveries(section: Section) -> Deliveries:
    """Return the bits of the deliveries of all variants, by label."""
    return {variant.label: delivery_bits(variant.shown) for variant in section.variants}


def charts_of(section: Section, deliveries: Deliveries, step: int) -> list[Chart]:
    """Return the charts of a section, in their order."""
    charts = (
        accuracy_chart(section),
        traffic_chart(section, step),
        upload_map(section, step),
        bits_chart(section, deliveries),
        levels_chart(section, step),
    )
    return [chart for chart in charts if chart is not None]


def left_out(section: Section) -> Iterator[str]:
    """Yield a sentence for each picture that the run folders do not suffice for."""
    if all(run.results.final_metric is None for run in section.runs):
        yield "Nothing was tested on the server, so there is no picture of it."
    if not any(map(drops_blocks, section.variants)):
        yield "Every client uploaded every block in every round, so there is no picture of it."
    untold = [
        v.label
        for v in section.variants
        if v.is_finished and not v.shown.model_file.is_file() and v.shown.downlink.levels.any()
    ]
    if untold:
        yield (
            f"The trained model of {', '.join(untold)} is missing: bits of its delivery and their "
            "entropy are left out."
        )


def content_of(section: Section, deliveries: Deliveries) -> dict[str, Any]:
    """Return what every format of the report shows of a section, by the names in its templates."""
    return {
        "section": section,
        "warnings": [text for text in map(warning, section.variants) if text],
        "headline": headline(section),
        "summary": summary_table(section),
        "runs": run_table(section),
        "parts": part_table(section),
        "blocks": [block_table(v, deliveries[v.label]) for v in section.variants],
        "links": link_table(section),
        "environment": environment_table(section),
        "reproductions": reproductions(section),
    }


def reproductions(section: Section) -> list[dict[str, Any]]:
    """Return how each variant is run again: a command for each run, or by configuration."""
    return [
        {
            "label": variant.label,
            "hint": "Without that folder: save the configuration below as config.toml, and "
            f"fedobd run config.toml --seed {variant.shown.seed}.",
            "toml": variant.shown.toml,
            "commands": [
                f"fedobd run {shlex.quote(str(run.folder / 'config.toml'))} "
                f"--output {shlex.quote(run.folder.name + '-again')}"
                for run in variant.runs
            ],
        }
        for variant in section.variants
    ]


def lead(sections: Sequence[Section]) -> str:
    """Return a sentence on what the report is of."""
    count = sum(len(section.runs) for section in sections)
    methods = dict.fromkeys(v.method for section in sections for v in section.variants)
    seeds = sorted({run.seed for section in sections for run in section.runs})
    return (
        f"{count} run{'s' if count > 1 else ''} of {', '.join(methods)}; "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}."
    )


def headline(section: Section) -> str:
    """Return what FedOBD sent and reached beside FedAvg; of others, the method that sent least."""
    told = [v for v in section.variants if v.is_finished] or list(section.variants)
    shown = [v for v in told if v.method == FedOBD.name] or [min(told, key=mean_total)]
    beside = reference(section)
    sentences = [_sentence(variant, beside, section.metric) for variant in shown]
    return " ".join(sentences[:3])


def _sentence(variant: Variant, beside: Variant | None, metric: str) -> str:
    sent, reached = mean_total(variant), mean_final(variant)
    so_far = "" if variant.is_finished else " so far"
    text = f"{variant.label} sent {format_bytes(sent)}{so_far}"
    final = None if reached is None else f"{metric} {reached:.4f}"
    if beside is not None and beside is not variant:
        least, best = mean_total(beside), mean_final(beside)
        word = "less" if sent <= least else "more"
        share = format_share(abs(1 - sent / least))
        text += f", {share} {word} than the {format_bytes(least)} of {beside.label}"
        if final is not None and best is not None:
            final += f", where {beside.label} ends with {best:.4f}"
    verb = "ends with" if variant.is_finished else "stands at"
    return text + ("." if final is None else f", and {verb} {final}.")
