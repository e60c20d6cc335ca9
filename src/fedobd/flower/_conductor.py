"""Conductor: carries the rounds of a ServerSession over a Grid."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from logging import INFO, WARNING, getLogger

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedobd._errors import DecodeError, UsageError
from fedobd.flower._carrier import (
    BROADCAST,
    EXPIRED,
    KEEP,
    KEPT_ROUND,
    MAX_REASON,
    NEEDS_OPENING,
    OPENING,
    UPLOAD,
    as_array,
    carried,
    carrier,
    carry,
)
from fedobd.flower._exchange import POLL_SECONDS, collect, push
from fedobd.flower._opening import Opening
from fedobd.flower._plan import plan_config
from fedobd.sessions import RoundPlan, RoundRecord, ServerSession
from fedobd.simulation import Watcher

logger = getLogger("flwr")  # where Flower shows what a ServerApp says


class Conductor:
    """Carries the rounds of a session over a grid, one at a time.

    Args:
        grid: how nodes are reached.
        server: the server's session.
        opening: what clients must know of the run.
        round_timeout: seconds after which replies are late.
        poll_seconds: pause between two looks for replies.
        keep_broadcast: have clients keep the round's broadcast, to evaluate it.
        watcher: what else to call.
    """

    def __init__(
        self,
        grid: Grid,
        server: ServerSession,
        opening: Opening,
        *,
        round_timeout: float,
        poll_seconds: float = POLL_SECONDS,
        keep_broadcast: bool = False,
        watcher: Watcher | None = None,
    ) -> None:
        self._grid = grid
        self._server = server
        self._opening = opening
        self._round_timeout = round_timeout
        self._poll_seconds = poll_seconds
        self._keep_broadcast = keep_broadcast
        self._watcher = watcher or Watcher()
        self._opened: set[int] = set()  # nodes that were sent an opening in this run
        self._nodes: dict[int, int] = {}
        self._waiting: set[int] = set()  # clients of the round that have not answered
        self._accepted: list[int] = []
        self._broadcast = b""
        self._sent: dict[str, Message] = {}
        self.left_out: dict[int, str] = {}
        """Why clients of the last round were left out."""
        self.plan: RoundPlan | None = None
        """The plan of the last round that was begun."""
        self.opening_bytes = 0
        """Bytes of all openings that were sent: schema and options, and the method's payloads,
        which alone are in the records."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Wall-clock seconds of the round by phase."""

    def begin(self, nodes: dict[int, int], config: ConfigRecord) -> list[Message]:
        """Begin the next round.

        Args:
            nodes: the node of each client that can be reached.
            config: entries to add to the config that clients get.

        Returns:
            A message for each client of the cohort; all share one broadcast.
        """
        server = self._server
        plan = self.plan = server.begin_round(nodes.keys())
        if plan is None:
            raise UsageError("the last stage is over; there is no round to begin")
        self._nodes = {client: nodes[client] for client in plan.cohort}
        self._waiting, self._accepted, self.left_out = set(plan.cohort), [], {}
        began = time.perf_counter()
        self._broadcast = server.broadcast().data
        self.seconds["broadcast"] += time.perf_counter() - began
        self._see("broadcast", self._broadcast)
        full = ConfigRecord({**config, **plan_config(plan)})
        if self._keep_broadcast:
            full[KEEP] = True
        new = [client for client in plan.cohort if self._nodes[client] not in self._opened]
        plain = RecordDict({"arrays": carry(self._broadcast, BROADCAST), "config": full})
        opened = plain
        if new:
            openings = {
                c: server.initial_payload(c).data for c in new if server.has_initial_payload
            }
            for client, payload in openings.items():
                self._see(f"opening-{client}", payload)
            shared = next(iter(openings.values()), b"")
            opened = RecordDict({"arrays": self._with_opening(shared), "config": full})
        return [
            self._message(client, opened if client in new else plain) for client in plan.cohort
        ]

    def _with_opening(self, payload: bytes) -> ArrayRecord:
        """Return the round's broadcast with an opening beside it that ends with a payload."""
        packed = self._opening.pack(payload)
        return carry(self._broadcast, BROADCAST, as_array(packed, OPENING))

    def _message(self, client: int, content: RecordDict, kind: str = "train") -> Message:
        assert self.plan is not None
        return Message(
            content,
            self._nodes[client],
            kind,
            ttl=self._round_timeout,
            group_id=str(self.plan.round),
        )

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Send messages and yield the replies as they come, until the round's deadline.

        A client that has lost what its opening gave it is sent its message again, with an opening.
        """
        deadline = time.monotonic() + self._round_timeout
        self._sent = self._push(messages)
        pending = set(self._sent)
        began = time.perf_counter()
        for reply in collect(self._grid, pending, deadline, self._poll_seconds):
            self.seconds["wait"] += time.perf_counter() - began
            message = self._sent.get(reply.metadata.reply_to_message_id)
            if message is not None and _has_lost_opening(reply, message):
                again = self._push([self._reopened(message)])
                self._sent.update(again)
                pending.update(again)
            elif message is not None:
                yield reply
            began = time.perf_counter()
        self.seconds["wait"] += time.perf_counter() - began

    def _push(self, messages: Iterable[Message]) -> dict[str, Message]:
        sent = push(self._grid, list(messages))
        for message in sent.values():
            opening = carried(message.content.get("arrays"), OPENING)
            if opening is not None:
                self.opening_bytes += len(opening)
                self._opened.add(message.metadata.dst_node_id)
        return sent

    def _reopened(self, message: Message) -> Message:
        client = self._client_of(message)
        logger.log(INFO, "fedobd: client %d has lost its opening and is sent it again", client)
        again = self._server.resend_initial_payload(client)
        payload = again.data if again else b""
        content = RecordDict({**message.content, "arrays": self._with_opening(payload)})
        return self._message(client, content)

    def _client_of(self, message: Message) -> int:
        node = message.metadata.dst_node_id
        return next(client for client, own in self._nodes.items() if own == node)

    def receive(self, reply: Message) -> int | None:
        """Take in a client's reply to a train message.

        Returns:
            The client, if its upload counts; what does not is recorded with its reason.
        """
        message = self._sent.get(reply.metadata.reply_to_message_id)
        assert self.plan is not None
        if message is None:
            return None
        client = self._client_of(message)
        if client not in self._waiting:
            return None
        self._waiting.remove(client)
        if reply.has_error():
            reason = (reply.error.reason or "no reason")[:MAX_REASON]
            kind = "late" if reply.error.code in EXPIRED else "failed"
            self._miss(client, kind, f"error {reply.error.code}: {reason}")
            return None
        key = carrier(reply.content, UPLOAD)
        if key is None:
            self._miss(client, "failed", "the reply holds no upload")
            return None
        upload = carried(reply.content[key], UPLOAD) or b""
        self._see(f"upload-{client}", upload)
        began = time.perf_counter()
        try:
            self._server.receive(client, upload)
        except DecodeError as error:
            logger.log(WARNING, "fedobd: the upload of client %d is refused: %s", client, error)
            self.left_out[client] = str(error)
            return None
        finally:
            self.seconds["fold"] += time.perf_counter() - began
        self._accepted.append(client)
        if self._watcher.on_client is not None:
            self._watcher.on_client(self.plan, len(self._accepted))
        return client

    def _miss(self, client: int, reason: str, message: str) -> None:
        logger.log(WARNING, "fedobd: client %d is left out: %s", client, message)
        self._server.report_missing(client, reason, message)
        self.left_out[client] = message

    def end(self, min_replies: int) -> RoundRecord | None:
        """End the round, or forget it where it has fewer than `min_replies` uploads."""
        for client in sorted(self._waiting):
            self._miss(client, "late", f"no reply within {self._round_timeout:g} seconds")
        self._waiting = set()
        if len(self._accepted) < min_replies:
            self._server.abort_round()
            return None
        began = time.perf_counter()
        record = self._server.end_round()
        self.seconds["mean"] += time.perf_counter() - began
        return record

    def evaluation(self, config: ConfigRecord) -> list[Message]:
        """Return messages that ask the round's clients to evaluate the broadcast they kept."""
        assert self.plan is not None
        number = self.plan.round
        full = ConfigRecord({**config, "server-round": number, KEPT_ROUND: number})
        content = RecordDict({"config": full})
        return [self._message(client, content, "evaluate") for client in self._accepted]

    def _see(self, name: str, payload: bytes) -> None:
        if self._watcher.on_payload is not None and self.plan is not None:
            self._watcher.on_payload(self.plan.round, name, payload)


def _has_lost_opening(reply: Message, message: Message) -> bool:
    """Whether a client asks for an opening that this message, with a broadcast, did not bring."""
    arrays = message.content.get("arrays")
    return (
        reply.has_error()
        and (reply.error.reason or "").startswith(NEEDS_OPENING)
        and carried(arrays, BROADCAST) is not None
        and carried(arrays, OPENING) is None
    )
