"""FedPAQ: differences, quantized stochastically; float32 broadcasts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from fedobd.codec import Stochastic
from fedobd.methods._single_stage import SingleStage
from fedobd.sessions import TransferSpec, UplinkContext


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FedPAQ(SingleStage):
    """Periodic averaging with stochastically quantized differences.

    Args:
        rounds, epochs, cohort, stop, lossless: see `SingleStage`.
        levels: s of QSGD, from 1 to 2^22.

    References:
        Amirhossein Reisizadeh, Aryan Mokhtari, Hamed Hassani, Ali Jadbabaie, Ramtin Pedarsani.
        FedPAQ: A Communication-Efficient Federated Learning Method with Periodic Averaging and
        Quantization. AISTATS 2020, arXiv 1909.13014, algorithm 1.

    Departs from the paper:
        Levels are relative to the largest magnitude of each tensor, as in the FedOBD authors'
        comparison, not to the Euclidean norm; the mean is weighted by examples.
    """

    name: ClassVar[str] = "fedpaq"
    wire_id: ClassVar[int] = 2
    sends_differences: ClassVar[bool] = True

    levels: int = 255

    def __post_init__(self) -> None:
        SingleStage.__post_init__(self)
        Stochastic(self.levels)

    def uplink(self, context: UplinkContext) -> TransferSpec:
        """See `Method.uplink`: every block's difference in stochastic levels."""
        return TransferSpec(
            block_ids=context.received, quantizer=Stochastic(self.levels), lossless=self.lossless
        )
