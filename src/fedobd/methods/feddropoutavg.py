"""FedDropoutAvg: each parameter is uploaded with probability 1 - λ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from fedobd._errors import DecodeError, DecodeReason
from fedobd.blocks import ModelSchema
from fedobd.codec import Mask
from fedobd.methods._codec import check_dropout_rate
from fedobd.methods._single_stage import SingleStage
from fedobd.payload import Header
from fedobd.sessions import TransferSpec, UplinkContext


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FedDropoutAvg(SingleStage):
    """Federated averaging with randomly dropped parameters.

    Each element is averaged over the clients that sent it.

    Args:
        rounds, epochs, cohort, stop, lossless: see `SingleStage`.
        dropout_rate: λ in [0, 1), the probability that a parameter is not uploaded.

    References:
        Gozde N. Gunesli, Mohsin Bilal, Shan E Ahmed Raza, Nasir M. Rajpoot. FedDropoutAvg:
        Generalizable federated learning for histopathology image classification. 2021, arXiv
        2111.13230, section 3.

    Departs from the paper:
        The mask travels as the seed of a generator that the payload format defines. Where no
        client sent an element, it keeps the server's value (published code puts 0 there). Buffers
        travel whole.
    """

    name: ClassVar[str] = "feddropoutavg"
    wire_id: ClassVar[int] = 3
    per_element_mean: ClassVar[bool] = True

    dropout_rate: float = 0.3

    def __post_init__(self) -> None:
        SingleStage.__post_init__(self)
        check_dropout_rate(self.dropout_rate)

    def uplink(self, context: UplinkContext) -> TransferSpec:
        """See `Method.uplink`: the values under the client's mask."""
        mask = Mask.of_rate(context.seed, self.dropout_rate)
        return TransferSpec(block_ids=context.received, mask=mask, lossless=self.lossless)

    def check_upload(self, header: Header, schema: ModelSchema, received: tuple[int, ...]) -> None:
        """See `Method.check_upload`: all blocks, under a mask of this λ."""
        wanted = Mask.of_rate(0, self.dropout_rate).threshold
        if header.block_ids != received or header.mask is None or header.mask.threshold != wanted:
            raise DecodeError(
                DecodeReason.METHOD,
                f"an upload of {self.name} must hold every block under a mask of λ = "
                f"{self.dropout_rate}",
            )
