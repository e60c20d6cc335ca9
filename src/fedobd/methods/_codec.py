"""Codec: the options that say how states become bytes, apart from when and by whom.

The defaults are FedOBD's with the published λ and β of the large-scale CIFAR experiments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fedobd._errors import UsageError, check_choice
from fedobd._seeds import make_generator
from fedobd.blocks import ModelSchema
from fedobd.codec import NNADQ, Quantizer, Stochastic, Unquantized, check_positive
from fedobd.sessions import fill_budget, order_by_difference, parameter_budget, random_order

QuantizerName = Literal["nnadq", "stochastic", "none"]
SelectionName = Literal["mbd", "random", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """How states become bytes.

    Args:
        uplink_quantizer: `"nnadq"`, `"stochastic"` or `"none"` for what clients send.
        downlink_quantizer: the same for what the server sends.
        uplink_weight: β of NNADQ for what clients send, above 0.
        downlink_weight: β of NNADQ for what the server sends, above 0.
        stochastic_levels: s of stochastic quantization, from 1 to 2^22.
        selection: `"mbd"` uploads the blocks with the largest mean block difference, `"random"`
            blocks drawn at random, `"none"` all blocks.
        dropout_rate: λ in [0, 1): at most (1 - λ)·|W| parameters are uploaded where blocks are
            selected.
        bound_norm: shrink what clients send where needed, so that quantization raises the L2 norm
            of no tensor's difference: clip norms of differential privacy then hold. Not with
            stochastic rounding, which has no such bound.

    Raises:
        UsageError: a value is outside what is allowed.
    """

    uplink_quantizer: QuantizerName = "nnadq"
    downlink_quantizer: QuantizerName = "nnadq"
    uplink_weight: float = 1e-3
    downlink_weight: float = 1e-3
    stochastic_levels: int = 255
    selection: SelectionName = "mbd"
    dropout_rate: float = 0.3
    bound_norm: bool = False

    def __post_init__(self) -> None:
        check_choice("uplink_quantizer", self.uplink_quantizer, get_args(QuantizerName))
        check_choice("downlink_quantizer", self.downlink_quantizer, get_args(QuantizerName))
        check_positive("uplink_weight", self.uplink_weight)
        check_positive("downlink_weight", self.downlink_weight)
        Stochastic(self.stochastic_levels)
        check_choice("selection", self.selection, get_args(SelectionName))
        check_dropout_rate(self.dropout_rate)
        if self.bound_norm and self.uplink_quantizer == "stochastic":
            raise UsageError(
                "bound_norm is set, and uplink_quantizer is 'stochastic', whose rounding raises "
                "norms at random; wanted 'nnadq' or 'none'"
            )

    @property
    def uplink(self) -> Quantizer:
        """The quantizer of what clients send."""
        return self._quantizer(self.uplink_quantizer, self.uplink_weight)

    @property
    def downlink(self) -> Quantizer:
        """The quantizer of what the server sends."""
        return self._quantizer(self.downlink_quantizer, self.downlink_weight)

    def _quantizer(self, name: QuantizerName, weight: float) -> Quantizer:
        if name == "nnadq":
            return NNADQ(weight)
        return Stochastic(self.stochastic_levels) if name == "stochastic" else Unquantized()

    def budget(self, schema: ModelSchema) -> int:
        """Return the most parameters that an upload may hold where blocks are selected."""
        if self.selection == "none":
            return schema.num_parameters
        return parameter_budget(schema.num_parameters, self.dropout_rate)

    def select(
        self, schema: ModelSchema, differences: tuple[float, ...], seed: int
    ) -> tuple[int, ...]:
        """Return the blocks to upload, ascending, by mean block differences or a random seed."""
        if self.selection == "random":
            order = random_order(len(schema.blocks), make_generator(seed, "blocks"))
        else:
            order = order_by_difference(differences)
        return fill_budget(schema, order, self.budget(schema))


def check_dropout_rate(rate: float) -> None:
    """Raise UsageError unless λ is in [0, 1)."""
    if not 0 <= rate < 1:
        raise UsageError(f"dropout_rate λ is {rate}; allowed are 0 <= λ < 1")
