"""Templates: the files from which the page, its charts and the Markdown are made."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

_FOLDER = Path(__file__).with_name("templates")

Spec = dict[str, Any]
"""A specification of Vega-Lite, or a part of one."""

MOST_NAMED = 12
"""Names that a legend holds at most; more would take the picture's room."""


@cache
def templates() -> Environment:
    """Return the environment that the templates are read in; text is escaped in HTML alone."""
    return Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def read_template(name: str) -> str:
    """Return a file that stands in the page as it is."""
    return (_FOLDER / name).read_text(encoding="utf-8")


def make_spec(chart: str, **values: Any) -> Spec:
    """Return the specification of a chart, its template filled in."""
    template = templates().get_template(f"{chart}.json.j2")
    spec: Spec = json.loads(template.render(values, most_named=MOST_NAMED))
    return spec
