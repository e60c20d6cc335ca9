"""Display: what the command line shows, while runs go on and afterwards."""

from __future__ import annotations

from fedobd.display._json_lines import JsonLines
from fedobd.display._live import Display
from fedobd.display._tables import (
    block_table,
    comparison_table,
    payload_tables,
    plain_table,
    summary_table,
)

__all__ = [
    "Display",
    "JsonLines",
    "block_table",
    "comparison_table",
    "payload_tables",
    "plain_table",
    "summary_table",
]
