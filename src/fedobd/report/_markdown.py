"""Markdown: a report without its pictures, all tables whole."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedobd import __version__
from fedobd.report._bits import MEANING
from fedobd.report._content import content_of, lead, read_deliveries
from fedobd.report._gather import Section
from fedobd.report._summary_tables import round_table
from fedobd.report._templates import templates


def make_markdown(sections: Sequence[Section]) -> str:
    """Return the report as Markdown."""
    environment = templates().overlay()
    environment.filters = environment.filters | {"plain": _plain, "fenced": _fenced}
    return environment.get_template("report.md.j2").render(
        lead=lead(sections),
        contents=[content_of(s, read_deliveries(s)) for s in sections],
        meaning=MEANING,
        round_table=round_table,
        version=__version__,
    )


def _plain(text: str) -> str:
    """Return text in which Markdown reads no markup, on one line."""
    return re.sub(r"([\\`*_<>\[\]|#&~])", r"\\\1", " ".join(text.split()))


def _fenced(text: str, language: str) -> str:
    """Return a code block whose fence is longer than any in the text."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
