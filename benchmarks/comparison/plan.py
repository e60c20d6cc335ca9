"""Which runs the comparison on real data consists of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedobd import FedOBD
from fedobd.experiments import RunConfig, load_config

SEEDS = (0, 1, 2)
SMALL = ("cifar10-small", "cifar100-small", "imdb-small")
LARGE_MODEL = "minilm-imdb"
SWEPT = "cifar10-small"
"""The preset of ablations, unequal clients and sweeps."""

PRESETS = (*SMALL, LARGE_MODEL)
FOLDERS = {
    "cifar10-small": "cifar10",
    "cifar100-small": "cifar100",
    "imdb-small": "imdb",
    LARGE_MODEL: "imdb",
}
"""The folder of each preset's data."""

VECTORS = {"imdb-small": "glove/glove.6B.50d.imdb-vocabulary.parquet"}
"""The file of each preset's pretrained vectors."""

COARSE = {"cifar10-small": 1e-1, "cifar100-small": 1e-1, "imdb-small": 1e-2}
"""Ten times each preset's β: on the swept preset the fewest bytes that lost no accuracy."""

BASELINES = ("fedavg", "fedpaq", "feddropoutavg", "smafd")


@dataclass(frozen=True, slots=True)
class Run:
    """One run: one method with one seed, and what is changed in the preset.

    Args:
        preset: its preset.
        variant: names the run among those of the preset: a method, or an ablation of FedOBD.
        method: the method's name.
        seed: the run's seed.
        changes: what is changed, as `--set` takes it.
    """

    preset: str
    variant: str
    method: str
    seed: int
    changes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its name in folders and files."""
        return f"{self.preset}/{self.variant}-seed{self.seed}"

    def configure(self, data: Path) -> RunConfig:
        """Return its configuration, with data from the folder of all data sets."""
        changes = [f"data.name={data / FOLDERS[self.preset]}", *self.changes]
        if self.preset in VECTORS:
            changes.append(f"model.options.vectors={data / VECTORS[self.preset]}")
        return load_config(self.preset, overrides=changes).for_method(self.method, self.seed)


def plan() -> Iterator[Run]:
    """Yield all runs, those that matter most first."""
    for seed in SEEDS:
        for preset in SMALL:
            yield from _methods(preset, seed)
        if seed == SEEDS[0]:
            yield from (Run(LARGE_MODEL, name, name, 0) for name in ("fedobd", "fedavg", "fedpaq"))
    for seed in SEEDS:
        for variant, changes in ABLATIONS.items():
            yield Run(SWEPT, variant, "fedobd", seed, changes)
    for seed in SEEDS:
        for run in _methods(SWEPT, seed, at_equal_participation=False):
            yield Run(
                run.preset,
                f"dirichlet-{run.variant}",
                run.method,
                seed,
                (*run.changes, 'data.partition.name="dirichlet"', "data.partition.alpha=0.5"),
            )
    for seed in SEEDS:
        yield Run("cifar100-small", "no-dropout", "fedobd", seed, ABLATIONS["no-dropout"])
    for seed in (0, 1):
        yield Run("cifar100-small", "dropout-0.3", "fedobd", seed, _dropout(0.3))
    yield Run("cifar100-small", "dropout-0.2", "fedobd", 0, _dropout(0.2))
    for variant, changes in (
        ("dropout-0.3-random-blocks", ABLATIONS["random-blocks"]),
        ("dropout-0.3-weight-0.001", _weight(1e-3)),
    ):
        yield Run("cifar100-small", variant, "fedobd", 0, (*_dropout(0.3), *changes))
    for rate in (0.5, 0.7, 0.9):  # 0 is no-dropout
        yield Run(SWEPT, f"dropout-{rate}", "fedobd", 0, _dropout(rate))
    for weight in (1e-4, 1e-3, 1.0):
        yield Run(SWEPT, weight_variant(weight), "fedobd", 0, _weight(weight))
    for seed in SEEDS:
        for preset, weight in COARSE.items():
            yield Run(preset, weight_variant(weight), "fedobd", seed, _weight(weight))


def _dropout(rate: float) -> tuple[str, ...]:
    return (f"{_CODEC}.dropout_rate={rate}",)


def weight_variant(weight: float) -> str:
    """Return the name of the variants with this β in both directions."""
    return f"weight-{weight:g}"


def _weight(weight: float) -> tuple[str, ...]:
    return (f"{_CODEC}.uplink_weight={weight:.4f}", f"{_CODEC}.downlink_weight={weight:.4f}")


_CODEC = "methods.fedobd.codec"
ABLATIONS = {
    "stochastic": (
        f'{_CODEC}.uplink_quantizer="stochastic"',
        f'{_CODEC}.downlink_quantizer="stochastic"',
    ),
    "random-blocks": (f'{_CODEC}.selection="random"',),
    "single-layers": ('model.blocks.style="layer"',),
    "whole-blocks": ("model.blocks.max_block_fraction=1.0",),
    "larger-parts": ("model.blocks.max_block_fraction=0.2",),
    "one-stage": ("methods.fedobd.stage_two_epochs=0",),
    "no-dropout": (f'{_CODEC}.selection="none"',),
}
"""FedOBD with one part changed."""


def _methods(preset: str, seed: int, *, at_equal_participation: bool = True) -> Iterator[Run]:
    """Yield FedOBD, FedAvg on all clients, and all baselines at FedOBD's cohort.

    The latter go on for further rounds, until they have had the client-epochs of stage 2 too; what
    they had at the published number of rounds is read from the same run.
    """
    yield Run(preset, "fedobd", "fedobd", seed)
    yield Run(preset, "fedavg", "fedavg", seed)
    rounds, cohort = equal_participation(load_config(preset))
    for name in BASELINES:
        changes = [f"methods.{name}.cohort={cohort}"]
        if at_equal_participation:
            changes.append(f"methods.{name}.rounds={rounds}")
        variant = "fedavg-cohort" if name == "fedavg" else name
        if name != "fedavg" or at_equal_participation:
            yield Run(preset, variant, name, seed, tuple(changes))


def equal_participation(config: RunConfig) -> tuple[int, int]:
    """Return the rounds and the cohort that give a baseline FedOBD's client-epochs."""
    method = config.methods["fedobd"]
    assert isinstance(method, FedOBD)
    assert isinstance(method.cohort, int)
    more = method.stage_two_epochs * config.federation.clients
    further = math.ceil(more / (method.stage_one_epochs * method.cohort))
    return method.stage_one_rounds + further, method.cohort
