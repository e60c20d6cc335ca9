"""The ready-made Flower App: server, client and files for any configuration of `fedobd run`.

Server and client read the same configuration file, which lies beside the modules that call them,
and entries of the app's run config:

    output          run folder of the server, absolute; by default runs/RUN_ID where it was started
    resume          go on from the checkpoint in `output`
    set             changes of single keys, as `fedobd run --set` takes them, one after another
    round-timeout   seconds after which replies are late
    join-timeout    seconds to wait for clients
    min-replies     the fewest uploads of a round

A node whose config has `data-path` trains on that file of arrays alone; the others on their part
of the configuration's data set.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from logging import ERROR, INFO, getLogger
from pathlib import Path
from typing import Any

import tomli_w
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedobd import __version__
from fedobd._errors import FedOBDError, UsageError
from fedobd._seeds import derive_seed
from fedobd.blocks import ModelState, get_state, load_state
from fedobd.data import ClientData, hold_out, load_arrays
from fedobd.experiments import (
    Experiment,
    RunConfig,
    Summary,
    build_experiment,
    load_config,
    run,
    write_atomically,
)
from fedobd.flower._clients import client_id
from fedobd.flower._handshake import ArrayKeys
from fedobd.flower._messages import read_plan
from fedobd.flower._metrics import MetricKeys
from fedobd.flower._mod import CompressionMod
from fedobd.flower._strategy import FedOBDStrategy
from fedobd.sessions import RoundPlan, ServerSession
from fedobd.simulation import Callback, ClientStates, RoundResult, prepare_process

logger = getLogger("flwr")  # where Flower shows what an app says

PACKAGE = "fedobd_app"
"""Name of the package of an app that is written."""

_KEYS = MetricKeys()

_MODULE = '''"""{about}"""

from pathlib import Path

from fedobd.flower import {make}

app = {make}(Path(__file__).with_name("config.toml"))
'''

_README = """# {name}

A Flower App of fedobd that trains by the method `{method}`. What is trained, on what and how is in
`{package}/config.toml`; what one run may change is in `pyproject.toml`, under
`[tool.flwr.app.config]`.

fedobd must be installed, in the same version, on the server and on each node.

    export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 FLWR_TELEMETRY_ENABLED=0
    flwr run . local --stream \\
        --federation-config 'num-supernodes={clients} client-resources-num-cpus=1'

A node is client number `client-id` of its node config, or else `partition-id`. A node with
`data-path` in its node config trains on that file (`.npz` with the arrays `inputs` and `targets`):

    flower-supernode ... --node-config 'client-id=0 data-path="/data/own.npz"'
"""


def make_server_app(config_file: str | Path) -> ServerApp:
    """Return the server of a configuration.

    It leaves the same run folder as `fedobd run`.

    Args:
        config_file: the TOML file, such as `fedobd presets digits` prints.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            _serve(grid, context, Path(config_file))
        except FedOBDError as error:
            logger.log(ERROR, "fedobd: %s", error)
            raise

    return app


def _serve(grid: Grid, context: Context, config_file: Path) -> None:
    options = context.run_config
    config = read_config(context, config_file)
    check_stack(config)
    path = Path(str(options.get("output") or f"runs/{context.run_id}")).absolute()
    strategy = FedOBDStrategy(
        config.chosen,
        num_clients=config.federation.clients,
        round_timeout=_number(options, "round-timeout", 3600.0),
        join_timeout=_number(options, "join-timeout", 600.0),
        min_replies=int(_number(options, "min-replies", 1)),
        shared_start=config.federation.shared_start,
    )

    def engine(
        experiment: Experiment,
        server: ServerSession,
        *,
        should_evaluate: Callable[[RoundPlan], bool],
        states: ClientStates,
        callback: Callback,
    ) -> Iterator[RoundResult]:
        """Run the rounds on the grid's nodes, which keep their own states."""
        yield from strategy.run(
            grid,
            server,
            evaluate=experiment.evaluate_part,
            should_evaluate=should_evaluate,
            callback=callback,
        )
        sent = strategy.handshake_bytes
        logger.log(INFO, "fedobd: %d bytes of handshakes, schema and options included", sent)

    run(
        config,
        path,
        resume=bool(options.get("resume", False)),
        callbacks=[_FlowerLog()],
        engine=engine,
    )


def check_stack(config: RunConfig) -> None:
    """Raise UsageError where clients are to be stacked, which only the local engine can."""
    if config.simulation.stack != 1:
        raise UsageError(
            f"simulation.stack is {config.simulation.stack}; Flower's clients train one by one: 1"
        )


def _number(options: Mapping[str, object], key: str, default: float) -> float:
    value = options.get(key, default)
    if not isinstance(value, int | float):
        raise UsageError(f"{key} is {value!r} in the run config; wanted a number")
    return float(value)


class _FlowerLog(Callback):
    """Says in Flower's log how a run goes."""

    def on_run_begin(self, config: RunConfig, planned_rounds: int, folder: Path) -> None:
        logger.log(
            INFO, "fedobd: %s, %d rounds, run folder %s", config.method, planned_rounds, folder
        )

    def on_client_end(self, plan: RoundPlan, done: int) -> None:
        logger.log(INFO, "fedobd: round %d: %d of %d uploads", plan.round, done, len(plan.cohort))

    def on_round_end(self, record: dict[str, Any]) -> None:
        metric = record["test_metric"]
        logger.log(
            INFO,
            "fedobd: round %d, stage %d: metric %s, loss %.4f, %d bytes up, %d down",
            record["round"],
            record["stage"],
            "-" if metric is None else f"{metric:.4f}",
            record["train_loss"],
            record["uplink_bytes"],
            record["downlink_bytes"],
        )

    def on_run_end(self, summary: Summary) -> None:
        logger.log(
            INFO,
            "fedobd: %d rounds, final metric %s, %d bytes in all",
            summary.rounds,
            "-" if summary.final_metric is None else f"{summary.final_metric:.4f}",
            summary.total_bytes,
        )


def make_client_app(config_file: str | Path) -> ClientApp:
    """Return the client of a configuration.

    Args:
        config_file: the same TOML file as the server's.
    """
    path = Path(config_file)
    app = ClientApp(mods=[_ConfiguredMod(path)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        prepare_process()
        return _train(message, context, read_config(context, path))

    return app


class _ConfiguredMod(CompressionMod):
    """The mod of a client whose configuration tells the initial model."""

    def __init__(self, config_file: Path) -> None:
        super().__init__()
        self._config_file = config_file

    @property
    def has_model(self) -> bool:
        """See `CompressionMod.has_model`."""
        return True

    def initial_state(self, context: Context) -> ModelState:
        """See `CompressionMod.initial_state`."""
        return build_experiment(read_config(context, self._config_file)).initial


def _train(message: Message, context: Context, config: RunConfig) -> Message:
    client = client_id(context)
    if client is None:
        raise UsageError("the node config gives neither client-id nor partition-id")
    experiment = build_experiment(config)
    setup = experiment.setup
    keys = ArrayKeys.of(experiment.schema)
    model = setup.make_model().to(setup.device)
    arrays = message.content["arrays"]
    plan = read_plan(message.content.config_records["config"], client)
    assert isinstance(arrays, ArrayRecord)
    load_state(model, keys.to_state(arrays, experiment.schema))
    data = _node_data(context, config) or setup.data(client)
    metrics = MetricRecord()
    validation = setup.validate(model, data) if setup.validate else None
    if validation is not None:
        metrics[_KEYS.num_eval_examples] = validation.num_examples
        metrics[_KEYS.eval_loss] = validation.loss
        metrics[_KEYS.eval_metric] = validation.metric
    trained = setup.train(model, data, plan, derive_seed(setup.seed, "train", plan.round, client))
    metrics[_KEYS.num_examples] = trained.num_examples
    metrics[_KEYS.train_loss] = trained.loss
    content = RecordDict({"arrays": keys.to_arrays(get_state(model)), "metrics": metrics})
    return Message(content, reply_to=message)


def _node_data(context: Context, config: RunConfig) -> ClientData | None:
    """Return what lies in the node's own file, None where its config names none."""
    path = context.node_config.get("data-path")
    if path is None:
        return None
    return hold_out(load_arrays(str(path)), config.data.validation_fraction)


def read_config(context: Context, config_file: Path) -> RunConfig:
    """Return the configuration, changed as the run config's `set` says.

    Raises:
        UsageError: the file cannot be read, or a key or value is not allowed.
    """
    changes = str(context.run_config.get("set", ""))
    try:
        overrides = shlex.split(changes)
    except ValueError as error:
        raise UsageError(f"set is {changes!r} in the run config: {error}") from error
    return load_config(str(config_file), overrides=overrides)


def write_app(folder: Path, config: RunConfig) -> None:
    """Write a Flower App into a new or empty folder.

    Args:
        folder: where to.
        config: what the app runs.

    Raises:
        UsageError: the folder holds something, or cannot be made.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{str(folder)!r} is there already and not empty; choose a new folder")
    try:
        (folder / PACKAGE).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"folder {str(folder)!r} cannot be made: {error}") from error
    name = f"fedobd-{config.method}"
    readme = _README.format(
        name=name, method=config.method, package=PACKAGE, clients=config.federation.clients
    )
    files = {
        "pyproject.toml": tomli_w.dumps(_project(name, config)),
        "README.md": readme,
        f"{PACKAGE}/__init__.py": '"""A Flower App that was written by fedobd."""\n',
        f"{PACKAGE}/server_app.py": _MODULE.format(
            about="The server: its options are in config.toml and in pyproject.toml.",
            make="make_server_app",
        ),
        f"{PACKAGE}/client_app.py": _MODULE.format(
            about="The client: what a node does with each message.", make="make_client_app"
        ),
        f"{PACKAGE}/config.toml": config.to_toml(),
    }
    for file, text in files.items():
        write_atomically(folder / file, text.encode())


def _project(name: str, config: RunConfig) -> dict[str, object]:
    """Return what pyproject.toml says, with the keys of today's Flower."""
    return {
        "build-system": {"requires": ["hatchling"], "build-backend": "hatchling.build"},
        "project": {
            "name": name,
            "version": "1.0.0",
            "description": f"Federated training with {config.method}",
            "license": "Apache-2.0",
            "dependencies": [f"fedobd[flower]=={__version__}", f"flwr>={version('flwr')}"],
        },
        "tool": {
            "hatch": {"build": {"targets": {"wheel": {"packages": [PACKAGE]}}}},
            "flwr": {
                "app": {
                    "publisher": "fedobd",
                    "components": {
                        "serverapp": f"{PACKAGE}.server_app:app",
                        "clientapp": f"{PACKAGE}.client_app:app",
                    },
                    "config": {
                        "output": "",
                        "resume": False,
                        "set": "",
                        "round-timeout": 3600.0,
                        "join-timeout": 600.0,
                        "min-replies": 1,
                    },
                }
            },
        },
    }
