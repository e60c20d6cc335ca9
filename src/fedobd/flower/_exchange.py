"""Exchange: messages go out, replies are handed on as they come, until a deadline."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

POLL_SECONDS = 0.5
"""Pause between two looks for replies; Flower's own grids take 3 seconds."""


def push(grid: Grid, messages: Sequence[Message]) -> dict[str, Message]:
    """Send messages.

    Returns:
        Those that the grid took, by the id under which their replies are asked for.
    """
    if not messages:
        return {}
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
