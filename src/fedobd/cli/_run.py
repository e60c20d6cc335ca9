"""`fedobd run`, `fedobd compare` and `fedobd flower new`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Annotated, Protocol

import typer
from rich.table import Table

from fedobd._errors import UsageError
from fedobd.cli._console import console, errors, say
from fedobd.cli._console_tables import comparison_table, summary_table
from fedobd.cli._json_lines import JsonLines
from fedobd.cli._live import Display
from fedobd.cli._options import MethodName, Overrides, Seed, Source
from fedobd.experiments import RunConfig, Summary, compare, load_config, run
from fedobd.report import write_report
from fedobd.simulation import Callback
from fedobd.tracking import log_to_terminal

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
        with interruptible(folder), log_to_terminal(self.log_level):
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
            say(f"run folder: {folder}")
        report = _write_report(folder)
        if not is_silent:
            say(report, style="dim")


@contextmanager
def interruptible(folder: Path) -> Iterator[None]:
    """Say on Ctrl-C how to go on with the runs in a folder."""
    try:
        yield
    except KeyboardInterrupt:
        # CPython remembers one that left an `exec` of text, as when a dataclass is made during an
        # import, and `python -m` then ends by SIGINT whatever is raised here; the next forgets it.
        exec("")  # noqa: S102
        say(
            f"interrupted; the same command with --output {folder} --resume goes on from the "
            "last round",
            to=errors,
        )
        raise typer.Exit(130) from None


def _write_report(folder: Path) -> str:
    """Write report.html and return the line that says where it is, or what it needs."""
    if find_spec("vl_convert") is None:
        return "report: pip install 'fedobd[report]'"
    output = folder / "report.html"
    write_report([folder], output)
    return f"report: {output}"


class _Run(Protocol):
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


def run_command(
    source: Source,
    output: Output = None,
    method: MethodName = None,
    seed: Seed = None,
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
    run_with = _engine(engine)
    single = _single(source, _with_device(overrides, device), method, seed)
    folder = _folder(output, source, single.method, resume)
    with screen.watching(folder, [single.method], [single.federation.seed]) as callbacks:
        summary = run_with(single, folder, workers=workers, resume=resume, callbacks=callbacks)
    screen.end(summary_table(summary), folder)


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


def flower_new_command(
    folder: Annotated[Path, typer.Argument(help="The app's folder, new or empty.")],
    source: Source = "digits",
    method: MethodName = None,
    seed: Seed = None,
    overrides: Overrides = None,
) -> None:
    """Write a Flower App that runs one method with one seed."""
    single = _single(source, overrides or [], method, seed)
    _flower().write_app(folder, single)
    say(f"wrote {folder}; its README.md says how to run it")


def _single(source: str, overrides: list[str], method: str | None, seed: int | None) -> RunConfig:
    """Return the configuration of one run; what is None is as the source says."""
    config = load_config(source, overrides=overrides)
    return config.for_method(
        method or config.method, config.federation.seed if seed is None else seed
    )


def _with_device(overrides: list[str] | None, device: str | None) -> list[str]:
    chosen = [] if device is None else [f"training.device={json.dumps(device)}"]
    return [*(overrides or []), *chosen]


def _engine(name: str) -> _Run:
    if name == "local":
        return run
    if name != "flower":
        raise UsageError(f"--engine {name!r}: allowed are local and flower")
    run_in_simulation: _Run = _flower().run_in_simulation
    return run_in_simulation


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
