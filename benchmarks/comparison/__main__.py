"""The comparison on real data: makes the runs that have no record yet, then the page of results.

    python benchmarks/comparison --data ../shared/data [--only cifar10-small] [--workers 2]

A run that was cut off goes on where it was; one with a record is not made again. Records are
small JSON files in `benchmarks/comparison/records`, the page is `docs/results.md`.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import page
from plan import PRESETS, SEEDS, Run, plan
from records import commit_of_code, read_record, write_record

from fedobd.experiments import run


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder with the data sets")
    parser.add_argument("--only", default="", help=f"presets, of {', '.join(PRESETS)}")
    parser.add_argument("--variants", default="", help="variants, such as fedobd,fedavg")
    parser.add_argument("--seeds", default="", help="seeds, such as 0,1")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--until", type=float, help="begin no run after so many minutes")
    parser.add_argument("--page-only", action="store_true", help="make the page, and no run")
    options = parser.parse_args()
    presets = [name for name in options.only.split(",") if name] or list(PRESETS)
    variants = [name for name in options.variants.split(",") if name]
    seeds = [int(seed) for seed in options.seeds.split(",") if seed] or list(SEEDS)
    began = time.monotonic()
    for entry in plan():
        if options.page_only or entry.preset not in presets or entry.seed not in seeds:
            continue
        if variants and entry.variant not in variants:
            continue
        if options.until is not None and time.monotonic() - began > 60 * options.until:
            break
        if read_record(entry) is None:
            make(entry, options.data, options.workers)
    page.write()


def make(entry: Run, data: Path, workers: int) -> None:
    """Make a run and its record."""
    folder = Path("runs") / "comparison" / entry.name
    print(f"{time.strftime('%H:%M:%S')} {entry.name}", flush=True)
    summary = run(entry.configure(data), folder, workers=workers, resume=folder.exists())
    write_record(entry, folder, summary, commit_of_code())
    (folder / "model.safetensors").unlink()
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    print(
        f"{time.strftime('%H:%M:%S')} {entry.name}: {summary.final_metric:.4f}, "
        f"{summary.total_bytes / 1e6:.2f} MB, {summary.seconds['round']:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
