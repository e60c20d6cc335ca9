"""LocalClient: plays any client of a run in this process, one at a time, with one model object."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import nn

from fedobd._errors import UsageError
from fedobd._seeds import derive_seed
from fedobd.blocks import ModelSchema, ModelState, StateStack, load_state, view_state
from fedobd.data import ClientData
from fedobd.payload import Bytes, Kind, Report
from fedobd.sessions import (
    Broadcast,
    ClientSession,
    Method,
    Refusal,
    RoundPlan,
    UploadRecord,
    encode_uploads,
)
from fedobd.simulation._files import map_file
from fedobd.training import Evaluation, LocalResult, LocalTraining


class StackedTraining(Protocol):
    """Trains several models at once; see `fedobd.training.train_stacked`."""

    def __call__(
        self,
        model: nn.Module,
        starts: Sequence[ModelState],
        data: Sequence[ClientData],
        plan: RoundPlan,
        seeds: Sequence[int],
    ) -> tuple[Sequence[ModelState], list[LocalResult]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSetup:
    """What every client of a run shares; with worker processes all of it must be picklable.

    Args:
        method: the method with its options.
        schema: the model's schema.
        seed: the run's seed.
        make_model: makes the model; its values do not matter.
        data: gives a client's data by its number.
        train: trains a model in place.
        validate: evaluates a received model on a client's validation examples; None leaves that
            out.
        frozen: values of the frozen tensors, which clients have once they were opened.
        start: the initial model, in a run whose clients hold it already.
        device: where to train.
        stack: how many clients are trained together; 1 trains one after another.
        train_together: trains so many models; wanted where `stack` is above 1.
    """

    method: Method
    schema: ModelSchema
    seed: int
    make_model: Callable[[], nn.Module]
    data: Callable[[int], ClientData]
    train: LocalTraining
    validate: Callable[[nn.Module, ClientData], Evaluation | None] | None = None
    frozen: ModelState = field(default_factory=dict)
    start: ModelState | None = None
    device: str = "cpu"
    stack: int = 1
    train_together: StackedTraining | None = None

    def __post_init__(self) -> None:
        if self.stack < 1:
            raise UsageError(f"stack is {self.stack}; allowed are numbers from 1")
        if self.stack > 1 and self.train_together is None:
            raise UsageError("clients cannot be stacked: their training function trains one model")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTask:
    """One client's part in one round.

    Args:
        plan: the round's plan.
        client: the client's number.
        broadcast: the round's broadcast, or the file that holds it.
        opening: the client's initial payload, if it is sent one, or its file.
        state: what the client kept from its last round.
    """

    plan: RoundPlan
    client: int
    broadcast: bytes | Path
    opening: bytes | Path | None = None
    state: ModelState | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientResult:
    """What came of it.

    Args:
        client: the client's number.
        upload: its upload; None where it was taken in where it was made.
        state: what it keeps, frozen tensors left out.
        seconds: wall-clock seconds by phase: `decode`, `validate`, `train`, `encode`, and `fold`
            where the upload was taken in.
        outcome: what came of taking it in.
    """

    client: int
    upload: Bytes | None
    state: ModelState
    seconds: dict[str, float]
    outcome: UploadRecord | Refusal | None = None


class LocalClient:
    """Plays clients.

    Args:
        setup: what they share.
        join: makes an upload of its chunks, which are good until it returns; `ClientResult` has
            what it returns.
    """

    def __init__(
        self, setup: ClientSetup, join: Callable[[Sequence[Bytes]], Bytes] = b"".join
    ) -> None:
        self._setup = setup
        self._join = join
        self._model = setup.make_model().to(setup.device)
        self._decoded: dict[Kind, Broadcast] = {}
        self._frozen = {setup.schema.tensors[n].name for n in setup.schema.frozen()}

    def begin(self) -> None:
        """Forget the payloads of the last round."""
        self._decoded = {}

    def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        """Play some clients' parts in a round; together where clients are stacked.

        Yields:
            Each client's result when its upload is encoded.

        Raises:
            UsageError: as sessions and training raise it, with clients and round named.
        """
        try:
            yield from self._run(tasks)
        except UsageError as error:
            clients = ", ".join(str(task.client) for task in tasks)
            place = f"client {clients}, round {tasks[0].plan.round}"
            raise UsageError(f"{place}: {error}") from error

    def _run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        setup, plan = self._setup, tasks[0].plan
        clock = _Clock()
        sessions = [self._session(task) for task in tasks]
        starts = [
            session.receive(self._decode(Kind.BROADCAST, task.broadcast))
            for session, task in zip(sessions, tasks, strict=True)
        ]
        clock.lap("decode")
        data = [setup.data(task.client) for task in tasks]
        validations = [self._validate(start, own) for start, own in zip(starts, data, strict=True)]
        clock.lap("validate")
        seeds = [derive_seed(setup.seed, "train", plan.round, task.client) for task in tasks]
        trained, results = self._train(starts, data, plan, seeds)
        clock.lap("train")
        reports = list(map(_report, results, validations))
        uploads = encode_uploads(
            setup.method,
            setup.schema,
            [session.received for session in sessions],
            trained,
            reports,
            seed=setup.seed,
        )
        clock.lap("encode")
        together = {phase: spent / len(tasks) for phase, spent in clock.seconds.items()}
        for task, session, upload in zip(tasks, sessions, uploads, strict=True):
            yield ClientResult(
                client=task.client,
                upload=self._join(upload.chunks),
                state={n: v for n, v in session.state.items() if n not in self._frozen},
                seconds=together,
            )

    def _session(self, task: ClientTask) -> ClientSession:
        setup = self._setup
        session = ClientSession(
            setup.method,
            setup.schema,
            client=task.client,
            seed=setup.seed,
            state={**setup.frozen, **(task.state or {})},
            start=setup.start,
        )
        if task.opening is not None:
            session.initialize(self._decode(Kind.INITIAL, task.opening))
        return session

    def _validate(self, start: ModelState, data: ClientData) -> Evaluation | None:
        if self._setup.validate is None or len(data.validation) == 0:
            return None
        load_state(self._model, start)
        return self._setup.validate(self._model, data)

    def _train(
        self,
        starts: Sequence[ModelState],
        data: Sequence[ClientData],
        plan: RoundPlan,
        seeds: Sequence[int],
    ) -> tuple[StateStack, list[LocalResult]]:
        setup = self._setup
        if setup.stack > 1:
            assert setup.train_together is not None
            states, results = setup.train_together(self._model, starts, data, plan, seeds)
            return StateStack.of(states), results
        ((start,), (own,), (seed,)) = starts, data, seeds
        load_state(self._model, start)
        result = setup.train(self._model, own, plan, seed)
        return StateStack.of([view_state(self._model)]), [result]

    def _decode(self, kind: Kind, payload: bytes | Path) -> Broadcast:
        """Decode what all clients of a round share once for all of them."""
        if kind not in self._decoded:
            whole = map_file(payload) if isinstance(payload, Path) else payload
            decoded = Broadcast.decode(whole, self._setup.method, self._setup.schema, kind)
            self._decoded[kind] = decoded
        return self._decoded[kind]


def _report(result: LocalResult, validation: Evaluation | None) -> Report:
    return Report(
        num_examples=result.num_examples,
        train_loss=result.loss,
        num_validation_examples=validation.num_examples if validation else 0,
        validation_loss=validation.loss if validation else 0.0,
        validation_metric=validation.metric if validation else 0.0,
    )


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = now - self._last
        self._last = now
