"""FedAvg with Flower's simulation on Ray: `--processes` actors, one client at a time in each.

What is ours: the server tells each node which client's data to train, so that the cohorts are
those of every peer; each actor makes the data once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Ray's processes import the client's module from here.
_PATHS = [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _PATHS))

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict  # noqa: E402, I001
from flwr.serverapp import Grid, ServerApp  # noqa: E402
from flwr.serverapp.strategy import FedAvg  # noqa: E402
from flwr.simulation import run_simulation  # noqa: E402

import flower_app  # noqa: E402
from measure import Stopwatch, arguments  # noqa: E402
from workloads import WORKLOADS, draw_cohort, make_model  # noqa: E402


class CohortFedAvg(FedAvg):
    """Flower's FedAvg, with our cohorts and the stopwatch."""

    def __init__(self, stopwatch: Stopwatch, threads: int) -> None:
        workload = stopwatch.workload
        super().__init__(
            fraction_train=workload.cohort / workload.num_clients,
            min_train_nodes=workload.cohort,  # a product of floats may fall one short
            fraction_evaluate=0.0,
            min_available_nodes=workload.num_clients,
        )
        self.stopwatch = stopwatch
        self.threads = threads

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return a round's messages, each naming its client."""
        messages = super().configure_train(server_round, arrays, config, grid)
        workload = self.stopwatch.workload
        for message, client in zip(messages, draw_cohort(workload, server_round), strict=True):
            words = ConfigRecord(
                {"workload": workload.name, "threads": self.threads, "client": client}
            )
            message.content = RecordDict({"arrays": arrays, "config": words})
            yield message

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average, and note the round's end."""
        replies = list(replies)
        arrays, metrics = super().aggregate_train(server_round, replies)
        assert metrics is not None, "every client failed"
        records = [reply.content.metric_records["metrics"] for reply in replies]
        self.stopwatch.first_batch(min(float(str(record["began"])) for record in records))
        self.stopwatch.end_round(float(str(metrics["loss"])))
        return arrays, metrics


def main() -> None:
    """Run it."""
    words = arguments(__doc__, processes=2).parse_args()
    workload = WORKLOADS[words.workload]
    workload = replace(workload, rounds=words.rounds or workload.rounds)
    threads = words.threads or 1
    stopwatch = Stopwatch(workload)
    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        CohortFedAvg(stopwatch, threads).start(
            grid=grid,
            initial_arrays=ArrayRecord(make_model(workload).state_dict()),
            num_rounds=stopwatch.total_rounds,
        )
        # Here, while Ray's processes live and their memory can be read.
        stopwatch.report(f"Flower 1.41.0, Ray, {words.processes} actors × {threads} threads")

    run_simulation(
        server_app=server,
        client_app=flower_app.app,
        num_supernodes=workload.num_clients,
        backend_config={
            "init_args": {"num_cpus": words.processes, "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )


if __name__ == "__main__":
    main()
