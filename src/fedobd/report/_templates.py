"""Templates: the files from which the page and the Markdown are made."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

_FOLDER = Path(__file__).with_name("templates")


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
