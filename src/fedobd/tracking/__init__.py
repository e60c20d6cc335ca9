"""Tracking: what a run leaves behind while it goes on: figures, a log, warnings.

Nothing here changes a result. The log and the trackers are `fedobd.simulation.Callback`s. Each
tracker brings a tool up to date with the records of the run folder, so that it does not matter
when a run was cut off and resumed, or since when it has been tracked. Figures have the same names
everywhere:

    test/metric, test/loss              W on the test set after the round
    train/loss                          as the clients reported it
    validation/metric, validation/loss  the received model on the clients' own validation examples
    traffic/uplink_bytes, traffic/downlink_bytes, traffic/total_bytes  since the run's beginning
    round/seconds                       wall-clock seconds of the round
    summary/...                         the run's summary, once it has ended
"""

from __future__ import annotations

from fedobd.tracking._log import LEVELS, RunLog, log_to_file, log_to_terminal
from fedobd.tracking._metrics import RoundMetrics, flatten, float32_bytes
from fedobd.tracking._mlflow import MLflowTracker
from fedobd.tracking._rare_blocks import RareBlock, rare_blocks, rare_blocks_warning
from fedobd.tracking._tensorboard import TensorBoardTracker
from fedobd.tracking._tracker import Tracker
from fedobd.tracking._trackers import TrackerName, make_trackers

__all__ = [
    "LEVELS",
    "MLflowTracker",
    "RareBlock",
    "RoundMetrics",
    "RunLog",
    "TensorBoardTracker",
    "Tracker",
    "TrackerName",
    "flatten",
    "float32_bytes",
    "log_to_file",
    "log_to_terminal",
    "make_trackers",
    "rare_blocks",
    "rare_blocks_warning",
]
