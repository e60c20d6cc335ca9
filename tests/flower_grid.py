"""A Flower grid in this process: any strategy runs against a ClientApp without SuperLink or Ray.

Rules it keeps:

* No clock and no sleep. ``send_and_receive`` counts a pull as ``PULL_INTERVAL_S`` seconds, which
  is what Flower's own grid sleeps between two pulls, so a timeout is a number of pulls.
* With ``serialize=True`` sender and receiver share nothing: a message, its reply and the state of
  a node pass through the ``deflate`` and ``inflate`` of Flower's own objects, the bytes that a
  deployment carries. The classes come from the objects at hand, so that no private module has
  to be imported, and those have moved three times between flwr 1.21 and 1.42.
* What a deployment does in a failure is copied from flwr 1.41.0: error codes, who an error comes
  from, and that a node works through its messages one after another.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

if TYPE_CHECKING:
    from flwr.supercore.run import Run

FIRST_NODE_ID = 1000
"""Node ids are made up, and never small: nobody can mistake them for a position in a list."""

SUPERLINK_NODE_ID = 1
"""The node that messages of a strategy and errors of the SuperLink come from, as in Flower."""

RUN_ID = 4242

PULL_INTERVAL_S = 3.0
"""Seconds that Flower's own grid sleeps between two pulls (flwr 1.41.0, ``HttpGrid``)."""

APP_RAISED, NODE_UNAVAILABLE = 2, 5
"""Codes of ``flwr.common.constant.ErrorCode`` (flwr 1.41.0), which is private."""

Handler = Callable[[Message, Context], Message]
_T = TypeVar("_T", Message, RecordDict)
_Carried = tuple[Message, int]


class InProcessGrid(Grid):
    """Hand messages to a ClientApp in this process and keep its replies until they are pulled.

    A message is handled when it is pushed, or, of a silent node, at the first push or pull after
    the node has spoken up again. The attributes below may be changed at any time.

    Args:
        app: What handles a message, for all nodes.
        node_configs: One mapping a node, such as ``{"partition-id": 0}``; node ``i`` has the id
            ``1000 + i``.
        run_config: The run's configuration, the same for all nodes.
        serialize: Whether messages pass through Flower's serialization. Without it the records of
            a message are handed over as they are, in a RecordDict of the receiver's own, since
            FedAvg gives one and the same RecordDict to all messages of a round.

    Attributes:
        offline: Nodes that are not listed, and whose messages are answered by the SuperLink with
            error 5.
        silent: Nodes that accept messages and answer none until they are taken out again.
        late: Of a node, the number of pulls asking for a reply that do not get it;
            ``math.inf`` for never, until ``release``. It is read when a message is handled.
        tamper: Changes a reply on its way to the server, after the client's bytes were counted.
        sent: The messages pushed, in order, as they were then.
        replies: The replies handed out by ``pull_messages``, in order, as they were then.
        misaddressed: Replies that name another message than the one they answer. They are handed
            out, but a SuperLink would drop them: flwr 1.41.0's clipping mods make such errors.
        bytes_down: Bytes of the objects of all messages that reached a node, each object counted
            once a message; 0 without serialization.
        bytes_up: The same of the replies that nodes sent.
    """

    def __init__(
        self,
        app: ClientApp | Handler,
        node_configs: Sequence[Mapping[str, Any]],
        run_config: Mapping[str, Any] | None = None,
        *,
        serialize: bool = True,
    ) -> None:
        become_server_app()
        self.offline: set[int] = set()
        self.silent: set[int] = set()
        self.late: dict[int, float] = {}
        self.tamper: Callable[[Message], Message] | None = None
        self.sent: list[Message] = []
        self.replies: list[Message] = []
        self.misaddressed: list[Message] = []
        self.bytes_down = 0
        self.bytes_up = 0
        self.contexts = {
            node_id: Context(
                run_id=RUN_ID,
                node_id=node_id,
                node_config=dict(config),
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for node_id, config in enumerate(node_configs, FIRST_NODE_ID)
        }
        self._app = app
        self._serialize = serialize
        self._run: Run | None = None
        self._receiver_of: dict[str, int] = {}
        self._inbox: dict[int, deque[_Carried]] = {node_id: deque() for node_id in self.contexts}
        self._arrived: dict[str, Message] = {}
        self._pulls_left: dict[str, float] = {}

    # ---- Flower's interface

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        if self._run is None:
            raise RuntimeError("no run was set")
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        return [node_id for node_id in self.contexts if node_id not in self.offline]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take messages to their nodes.

        As in Flower, the id of a message is set on the caller's own object.

        Raises:
            ValueError: A message goes to a node that does not exist.
        """
        ids = []
        for message in messages:
            node_id = message.metadata.dst_node_id
            if node_id not in self._inbox:
                raise ValueError(f"no node {node_id}; the nodes are {list(self._inbox)}")
            message_id = f"{len(self._receiver_of):064x}"
            self._receiver_of[message_id] = node_id
            _set_metadata(
                message, message_id=message_id, run_id=RUN_ID, src_node_id=SUPERLINK_NODE_ID
            )
            self.sent.append(_snapshot(message))
            # serialized at once: what the caller does to its message later changes nothing
            self._inbox[node_id].append(self._carry(message))
            ids.append(message_id)
        self._work()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Hand out the replies to these messages that have arrived, each one once."""
        return list(self._pull(message_ids).values())

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Push messages and pull until all replies are there or the timeout, in seconds, is over.

        Raises:
            RuntimeError: There is no timeout, and a reply that never comes.
        """
        awaited = self.push_messages(messages)
        received: list[Message] = []
        elapsed_s = 0.0
        while awaited and (timeout is None or elapsed_s < timeout):
            pulled = self._pull(awaited)
            received += pulled.values()
            awaited = [message_id for message_id in awaited if message_id not in pulled]
            if timeout is None and awaited and not any(map(self._can_arrive, awaited)):
                raise RuntimeError(f"{len(awaited)} replies never come, and there is no timeout")
            elapsed_s += PULL_INTERVAL_S
        return received

    # ---- What a test does to the nodes

    def release(self, node_id: int | None = None) -> None:
        """Let the late replies of a node, or of all nodes, be there at the next pull."""
        for message_id in list(self._pulls_left):
            if node_id in (None, self._receiver_of[message_id]):
                del self._pulls_left[message_id]

    def forget(self, node_id: int) -> None:
        """Drop the state of a node, as a SuperNode that is started again does."""
        self.contexts[node_id].state = RecordDict()

    # ---- The nodes and the way to them

    def _work(self) -> None:
        """Let each node that speaks handle the messages that wait for it, in their order."""
        for node_id, inbox in self._inbox.items():
            while inbox and (node_id in self.offline or node_id not in self.silent):
                message, num_bytes = inbox.popleft()
                if node_id in self.offline:
                    reply = _node_unavailable(message)
                else:
                    self.bytes_down += num_bytes
                    reply, num_bytes = self._carry(self._handle(message))
                    self.bytes_up += num_bytes
                    if self.late.get(node_id, 0) > 0:
                        self._pulls_left[message.metadata.message_id] = self.late[node_id]
                if self.tamper is not None:
                    reply = self.tamper(reply)
                self._arrived[message.metadata.message_id] = reply

    def _handle(self, message: Message) -> Message:
        kept = self.contexts[message.metadata.dst_node_id]
        context = kept
        if self._serialize:  # a deployed app gets its context anew with each message
            context = copy.copy(kept)
            context.node_config = dict(kept.node_config)
            context.run_config = dict(kept.run_config)
            context.state, _ = _through_flower(kept.state)
        try:
            reply = self._app(message, context)
        except Exception as error:  # Flower answers for whatever an app raises
            reason = f"{type(error)}:<'{error}'>"
            reply = Message(Error(code=APP_RAISED, reason=reason), reply_to=message)
        if self._serialize:  # after an error too: Flower keeps what was written before it
            kept.state, _ = _through_flower(context.state)
        return reply

    def _carry(self, message: Message) -> _Carried:
        """Return the message as its receiver gets it, and its size in bytes."""
        if not self._serialize:
            return _with_own_content(message), 0
        twin, num_bytes = _through_flower(message)
        # Flower's serialization leaves the id out: it is made from the bytes
        _set_metadata(twin, message_id=message.metadata.message_id)
        return twin, num_bytes

    def _pull(self, message_ids: Iterable[str]) -> dict[str, Message]:
        """Return the replies that have arrived by the id of the message they answer."""
        self._work()
        pulled = {}
        for message_id in list(message_ids):
            if message_id not in self._arrived:
                continue
            if self._pulls_left.get(message_id, 0) > 0:
                self._pulls_left[message_id] -= 1
                continue
            self._pulls_left.pop(message_id, None)
            reply = self._arrived.pop(message_id)
            if reply.metadata.reply_to_message_id != message_id:
                self.misaddressed.append(reply)
            self.replies.append(_snapshot(reply))
            pulled[message_id] = reply
        return pulled

    def _can_arrive(self, message_id: str) -> bool:
        return message_id in self._arrived and self._pulls_left.get(message_id, 0) < math.inf


def become_server_app() -> None:
    """Make this process one that may create messages, as a running ServerApp is.

    From flwr 1.38 on (1.37 needs nothing), ``Message(...)`` takes the run and the node it is
    sent from out of a private global of the process.
    """
    try:
        module = importlib.import_module("flwr.supercore.task_identity")
    except ModuleNotFoundError:
        return
    identity = module.TaskIdentity
    identity.task_id, identity.run_id, identity.node_id = 1, RUN_ID, SUPERLINK_NODE_ID


def _node_unavailable(message: Message) -> Message:
    """Return the SuperLink's answer for a node; it does not name the node it is about."""
    reason = "Node Unavailable - The destination node failed to report a heartbeat."
    reply = Message(Error(code=NODE_UNAVAILABLE, reason=reason), reply_to=message)
    _set_metadata(reply, src_node_id=SUPERLINK_NODE_ID, dst_node_id=SUPERLINK_NODE_ID)
    return reply


def _set_metadata(message: Message, **values: object) -> None:
    """Set what has no public setter, the way Flower's own grids do."""
    message.metadata.__dict__.update({f"_{name}": value for name, value in values.items()})


def _with_own_content(message: Message) -> Message:
    """Return a message with metadata and a RecordDict of its own, and the same records."""
    twin = copy.copy(message)
    twin.__dict__["_metadata"] = copy.copy(message.metadata)
    if message.has_content():
        twin.content = RecordDict(dict(message.content))
    return twin


def _snapshot(message: Message) -> Message:
    """Return a message that later changes to the original's records leave alone.

    FedAvg writes the round into one and the same ConfigRecord. The arrays are shared: they are
    large, and nothing in Flower writes into one.
    """
    twin = _with_own_content(message)
    for key, record in twin.content.items() if twin.has_content() else ():
        make: Any = type(record)
        twin.content[key] = make(dict(record))
    return twin


def _through_flower(item: _T) -> tuple[_T, int]:
    """Return what a receiver makes of the bytes of an object, and the bytes of all its parts."""
    sizes_bytes: dict[str, int] = {}
    return _reinflate(item, sizes_bytes), sum(sizes_bytes.values())


def _reinflate(item: Any, sizes_bytes: dict[str, int]) -> Any:
    if not type(item).__module__.startswith("flwr."):
        name = type(item).__qualname__
        raise TypeError(f"a receiver looks classes up by name, and Flower has no {name}")
    children = {
        object_id: _reinflate(child, sizes_bytes)
        for object_id, child in (item.children or {}).items()
    }
    content = item.deflate()
    sizes_bytes[hashlib.sha256(content).hexdigest()] = len(content)
    return type(item).inflate(content, children)
