"""Configuration: round trip, presets, and every mistake named with key, value and what is "
"allowed."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from fedobd import FedAvg, FedOBD, UsageError
from fedobd.experiments import RunConfig, list_presets, load_config, parse_config
from fedobd.methods import METHODS


@pytest.mark.parametrize("preset", sorted(list_presets()))
def test_presets_are_whole_and_survive_a_round_trip(preset: str) -> None:
    config = load_config(preset)
    again = parse_config(tomllib.loads(config.to_toml()))
    assert again == config
    assert again.to_toml() == config.to_toml()
    for name in config.methods:
        single = config.for_method(name, 7)
        assert list(single.methods) == [name]
        assert single.federation.seed == 7
        assert isinstance(single.chosen, METHODS[name])


def test_the_digits_preset_has_the_settings_that_it_promises() -> None:
    config = load_config("digits")
    assert (config.federation.clients, config.training.batch_size) == (10, 16)
    assert config.training.learning_rate == 0.1
    assert config.model.blocks.max_block_fraction == 0.2
    method = config.methods["fedobd"]
    assert isinstance(method, FedOBD)
    assert (method.stage_one_rounds, method.stage_one_epochs, method.stage_two_epochs) == (
        20,
        3,
        5,
    )
    assert (method.codec.dropout_rate, method.codec.uplink_weight) == (0.3, 1e-3)
    assert method.codec.downlink_weight == 1e-3
    assert {name: m.stages()[0].cohort for name, m in config.methods.items()} == {
        "fedobd": 5, "fedavg": 1.0, "fedpaq": 5, "feddropoutavg": 5, "smafd": 5
    }  # fmt: skip


def test_overrides_take_toml_values_and_plain_text() -> None:
    config = load_config(
        "digits",
        overrides=[
            "federation.clients=20",
            "methods.fedavg.cohort=0.25",
            "training.weight_decay=1/n",
            "methods.fedobd.codec.uplink_quantizer=stochastic",
            'model.blocks.unit_names=["features.*"]',
        ],
    )
    assert config.federation.clients == 20
    assert isinstance(config.methods["fedavg"], FedAvg)
    assert config.methods["fedavg"].cohort == 0.25
    assert config.training.weight_decay == "1/n"
    assert config.methods["fedobd"].codec.uplink_quantizer == "stochastic"
    assert config.model.blocks.unit_names == ("features.*",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("federation.client=20",
         r"key 'federation.client' is unknown.*clients.*; did you mean 'clients'\?"),
        ("fedration.clients=20", r"key 'fedration' is unknown.*did you mean 'federation'\?"),
        ("methods.fedobd.codec.beta=1", r"key 'methods.fedobd.codec.beta' is unknown"),
        ("methods.fedobd.codec.dropout_rate=1.0",
         r"methods.fedobd.codec: dropout_rate λ is 1.0; allowed are 0 <= λ < 1"),
        ("methods.fedobd.codec.dropout_rate=-0.1", r"dropout_rate λ is -0.1"),
        ("methods.fedobd.codec.uplink_weight=0",
         r"methods.fedobd.codec: uplink_weight is 0.0; allowed are finite numbers above 0"),
        ("methods.fedobd.codec.downlink_weight=-1e-3", r"downlink_weight is -0.001"),
        ("methods.fedobd.codec.selection=best",
         r"methods.fedobd.codec.selection: 'best' is not allowed: .*'mbd', 'random' or 'none'"),
        ("methods.smafd.dropout_rate=2", r"methods.smafd: dropout_rate λ is 2.0"),
        ("methods.fedprox.rounds=2", r"method 'fedprox' is unknown; allowed are fedobd"),
        ("method=fedob", r"method 'fedob' is unknown; .*did you mean 'fedobd'\?"),
        ("federation.clients=ten", r"federation.clients: 'ten' is not allowed: .*integer"),
        ("federation.clients=0", r"federation.clients: 0 is not allowed: .*greater than or equal"),
        ("training.learning_rate=fast", r"training.learning_rate: 'fast' is not allowed"),
        ("training.optimizer=adam", r"training.optimizer: 'adam' is not allowed: .*'sgd'"),
        ("training.batch_size=0", r"training: batch_size is 0"),
        ("training=1", r"training: 1 is not allowed: a table is wanted"),
        ("data.test_fraction=1", r"data.test_fraction: 1 is not allowed"),
        ("methods.fedavg.cohort=1.5", r"methods.fedavg: cohort is 1.5; allowed are a count"),
        ("methods.fedavg.rounds=0", r"methods.fedavg: rounds of stage 1 is 0"),
        ("methods.fedavg.stop.patience=0", r"methods.fedavg.stop: patience is 0"),
        ("model.blocks.max_block_fraction=0", r"model.blocks: max_block_fraction is 0.0"),
        ("clients", r"--set 'clients': wanted key=value"),
        ("method.name=1", r"--set 'method.name=1': 'method' is a value, not a table"),
    ],
)  # fmt: skip
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config("digits", overrides=[override])


def test_files_are_read_and_refused(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text("[federation]\nclients = 3\n", encoding="utf-8")
    config = load_config(str(file))
    assert isinstance(config, RunConfig)
    assert config.federation.clients == 3
    assert isinstance(config.chosen, FedOBD)
    file.write_text("clients: 3\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"own.toml' is not TOML: .*line 1"):
        load_config(str(file))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"own.toml' cannot be read"):
        load_config(str(file))
    with pytest.raises(UsageError, match=r"missing.toml' cannot be read"):
        load_config("missing.toml")
    with pytest.raises(UsageError, match=r"preset 'digit' is unknown; .*did you mean 'digits'\?"):
        load_config("digit")
