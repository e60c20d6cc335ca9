"""Format: figures for people, in units and with decimals that suit them."""

from __future__ import annotations


def format_bytes(count: float) -> str:
    """Return a number of bytes for people, in decimal units."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def format_duration(seconds: float) -> str:
    """Return a duration for people."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


def format_share(share: float | None, digits: int = 1) -> str:
    """Return a share in per cent, or a dash."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def format_metric(metric: float | None) -> str:
    """Return a metric with four decimals, or a dash."""
    return "–" if metric is None else f"{metric:.4f}"


def fit_number(value: float | None, width: int, decimals: int) -> str:
    """Return a number with as many of the decimals as fit into a width, or a dash."""
    if value is None:
        return "–"
    for count in range(decimals, -1, -1):
        text = f"{value:.{count}f}"
        if len(text) <= width:
            return text
    return f"{value:.0e}"
