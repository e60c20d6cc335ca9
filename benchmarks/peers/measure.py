"""The clock of a run: what every peer's script measures, in the same way.

Steady state is the wall clock from the end of the last warm-up round to the end of the last round.
Start-up runs from the start of the first process, as the kernel keeps it, to the first batch of
training, in whichever process that is. Memory is the sum over the process tree, as it stands
after the last round, of each process's own peak (VmHWM): an upper bound, since pages that
processes share count once for each, and their peaks need not coincide.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from workloads import WORKLOADS, Workload


def now() -> float:
    """Return seconds since the machine's start, comparable between processes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def arguments(description: str | None, *, processes: int | None = None) -> argparse.ArgumentParser:
    """Return the arguments that all scripts take.

    Args:
        description: The first line of the script's help.
        processes: The default number of worker processes; None where a peer has one process.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="w1")
    parser.add_argument("--threads", type=int, help="of PyTorch, in each process")
    parser.add_argument("--rounds", type=int, help="to time, after the warm-up")
    if processes is not None:
        parser.add_argument("--processes", type=int, default=processes)
    return parser


@dataclass
class Stopwatch:
    """Collects the times of one run; `report` prints the line.

    Args:
        workload: What is trained.
        root: The process that the tree grows from.
    """

    workload: Workload
    root: int = field(default_factory=os.getpid)
    _first_batch: float | None = None
    _ends: list[float] = field(default_factory=list)
    _loss: float = float("nan")

    @property
    def total_rounds(self) -> int:
        """Rounds to run, warm-up included."""
        return self.workload.warmup_rounds + self.workload.rounds

    def first_batch(self, at: float | None = None) -> None:
        """Note that training begins; only the first call counts.

        Args:
            at: `now()` of another process.
        """
        if self._first_batch is None:
            self._first_batch = now() if at is None else at

    def end_round(self, loss: float) -> None:
        """Note that a round's new global model is there.

        Args:
            loss: The mean training loss of its examples.
        """
        self._ends.append(now())
        self._loss = loss

    def report(self, name: str, *, loss: float | None = None) -> None:
        """Print the run's JSON line.

        Args:
            name: Of the row.
            loss: The last round's, where it is known only now.
        """
        warmup = self.workload.warmup_rounds
        assert len(self._ends) == self.total_rounds, f"{len(self._ends)} rounds were run"
        assert self._first_batch is not None
        seconds = self._ends[-1] - self._ends[warmup - 1]
        row = {
            "name": name,
            "workload": self.workload.name,
            "seconds_per_client_round": seconds / self.workload.rounds / self.workload.cohort,
            "start_seconds": self._first_batch - _start_time(self.root),
            "peak_rss_mb": sum(map(_peak_bytes, _tree(self.root))) / 1e6,
            "root_peak_mb": _peak_bytes(self.root) / 1e6,
            "rounds": self.workload.rounds,
            "loss": self._loss if loss is None else loss,
        }
        print(json.dumps(row), flush=True)


def _stat(pid: int) -> list[str]:
    """Return the fields of a process after its name, which may hold blanks."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _start_time(pid: int) -> float:
    return int(_stat(pid)[19]) / os.sysconf("SC_CLK_TCK")


def _tree(root: int) -> list[int]:
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int(_stat(int(folder.name))[1])
            except OSError:
                continue  # it ended meanwhile
    tree = [root]
    for pid in tree:
        tree += [child for child, parent in parents.items() if parent == pid]
    return tree


def _peak_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return 1024 * sum(kilobytes)
