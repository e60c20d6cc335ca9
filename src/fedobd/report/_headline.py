"""Headline: what came of a section's runs, in a sentence or two; the tables say the rest."""

from __future__ import annotations

from fedobd._format import format_bytes, format_share
from fedobd.methods import FedOBD
from fedobd.report._gather import Section, Variant
from fedobd.report._summary_tables import mean_final, mean_total, reference

_MOST_SENTENCES = 3


def headline(section: Section) -> str:
    """Return what FedOBD sent and reached beside FedAvg; of others, the method that sent least."""
    told = [v for v in section.variants if v.is_finished] or list(section.variants)
    shown = [v for v in told if v.method == FedOBD.name] or [min(told, key=mean_total)]
    beside = reference(section)
    sentences = [_sentence(variant, beside, section.metric) for variant in shown]
    return " ".join(sentences[:_MOST_SENTENCES])


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
