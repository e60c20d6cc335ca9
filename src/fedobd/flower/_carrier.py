"""How payloads ride in Flower's messages: each is one Array with a serialization type of its own.

Nothing between the two ends looks into it. A client without `CompressionMod` that tries to read
one gets Flower's own error on an unknown serialization type.
"""

from __future__ import annotations

from typing import Final

from flwr.app import Array, ArrayRecord, Error, Message, RecordDict

BROADCAST: Final = "fedobd.broadcast"
OPENING: Final = "fedobd.opening"
UPLOAD: Final = "fedobd.upload"
STATE: Final = "fedobd.state"
"""Serialization types of Arrays; `OPENING` and `STATE` are also keys in `context.state`."""

IDENTIFY: Final = "fedobd.identify"
"""Key of the record by which a server asks a node who it is, and of the answer."""

KEPT_ROUND: Final = "fedobd.kept-round"
"""Config key of a message without arrays: evaluate what you received in this round."""

KEEP: Final = "fedobd.keep"
"""Config key that asks a client to keep the round's broadcast for such an evaluation."""

NEEDS_OPENING: Final = "fedobd: this node holds no opening payload of this run"
"""Start of the reason with which a client says that it has to be opened again."""

MAX_REASON: Final = 2000
"""Characters of a client's own words that are kept."""

PASSING_ERRORS: Final = (3, 4, 5, 8)
"""Flower's error codes of messages that did not come through, and of nodes that went away."""

EXPIRED: Final = (3, 4)
"""Flower's error codes of a message, or a reply, that was not there within its time to live."""

PRECONDITION_FAILED: Final = 6
"""Flower's error code of a mod that cannot do its work."""


def carry(payload: bytes, kind: str, opening: Array | None = None) -> ArrayRecord:
    """Return the record that carries a payload of a kind such as `BROADCAST`.

    Args:
        payload: the payload.
        kind: its serialization type.
        opening: an Array of kind `OPENING` to go with it. It shares the record, since Flower's
            mods want messages of one ArrayRecord.
    """
    record = ArrayRecord({"payload": as_array(payload, kind)})
    if opening is not None:
        record["opening"] = opening
    return record


def as_array(payload: bytes, kind: str) -> Array:
    """Return a payload as an Array of a kind."""
    return Array("uint8", (len(payload),), kind, payload)


def carried(record: object, kind: str) -> bytes | None:
    """Return the payload of this kind that a record carries, None if it carries none."""
    if isinstance(record, ArrayRecord):
        for array in record.values():
            if array.stype == kind:
                return array.data
    return None


def carrier(content: RecordDict, kind: str) -> str | None:
    """Return the key of the record that carries a payload of this kind, None without one."""
    return next(
        (k for k, r in content.array_records.items() if carried(r, kind) is not None), None
    )


def refusal(reason: str, message: Message) -> Message:
    """Return an error reply to a message."""
    return Message(Error(PRECONDITION_FAILED, reason), reply_to=message)
