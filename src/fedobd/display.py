"""What the command line shows: progress while runs go on, and tables afterwards."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedobd._payload import Payload
from fedobd._quantization import Coding
from fedobd._rounds import RoundPlan
from fedobd._schema import ModelSchema, Role
from fedobd._selection import parameter_budget
from fedobd._wire import Header
from fedobd.experiments.compare import Comparison, Row
from fedobd.experiments.config import RunConfig
from fedobd.experiments.folder import RunFolder
from fedobd.experiments.runner import Summary
from fedobd.methods import method_of_wire_id
from fedobd.tracking import RoundMetrics, float32_bytes


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


def _fit(value: float | None, width: int, decimals: int) -> str:
    """Return a number with as many of the decimals as fit into a width, or a dash."""
    if value is None:
        return "–"
    for count in range(decimals, -1, -1):
        text = f"{value:.{count}f}"
        if len(text) <= width:
            return text
    return f"{value:.0e}"


@dataclass(slots=True)
class _Line:
    """What is shown of a method: its run that goes on, or the last one that has ended.

    Args:
        method: its name.
        seed: the run's seed; None before there is a run.
        planned: how many rounds it has at most.
        round: the round that is being played, or the last one.
        rounds_done: rounds that have ended; with a part of the one that is being played.
        stage: the round's stage.
        clients: how many clients have uploaded in the round, of how many.
        metric: the last test metric.
        loss: the last training loss.
        uplink_bytes: all uploads so far.
        downlink_bytes: all that went down so far.
        float32_bytes: what the same payloads would have taken as plain float32.
        seconds: of the last rounds.
        has_ended: whether the run has.
    """

    method: str
    seed: int | None = None
    planned: int = 0
    round: int = 0
    rounds_done: float = 0.0
    stage: str = "–"
    clients: str = "–"
    metric: float | None = None
    loss: float | None = None
    uplink_bytes: int = 0
    downlink_bytes: int = 0
    float32_bytes: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_ROUNDS))
    has_ended: bool = False

    @property
    def reduction(self) -> float | None:
        """1 - bytes sent / bytes as plain float32; None before the first round has ended."""
        if not self.float32_bytes:
            return None
        share = (self.uplink_bytes + self.downlink_bytes) / self.float32_bytes
        return round(1 - share, 3) + 0.0  # and no -0.0 %

    @property
    def time_left(self) -> str:
        """The time that the rounds left take at the pace of the last ones; `done` at the end."""
        if self.has_ended:
            return "done"
        if not self.seconds:
            return "–"
        left = round(median(self.seconds) * (self.planned - self.rounds_done))
        hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


_RECENT_ROUNDS = 5  # of which the pace is taken


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of the live table.

    Args:
        title: its title.
        width: its width in characters; more where a value needs it.
        rank: columns of a higher rank are left out first where there is no room.
        text: what it shows of a line.
    """

    title: str
    width: int
    rank: int
    text: Callable[[_Line], str]

    def needs(self, lines: Iterable[_Line]) -> int:
        """Return the width that it needs with the space after it, in characters."""
        return max([self.width, *(len(self.text(line)) for line in lines)]) + 1


_COLUMNS = (
    _Column("round", 7, 0, lambda line: f"{line.round}/{line.planned}"),
    _Column("st", 2, 8, lambda line: line.stage),
    _Column("acc", 6, 1, lambda line: _fit(line.metric, 6, 4)),
    _Column("loss", 6, 7, lambda line: _fit(line.loss, 6, 4)),
    _Column("up MB", 7, 2, lambda line: _fit(line.uplink_bytes / 1e6, 7, 2)),
    _Column("down MB", 7, 3, lambda line: _fit(line.downlink_bytes / 1e6, 7, 2)),
    _Column("saved", 7, 4, lambda line: format_share(line.reduction)),
    _Column("clients", 7, 6, lambda line: line.clients),
    _Column("left", 7, 5, lambda line: line.time_left),
)
_LEAST_NAME, _MOST_NAME = 8, 24  # characters of a method's name
_NOTE = "saved: less than the same payloads as plain float32"


class Display:
    """An observer of runs: a live table, a line a method, on a terminal; plain lines elsewhere.

    Args:
        console: where to show it.
        methods: methods that will be run, shown from the beginning.
        seeds: seeds that each of them will be run with; shown where there are several.
    """

    def __init__(
        self, console: Console, *, methods: Iterable[str] = (), seeds: Sequence[int] = ()
    ) -> None:
        self._console = console
        self._has_seeds = len(seeds) > 1
        self._lines = {method: _Line(method) for method in methods}
        self._line = _Line("")
        self._folder = Path()
        self._schema: ModelSchema | None = None
        self._live = (
            Live(
                get_renderable=self.table,
                console=console,
                refresh_per_second=2,
                redirect_stderr=sys.stderr.isatty(),  # else its lines would leave their file
            )
            if console.is_interactive
            else None
        )

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def begin_run(self, config: RunConfig, planned_rounds: int, folder: Path) -> None:
        """See `Observer.begin_run`."""
        seed = config.federation.seed
        self._line = _Line(config.method, seed=seed, planned=planned_rounds)
        self._lines[config.method] = self._line
        self._folder, self._schema = folder, None
        self._say(f"{config.method}: seed {seed}, {planned_rounds} rounds, folder {folder}")

    def client_done(self, plan: RoundPlan, done: int) -> None:
        """See `Observer.client_done`."""
        line = self._line
        line.round, line.stage = plan.round, str(plan.stage)
        line.clients = f"{done}/{len(plan.cohort)}"
        line.rounds_done = plan.round - 1 + done / len(plan.cohort)

    def end_round(self, record: dict[str, Any]) -> None:
        """See `Observer.end_round`."""
        if self._schema is None:  # a run writes it before its first record
            values = RunFolder(self._folder).read_json("schema.json")
            self._schema = ModelSchema.from_json(values)
        line = self._line
        line.round = line.rounds_done = record["round"]
        line.stage = str(record["stage"])
        line.clients = f"{len(record['clients'])}/{len(record['cohort'])}"
        line.loss = record["train_loss"]
        if record["test_metric"] is not None:
            line.metric = record["test_metric"]
        line.uplink_bytes += record["uplink_bytes"]
        line.downlink_bytes += record["downlink_bytes"]
        line.float32_bytes += float32_bytes(record, self._schema)
        line.seconds.append(record["seconds"]["round"])
        self._say(
            f"{line.method}: round {line.round}/{line.planned} stage {line.stage} "
            f"accuracy {format_metric(line.metric)} loss {line.loss:.4f} "
            f"sent {format_bytes(line.uplink_bytes + line.downlink_bytes)}"
        )

    def end_run(self, summary: Summary) -> None:
        """See `Observer.end_run`."""
        self._line.metric = summary.final_metric
        self._line.has_ended = True

    def _say(self, text: str) -> None:
        """Print a line where there is no live table."""
        if self._live is None:
            self._console.print(text, soft_wrap=True, markup=False)

    def table(self) -> Table:
        """Return the live table, with the columns for which the console has room."""
        lines = list(self._lines.values())
        begun = [line for line in lines if line.planned]
        title = "method, seed" if self._has_seeds else "method"
        names = [self._name(line) for line in lines]
        name_width = min(_MOST_NAME, max(len(name) for name in [title, *names]))
        columns = _columns_within(self._console.width - name_width, begun)
        widths = [column.needs(begun) for column in columns]
        room = self._console.width - sum(widths)
        table = Table(
            box=None,
            padding=(0, 1, 0, 0),
            pad_edge=False,
            caption=_NOTE if any(column.title == "saved" for column in columns) else None,
            caption_justify="left",
        )
        table.add_column(
            title, width=max(_LEAST_NAME, min(name_width, room)), no_wrap=True, overflow="ellipsis"
        )
        for column, width in zip(columns, widths, strict=True):
            table.add_column(column.title, width=width - 1, justify="right", no_wrap=True)
        for line, name in zip(lines, names, strict=True):
            cells = [column.text(line) for column in columns] if line.planned else []
            table.add_row(*map(Text, [name, *cells]), style=self._style(line))
        return table

    def _name(self, line: _Line) -> str:
        return f"{line.method} {line.seed}" if self._has_seeds and line.planned else line.method

    def _style(self, line: _Line) -> str:
        if not line.planned:
            return "dim"
        return "" if line.has_ended else "bold"


def _columns_within(width: int, lines: Sequence[_Line]) -> list[_Column]:
    """Return the columns that fit, those of a high rank left out first."""
    kept = list(_COLUMNS)
    while kept and sum(column.needs(lines) for column in kept) > width:
        kept.remove(max(kept, key=lambda column: column.rank))
    return kept


class JsonLines:
    """An observer of runs: a JSON object for each round and one for each summary, a line each.

    An object has a `type`, `round` or `summary`. Those of rounds have method, seed, round, stage
    and the figures that trackers are given, by the same names.

    Args:
        stream: where to write them.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._run: dict[str, Any] = {}
        self._metrics = RoundMetrics()

    def begin_run(self, config: RunConfig, planned_rounds: int, folder: Path) -> None:
        """See `Observer.begin_run`."""
        self._run = {"method": config.method, "seed": config.federation.seed}
        self._metrics = RoundMetrics()

    def client_done(self, plan: RoundPlan, done: int) -> None:
        """See `Observer.client_done`; not shown."""

    def end_round(self, record: dict[str, Any]) -> None:
        """See `Observer.end_round`."""
        place = {"round": record["round"], "stage": record["stage"]}
        self._write({"type": "round", **self._run, **place, **self._metrics.add(record)})

    def end_run(self, summary: Summary) -> None:
        """See `Observer.end_run`."""
        self._write({"type": "summary", **asdict(summary)})

    def _write(self, value: dict[str, Any]) -> None:
        self._stream.write(json.dumps(value, allow_nan=False) + "\n")
        self._stream.flush()


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
