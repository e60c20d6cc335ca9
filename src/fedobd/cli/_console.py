"""Consoles: standard output and standard error."""

from __future__ import annotations

from rich.console import Console

console = Console()
errors = Console(stderr=True)
plain = Console(markup=False, emoji=False)
"""For tables whose names come from outside and are shown as they are."""


def say(text: str, *, to: Console = plain, style: str | None = None) -> None:
    """Print text as it is: names and paths are neither markup nor broken at the width."""
    to.print(text, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)
