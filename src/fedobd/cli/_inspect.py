"""`fedobd blocks` and `fedobd inspect`: what a model is cut into, and what a payload holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedobd._errors import UsageError
from fedobd.blocks import BlockRules, BlockStyle, ModelSchema, decompose
from fedobd.cli._console import console, say
from fedobd.cli._console_tables import block_table, payload_tables
from fedobd.cli._options import FactoryOptions, MaxBlockFraction, parse_factory_options
from fedobd.experiments import SCHEMA_FILE
from fedobd.methods import check_dropout_rate
from fedobd.models import build_model
from fedobd.payload import Payload
from fedobd.sessions import oversized_blocks


def blocks_command(
    model: Annotated[str, typer.Argument(help="A built-in model or package.module:factory.")],
    options: FactoryOptions = "{}",
    style: Annotated[str, typer.Option(help="semantic, layer or tensor.")] = "semantic",
    max_block_fraction: MaxBlockFraction = None,
    unit_class: Annotated[
        list[str] | None, typer.Option(help="A further class name that is one block; repeatable.")
    ] = None,
    unit_name: Annotated[
        list[str] | None, typer.Option(help="A pattern on module names; repeatable.")
    ] = None,
    dropout_rate: Annotated[float, typer.Option(help="λ, for the (1 - λ) budget.")] = 0.3,
) -> None:
    """Show the semantic blocks of a model."""
    check_dropout_rate(dropout_rate)
    keywords = parse_factory_options(options)
    rules = BlockRules(
        style=_style(style),
        unit_classes=tuple(unit_class or ()),
        unit_names=tuple(unit_name or ()),
        max_block_fraction=max_block_fraction,
    )
    schema = decompose(build_model(model, **keywords), rules)
    console.print(block_table(schema, dropout_rate))
    never = [schema.blocks[number].name for number in oversized_blocks(schema, dropout_rate)]
    if never:
        say(
            f"warning: {', '.join(never)}: larger than (1 - λ) of the parameters, so never "
            "uploaded in stage 1; split with --max-block-fraction, or lower λ",
            style="yellow",
        )


def _style(name: str) -> BlockStyle:
    styles: dict[str, BlockStyle] = {"semantic": "semantic", "layer": "layer", "tensor": "tensor"}
    if name not in styles:
        raise UsageError(f"--style {name!r}: allowed are {', '.join(styles)}")
    return styles[name]


def inspect_command(
    file: Annotated[Path, typer.Argument(help="A payload, such as output.keep_payloads keeps.")],
    schema: Annotated[
        Path | None,
        typer.Option(help="The model's schema.json; else the one of the run folder around it."),
    ] = None,
) -> None:
    """Show what a payload holds."""
    data = _read(file)
    around = (parent / SCHEMA_FILE for parent in file.resolve().parents)
    schema_file = schema or next((path for path in around if path.is_file()), None)
    if schema_file is None:
        raise UsageError(
            f"{str(file)!r} lies in no run folder, so its model is not known; "
            "give the schema.json of its run with --schema"
        )
    try:
        values = json.loads(_read(schema_file))
    except ValueError as error:
        raise UsageError(f"schema {str(schema_file)!r} is not JSON: {error}") from error
    payload = Payload.parse(data, ModelSchema.from_json(values))
    for _ in payload.blocks():
        pass  # decodes every block, so that a damaged one is noticed
    for table in payload_tables(payload):
        console.print(table)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"{str(file)!r} cannot be read: {error.strerror}") from error
