"""`fedobd report`: a page, Markdown or figures from run folders."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedobd._errors import UsageError
from fedobd.cli._console import say
from fedobd.report import write_figures, write_markdown, write_report


class Format(StrEnum):
    """What a report is written as."""

    HTML = "html"
    MARKDOWN = "md"


def report_command(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders, or the folder of a comparison.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file; else report.html or report.md here."),
    ] = None,
    format_: Annotated[
        Format, typer.Option("--format", help="A page with plots, or Markdown with tables alone.")
    ] = Format.HTML,
    figures: Annotated[
        Path | None,
        typer.Option(help="Write the figures for a paper into this folder too: PNG and SVG."),
    ] = None,
) -> None:
    """Write a report on runs: accuracy, bytes, blocks, bits, and time over a link."""
    file = output or Path(f"report.{format_.value}")
    if file.suffix.lower() != f".{format_.value}":  # else a slip overwrites a run's records
        raise UsageError(
            f"--output {str(file)!r}: wanted a name that ends in .{format_.value}, as --format is "
            f"{format_.value}"
        )
    write = write_report if format_ is Format.HTML else write_markdown
    write(runs, file)
    say(f"wrote {file}")
    if figures is not None:
        drawn = write_figures(runs, figures)
        say(f"wrote {len(drawn)} figures to {figures}")
