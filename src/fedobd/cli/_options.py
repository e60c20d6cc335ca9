"""Arguments and options that several commands have."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from fedobd._errors import UsageError

Source = Annotated[str, typer.Argument(help="A preset's name or the path of a TOML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one key, such as federation.clients=20; repeatable."),
]
FactoryOptions = Annotated[
    str, typer.Option(help="The factory's keyword arguments as JSON: '{\"num_classes\": 5}'.")
]
MaxBlockFraction = Annotated[
    float | None, typer.Option(help="Split blocks with a larger share of the parameters.")
]
MethodName = Annotated[str | None, typer.Option("--method", help="The method to run.")]
Seed = Annotated[int | None, typer.Option(help="The run's seed.")]


def parse_factory_options(text: str) -> dict[str, Any]:
    """Return the keyword arguments that `--options` gives as a JSON object.

    Raises:
        UsageError: it is none.
    """
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"--options {text!r} is not JSON: {error}") from error
    if not isinstance(options, dict):
        raise UsageError(f"--options {text!r}: wanted a JSON object of keyword arguments")
    return options
