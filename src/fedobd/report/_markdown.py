"""Markdown: a report without its pictures, all tables whole."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from fedobd import __version__
from fedobd.report._bits import MEANING
from fedobd.report._content import lead, read_deliveries, reproductions
from fedobd.report._gather import Section
from fedobd.report._headline import headline
from fedobd.report._summary_tables import (
    Table,
    block_table,
    environment_table,
    link_table,
    part_table,
    round_table,
    run_table,
    summary_table,
)
from fedobd.report._uploads import warning


def make_markdown(sections: Sequence[Section]) -> str:
    """Return the report as Markdown.

    Raises:
        UsageError: the model of a run cannot be read.
    """
    parts = ["# Report", _plain(lead(sections))]
    for section in sections:
        parts += _section(section)
    parts.append(f"Written by fedobd {__version__}.")
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> Iterator[str]:
    deliveries = read_deliveries(section)
    yield f"## {_plain(section.title)}"
    if section.settings:
        yield _plain(section.settings)
    for text in filter(None, map(warning, section.variants)):
        yield f"> **Warning.** {_plain(text)}"
    yield _plain(headline(section))
    yield "### Summary"
    yield from _table(summary_table(section))
    yield "### Runs"
    yield from _table(run_table(section))
    yield "### Bytes"
    yield from _table(part_table(section))
    for variant in section.variants:
        yield from _table(round_table(variant, section.metric))
    yield "### Blocks"
    yield from MEANING
    for variant in section.variants:
        yield from _table(block_table(variant, deliveries[variant.label]))
    yield "### What would this cost on my link?"
    yield from _table(link_table(section))
    yield "### How to run it again"
    yield from _table(environment_table(section))
    for one in reproductions(section):
        yield f"{_plain(one.label)}:"
        yield _fenced("\n".join(one.commands), "sh")
        yield _plain(one.hint)
        yield _fenced(one.toml.rstrip(), "toml")


def _table(table: Table) -> Iterator[str]:
    rows = [[_cell(cell.text, cell.is_best) for cell in row] for row in table.rows]
    rule = ["---", *("---:" for _ in table.head[1:])]
    lines = [[_plain(name) for name in table.head], rule, *rows]
    yield f"{_plain(table.caption)}."
    yield "\n".join("| " + " | ".join(line) + " |" for line in lines)
    yield from map(_plain, table.notes)


def _cell(text: str, is_best: bool) -> str:
    return f"**{_plain(text)}**" if is_best else _plain(text)


def _plain(text: str) -> str:
    """Return text in which Markdown reads no markup, on one line."""
    return re.sub(r"([\\`*_<>\[\]|#&~])", r"\\\1", " ".join(text.split()))


def _fenced(text: str, language: str) -> str:
    """Return a code block whose fence is longer than any in the text."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
