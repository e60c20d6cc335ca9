"""How fast clients are simulated: fedobd beside a hand-written loop and other simulators.

Two workloads (benchmarks/peers/workloads.py), all rows in one run on one machine, each row several
times and in turn with the others, medians. Peers run in environments of their own, which
`peers/environments.py` makes under a cache folder; one that cannot be had is listed with the
reason.

    python benchmarks/simulation.py [--repeats 3] [--peers pfl,flower]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

PEERS = Path(__file__).resolve().parent / "peers"
sys.path.insert(0, str(PEERS))
import environments  # noqa: E402 - beside this file, not a package

ROW_SECONDS = 900
FIGURES = ("seconds_per_client_round", "start_seconds", "peak_rss_mb", "root_peak_mb", "loss")


@dataclass(frozen=True, slots=True)
class Row:
    """One way of running a workload.

    Args:
        key: its name in the table and in ratios.
        script: the file of `peers` that runs it.
        arguments: its arguments.
        peer: whose environment it needs; None for this one.
    """

    key: str
    script: str
    arguments: tuple[str, ...]
    peer: str | None = None


def rows(peers: list[str]) -> list[Row]:
    """Return the rows, those that ratios are taken of first."""
    w1, w2 = ("--workload", "w1"), ("--workload", "w2")
    two = ("--processes", "2")
    found = [
        Row("w1 bare loop, 2 threads", "run_bare.py", (*w1, "--threads", "2")),
        Row("w1 bare loop, 2 processes, channels_last", "run_bare.py",
            (*w1, *two, "--channels-last")),
        Row("w1 fedobd FedAvg", "run_fedobd.py", (*w1, *two, "--channels-last")),
        Row("w1 fedobd FedOBD", "run_fedobd.py",
            (*w1, *two, "--channels-last", "--method", "fedobd")),
        Row("w1 fedobd FedAvg, 40 a round", "run_fedobd.py",
            (*w1, *two, "--channels-last", "--cohort", "40", "--rounds", "12")),
        Row("w1 fedobd FedAvg, 1000 a round", "run_fedobd.py",
            (*w1, *two, "--channels-last", "--clients", "1000", "--cohort", "1000",
             "--rounds", "1")),
        Row("w2 bare loop, 1 thread", "run_bare.py", w2),
        Row("w2 bare loop, 2 processes", "run_bare.py", (*w2, *two)),
        Row("w2 fedobd FedAvg, stack 50, 2 workers", "run_fedobd.py",
            (*w2, *two, "--stack", "50")),
        Row("w2 fedobd FedAvg, stack 100", "run_fedobd.py", (*w2, "--stack", "100")),
        Row("w2 fedobd FedAvg, one by one", "run_fedobd.py", w2),
    ]  # fmt: skip
    for peer in peers:
        script = environments.PEERS[peer].script
        for workload in (w1, w2):
            more = two if peer in ("pfl", "flower") else ()
            found.append(Row(f"{workload[1]} {peer}", script, (*workload, *more), peer))
    return found


def run(row: Row, interpreter: str) -> dict[str, Any] | str:
    """Run a row once; return what it printed, or why it failed."""
    environment = {
        **os.environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    done = subprocess.run(
        [interpreter, str(PEERS / row.script), *row.arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=ROW_SECONDS,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return f"exit status {done.returncode}: {done.stderr.strip()[-300:]}"
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def start_seconds() -> float:
    """Return the seconds from the start of `fedobd run` to its first batch."""
    with tempfile.TemporaryDirectory() as made:
        code = (
            "import sys, time, fedobd.training as t\n"
            "real = t.train_locally\n"
            "def first(*a, **k):\n"
            "    print(time.clock_gettime(time.CLOCK_BOOTTIME)); sys.stdout.flush()\n"
            "    import os; os._exit(0)\n"
            "t.train_locally = first\n"
            "from fedobd.cli import main\n"
            f"sys.argv = ['fedobd', 'run', 'digits', '-o', {made + '/run'!r}]\n"
            "main()\n"
        )
        began = time.clock_gettime(time.CLOCK_BOOTTIME)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
    return float(done.stdout.strip().splitlines()[-1]) - began


def main() -> None:
    """Run every row in turn, several times, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", default=",".join(environments.PEERS))
    options = parser.parse_args()
    console = Console(width=140)
    interpreters: dict[str | None, str] = {None: sys.executable}
    missing: dict[str, str] = {}
    peers = [name for name in options.peers.split(",") if name]
    for peer in peers:
        try:
            interpreters[peer] = str(environments.prepare(peer))
        except environments.EnvironmentMissingError as error:
            missing[peer] = str(error)
    found: dict[str, list[dict[str, Any]]] = {}
    for number in range(options.repeats):
        for row in rows([peer for peer in peers if peer not in missing]):
            result = run(row, interpreters[row.peer])
            if isinstance(result, str):
                missing[row.key] = result
            else:
                found.setdefault(row.key, []).append(result)
                milliseconds = 1e3 * result["seconds_per_client_round"]
                load = os.getloadavg()[0]
                console.print(f"{number + 1}: {row.key}: {milliseconds:.3f} ms, load {load:.1f}")
    starts = [start_seconds() for _ in range(options.repeats)]
    table = Table(title=f"medians of {options.repeats}")
    columns = ("row", "ms a client-round", "of the reference", "start s", "peak MB", "main MB")
    for name in (*columns, "loss"):
        table.add_column(name, justify="left" if name == "row" else "right")
    medians = {
        key: {name: median(result[name] for result in results) for name in FIGURES}
        for key, results in found.items()
    }
    references = {"w1": "w1 bare loop, 2 threads", "w2": "w2 bare loop, 1 thread"}
    for key, values in sorted(medians.items(), key=lambda item: item[0][:2]):
        reference = medians[references[key[:2]]]["seconds_per_client_round"]
        table.add_row(
            key,
            f"{1e3 * values['seconds_per_client_round']:.3f}",
            f"{values['seconds_per_client_round'] / reference:.2f}",
            f"{values['start_seconds']:.1f}",
            f"{values['peak_rss_mb']:.0f}",
            f"{values['root_peak_mb']:.0f}",
            f"{values['loss']:.3f}",
        )
    console.print(table)
    console.print(f"fedobd run, start to first batch: {median(starts):.1f} s")
    for name, reason in missing.items():
        console.print(f"not run: {name}: {reason}")
    print(json.dumps({"rows": found, "start_seconds": starts, "missing": missing}))


if __name__ == "__main__":
    main()
