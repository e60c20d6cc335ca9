"""`fedobd data`: what a data set holds, and how a configuration shares it out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from fedobd._errors import UsageError
from fedobd._lookup import not_installed
from fedobd.cli._console import plain, say
from fedobd.cli._options import Overrides, Source
from fedobd.data import Columns, SplitReport, Splits, check_split, open_source
from fedobd.experiments import build_data, load_config

data_app = typer.Typer(no_args_is_help=True, help="Look at data sets and how they are shared out.")

_SHADES = " ░▒▓█"
_MOST_CLASSES = 20  # that are named one by one
_MOST_NUMBERED = 10  # that fit into a line of 80 characters


@data_app.command("check")
def check_command(
    name: Annotated[str, typer.Argument(help="A file, a folder, or a name on the hub.")],
    input_column: Annotated[str | None, typer.Option("--input", help="Its column.")] = None,
    target_column: Annotated[str | None, typer.Option("--target", help="The classes'.")] = None,
    train_split: Annotated[str, typer.Option(help="The split to train on.")] = "train",
    test_split: Annotated[str, typer.Option(help="The split to test on.")] = "test",
) -> None:
    """Say what a data set holds, and what is wrong with it; exit status 2 where something is."""
    splits = Splits(train=train_split, test=test_split)
    try:
        source = open_source(
            name, columns=Columns(input=input_column, target=target_column), splits=splits
        )
    except ModuleNotFoundError as error:
        raise not_installed("this", error, "data") from error
    say(
        f"{name}: {source.kind}s in column {source.input!r}, {len(source.classes)} classes in "
        f"column {source.target!r}"
    )
    reports = [check_split(source, source.train, train_split)]
    if source.test is not None:
        reports.append(check_split(source, source.test, test_split, like=reports[0]))
    plain.print(_split_table(reports))
    plain.print(_class_table(source.classes, reports))
    if source.test is None:
        say(f"no split {test_split!r}: a part of {train_split!r} will be set aside")
    faults = [f"split {r.name!r}: {fault}" for r in reports for fault in r.faults]
    for fault in faults:
        say(f"wrong: {fault}", style="red")
    if faults:
        raise typer.Exit(2)
    say("nothing is wrong with it")


def _split_table(reports: list[SplitReport]) -> Table:
    table = Table("split", "rows", "inputs", "columns")
    for report in reports:
        table.add_row(report.name, f"{report.rows:,}", report.inputs, ", ".join(report.columns))
    return table


def _class_table(classes: tuple[str, ...], reports: list[SplitReport]) -> Table:
    table = Table("class", *(f"in {report.name}" for report in reports))
    for number, name in enumerate(classes[:_MOST_CLASSES]):
        counts = [f"{report.examples_by_class[number]:,}" for report in reports]
        table.add_row(name, *counts)
    if len(classes) > _MOST_CLASSES:
        rest = [r.examples_by_class[_MOST_CLASSES:] for r in reports]
        counts = [f"{min(numbers):,} to {max(numbers):,} each" for numbers in rest]
        table.add_row(f"{len(classes) - _MOST_CLASSES} more", *counts)
    return table


@data_app.command("partition")
def partition_command(
    source: Source,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A PNG file to draw it in.")
    ] = None,
) -> None:
    """Show how many examples of each class each client has."""
    config = load_config(source, overrides=overrides or [])
    built = build_data(config)
    clients = built.federated.clients
    if built.classes is None or not clients:
        raise UsageError(f"the classes of data {config.data.name!r} are not known")
    targets = [torch.cat([data.train.targets, data.validation.targets]) for data in clients]
    counts = torch.stack([torch.bincount(t, minlength=len(built.classes)) for t in targets])
    plain.print(_partition_table(counts, built.classes))
    if output is not None:
        _draw(counts, built.classes, output, f"{config.data.name}, {config.data.partition.name}")
        say(f"wrote {output}")


def _partition_table(counts: torch.Tensor, classes: tuple[str, ...]) -> Table:
    """Make the table: numbers where they fit into a line, else shades."""
    if len(classes) <= _MOST_NUMBERED:
        table = Table(padding=(0, 0), collapse_padding=True)
        for name in ("client", *classes, "all"):
            table.add_column(name, overflow="fold", justify="right")
        for client, row in enumerate(counts.tolist()):
            table.add_row(str(client), *map(str, row), str(sum(row)))
        return table
    table = Table("client")
    table.add_column(f"{len(classes)} classes, the darker the more", overflow="fold")
    for name in ("classes", "all"):
        table.add_column(name, justify="right", no_wrap=True)
    most = int(counts.max())
    for client, row in enumerate(counts.tolist()):
        shades = [_SHADES[math.ceil(count / most * (len(_SHADES) - 1))] for count in row]
        held = sum(count > 0 for count in row)
        table.add_row(str(client), "".join(shades), str(held), str(sum(row)))
    return table


def _draw(counts: torch.Tensor, classes: tuple[str, ...], file: Path, title: str) -> None:
    """Draw who has how many examples of each class, as a heat map in a PNG file."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise not_installed("a picture", error, "data") from error
    clients = len(counts)
    width = min(16.0, 3 + 0.45 * max(len(classes), 10))
    figure = Figure(figsize=(width, min(16.0, 2 + 0.3 * clients)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(counts.numpy(), aspect="auto", cmap="viridis", vmin=0)
    figure.colorbar(image, label="examples")
    axes.set(xlabel="class", ylabel="client")
    axes.set_title(title, parse_math=False)
    if len(classes) <= _MOST_CLASSES:
        axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", parse_math=False)
    try:
        figure.savefig(file, dpi=150, format="png")
    except OSError as error:
        raise UsageError(f"{str(file)!r} cannot be written: {error.strerror}") from error
