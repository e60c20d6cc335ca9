"""How soon workers have played a round, and how much memory is a worker's own.

The digits, two clients on two workers, pools one after another in a process; once with workers
that are forked, once with a folder for temporary files so long that they are spawned.

    python benchmarks/pools.py [--pools 3]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from fedobd import ServerSession
from fedobd.experiments import build_experiment, load_config
from fedobd.simulation import open_pool, simulate

CHANGES = ("federation.clients=2", "methods.fedavg.epochs=1", "methods.fedavg.rounds=1")


def measure(pools: int) -> None:
    """Print the seconds of each pool's first round, and the own memory of a worker in MB."""
    experiment = build_experiment(load_config("digits", overrides=CHANGES).for_method("fedavg", 0))
    seconds = []
    for _ in range(pools):
        server = ServerSession(
            experiment.method, experiment.schema, experiment.initial, num_clients=2, seed=0
        )
        began = time.perf_counter()
        with open_pool(experiment.setup, 2) as pool:
            next(simulate(server, pool))
            seconds.append(time.perf_counter() - began)
            last = psutil.Process().children(recursive=True)[-1]
            own = last.memory_full_info().uss / 1e6
    print(json.dumps({"seconds": seconds, "own": own}))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pools", type=int, default=3)
    parser.add_argument("--here", action="store_true", help="measure in this process")
    options = parser.parse_args()
    if options.here:
        measure(options.pools)
        return
    table = Table(
        "workers", "seconds to the first round's end, pool by pool", "own MB of a worker"
    )
    with tempfile.TemporaryDirectory() as made:
        long = Path(made) / ("x" * 80)
        long.mkdir()
        for name, folder in (("forked", tempfile.gettempdir()), ("spawned", str(long))):
            done = subprocess.run(
                [sys.executable, __file__, "--here", "--pools", str(options.pools)],
                env={**os.environ, "TMPDIR": folder},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            found = json.loads(done.stdout)
            seconds = ", ".join(f"{one:.2f}" for one in found["seconds"])
            table.add_row(name, seconds, f"{found['own']:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
