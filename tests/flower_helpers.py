"""What the Flower tests share: a client whose training is arithmetic, and grids around it."""

from __future__ import annotations

import gc
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray
from torch import nn

from fedobd import Codec
from fedobd.flower import CodecGrid, CompressionMod
from tests.flower_grid import InProcessGrid

LOSSLESS = Codec(uplink_quantizer="none", downlink_quantizer="none", selection="none")
ALL_BLOCKS = Codec(selection="none")

TrainFunction = Callable[[Message, Context], Message]
Values = dict[str, NDArray[Any]]


def small_net(bias: bool = True) -> nn.Module:
    """A model without buffers, of three blocks."""
    return nn.Sequential(nn.Linear(6, 8, bias), nn.Tanh(), nn.Linear(8, 5), nn.Linear(5, 2))


def seeded(factory: Callable[[], nn.Module], seed: int = 3) -> Callable[[], nn.Module]:
    """Return a factory that always makes the same weights."""

    def make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return factory()

    return make


def record_of(model: nn.Module) -> ArrayRecord:
    """Return a model's state dict as an ArrayRecord; bfloat16 as float32."""
    return ArrayRecord(
        {
            name: Array((t.float() if t.dtype == torch.bfloat16 else t).detach().numpy())
            for name, t in model.state_dict().items()
        }
    )


def values_of(record: ArrayRecord | None) -> Values:
    assert record is not None
    return {key: array.numpy() for key, array in record.items()}


def from_values(values: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    return ArrayRecord({key: Array(np.asarray(value)) for key, value in values.items()})


def largest_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    """Return the largest absolute difference between any two values."""
    assert list(first) == list(second)
    return max(
        float(np.max(np.abs(np.asarray(first[k], float) - np.asarray(second[k], float))))
        for k in first
        if np.size(first[k])
    )


def target(key: str, shape: tuple[int, ...], client: int) -> NDArray[np.float64]:
    """Return where a client's training pulls a tensor."""
    generator = np.random.default_rng([zlib.crc32(key.encode()), client])
    return np.asarray(generator.normal(size=shape))


def pull(message: Message, context: Context) -> Message:
    """Train: go half of the way to the client's own target; integers count up."""
    client = int(context.node_config["partition-id"])
    trained: Values = {}
    record = message.content["arrays"]
    assert isinstance(record, ArrayRecord)
    for key, value in values_of(record).items():
        if np.issubdtype(value.dtype, np.floating):
            moved = value + 0.5 * (target(key, value.shape, client) - value)
            trained[key] = np.asarray(moved, dtype=value.dtype)
        else:
            trained[key] = np.asarray(value + 3 + client, dtype=value.dtype)
    return reply_with(message, trained, num_examples=10 + client)


def stay(message: Message, context: Context) -> Message:
    """Train: change nothing."""
    record = message.content["arrays"]
    assert isinstance(record, ArrayRecord)
    return reply_with(message, values_of(record))


def reply_with(
    message: Message, values: Mapping[str, NDArray[Any]], num_examples: Any = 10, **more: Any
) -> Message:
    """Return the reply of a train function."""
    metrics = MetricRecord({"num-examples": num_examples, "train_loss": 0.5, **more})
    return Message(
        RecordDict({"arrays": from_values(values), "metrics": metrics}), reply_to=message
    )


def score(message: Message, context: Context) -> Message:
    """Evaluate: the sum of squares of what came."""
    record = message.content["arrays"]
    assert isinstance(record, ArrayRecord)
    loss = sum(float(np.sum(np.square(v, dtype=float))) for v in values_of(record).values())
    metrics = MetricRecord({"num-examples": 5, "eval_loss": loss})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def make_app(
    train: TrainFunction = pull,
    *,
    mods: Sequence[Any] | None = None,
    train_mods: Sequence[Any] | None = None,
    evaluate: TrainFunction = score,
) -> ClientApp:
    """Return a client; by default with `CompressionMod` alone."""
    app = ClientApp(mods=[CompressionMod()] if mods is None else list(mods))
    app.train(mods=None if train_mods is None else list(train_mods))(train)
    app.evaluate()(evaluate)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        answer = ConfigRecord({"saw": sorted(message.content.keys())})
        return Message(RecordDict({"answer": answer}), reply_to=message)

    return app


def make_nodes(
    app: ClientApp | TrainFunction | None = None, num_nodes: int = 2, *, serialize: bool = True
) -> InProcessGrid:
    """Return a grid of nodes with the ids 1000 and up, partitions 0 and up."""
    configs = [
        {"partition-id": number, "num-partitions": num_nodes} for number in range(num_nodes)
    ]
    return InProcessGrid(app or make_app(), configs, serialize=serialize)


def wrap(nodes: InProcessGrid, codec: Codec | None = LOSSLESS, **options: Any) -> CodecGrid:
    """Return the CodecGrid around nodes, which never sleeps."""
    return CodecGrid(nodes, codec, poll_seconds=0.0, **options)


def run_strategy(
    strategy: Any, grid: Any, arrays: ArrayRecord, num_rounds: int = 2, **options: Any
) -> Any:
    """Start a strategy; what it and Flower draw at random is the same each time."""
    random.seed(1)
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    try:
        return strategy.start(grid=grid, initial_arrays=arrays, num_rounds=num_rounds, **options)
    finally:
        np.random.set_state(state)  # noqa: NPY002


def messages_to(
    nodes: InProcessGrid,
    arrays: ArrayRecord | None,
    kind: str = "train",
    config: Mapping[str, Any] | None = None,
    **records: Any,
) -> list[Message]:
    """Return a message for each node, all with one content, as FedAvg makes them."""
    content = RecordDict({"config": ConfigRecord(dict(config or {"server-round": 1})), **records})
    if arrays is not None:
        content["arrays"] = arrays
    return [Message(content, node, kind) for node in nodes.get_node_ids()]


def reason_of(reply: Message) -> str:
    """Return the reason of an error reply."""
    assert reply.has_error()
    return reply.error.reason or ""


@pytest.fixture(scope="module")
def quick_collections() -> Iterator[None]:
    """Leave what is there already out of the garbage collections that some strategies ask for."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def payloads(messages: Sequence[Message], stype: str) -> list[bytes]:
    """Return the payloads of one serialization type that messages carry, in order."""
    return [
        array.data
        for message in messages
        if message.has_content()
        for record in message.content.array_records.values()
        for array in record.values()
        if array.stype == stype
    ]
