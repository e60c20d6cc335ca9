"""The report's size and opening time, with made-up records: 50 runs, 200 rounds, 40 blocks.

    python benchmarks/report.py [--runs 50] [--rounds 200] [--blocks 40] [--folder FOLDER]

It is measured twice: five methods with ten seeds each, and 50 variants of FedOBD, each of which
has pictures of its own. Opening is timed in headless Chromium, from the command to the first
picture, three times after one that is not counted. With --folder pages and runs are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.browser_page import open_browser  # noqa: E402

from fedobd.experiments import load_config  # noqa: E402
from fedobd.methods import METHODS  # noqa: E402
from fedobd.report import write_report  # noqa: E402

CLIENTS = 10
PARAMETERS = 30_000  # of a block


def make_run(
    folder: Path, method: str, seed: int, *changes: str, rounds: int, blocks: int
) -> None:
    """Write a run folder with random records."""
    folder.mkdir(parents=True)
    config = load_config("digits", overrides=changes).for_method(method, seed)
    (folder / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    names = [f"encoder.layer.{number}.attention" for number in range(blocks)]
    schema = {
        "tensors": [[name, [PARAMETERS], "float32", "parameter"] for name in names],
        "blocks": [
            [name, "Attention", [name], [[number, 0, PARAMETERS]]]
            for number, name in enumerate(names)
        ],
    }
    _write(folder / "schema.json", schema)
    _write(folder / "environment.json", {"python": sys.version.split()[0], "packages": {}})
    draws = np.random.default_rng(seed)
    records = [_record(draws, number, rounds, blocks) for number in range(1, rounds + 1)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "rounds.jsonl").write_text(lines, encoding="utf-8")
    summary = {
        "rounds": rounds,
        "final_metric": records[-1]["test_metric"],
        "best_metric": max(record["test_metric"] for record in records),
        "uplink_bytes": sum(record["uplink_bytes"] for record in records),
        "downlink_bytes": sum(record["downlink_bytes"] for record in records),
        "refusals": 0,
        "seconds": {"round": 100.0},
        "stops_on_test": False,
    }
    _write(folder / "summary.json", summary)


def _record(draws: np.random.Generator, number: int, rounds: int, blocks: int) -> dict[str, Any]:
    kept = [np.flatnonzero(draws.random(blocks) < 0.7).tolist() for _ in range(CLIENTS)]
    payloads = np.bincount(np.concatenate(kept).astype(int), minlength=blocks)
    up = [_traffic(draws, int(count)) for count in payloads]
    down = [_traffic(draws, 1) for _ in range(blocks)]
    up_bytes = sum(own["num_bytes"] for own in up)
    down_bytes = sum(own["num_bytes"] for own in down)
    parts = {"header": 200, "levels": 0, "raw": 0, "buffers": 0}
    return {
        "round": number,
        "stage": 1 if number <= rounds * 0.9 else 2,
        "cohort": list(range(CLIENTS)),
        "reopened": [],
        "refusals": [],
        "uplink_bytes": up_bytes + 200 * CLIENTS,
        "downlink_bytes": (down_bytes + 200) * CLIENTS,
        "uplink_blocks": up,
        "broadcast": {**parts, "levels": down_bytes},
        "broadcast_blocks": down,
        "opening_bytes": 0,
        "test_metric": float(1 - np.exp(-number / rounds * 4) + draws.normal(0, 0.01)),
        "clients": [
            {
                "blocks_kept": own,
                "block_differences": draws.random(blocks).tolist(),
                "uplink": {**parts, "levels": up_bytes // CLIENTS},
            }
            for own in kept
        ],
        "seconds": {"round": 1.0, "train": 0.5},
    }


def _traffic(draws: np.random.Generator, payloads: int) -> dict[str, Any]:
    num_bytes = int(draws.integers(20_000, 30_000)) * payloads
    return {
        "payloads": payloads,
        "num_bytes": num_bytes,
        "nominal_bits": 9 * num_bytes,
        "levels": float(draws.random() * 200) if payloads else 0.0,
    }


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value), encoding="utf-8")


def measure(runs: list[Path], page: Path) -> dict[str, Any]:
    """Write the report of the runs and open it; return what it took."""
    began = time.perf_counter()
    write_report(runs, page)
    written = time.perf_counter() - began
    with open_browser() as browser:
        browser.open(page)
        opened = [browser.open(page) for _ in range(3)]
        faults = browser.messages()
    return {
        "page_mb": round(page.stat().st_size / 1e6, 2),
        "writing_s": round(written, 2),
        "opening_s": round(median(opened), 2),
        "console": faults,
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    """Make the runs, and print a line of JSON for each of the two reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    size = {"rounds": options.rounds, "blocks": options.blocks}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for number in range(options.runs):
            method, seed = list(METHODS)[number % len(METHODS)], number // len(METHODS)
            make_run(folder / "methods" / f"{method}-seed{seed}", method, seed, **size)
            change = f"methods.fedobd.codec.uplink_weight={number + 1}e-4"
            make_run(folder / "variants" / str(number), "fedobd", 0, change, **size)
        for name in ("methods", "variants"):
            figures = measure([folder / name], folder / f"{name}.html")
            print(json.dumps({"report": name, "runs": options.runs, **size, **figures}))


if __name__ == "__main__":
    main()
