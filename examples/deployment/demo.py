"""Trains over a real Flower deployment on this machine, and counts the bytes in three ways.

    python examples/deployment/demo.py [--folder FOLDER]

Makes certificates and keys, starts a SuperLink with TLS and SuperNode authentication and three
SuperNodes, runs FedOBD on the handwritten digits over them (3 rounds of stage 1, 2 of stage 2),
and stops everything that it started, also on failure and on Ctrl-C.

Exit status: 0 if the run ended well, 1 if something failed, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federation import Federation, FederationError, Run, Scalar, Traffic
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedobd import FedOBDError
from fedobd.experiments import RunConfig, RunFolder, load_config, read_summary
from fedobd.flower import write_app

NUM_NODES = 3
CONFIG = (
    f"federation.clients={NUM_NODES}",
    "methods.fedobd.cohort=2",
    "methods.fedobd.stage_one_rounds=3",
    "methods.fedobd.stage_two_epochs=2",
)
RUN_OPTIONS: dict[str, Scalar] = {"round-timeout": 120.0, "join-timeout": 120.0}

RUN_TIMEOUT_S = 600.0
IDLE_S = 6.0  # how long to count what nodes send when there is nothing to do
LOOK_S = 0.3
ASK_S = 10.0  # between two questions for the run's status, each a process of its own
LOG_CHARACTERS = 4000
INTERRUPTED = 130

console = Console()


@dataclass(frozen=True, slots=True)
class Counts:
    """The bytes of a run, counted in three ways.

    Args:
        payloads: What fedobd encoded, by its own run folder.
        flower: Flower's own count of the run: payloads, the messages around them, and handshakes.
        sockets: What crossed the nodes' sockets meanwhile.
        idle: What would have crossed them without a run, in the same time.
        num_messages: Messages that the server sent and the nodes answered.
    """

    payloads: Traffic
    flower: Traffic
    sockets: Traffic
    idle: Traffic
    num_messages: int


def main() -> int:
    """Runs the demonstration and returns its exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument(
        "--folder", type=Path, help="new folder for keys, logs and the run folder, which is kept"
    )
    given: Path | None = parser.parse_args().folder
    if given is not None and given.exists():
        parser.error(f"{given} is there already; wanted a new folder")
    folder = (given or Path(tempfile.mkdtemp(prefix="fedobd-demo-"))).resolve()
    status = 1
    try:
        demonstrate(folder)
        status = 0
    except KeyboardInterrupt:
        status = INTERRUPTED
        console.print("\n[yellow]Interrupted;[/] everything that was started has been stopped.")
    except (FederationError, FedOBDError, OSError) as error:
        console.print(f"\n[red]Failed:[/] {escape(str(error))}", highlight=False)
    finally:
        if given is None and status != 1:
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.exists():
            console.print(f"Keys, logs and the run folder: {folder}", soft_wrap=True)
    return status


def demonstrate(folder: Path) -> None:
    """Starts a deployment in ``folder``, runs the app over it, and prints what came of it."""
    config = load_config("digits", overrides=CONFIG).for_method("fedobd", seed=0)
    app, output = folder / "app", folder / "run"
    write_app(app, config)
    began = time.monotonic()
    nodes = [{"client-id": client} for client in range(NUM_NODES)]
    with Federation(folder / "federation", nodes=nodes) as federation:
        console.print(
            f"SuperLink (TLS, SuperNode authentication) and {NUM_NODES} SuperNodes are up after "
            f"{time.monotonic() - began:.0f} s"
        )
        idle_rate = measure_idle(federation)
        federation.reset_socket_bytes()
        started = time.monotonic()
        run_id = federation.start_run(app, {"output": str(output), **RUN_OPTIONS})
        run = follow(federation, run_id, RunFolder(output))
        sockets, seconds = federation.socket_bytes(), time.monotonic() - started
    report(config, RunFolder(output), run, sockets, _scaled(idle_rate, seconds))
    console.print(f"All stopped after {time.monotonic() - began:.0f} s.")


def measure_idle(federation: Federation) -> Traffic:
    """Returns the bytes a second that all nodes exchange with the SuperLink without a run."""
    federation.reset_socket_bytes()
    time.sleep(IDLE_S)
    return _scaled(federation.socket_bytes(), 1 / IDLE_S)


def follow(federation: Federation, run_id: int, folder: RunFolder) -> Run:
    """Prints the run's rounds as they end, and returns the run when it has ended.

    Raises:
        FederationError: It ended badly, or not in time.
    """
    deadline = time.monotonic() + RUN_TIMEOUT_S
    asked, seen = time.monotonic(), 0
    while True:
        records = folder.records() if folder.path.is_dir() else []
        for record in records[seen:]:
            print_round(record)
        seen = len(records)
        if folder.is_finished:
            run = federation.wait(run_id, timeout_s=max(1.0, deadline - time.monotonic()))
        elif time.monotonic() - asked > ASK_S:
            run, asked = federation.describe(run_id), time.monotonic()
        else:
            time.sleep(LOOK_S)
            continue
        if run.completed:
            return run
        if run.status.startswith("finished") or time.monotonic() > deadline:
            raise FederationError(
                f"the run is {run.status!r} ({run.details}); wanted it to end well within "
                f"{RUN_TIMEOUT_S:.0f} s. Its log ends with:\n"
                f"{federation.log(run_id)[-LOG_CHARACTERS:]}"
            )


def print_round(record: dict[str, Any]) -> None:
    """Prints a line on a round that has ended."""
    console.print(
        f"  round {record['round']}, stage {record['stage']}: "
        f"{len(record['clients'])} of {len(record['cohort'])} uploads, "
        f"accuracy {record['test_metric']:.1%}, "
        f"{record['uplink_bytes'] + record['downlink_bytes']:,} bytes, "
        f"{record['seconds']['round']:.0f} s",
        highlight=False,
    )
    for refusal in record["refusals"]:
        console.print(f"    client {refusal['client']}: {escape(refusal['message'])}")


def report(
    config: RunConfig, folder: RunFolder, run: Run, sockets: Traffic, idle: Traffic
) -> None:
    """Prints accuracy and traffic."""
    summary = read_summary(folder)
    trained = sum(len(record["cohort"]) for record in folder.records())
    counts = Counts(
        payloads=Traffic(summary.uplink_bytes, summary.downlink_bytes),
        flower=run.traffic,
        sockets=sockets,
        idle=idle,
        num_messages=trained + config.federation.clients,  # each node is asked who it is
    )
    metric = summary.final_metric
    console.print(
        f"\nAccuracy on the test set: {'-' if metric is None else format(metric, '.1%')} after "
        f"{summary.rounds} rounds, {run.elapsed_s:.0f} s by Flower's clock",
        highlight=False,
    )
    console.print(traffic_table(counts))


def traffic_table(counts: Counts) -> Table:
    """Returns the table of the three counts, with what is fixed apart."""
    table = Table(title="Traffic in bytes; up is towards the server", title_justify="left")
    table.add_column("counted", no_wrap=True)
    for heading in ("up", "down", "both", "a message"):
        table.add_column(heading, justify="right", no_wrap=True)

    def add(name: str, traffic: Traffic, style: str = "") -> None:
        both = traffic.up_bytes + traffic.down_bytes
        figures = (traffic.up_bytes, traffic.down_bytes, both, both // counts.num_messages)
        table.add_row(name, *(f"{figure:,}" for figure in figures), style=style)

    around = _less(counts.flower, counts.payloads)
    transport = _less(counts.sockets, counts.flower)
    add("payloads, by the run folder", counts.payloads, "bold")
    add("Flower's network traffic", counts.flower, "bold")
    add("  fixed: around the payloads", around)
    add("sockets, by the proxy", counts.sockets, "bold")
    add("  fixed: HTTP, TLS, polling", transport)
    add("  of that, idle polling", counts.idle)
    return table


def _less(one: Traffic, other: Traffic) -> Traffic:
    return Traffic(one.up_bytes - other.up_bytes, one.down_bytes - other.down_bytes)


def _scaled(traffic: Traffic, factor: float) -> Traffic:
    return Traffic(round(traffic.up_bytes * factor), round(traffic.down_bytes * factor))


if __name__ == "__main__":
    sys.exit(main())
