"""Formulas: blocks of LaTeX in the documents, as MathML in the pages, which needs no script."""

from __future__ import annotations

import re

from latex2mathml.converter import convert

_BLOCK = re.compile(r"^```math\n(?P<formula>.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def to_mathml(markdown: str) -> str:
    """Return Markdown with its `math` blocks turned into MathML."""
    return _BLOCK.sub(_render, markdown)


def _render(match: re.Match[str]) -> str:
    formula = convert(match["formula"].strip(), display="block")
    return f'<div class="formula">{formula}</div>'
