"""FedAvg: whole models, unquantized, both ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from fedobd.methods._single_stage import SingleStage
from fedobd.sessions import TransferSpec, UplinkContext


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FedAvg(SingleStage):
    """Federated averaging: the mean of the clients' models, weighted by their examples.

    Args:
        rounds, epochs, cohort, stop, lossless: see `SingleStage`; the FedOBD paper's comparison
            has all clients take part.

    References:
        H. Brendan McMahan, Eider Moore, Daniel Ramage, Seth Hampson, Blaise Agüera y Arcas.
        Communication-Efficient Learning of Deep Networks from Decentralized Data. AISTATS 2017,
        arXiv 1602.05629, algorithm 1.
    """

    name: ClassVar[str] = "fedavg"
    wire_id: ClassVar[int] = 1

    cohort: int | float = 1.0

    def uplink(self, context: UplinkContext) -> TransferSpec:
        """See `Method.uplink`: every block as it is."""
        return TransferSpec(block_ids=context.received, lossless=self.lossless)
