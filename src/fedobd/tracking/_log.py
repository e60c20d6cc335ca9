"""The log of a run: the logger `fedobd`, its lines in the run folder and on the terminal.

Handlers are there while a run is; importing the package sets up none.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

from fedobd._errors import UsageError
from fedobd.simulation import Callback

LEVELS = ("debug", "info", "warning", "error")
"""From where on the terminal may show the log, from most to least."""

_package = logging.getLogger("fedobd")
logger = logging.getLogger(__name__)


@contextmanager
def log_to_file(file: Path) -> Iterator[None]:
    """Append what the package logs, from level info on, to a file.

    Other handlers get what they would have got without the file. An exception that passes is
    noted.
    """
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setLevel(logging.INFO)
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S%z")
    )
    others = [_Above(_package.getEffectiveLevel())] if _package.propagate else []
    with _handled_by(handler, *others):
        try:
            yield
        except BaseException as error:
            logger.info("stopped: %r", error)
            raise


@contextmanager
def log_to_terminal(level: str) -> Iterator[None]:
    """Show what the package logs on the standard error stream, and nowhere else on a terminal.

    Args:
        level: the least that is shown, one of `LEVELS`.

    Raises:
        UsageError: there is no such level.
    """
    if level not in LEVELS:
        raise UsageError(f"log level {level!r} is unknown; allowed are {', '.join(LEVELS)}")
    with _handled_by(_Terminal(level.upper())):
        yield


class _Terminal(logging.Handler):
    """Writes to what is the standard error stream at the moment, which a display may replace."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


class _Above(logging.Handler):
    """Hands records on to the handlers of the loggers above the package's."""

    def emit(self, record: logging.LogRecord) -> None:
        assert _package.parent is not None
        _package.parent.callHandlers(record)


@contextmanager
def _handled_by(*handlers: logging.Handler) -> Iterator[None]:
    """Have these handlers alone, and those that the package's logger has of its own."""
    level, propagates = _package.level, _package.propagate
    wanted = min(handler.level for handler in handlers)
    _package.setLevel(min(wanted, _package.getEffectiveLevel()))
    _package.propagate = False
    for handler in handlers:
        _package.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            _package.removeHandler(handler)
            handler.close()
        _package.propagate = propagates
        _package.setLevel(level)


@final
class RunLog(Callback):
    """Logs how a run goes; refused and missing uploads as warnings."""

    def __init__(self) -> None:
        self._planned_rounds = 0

    def on_run_begin(self, config: Any, planned_rounds: int, folder: Path) -> None:
        """See `Callback.on_run_begin`."""
        self._planned_rounds = planned_rounds
        logger.info(
            "fedobd %s: method %s, seed %d, at most %d rounds",
            version("fedobd"),
            config.method,
            config.federation.seed,
            planned_rounds,
        )

    def on_round_end(self, record: dict[str, Any]) -> None:
        """See `Callback.on_round_end`."""
        logger.info(
            "round %d/%d, stage %d: metric %s, loss %.4f, %d bytes up, %d bytes down, %.1f s",
            record["round"],
            self._planned_rounds,
            record["stage"],
            _metric(record["test_metric"]),
            record["train_loss"],
            record["uplink_bytes"],
            record["downlink_bytes"],
            record["seconds"]["round"],
        )
        for refusal in record["refusals"]:
            came = refusal["uplink_bytes"] > 0
            logger.warning(
                "round %d: the upload of client %d %s: %s",
                record["round"],
                refusal["client"],
                "is refused" if came else "is missing",
                refusal["message"],
            )

    def on_run_end(self, summary: Any) -> None:
        """See `Callback.on_run_end`."""
        logger.info(
            "ended after %d rounds: metric %s, %d bytes up, %d bytes down",
            summary.rounds,
            _metric(summary.final_metric),
            summary.uplink_bytes,
            summary.downlink_bytes,
        )


def _metric(metric: float | None) -> str:
    return "-" if metric is None else f"{metric:.4f}"
