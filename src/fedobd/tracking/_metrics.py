"""The figures of a run by the names that all trackers, and the command line's JSON, give them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedobd.blocks import ModelSchema, Role

_FLOAT32_BYTES = 4


class RoundMetrics:
    """Turns the records of a run, in their order, into figures by name."""

    def __init__(self) -> None:
        self._uplink_bytes = 0
        self._downlink_bytes = 0

    def add(self, record: Mapping[str, Any]) -> dict[str, float | None]:
        """Return a round's figures; None for what was not measured in it.

        Args:
            record: the round's line of rounds.jsonl.
        """
        self._uplink_bytes += record["uplink_bytes"]
        self._downlink_bytes += record["downlink_bytes"]
        return {
            "test/metric": record["test_metric"],
            "test/loss": record["test_loss"],
            "train/loss": record["train_loss"],
            "validation/metric": record["validation_metric"],
            "validation/loss": record["validation_loss"],
            "traffic/uplink_bytes": self._uplink_bytes,
            "traffic/downlink_bytes": self._downlink_bytes,
            "traffic/total_bytes": self._uplink_bytes + self._downlink_bytes,
            "round/seconds": record["seconds"]["round"],
        }


def flatten(values: Mapping[str, Any], separator: str, prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one, in which `a.b` is the key of b in a (with separator `.`)."""
    return dict(_leaves(values, separator, prefix))


def _leaves(values: Mapping[str, Any], separator: str, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, separator, f"{prefix}{key}{separator}")
        else:
            yield f"{prefix}{key}", value


def float32_bytes(record: Mapping[str, Any], schema: ModelSchema) -> int:
    """Return what a round's payloads would have taken as plain float32, in bytes.

    It is 4 bytes for each value of the model that travels (trainable parameters and buffers),
    times the payloads that were sent: up, every upload that came, refused ones included; down, one
    broadcast to each client of the cohort, and another to each that was sent it again. A payload
    of a part of the blocks, or one that stands for a model that clients hold already, counts as
    the whole model.

    Headers, initial payloads and attempts at a round that were aborted are not in it, though they
    are in the bytes that were really sent: a reduction against it is rather too small than too
    large.

    Args:
        record: the round's line of rounds.jsonl.
        schema: the model's schema.
    """
    values = sum(spec.num_elements for spec in schema.tensors if spec.role is not Role.FROZEN)
    refused = [refusal for refusal in record["refusals"] if refusal["uplink_bytes"]]
    up = len(record["clients"]) + len(refused)
    down = len(record["cohort"]) + len(record["reopened"])
    return _FLOAT32_BYTES * values * (up + down)
