"""A tiny federation for tests: made-up data, a small model, training functions that misbehave.

Named by configurations as `tests.toy:...`, also from other processes.
"""

from __future__ import annotations

import json
import os
import signal
import time
import tomllib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedobd import RoundPlan
from fedobd.data import ClientData, Examples, FederatedData, federate
from fedobd.experiments import RunConfig, parse_config
from fedobd.payload import Bytes
from fedobd.simulation import Callback
from fedobd.training import LocalResult, TrainingOptions, train_locally

OPTIONS = TrainingOptions(learning_rate=0.05, batch_size=8)


def make_data(num_clients: int, seed: int, num_examples: int = 120) -> FederatedData:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_examples, 1, 6, 6, generator=generator)
    targets = (inputs.mean(dim=(1, 2, 3)) > 0).long() + 2 * (inputs[:, 0, 0, 0] > 0).long()
    return federate(Examples(inputs, targets), num_clients, seed=seed)


class Narrow(nn.Module):
    """A model whose parameters are of a 16-bit type; outputs are float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.model(inputs.to(next(self.parameters()).dtype))
        return outputs.float()


def make_model(
    width: int = 4, frozen: bool = False, dtype: str = "float32", empty: bool = False
) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(1, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * width, 8),
        nn.Dropout(0.1),
        nn.Linear(8, 4),
    )
    if frozen:
        model[4].weight.requires_grad_(False)
    if empty:
        model.register_parameter("empty", nn.Parameter(torch.zeros(0, 3)))
    return model if dtype == "float32" else Narrow(model.to(getattr(torch, dtype)))


def train(model: nn.Module, data: ClientData, plan: RoundPlan, seed: int) -> LocalResult:
    return train_locally(model, data, plan, seed, options=OPTIONS)


def train_and_die(model: nn.Module, data: ClientData, plan: RoundPlan, seed: int) -> LocalResult:
    """Train; in the round that a file names, train one client and then kill the process, once."""
    order = Path(os.environ["TOY_KILL"])
    if order.exists() and plan.round == int(order.read_text()):
        if (order.parent / "trained").exists():
            order.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        (order.parent / "trained").touch()
    return train(model, data, plan, seed)


def train_at_gate(model: nn.Module, data: ClientData, plan: RoundPlan, seed: int) -> LocalResult:
    """Train; from round 3 on, once the file is gone that the environment may name."""
    gate = os.environ.get("TOY_GATE")
    while gate and plan.round >= 3 and Path(gate).exists():
        time.sleep(0.01)
    return train(model, data, plan, seed)


def train_to_nan(model: nn.Module, data: ClientData, plan: RoundPlan, seed: int) -> LocalResult:
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    return LocalResult(len(data.train), 1.0)


def no_data(num_clients: int, seed: int) -> FederatedData:
    raise OSError("gone")


def not_data(num_clients: int, seed: int) -> int:
    return num_clients + seed


class Interrupted(Exception):  # noqa: N818 - not an error, a stand-in for Ctrl-C
    pass


class Stopper(Callback):
    """Interrupts a run after a round."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.seen: list[int] = []

    def on_run_begin(self, config: RunConfig, planned_rounds: int, folder: Path) -> None:
        self.planned = planned_rounds

    def on_round_end(self, record: dict[str, Any]) -> None:
        self.seen.append(record["round"])
        if record["round"] == self.after:
            raise Interrupted

    def on_run_end(self, summary: Any) -> None:
        self.seen.append(-1)


class PayloadKeeper(Callback):
    """Keeps all payloads of a run, by round and name."""

    wants_payloads = True

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}

    def on_payload(self, round_number: int, name: str, payload: Bytes) -> None:
        self.kept[f"{round_number} {name}"] = bytes(payload)


CONFIG = """
method = "fedobd"
data = { name = "tests.toy:make_data" }
model = { name = "tests.toy:make_model" }
federation = { clients = 4, seed = 1 }
training = { learning_rate = 0.05, batch_size = 8 }

[methods]
fedobd = { stage_one_rounds = 3, stage_one_epochs = 1, stage_two_epochs = 2, cohort = 2 }
fedavg = { rounds = 3, epochs = 1 }
fedpaq = { rounds = 3, epochs = 1, cohort = 2 }
feddropoutavg = { rounds = 3, epochs = 1, cohort = 2 }
smafd = { rounds = 5, epochs = 1, cohort = 2 }
"""


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def config(method: str = "fedobd", **changes: Any) -> RunConfig:
    """Return the configuration of a tiny run; changes are sections to merge in."""
    values = tomllib.loads(CONFIG)
    for section, change in changes.items():
        values[section] = {**values.get(section, {}), **change}
    return parse_config(values).for_method(method, 1)
