"""OpenRound: a round between its begin and its end, and the record that comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fedobd._errors import UsageError
from fedobd.payload import BlockTraffic, ByteCount, EncodedPayload, add_traffic
from fedobd.sessions._aggregator import Aggregator
from fedobd.sessions._method import TransferSpec
from fedobd.sessions._rounds import RoundPlan, RoundRecord, UploadRecord, weighted_mean


@dataclass(slots=True)
class OpenRound:
    """A round that has begun.

    Broadcast and initial payload are made once, when they are wanted. `initialized` are the
    clients that were sent the latter; `resent` those that were sent both again, as often as they
    were.
    """

    plan: RoundPlan
    transfer: TransferSpec
    aggregator: Aggregator
    broadcast: EncodedPayload | None = None
    initial: EncodedPayload | None = None
    initialized: set[int] = field(default_factory=set)
    resent: list[int] = field(default_factory=list)

    def _sent(self) -> list[tuple[ByteCount, int]]:
        """Return what broadcast and initial payload take, and how often each went down."""
        again = len(self.resent)
        return [
            (_total(self.broadcast), len(self.plan.cohort) + again),
            (_total(self.initial), len(self.initialized) + again),
        ]

    def traffic(self) -> tuple[int, int]:
        """Return the bytes that went up and down so far."""
        uploads = sum(upload.uplink.total for upload in self.aggregator.uploads.values())
        refused = sum(refusal.uplink_bytes for refusal in self.aggregator.refusals)
        return uploads + refused, sum(count.total * times for count, times in self._sent())

    def record(self, num_blocks: int, aborted_bytes: tuple[int, int]) -> RoundRecord:
        """Return the round's record; aborted attempts at it took bytes too, up and down.

        Raises:
            UsageError: no broadcast was made.
        """
        if self.broadcast is None:
            raise UsageError(f"round {self.plan.round} was ended before its broadcast was made")
        uploads = tuple(self.aggregator.uploads[c] for c in sorted(self.aggregator.uploads))
        refusals = sorted(self.aggregator.refusals, key=lambda r: (r.client, r.message))
        broadcast, (initial, initials) = self.broadcast.traffic, self._sent()[1]
        uplink_bytes, downlink_bytes = self.traffic()
        reports = [upload.report for upload in uploads]
        examples = [report.num_examples for report in reports]
        train_loss = weighted_mean([r.train_loss for r in reports], examples)
        assert train_loss is not None
        validation = [report.num_validation_examples for report in reports]
        return RoundRecord(
            round=self.plan.round,
            stage=self.plan.stage,
            cohort=self.plan.cohort,
            uploads=uploads,
            refusals=tuple(refusals),
            train_loss=train_loss,
            validation_loss=weighted_mean([r.validation_loss for r in reports], validation),
            validation_metric=weighted_mean([r.validation_metric for r in reports], validation),
            uplink_bytes=uplink_bytes + aborted_bytes[0],
            downlink_bytes=downlink_bytes + aborted_bytes[1],
            uplink_nominal_bits=sum(upload.uplink.nominal_bits for upload in uploads),
            downlink_nominal_bits=sum(count.nominal_bits * n for count, n in self._sent()),
            uplink_blocks=_by_block(uploads, num_blocks),
            broadcast=broadcast.total,
            broadcast_blocks=tuple(
                broadcast.blocks.get(number, BlockTraffic()) for number in range(num_blocks)
            ),
            initial_bytes=initial.total * initials,
            initialized=tuple(sorted(self.initialized)),
            reinitialized=tuple(sorted(self.resent)),
        )


def _total(payload: EncodedPayload | None) -> ByteCount:
    """Return the bytes of a payload, none for one that was not made."""
    return ByteCount() if payload is None else payload.traffic.total


def _by_block(uploads: Sequence[UploadRecord], num_blocks: int) -> tuple[BlockTraffic, ...]:
    """Return what each block took in all uploads."""
    traffic: list[list[BlockTraffic]] = [[] for _ in range(num_blocks)]
    for upload in uploads:
        for number, taken in zip(upload.block_ids, upload.uplink_blocks, strict=True):
            traffic[number].append(taken)
    return tuple(map(add_traffic, traffic))
