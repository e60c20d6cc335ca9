"""The methods: FedOBD and the four baselines that the paper compares it with.

A further method is one module here and one line in `METHODS`.
"""

from __future__ import annotations

from fedobd._errors import UsageError
from fedobd.methods._codec import Codec, QuantizerName, SelectionName, check_dropout_rate
from fedobd.methods.fedavg import FedAvg
from fedobd.methods.feddropoutavg import FedDropoutAvg
from fedobd.methods.fedobd import FedOBD
from fedobd.methods.fedpaq import FedPAQ
from fedobd.methods.smafd import SMAFD
from fedobd.sessions import Method

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (FedOBD, FedAvg, FedPAQ, FedDropoutAvg, SMAFD)
}
"""Every method by name."""


def method_of_wire_id(wire_id: int) -> type[Method]:
    """Return the method with a number in the payload format.

    Raises:
        UsageError: there is none.
    """
    for method in METHODS.values():
        if method.wire_id == wire_id:
            return method
    raise UsageError(f"no method has the number {wire_id} in the payload format")


__all__ = [
    "METHODS",
    "SMAFD",
    "Codec",
    "FedAvg",
    "FedDropoutAvg",
    "FedOBD",
    "FedPAQ",
    "QuantizerName",
    "SelectionName",
    "check_dropout_rate",
    "method_of_wire_id",
]
