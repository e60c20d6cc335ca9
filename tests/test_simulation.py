"""The engine: the same results for any number of workers, refused uploads, failing clients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import nn

from fedobd import EmptyRoundError, RoundRecord, ServerSession, UsageError
from fedobd._seeds import derive_seed
from fedobd.data import ClientData
from fedobd.experiments._build import Experiment, build_experiment
from fedobd.payload import Bytes
from fedobd.sessions import Aggregator, RoundPlan
from fedobd.simulation import (
    ClientPool,
    ClientResult,
    ClientSetup,
    ClientTask,
    ProcessPool,
    SequentialPool,
    Watcher,
    open_pool,
    simulate,
)
from fedobd.training import LocalResult
from tests import toy
from tests.toy import config


def play(
    experiment: Experiment, pool: ClientPool, watcher: Watcher | None = None
) -> tuple[list[RoundRecord], dict[str, torch.Tensor]]:
    server = ServerSession(
        experiment.method, experiment.schema, experiment.initial, num_clients=4, seed=1
    )
    with pool:
        records = [
            r.record for r in simulate(server, pool, evaluate=experiment.evaluate, watcher=watcher)
        ]
    return records, server.state


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", ["fedobd", "smafd"])
@pytest.mark.parametrize("frozen", [False, True])
def test_two_processes_give_the_bytes_of_one(method: str, frozen: bool) -> None:
    changes: dict[str, Any] = {
        "model": {"options": {"frozen": frozen}},
        "methods": {method: {"stage_one_rounds": 2, "stage_two_epochs": 1, "cohort": 2}}
        if method == "fedobd"
        else {method: {"rounds": 3, "cohort": 3}},
    }
    experiment = build_experiment(config(method, **changes))
    payloads: list[dict[str, bytes]] = [{}, {}]

    def watcher(number: int) -> Watcher:
        def keep(round_number: int, name: str, payload: Bytes) -> None:
            payloads[number][f"{round_number} {name}"] = bytes(payload)

        return Watcher(on_payload=keep)

    one = play(experiment, open_pool(experiment.setup, 0), watcher(0))
    two = play(experiment, open_pool(experiment.setup, 2), watcher(1))
    assert payloads[0] == payloads[1]
    assert len(payloads[0]) >= 3 * 3
    assert one[0] == two[0]
    assert same(one[1], two[1])
    opened = [name for name in payloads[0] if "opening" in name]
    assert bool(opened) is (frozen or method == "smafd")


class ReversedPool(SequentialPool):
    """Plays clients in the opposite order."""

    def run(
        self, tasks: Iterable[ClientTask], aggregator: Aggregator | None = None
    ) -> Iterator[ClientResult]:
        return super().run(reversed(list(tasks)))


class _Kept:
    """A pool that stays open."""

    def __init__(self, pool: ClientPool) -> None:
        self.run = pool.run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class DamagingPool(SequentialPool):
    """Damages the uploads of one client, or of all."""

    def __init__(self, setup: Any, victims: set[int]) -> None:
        super().__init__(setup)
        self._victims = victims

    def run(
        self, tasks: Iterable[ClientTask], aggregator: Aggregator | None = None
    ) -> Iterator[ClientResult]:
        for result in super().run(tasks):
            if result.client in self._victims:
                assert result.upload is not None
                result = replace(result, upload=result.upload[:-9])
            yield result


def test_the_order_of_clients_does_not_matter() -> None:
    experiment = build_experiment(config("fedavg"))
    one = play(experiment, SequentialPool(experiment.setup))
    two = play(experiment, ReversedPool(experiment.setup))
    assert one[0] == two[0]
    assert same(one[1], two[1])


def test_a_bad_upload_is_recorded_and_the_round_goes_on() -> None:
    experiment = build_experiment(config("fedavg"))
    records, _ = play(experiment, DamagingPool(experiment.setup, {2}))
    assert len(records) == 3
    for record in records:
        assert [u.client for u in record.uploads] == [0, 1, 3]
        (refusal,) = record.refusals
        assert (refusal.client, refusal.reason) == (2, "checksum")
        assert record.uplink_bytes == sum(u.uplink.total for u in record.uploads) + (
            refusal.uplink_bytes
        )


@pytest.mark.parametrize("pool", [SequentialPool, partial(ProcessPool, workers=1)])
def test_a_client_whose_upload_is_refused_keeps_what_it_received(
    pool: Callable[[ClientSetup], ClientPool],
) -> None:
    """SMAFD needs what a client kept, in its next round."""
    experiment = build_experiment(config("smafd", methods={"smafd": {"rounds": 3, "cohort": 4}}))
    setup = replace(experiment.setup, train=overshoot_first)
    counts: list[tuple[int, int]] = []
    watcher = Watcher(on_client=lambda plan, done: counts.append((plan.round, done)))
    records, _ = play(experiment, pool(setup), watcher)
    assert [len(record.refusals) for record in records] == [1, 0, 0]
    assert counts == [(number, done) for number in (1, 2, 3) for done in (1, 2, 3, 4)]


def overshoot_first(model: nn.Module, data: ClientData, plan: RoundPlan, seed: int) -> LocalResult:
    """Train; one client's values are too large in the first round."""
    result = toy.train(model, data, plan, seed)
    if plan.round == 1 and seed == derive_seed(1, "train", 1, 2):
        with torch.no_grad():
            next(model.parameters()).mul_(1e9)
    return result


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pool_plays_one_run_after_another(workers: int) -> None:
    """A round has the number of one before it, and other values."""
    experiment = build_experiment(config("fedavg", methods={"fedavg": {"rounds": 1}}))
    moved = replace(
        experiment, initial={name: value + 1 for name, value in experiment.initial.items()}
    )
    with open_pool(experiment.setup, workers) as pool:
        for one in (experiment, moved, experiment):
            wanted = play(one, SequentialPool(one.setup))
            found = play(one, _Kept(pool))
            assert found[0] == wanted[0]
            assert same(found[1], wanted[1])


def test_without_any_upload_the_simulation_stops() -> None:
    experiment = build_experiment(config("fedavg"))
    with pytest.raises(EmptyRoundError, match=r"round 1: no upload was accepted from 4 clients"):
        play(experiment, DamagingPool(experiment.setup, {0, 1, 2, 3}))


@pytest.mark.parametrize("workers", [0, 1])
def test_divergence_names_client_round_and_tensor(workers: int) -> None:
    experiment = build_experiment(
        config("fedavg", training={"function": "tests.toy:train_to_nan"})
    )
    with pytest.raises(UsageError, match=r"client \d, round 1: tensor '0.weight' holds NaN"):
        play(experiment, open_pool(experiment.setup, workers))


def test_torch_threads_are_as_before_after_a_simulation() -> None:
    experiment = build_experiment(config("fedavg"))
    torch.set_num_threads(2)
    pool = open_pool(experiment.setup)
    with pool:
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_a_negative_number_of_workers_is_refused() -> None:
    experiment = build_experiment(config("fedavg"))
    with pytest.raises(UsageError, match="workers is -1; allowed are whole numbers from 0"):
        open_pool(experiment.setup, -1)


def test_evaluation_can_be_left_out_of_rounds_and_stops_a_run_on_the_test_set() -> None:
    experiment = build_experiment(
        config(
            "fedavg",
            methods={"fedavg": {"rounds": 9, "stop": {"source": "test", "patience": 2}}},
        )
    )
    server = ServerSession(
        experiment.method, experiment.schema, experiment.initial, num_clients=4, seed=1
    )
    scores = iter([0.5, 0.6, 0.6, 0.6004, 0.9])

    measure = experiment.evaluate
    assert measure is not None

    def evaluate(state: dict[str, torch.Tensor]) -> Any:
        return replace(measure(state), metric=next(scores))

    with open_pool(experiment.setup) as pool:
        rounds = list(simulate(server, pool, evaluate=evaluate))
    assert [r.test.metric for r in rounds if r.test] == [0.5, 0.6, 0.6, 0.6004]

    def odd(plan: RoundPlan) -> bool:
        return plan.round % 2 == 1

    server = ServerSession(
        experiment.method, experiment.schema, experiment.initial, num_clients=4, seed=1
    )
    with open_pool(experiment.setup) as pool:
        rounds = list(simulate(server, pool, evaluate=experiment.evaluate, should_evaluate=odd))
    assert [r.test is not None for r in rounds] == [n % 2 == 0 for n in range(len(rounds))]


def test_seconds_cover_the_round(tmp_path: Path) -> None:
    experiment = build_experiment(config("fedobd"))
    server = ServerSession(
        experiment.method, experiment.schema, experiment.initial, num_clients=4, seed=1
    )
    with open_pool(experiment.setup) as pool:
        for simulated in simulate(server, pool, evaluate=experiment.evaluate):
            phases = dict(simulated.seconds)
            whole = phases.pop("round")
            assert set(phases) == {
                "broadcast", "decode", "validate", "train", "encode", "fold", "mean", "evaluate"
            }  # fmt: skip
            assert 0 < sum(phases.values()) <= whole
