"""`fedobd plan`: what a federation of a model will send, and how long that takes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from fedobd._errors import UsageError
from fedobd._format import format_bytes, format_duration, format_share
from fedobd.cli._console import console, errors, say
from fedobd.cli._console_tables import block_table, plain_table
from fedobd.cli._options import (
    FactoryOptions,
    MaxBlockFraction,
    Overrides,
    parse_factory_options,
)
from fedobd.experiments import RunConfig, list_presets, load_config, parse_config
from fedobd.methods import METHODS, FedAvg
from fedobd.planning import MethodPlan, Plan, StagePlan, make_plan

_LINK = re.compile(r"(\d+(?:\.\d+)?|\.\d+) ?([kMG]?)bit/s")
_UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}


@dataclasses.dataclass(frozen=True, slots=True)
class _Pace:
    """How fast clients are.

    Args:
        link: speed of each client's link in words.
        link_bits_per_s: the same as a number.
        seconds_per_epoch: of local training.
    """

    link: str
    link_bits_per_s: float
    seconds_per_epoch: float

    def of(self, method: MethodPlan) -> float:
        """Return the seconds that a run takes."""
        return method.seconds(self.link_bits_per_s, self.seconds_per_epoch)


Model = Annotated[
    str,
    typer.Argument(
        help="A built-in model or package.module:factory; or a preset's name or the path of a "
        "TOML file, for its model and its methods with their options."
    ),
]
Clients = Annotated[int | None, typer.Option(help="Clients; 10 for a model.")]
Cohort = Annotated[
    str | None,
    typer.Option(help="Clients of a round (5), or their share (0.5); FedAvg has all."),
]
Rounds = Annotated[
    int | None, typer.Option(help="Rounds, of FedOBD those of stage 1; 100 for a model.")
]
Epochs = Annotated[int | None, typer.Option(help="Local epochs of such a round; 5 for a model.")]
StageTwoEpochs = Annotated[
    int | None, typer.Option(help="Epochs of FedOBD's stage 2; 10 for a model.")
]
DropoutRate = Annotated[
    float | None, typer.Option(help="λ of the methods that drop; 0.3 for a model.")
]
Weight = Annotated[float | None, typer.Option(help="β of FedOBD, up and down; 1e-3 for a model.")]
UpdateSize = Annotated[
    float | None,
    typer.Option(
        help="RMS of a round's update over RMS of the weights; 0.1, with a checkpoint 0.01."
    ),
]
Link = Annotated[
    str, typer.Option(help="Speed of each client's own link: kbit/s, Mbit/s or Gbit/s.")
]
SecondsPerClient = Annotated[
    float, typer.Option(help="Seconds that a client trains for a local epoch.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def plan_command(
    model: Model,
    options: FactoryOptions = "{}",
    max_block_fraction: MaxBlockFraction = None,
    clients: Clients = None,
    cohort: Cohort = None,
    rounds: Rounds = None,
    epochs: Epochs = None,
    stage_two_epochs: StageTwoEpochs = None,
    dropout_rate: DropoutRate = None,
    weight: Weight = None,
    update_size: UpdateSize = None,
    link: Link = "10 Mbit/s",
    seconds_per_client: SecondsPerClient = 0.0,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Estimate what a federation will send, before anything is trained.

    A few rounds of each method are run with made-up updates, and what they emit is counted.
    What FedOBD uploads depends on how large updates are: half a bit a parameter for each doubling
    of --update-size.
    """
    pace = _Pace(link, _parse_link(link), _check_seconds(seconds_per_client))
    values = _configuration(model, overrides or []).to_dict()
    changes = {
        "rounds": rounds,
        "stage_one_rounds": rounds,
        "epochs": epochs,
        "stage_one_epochs": epochs,
        "stage_two_epochs": stage_two_epochs,
        "dropout_rate": dropout_rate,
        "uplink_weight": weight,
        "downlink_weight": weight,
    }
    with_cohort = {**changes, "cohort": _parse_cohort(cohort)}
    for name, section in values["methods"].items():
        _put(section, changes if name == FedAvg.name else with_cohort)
    _put(values["federation"], {"clients": clients})
    values["model"]["options"] |= parse_factory_options(options)
    if max_block_fraction is not None:
        values["model"]["blocks"]["max_block_fraction"] = max_block_fraction
    with _one_thread():
        plan = make_plan(
            parse_config(values),
            update_size=update_size,
            on_step=lambda step: say(step, to=errors, style="dim"),
        )
    if as_json:
        typer.echo(json.dumps(_as_json(plan, pace), indent=2))
    else:
        _show(plan, pace)


# --- what is planned


def _configuration(source: str, overrides: list[str]) -> RunConfig:
    """Return a preset's or file's configuration, or one of all methods on a model."""
    if source.endswith(".toml") or Path(source).is_file() or source in list_presets():
        return load_config(source, overrides=overrides)
    if overrides:
        raise UsageError(
            f"--set {overrides[0]!r} changes a preset or TOML file, and {source!r} is a model; "
            "wanted options such as --clients"
        )
    methods: dict[str, Any] = {name: {} for name in METHODS}
    return parse_config({"model": {"name": source}, "methods": methods})


def _put(section: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Change the keys that a section and its codec have, to what is not None."""
    section |= {key: v for key, v in changes.items() if v is not None and key in section}
    if "codec" in section:
        _put(section["codec"], changes)


def _parse_cohort(text: str | None) -> int | float | None:
    try:
        return None if text is None else float(text) if "." in text else int(text)
    except ValueError:
        raise UsageError(
            f"--cohort {text!r}: wanted a count of clients, such as 5, or a share, such as 0.5"
        ) from None


def _parse_link(text: str) -> float:
    """Return the bits a second."""
    match = _LINK.fullmatch(text.strip())
    speed = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not (math.isfinite(speed) and speed > 0):
        raise UsageError(
            f"--link {text!r}: wanted a speed above 0 in bit/s, kbit/s, Mbit/s or Gbit/s, such as "
            "'10 Mbit/s'"
        )
    return speed


def _check_seconds(seconds: float) -> float:
    if not (math.isfinite(seconds) and seconds >= 0):
        raise UsageError(f"--seconds-per-client is {seconds}; allowed are finite numbers from 0")
    return seconds


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: tensors are many, and threads wait for each other at each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# --- what is shown


def _show(plan: Plan, pace: _Pace) -> None:
    if plan.dropout_rate is not None:
        console.print(block_table(plan.schema, plan.dropout_rate))
    console.print(_traffic_table(plan, pace))
    for line in _notes(plan, pace):
        console.print(line, markup=False, highlight=False, soft_wrap=not console.is_terminal)
    for warning in _warnings(plan):
        text = f"warning: {warning}"
        console.print(text, style="yellow", markup=False, soft_wrap=not console.is_terminal)


def _traffic_table(plan: Plan, pace: _Pace) -> Table:
    table = plain_table(f"estimated traffic, {plan.federation.num_clients} clients")
    table.add_column("method", no_wrap=True)
    for name in (
        "rounds ×\nclients",
        "up per\nround",
        "down per\nround",
        "bytes\nin all",
        "less than\nFedAvg",
        "\ntime",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for method in plan.methods:
        less = "–" if method.method == FedAvg.name else format_share(plan.reduction(method))
        whole = (format_bytes(method.total_bytes), less, format_duration(pace.of(method)))
        if len(method.stages) == 1:
            table.add_row(method.method, *_stage_cells(method.stages[0]), *whole)
        else:
            table.add_row(method.method, "", "", "", *whole)
            for stage in method.stages:
                table.add_row(f"  stage {stage.number}", *_stage_cells(stage))
    return table


def _stage_cells(stage: StagePlan) -> tuple[str, str, str]:
    return (
        f"{stage.rounds} × {stage.cohort}",
        format_bytes(stage.uplink_bytes),
        format_bytes(stage.downlink_bytes),
    )


def _notes(plan: Plan, pace: _Pace) -> Iterator[str]:
    yield (
        f"estimate: up and down per round are one client's; updates have {plan.updates.size:g} "
        "of the RMS of the weights (--update-size); no stage is left early."
    )
    training = (
        f"{pace.seconds_per_epoch:g} s a local epoch" if pace.seconds_per_epoch else "not counted"
    )
    yield (
        f"time: each client has a link of its own of {pace.link}, and all transfer at the same "
        f"time; the server's link is no limit; training: {training}."
    )
    initial = [
        f"{method.method} {method.initialized} × {format_bytes(method.initial_bytes)}"
        for method in plan.methods
        if method.initialized
    ]
    if initial:
        yield f"sent to clients before their first round, counted in all: {', '.join(initial)}"


def _warnings(plan: Plan) -> Iterator[str]:
    never = [plan.schema.blocks[number] for number in plan.never_uploaded()]
    if never:
        total = plan.schema.num_parameters
        names = ", ".join(
            f"{block.name} ({format_share(block.num_parameters / total)})" for block in never
        )
        yield (
            f"{names}: larger than (1 - λ) of the parameters, so never uploaded in FedOBD's "
            "stage 1; split with --max-block-fraction 0.2, or lower --dropout-rate"
        )


def _as_json(plan: Plan, pace: _Pace) -> dict[str, Any]:
    never = plan.never_uploaded()
    return {
        "is_estimate": True,
        "update_size": plan.updates.size,
        "clients": plan.federation.num_clients,
        "seed": plan.federation.seed,
        "link_bits_per_s": pace.link_bits_per_s,
        "seconds_per_epoch": pace.seconds_per_epoch,
        "parameters": plan.schema.num_parameters,
        "dropout_rate": plan.dropout_rate,
        "blocks": [
            {
                "name": block.name,
                "kind": block.kind,
                "parameters": block.num_parameters,
                "is_never_uploaded": number in never,
            }
            for number, block in enumerate(plan.schema.blocks)
        ],
        "methods": [
            {
                "method": method.method,
                "stages": [dataclasses.asdict(stage) for stage in method.stages],
                "opening_bytes": method.initial_bytes,
                "openings": method.initialized,
                "opening_rounds": method.initial_rounds,
                "uplink_bytes": method.uplink_bytes,
                "downlink_bytes": method.downlink_bytes,
                "total_bytes": method.total_bytes,
                "reduction_fedavg": plan.reduction(method),
                "seconds": pace.of(method),
            }
            for method in plan.methods
        ],
        "warnings": list(_warnings(plan)),
    }
