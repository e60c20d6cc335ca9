"""Identity: which client of the run a node is.

A node's own id is a random number of Flower's; a client is known by the number that its operator
gives it in the node config.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedobd.flower._carrier import IDENTIFY, MAX_REASON, PASSING_ERRORS
from fedobd.payload import VERSION


def client_id(context: Context) -> int | None:
    """Return the node config's `client-id`, else its `partition-id`, None without both."""
    for key in ("client-id", "partition-id"):
        if key in context.node_config:
            value = context.node_config[key]
            if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
                return None
            try:
                return int(value)
            except ValueError:
                return None
    return None


@dataclass(frozen=True, slots=True)
class Identity:
    """What a node says of itself.

    Args:
        client: its number; None where its config gives none.
        format: the version of the payload format that it reads.
        has_model: whether its mod was given a model factory.
    """

    client: int | None
    format: int
    has_model: bool

    @classmethod
    def of(cls, context: Context, *, has_model: bool) -> Identity:
        """Return the identity of the node that a context belongs to."""
        return cls(client_id(context), VERSION, has_model)

    def reply(self, request: Message) -> Message:
        """Return the answer to a server that asks."""
        record = ConfigRecord({"format": self.format, "has-model": self.has_model})
        if self.client is not None:
            record["client-id"] = self.client
        return Message(RecordDict({IDENTIFY: record}), reply_to=request)

    @classmethod
    def read(cls, reply: Message) -> Identity | str | None:
        """Return what a node has answered, or in words why that is no identity.

        None where the question did not reach it, or it went away meanwhile.
        """
        if reply.has_error() and reply.error.code in PASSING_ERRORS:
            return None
        if reply.has_error():
            reason = (reply.error.reason or "")[:MAX_REASON]
            return (
                f"it answered with error {reply.error.code}, {reason!r}; does its "
                "ClientApp have mods=[fedobd.flower.CompressionMod()]?"
            )
        record = reply.content.config_records.get(IDENTIFY)
        if record is None:
            return "its answer holds no identity; does its ClientApp have CompressionMod first?"
        client, form, model = (record.get(key) for key in ("client-id", "format", "has-model"))
        if not isinstance(form, int) or not (client is None or type(client) is int):
            return "its answer holds no identity that this version understands"
        return cls(client, form, bool(model))

    def objection(self, num_clients: int, *, wants_model: bool) -> str | None:
        """Return in words why the node cannot take part, None where it can."""
        checks: tuple[tuple[Callable[[], bool], str], ...] = (
            (
                lambda: self.format == VERSION,
                f"it reads payload format {self.format}, this server {VERSION}; install the same "
                "fedobd on both",
            ),
            (
                lambda: self.client is not None,
                "its node config gives neither client-id nor partition-id as a whole number",
            ),
            (
                lambda: self.client is not None and 0 <= self.client < num_clients,
                f"its client-id is {self.client}; allowed are 0 to {num_clients - 1}",
            ),
            (
                lambda: self.has_model or not wants_model,
                "this run starts from a model that clients hold already (shared_start), and its "
                "mod has no model; wanted CompressionMod(model_factory=...)",
            ),
        )
        return next((reason for holds, reason in checks if not holds()), None)
