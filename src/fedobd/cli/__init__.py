"""The command line: `fedobd run | compare | report | plan | data | blocks | inspect | ...`."""

from __future__ import annotations

from fedobd.cli._main import app, main

__all__ = ["app", "main"]
