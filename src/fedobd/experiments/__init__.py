"""Experiments: typed configurations, presets, run folders, runs and comparisons."""

from __future__ import annotations

from fedobd.experiments._build import Experiment, build_experiment, initial_model
from fedobd.experiments._data import BuiltData, build_data
from fedobd.experiments.compare import Comparison, compare
from fedobd.experiments.config import RunConfig, load_config, make_method, plain_values
from fedobd.experiments.folder import RunFolder
from fedobd.experiments.presets import list_presets
from fedobd.experiments.runner import Engine, Observer, Summary, make_record, read_summary, run

__all__ = [
    "BuiltData",
    "Comparison",
    "Engine",
    "Experiment",
    "Observer",
    "RunConfig",
    "RunFolder",
    "Summary",
    "build_data",
    "build_experiment",
    "compare",
    "initial_model",
    "list_presets",
    "load_config",
    "make_method",
    "make_record",
    "plain_values",
    "read_summary",
    "run",
]
