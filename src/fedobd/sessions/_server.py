"""ServerSession: the server's side of a run, without any input or output.

The server keeps its own values W in float32 and adds mean differences to them; what clients hold
after a quantized broadcast, Ŵ, never enters W, so the broadcast's error does not pile up.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import torch

from fedobd._errors import EmptyRoundError, UsageError
from fedobd._seeds import derive_seed, make_generator
from fedobd.blocks import (
    ModelSchema,
    ModelState,
    cast_state,
    master_state,
    segment_of,
    state_fingerprint,
)
from fedobd.payload import (
    DEFAULT_LIMITS,
    Bytes,
    EncodedPayload,
    Header,
    Kind,
    Limits,
    encode_payload,
)
from fedobd.sessions._aggregator import Aggregator, UploadRules
from fedobd.sessions._method import Method, TransferSpec, all_blocks, check_unit
from fedobd.sessions._open_round import OpenRound
from fedobd.sessions._rounds import (
    Progress,
    Refusal,
    RoundPlan,
    RoundRecord,
    StopWatch,
    UploadRecord,
    sample_cohort,
)


@dataclass(frozen=True, slots=True)
class SavedSession:
    """A server session between two rounds: its values by name, and all else as JSON values."""

    tensors: ModelState
    values: dict[str, Any]


class ServerSession:
    """The server's side of a run.

    Args:
        method, schema, seed: the run's.
        state: the initial values by name; copied.
        num_clients: how many there are; they are known by the numbers 0 to num_clients - 1.
        shared_start: clients hold the initial model already (the same seed and factory, the same
            checkpoint): the first broadcast and initial payloads are then its fingerprint, not its
            values.
        limits: what an upload may take at most.

    Raises:
        UsageError: the state does not fit the schema, or there are fewer clients than a cohort
            wants.
    """

    def __init__(
        self,
        method: Method,
        schema: ModelSchema,
        state: Mapping[str, torch.Tensor],
        *,
        num_clients: int,
        seed: int = 0,
        shared_start: bool = False,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        if num_clients < 1:
            raise UsageError(f"num_clients is {num_clients}; allowed are numbers from 1")
        self.method = method
        self.schema = schema
        self.num_clients = num_clients
        self.seed = seed
        check_unit(method, schema)
        self._stages = method.stages()
        for stage in self._stages:
            sample_cohort(stage.cohort, num_clients, seed, 0)
        self._state = master_state(schema, state)
        start = state_fingerprint(schema, self.state).hex() if shared_start else None
        self._progress = Progress(uploads_by_block=[0] * len(schema.blocks), start=start)
        self._limits = limits
        self.executor: Executor | None = None
        """Spreads the work on large blocks; the bytes are the same with and without."""
        self._open: OpenRound | None = None

    @property
    def state(self) -> ModelState:
        """Copies of the server's values W in the model's own element types."""
        return cast_state(self.schema, self._state)

    @property
    def rounds(self) -> int:
        """Number of rounds that were ended."""
        return self._progress.rounds

    @property
    def planned_rounds(self) -> int:
        """Number of rounds of all stages, if none is left early."""
        return sum(stage.rounds for stage in self._stages)

    @property
    def is_finished(self) -> bool:
        """Whether the last stage is over."""
        return self._progress.stage >= len(self._stages)

    def begin_round(self, available: Collection[int] | None = None) -> RoundPlan | None:
        """Begin the next round.

        The cohort is drawn from the clients that can be reached; None, or all of them, for all.
        There is no plan when the last stage is over.

        Raises:
            UsageError: a round is open, or no client is available.
        """
        if self._open is not None:
            raise UsageError(f"round {self._open.plan.round} has not been ended")
        progress = self._progress
        if self.is_finished:
            return None
        stage = self._stages[progress.stage]
        number = progress.rounds + 1
        cohort = sample_cohort(stage.cohort, self.num_clients, self.seed, number, available)
        if not cohort:
            raise UsageError(f"no client is available for round {number}")
        epochs_before = sum(s.rounds * s.epochs for s in self._stages[: progress.stage])
        plan = RoundPlan(
            round=number,
            stage=stage.number,
            cohort=cohort,
            epochs=stage.epochs,
            schedule_start=progress.stage_rounds * stage.epochs if stage.one_schedule else 0,
            schedule_epochs=stage.epochs * (stage.rounds if stage.one_schedule else 1),
            run_start=epochs_before + progress.stage_rounds * stage.epochs,
            run_epochs=sum(s.rounds * s.epochs for s in self._stages),
        )
        seed = derive_seed(self.seed, "server", number)
        memory = self.method.begin(dict(progress.memory), self.schema, seed)
        progress.memory = memory
        transfer = self.method.downlink(memory, self.schema)
        rules = UploadRules(plan=plan, block_ids=transfer.block_ids, limits=self._limits)
        aggregator = Aggregator(
            self.method, self.schema, rules, self._state, executor=self.executor
        )
        self._open = OpenRound(plan, transfer, aggregator)
        return plan

    def broadcast(self) -> EncodedPayload:
        """Return the round's shared broadcast, the same for every client of the cohort.

        Raises:
            UsageError: no round is open, or the model holds NaN.
        """
        current = self._current()
        if current.broadcast is None:
            current.broadcast = self._encode(Kind.BROADCAST, current.transfer, current.plan.round)
        return current.broadcast

    @property
    def has_initial_payload(self) -> bool:
        """Whether a client is sent an initial payload before its first broadcast."""
        return self.method.keeps_client_state or bool(self.schema.frozen())

    def needs_initial_payload(self, client: int) -> bool:
        """Whether a client of the round must be sent the initial payload before the broadcast."""
        current = self._member_of(client)
        had = client in self._progress.initialized or client in current.initialized
        return self.has_initial_payload and not had

    def initial_payload(self, client: int) -> EncodedPayload:
        """Return the initial payload, the same for all clients, and note that one is sent it.

        It holds frozen parameters, and the whole model for a method whose clients keep a state.
        """
        current = self._member_of(client)
        current.initialized.add(client)
        return self._initial(current)

    def resend_initial_payload(self, client: int) -> EncodedPayload | None:
        """Return the initial payload again, for a client that has lost what it was given.

        The record names the client, and counts initial payload and broadcast once more. There is
        none where the method's clients are not sent one.
        """
        current = self._member_of(client)
        current.resent.append(client)
        return self._initial(current) if self.has_initial_payload else None

    def _initial(self, current: OpenRound) -> EncodedPayload:
        if current.initial is None:
            block_ids = all_blocks(self.schema) if self.method.keeps_client_state else ()
            transfer = TransferSpec(block_ids=block_ids, lossless=self.method.lossless)
            current.initial = self._encode(Kind.INITIAL, transfer, current.plan.round)
        return current.initial

    def delivery(self) -> EncodedPayload:
        """Return the trained model's delivery: all blocks, coded as broadcasts are.

        No method's traffic counts it; it is recorded apart.
        """
        transfer = self.method.downlink(self._progress.memory, self.schema)
        whole = dataclasses.replace(transfer, block_ids=all_blocks(self.schema))
        return self._encode(Kind.DELIVERY, whole, self._progress.rounds)

    def _encode(self, kind: Kind, transfer: TransferSpec, number: int) -> EncodedPayload:
        schema, state, start = self.schema, self._state, self._progress.start
        is_start = kind is Kind.INITIAL or (kind is Kind.BROADCAST and number == 1)
        header = Header(
            kind=kind,
            method=self.method.wire_id,
            round=number,
            stage=self._stages[min(self._progress.stage, len(self._stages) - 1)].number,
            block_ids=transfer.block_ids,
            is_lossless=transfer.lossless,
            # What goes out before the first round is the initial model itself.
            start=bytes.fromhex(start) if start is not None and is_start else None,
        )
        payload = encode_payload(
            schema,
            header,
            lambda segment: segment_of(state, schema.tensors[segment.tensor], segment),
            transfer.quantizer,
            generator=make_generator(self.seed, "downlink", number),
            frozen=lambda spec: state[spec.name],
            executor=self.executor,
        )
        return payload.copied()  # it outlives the round, whose end changes the values

    def receive(self, client: int, upload: Bytes) -> UploadRecord:
        """Take in one upload on a client's connection, in any order; return what it held.

        Raises:
            DecodeError: it is refused; nothing of it is used, the refusal is recorded, and the
                round goes on.
            UsageError: no round is open.
        """
        return self._current().aggregator.receive(client, upload)

    @property
    def aggregator(self) -> Aggregator:
        """What takes in the uploads of the open round."""
        return self._current().aggregator

    def report_missing(self, client: int, reason: str, message: str) -> None:
        """Record why a client of the round has sent no upload.

        The reason is one word for programs, such as `"late"` or `"failed"`; the message is what
        happened, for people.
        """
        self._member_of(client).aggregator.note(
            Refusal(client=client, reason=reason, message=message, uplink_bytes=0)
        )

    def abort_round(self) -> None:
        """Forget the open round, as if it had not begun.

        Its clients' initial payloads count as not sent; only the bytes that it took are added to
        those of the round that is ended next.
        """
        up, down = self._current().traffic()
        self._progress.aborted_uplink += up
        self._progress.aborted_downlink += down
        self._open = None

    def end_round(self) -> RoundRecord:
        """End the round: the mean becomes the new state.

        Raises:
            EmptyRoundError: no upload was accepted; the round stays open, to be repeated or
                aborted.
        """
        current = self._current()
        aggregator = current.aggregator
        if not aggregator.uploads:
            refused = "; ".join(f"client {r.client}: {r.message}" for r in aggregator.refusals)
            raise EmptyRoundError(
                f"round {current.plan.round}: no upload was accepted from "
                f"{len(current.plan.cohort)} clients" + (f" ({refused})" if refused else "")
            )
        aborted = self._progress.aborted_uplink, self._progress.aborted_downlink
        record = current.record(len(self.schema.blocks), aborted)
        self._state = aggregator.finish()
        progress = self._progress
        progress.memory = self.method.end(dict(progress.memory), record)
        progress.initialized |= current.initialized
        progress.rounds += 1
        progress.stage_rounds += 1
        if current.plan.stage == 1:
            for number, traffic in enumerate(record.uplink_blocks):
                progress.uploads_by_block[number] += traffic.payloads
        progress.aborted_uplink = progress.aborted_downlink = 0
        self._open = None
        on_validation = self.method.stop.source == "validation"
        self._advance(record.validation_metric if on_validation else None)
        return record

    def observe_test_metric(self, metric: float) -> None:
        """Take in the new state's test metric; it counts for a method that stops on it."""
        if self._open is not None:
            raise UsageError(
                f"round {self._open.plan.round} is open; a test metric comes between rounds"
            )
        if self.method.stop.source == "test" and self._progress.stage_rounds > 0:
            self._advance(metric)

    def _advance(self, metric: float | None) -> None:
        progress = self._progress
        stop = progress.watch.observe(metric, self.method.stop)
        if stop or progress.stage_rounds >= self._stages[progress.stage].rounds:
            progress.stage += 1
            progress.stage_rounds = 0
            progress.watch = StopWatch()

    def skip_to(self, stage: int, stage_rounds: int) -> None:
        """Go to a place between two rounds without running those before it, to estimate traffic.

        The state, what the method remembers, and who has had an initial payload stay as they are.

        Args:
            stage: index of the stage in the method's stages, from 0.
            stage_rounds: how many rounds of it lie behind.

        Raises:
            UsageError: a round is open, or the method has no such round.
        """
        if self._open is not None:
            raise UsageError(f"round {self._open.plan.round} is open; skip between rounds")
        if not (0 <= stage < len(self._stages) and 0 <= stage_rounds < self._stages[stage].rounds):
            raise UsageError(
                f"there is no round {stage_rounds + 1} of stage {stage} in {self.method.name}"
            )
        progress = self._progress
        progress.stage, progress.stage_rounds = stage, stage_rounds
        progress.rounds = sum(s.rounds for s in self._stages[:stage]) + stage_rounds

    def never_uploaded(self) -> tuple[int, ...]:
        """Return the blocks with parameters that no client has uploaded in stage 1 so far."""
        return tuple(
            number
            for number, count in enumerate(self._progress.uploads_by_block)
            if count == 0 and self.schema.blocks[number].num_parameters > 0
        )

    def save(self) -> SavedSession:
        """Return the session's state between two rounds.

        Raises:
            UsageError: a round is open.
        """
        if self._open is not None:
            raise UsageError(
                f"round {self._open.plan.round} is open; a session is saved between rounds"
            )
        values = dataclasses.asdict(self._progress)
        values["opened"] = sorted(values.pop("initialized"))  # its name in checkpoints
        return SavedSession(dict(self._state), values)

    def restore(self, saved: SavedSession) -> None:
        """Put the session where one of the same method, schema, clients and seed was saved.

        Raises:
            UsageError: the saved state does not fit the schema.
        """
        self._state = master_state(self.schema, saved.tensors)
        values = copy.deepcopy(saved.values)
        values["watch"] = StopWatch(**values["watch"])
        values["initialized"] = set(values.pop("opened"))
        self._progress = Progress(**values)
        self._open = None

    def _current(self) -> OpenRound:
        if self._open is None:
            raise UsageError("no round is open; call begin_round first")
        return self._open

    def _member_of(self, client: int) -> OpenRound:
        """Return the open round, in which a client takes part."""
        current = self._current()
        if client not in current.plan.cohort:
            raise UsageError(f"client {client} takes no part in round {current.plan.round}")
        return current
