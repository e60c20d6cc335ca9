"""Tables on the console: what came of runs, a model's blocks, what a payload holds."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.table import Table
from rich.text import Text

from fedobd._format import format_bytes, format_metric, format_share
from fedobd.blocks import ModelSchema, Role
from fedobd.codec import Coding
from fedobd.experiments import Comparison, Row, Summary
from fedobd.methods import method_of_wire_id
from fedobd.payload import Header, Payload
from fedobd.sessions import oversized_blocks, parameter_budget


def plain_table(title: str, caption: str | None = None) -> Table:
    """Return a table without columns yet, in the style that takes the least width."""
    return Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        pad_edge=False,
    )


def summary_table(summary: Summary) -> Table:
    """Return a run's summary as a table of two columns."""
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
        "refused or missing uploads": str(summary.refusals),
        "seconds": f"{summary.seconds['round']:.1f}",
        "the core's share of the time": format_share(summary.overhead),
    }
    if summary.stops_on_test:
        rows["note"] = "stopped on the test set"
    return _facts_table(f"{summary.method}, seed {summary.seed}", rows)


def comparison_table(comparison: Comparison) -> Table:
    """Return the comparison as a table, the best value of each column bold."""
    many = len(comparison.seeds) > 1
    seeds = ", ".join(map(str, comparison.seeds))
    of_seeds = f"seeds {seeds}, mean ± standard deviation" if many else f"seed {seeds}"
    best = comparison.best_baseline if comparison.best_baseline != "fedavg" else None
    table = plain_table(
        f"{len(comparison.rows)} methods, {of_seeds}",
        f"* {best}, the baseline with the best final accuracy" if best else None,
    )
    table.add_column("method", no_wrap=True)
    for name in (
        "final\nacc.",
        "best\nacc.",
        "uplink\nMB",
        "down-\nlink MB",
        "total\nMB",
        "less than\nFedAvg",
        *(["less than\nbaseline*"] if best else []),
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
            *([_reduction(row, row.reduction_baseline, best)] if best else []),
            f"{row.seconds:.0f}",
        )
    return table


def _reduction(row: Row, value: float | None, other: str | None) -> str:
    return "–" if row.method == other else format_share(value)


def block_table(schema: ModelSchema, dropout_rate: float) -> Table:
    """Return a model's blocks, bottom layer first.

    Those that cannot fit the budget are marked.
    """
    budget = parameter_budget(schema.num_parameters, dropout_rate)
    table = plain_table(
        f"{len(schema.blocks)} blocks, {schema.num_parameters:,} parameters; "
        f"budget at λ = {dropout_rate}: {budget:,}"
    )
    for name in ("#", "block", "kind", "layers", "parameters", "share", "fits"):
        table.add_column(
            name, justify="left" if name in ("block", "kind") else "right", overflow="fold"
        )
    oversized = oversized_blocks(schema, dropout_rate)
    for number, block in enumerate(schema.blocks):
        table.add_row(
            str(number),
            Text(block.name),
            Text(block.kind),
            str(len(block.layers)),
            f"{block.num_parameters:,}",
            format_share(block.num_parameters / schema.num_parameters),
            "[red]never[/red]" if number in oversized else "yes",
        )
    return table


def payload_tables(payload: Payload) -> list[Table]:
    """Return what a payload holds: its header and its blocks."""
    return [_header_table(payload), _payload_block_table(payload)]


def _header_table(payload: Payload) -> Table:
    schema, header, count = payload.schema, payload.header, payload.num_bytes
    held = sum(schema.blocks[number].num_parameters for number in header.block_ids)
    rows = {
        "method": method_of_wire_id(header.method).name,
        "round": str(header.round),
        "stage": str(header.stage),
        "parameters are": _content(header),
        "blocks kept": f"{len(header.block_ids)} of {len(schema.blocks)}",
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
    return _facts_table(f"{header.kind.name.lower()} payload", rows)


def _content(header: Header) -> str:
    if header.start is not None:
        return f"the initial model's, {header.start.hex()}"
    return "differences" if header.is_difference else "values"


def _payload_block_table(payload: Payload) -> Table:
    table = plain_table("blocks")
    for name in ("#", "block", "parameters", "coding", "levels", "bytes", "bits/param"):
        table.add_column(name, justify="left" if name in ("block", "coding") else "right")
    schema = payload.schema
    codings: dict[int, dict[str, None]] = {}  # names in their order, each once
    levels: dict[int, list[int]] = {}
    for number, segment, code in payload.codes():
        if schema.tensors[segment.tensor].role is Role.PARAMETER:
            codings.setdefault(number, {})[code.coding.name.lower()] = None
            if code.coding is Coding.LEVELS:
                levels.setdefault(number, []).append(code.num_levels)
    for number, traffic in payload.traffic.blocks.items():
        block, num_bytes = schema.blocks[number], traffic.num_bytes
        counts = levels.get(number)
        table.add_row(
            str(number),
            Text(block.name),
            f"{block.num_parameters:,}",
            "+".join(codings.get(number, ())) or "buffers",
            f"{min(counts)}–{max(counts)}" if counts else "–",
            f"{num_bytes:,}",
            f"{8 * num_bytes / block.num_parameters:.2f}" if block.num_parameters else "–",
        )
    return table


def _facts_table(title: str, rows: Mapping[str, str]) -> Table:
    table = Table(title=title, show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in rows.items():
        table.add_row(name, value)
    return table
