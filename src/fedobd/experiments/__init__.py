"""Experiments: typed configurations, presets, run folders, runs and comparisons."""

from __future__ import annotations

from fedobd.experiments._build import Experiment, build_experiment, initial_model
from fedobd.experiments._compare import Comparison, Row, compare
from fedobd.experiments._config import (
    RunConfig,
    load_config,
    make_method,
    parse_config,
    plain_values,
)
from fedobd.experiments._data import BuiltData, build_data
from fedobd.experiments._folder import (
    CONFIG_FILE,
    MODEL_FILE,
    ROUNDS_FILE,
    SCHEMA_FILE,
    SUMMARY_FILE,
    RunFolder,
    write_atomically,
)
from fedobd.experiments._record import BYTE_PARTS, make_record
from fedobd.experiments._runner import Engine, run
from fedobd.experiments._summary import Summary, read_summary
from fedobd.experiments.presets import list_presets

__all__ = [
    "BYTE_PARTS",
    "CONFIG_FILE",
    "MODEL_FILE",
    "ROUNDS_FILE",
    "SCHEMA_FILE",
    "SUMMARY_FILE",
    "BuiltData",
    "Comparison",
    "Engine",
    "Experiment",
    "Row",
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
    "parse_config",
    "plain_values",
    "read_summary",
    "run",
    "write_atomically",
]
