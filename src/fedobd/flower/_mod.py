"""CompressionMod: the client's side, around an ordinary Flower train function."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from flwr.app import Context, Message, RecordDict
from safetensors.torch import load, save
from torch import nn

from fedobd._errors import FedOBDError, UsageError
from fedobd.blocks import ModelState
from fedobd.flower._carrier import (
    BROADCAST,
    IDENTIFY,
    KEEP,
    KEPT_ROUND,
    NEEDS_OPENING,
    OPENING,
    STATE,
    UPLOAD,
    carried,
    carrier,
    carry,
    refusal,
)
from fedobd.flower._identity import Identity, client_id
from fedobd.flower._opening import MetricKeys, Opening
from fedobd.methods import FedOBD
from fedobd.payload import Report
from fedobd.sessions import Broadcast, ClientSession, Method

CLIPPING_NORM = "clipping_norm"
"""Config key by which Flower's strategies for differential privacy give clients a clip norm."""

_KEPT_BROADCAST = "fedobd.kept-broadcast"  # key in context.state
_PRIVACY_MODS = ("centraldp_mods", "localdp_mod")  # Flower's modules

ClientFunction = Callable[[Message, Context], Message]


class CompressionMod:
    """Lets a Flower client receive and send compressed payloads.

    The train function gets and returns ordinary ArrayRecords; `ClientApp(mods=[CompressionMod()])`
    is all that changes. It must stand outside every mod that looks at arrays; those of
    differential privacy belong to the train function: `@app.train(mods=[fixedclipping_mod])`.

    What must last from message to message (the opening; frozen tensors; for some methods the last
    model) lies in `context.state`, since each message may be handled by a new process.

    Args:
        model_factory: makes the initial model, the same on server and clients, for runs with a
            shared start; not needed otherwise.
    """

    def __init__(self, model_factory: Callable[[], nn.Module] | None = None) -> None:
        self._model_factory = model_factory

    def __call__(self, message: Message, context: Context, call_next: ClientFunction) -> Message:
        """Handle a message; what is not for fedobd goes on as it is.

        Returns:
            The reply. What goes wrong with a payload is an error reply that says so, and no
            exception.
        """
        if not message.has_content():
            return call_next(message, context)
        if IDENTIFY in message.content:
            return Identity.of(context, has_model=self.has_model).reply(message)
        try:
            work = self._receive(message, context)
        except FedOBDError as error:
            return refusal(str(error), message)
        if work is None:
            return call_next(message, context)
        if isinstance(work, str):
            return refusal(work, message)
        return work.run(call_next)

    @property
    def has_model(self) -> bool:
        """Whether the mod can make the initial model."""
        return self._model_factory is not None

    def initial_state(self, context: Context) -> ModelState:
        """Return the initial model's values, for a run with a shared start.

        Raises:
            UsageError: the mod was given no model factory.
        """
        if self._model_factory is None:
            raise UsageError(
                "this run starts from a model that its clients hold already (shared_start), and "
                "this client has none; wanted CompressionMod(model_factory=...)"
            )
        entries = self._model_factory().state_dict()  # tied tensors under all of their names
        return {n: v.to("cpu", copy=True) for n, v in entries.items() if torch.is_tensor(v)}

    def _receive(self, message: Message, context: Context) -> _Work | str | None:
        """Return what is to be done, why nothing can be done, or None for a foreign message."""
        content, config = message.content, _config(message.content)
        key = carrier(content, BROADCAST)
        kept_round = config.get(KEPT_ROUND)
        if key is None and kept_round is None:
            return None
        _refuse_outer_privacy()
        record = content[key] if key else context.state.get(_KEPT_BROADCAST)
        opening_bytes = carried(record, OPENING)
        if opening_bytes is not None:
            self._open(opening_bytes, context)
        known = carried(context.state.get(OPENING), OPENING)
        if known is None:
            return NEEDS_OPENING
        opening, _ = Opening.unpack(known)
        if CLIPPING_NORM in config:
            opening = dataclasses.replace(opening, method=_with_bounded_norm(opening.method))
        payload = carried(record, BROADCAST) or b""
        broadcast = Broadcast.decode(payload, opening.method, opening.schema)
        if key is None and broadcast.header.round != kept_round:
            return f"this node holds no broadcast of round {kept_round} to evaluate"
        session = self._session(opening, context, _kept_state(context))
        state = session.receive(broadcast)
        _keep(context, session.state)
        if config.get(KEEP):
            context.state[_KEPT_BROADCAST] = carry(payload, BROADCAST)
        key = key or "arrays"
        message.content = RecordDict({**content, key: opening.layout.to_arrays(state)})
        return _Work(message, context, key, opening, session)

    def _open(self, data: bytes, context: Context) -> None:
        opening, payload = Opening.unpack(data)
        session = self._session(opening, context, {})
        if payload:
            session.initialize(payload)
        context.state[OPENING] = carry(data[: len(data) - len(payload)], OPENING)
        _keep(context, session.state)

    def _session(
        self, opening: Opening, context: Context, state: Mapping[str, torch.Tensor]
    ) -> ClientSession:
        start: ModelState | None = None
        if opening.shared_start:
            start = self.initial_state(context)
        number = client_id(context)
        return ClientSession(
            opening.method,
            opening.schema,
            client=context.node_id % 2**32 if number is None else number,
            seed=opening.seed,
            state=state,
            start=start,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _Work:
    """A message that was decoded, and what it takes to encode the reply."""

    message: Message
    context: Context
    key: str
    opening: Opening
    session: ClientSession

    def run(self, call_next: ClientFunction) -> Message:
        reply = call_next(self.message, self.context)
        if reply.has_error() or not reply.content.array_records:
            return reply  # an evaluation returns no arrays
        try:
            reply.content[self.key] = carry(self._encode(reply), UPLOAD)
        except FedOBDError as error:
            return refusal(str(error), self.message)
        return reply

    def _encode(self, reply: Message) -> bytes:
        records = reply.content.array_records
        if list(records) != [self.key]:
            raise UsageError(
                f"the train function returned the ArrayRecords {list(records)}; wanted one, "
                f"{self.key!r}"
            )
        trained = self.opening.layout.to_state(records[self.key], self.opening.schema)
        report = _report(reply.content, self.opening.metrics)
        del reply.content[self.key]  # Flower warns where one record replaces another
        return self.session.upload(trained, report).data


def _report(content: RecordDict, keys: MetricKeys | None) -> Report:
    """Return what the train function reports, for the payload's header."""
    if keys is None:
        return Report(num_examples=1, train_loss=0.0)
    found: dict[str, Any] = {}
    for record in content.metric_records.values():
        found.update(record)
    if not isinstance(found.get(keys.num_examples), int):
        raise UsageError(
            f"the train function reports no whole number {keys.num_examples!r} in its "
            f"MetricRecord; it has {', '.join(sorted(found)) or 'none'}"
        )

    def number(key: str) -> float:
        value = found.get(key, 0.0)
        if not isinstance(value, int | float):
            raise UsageError(f"the train function reports {key!r} as {value!r}; wanted a number")
        return float(value)

    evaluated = keys.num_eval_examples in found
    return Report(
        num_examples=found[keys.num_examples],
        train_loss=number(keys.train_loss),
        num_validation_examples=int(number(keys.num_eval_examples)) if evaluated else 0,
        validation_loss=number(keys.eval_loss) if evaluated else 0.0,
        validation_metric=number(keys.eval_metric) if evaluated else 0.0,
    )


def _kept_state(context: Context) -> ModelState:
    """Return the tensors that a client keeps in its context."""
    kept = carried(context.state.get(STATE), STATE)
    return {} if kept is None else dict(load(kept))


def _keep(context: Context, state: ModelState) -> None:
    if state:
        tensors = {name: value.contiguous() for name, value in state.items()}
        context.state[STATE] = carry(save(tensors), STATE)


def _config(content: RecordDict) -> dict[str, Any]:
    """Return the entries of all ConfigRecords."""
    return {
        key: value for record in content.config_records.values() for key, value in record.items()
    }


def _with_bounded_norm(method: Method) -> Method:
    """Return the method so that quantization does not break a clip norm."""
    if not isinstance(method, FedOBD):
        raise UsageError(f"{method.name} has no codec that keeps a clip norm; wanted fedobd")
    return dataclasses.replace(method, codec=dataclasses.replace(method.codec, bound_norm=True))


def _refuse_outer_privacy() -> None:
    """Raise UsageError where one of Flower's mods of differential privacy stands outside this one.

    It would see payloads instead of arrays.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_back is not None:
        frame = frame.f_back
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith("flwr.") and module.rsplit(".", 1)[-1] in _PRIVACY_MODS:
            raise UsageError(
                f"{frame.f_code.co_name} of {module} stands before CompressionMod; wanted "
                "ClientApp(mods=[CompressionMod(), ...]) with mods of differential privacy at the "
                "train function: @app.train(mods=[fixedclipping_mod])"
            )
