"""Links: how long the rounds of a run would take over links of a given speed.

A round takes one broadcast and one upload, of the mean bytes a client, and the measured training
time of a client: the clients of a round train at the same time, and each has a link of its own.
"""

from __future__ import annotations

from fedobd.report._run import Round, Run

LINKS = {"1 Mbit/s": 1e6, "10 Mbit/s": 1e7, "100 Mbit/s": 1e8, "1 Gbit/s": 1e9}
"""Links by name, in bits a second, the same up and down."""

ASSUMPTION = (
    "A round is taken as one broadcast, one upload (both of the mean measured bytes a client) and "
    "the measured training time of a client, one after the other: the clients of a round work at "
    "the same time, each on a link of its own that is as fast up as down. Time on the server, "
    "latency and protocol overhead are not counted. A process's first round also compiles code."
)


def round_seconds(played: Round, bits_per_s: float) -> float:
    """Return the seconds of one round over a link; without training where it was not timed."""
    num_bytes = (played.downlink_bytes + played.uplink_bytes) / played.cohort
    return 8 * num_bytes / bits_per_s + (played.train_s or 0.0)


def run_seconds(run: Run, bits_per_s: float) -> float:
    """Return the seconds of all rounds of a run over a link."""
    return sum(round_seconds(played, bits_per_s) for played in run.rounds)


def train_seconds(run: Run) -> float | None:
    """Return a client's training time in a round, the mean; None where it was not measured."""
    times = [played.train_s for played in run.rounds if played.train_s is not None]
    return sum(times) / len(times) if len(times) == len(run.rounds) else None
