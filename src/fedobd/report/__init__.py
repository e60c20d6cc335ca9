"""Report: what run folders hold, as a page with plots, as Markdown, and as figures for papers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedobd._errors import UsageError
from fedobd.experiments import write_atomically
from fedobd.report._gather import gather

__all__ = ["write_figures", "write_markdown", "write_report"]


def write_report(runs: Sequence[Path], output: Path) -> None:
    """Write one HTML file with tables and plots; it needs no network.

    Args:
        runs: run folders, and folders of them such as a comparison's. A run that has not finished
            is shown as far as it is.
        output: the file; one that is there is replaced.

    Raises:
        UsageError: a folder holds no run, a run is damaged, vl-convert is not installed, or the
            file cannot be written.
    """
    from fedobd.report._page import make_page  # when first needed, as vl-convert is

    _write(output, make_page(gather(runs)))


def write_markdown(runs: Sequence[Path], output: Path) -> None:
    """Write the tables of a report as Markdown.

    Args:
        runs: as for `write_report`.
        output: the file; one that is there is replaced.

    Raises:
        UsageError: a folder holds no run, a run is damaged, or the file cannot be written.
    """
    from fedobd.report._markdown import make_markdown

    _write(output, make_markdown(gather(runs)))


def write_figures(runs: Sequence[Path], folder: Path) -> tuple[Path, ...]:
    """Write the figures of a report for papers, each as PNG and SVG.

    Args:
        runs: as for `write_report`.
        folder: where they go; made where it is missing, files of the same names are replaced.

    Returns:
        The files.

    Raises:
        UsageError: a folder holds no run, a run is damaged, matplotlib is not installed, or a file
            cannot be written.
    """
    from fedobd.report._figures import draw_figures

    try:
        folder.mkdir(parents=True, exist_ok=True)
        return draw_figures(gather(runs), folder)
    except OSError as error:
        raise UsageError(
            f"figures cannot be written to {str(folder)!r}: {error.strerror}"
        ) from error


def _write(output: Path, text: str) -> None:
    if output.is_dir():
        raise UsageError(f"report {str(output)!r} is a folder; wanted a file")
    if not output.parent.is_dir():
        raise UsageError(f"report {str(output)!r} cannot be written: there is no such folder")
    try:
        write_atomically(output, text.encode())
    except OSError as error:
        raise UsageError(f"report {str(output)!r} cannot be written: {error.strerror}") from error
