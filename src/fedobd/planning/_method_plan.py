"""MethodPlan: the bytes that a method will send, from a few of its rounds played without training.

The real sessions encode made-up updates of one client, and what they emit is counted. Of each
stage the rounds are cut into a few runs, and the middle one of each run is played.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from fedobd._seeds import make_generator
from fedobd.blocks import ModelSchema, ModelState
from fedobd.payload import Report
from fedobd.planning._updates import UpdateModel
from fedobd.sessions import (
    ClientSession,
    Method,
    RoundPlan,
    ServerSession,
    cohort_size,
    sample_cohort,
)

_MOST_RUNS = 5  # of a stage's rounds
_PLAYED_PARAMETERS = 40_000_000  # of all runs of a stage together: fewer rounds of a large model
_CLIENT = 0  # the one that is played
_REPORT = Report(num_examples=1000, train_loss=1.0, num_validation_examples=100)


@dataclass(frozen=True, slots=True, kw_only=True)
class Federation:
    """Who takes part.

    Args:
        num_clients: how many clients there are.
        seed: the run's seed.
        shared_start: clients hold the initial model already.
    """

    num_clients: int
    seed: int = 0
    shared_start: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """A stage's rounds.

    Args:
        number: 1 or 2.
        rounds: how many rounds, if it is not left early.
        epochs: local epochs of each.
        cohort: clients in each.
        uplink_bytes: of one client's upload, mean over the rounds.
        downlink_bytes: of one broadcast to one client, mean over the rounds.
    """

    number: int
    rounds: int
    epochs: int
    cohort: int
    uplink_bytes: float
    downlink_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodPlan:
    """What a run of a method will send, estimated.

    Args:
        method: the method's name.
        stages: its stages.
        opening_bytes: of the opening payload that a client is sent before its first broadcast; 0
            where there is none.
        openings: how many clients are sent one.
        opening_rounds: in how many rounds one is sent.
    """

    method: str
    stages: tuple[StagePlan, ...]
    opening_bytes: int
    openings: int
    opening_rounds: int

    @property
    def uplink_bytes(self) -> float:
        """Bytes of all uploads."""
        return sum(stage.rounds * stage.cohort * stage.uplink_bytes for stage in self.stages)

    @property
    def downlink_bytes(self) -> float:
        """Bytes of all broadcasts and openings."""
        broadcasts = (stage.rounds * stage.cohort * stage.downlink_bytes for stage in self.stages)
        return sum(broadcasts) + self.openings * self.opening_bytes

    @property
    def total_bytes(self) -> float:
        """Both."""
        return self.uplink_bytes + self.downlink_bytes

    def seconds(self, link_bits_per_s: float, seconds_per_epoch: float = 0.0) -> float:
        """Return how long the run takes if clients transfer and train at the same time.

        Args:
            link_bits_per_s: speed of each client's own link; the server's is no limit.
            seconds_per_epoch: how long a client trains for a local epoch.
        """
        sent = self.opening_rounds * self.opening_bytes + sum(
            stage.rounds * (stage.uplink_bytes + stage.downlink_bytes) for stage in self.stages
        )
        epochs = sum(stage.rounds * stage.epochs for stage in self.stages)
        return 8 * sent / link_bits_per_s + epochs * seconds_per_epoch


@dataclass(frozen=True, slots=True)
class _Sent:
    """What one client was sent and sent in a played round, in bytes."""

    uplink: int
    broadcast: int
    opening: int


class _Play:
    """Plays single rounds of a run with one client.

    Args:
        server: the run's server, before its first round.
        initial: the initial values.
        updates: what stands for training.
    """

    def __init__(self, server: ServerSession, initial: ModelState, updates: UpdateModel) -> None:
        self._server = server
        self._updates = updates
        self._scales = updates.scales(server.schema, initial)
        first = server.begin_round(available={_CLIENT})
        assert first is not None
        server.abort_round()
        self._first_time = updates.learning_time(first)
        self._client = ClientSession(
            server.method, server.schema, client=_CLIENT, seed=server.seed, start=initial
        )

    def play(self, stage: int, before: int, stage_rounds: int) -> _Sent:
        """Play a round.

        Args:
            stage: index of its stage.
            before: rounds that lie before it.
            stage_rounds: those of them that belong to its stage.
        """
        server = self._server
        saved = server.save()
        saved.values.update(stage=stage, rounds=before, stage_rounds=stage_rounds)
        server.restore(saved)
        plan = server.begin_round(available={_CLIENT})
        assert plan is not None
        opening = b""
        if server.needs_initial_payload(_CLIENT):
            opening = server.initial_payload(_CLIENT).data
            self._client.initialize(opening)
        broadcast = server.broadcast().data
        trained = self._train(plan, self._client.receive(broadcast))
        upload = self._client.upload(trained, _REPORT).data
        server.receive(_CLIENT, upload)
        server.end_round()
        return _Sent(len(upload), len(broadcast), len(opening))

    def _train(self, plan: RoundPlan, start: ModelState) -> ModelState:
        share = self._updates.learning_time(plan) / self._first_time
        scales = {name: share * scale for name, scale in self._scales.items()}
        generator = make_generator(self._server.seed, "plan", plan.round)
        return self._updates.train(start, scales, generator)


def plan_method(
    method: Method,
    schema: ModelSchema,
    initial: Mapping[str, torch.Tensor],
    federation: Federation,
    updates: UpdateModel,
) -> MethodPlan:
    """Estimate what a run of a method will send.

    Args:
        method: the method with its options.
        schema: the model's schema, cut as the method wants.
        initial: the initial values by name.
        federation: who takes part.
        updates: what stands for training.

    Raises:
        UsageError: the state does not fit the schema, or there are fewer clients than a cohort
            wants.
    """
    server = ServerSession(
        method,
        schema,
        initial,
        num_clients=federation.num_clients,
        seed=federation.seed,
        shared_start=federation.shared_start,
    )
    has_initial_payload = server.has_initial_payload
    play = _Play(server, dict(initial), updates)
    runs = max(1, min(_MOST_RUNS, _PLAYED_PARAMETERS // max(1, schema.num_parameters)))
    stages, before, opening_bytes = [], 0, 0
    for index, stage in enumerate(method.stages()):
        uplink = downlink = 0
        special = federation.shared_start and index == 0  # the first round sends a fingerprint
        for stage_rounds, weight in _sampled(stage.rounds, runs, first_apart=special):
            sent = play.play(index, before + stage_rounds, stage_rounds)
            uplink += weight * sent.uplink
            downlink += weight * sent.broadcast
            opening_bytes += sent.opening  # a client is opened once
        before += stage.rounds
        stages.append(
            StagePlan(
                number=stage.number,
                rounds=stage.rounds,
                epochs=stage.epochs,
                cohort=cohort_size(stage.cohort, federation.num_clients),
                uplink_bytes=uplink / stage.rounds,
                downlink_bytes=downlink / stage.rounds,
            )
        )
    opened = _newcomers(method, federation) if has_initial_payload else []
    return MethodPlan(
        method=method.name,
        stages=tuple(stages),
        opening_bytes=opening_bytes,
        openings=sum(opened),
        opening_rounds=sum(count > 0 for count in opened),
    )


def _sampled(rounds: int, most_runs: int, *, first_apart: bool) -> Iterator[tuple[int, int]]:
    """Yield the rounds of a stage to play, from 0, and how many rounds each stands for."""
    apart = int(first_apart)
    if first_apart:
        yield 0, 1
    runs = min(most_runs, rounds - apart)
    for number in range(runs):
        start, stop = (apart + (rounds - apart) * n // runs for n in (number, number + 1))
        yield (start + stop - 1) // 2, stop - start


def _newcomers(method: Method, federation: Federation) -> list[int]:
    """Return how many clients take part for the first time in each round, to the last such."""
    seen: set[int] = set()
    counts: list[int] = []
    for stage in method.stages():
        for _ in range(stage.rounds):
            if len(seen) == federation.num_clients:
                return counts
            number = len(counts) + 1
            cohort = sample_cohort(stage.cohort, federation.num_clients, federation.seed, number)
            counts.append(len(seen | set(cohort)) - len(seen))
            seen.update(cohort)
    return counts
