"""Content: what a report says of each section, whatever the format it is written in."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedobd.report._bits import Deliveries, bits_plot, levels_plot
from fedobd.report._curves import accuracy_plot
from fedobd.report._delivery import delivery_bits
from fedobd.report._gather import Section
from fedobd.report._plot import Plot
from fedobd.report._traffic import traffic_plot
from fedobd.report._uploads import drops_blocks, upload_map

MOST_CELLS = 120_000
"""Blocks times rounds that are drawn in a report at most, so that its page stays small."""


def drawing_step(sections: Sequence[Section]) -> int:
    """Return how many rounds one drawn round stands for, where blocks are drawn by rounds."""
    cells = sum(v.shown.uploads.size for section in sections for v in section.variants)
    return max(1, math.ceil(cells / MOST_CELLS))


def read_deliveries(section: Section) -> Deliveries:
    """Return the bits of the deliveries of all variants, by label."""
    return {variant.label: delivery_bits(variant.shown) for variant in section.variants}


def plots_of(section: Section, deliveries: Deliveries, step: int) -> list[Plot]:
    """Return the plots of a section, in their order."""
    found = (
        accuracy_plot(section),
        traffic_plot(section, step),
        upload_map(section, step),
        bits_plot(section, deliveries),
        levels_plot(section, step),
    )
    return [plot for plot in found if plot is not None]


def left_out(section: Section) -> Iterator[str]:
    """Yield a sentence for each plot that the run folders do not suffice for."""
    if all(run.results.final_metric is None for run in section.runs):
        yield "Nothing was tested on the server, so there is no picture of it."
    if not any(map(drops_blocks, section.variants)):
        yield "Every client uploaded every block in every round, so there is no picture of it."
    missing = [v.label for v in section.variants if v.shown.uplink is None]
    untold = [
        v.label
        for v in section.variants
        if v.is_finished
        and not v.shown.model_file.is_file()
        and v.shown.downlink is not None
        and v.shown.downlink.levels.any()
    ]
    if untold:
        yield (
            f"The trained model of {', '.join(untold)} is missing: bits of its delivery and their "
            "entropy are left out."
        )
    if missing:
        yield (
            f"The run folders of {', '.join(missing)} were written before records said what each "
            "block took: bytes by block, bits for each parameter and levels are left out."
        )


@dataclass(frozen=True, slots=True)
class Reproduction:
    """How a variant is run again.

    Args:
        label: of the variant.
        hint: what to do where the run's folder is gone.
        toml: the configuration of the run that is shown of it.
        commands: for the shell, one a run.
    """

    label: str
    hint: str
    toml: str
    commands: tuple[str, ...]


def reproductions(section: Section) -> tuple[Reproduction, ...]:
    """Return configuration and commands of each variant."""
    return tuple(
        Reproduction(
            label=variant.label,
            hint="Without that folder: save the configuration below as config.toml, and "
            f"fedobd run config.toml --seed {variant.shown.seed}.",
            toml=variant.shown.toml,
            commands=tuple(
                f"fedobd run {shlex.quote(str(run.folder / 'config.toml'))} "
                f"--output {shlex.quote(run.folder.name + '-again')}"
                for run in variant.runs
            ),
        )
        for variant in section.variants
    )


def lead(sections: Sequence[Section]) -> str:
    """Return a sentence on what the report is of."""
    count = sum(len(section.runs) for section in sections)
    methods = dict.fromkeys(v.method for section in sections for v in section.variants)
    seeds = sorted({run.seed for section in sections for run in section.runs})
    return (
        f"{count} run{'s' if count > 1 else ''} of {', '.join(methods)}; "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}."
    )
