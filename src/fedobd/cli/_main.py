"""The command line: `fedobd run | compare | report | blocks | inspect | presets | ...`.

A mistake of the user ends with exit status 2 and one message, never a traceback.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Annotated, NoReturn, Protocol

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedobd import __version__
from fedobd._errors import FedOBDError, UsageError
from fedobd.blocks import BlockRules, BlockStyle, ModelSchema, decompose
from fedobd.cli._data import data_app
from fedobd.cli._json_lines import JsonLines
from fedobd.cli._live import Display
from fedobd.cli._plan import parse_options, plan_command
from fedobd.cli._report import report_command
from fedobd.cli._tables import block_table, comparison_table, payload_tables, summary_table
from fedobd.experiments import (
    RunConfig,
    Summary,
    compare,
    list_presets,
    load_config,
    run,
)
from fedobd.methods import check_dropout_rate
from fedobd.models import build_model
from fedobd.payload import Payload
from fedobd.report import write_report
from fedobd.sessions import oversized_blocks
from fedobd.simulation import Callback
from fedobd.tracking import log_to_terminal

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
app.add_typer(flower_app)
app.add_typer(data_app, name="data")
console = Console()
errors = Console(stderr=True)

REPORT = "report.html"

Source = Annotated[str, typer.Argument(help="A preset's name or the path of a TOML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one key, such as federation.clients=20; repeatable."),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="The run folder.")]
Workers = Annotated[
    int,
    typer.Option(
        help="Worker processes; 0 for none (with --engine flower: one a CPU). "
        "Results do not depend on it."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="Where to train: cpu, cuda, cuda:1 or auto; else the config's."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print nothing but warnings and errors.")
]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json", help="Print a JSON object a round and one a run, a line each, and nothing else."
    ),
]
LogLevel = Annotated[
    str, typer.Option(help="What of the log is shown: debug, info, warning or error.")
]
DropoutRate = Annotated[float, typer.Option(help="λ, for the (1 - λ) budget.")]


def main() -> None:
    """Run the command line; the entry point of the `fedobd` command."""
    sys.path.append(os.getcwd())  # noqa: PTH109 - so that a user's own modules are found here
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
    errors.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(2)


@contextmanager
def _interruptible(folder: Path) -> Iterator[None]:
    """Say on Ctrl-C how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        # CPython remembers one that left an `exec` of text, as when a dataclass is made during an
        # import, and `python -m` then ends by SIGINT whatever is raised here; the next forgets it.
        exec("")  # noqa: S102
        errors.print(
            f"interrupted; the same command with --output {folder} --resume goes on from the "
            "last round",
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(130) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Screen:
    """What `run` and `compare` show.

    Args:
        quiet: nothing but warnings and errors.
        as_json: a JSON object a round and a run.
        log_level: what of the log is shown.

    Raises:
        UsageError: quiet and as_json exclude each other.
    """

    quiet: bool
    as_json: bool
    log_level: str

    def __post_init__(self) -> None:
        if self.quiet and self.as_json:
            raise UsageError("--quiet and --json were both given; one of them is allowed")

    @contextmanager
    def watching(
        self, folder: Path, methods: Sequence[str], seeds: Sequence[int]
    ) -> Iterator[Sequence[Callback]]:
        """Yield what shows the runs in a folder."""
        with _interruptible(folder), log_to_terminal(self.log_level):
            if self.quiet:
                yield ()
            elif self.as_json:
                yield (JsonLines(sys.stdout),)
            else:
                with Display(console, methods=methods, seeds=seeds) as display:
                    yield (display,)

    def end(self, table: Table, folder: Path) -> None:
        """Show what came of the runs in a folder, and write their report."""
        is_silent = self.quiet or self.as_json
        if not is_silent:
            console.print(table)
            console.print(f"run folder: {folder}", highlight=False, markup=False, soft_wrap=True)
        report = _write_report(folder)
        if not is_silent:
            console.print(report, style="dim", highlight=False, markup=False, soft_wrap=True)


def _write_report(folder: Path) -> str:
    """Write report.html and return the line that says where it is, or what it needs."""
    if find_spec("plotly") is None:
        return "report: pip install 'fedobd[report]'"
    output = folder / REPORT
    write_report([folder], output)
    return f"report: {output}"


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        console.print(f"fedobd {__version__}", highlight=False)
        raise typer.Exit


@app.command("run")
def run_command(
    source: Source,
    output: Output = None,
    method: Annotated[str | None, typer.Option(help="The method to run.")] = None,
    seed: Annotated[int | None, typer.Option(help="The run's seed.")] = None,
    overrides: Overrides = None,
    workers: Workers = 0,
    device: Device = None,
    resume: Resume = False,
    engine: Annotated[
        str, typer.Option(help="local, or flower for Flower's simulation; the same results.")
    ] = "local",
    quiet: Quiet = False,
    as_json: AsJson = False,
    log_level: LogLevel = "warning",
) -> None:
    """Run one method with one seed."""
    screen = _Screen(quiet=quiet, as_json=as_json, log_level=log_level)
    play = _engine(engine)
    single = _single(source, _with_device(overrides, device), method, seed)
    folder = _folder(output, source, single.method, resume)
    with screen.watching(folder, [single.method], [single.federation.seed]) as callbacks:
        summary = play(single, folder, workers=workers, resume=resume, callbacks=callbacks)
    screen.end(summary_table(summary), folder)


def _single(
    source: str, overrides: list[str] | None, method: str | None, seed: int | None
) -> RunConfig:
    """Return the configuration of one run; what is None is as the source says."""
    config = load_config(source, overrides=overrides or [])
    return config.for_method(
        method or config.method, config.federation.seed if seed is None else seed
    )


def _with_device(overrides: list[str] | None, device: str | None) -> list[str]:
    chosen = [] if device is None else [f"training.device={json.dumps(device)}"]
    return [*(overrides or []), *chosen]


class _Play(Protocol):
    """Runs a configuration; `fedobd.experiments.run` is one."""

    def __call__(
        self,
        config: RunConfig,
        path: Path,
        *,
        workers: int = 0,
        resume: bool = False,
        callbacks: Sequence[Callback] = (),
    ) -> Summary: ...


def _engine(name: str) -> _Play:
    if name == "local":
        return run
    if name != "flower":
        raise UsageError(f"--engine {name!r}: allowed are local and flower")
    play: _Play = _flower().run_in_simulation
    return play


def _flower() -> ModuleType:
    """Return `fedobd.flower`, which needs Flower."""
    try:
        return import_module("fedobd.flower")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("fedobd"):
            raise
        raise UsageError(
            f"this needs Flower, and {error.name!r} is not installed; pip install 'fedobd[flower]'"
        ) from error


@flower_app.command("new")
def flower_new_command(
    folder: Annotated[Path, typer.Argument(help="The app's folder, new or empty.")],
    source: Annotated[
        str, typer.Argument(help="A preset's name or the path of a TOML file.")
    ] = "digits",
    method: Annotated[str | None, typer.Option(help="The method to run.")] = None,
    seed: Annotated[int | None, typer.Option(help="The run's seed.")] = None,
    overrides: Overrides = None,
) -> None:
    """Write a Flower App that runs one method with one seed."""
    single = _single(source, overrides, method, seed)
    _flower().write_app(folder, single)
    console.print(
        f"wrote {folder}; its README.md says how to run it", markup=False, soft_wrap=True
    )


@app.command("compare")
def compare_command(
    source: Source,
    output: Output = None,
    seeds: Annotated[str, typer.Option(help="Seeds, such as 0,1,2; else the config's.")] = "",
    methods: Annotated[str, typer.Option(help="Methods, such as fedobd,fedavg; else all.")] = "",
    overrides: Overrides = None,
    workers: Workers = 0,
    device: Device = None,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    log_level: LogLevel = "warning",
) -> None:
    """Run several methods, with several seeds, and compare them."""
    screen = _Screen(quiet=quiet, as_json=as_json, log_level=log_level)
    config = load_config(source, overrides=_with_device(overrides, device))
    folder = _folder(output, source, "compare", resume)
    chosen = [name.strip() for name in methods.split(",") if name.strip()] or list(config.methods)
    chosen_seeds = _seeds(seeds, config)
    with screen.watching(folder, chosen, chosen_seeds) as callbacks:
        comparison = compare(
            config,
            folder,
            seeds=chosen_seeds,
            methods=chosen,
            workers=workers,
            resume=resume,
            callbacks=callbacks,
        )
    screen.end(comparison_table(comparison), folder)


def _seeds(text: str, config: RunConfig) -> list[int]:
    if not text:
        return [config.federation.seed]
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(
            f"--seeds {text!r}: wanted whole numbers with commas, such as 0,1,2"
        ) from None


def _folder(output: Path | None, source: str, what: str, resume: bool) -> Path:
    if output is not None:
        return output
    if resume:
        raise UsageError("--resume needs --output, the folder of the run to go on with")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{Path(source).stem}-{what}-{stamp}"


app.command("report")(report_command)
app.command("plan")(plan_command)


@app.command("blocks")
def blocks_command(
    model: Annotated[str, typer.Argument(help="A built-in model or package.module:factory.")],
    options: Annotated[
        str, typer.Option(help="The factory's keyword arguments as JSON: '{\"num_classes\": 5}'.")
    ] = "{}",
    style: Annotated[str, typer.Option(help="semantic, layer or tensor.")] = "semantic",
    max_block_fraction: Annotated[
        float | None, typer.Option(help="Split blocks with a larger share of the parameters.")
    ] = None,
    unit_class: Annotated[
        list[str] | None, typer.Option(help="A further class name that is one block; repeatable.")
    ] = None,
    unit_name: Annotated[
        list[str] | None, typer.Option(help="A pattern on module names; repeatable.")
    ] = None,
    dropout_rate: DropoutRate = 0.3,
) -> None:
    """Show the semantic blocks of a model."""
    check_dropout_rate(dropout_rate)
    keywords = parse_options(options)
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
        console.print(
            f"warning: {', '.join(never)}: larger than (1 - λ) of the parameters, so never "
            "uploaded in stage 1; split with --max-block-fraction, or lower λ",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )


def _style(name: str) -> BlockStyle:
    rules: dict[str, BlockStyle] = {"semantic": "semantic", "layer": "layer", "tensor": "tensor"}
    if name not in rules:
        raise UsageError(f"--style {name!r}: allowed are {', '.join(rules)}")
    return rules[name]


@app.command("inspect")
def inspect_command(
    file: Annotated[Path, typer.Argument(help="A payload, such as output.keep_payloads keeps.")],
    schema: Annotated[
        Path | None,
        typer.Option(help="The model's schema.json; else the one of the run folder around it."),
    ] = None,
) -> None:
    """Show what a payload holds."""
    data = _read(file)
    found = schema or next(
        (p / "schema.json" for p in file.resolve().parents if (p / "schema.json").is_file()), None
    )
    if found is None:
        raise UsageError(
            f"{str(file)!r} lies in no run folder, so its model is not known; "
            "give the schema.json of its run with --schema"
        )
    try:
        values = json.loads(_read(found))
    except ValueError as error:
        raise UsageError(f"schema {str(found)!r} is not JSON: {error}") from error
    payload = Payload.parse(data, ModelSchema.from_json(values))
    for _ in payload.blocks():
        pass  # decodes every block, so that a damaged one is found
    for table in payload_tables(payload):
        console.print(table)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"{str(file)!r} cannot be read: {error.strerror}") from error


@app.command("presets")
def presets_command(
    show: Annotated[str | None, typer.Argument(help="Print this preset as TOML.")] = None,
) -> None:
    """List the presets, or print one."""
    if show is not None:
        console.print(
            load_config(show).to_toml(), markup=False, highlight=False, soft_wrap=True, end=""
        )
        return
    table = Table("preset", "what it is")
    for name, text in list_presets().items():
        table.add_row(name, Text(text))
    console.print(table)
