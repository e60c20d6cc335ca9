"""Roster: which node plays which client, asked when a node first appears."""

from __future__ import annotations

import time
from logging import INFO, WARNING, getLogger

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedobd._errors import FedOBDError
from fedobd.flower._carrier import IDENTIFY
from fedobd.flower._exchange import POLL_SECONDS, push
from fedobd.flower._identity import Identity

logger = getLogger("flwr")  # where Flower shows what a ServerApp says

IDENTIFY_SECONDS = 120.0
"""How long a new node may take to say who it is; it is asked again afterwards."""


class Roster:
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
        self._away: set[int] = set()  # nodes in _clients that were not online at the last look
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
                del self._clients[node]  # another one plays its client now
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
                self._enter(node, Identity.read(came[number]))

    def _enter(self, node: int, identity: Identity | str | None) -> None:
        if identity is None:
            return  # it is asked again
        if isinstance(identity, str):
            self._clients.pop(node, None)
            self._refuse(node, identity)
            return
        objection = identity.objection(self._num_clients, wants_model=self._wants_model)
        if objection is not None or identity.client is None:
            self._clients.pop(node, None)
            self._refuse(node, objection or "")
        else:
            self._clients[node] = identity.client
            logger.log(INFO, "fedobd: node %d is client %d", node, identity.client)

    def _refuse(self, node: int, reason: str) -> None:
        if node not in self.refused:
            logger.log(WARNING, "fedobd: node %d is refused: %s", node, reason)
        self.refused[node] = reason
