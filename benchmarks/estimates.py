"""How near `fedobd plan` comes to what is really sent: estimate, real bytes and their ratio.

The digits are run here, all methods with one seed, in a minute and a half; other runs come from
records that `benchmarks/comparison` made. Exit status 1 where a ratio is off by more than 25 %.

    python benchmarks/estimates.py [--seed 0] [--no-digits] [--records FOLDER] [--data FOLDER]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fedobd import UsageError
from fedobd.experiments import RunConfig, load_config, parse_config, run
from fedobd.planning import MethodPlan, make_plan

PROMISED = 0.25
"""How far an estimate of all bytes may be off."""


@dataclass(frozen=True, slots=True)
class Real:
    """What a run really sent.

    Args:
        name: the run's name in the table.
        config: its configuration, of one method and seed.
        uplink_bytes: all uploads.
        downlink_bytes: all broadcasts and openings.
    """

    name: str
    config: RunConfig
    uplink_bytes: int
    downlink_bytes: int

    def estimate(self) -> MethodPlan:
        """Plan the run."""
        plan = make_plan(self.config)
        (method,) = (own for own in plan.methods if own.method == self.config.method)
        return method


def digits(seed: int) -> Iterator[Real]:
    """Run each method of the digits."""
    config = load_config("digits")
    for method in config.methods:
        single = config.for_method(method, seed)
        with tempfile.TemporaryDirectory() as made:
            summary = run(single, Path(made) / "run")
        yield Real(f"digits seed {seed}", single, summary.uplink_bytes, summary.downlink_bytes)


def recorded(folder: Path, data: Path | None) -> Iterator[Real]:
    """Read every record under a folder.

    Args:
        folder: such as `benchmarks/comparison/records`.
        data: where the data sets of the records lie, which only models with a vocabulary want.
    """
    for file in sorted(folder.rglob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        values = record["config"]
        if data is not None:
            values["data"]["name"] = str(data / values["data"]["name"])
        summary = record["summary"]
        name = f"{record['preset']} {record['variant']} seed {record['seed']}"
        yield Real(name, parse_config(values), summary["uplink_bytes"], summary["downlink_bytes"])


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-digits", action="store_true")
    parser.add_argument("--records", type=Path, default=None)
    parser.add_argument("--data", type=Path, default=None)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("run", "method", "estimate MB", "real MB", "ratio", "up", "down")
    is_kept = True
    runs = [] if chosen.no_digits else list(digits(chosen.seed))
    if chosen.records is not None:
        runs += recorded(chosen.records, chosen.data)
    for real in runs:
        total = real.uplink_bytes + real.downlink_bytes
        try:
            estimate = real.estimate()
        except UsageError as error:
            table.add_row(real.name, real.config.method, f"none: {error}")
            continue
        ratio = estimate.total_bytes / total
        is_kept &= abs(ratio - 1) <= PROMISED
        table.add_row(
            real.name,
            real.config.method,
            f"{estimate.total_bytes / 1e6:.2f}",
            f"{total / 1e6:.2f}",
            f"{ratio:.3f}",
            f"{estimate.uplink_bytes / real.uplink_bytes:.3f}",
            f"{estimate.downlink_bytes / real.downlink_bytes:.3f}",
        )
    Console().print(table)
    return 0 if is_kept else 1


if __name__ == "__main__":
    sys.exit(main())
