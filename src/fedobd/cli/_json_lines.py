"""JsonLines: what goes on, for programs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from fedobd.experiments import RunConfig, Summary
from fedobd.sessions import RoundPlan
from fedobd.tracking import RoundMetrics


class JsonLines:
    """An observer of runs: a JSON object for each round and one for each summary, a line each.

    An object has a `type`, `round` or `summary`. Those of rounds have method, seed, round, stage
    and the figures that trackers are given, by the same names.

    Args:
        stream: where to write them.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._run: dict[str, Any] = {}
        self._metrics = RoundMetrics()

    def begin_run(self, config: RunConfig, planned_rounds: int, folder: Path) -> None:
        """See `Observer.begin_run`."""
        self._run = {"method": config.method, "seed": config.federation.seed}
        self._metrics = RoundMetrics()

    def client_done(self, plan: RoundPlan, done: int) -> None:
        """See `Observer.client_done`; not shown."""

    def end_round(self, record: dict[str, Any]) -> None:
        """See `Observer.end_round`."""
        place = {"round": record["round"], "stage": record["stage"]}
        self._write({"type": "round", **self._run, **place, **self._metrics.add(record)})

    def end_run(self, summary: Summary) -> None:
        """See `Observer.end_run`."""
        self._write({"type": "summary", **asdict(summary)})

    def _write(self, value: dict[str, Any]) -> None:
        self._stream.write(json.dumps(value, allow_nan=False) + "\n")
        self._stream.flush()
