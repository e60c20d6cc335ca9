"""From a configuration to the objects that a run consists of."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from fedobd._errors import UsageError
from fedobd._lookup import find_object
from fedobd._seeds import derive_seed, make_generator
from fedobd.blocks import BlockRules, ModelSchema, ModelState, decompose, get_state, load_state
from fedobd.data import Augmentation, ClientData, ExampleSet, load_vectors, select
from fedobd.experiments._config import ModelConfig, RunConfig
from fedobd.experiments._data import build_data
from fedobd.experiments._fit import check_fit
from fedobd.models import MODELS, build_model, use_batch_statistics
from fedobd.sessions import Method
from fedobd.simulation import ClientSetup, StackedTraining
from fedobd.training import (
    LOSSES,
    METRICS,
    Evaluation,
    LocalTraining,
    Loss,
    Metric,
    TrainingOptions,
    evaluate,
    seed_device,
    train_locally,
    train_stacked,
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
        evaluate_part: the same on the part of it that is tested on between rounds.
    """

    method: Method
    schema: ModelSchema
    initial: ModelState
    setup: ClientSetup
    evaluate: Callable[[ModelState], Evaluation] | None
    evaluate_part: Callable[[ModelState], Evaluation] | None


def build_experiment(config: RunConfig, workers: int = 0) -> Experiment:
    """Build the objects that a configuration describes.

    Args:
        config: the configuration.
        workers: how many processes will train beside this one.

    Raises:
        UsageError: something that it names cannot be built.
    """
    seed = config.federation.seed
    method = config.chosen
    device = _device(config.training.device)
    built = build_data(config, device, workers)
    data = built.federated
    config_of_model = _with_vocabulary(config.model, built.vocabulary, seed)
    model = initial_model(config.model_copy(update={"model": config_of_model}))
    rules = config.model.blocks if method.unit == "semantic" else BlockRules(style=method.unit)
    schema = decompose(model, rules)
    initial = get_state(model)
    loss: Loss = find_object(config.training.loss, "loss", LOSSES)
    metric: Metric = find_object(config.training.metric, "metric", METRICS)
    train, together = _training(config, loss)
    model = model.to(device)
    if config.training.function is None and data.clients:
        check_fit(config, built, model, loss)
    setup = ClientSetup(
        method=method,
        schema=schema,
        seed=seed,
        make_model=partial(make_model, config_of_model),
        data=partial(_data_of, data.clients),
        train=train,
        validate=partial(_validate, loss=loss, metric=metric),
        frozen={schema.tensors[n].name: initial[schema.tensors[n].name] for n in schema.frozen()},
        start=initial if config.federation.shared_start else None,
        device=device,
        stack=1 if config.simulation.stack == "auto" else config.simulation.stack,
        train_together=together,
    )
    evaluate_on = partial(_evaluation, model, loss, metric)
    return Experiment(
        method=method,
        schema=schema,
        initial=initial,
        setup=setup,
        evaluate=evaluate_on(data.test),
        evaluate_part=evaluate_on(_some(data.test, config.output.evaluate_examples)),
    )


def _evaluation(
    model: nn.Module, loss: Loss, metric: Metric, examples: ExampleSet
) -> Callable[[ModelState], Evaluation] | None:
    def evaluate_state(state: ModelState) -> Evaluation:
        load_state(model, state)
        return evaluate(model, examples, loss=loss, metric=metric)

    return evaluate_state if len(examples) else None


def _some(examples: ExampleSet, most: int | None) -> ExampleSet:
    """Draw examples, the same in every run."""
    if most is None or most >= len(examples):
        return examples
    order = torch.randperm(len(examples), generator=make_generator(0, "evaluated"))
    return select(examples, order[:most])


def _training(config: RunConfig, loss: Loss) -> tuple[LocalTraining, StackedTraining | None]:
    """Return how one client is trained and how several are at once, if that can be done."""
    training = config.training
    if training.function is not None:
        return find_object(training.function, "training function", {}), None
    options = TrainingOptions(
        **{name: getattr(training, name) for name in TrainingOptions.__slots__}
    )
    augment = _augmentation(config)
    return (
        partial(train_locally, options=options, loss=loss, augment=augment),
        partial(train_stacked, options=options, loss=loss, augment=augment),
    )


def _augmentation(config: RunConfig) -> Augmentation | None:
    image = config.data.image
    if not (image.flip or image.crop_padding):
        return None
    return Augmentation(flip=image.flip, crop_padding=image.crop_padding)


def _with_vocabulary(
    config: ModelConfig, vocabulary: tuple[str, ...] | None, seed: int
) -> ModelConfig:
    """Tell a model that wants them the size of the vocabulary and its vectors.

    Raises:
        UsageError: vectors are wanted, and the data are no texts.
    """
    options = dict(config.options)
    factory = find_object(config.name, "model", MODELS)
    if vocabulary is not None and "vocab_size" in inspect.signature(factory).parameters:
        options.setdefault("vocab_size", len(vocabulary))
    if isinstance(options.get("vectors"), str):
        if vocabulary is None:
            raise UsageError("model.options.vectors is for data that are texts")
        options["vectors"] = load_vectors(options["vectors"], vocabulary, seed=seed)
    return config.model_copy(update={"options": options})


def initial_model(config: RunConfig, vocabulary: tuple[str, ...] | None = None) -> nn.Module:
    """Build the model of a run with its initial values, which follow from the run's seed.

    Args:
        config: the configuration.
        vocabulary: the words of the data, where they are texts and the model's options leave open
            how many there are.

    Raises:
        UsageError: the model cannot be built.
    """
    seed = config.federation.seed
    complete = _with_vocabulary(config.model, vocabulary, seed)
    with torch.random.fork_rng(devices=[]):
        seed_device(derive_seed(seed, "model"), torch.device("cpu"))
        return make_model(complete)


def make_model(config: ModelConfig) -> nn.Module:
    """Build the model of a configuration."""
    model = build_model(config.name, **config.options)
    if config.batch_norm_statistics == "batch":
        use_batch_statistics(model)
    if config.memory_format == "channels_last":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


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
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"training.device is {name!r}; allowed are 'cpu', 'cuda' and 'auto'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"training.device is {name!r}, and there is no CUDA device here")
    if device.type == "cuda" and (device.index or 0) >= (found := torch.cuda.device_count()):
        raise UsageError(f"training.device is {name!r}; CUDA devices here: {found}, from cuda:0")
    return name
