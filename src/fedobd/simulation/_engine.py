"""The engine: drives a server session and a pool of clients through the rounds of a run."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

from fedobd._errors import DecodeError
from fedobd.blocks import ModelState
from fedobd.payload import Bytes
from fedobd.sessions import RoundPlan, RoundRecord, ServerSession
from fedobd.simulation._client import ClientTask
from fedobd.simulation._pool import ClientPool
from fedobd.training import Evaluation


class ClientStates(Protocol):
    """Keeps what clients keep between rounds."""

    def load(self, client: int) -> ModelState | None:
        """Return a client's state, None if it has none."""
        ...

    def store(self, client: int, round_number: int, state: ModelState) -> None:
        """Keep a client's state after a round."""
        ...


@dataclass(slots=True)
class MemoryStates:
    """Client states in memory."""

    states: dict[int, ModelState] = field(default_factory=dict)

    def load(self, client: int) -> ModelState | None:
        """See `ClientStates.load`."""
        return self.states.get(client)

    def store(self, client: int, round_number: int, state: ModelState) -> None:
        """See `ClientStates.store`."""
        self.states[client] = state


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayedRound:
    """One round, as an engine has played it.

    Args:
        plan: what was planned.
        record: what happened.
        test: the new state's figures on the test set, where they were asked for.
        seconds: wall-clock seconds by phase: `round` in all; `broadcast`, `mean` and `evaluate` on
            the server; `fold` over all uploads; where clients are played here, `decode`,
            `validate`, `train` and `encode` summed over them, which overlap where there are
            workers, and so does `fold`; where they are not, `wait` for their uploads.
    """

    plan: RoundPlan
    record: RoundRecord
    test: Evaluation | None
    seconds: dict[str, float]


@dataclass(slots=True, kw_only=True)
class Watcher:
    """What a caller wants to see while a round goes on; every function may be None.

    Args:
        on_payload: gets round, a name such as `"broadcast"` or `"upload-3"`, and each payload's
            bytes.
        on_client: gets the plan and the number of uploads so far, refused ones too, after each.
    """

    on_payload: Callable[[int, str, Bytes], None] | None = None
    on_client: Callable[[RoundPlan, int], None] | None = None


def simulate(
    server: ServerSession,
    pool: ClientPool,
    *,
    evaluate: Callable[[ModelState], Evaluation] | None = None,
    should_evaluate: Callable[[RoundPlan], bool] = lambda plan: True,
    states: ClientStates | None = None,
    watcher: Watcher | None = None,
) -> Iterator[PlayedRound]:
    """Play the remaining rounds of a run.

    Between two yields the server session is between rounds and can be saved.

    Args:
        server: the server's session.
        pool: plays the clients.
        evaluate: evaluates a state on the test set.
        should_evaluate: in which rounds.
        states: keeps client states; None keeps them in memory.
        watcher: what else to call.

    Yields:
        Each round when it has ended.

    Raises:
        EmptyRoundError: no upload of a round was accepted.
    """
    states = states if states is not None else MemoryStates()
    watcher = watcher or Watcher()
    while True:
        began = time.perf_counter()
        seconds: defaultdict[str, float] = defaultdict(float)
        plan = server.begin_round()
        if plan is None:
            return
        _play(server, plan, pool, states, watcher, seconds)
        with _timed(seconds, "mean"):
            record = server.end_round()
        test = None
        if evaluate is not None and should_evaluate(plan):
            with _timed(seconds, "evaluate"):
                test = evaluate(server.state)
            server.observe_test_metric(test.metric)
        seconds["round"] = time.perf_counter() - began
        yield PlayedRound(plan=plan, record=record, test=test, seconds=dict(seconds))


def _play(
    server: ServerSession,
    plan: RoundPlan,
    pool: ClientPool,
    states: ClientStates,
    watcher: Watcher,
    seconds: defaultdict[str, float],
) -> None:
    see = watcher.on_payload or (lambda *_: None)
    with _timed(seconds, "broadcast"):
        broadcast = server.broadcast().data
        openings = {
            client: server.initial_payload(client).data
            for client in plan.cohort
            if server.needs_initial_payload(client)
        }
    see(plan.round, "broadcast", broadcast)
    for client, opening in openings.items():
        see(plan.round, f"opening-{client}", opening)
    tasks = (
        ClientTask(
            plan=plan,
            client=client,
            broadcast=broadcast,
            opening=openings.get(client),
            state=states.load(client),
        )
        for client in plan.cohort
    )
    # Uploads that are to be seen must come here; so must those of clients with states, since the
    # tasks of workers that take uploads in are kept, to be played again if a worker dies.
    must_come = watcher.on_payload is not None or server.method.keeps_client_state
    results = pool.run(tasks, None if must_come else server.aggregator)
    for done, result in enumerate(results, start=1):
        for phase, spent in result.seconds.items():
            seconds[phase] += spent
        if result.state:  # it has received the broadcast, whatever becomes of its upload
            states.store(result.client, plan.round, result.state)
        if result.upload is not None:
            see(plan.round, f"upload-{result.client}", result.upload)
            # A refusal is recorded by the session with its reason; the round goes on.
            with _timed(seconds, "fold"), suppress(DecodeError):
                server.receive(result.client, result.upload)
        if watcher.on_client is not None:
            watcher.on_client(plan, done)


@contextmanager
def _timed(seconds: defaultdict[str, float], phase: str) -> Iterator[None]:
    """Add the time inside a `with` block to a phase."""
    began = time.perf_counter()
    yield
    seconds[phase] += time.perf_counter() - began
