"""Records: what is kept of a run, a small JSON file, never a model."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from plan import Run

from fedobd import ModelSchema
from fedobd.experiments import RunFolder, Summary, load_config

RECORDS = Path(__file__).parent / "records"
ROOT = Path(__file__).parents[2]


def record_file(run: Run) -> Path:
    """Return the file of a run's record."""
    return RECORDS / f"{run.name}.json"


def read_record(run: Run) -> dict[str, Any] | None:
    """Return a run's record; None if it has none."""
    file = record_file(run)
    if not file.exists():
        return None
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return record


def write_record(run: Run, folder: Path, summary: Summary, commit: str) -> None:
    """Write a run's record from its folder."""
    stored = RunFolder(folder)
    rounds = stored.records()
    schema = ModelSchema.from_json(stored.read_json("schema.json"))
    blocks = [{"name": b.name, "parameters": b.num_parameters} for b in schema.blocks]
    record = {
        "preset": run.preset,
        "variant": run.variant,
        "method": run.method,
        "seed": run.seed,
        "changes": list(run.changes),
        "config": load_config(str(folder / "config.toml")).to_dict(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "environment": {**stored.read_json("environment.json"), "cpu": _cpu()},
        "load": os.getloadavg()[2],
        "summary": stored.read_json("summary.json"),
        "blocks": blocks,
        "rounds": [_round(record, len(blocks)) for record in rounds],
    }
    record["config"]["data"]["name"] = Path(record["config"]["data"]["name"]).name
    assert summary.rounds == len(rounds)
    file = record_file(run)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _round(record: dict[str, Any], num_blocks: int) -> dict[str, Any]:
    uploads = [0] * num_blocks
    for client in record["clients"]:
        for number in client["blocks_kept"]:
            uploads[number] += 1
    return {
        "round": record["round"],
        "stage": record["stage"],
        "clients": len(record["clients"]),
        "uplink_bytes": record["uplink_bytes"],
        "downlink_bytes": record["downlink_bytes"],
        "train_loss": record["train_loss"],
        "validation_metric": record["validation_metric"],
        "test_metric": record["test_metric"],
        "uploads_by_block": uploads,
        "seconds": record["seconds"],
    }


def commit_of_code() -> str:
    """Return the commit that runs are made with; it says so where the package differs."""
    commit = _git("rev-parse", "--short=7", "HEAD")
    return commit + ("-dirty" if _git("status", "--porcelain", "--", "src") else "")


def _git(*words: str) -> str:
    git = shutil.which("git") or "git"
    found = subprocess.run([git, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return found.stdout.strip()


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
