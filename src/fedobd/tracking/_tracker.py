"""Tracker: what all trackers have in common; an adapter of a tool adds three functions to it."""

from __future__ import annotations

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from fedobd.simulation import Callback
from fedobd.tracking._metrics import RoundMetrics, flatten

logger = logging.getLogger(__name__)

_NO_PARAMETERS = ("output.trackers", "output.tracking_uri")  # they may change within a run


class Tracker(Callback, ABC):
    """A callback that hands the figures of one run to a tracking tool.

    A tool that fails while the run goes on costs no run: there is a warning, and the rest of the
    run is not tracked. What was missed comes later, when the run is resumed.
    """

    name: ClassVar[str]
    """The tracker's name in `output.trackers`."""

    def __init__(self) -> None:
        self._metrics = RoundMetrics()
        self._is_open = False

    def on_run_begin(self, config: Any, planned_rounds: int, folder: Path) -> None:
        """See `Callback.on_run_begin`.

        Raises:
            UsageError: the tool cannot be used.
        """
        parameters = flatten(config.to_dict(), ".")
        for key in _NO_PARAMETERS:
            parameters.pop(key, None)
        self._begin(parameters, folder)
        self._is_open = True

    def on_round_end(self, record: dict[str, Any]) -> None:
        """See `Callback.on_round_end`."""
        metrics = {k: v for k, v in self._metrics.add(record).items() if v is not None}
        self._try(lambda: self._log(record["round"], metrics))

    def on_run_end(self, summary: Any) -> None:
        """See `Callback.on_run_end`."""
        values = flatten(dataclasses.asdict(summary), "/", "summary/")
        metrics = {k: float(v) for k, v in values.items() if isinstance(v, int | float)}
        self._try(lambda: self._close(metrics))
        self._is_open = False

    def close(self) -> None:
        """Leave the tool in order when a run did not come to its end."""
        self._try(lambda: self._close(None))
        self._is_open = False

    def _try(self, act: Callable[[], None]) -> None:
        if not self._is_open:
            return
        try:
            act()
        except Exception as error:  # whatever a tool raises, the run goes on
            self._is_open = False
            logger.warning(
                "tracker %s failed and is left out from here on: %s: %s",
                self.name,
                type(error).__name__,
                error,
            )

    @abstractmethod
    def _begin(self, parameters: Mapping[str, Any], folder: Path) -> None:
        """Open the tool for a run that begins or goes on; rounds come from the first again."""

    @abstractmethod
    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the figures of a round."""

    @abstractmethod
    def _close(self, summary: Mapping[str, float] | None) -> None:
        """Close the tool, after a summary where the run has come to its end."""
