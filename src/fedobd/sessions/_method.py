"""Method: what a federated-learning method decides; the sessions do the rest.

A method is a frozen value of options. It says which stages a run has, how the server's state goes
down, how a client's goes up, which uploads are legal, and what it remembers from round to round.
It holds no state and touches no bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from fedobd._errors import DecodeError, DecodeReason, UsageError
from fedobd.blocks import BlockStyle, ModelSchema, Role
from fedobd.codec import Mask, Quantizer, Unquantized
from fedobd.payload import Header
from fedobd.sessions._rounds import EarlyStop, RoundRecord, Stage

Memory = dict[str, Any]
"""What a method remembers between rounds: plain JSON values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferSpec:
    """How a state is to travel: which blocks, ascending, and how their parameters are coded.

    With a mask only some elements travel. Mean block differences travel with an upload. `lossless`
    compresses plain values; `bound_norm` shrinks differences where needed, so that quantization
    raises the L2 norm of none.
    """

    block_ids: tuple[int, ...]
    quantizer: Quantizer = Unquantized()
    mask: Mask | None = None
    block_differences: tuple[float, ...] | None = None
    lossless: bool = False
    bound_norm: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class UplinkContext:
    """What a client knows when it decides what to upload.

    `received` are the blocks that the broadcast held; `seed` is for this client's choices in this
    round; `block_differences` computes the mean block difference of every block.
    """

    schema: ModelSchema
    round: int
    stage: int
    received: tuple[int, ...]
    seed: int
    block_differences: Callable[[], tuple[float, ...]]


class Method(ABC):
    """A federated-learning method with its options; subclasses are final and frozen."""

    name: ClassVar[str]
    wire_id: ClassVar[int]
    """The method's number in the payload format, from 1 to 255, never given to another method."""

    unit: ClassVar[BlockStyle] = "semantic"
    """The style of blocks that the method is defined on."""

    sends_differences: ClassVar[bool] = False
    """Whether uploads hold differences to the broadcast; else values."""

    per_element_mean: ClassVar[bool] = False
    """Whether each element is averaged over the clients that sent it."""

    keeps_client_state: ClassVar[bool] = False
    """Whether a client keeps what it last received, and is sent the whole model at first."""

    stop: EarlyStop
    """The rule by which a stage is left early."""

    lossless: bool
    """Whether plain values (parameters that are not quantized, buffers) are compressed, without
    loss."""

    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """Return the stages of a run."""

    def begin(self, memory: Memory, schema: ModelSchema, seed: int) -> Memory:
        """Return what the method remembers when the round that `seed` belongs to is to begin."""
        return memory

    def downlink(self, memory: Memory, schema: ModelSchema) -> TransferSpec:
        """Return how the server's state travels to the clients of a round."""
        return TransferSpec(block_ids=all_blocks(schema), lossless=self.lossless)

    @abstractmethod
    def uplink(self, context: UplinkContext) -> TransferSpec:
        """Return how a client's trained state travels to the server."""

    def check_upload(self, header: Header, schema: ModelSchema, received: tuple[int, ...]) -> None:
        """Refuse an upload that this method cannot have made.

        Raises:
            DecodeError: it holds other blocks than the method sends, or a mask.
        """
        if header.mask is not None:
            raise DecodeError(DecodeReason.METHOD, f"an upload of {self.name} has no mask")
        if header.block_ids != received:
            raise DecodeError(
                DecodeReason.METHOD,
                f"an upload of {self.name} holds {len(header.block_ids)} blocks; "
                f"the {len(received)} of the broadcast were wanted",
            )

    def end(self, memory: Memory, record: RoundRecord) -> Memory:
        """Return what the method remembers once a round has ended."""
        return memory


def all_blocks(schema: ModelSchema) -> tuple[int, ...]:
    """Return the numbers of all blocks."""
    return tuple(range(len(schema.blocks)))


def check_unit(method: Method, schema: ModelSchema) -> None:
    """Raise UsageError where a method on tensors is given larger blocks."""
    for block in schema.blocks if method.unit == "tensor" else ():
        tensors = [schema.tensors[segment.tensor].role for segment in block.segments]
        if tensors.count(Role.PARAMETER) > 1:
            raise UsageError(
                f"{method.name} drops parameter tensors, and block {block.name!r} holds several; "
                "wanted decompose(model, BlockRules(style='tensor'))"
            )
