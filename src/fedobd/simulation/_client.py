"""LocalClient: plays any client of a run in this process, one at a time, with one model object."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from fedobd._client import Broadcast, ClientSession
from fedobd._errors import UsageError
from fedobd._method import Method
from fedobd._rounds import RoundPlan
from fedobd._schema import ModelSchema
from fedobd._seeds import derive_seed
from fedobd._state import ModelState, get_state, load_state
from fedobd._wire import Kind, Report
from fedobd.data import ClientData
from fedobd.training import Evaluation, LocalTraining


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTask:
    """One client's part in one round.

    Args:
        plan: the round's plan.
        client: the client's number.
        broadcast: the round's broadcast.
        opening: the client's opening payload, if it is sent one.
        state: what the client kept from its last round.
    """

    plan: RoundPlan
    client: int
    broadcast: bytes
    opening: bytes | None = None
    state: ModelState | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientResult:
    """What came of it.

    Args:
        client: the client's number.
        upload: its upload.
        state: what it keeps, frozen tensors left out.
        seconds: wall-clock seconds by phase: `decode`, `validate`, `train`, `encode`.
    """

    client: int
    upload: bytes
    state: ModelState
    seconds: dict[str, float]


class LocalClient:
    """Plays clients.

    Args:
        setup: what they share.
    """

    def __init__(self, setup: ClientSetup) -> None:
        self._setup = setup
        self._model = setup.make_model().to(setup.device)
        self._decoded: dict[Kind, tuple[int, Broadcast]] = {}

    def run(self, task: ClientTask) -> ClientResult:
        """Play one client's part in one round.

        Raises:
            UsageError: as sessions and training raise it, with client and round named.
        """
        try:
            return self._run(task)
        except UsageError as error:
            place = f"client {task.client}, round {task.plan.round}"
            raise UsageError(f"{place}: {error}") from error

    def _run(self, task: ClientTask) -> ClientResult:
        setup, plan = self._setup, task.plan
        clock = _Stopwatch()
        session = ClientSession(
            setup.method,
            setup.schema,
            client=task.client,
            seed=setup.seed,
            state={**setup.frozen, **(task.state or {})},
            start=setup.start,
        )
        if task.opening is not None:
            session.open(self._decode(Kind.OPENING, plan.round, task.opening))
        start = session.receive(self._decode(Kind.BROADCAST, plan.round, task.broadcast))
        clock.lap("decode")
        load_state(self._model, start)
        data = setup.data(task.client)
        validation = setup.validate(self._model, data) if setup.validate else None
        clock.lap("validate")
        seed = derive_seed(setup.seed, "train", plan.round, task.client)
        result = setup.train(self._model, data, plan, seed)
        clock.lap("train")
        report = Report(
            num_examples=result.num_examples,
            train_loss=result.loss,
            num_validation_examples=validation.num_examples if validation else 0,
            validation_loss=validation.loss if validation else 0.0,
            validation_metric=validation.metric if validation else 0.0,
        )
        trained = get_state(self._model, device=None)
        upload = b"".join(session.upload(trained, report))
        clock.lap("encode")
        frozen = {setup.schema.tensors[n].name for n in setup.schema.frozen()}
        kept = {name: value for name, value in session.state.items() if name not in frozen}
        return ClientResult(client=task.client, upload=upload, state=kept, seconds=clock.seconds)

    def _decode(self, kind: Kind, number: int, payload: bytes) -> Broadcast:
        """Decode what all clients of a round share once for all of them."""
        known = self._decoded.get(kind)
        if known is None or known[0] != number:
            decoded = Broadcast.decode(payload, self._setup.method, self._setup.schema, kind)
            known = self._decoded[kind] = (number, decoded)
        return known[1]


class _Stopwatch:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = now - self._last
        self._last = now


def single_thread() -> None:
    """Let torch use one thread, as every client does in every engine."""
    torch.set_num_threads(1)
