"""Display: the live table of runs that go on; plain lines where the output is no terminal."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, final

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedobd._format import fit_number, format_bytes, format_metric, format_share
from fedobd.blocks import ModelSchema
from fedobd.experiments import RunConfig, RunFolder, Summary
from fedobd.sessions import RoundPlan, cohort_size
from fedobd.simulation import Callback
from fedobd.tracking import float32_bytes


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
    _Column("acc", 6, 1, lambda line: fit_number(line.metric, 6, 4)),
    _Column("loss", 6, 7, lambda line: fit_number(line.loss, 6, 4)),
    _Column("up MB", 7, 2, lambda line: fit_number(line.uplink_bytes / 1e6, 7, 2)),
    _Column("down MB", 7, 3, lambda line: fit_number(line.downlink_bytes / 1e6, 7, 2)),
    _Column("saved", 7, 4, lambda line: format_share(line.reduction)),
    _Column("clients", 7, 6, lambda line: line.clients),
    _Column("left", 7, 5, lambda line: line.time_left),
)
_LEAST_NAME, _MOST_NAME = 8, 24  # characters of a method's name
_NOTE = "saved: less than the same payloads as plain float32"


@final
class Display(Callback):
    """Shows runs: a live table, a line a method, on a terminal; plain lines elsewhere.

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

    def on_run_begin(self, config: RunConfig, planned_rounds: int, folder: Path) -> None:
        """See `Callback.on_run_begin`."""
        seed = config.federation.seed
        first, *_ = config.chosen.stages()
        cohort = cohort_size(first.cohort, config.federation.clients)
        self._line = _Line(
            config.method,
            seed=seed,
            planned=planned_rounds,
            round=1,
            stage=str(first.number),
            clients=f"0/{cohort}",
        )
        self._lines[config.method] = self._line
        self._folder, self._schema = folder, None
        self._say(f"{config.method}: seed {seed}, {planned_rounds} rounds, folder {folder}")

    def on_client_end(self, plan: RoundPlan, done: int) -> None:
        """See `Callback.on_client_end`."""
        line = self._line
        line.round, line.stage = plan.round, str(plan.stage)
        line.clients = f"{done}/{len(plan.cohort)}"
        line.rounds_done = plan.round - 1 + done / len(plan.cohort)
        if done == 1 and not line.seconds:  # a first round may take long
            self._say(
                f"{line.method}: round {plan.round}/{line.planned} stage {plan.stage} "
                f"1 of {len(plan.cohort)} clients done"
            )

    def on_round_end(self, record: dict[str, Any]) -> None:
        """See `Callback.on_round_end`."""
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

    def on_run_end(self, summary: Summary) -> None:
        """See `Callback.on_run_end`."""
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
