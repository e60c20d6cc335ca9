"""JsonLines: what goes on, for programs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO, final

from fedobd.experiments import RunConfig, Summary
from fedobd.simulation import Callback
from fedobd.tracking import RoundMetrics


@final
class JsonLines(Callback):
    """Writes a JSON object for each round of runs and for each summary, a line each.

    An object has a `type`, `round` or `summary`. Those of rounds have method, seed, round, stage
    and the figures that trackers are given, by the same names.

    Args:
        stream: where to write them.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._run: dict[str, Any] = {}
        self._metrics = RoundMetrics()

    def on_run_begin(self, config: RunConfig, planned_rounds: int, folder: Path) -> None:
        """See `Callback.on_run_begin`."""
        self._run = {"method": config.method, "seed": config.federation.seed}
        self._metrics = RoundMetrics()

    def on_round_end(self, record: dict[str, Any]) -> None:
        """See `Callback.on_round_end`."""
        place = {"round": record["round"], "stage": record["stage"]}
        self._write({"type": "round", **self._run, **place, **self._metrics.add(record)})

    def on_run_end(self, summary: Summary) -> None:
        """See `Callback.on_run_end`."""
        self._write({"type": "summary", **asdict(summary)})

    def _write(self, value: dict[str, Any]) -> None:
        self._stream.write(json.dumps(value, allow_nan=False) + "\n")
        self._stream.flush()
