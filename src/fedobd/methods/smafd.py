"""SMAFD: one sub-model a round for all clients, drawn by scores from the training loss."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, final

import torch

from fedobd._seeds import make_generator
from fedobd.blocks import BlockStyle, ModelSchema
from fedobd.methods._codec import check_dropout_rate
from fedobd.methods._single_stage import SingleStage
from fedobd.sessions import Memory, RoundRecord, TransferSpec, UplinkContext, all_blocks


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SMAFD(SingleStage):
    """Single-model adaptive federated dropout.

    The unit is a parameter tensor: clients train the whole model, and only the sub-model's tensors
    travel, both ways. When the mean training loss fell below the last round's, the sub-model is
    kept and its tensors get the score (l_old - l_new) / l_old. Else a new one is drawn: tensors
    without replacement, those with a score first with the scores as weights, then the others
    evenly, until (1 - λ)·|W| parameters are reached or passed.

    Args:
        rounds, epochs, cohort, stop, lossless: see `SingleStage`.
        dropout_rate: λ in [0, 1).

    References:
        Nader Bouacida, Jiahui Hou, Hui Zang, Xin Liu. Adaptive Federated Dropout: Improving
        Communication Efficiency and Generalization for Federated Learning. 2020, arXiv 2011.04050,
        algorithm 2.

    Departs from the paper:
        Tensors take the place of activations, as in the FedOBD authors' comparison. Buffers always
        travel. After the first round there is no earlier loss, so a new sub-model is drawn.
    """

    name: ClassVar[str] = "smafd"
    wire_id: ClassVar[int] = 4
    unit: ClassVar[BlockStyle] = "tensor"
    keeps_client_state: ClassVar[bool] = True

    dropout_rate: float = 0.3

    def __post_init__(self) -> None:
        SingleStage.__post_init__(self)
        check_dropout_rate(self.dropout_rate)

    def begin(self, memory: Memory, schema: ModelSchema, seed: int) -> Memory:
        """See `Method.begin`: draw a sub-model where there is none to keep."""
        scores = memory.get("scores") or [0.0] * len(schema.blocks)
        submodel = memory.get("submodel")
        if submodel is None:
            submodel = self._draw(schema, scores, seed)
        return {**memory, "scores": scores, "submodel": submodel}

    def _draw(self, schema: ModelSchema, scores: list[float], seed: int) -> list[int]:
        sizes = [block.num_parameters for block in schema.blocks]
        generator = make_generator(seed, "submodel")
        scored = [n for n, score in enumerate(scores) if sizes[n] and score > 0]
        others = [n for n, score in enumerate(scores) if sizes[n] and score <= 0]
        order = []
        if scored:
            weights = torch.tensor([scores[n] for n in scored], dtype=torch.float64)
            drawn = torch.multinomial(weights, len(scored), generator=generator)
            order += [scored[i] for i in drawn.tolist()]
        order += [others[i] for i in torch.randperm(len(others), generator=generator).tolist()]
        wanted = (1 - Fraction(str(self.dropout_rate))) * schema.num_parameters
        submodel, used = [n for n, size in enumerate(sizes) if size == 0], 0
        for number in order:
            if used >= wanted:
                break
            submodel.append(number)
            used += sizes[number]
        return sorted(submodel)

    def downlink(self, memory: Memory, schema: ModelSchema) -> TransferSpec:
        """See `Method.downlink`: the sub-model's tensors; all, where none is drawn."""
        submodel = memory.get("submodel")
        block_ids = all_blocks(schema) if submodel is None else tuple(submodel)
        return TransferSpec(block_ids=block_ids, lossless=self.lossless)

    def uplink(self, context: UplinkContext) -> TransferSpec:
        """See `Method.uplink`: the same tensors."""
        return TransferSpec(block_ids=context.received, lossless=self.lossless)

    def end(self, memory: Memory, record: RoundRecord) -> Memory:
        """See `Method.end`.

        The sub-model is kept and scored if the unweighted mean training loss fell, else dropped.
        """
        loss = sum(upload.report.train_loss for upload in record.uploads) / len(record.uploads)
        before = memory.get("loss")
        scores = list(memory["scores"])
        submodel = memory["submodel"]
        if before is not None and loss < before:
            for number in submodel:
                scores[number] = (before - loss) / (abs(before) or 1.0)
        else:
            submodel = None
        return {**memory, "scores": scores, "submodel": submodel, "loss": loss}
