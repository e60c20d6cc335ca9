"""Consoles: standard output and standard error."""

from __future__ import annotations

from rich.console import Console

console = Console()
errors = Console(stderr=True)


def say(text: str, *, to: Console = console, style: str | None = None) -> None:
    """Print text as it is: names and paths are neither markup nor broken at the width."""
    to.print(text, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)
