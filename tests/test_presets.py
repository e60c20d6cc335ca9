"""The presets of the paper: the published numbers, and runs of them cut down to seconds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fedobd import FedOBD
from fedobd.experiments import RunConfig, build_experiment, list_presets, load_config, run
from fedobd.models import build_model
from tests.data_helpers import (
    WORDS,
    image_folder,
    keep_offline,
    text_folder,
    write_vectors,
)


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_offline(tmp_path, monkeypatch)


class Published(NamedTuple):
    """A setting of the paper's experiments; λ is 0.3 and half of the clients train a round."""

    data: str
    model: str
    clients: int
    cohort: int
    weight: float
    learning_rate: float
    loss: str


PUBLISHED = {
    "cifar10": Published("uoft-cs/cifar10", "densenet40", 100, 50, 1e-3, 0.1, "cross-entropy"),
    "cifar100": Published("uoft-cs/cifar100", "densenet40", 50, 25, 1e-3, 0.1, "cross-entropy"),
    "imdb": Published(
        "stanfordnlp/imdb", "transformer", 100, 50, 1e-4, 0.01, "binary-cross-entropy"
    ),
    "cifar10-10": Published("uoft-cs/cifar10", "densenet40", 10, 5, 1e-2, 0.1, "cross-entropy"),
    "cifar100-10": Published("uoft-cs/cifar100", "densenet40", 10, 5, 1e-2, 0.1, "cross-entropy"),
    "imdb-10": Published(
        "stanfordnlp/imdb", "transformer", 10, 5, 1e-3, 0.01, "binary-cross-entropy"
    ),
}
SMALL = ("cifar10-small", "cifar100-small", "imdb-small")
METHODS = ("fedobd", "fedavg", "fedpaq", "feddropoutavg", "smafd")


def test_there_are_presets_for_each_published_setting() -> None:
    assert set(list_presets()) == {*PUBLISHED, *SMALL, "digits", "minilm-imdb"}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_preset_has_the_published_numbers(name: str) -> None:
    config, wanted = load_config(name), PUBLISHED[name]
    assert config.data.name == wanted.data
    assert config.data.partition.name == "iid"
    assert config.data.validation_fraction == 0
    assert config.data.splits.max_train is config.data.splits.max_test is None
    assert config.model.name == wanted.model
    assert config.model.batch_norm_statistics == "batch"
    assert config.model.blocks.max_block_fraction is None
    assert config.federation.clients == wanted.clients
    training = config.training
    assert (training.optimizer, training.learning_rate) == ("sgd", wanted.learning_rate)
    assert (training.momentum, training.weight_decay) == (0.9, "1/n")
    assert (training.batch_size, training.schedule) == (64, "cosine")
    assert (training.schedule_step, training.autocast) == ("epoch", True)
    assert training.loss == wanted.loss
    method = config.methods["fedobd"]
    assert isinstance(method, FedOBD)
    assert method.stage_one_rounds == 100
    assert (method.stage_one_epochs, method.stage_two_epochs) == (5, 10)
    assert method.codec.dropout_rate == 0.3
    assert method.codec.uplink_weight == method.codec.downlink_weight == wanted.weight
    for other in METHODS:
        stage = config.methods[other].stages()[0]
        assert (stage.rounds, stage.epochs) == (100, 5)
        share = 1 if other == "fedavg" else 0.5
        assert stage.cohort * wanted.clients == share * wanted.clients
        assert isinstance(stage.cohort, float)
        if other in ("feddropoutavg", "smafd"):
            assert config.methods[other].dropout_rate == 0.3
    assert isinstance(method.cohort, float)
    assert math.isclose(method.cohort * config.federation.clients, wanted.cohort)


def test_the_images_are_augmented_as_usual_and_the_texts_have_300_tokens() -> None:
    for name in PUBLISHED:
        config = load_config(name)
        if name.startswith("cifar"):
            assert (config.data.image.flip, config.data.image.crop_padding) == (True, 4)
            assert config.model.options == {"num_classes": 100 if "cifar100" in name else 10}
        else:
            assert config.data.text.length == 300
            assert config.model.options["frozen_embedding"] is True


def parameters_of(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_models_have_the_published_numbers_of_parameters() -> None:
    options = load_config("cifar10").model.options
    assert parameters_of(build_model("densenet40", **options)) == 176_122
    encoder: Any = build_model("transformer", vocab_size=9)
    assert [parameters_of(layer) for layer in encoder.layers] == [452_548] * 2
    assert encoder.embedding.weight.shape == (9, 100)


# Runs, cut down


def cut(name: str, folder: Path, *more: str) -> RunConfig:
    """Return a preset with made data, 2 clients, a round, an epoch, and no other change."""
    overrides = [
        "federation.clients=2",
        "data.splits.max_train=6",
        "data.splits.max_test=2",
        "methods.fedobd.stage_one_rounds=1",
        "methods.fedobd.stage_one_epochs=1",
        "methods.fedobd.stage_two_epochs=1",
        f"data.name={folder / 'data'}",
        "training.batch_size=2",
        *more,
    ]
    for method in METHODS[1:]:
        overrides += [f"methods.{method}.rounds=1", f"methods.{method}.epochs=1"]
    if name.startswith("imdb"):
        text_folder(folder / "data", train=20, test=4, length=320)
        write_vectors(folder / "glove.txt", WORDS[:-1], 100)
        overrides.append(f"model.options.vectors={folder / 'glove.txt'}")
    else:
        columns = ("fine_label", 100) if "cifar100" in name else ("label", 10)
        image_folder(
            folder / "data", train=200, test=20, target=columns[0], classes=columns[1], side=32
        )
    return load_config(name, overrides=overrides)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_preset_runs(name: str, tmp_path: Path) -> None:
    config = cut(name, tmp_path)
    summary = run(config, tmp_path / "out")
    assert summary.rounds == 2  # one of each stage
    assert summary.refusals == 0
    assert summary.final_metric in (0.0, 0.5, 1.0)  # of two test examples
    assert summary.uplink_bytes > 0
    assert all(len(share) > 0 for share in (summary.shares["uplink"], summary.shares["downlink"]))


@pytest.mark.parametrize("method", METHODS)
def test_the_small_preset_runs_with_every_method(method: str, tmp_path: Path) -> None:
    more = [f"methods.{other}.cohort=1" for other in METHODS]
    config = cut("cifar10-small", tmp_path, *more).for_method(method, 0)
    summary = run(config, tmp_path / "out")
    assert summary.method == method
    assert summary.rounds == (2 if method == "fedobd" else 1)
    assert summary.final_metric in (0.0, 0.5, 1.0)


def test_the_presets_of_texts_train_the_encoder_and_leave_the_vectors(tmp_path: Path) -> None:
    config = cut("imdb", tmp_path)
    experiment = build_experiment(config)
    frozen = {experiment.schema.tensors[n].name for n in experiment.schema.frozen()}
    assert frozen == {"embedding.weight"}
    words = experiment.initial["embedding.weight"]
    assert words.shape[1] == 100
    assert float(words[0].abs().max()) == 0
    trained = sum(math.prod(t.shape) for t in experiment.schema.tensors if t.name not in frozen)
    assert trained == 2 * 452_548 + 101


def test_images_of_a_preset_can_be_flipped(tmp_path: Path) -> None:
    """Two runs that differ in augmentation alone have unequal results."""
    config = cut("cifar10-small", tmp_path, "methods.fedobd.cohort=1", "data.image.flip=true")
    plain = cut("cifar10-small", tmp_path, "methods.fedobd.cohort=1")
    run(config, tmp_path / "a")
    run(plain, tmp_path / "b")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert one != other
