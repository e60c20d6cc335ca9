"""What the command line shows: progress while runs go on, and tables afterwards."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedobd._payload import Payload
from fedobd._quantization import Coding
from fedobd._rounds import RoundPlan
from fedobd._schema import ModelSchema, Role
from fedobd._selection import parameter_budget
from fedobd._wire import Header
from fedobd.experiments.compare import Comparison, Row
from fedobd.experiments.config import RunConfig
from fedobd.experiments.runner import Summary
from fedobd.methods import method_of_wire_id


def format_bytes(count: float) -> str:
    """Return a number of bytes for people, in decimal units."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def format_share(share: float | None, digits: int = 1) -> str:
    """Return a share in per cent, or a dash."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def format_metric(metric: float | None) -> str:
    """Return a metric with four decimals, or a dash."""
    return "–" if metric is None else f"{metric:.4f}"


class Display:
    """An observer of runs: progress bars on a terminal, plain lines elsewhere.

    Args:
        console: where to show it.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.fields[name]:<14}"),
            BarColumn(bar_width=14),
            MofNCompleteColumn(),
            TextColumn("acc {task.fields[metric]}"),
            TextColumn("{task.fields[sent]:>9}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._name = ""
        self._task: Any = None
        self._planned = 0
        self._bytes = 0
        self._metric = "–"

    def __enter__(self) -> Display:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)

    def begin_run(self, config: RunConfig, planned_rounds: int, folder: Path) -> None:
        """See `Observer.begin_run`."""
        self._name = config.method
        self._planned = planned_rounds
        self._bytes = 0
        self._metric = "–"
        self._task = self._progress.add_task(
            "", total=planned_rounds, name=config.method, metric="–", sent="0 B"
        )
        if not self._console.is_terminal:
            self._console.print(
                f"{config.method}: seed {config.federation.seed}, {planned_rounds} rounds, "
                f"folder {folder}",
                soft_wrap=True,
            )

    def client_done(self, plan: RoundPlan, done: int) -> None:
        """See `Observer.client_done`."""
        self._progress.update(self._task, completed=plan.round - 1 + done / len(plan.cohort))

    def end_round(self, record: dict[str, Any]) -> None:
        """See `Observer.end_round`."""
        self._bytes += record["uplink_bytes"] + record["downlink_bytes"]
        if record["test_metric"] is not None:
            self._metric = format_metric(record["test_metric"])
        self._progress.update(
            self._task,
            completed=record["round"],
            metric=self._metric,
            sent=format_bytes(self._bytes),
        )
        for refusal in record["refusals"]:
            self._console.print(
                f"round {record['round']}: upload refused: {refusal['message']}", soft_wrap=True
            )
        if not self._console.is_terminal:
            self._console.print(
                f"{self._name}: round {record['round']}/{self._planned} stage {record['stage']} "
                f"accuracy {self._metric} loss {record['train_loss']:.4f} "
                f"sent {format_bytes(self._bytes)}",
                soft_wrap=True,
            )

    def end_run(self, summary: Summary) -> None:
        """See `Observer.end_run`: warns of blocks that were never uploaded."""
        self._progress.update(
            self._task, completed=self._planned, metric=format_metric(summary.final_metric)
        )
        warn_never_uploaded(self._console, summary)


def warn_never_uploaded(console: Console, summary: Summary) -> None:
    """Say which blocks no client uploaded in stage 1, and what to do about it."""
    if summary.never_uploaded:
        share = sum(block["share"] for block in summary.never_uploaded)
        names = ", ".join(
            f"{block['block']} ({format_share(block['share'])})"
            for block in summary.never_uploaded
        )
        console.print(
            f"warning: {summary.method}: no client uploaded these blocks in stage 1: {names}; "
            f"{format_share(share)} of the parameters were not trained on the server in it. "
            "Split large blocks with model.blocks.max_block_fraction, or lower dropout_rate.",
            style="yellow",
            soft_wrap=True,
        )


def summary_table(summary: Summary) -> Table:
    """Return a run's summary as a table of two columns."""
    table = Table(title=f"{summary.method}, seed {summary.seed}", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    rows = {
        "rounds": str(summary.rounds),
        "test accuracy, final": format_metric(summary.final_metric),
        "test accuracy, best": format_metric(summary.best_metric),
        "test accuracy of what clients hold": format_metric(summary.broadcast_metric),
        "uplink": format_bytes(summary.uplink_bytes),
        "downlink": format_bytes(summary.downlink_bytes),
        "total": format_bytes(summary.total_bytes),
        "total, nominal bits / 8": format_bytes(
            (summary.uplink_nominal_bits + summary.downlink_nominal_bits) / 8
        ),
        "headers, of the uplink": format_share(summary.shares["uplink"].get("header")),
        "buffers, of the uplink": format_share(summary.shares["uplink"].get("buffers")),
        "refused uploads": str(summary.refusals),
        "seconds": f"{summary.seconds['round']:.1f}",
        "the core's share of the time": format_share(summary.overhead),
    }
    if summary.stops_on_test:
        rows["note"] = "stopped on the test set"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def comparison_table(comparison: Comparison) -> Table:
    """Return the comparison as a table, the best value of each column bold."""
    many = len(comparison.seeds) > 1
    table = Table(
        title=f"{len(comparison.rows)} methods, "
        + (f"seeds {_list(comparison.seeds)}, mean ± standard deviation" if many else "")
        + ("" if many else f"seed {_list(comparison.seeds)}"),
        caption=f"* {comparison.best_baseline}, the baseline with the best final accuracy"
        if comparison.best_baseline
        else None,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("method", no_wrap=True)
    for name in (
        "final\nacc.",
        "best\nacc.",
        "uplink\nMB",
        "down-\nlink MB",
        "total\nMB",
        "less than\nFedAvg",
        "less than\nbaseline*",
        "\ns",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    best_final = max(row.final_metric for row in comparison.rows)
    best_best = max(row.best_metric for row in comparison.rows)
    least = min(row.total_bytes for row in comparison.rows)

    def mark(text: str, is_best: bool) -> str:
        return f"[bold]{text}[/bold]" if is_best else text

    def accuracy(value: float, spread: float) -> str:
        deviation = f"±{spread:.4f}".replace("0.", ".", 1)
        return f"{value:.4f}\n{deviation}" if many else f"{value:.4f}"

    for row in comparison.rows:
        table.add_row(
            row.method,
            mark(accuracy(row.final_metric, row.final_metric_std), row.final_metric == best_final),
            mark(accuracy(row.best_metric, row.best_metric_std), row.best_metric == best_best),
            f"{row.uplink_bytes / 1e6:.2f}",
            f"{row.downlink_bytes / 1e6:.2f}",
            mark(f"{row.total_bytes / 1e6:.2f}", row.total_bytes == least),
            _reduction(row, row.reduction_fedavg, "fedavg"),
            _reduction(row, row.reduction_baseline, comparison.best_baseline),
            f"{row.seconds:.0f}",
        )
    return table


def _list(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _reduction(row: Row, value: float | None, other: str | None) -> str:
    return "–" if row.method == other else format_share(value)


def block_table(schema: ModelSchema, dropout_rate: float) -> Table:
    """Return a model's blocks, bottom layer first.

    Those that cannot fit the budget are marked.
    """
    budget = parameter_budget(schema.num_parameters, dropout_rate)
    table = Table(
        title=f"{len(schema.blocks)} blocks, {schema.num_parameters:,} parameters; "
        f"budget at λ = {dropout_rate}: {budget:,}"
    )
    for name in ("#", "block", "kind", "layers", "parameters", "share", "fits"):
        table.add_column(
            name, justify="left" if name in ("block", "kind") else "right", overflow="fold"
        )
    for number, block in enumerate(schema.blocks):
        fits = block.num_parameters <= budget
        table.add_row(
            str(number),
            block.name,
            block.kind,
            str(len(block.layers)),
            f"{block.num_parameters:,}",
            format_share(block.num_parameters / schema.num_parameters),
            "yes" if fits else "[red]never[/red]",
        )
    return table


def never_fitting(schema: ModelSchema, dropout_rate: float) -> list[str]:
    """Return the names of the blocks that are larger than the (1 - λ) budget."""
    budget = parameter_budget(schema.num_parameters, dropout_rate)
    return [block.name for block in schema.blocks if block.num_parameters > budget]


def _content(header: Header) -> str:
    if header.start is not None:
        return f"the initial model's, {header.start.hex()}"
    return "differences" if header.is_difference else "values"


def payload_tables(payload: Payload) -> list[Table]:
    """Return what a payload holds: its header and its blocks."""
    schema, header, count = payload.schema, payload.header, payload.num_bytes
    facts = Table(title=f"{header.kind.name.lower()} payload", show_header=False)
    facts.add_column(style="bold")
    facts.add_column(justify="right")
    held = sum(schema.blocks[number].num_parameters for number in header.kept)
    rows = {
        "method": method_of_wire_id(header.method).name,
        "round": str(header.round),
        "stage": str(header.stage),
        "parameters are": _content(header),
        "blocks kept": f"{len(header.kept)} of {len(schema.blocks)}",
        "parameters kept": f"{held:,} of {schema.num_parameters:,} "
        f"({format_share(held / schema.num_parameters)})",
        "bytes": f"{count.total:,}",
        "of these header": f"{count.header:,}",
        "levels": f"{count.levels:,}",
        "raw values": f"{count.raw:,}",
        "buffers": f"{count.buffers:,}",
        "nominal bytes": f"{count.nominal_bits / 8:,.0f}",
    }
    if header.report is not None:
        rows["client"] = str(header.client)
        rows["examples"] = str(header.report.num_examples)
        rows["training loss"] = f"{header.report.train_loss:.4f}"
    for name, value in rows.items():
        facts.add_row(name, value)

    blocks = Table(title="blocks")
    for name in ("#", "block", "parameters", "coding", "levels", "bytes", "bits/param"):
        blocks.add_column(name, justify="left" if name in ("block", "coding") else "right")
    traffic = payload.block_traffic()
    codings: dict[int, list[Coding]] = {}
    levels: dict[int, list[int]] = {}
    for number, segment, code in payload.codes():
        if schema.tensors[segment.tensor].role is Role.PARAMETER:
            codings.setdefault(number, []).append(code.coding)
            if code.coding is Coding.LEVELS:
                levels.setdefault(number, []).append(code.num_levels)
    for number, own_traffic in traffic.items():
        num_bytes = own_traffic.num_bytes
        block = schema.blocks[number]
        own = levels.get(number, [])
        kinds = dict.fromkeys(coding.name.lower() for coding in codings.get(number, []))
        blocks.add_row(
            str(number),
            block.name,
            f"{block.num_parameters:,}",
            "+".join(kinds) or "buffers",
            f"{min(own)}–{max(own)}" if own else "–",
            f"{num_bytes:,}",
            f"{8 * num_bytes / block.num_parameters:.2f}" if block.num_parameters else "–",
        )
    return [facts, blocks]
