"""FedAvg against FedOBD over a real link: wall-clock time at 10 Mbit/s.

A SuperLink in this network namespace, SuperNodes in another, a veth pair between them with a
token bucket filter on each end (`tc tbf`). A Transformer of some 20 M parameters with random
weights, one local step a round. Needs root and iproute2; says why it is skipped without them.

    python benchmarks/deployment.py [--rounds 2] [--nodes 2] [--mbit 10]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedobd.experiments import RunConfig, parse_config
from fedobd.flower import write_app

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples" / "deployment"))
from federation import Federation  # noqa: E402 - an example, not a package

NAMESPACE = "fedobd-nodes"
SERVER, NODES = "10.213.7.1", "10.213.7.2"
TIMEOUT_S = 3000.0


def missing() -> str | None:
    """Return why this cannot run here, None where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if absent:
        return f"{' and '.join(absent)} of iproute2 are not installed"
    probe = subprocess.run(["ip", "netns", "add", NAMESPACE], capture_output=True, text=True)  # noqa: S607
    if probe.returncode:
        return f"no network namespace can be made: {probe.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", NAMESPACE], check=True)  # noqa: S607
    return None


@contextmanager
def slow_link(mbit: int) -> Iterator[None]:
    """Join this namespace and another by a link of so many Mbit/s each way."""
    shape = f"root tbf rate {mbit}mbit burst 64kb latency 200ms"
    inside = f"ip netns exec {NAMESPACE}"
    setup = (
        f"ip netns add {NAMESPACE}",
        "ip link add fedobd0 type veth peer name fedobd1",
        f"ip link set fedobd1 netns {NAMESPACE}",
        f"ip address add {SERVER}/30 dev fedobd0",
        "ip link set fedobd0 up",
        f"{inside} ip address add {NODES}/30 dev fedobd1",
        f"{inside} ip link set fedobd1 up",
        f"{inside} ip link set lo up",
        f"tc qdisc add dev fedobd0 {shape}",
        f"{inside} tc qdisc add dev fedobd1 {shape}",
    )
    try:
        for command in setup:
            subprocess.run(command.split(), check=True)
        yield
    finally:
        subprocess.run(["ip", "netns", "delete", NAMESPACE], check=False)  # noqa: S607
        subprocess.run(["ip", "link", "delete", "fedobd0"], check=False, capture_output=True)  # noqa: S607


def configure(method: str, rounds: int, nodes: int) -> RunConfig:
    """Return the configuration of a run: the same rounds and clients for each method."""
    options = {
        "fedavg": {"rounds": rounds, "epochs": 1, "cohort": 1.0},
        "fedobd": {
            "stage_one_rounds": rounds,
            "stage_one_epochs": 1,
            "stage_two_epochs": 0,
            "cohort": 1.0,
        },
    }
    return parse_config(
        {
            "method": method,
            "data": {"name": "deployment_data:make_data"},
            "model": {"name": "deployment_data:make_model"},
            "federation": {"clients": nodes},
            "training": {"batch_size": 16, "learning_rate": 0.01},
            "methods": {method: options[method]},
        }
    )


def measure(federation: Federation, folder: Path, config: RunConfig) -> dict[str, Any]:
    """Run one method and return its figures."""
    app, output = folder / f"app-{config.method}", folder / config.method
    write_app(app, config)
    federation.reset_socket_bytes()
    began = time.perf_counter()
    run = federation.run(
        app, {"output": str(output), "round-timeout": TIMEOUT_S}, timeout_s=TIMEOUT_S
    )
    seconds = time.perf_counter() - began
    if not run.completed:
        raise SystemExit(f"{config.method} ended as {run.status}:\n{federation.log(run.run_id)}")
    sockets = federation.socket_bytes()
    lines = (output / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return {
        "seconds": seconds,
        "rounds": [round(record["seconds"]["round"], 1) for record in records],
        "uplink": sum(record["uplink_bytes"] for record in records),
        "downlink": sum(record["downlink_bytes"] for record in records),
        "sockets_up": sockets.up_bytes,
        "sockets_down": sockets.down_bytes,
    }


def main() -> None:
    """Run both methods over the same link and print them side by side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--mbit", type=int, default=10)
    options = parser.parse_args()
    console = Console()
    reason = missing()
    if reason is not None:
        console.print(f"skipped: {reason}")
        return
    os.environ["PYTHONPATH"] = str(HERE)
    with tempfile.TemporaryDirectory() as made, slow_link(options.mbit):
        nodes = [{"client-id": number} for number in range(options.nodes)]
        with Federation(
            Path(made) / "federation",
            nodes=nodes,
            node_prefix=["ip", "netns", "exec", NAMESPACE],
            host=SERVER,
        ) as federation:
            found = {
                method: measure(
                    federation, Path(made), configure(method, options.rounds, options.nodes)
                )
                for method in ("fedobd", "fedavg")
            }
    table = Table(
        title=f"{options.rounds} rounds, {options.nodes} nodes behind {options.mbit} Mbit/s"
    )
    table.add_column("")
    for method in found:
        table.add_column(method, justify="right")
    table.add_column("ratio", justify="right")
    for key in ("seconds", "uplink", "downlink", "sockets_up", "sockets_down"):
        ours, theirs = found["fedobd"][key], found["fedavg"][key]
        table.add_row(key, f"{ours:,.0f}", f"{theirs:,.0f}", f"{theirs / ours:.2f}")
    table.add_row("seconds of each round", *(str(found[m]["rounds"]) for m in found), "")
    console.print(table)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
