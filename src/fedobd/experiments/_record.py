"""Records: the lines of rounds.jsonl."""

from __future__ import annotations

import logging
import math
from typing import Any

from fedobd.simulation import RoundResult

BYTE_PARTS = ("header", "levels", "raw", "buffers")
"""What the bytes of a payload are for."""

logger = logging.getLogger(__name__)


def make_record(result: RoundResult) -> dict[str, Any]:
    """Return a round's line of rounds.jsonl; only `seconds` depends on the clock."""
    test = result.test
    values = result.record.to_json()
    clients = values.pop("clients")
    return {
        **values,
        "test_loss": None if test is None else finite_or_none(test.loss),
        "test_metric": None if test is None else finite_or_none(test.metric),
        "clients": clients,
        "seconds": {phase: round(spent, 6) for phase, spent in sorted(result.seconds.items())},
    }


def finite_or_none(figure: float) -> float | None:
    """Return a figure of a test, None for one that is no number, which JSON cannot hold."""
    if math.isfinite(figure):
        return figure
    logger.warning("a test ended with %s, which is recorded as not measured", figure)
    return None
