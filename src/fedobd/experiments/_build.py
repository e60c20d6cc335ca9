"""From a configuration to the objects that a run consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fedobd._blocks import BlockRules, decompose
from fedobd._errors import UsageError
from fedobd._imports import find_object
from fedobd._method import Method
from fedobd._schema import ModelSchema
from fedobd._seeds import derive_seed
from fedobd._state import ModelState, get_state, load_state
from fedobd.data import (
    ClientData,
    Examples,
    FederatedData,
    federate,
    load_arrays,
    load_digits,
)
from fedobd.experiments.config import ModelConfig, RunConfig
from fedobd.models import build_model, use_batch_statistics
from fedobd.simulation import ClientSetup, StackedTraining
from fedobd.stacked import train_stacked
from fedobd.training import (
    LOSSES,
    METRICS,
    Evaluation,
    LocalTraining,
    Loss,
    Metric,
    TrainingOptions,
    evaluate,
    train_locally,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """The objects that a run consists of.

    Args:
        method: the method with its options.
        schema: the model's schema, cut as the method wants.
        initial: the initial values.
        setup: what the clients share.
        evaluate: evaluates a state on the test set; None without one.
    """

    method: Method
    schema: ModelSchema
    initial: ModelState
    setup: ClientSetup
    evaluate: Callable[[ModelState], Evaluation] | None


_NO_EXAMPLES = Examples(torch.empty(0), torch.empty(0))


def build_experiment(config: RunConfig) -> Experiment:
    """Build the objects that a configuration describes.

    Raises:
        UsageError: something that it names cannot be built.
    """
    seed = config.federation.seed
    method = config.chosen
    data = build_data(config)
    if config.model.memory_format == "channels_last":
        data = _channels_last(data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "model"))
        model = make_model(config.model)
    rules = config.model.blocks if method.unit == "semantic" else BlockRules(style=method.unit)
    schema = decompose(model, rules)
    initial = get_state(model)
    training = config.training
    device = _device(training.device)
    loss: Loss = find_object(training.loss, "loss", LOSSES)
    metric: Metric = find_object(training.metric, "metric", METRICS)
    together: StackedTraining | None = None
    if training.function is None:
        options = TrainingOptions(
            **{name: getattr(training, name) for name in TrainingOptions.__slots__}
        )
        train: LocalTraining = partial(train_locally, options=options, loss=loss)
        together = partial(train_stacked, options=options, loss=loss)
    else:
        train = find_object(training.function, "training function", {})
    setup = ClientSetup(
        method=method,
        schema=schema,
        seed=seed,
        make_model=partial(make_model, config.model),
        data=partial(_data_of, data.clients),
        train=train,
        validate=partial(_validate, loss=loss, metric=metric),
        frozen={schema.tensors[n].name: initial[schema.tensors[n].name] for n in schema.frozen()},
        start=initial if config.federation.shared_start else None,
        device=device,
        stack=1 if config.simulation.stack == "auto" else config.simulation.stack,
        train_together=together,
    )
    model = model.to(device)

    def evaluate_state(state: ModelState) -> Evaluation:
        load_state(model, state)
        return evaluate(model, data.test, loss=loss, metric=metric)

    return Experiment(
        method=method,
        schema=schema,
        initial=initial,
        setup=setup,
        evaluate=evaluate_state if len(data.test) else None,
    )


def make_model(config: ModelConfig) -> nn.Module:
    """Build the model of a configuration."""
    model = build_model(config.name, **config.options)
    if config.batch_norm_statistics == "batch":
        use_batch_statistics(model)
    if config.memory_format == "channels_last":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def build_data(config: RunConfig) -> FederatedData:
    """Load the data of a configuration and share it out.

    Raises:
        UsageError: there are more clients than examples, or the user's function gives something
            else.
    """
    data, federation = config.data, config.federation
    if data.name == "nodes":
        return FederatedData((), load_arrays(data.test_path) if data.test_path else _NO_EXAMPLES)
    if data.test_path is not None:
        raise UsageError(f"data.test_path is for data 'nodes'; data is {data.name!r}")
    if data.name == "digits":
        return federate(
            load_digits(),
            federation.clients,
            test_fraction=data.test_fraction,
            validation_fraction=data.validation_fraction,
            seed=federation.seed,
        )
    factory: Callable[..., Any] = find_object(data.name, "data set", {"digits": load_digits})
    made = factory(num_clients=federation.clients, seed=federation.seed, **data.options)
    if not isinstance(made, FederatedData):
        raise UsageError(f"data {data.name!r} gave {type(made).__name__}; wanted FederatedData")
    if len(made.clients) != federation.clients:
        raise UsageError(
            f"data {data.name!r} gave {len(made.clients)} clients; "
            f"federation.clients is {federation.clients}"
        )
    return made


def _channels_last(data: FederatedData) -> FederatedData:
    """Return the same data, images with their channels last in memory as in the model."""

    def moved(examples: Examples) -> Examples:
        if examples.inputs.ndim != 4:
            return examples
        inputs = examples.inputs.contiguous(memory_format=torch.channels_last)
        return Examples(inputs, examples.targets)

    clients = tuple(ClientData(moved(own.train), moved(own.validation)) for own in data.clients)
    return FederatedData(clients, moved(data.test))


def _data_of(clients: tuple[ClientData, ...], number: int) -> ClientData:
    if not clients:
        raise UsageError(
            f"client {number} has no data: data 'nodes' lies on the nodes of a deployment, each "
            "with a data-path in its node config"
        )
    return clients[number]


def _validate(
    model: nn.Module, data: ClientData, *, loss: Loss, metric: Metric
) -> Evaluation | None:
    if len(data.validation) == 0:
        return None
    return evaluate(model, data.validation, loss=loss, metric=metric)


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"training.device is {name!r}: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"training.device is {name!r}, and there is no CUDA device here")
    return name
