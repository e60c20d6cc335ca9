"""The command line: its commands, and how it ends.

A mistake of the user ends with exit status 2 and one message, never a traceback.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import torch
import typer
from rich.table import Table
from rich.text import Text

from fedobd import __version__
from fedobd._errors import FedOBDError
from fedobd.cli._console import console, errors, say
from fedobd.cli._data import data_app
from fedobd.cli._inspect import blocks_command, inspect_command
from fedobd.cli._plan import plan_command
from fedobd.cli._report import report_command
from fedobd.cli._run import compare_command, flower_new_command, run_command
from fedobd.experiments import list_presets, load_config

app = typer.Typer(
    name="fedobd",
    help="Federated training of large networks with little traffic.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
flower_app = typer.Typer(
    name="flower", help="Flower Apps that run a configuration.", no_args_is_help=True
)


def main() -> None:
    """Run the command line; the entry point of the `fedobd` command."""
    sys.path.append(os.getcwd())  # noqa: PTH109 - so that a user's own modules are importable
    try:
        app()
    except FedOBDError as error:
        _fail(str(error))
    except torch.cuda.OutOfMemoryError as error:
        _fail(
            f"{error}\nWanted a smaller simulation.stack or training.batch_size, or a model or "
            "data set that takes less memory of the GPU"
        )


def _fail(message: str) -> NoReturn:
    say(f"error: {message}", to=errors, style="red")
    raise SystemExit(2)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        say(f"fedobd {__version__}")
        raise typer.Exit


def presets_command(
    show: Annotated[str | None, typer.Argument(help="Print this preset as TOML.")] = None,
) -> None:
    """List the presets, or print one."""
    if show is not None:
        say(load_config(show).to_toml().removesuffix("\n"))
        return
    table = Table("preset", "what it is")
    for name, text in list_presets().items():
        table.add_row(name, Text(text))
    console.print(table)


app.command("run")(run_command)
flower_app.command("new")(flower_new_command)
app.command("compare")(compare_command)
app.command("report")(report_command)
app.command("plan")(plan_command)
app.command("blocks")(blocks_command)
app.command("inspect")(inspect_command)
app.command("presets")(presets_command)
app.add_typer(flower_app)
app.add_typer(data_app, name="data")
