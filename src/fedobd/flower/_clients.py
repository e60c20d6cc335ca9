"""Clients: who a node says it is, and which nodes of a run can take part.

A node's own id is a random number of Flower's; a client is known by the number that its operator
gives it in the node config.
"""

from __future__ import annotations

import time
from logging import INFO, WARNING, getLogger

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid

from fedobd._errors import FedOBDError
from fedobd.flower._messages import IDENTIFY, PASSING_ERRORS, POLL_SECONDS, push, reason_of
from fedobd.payload import VERSION

logger = getLogger("flwr")  # where Flower shows what a ServerApp says

IDENTIFY_SECONDS = 120.0
"""How long a new node may take to say who it is; it is asked again afterwards."""


def client_id(context: Context) -> int | None:
    """Return the node config's `client-id`, else its `partition-id`, None without both."""
    for key in ("client-id", "partition-id"):
        if key in context.node_config:
            value = context.node_config[key]
            # Flower reads a node config as TOML: a number may come as text, as 3.0, nan or true
            if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
                return None
            try:
                return int(value)
            except ValueError:
                return None
    return None


def introduce(request: Message, context: Context, *, has_model: bool) -> Message:
    """Return a node's answer to a server that asks who it is.

    Args:
        request: the server's message.
        context: the node's.
        has_model: whether its mod can make the initial model.
    """
    record = ConfigRecord({"format": VERSION, "has-model": has_model})
    client = client_id(context)
    if client is not None:
        record["client-id"] = client
    return Message(RecordDict({IDENTIFY: record}), reply_to=request)


def read_client(answer: Message, num_clients: int, *, wants_model: bool) -> int | str:
    """Return which client a node is by its answer, or in words why it cannot take part."""
    if answer.has_error():
        return (
            f"it answered with error {answer.error.code}, {reason_of(answer)!r}; does its "
            "ClientApp have mods=[fedobd.flower.CompressionMod()]?"
        )
    record = answer.content.config_records.get(IDENTIFY)
    if record is None:
        return "its answer holds no identity; does its ClientApp have CompressionMod first?"
    client, version = record.get("client-id"), record.get("format")
    if not isinstance(version, int) or not (client is None or type(client) is int):
        return "its answer holds no identity that this version understands"
    if version != VERSION:
        return (
            f"it reads payload format {version}, this server {VERSION}; install the same fedobd "
            "on both"
        )
    if client is None:
        return "its node config gives neither client-id nor partition-id as a whole number"
    if not 0 <= client < num_clients:
        return f"its client-id is {client}; allowed are 0 to {num_clients - 1}"
    if wants_model and not record.get("has-model"):
        return (
            "this run starts from a model that clients hold already (shared_start), and its mod "
            "has no model; wanted CompressionMod(model_factory=...)"
        )
    return client


class ClientRegistry:
    """The nodes of a run that can take part.

    Args:
        grid: how nodes are reached.
        num_clients: how many clients the run has.
        wants_model: whether their mods must have a model.
        poll_seconds: pause between two looks for replies.
    """

    def __init__(
        self,
        grid: Grid,
        num_clients: int,
        *,
        wants_model: bool = False,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self._grid = grid
        self._num_clients = num_clients
        self._wants_model = wants_model
        self._poll_seconds = poll_seconds
        self._clients: dict[int, int] = {}  # of each node that said who it is, first ones first
        self._asked: dict[str, tuple[int, float]] = {}  # message: node, until when
        # Nodes in _clients that were not online at the last look. They are not forgotten: Flower
        # lists a node whose heartbeats were late again, under the same id.
        self._away: set[int] = set()
        self.refused: dict[int, str] = {}
        """Nodes that cannot take part, with the reason."""

    def online(self) -> dict[int, int]:
        """Return the node of each client that can be reached.

        New nodes are asked who they are, and count once they have answered; nobody waits for them
        here. A node that was away is asked again, and counts meanwhile as what it was. Of two
        nodes with one client-id the first keeps it for as long as it is online; until then the
        other is refused.
        """
        present = list(self._grid.get_node_ids())
        returned = self._away.intersection(present)
        self._away = set(self._clients).difference(present)
        for node in set(self.refused).difference(present):
            del self.refused[node]
        for node in self._away:
            if any(self._clients.get(other) == self._clients[node] for other in present):
                del self._clients[node]  # another node is its client now
        known = {*self._clients, *self.refused} - returned
        self._ask([node for node in present if node not in known])
        self._listen()
        self._away.intersection_update(self._clients)
        nodes: dict[int, int] = {}
        for node, client in self._clients.items():
            if node in self._away:
                continue
            first = nodes.setdefault(client, node)
            if first == node:
                self.refused.pop(node, None)
            else:
                self._refuse(node, f"its client-id {client} is that of node {first}")
        return nodes

    def gather(self, wanted: int, least: int, seconds: float) -> dict[int, int]:
        """Wait until enough clients can be reached.

        Args:
            wanted: how many to wait for.
            least: with how many to go on when the time is over.
            seconds: how long to wait.

        Raises:
            FedOBDError: fewer than `least` can be reached when the time is over; the message says
                which nodes were refused, and why.
        """
        deadline = time.monotonic() + seconds
        told = -1
        while True:
            nodes = self.online()
            if len(nodes) >= wanted:
                return nodes
            if time.monotonic() >= deadline:
                break
            if len(nodes) != told:
                told = len(nodes)
                logger.log(INFO, "fedobd: %d of %d clients are online", told, wanted)
            time.sleep(self._poll_seconds)
        if len(nodes) >= least:
            return nodes
        refused = "; ".join(f"node {node}: {reason}" for node, reason in self.refused.items())
        raise FedOBDError(
            f"{len(nodes)} clients are online after {seconds:.0f} s; wanted at least {least}"
            + (f". Refused: {refused}" if refused else "")
        )

    def _ask(self, nodes: list[int]) -> None:
        """Ask nodes who they are, but those that are being asked."""
        now = time.monotonic()
        self._asked = {m: (node, until) for m, (node, until) in self._asked.items() if until > now}
        asked = {node for node, _ in self._asked.values()}
        content = RecordDict({IDENTIFY: ConfigRecord({"num-clients": self._num_clients})})
        messages = [
            Message(content, node, "train", ttl=IDENTIFY_SECONDS)
            for node in nodes
            if node not in asked
        ]
        for number, message in push(self._grid, messages).items():
            self._asked[number] = message.metadata.dst_node_id, now + IDENTIFY_SECONDS

    def _listen(self) -> None:
        """Take in what nodes have answered so far, in the order in which they were asked."""
        if not self._asked:
            return
        came = {
            r.metadata.reply_to_message_id: r for r in self._grid.pull_messages([*self._asked])
        }
        for number, (node, _) in list(self._asked.items()):
            if number in came:
                del self._asked[number]
                self._enter(node, came[number])

    def _enter(self, node: int, answer: Message) -> None:
        if answer.has_error() and answer.error.code in PASSING_ERRORS:
            return  # the question did not reach it, or it went away meanwhile: it is asked again
        client = read_client(answer, self._num_clients, wants_model=self._wants_model)
        if isinstance(client, str):
            self._clients.pop(node, None)
            self._refuse(node, client)
        else:
            self._clients[node] = client
            logger.log(INFO, "fedobd: node %d is client %d", node, client)

    def _refuse(self, node: int, reason: str) -> None:
        if node not in self.refused:
            logger.log(WARNING, "fedobd: node %d is refused: %s", node, reason)
        self.refused[node] = reason
