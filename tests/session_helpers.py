"""What the tests of sessions share: tiny models, made-up training, an engine, forged payloads.

Nothing here checks a result; the tests do.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from fedobd import (
    METHODS,
    SMAFD,
    BlockRules,
    Broadcast,
    ClientSession,
    Codec,
    FedAvg,
    FedDropoutAvg,
    FedOBD,
    FedPAQ,
    Header,
    Method,
    ModelSchema,
    ModelState,
    Report,
    Role,
    RoundPlan,
    RoundRecord,
    Segment,
    ServerSession,
    decompose,
    get_state,
)
from fedobd.codec import Mask, Quantizer, Unquantized
from fedobd.payload import Kind, encode_payload
from fedobd.payload._wire import HEADER_FIELDS, UPLOAD_FIELDS

NUM_CLIENTS = 5
SEED = 11
MAX_EXAMPLES = 5000
"""The most examples that an upload to a `Scene` may claim."""

every_method = pytest.mark.parametrize("name", sorted(METHODS))


class _Tied(nn.Module):
    """An embedding whose weight is the output layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.hidden = nn.Linear(6, 8)
        self.inner = nn.Linear(8, 6)
        self.output = nn.Linear(6, 10, bias=False)
        self.output.weight = self.embedding.weight


def _batch_norm() -> nn.Module:
    """Running statistics and an integer buffer, a 0-dim one."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3)
    )


def _frozen() -> nn.Module:
    model = nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 7), nn.Linear(7, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


def _bf16() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 6), nn.Linear(6, 2))
    return model.to(torch.bfloat16)


def big_embedding() -> nn.Module:
    """An embedding of 120 of 148 parameters; no upload of stage 1 has room for it."""
    layers = {
        "embedding": nn.Embedding(30, 4),
        "hidden": nn.Linear(4, 4),
        "output": nn.Linear(3, 2),
    }
    return nn.ModuleDict(layers)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "batch_norm": _batch_norm,
    "frozen": _frozen,
    "tied": _Tied,
    "bf16": _bf16,
}
"""The tiny models by what is special about them."""

SHORT_METHODS: dict[str, Method] = {
    "fedobd": FedOBD(
        codec=Codec(uplink_weight=1e-3, downlink_weight=1e-3),
        stage_one_rounds=3,
        stage_one_epochs=2,
        stage_two_epochs=2,
        cohort=3,
    ),
    "fedavg": FedAvg(rounds=4, epochs=2, cohort=3),
    "fedpaq": FedPAQ(rounds=4, epochs=2, cohort=3),
    "feddropoutavg": FedDropoutAvg(rounds=4, epochs=2, cohort=3),
    "smafd": SMAFD(rounds=5, epochs=2, cohort=3),
}
"""Every method with a run of a few rounds."""


def make_schema(model: nn.Module, method: Method) -> ModelSchema:
    """Cut the model into the unit that the method is defined on."""
    return decompose(model, BlockRules(style=method.unit))


def make_state(model: nn.Module, seed: int = 0) -> ModelState:
    """Values for a model that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    state = get_state(model)
    for name, value in state.items():
        if not value.is_floating_point():
            state[name] = torch.full_like(value, 3)
            continue
        drawn = torch.randn(value.shape, generator=generator) * 0.3
        if name.endswith("running_var"):
            drawn = drawn.abs() + 0.5
        state[name] = drawn.to(value.dtype)
    return state


def train(
    schema: ModelSchema, start: Mapping[str, torch.Tensor], client: int, number: int
) -> ModelState:
    """Made-up training: a perturbation that depends on client and round alone, of another size in
    each tensor.
    """
    generator = torch.Generator().manual_seed(1000 * number + client)
    trained: ModelState = {}
    for index, spec in enumerate(schema.tensors):
        value = start[spec.name]
        if spec.role is Role.FROZEN:
            trained[spec.name] = value.clone()
        elif not spec.is_floating:
            trained[spec.name] = value + 1 + client
        else:
            size = 0.02 * (1 + (7 * index + 3 * number + client) % 5)
            step = torch.randn(value.shape, generator=generator) * size
            step = step.abs() if spec.name.endswith("running_var") else step
            trained[spec.name] = (value.to(torch.float32) + step).to(value.dtype)
    return trained


def make_report(client: int, number: int) -> Report:
    """Made-up report: losses go down and up from round to round."""
    return Report(
        num_examples=100 + 37 * client,
        train_loss=(1.0, 0.7, 0.8, 0.5, 0.45)[number % 5] + 0.01 * client,
        num_validation_examples=10 + client,
        validation_loss=1.0 / number + 0.02 * client,
        validation_metric=0.5 + 0.01 * number - 0.002 * client,
    )


Train = Callable[[ModelSchema, Mapping[str, torch.Tensor], int, int], ModelState]


@dataclass
class RoundLog:
    """All that was emitted in a round."""

    plan: RoundPlan
    broadcast: bytes
    openings: dict[int, bytes] = field(default_factory=dict)
    uploads: dict[int, bytes] = field(default_factory=dict)
    starts: dict[int, ModelState] = field(default_factory=dict)
    trained: dict[int, ModelState] = field(default_factory=dict)
    record: RoundRecord | None = None

    def emitted(self) -> tuple[bytes, dict[int, bytes], dict[int, bytes]]:
        """Return the bytes of all payloads."""
        return self.broadcast, self.openings, self.uploads


@dataclass
class Engine:
    """The clients' side: makes a session for each part a client takes, and stores between rounds
    what the client must keep, and nothing else.
    """

    method: Method
    schema: ModelSchema
    seed: int = SEED
    train: Train = train
    report: Callable[[int, int], Report] = make_report
    kept: dict[int, ModelState] = field(default_factory=dict)
    start: ModelState | None = None
    executor: Executor | None = None

    def ask(self, server: ServerSession, plan: RoundPlan) -> RoundLog:
        """Let every client of the cohort make its upload; hand none of them in."""
        log = RoundLog(plan, server.broadcast().data)
        for number in plan.cohort:
            client = self.session(number)
            if server.needs_initial_payload(number):
                log.openings[number] = server.initial_payload(number).data
                client.initialize(log.openings[number])
            start = client.receive(log.broadcast)
            log.starts[number] = {name: value.clone() for name, value in start.items()}
            trained = self.train(self.schema, start, number, plan.round)
            log.trained[number] = trained
            report = self.report(number, plan.round)
            log.uploads[number] = client.upload(trained, report).data
            self.kept[number] = {name: value.clone() for name, value in client.state.items()}
        return log

    def session(self, number: int) -> ClientSession:
        """Return a session of a client with what it has kept."""
        return ClientSession(
            self.method,
            self.schema,
            client=number,
            seed=self.seed,
            state=self.kept.get(number),
            start=self.start,
            executor=self.executor,
        )

    def play(
        self,
        server: ServerSession,
        order: Callable[[Sequence[int]], Sequence[int]] = lambda cohort: cohort,
    ) -> RoundLog | None:
        """Play one round, uploads in the given order; None when the run is over."""
        plan = server.begin_round()
        if plan is None:
            return None
        log = self.ask(server, plan)
        for number in order(plan.cohort):
            server.receive(number, log.uploads[number])
        log.record = server.end_round()
        return log

    def run(
        self,
        server: ServerSession,
        order: Callable[[Sequence[int]], Sequence[int]] = lambda cohort: cohort,
    ) -> list[RoundLog]:
        """Play all rounds."""
        logs = []
        while (log := self.play(server, order)) is not None:
            logs.append(log)
        return logs


def set_up(
    method: Method,
    model: nn.Module,
    *,
    schema: ModelSchema | None = None,
    num_clients: int = NUM_CLIENTS,
    seed: int = SEED,
    state_seed: int = 0,
    max_examples: int = 10_000_000,
    shared_start: bool = False,
    executor: Executor | None = None,
) -> tuple[ServerSession, Engine]:
    """Return a server session and the clients of a run that has not begun."""
    schema = schema or make_schema(model, method)
    state = make_state(model, state_seed)
    server = ServerSession(
        method,
        schema,
        state,
        num_clients=num_clients,
        seed=seed,
        max_examples=max_examples,
        shared_start=shared_start,
        executor=executor,
    )
    start = state if shared_start else None
    return server, Engine(method, schema, seed, start=start, executor=executor)


def record_of(log: RoundLog | None) -> RoundRecord:
    """Return the record of a round that was ended."""
    if log is None or log.record is None:
        raise ValueError("no round was ended")
    return log.record


def bits_of(value: torch.Tensor) -> bytes:
    """Return a tensor's bytes, so that -0.0 is not 0.0."""
    return bytes(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def bits(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, bytes]]:
    """Return element types and bytes of a state, to compare with ==."""
    return {name: (value.dtype, bits_of(value)) for name, value in state.items()}


# --- forged payloads -----------------------------------------------------------------------------

_OFFSETS: dict[str, tuple[int, str]] = {}
for _name, _code in (*HEADER_FIELDS, *UPLOAD_FIELDS):
    _OFFSETS[_name] = (sum(struct.calcsize("<" + code) for _, code in _OFFSETS.values()), _code)


def seal(body: bytes) -> bytes:
    """Add the checksum that belongs to a body."""
    return body + struct.pack("<I", zlib.crc32(body))


def forge(payload: bytes, **fields: float | bytes) -> bytes:
    """Put other raw values into header or report fields, under a checksum that holds."""
    body = bytearray(payload[:-4])
    for name, value in fields.items():
        offset, code = _OFFSETS[name]
        struct.pack_into("<" + code, body, offset, value)
    return seal(bytes(body))


def field_of(payload: bytes, name: str) -> float:
    """Return the raw value of a header or report field."""
    offset, code = _OFFSETS[name]
    return float(struct.unpack_from("<" + code, payload, offset)[0])


def forge_values(payload: bytes, before: bytes, after: bytes) -> bytes:
    """Put other bytes in the place of some that occur once, under a checksum that holds."""
    if payload.count(before) != 1 or len(before) != len(after):
        raise ValueError(f"{payload.count(before)} occurrences")
    return seal(payload[:-4].replace(before, after))


def craft_upload(
    method: Method,
    schema: ModelSchema,
    plan: RoundPlan,
    client: int,
    start: Mapping[str, torch.Tensor],
    trained: Mapping[str, torch.Tensor],
    *,
    kept: tuple[int, ...],
    mask: Mask | None = None,
    quantizer: Quantizer | None = None,
    num_examples: int = 100,
) -> bytes:
    """Make an upload that says what it is told to, whether or not the method allows it."""

    def source(segment: Segment) -> torch.Tensor:
        spec = schema.tensors[segment.tensor]
        values = trained[spec.name].reshape(-1)[segment.start : segment.stop]
        if method.sends_differences and spec.role is Role.PARAMETER:
            before = start[spec.name].reshape(-1)[segment.start : segment.stop]
            return values.to(torch.float32) - before.to(torch.float32)
        return values

    header = Header(
        kind=Kind.UPLOAD,
        method=method.wire_id,
        round=plan.round,
        stage=plan.stage,
        block_ids=kept,
        is_difference=method.sends_differences,
        client=client,
        report=Report(num_examples=num_examples, train_loss=1.0),
        mask=mask,
    )
    return encode_payload(schema, header, source, quantizer or Unquantized()).data


def decode_broadcast(log: RoundLog, method: Method, schema: ModelSchema) -> ModelState:
    """Return the values that a round's broadcast holds."""
    return Broadcast.decode(log.broadcast, method, schema).values


class Scene:
    """An open second round of a run: the uploads are made, none is handed in."""

    def __init__(self, method: Method, kind: str = "batch_norm") -> None:
        self.method = method
        self.model = MODELS[kind]()
        self.server, self.engine = set_up(method, self.model, max_examples=MAX_EXAMPLES)
        self.schema = self.engine.schema
        first = self.engine.play(self.server)
        assert first is not None
        self.first = first
        plan = self.server.begin_round()
        assert plan is not None
        self.plan = plan
        self.log = self.engine.ask(self.server, plan)
        both = [c for c in plan.cohort if c in first.plan.cohort]
        self.villain = both[-1]
        """The client that misbehaves; it took part in the first round too."""
        self.good = [c for c in plan.cohort if c != self.villain]

    @property
    def upload(self) -> bytes:
        """What the villain should send."""
        return self.log.uploads[self.villain]

    def craft(self, method: Method | None = None, **options: object) -> bytes:
        client = self.villain
        start, trained = self.log.starts[client], self.log.trained[client]
        return craft_upload(
            method or self.method,
            self.schema,
            self.plan,
            client,
            start,
            trained,
            **options,  # type: ignore[arg-type]
        )

    def all_blocks(self) -> tuple[int, ...]:
        return tuple(range(len(self.schema.blocks)))

    def sent_blocks(self) -> tuple[int, ...]:
        """Blocks of the round's broadcast."""
        return Broadcast.decode(self.log.broadcast, self.method, self.schema).header.block_ids

    def buffer_block(self) -> int:
        index = [spec.name for spec in self.schema.tensors].index("1.running_var")
        (number,) = (
            n
            for n, block in enumerate(self.schema.blocks)
            if any(segment.tensor == index for segment in block.segments)
        )
        return number
