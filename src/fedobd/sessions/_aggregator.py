"""Aggregator: takes in the uploads of one round, each wholly or not at all.

One aggregator does for a round. Several, in processes of their own, can share its uploads out:
their sums are integers and are merged to the same bits; see `_mean`.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass

from fedobd._errors import DecodeError, DecodeReason
from fedobd.blocks import ModelSchema, ModelState
from fedobd.payload import Bytes, Header, Kind, Limits, Payload
from fedobd.sessions._mean import Sums, WeightedMean, num_sums
from fedobd.sessions._method import Method
from fedobd.sessions._rounds import Refusal, RoundPlan, UploadRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadRules:
    """What decides which uploads are taken: a round's plan, its broadcast's blocks, the limits."""

    plan: RoundPlan
    block_ids: tuple[int, ...]
    limits: Limits


class Aggregator:
    """Takes in the uploads of a round.

    The server's values W, `reference`, have floating tensors in float32, and are read, never
    changed. `memory` is where to keep the sums, as `num_sums` wants it; None for its own.
    """

    def __init__(
        self,
        method: Method,
        schema: ModelSchema,
        rules: UploadRules,
        reference: ModelState,
        *,
        executor: Executor | None = None,
        memory: Sums | None = None,
    ) -> None:
        self.method = method
        self.schema = schema
        self.rules = rules
        self.reference = reference
        self.uploads: dict[int, UploadRecord] = {}
        """Those taken, by client."""
        self.refusals: list[Refusal] = []
        """Those refused, and those that never came."""
        self._executor = executor
        self._memory = memory
        self._running_mean: WeightedMean | None = None

    @staticmethod
    def num_sums(method: Method, schema: ModelSchema) -> int:
        """Return how many numbers the memory of an aggregator holds."""
        return num_sums(schema, per_element=method.per_element_mean)

    def receive(self, client: int, upload: Bytes) -> UploadRecord:
        """Take in one upload; what `ServerSession.receive` does in an open round."""
        try:
            return self._accept(client, upload)
        except DecodeError as error:
            self.refusals.append(
                Refusal(
                    client=client,
                    reason=error.reason.value,
                    message=str(error),
                    uplink_bytes=memoryview(upload).nbytes,
                )
            )
            raise

    def _accept(self, client: int, upload: Bytes) -> UploadRecord:
        number = self.rules.plan.round
        if client not in self.rules.plan.cohort:
            raise DecodeError(
                DecodeReason.CLIENT, f"client {client} takes no part in round {number}"
            )
        if client in self.uploads:
            raise DecodeError(
                DecodeReason.DUPLICATE, f"client {client} has uploaded in round {number} already"
            )
        payload = Payload.parse(upload, self.schema, self.rules.limits)
        header, report = payload.header, payload.header.report
        self._check(client, header)
        assert report is not None
        self._mean().accumulate(
            lambda: payload.views(self._executor),
            report.num_examples,
            differences=header.is_difference,
        )
        record = UploadRecord(
            client=client,
            report=report,
            block_ids=header.block_ids,
            block_differences=header.block_differences,
            uplink=payload.num_bytes,
            uplink_blocks=tuple(payload.traffic.blocks.values()),
        )
        self.uploads[client] = record
        return record

    def _check(self, client: int, header: Header) -> None:
        """Raise DecodeError for an upload of another client or round, or an illegal report."""
        plan, most, report = self.rules.plan, self.rules.limits.max_examples, header.report
        check_addressed(header, Kind.UPLOAD, self.method, plan.round, plan.stage)
        assert report is not None
        if header.client != client:
            raise DecodeError(
                DecodeReason.CLIENT, f"client {client} sent an upload of client {header.client}"
            )
        counts = report.num_examples, report.num_validation_examples
        for count, least, what in zip(counts, (1, 0), ("", "validation "), strict=True):
            if not least <= count <= most:
                claim = f"client {client} claims {count} {what}examples"
                raise DecodeError(DecodeReason.LIMIT, f"{claim}; allowed are {least} to {most}")
        if header.is_difference is not self.method.sends_differences:
            raise DecodeError(
                DecodeReason.METHOD,
                f"the upload holds {'differences' if header.is_difference else 'values'}; "
                f"{self.method.name} sends the other",
            )
        self.method.check_upload(header, self.schema, self.rules.block_ids)

    def _mean(self) -> WeightedMean:
        """Return the mean; it is made while clients train rather than before they may."""
        if self._running_mean is None:
            self._running_mean = WeightedMean(
                self.schema,
                self.reference,
                cohort_size=len(self.rules.plan.cohort),
                max_examples=self.rules.limits.max_examples,
                per_element=self.method.per_element_mean,
                memory=self._memory,
            )
        return self._running_mean

    def note(self, outcome: UploadRecord | Refusal) -> None:
        """Record what another aggregator made of an upload; its sums are yet to be merged."""
        if isinstance(outcome, UploadRecord):
            self._mean()
            self.uploads[outcome.client] = outcome
        else:
            self.refusals.append(outcome)

    def merge(self, memory: Sums, num_examples: int) -> None:
        """Add the sums of another aggregator of the round; see `WeightedMean.merge`."""
        self._mean().merge(memory, num_examples)

    def finish(self) -> ModelState:
        """Return the server's new values; see `WeightedMean.finish`."""
        return self._mean().finish()


def check_addressed(
    header: Header, kind: Kind, method: Method, number: int | None, stage: int | None
) -> None:
    """Raise DecodeError unless a payload is of this kind, method, and given round and stage."""
    if header.kind is not kind:
        raise DecodeError(
            DecodeReason.KIND, f"a payload of kind {header.kind.name} came; wanted {kind.name}"
        )
    if header.method != method.wire_id:
        raise DecodeError(
            DecodeReason.METHOD,
            f"a payload of method number {header.method} came; "
            f"wanted {method.wire_id} ({method.name})",
        )
    if number is not None and (header.round, header.stage) != (number, stage):
        raise DecodeError(
            DecodeReason.ROUND,
            f"a payload of round {header.round}, stage {header.stage} came; "
            f"wanted round {number}, stage {stage}",
        )
    if kind is not Kind.UPLOAD and (header.is_difference or header.mask is not None):
        raise DecodeError(DecodeReason.FIELD, "what a server sends must be whole values")
