"""The trackers by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from fedobd.tracking._mlflow import MLflowTracker
from fedobd.tracking._tensorboard import TensorBoardTracker
from fedobd.tracking._tracker import Tracker

TrackerName = Literal["tensorboard", "mlflow"]
"""A tracker's name in `output.trackers`."""


def make_trackers(names: Iterable[TrackerName], tracking_uri: str | None = None) -> list[Tracker]:
    """Return trackers for one run.

    Args:
        names: which, each once.
        tracking_uri: MLflow's server or store; None for a file beside the run folder.

    Raises:
        UsageError: the library of one of them is not installed.
    """
    return [
        TensorBoardTracker() if name == "tensorboard" else MLflowTracker(tracking_uri)
        for name in dict.fromkeys(names)
    ]
