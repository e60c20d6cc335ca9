"""The ready-made Flower App: server and client of any configuration of `fedobd run`.

Both read the same configuration file, which lies beside the modules that call them, and entries of
the app's run config:

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
from logging import ERROR, INFO, getLogger
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedobd._errors import FedOBDError, UsageError
from fedobd._seeds import derive_seed
from fedobd.blocks import ModelState, get_state, load_state
from fedobd.data import ClientData, hold_out, load_arrays
from fedobd.experiments import Experiment, RunConfig, Summary, build_experiment, load_config, run
from fedobd.flower._identity import client_id
from fedobd.flower._layout import Layout
from fedobd.flower._mod import CompressionMod
from fedobd.flower._opening import MetricKeys
from fedobd.flower._plan import read_plan
from fedobd.flower._strategy import FedOBDStrategy
from fedobd.sessions import RoundPlan, ServerSession
from fedobd.simulation import Callback, ClientStates, RoundResult, prepare_process

logger = getLogger("flwr")  # where Flower shows what an app says

_KEYS = MetricKeys()


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
        """Play the rounds on the grid's nodes, which keep their own states."""
        yield from strategy.play(
            grid,
            server,
            evaluate=experiment.evaluate_part,
            should_evaluate=should_evaluate,
            callback=callback,
        )
        sent = strategy.opening_bytes
        logger.log(INFO, "fedobd: %d bytes of openings, schema and options included", sent)

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
        """See `Callback.on_run_begin`."""
        logger.log(
            INFO, "fedobd: %s, %d rounds, run folder %s", config.method, planned_rounds, folder
        )

    def on_client_end(self, plan: RoundPlan, done: int) -> None:
        """See `Callback.on_client_end`."""
        logger.log(INFO, "fedobd: round %d: %d of %d uploads", plan.round, done, len(plan.cohort))

    def on_round_end(self, record: dict[str, Any]) -> None:
        """See `Callback.on_round_end`."""
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
        """See `Callback.on_run_end`."""
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
    layout = Layout.of(experiment.schema)
    model = setup.make_model().to(setup.device)
    arrays = message.content["arrays"]
    plan = read_plan(message.content.config_records["config"], client)
    assert isinstance(arrays, ArrayRecord)
    load_state(model, layout.to_state(arrays, experiment.schema))
    data = _own_data(context, config) or setup.data(client)
    metrics = MetricRecord()
    validation = setup.validate(model, data) if setup.validate else None
    if validation is not None:
        metrics[_KEYS.num_eval_examples] = validation.num_examples
        metrics[_KEYS.eval_loss] = validation.loss
        metrics[_KEYS.eval_metric] = validation.metric
    trained = setup.train(model, data, plan, derive_seed(setup.seed, "train", plan.round, client))
    metrics[_KEYS.num_examples] = trained.num_examples
    metrics[_KEYS.train_loss] = trained.loss
    content = RecordDict({"arrays": layout.to_arrays(get_state(model)), "metrics": metrics})
    return Message(content, reply_to=message)


def _own_data(context: Context, config: RunConfig) -> ClientData | None:
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
