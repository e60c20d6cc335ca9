"""FedOBD: opportunistic block dropout with adaptive quantization, in two stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from fedobd._errors import DecodeError, DecodeReason, UsageError
from fedobd.blocks import ModelSchema
from fedobd.methods._codec import Codec
from fedobd.payload import Header
from fedobd.sessions import (
    EarlyStop,
    Memory,
    Method,
    Stage,
    TransferSpec,
    UplinkContext,
    all_blocks,
)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FedOBD(Method):
    """Federated opportunistic block dropout.

    Stage 1: in each round a part of the clients trains `stage_one_epochs` local epochs and uploads
    the quantized difference of the blocks that changed most. Stage 2: all clients, an aggregation
    after each of `stage_two_epochs` epochs, no dropout, one learning-rate schedule over all of
    them. Broadcasts are quantized too.

    Args:
        codec: quantizers, β, selection and λ.
        stage_one_rounds: R, from 1.
        stage_one_epochs: E1, from 1.
        stage_two_epochs: E2; 0 leaves stage 2 out.
        cohort: count (int) or fraction (float) of the clients in each round of stage 1.
        stop: the rule by which a stage is left early.
        lossless: whether plain values (buffers, and parameters that are not quantized) are
            compressed, without loss.

    References:
        FedOBD (arXiv 2208.05174), algorithms 1 and 2.

    Departs from the paper:
        Stage 2's learning rate is one cosine from the set rate to 0. Mean block differences of all
        blocks, 4 bytes each, travel with an upload, so that the server can record them. A stage is
        left early on the clients' validation figures, not on the test set, unless that is asked
        for.
    """

    name: ClassVar[str] = "fedobd"
    wire_id: ClassVar[int] = 5
    sends_differences: ClassVar[bool] = True

    codec: Codec = Codec()
    stage_one_rounds: int = 100
    stage_one_epochs: int = 5
    stage_two_epochs: int = 10
    cohort: int | float = 0.5
    stop: EarlyStop = EarlyStop()
    lossless: bool = False

    def __post_init__(self) -> None:
        if self.stage_two_epochs < 0:
            raise UsageError(
                f"stage_two_epochs is {self.stage_two_epochs}; allowed are numbers from 0"
            )
        self.stages()

    def stages(self) -> tuple[Stage, ...]:
        """See `Method.stages`."""
        first = Stage(
            number=1,
            rounds=self.stage_one_rounds,
            epochs=self.stage_one_epochs,
            cohort=self.cohort,
        )
        if self.stage_two_epochs == 0:
            return (first,)
        second = Stage(
            number=2, rounds=self.stage_two_epochs, epochs=1, cohort=1.0, one_schedule=True
        )
        return first, second

    def downlink(self, memory: Memory, schema: ModelSchema) -> TransferSpec:
        """See `Method.downlink`: every block, quantized."""
        return TransferSpec(
            block_ids=all_blocks(schema), quantizer=self.codec.downlink, lossless=self.lossless
        )

    def uplink(self, context: UplinkContext) -> TransferSpec:
        """See `Method.uplink`.

        Quantized differences are sent: in stage 1 of the selected blocks, in stage 2 of all.
        """
        differences = context.block_differences()
        block_ids = context.received
        if context.stage == 1:
            block_ids = self.codec.select(context.schema, differences, context.seed)
        return TransferSpec(
            block_ids=block_ids,
            quantizer=self.codec.uplink,
            block_differences=differences,
            lossless=self.lossless,
            bound_norm=self.codec.bound_norm,
        )

    def check_upload(self, header: Header, schema: ModelSchema, received: tuple[int, ...]) -> None:
        """See `Method.check_upload`: within the budget in stage 1, all blocks in stage 2."""
        if header.stage != 1:
            super(FedOBD, self).check_upload(header, schema, received)
            return
        if header.mask is not None:
            raise DecodeError(DecodeReason.METHOD, f"an upload of {self.name} has no mask")
        held = sum(schema.blocks[number].num_parameters for number in header.block_ids)
        budget = self.codec.budget(schema)
        if held > budget:
            raise DecodeError(
                DecodeReason.METHOD,
                f"an upload of stage 1 holds {held} parameters; (1 - λ)·|W| is {budget}",
            )
