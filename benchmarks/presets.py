"""How long a run of each small preset takes, method by method, with one worker a core.

Plays a few rounds of each method and works out a whole run from them: the median round of each
stage, the tests between rounds, and all that is not rounds (the start, the tests after the last).

    python benchmarks/presets.py --data ../shared/data [--only cifar10-small] [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from fedobd.experiments import RunFolder, run

sys.path.insert(0, str(Path(__file__).parent / "comparison"))
from plan import BASELINES, SMALL, Run


def cut(method: str, rounds: int) -> tuple[str, ...]:
    """Return what makes a run as short as so many rounds a stage, with a test after each."""
    keys = ("stage_one_rounds", "stage_two_epochs") if method == "fedobd" else ("rounds",)
    lengths = [f"methods.{method}.{key}={rounds}" for key in keys]
    return (*lengths, "output.evaluate_every=1")


def measure(preset: str, method: str, data: Path, rounds: int) -> tuple[str, float]:
    """Play a short run; return the seconds of a round by stage, and those of a whole run."""
    whole = Run(preset, method, method, 0).configure(data)
    short = Run(preset, method, method, 0, cut(method, rounds)).configure(data)
    with tempfile.TemporaryDirectory() as made:
        began = time.perf_counter()
        run(short, Path(made) / "run", workers=os.cpu_count() or 1)
        elapsed = time.perf_counter() - began
        records = RunFolder(Path(made) / "run").records()
    test = median(record["seconds"]["evaluate"] for record in records)
    total = elapsed - sum(record["seconds"]["round"] for record in records)
    shown = []
    planned = 0
    for stage in whole.chosen.stages():
        spent = [record["seconds"] for record in records if record["stage"] == stage.number]
        a_round = median(seconds["round"] - seconds["evaluate"] for seconds in spent)
        total += stage.rounds * a_round
        planned += stage.rounds
        shown.append(f"{stage.rounds} of {a_round:.2f}")
    tests = planned // whole.output.evaluate_every
    return f"{', '.join(shown)}; {tests} tests of {test:.2f}", total + tests * test


def main() -> None:
    """Print a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder with the data sets")
    parser.add_argument("--only", default="", help=f"presets, of {', '.join(SMALL)}")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each stage")
    options = parser.parse_args()
    for preset in [name for name in options.only.split(",") if name] or SMALL:
        for method in ("fedobd", *BASELINES):
            parts, seconds = measure(preset, method, options.data, options.rounds)
            print(f"{preset} {method}: {parts}: {seconds / 60:.1f} minutes a run", flush=True)


if __name__ == "__main__":
    main()
