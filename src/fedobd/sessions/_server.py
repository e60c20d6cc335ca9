"""ServerSession: the server's side of a run, without any input or output.

Bytes of uploads go in, bytes of broadcasts come out; who carries them is the engine's business.
Between two rounds the whole state can be saved and restored, and the run goes on with the same
bytes.

The server keeps its own values W in float32 and adds mean differences to them; what clients hold
after a quantized broadcast, Ŵ, never enters W, so the broadcast's error does not pile up.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

import torch

from fedobd._errors import EmptyRoundError, UsageError
from fedobd._seeds import derive_seed, make_generator
from fedobd.blocks import (
    ModelSchema,
    ModelState,
    Role,
    cast_state,
    master_state,
    segment_of,
    state_fingerprint,
)
from fedobd.payload import (
    DEFAULT_LIMITS,
    BlockTraffic,
    ByteCount,
    Bytes,
    Header,
    Kind,
    Limits,
    Payload,
    add_traffic,
    encode_payload,
)
from fedobd.sessions._intake import Intake, IntakeTerms
from fedobd.sessions._method import Method, Shipment, all_blocks
from fedobd.sessions._rounds import (
    Progress,
    Refusal,
    RoundPlan,
    RoundRecord,
    StopWatch,
    UploadRecord,
    sample_cohort,
    weighted_mean,
)

MAX_EXAMPLES = 10_000_000
"""Largest number of examples that an upload may claim, unless the operator says otherwise."""


@dataclass(frozen=True, slots=True)
class SavedSession:
    """A server session between two rounds, as plain data.

    Args:
        tensors: the server's values by name.
        values: everything else, as JSON values.
    """

    tensors: ModelState
    values: dict[str, Any]


@dataclass(slots=True)
class _OpenRound:
    """A round between its begin and its end."""

    plan: RoundPlan
    shipment: Shipment
    intake: Intake
    broadcast: ByteCount | None = None
    broadcast_blocks: dict[int, BlockTraffic] = field(default_factory=dict)
    opening: ByteCount | None = None
    opening_payload: bytes | None = None
    opened: set[int] = field(default_factory=set)
    reopened: list[int] = field(default_factory=list)


class ServerSession:
    """The server's side of a run.

    Args:
        method: the method with its options.
        schema: the model's schema.
        state: the initial values by name; copied.
        num_clients: how many clients there are; they are known by the numbers 0 to
            num_clients - 1.
        seed: the run's seed.
        max_examples: the largest number of examples that an upload may claim.
        shared_start: clients hold the initial model already (the same seed and factory, the same
            checkpoint): the first broadcast and openings are then its fingerprint, not its values.
        limits: what an upload may take at most.
        executor: spreads the work on large blocks; the bytes are the same with and without.

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
        max_examples: int = MAX_EXAMPLES,
        shared_start: bool = False,
        limits: Limits = DEFAULT_LIMITS,
        executor: Executor | None = None,
    ) -> None:
        if num_clients < 1:
            raise UsageError(f"num_clients is {num_clients}; allowed are numbers from 1")
        if not 1 <= max_examples < 2**40:
            raise UsageError(f"max_examples is {max_examples}; allowed are 1 to 2^40 - 1")
        self.method = method
        self.schema = schema
        self.num_clients = num_clients
        self.seed = seed
        self.max_examples = max_examples
        _check_unit(method, schema)
        self._stages = method.stages()
        for stage in self._stages:
            sample_cohort(stage.cohort, num_clients, seed, 0)
        self._state = master_state(schema, state)
        start = state_fingerprint(schema, self.state).hex() if shared_start else None
        self._progress = Progress(uploads_by_block=[0] * len(schema.blocks), start=start)
        self._limits = limits
        self._executor = executor
        self._open: _OpenRound | None = None

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

        Args:
            available: the clients that can be reached, from which the cohort is drawn; None for
                all. With all of them the cohort is that of None.

        Returns:
            The plan, or None when the last stage is over.

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
        shipment = self.method.downlink(memory, self.schema)
        terms = IntakeTerms(
            plan=plan, sent=shipment.kept, max_examples=self.max_examples, limits=self._limits
        )
        intake = Intake(self.method, self.schema, terms, self._state, executor=self._executor)
        self._open = _OpenRound(plan, shipment, intake)
        return plan

    def broadcast(self) -> Iterator[bytes]:
        """Encode the round's shared broadcast.

        Yields:
            Chunks; their concatenation is the payload for every client of the cohort, the same
            each time.

        Raises:
            UsageError: no round is open, or the model holds NaN.
        """
        current = self._current()
        chunks = self._encode(Kind.BROADCAST, current.shipment, current.plan.round)
        if current.broadcast is None:
            whole = b"".join(chunks)
            payload = Payload.parse(whole, self.schema)
            current.broadcast = payload.num_bytes
            current.broadcast_blocks = payload.block_traffic()
            yield whole
        else:
            yield from map(bytes, chunks)

    def needs_opening(self, client: int) -> bool:
        """Whether a client of the round must be sent an opening payload before the broadcast."""
        self._check_member(client)
        opened = client in self._progress.opened or client in self._current().opened
        return self.has_opening and not opened

    @property
    def has_opening(self) -> bool:
        """Whether a client is sent an opening payload before its first broadcast."""
        return self.method.keeps_client_state or bool(self.schema.frozen())

    def opening(self, client: int) -> Iterator[bytes]:
        """Encode the opening payload of a client and note that it was sent.

        Its bytes are the same for all clients of the round.

        Yields:
            Chunks: frozen parameters, and the whole model for a method whose clients keep a state.
        """
        current = self._current()
        self._check_member(client)
        payload = self._opening(current)
        current.opened.add(client)
        yield payload

    def reopen(self, client: int) -> Iterator[bytes]:
        """Encode the opening payload again, for a client that has lost what it was given.

        The record names the client, and counts opening and broadcast once more.

        Yields:
            Chunks; none where the method's clients are not sent an opening.
        """
        current = self._current()
        self._check_member(client)
        current.reopened.append(client)
        if self.has_opening:
            yield self._opening(current)

    def _opening(self, current: _OpenRound) -> bytes:
        kept = all_blocks(self.schema) if self.method.keeps_client_state else ()
        if current.opening_payload is None:
            shipment = Shipment(kept=kept, lossless=self.method.lossless)
            chunks = self._encode(Kind.OPENING, shipment, current.plan.round)
            current.opening_payload = b"".join(chunks)
            current.opening = Payload.parse(current.opening_payload, self.schema).num_bytes
        return current.opening_payload

    def delivery(self) -> Iterator[bytes]:
        """Encode the trained model's delivery to one client.

        It holds all blocks, coded as the method's broadcasts are.

        Yields:
            Chunks. No method's traffic counts them; they are recorded apart.
        """
        shipment = self.method.downlink(self._progress.memory, self.schema)
        whole = dataclasses.replace(shipment, kept=all_blocks(self.schema))
        yield from map(bytes, self._encode(Kind.DELIVERY, whole, self._progress.rounds))

    def _encode(self, kind: Kind, shipment: Shipment, number: int) -> Iterator[Bytes]:
        schema, state = self.schema, self._state
        header = Header(
            kind=kind,
            method=self.method.wire_id,
            round=number,
            stage=self._stages[min(self._progress.stage, len(self._stages) - 1)].number,
            kept=shipment.kept,
            is_lossless=shipment.lossless,
            start=self._start_of(kind, number),
        )
        return encode_payload(
            schema,
            header,
            lambda segment: segment_of(state, schema.tensors[segment.tensor], segment),
            shipment.quantizer,
            generator=make_generator(self.seed, "downlink", number),
            frozen=lambda spec: state[spec.name],
            executor=self._executor,
        )

    def _start_of(self, kind: Kind, number: int) -> bytes | None:
        """Return the initial model's fingerprint where a payload stands for that model."""
        start = self._progress.start
        stands = kind is Kind.OPENING or (kind is Kind.BROADCAST and number == 1)
        return bytes.fromhex(start) if start is not None and stands else None

    def receive(self, client: int, upload: Bytes) -> UploadRecord:
        """Take in one upload, in any order of clients.

        Args:
            client: whose connection it came on.
            upload: the payload.

        Returns:
            What it held.

        Raises:
            DecodeError: it is refused; nothing of it is used, the refusal is recorded, and the
                round goes on.
            UsageError: no round is open.
        """
        return self._current().intake.receive(client, upload)

    @property
    def intake(self) -> Intake:
        """What takes in the uploads of the open round."""
        return self._current().intake

    def report_missing(self, client: int, reason: str, message: str) -> None:
        """Record why a client of the round has sent no upload.

        Args:
            client: which one.
            reason: one word for programs, such as `"late"` or `"failed"`.
            message: what happened, for people.
        """
        self._check_member(client)
        self._current().intake.note(
            Refusal(client=client, reason=reason, message=message, uplink_bytes=0)
        )

    def abort_round(self) -> None:
        """Forget the open round, as if it had not begun.

        Its clients' openings count as not sent; only the bytes that it took are added to those of
        the round that is ended next.
        """
        up, down = _traffic(self._current())
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
        intake = current.intake
        if not intake.uploads:
            refused = "; ".join(f"client {r.client}: {r.message}" for r in intake.refusals)
            raise EmptyRoundError(
                f"round {current.plan.round}: no upload was accepted from "
                f"{len(current.plan.cohort)} clients" + (f" ({refused})" if refused else "")
            )
        record = self._record(current)
        self._state = intake.finish()
        progress = self._progress
        progress.memory = self.method.end(dict(progress.memory), record)
        progress.opened |= current.opened
        progress.rounds += 1
        progress.stage_rounds += 1
        if current.plan.stage == 1:
            for upload in record.uploads:
                for number in upload.blocks_kept:
                    progress.uploads_by_block[number] += 1
        progress.aborted_uplink = progress.aborted_downlink = 0
        self._open = None
        rule = self.method.stop
        metric = record.validation_metric if rule.source == "validation" else None
        self._advance(metric)
        return record

    def observe_test_metric(self, metric: float) -> None:
        """Take in the new state's metric on the test set.

        It counts only for a method that stops on it.
        """
        if self._open is not None:
            raise UsageError(
                f"round {self._open.plan.round} is open; a test metric comes between rounds"
            )
        if self.method.stop.source == "test" and self._progress.stage_rounds > 0:
            self._advance(metric)

    def _advance(self, metric: float | None) -> None:
        progress = self._progress
        stage = self._stages[progress.stage]
        stop = progress.watch.observe(metric, self.method.stop)
        if stop or progress.stage_rounds >= stage.rounds:
            progress.stage += 1
            progress.stage_rounds = 0
            progress.watch = StopWatch()

    def _record(self, current: _OpenRound) -> RoundRecord:
        taken = current.intake.uploads
        uploads = tuple(taken[client] for client in sorted(taken))
        if current.broadcast is None:
            raise UsageError(f"round {current.plan.round} was ended before its broadcast was made")
        broadcasts = len(current.plan.cohort) + len(current.reopened)
        opening = current.opening or ByteCount()
        openings = len(current.opened) + len(current.reopened)
        uplink_bytes, downlink_bytes = _traffic(current)
        train_loss = weighted_mean(
            [u.train_loss for u in uploads], [u.num_examples for u in uploads]
        )
        assert train_loss is not None
        validation = [u.num_validation_examples for u in uploads]
        return RoundRecord(
            round=current.plan.round,
            stage=current.plan.stage,
            cohort=current.plan.cohort,
            uploads=uploads,
            refusals=tuple(sorted(current.intake.refusals, key=lambda r: (r.client, r.message))),
            train_loss=train_loss,
            validation_loss=weighted_mean([u.validation_loss for u in uploads], validation),
            validation_metric=weighted_mean([u.validation_metric for u in uploads], validation),
            uplink_bytes=uplink_bytes + self._progress.aborted_uplink,
            downlink_bytes=downlink_bytes + self._progress.aborted_downlink,
            uplink_nominal_bits=sum(u.uplink.nominal_bits for u in uploads),
            downlink_nominal_bits=current.broadcast.nominal_bits * broadcasts
            + opening.nominal_bits * openings,
            uplink_blocks=_by_block(uploads, len(self.schema.blocks)),
            broadcast=current.broadcast,
            broadcast_blocks=tuple(
                current.broadcast_blocks.get(number, BlockTraffic())
                for number in range(len(self.schema.blocks))
            ),
            opening_bytes=opening.total * openings,
            opened=tuple(sorted(current.opened)),
            reopened=tuple(sorted(current.reopened)),
        )

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
        values["opened"] = sorted(self._progress.opened)
        return SavedSession(dict(self._state), values)

    def restore(self, saved: SavedSession) -> None:
        """Put the session where a saved one was.

        Method, schema, clients and seed must be the same.

        Raises:
            UsageError: the saved state does not fit the schema.
        """
        self._state = master_state(self.schema, saved.tensors)
        values = copy.deepcopy(saved.values)
        values["watch"] = StopWatch(**values["watch"])
        values["opened"] = set(values["opened"])
        self._progress = Progress(**values)
        self._open = None

    def _current(self) -> _OpenRound:
        if self._open is None:
            raise UsageError("no round is open; call begin_round first")
        return self._open

    def _check_member(self, client: int) -> None:
        if client not in self._current().plan.cohort:
            raise UsageError(
                f"client {client} takes no part in round {self._current().plan.round}"
            )


def _traffic(current: _OpenRound) -> tuple[int, int]:
    """Return the bytes that went up and down in an open round."""
    uploads = sum(upload.uplink.total for upload in current.intake.uploads.values())
    refused = sum(refusal.uplink_bytes for refusal in current.intake.refusals)
    broadcast = current.broadcast.total if current.broadcast else 0
    opening = current.opening.total if current.opening else 0
    again = len(current.reopened)
    down = broadcast * (len(current.plan.cohort) + again) + opening * (len(current.opened) + again)
    return uploads + refused, down


def _by_block(uploads: Sequence[UploadRecord], num_blocks: int) -> tuple[BlockTraffic, ...]:
    """Return what each block took in all uploads."""
    found: list[list[BlockTraffic]] = [[] for _ in range(num_blocks)]
    for upload in uploads:
        for number, traffic in zip(upload.blocks_kept, upload.uplink_blocks, strict=True):
            found[number].append(traffic)
    return tuple(map(add_traffic, found))


def _check_unit(method: Method, schema: ModelSchema) -> None:
    """Raise UsageError where a method on tensors is given larger blocks."""
    for block in schema.blocks if method.unit == "tensor" else ():
        tensors = [schema.tensors[segment.tensor].role for segment in block.segments]
        if tensors.count(Role.PARAMETER) > 1:
            raise UsageError(
                f"{method.name} drops parameter tensors, and block {block.name!r} holds several; "
                "wanted decompose(model, BlockRules(style='tensor'))"
            )
