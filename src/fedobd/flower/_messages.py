"""Messages: how payloads, a round's plan and replies ride in Flower's messages.

Each payload is one Array with a serialization type of its own. Nothing between the two ends looks
into it. A client without `CompressionMod` that tries to read one gets Flower's own error on an
unknown serialization type.

Why one Array, and not bytes in a ConfigRecord or an Array a layer (flwr 1.41): Flower cuts an
Array into chunks, but a ConfigRecord becomes one protobuf message, which is serialized several
times and fails above 2 GB; and each Array costs an HTTP request in each direction.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedobd._errors import UsageError
from fedobd.sessions import RoundPlan

BROADCAST: Final = "fedobd.broadcast"
HANDSHAKE: Final = "fedobd.opening"
UPLOAD: Final = "fedobd.upload"
STATE: Final = "fedobd.state"
"""Serialization types of Arrays; `HANDSHAKE` and `STATE` are also keys in `context.state`."""

IDENTIFY: Final = "fedobd.identify"
"""Key of the record by which a server asks a node who it is, and of the answer."""

KEPT_ROUND: Final = "fedobd.kept-round"
"""Config key of a message without arrays: evaluate what you received in this round."""

KEEP: Final = "fedobd.keep"
"""Config key that asks a client to keep the round's broadcast for such an evaluation."""

NEEDS_HANDSHAKE: Final = "fedobd: this node holds no opening payload of this run"
"""Start of the reason with which a client says that it needs a handshake; part of the protocol."""

MAX_REASON: Final = 2000
"""Characters of a client's own words that are kept."""

# Codes of flwr.common.constant.ErrorCode (flwr 1.42), which is private.
PASSING_ERRORS: Final = (3, 4, 5, 8)
"""Flower's error codes of messages that did not come through, and of nodes that went away."""

EXPIRED: Final = (3, 4)
"""Flower's error codes of a message, or a reply, that was not there within its time to live."""

PRECONDITION_FAILED: Final = 6
"""Flower's error code of a mod that cannot do its work."""

POLL_SECONDS: Final = 0.5
"""Pause between two looks for replies; Flower's own grids take 3 seconds."""

_PLAN_KEYS = {
    "round": "server-round",
    "stage": "stage",
    "epochs": "epochs",
    "schedule_start": "schedule-start",
    "schedule_epochs": "schedule-epochs",
    "run_start": "run-start",
    "run_epochs": "run-epochs",
}


def carry(payload: bytes, kind: str, handshake: Array | None = None) -> ArrayRecord:
    """Return the record that carries a payload of a kind such as `BROADCAST`.

    Args:
        payload: the payload.
        kind: its serialization type.
        handshake: an Array of kind `HANDSHAKE` to go with it. It shares the record, since
            Flower's mods want messages of one ArrayRecord.
    """
    record = ArrayRecord({"payload": as_array(payload, kind)})
    if handshake is not None:
        record["opening"] = handshake
    return record


def as_array(payload: bytes, kind: str) -> Array:
    """Return a payload as an Array of a kind; `bytes` alone are taken by Flower."""
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


def reason_of(reply: Message) -> str:
    """Return the reason of an error reply: as much of a client's own words as is kept."""
    return (reply.error.reason or "")[:MAX_REASON]


def refusal(reason: str, message: Message) -> Message:
    """Return an error reply to a message."""
    return Message(Error(PRECONDITION_FAILED, reason), reply_to=message)


def plan_config(plan: RoundPlan) -> dict[str, Any]:
    """Return the entries that tell a client of the round; `server-round` is Flower's own name."""
    return {key: getattr(plan, name) for name, key in _PLAN_KEYS.items()}


def read_plan(config: ConfigRecord, client: int) -> RoundPlan:
    """Return the plan that a config tells of, with this client as the cohort.

    Raises:
        UsageError: an entry lacks or is no whole number.
    """
    values: dict[str, int] = {}
    for name, key in _PLAN_KEYS.items():
        value = config.get(key)
        if not isinstance(value, int):
            raise UsageError(f"the config of the message has {key} = {value!r}; wanted a number")
        values[name] = value
    return RoundPlan(cohort=(client,), **values)


def push(grid: Grid, messages: Sequence[Message]) -> dict[str, Message]:
    """Send messages.

    Returns:
        Those that the grid took, by the id under which their replies are asked for.
    """
    if not messages:
        return {}
    # An id is a hash of the message, made in here; and where messages are too large, Flower's
    # grid logs that and returns fewer ids, or none (flwr 1.41).
    ids = grid.push_messages(messages)
    return {number: message for number, message in zip(ids, messages, strict=False) if number}


def collect(
    grid: Grid, pending: set[str], deadline: float | None, poll_seconds: float = POLL_SECONDS
) -> Iterator[Message]:
    """Yield the replies to messages as they come.

    Args:
        grid: where they come in.
        pending: ids of the messages; each is taken out when its reply has come, and others may be
            added meanwhile.
        deadline: until when, on the clock of `time.monotonic`; None for as long as it takes.
        poll_seconds: pause between two looks.
    """
    while pending:
        came = list(grid.pull_messages(list(pending)))
        for reply in came:
            pending.discard(reply.metadata.reply_to_message_id)
            yield reply
        if deadline is not None and time.monotonic() >= deadline:
            return
        if pending and not came:
            left = poll_seconds if deadline is None else deadline - time.monotonic()
            time.sleep(max(0.0, min(poll_seconds, left)))
