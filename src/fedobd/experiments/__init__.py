"""Experiments: typed configurations, presets, run folders, runs and comparisons."""

from __future__ import annotations

from fedobd.experiments.compare import Comparison, compare
from fedobd.experiments.config import RunConfig, load_config
from fedobd.experiments.folder import RunFolder
from fedobd.experiments.presets import list_presets
from fedobd.experiments.runner import Observer, Summary, run

__all__ = [
    "Comparison",
    "Observer",
    "RunConfig",
    "RunFolder",
    "Summary",
    "compare",
    "list_presets",
    "load_config",
    "run",
]
