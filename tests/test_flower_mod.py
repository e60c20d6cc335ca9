"""CompressionMod and what it is made of: openings, layouts, carriers, identities, clip norms."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from fedobd import (
    NNADQ,
    Broadcast,
    ClientSession,
    Codec,
    DecodeError,
    DecodeReason,
    ModelSchema,
    ModelState,
    Payload,
    Report,
    UsageError,
    get_state,
)
from fedobd.blocks import segment_of
from fedobd.codec import Coding, Quantizer, Unquantized, dequantize
from fedobd.flower import CompressionMod, MetricKeys
from fedobd.flower._carrier import (
    BROADCAST,
    IDENTIFY,
    KEPT_ROUND,
    OPENING,
    STATE,
    UPLOAD,
    as_array,
    carried,
    carrier,
    carry,
)
from fedobd.flower._identity import Identity, client_id
from fedobd.flower._layout import Layout, describe
from fedobd.flower._mod import _report
from fedobd.flower._opening import Opening
from fedobd.methods import FedOBD
from fedobd.payload import VERSION, Header, Kind
from fedobd.sessions import all_blocks
from fedobd.sessions._clipping import shrink_factor
from fedobd.sessions._selection import squared_norm
from tests.flower_grid import FIRST_NODE_ID, RUN_ID, InProcessGrid, become_server_app
from tests.flower_helpers import (
    ALL_BLOCKS,
    LOSSLESS,
    Values,
    from_values,
    largest_difference,
    make_app,
    make_nodes,
    messages_to,
    payloads,
    pull,
    reason_of,
    record_of,
    reply_with,
    run_strategy,
    seeded,
    small_net,
    stay,
    values_of,
    wrap,
)

FIRST, SECOND = FIRST_NODE_ID, FIRST_NODE_ID + 1

net = seeded(small_net)


def make_context(**node_config: Any) -> Context:
    return Context(
        run_id=RUN_ID, node_id=7, node_config=node_config, state=RecordDict(), run_config={}
    )


def exchange(nodes: InProcessGrid, grid: Any, record: ArrayRecord) -> dict[int, Message]:
    replies = grid.send_and_receive(messages_to(nodes, record), timeout=5)
    return {reply.metadata.src_node_id: reply for reply in replies}


def arrays_of(reply: Message) -> Values:
    assert not reply.has_error(), reply.error
    record = reply.content["arrays"]
    assert isinstance(record, ArrayRecord)
    return values_of(record)


# --- the train function sees ordinary arrays -----------------------------------------------------


@pytest.mark.parametrize("serialize", [True, False])
def test_a_train_function_gets_the_arrays_that_the_server_sent(serialize: bool) -> None:
    record = record_of(net())
    seen: list[ArrayRecord] = []

    def train(message: Message, context: Context) -> Message:
        assert set(message.content) == {"config", "arrays"}
        arrays = message.content["arrays"]
        assert isinstance(arrays, ArrayRecord)
        net().load_state_dict(arrays.to_torch_state_dict())
        seen.append(arrays)
        return pull(message, context)

    nodes = make_nodes(make_app(train), serialize=serialize)
    exchange(nodes, wrap(nodes), record)
    for arrays in seen:
        assert list(arrays) == list(record)
        for key, array in arrays.items():
            assert array.stype == "numpy.ndarray"
            assert (array.dtype, tuple(array.shape)) == (record[key].dtype, record[key].shape)
            assert np.array_equal(array.numpy(), record[key].numpy())


def test_what_a_train_function_does_to_its_arrays_changes_nobody_elses() -> None:
    def train(message: Message, context: Context) -> Message:
        arrays = message.content["arrays"]
        assert isinstance(arrays, ArrayRecord)
        before = {key: value.copy() for key, value in values_of(arrays).items()}
        for key in list(arrays):
            arrays[key] = Array(np.zeros_like(before[key]))
        del message.content["config"]
        return reply_with(message, before)

    nodes = make_nodes(make_app(train), 4, serialize=False)
    record = record_of(net())
    for reply in exchange(nodes, wrap(nodes), record).values():
        assert largest_difference(arrays_of(reply), values_of(record)) == 0


def test_state_that_an_app_keeps_in_its_context_is_left_alone() -> None:
    def train(message: Message, context: Context) -> Message:
        count = context.state.config_records.get("mine", ConfigRecord({"rounds": 0}))
        context.state["mine"] = ConfigRecord({"rounds": int(str(count["rounds"])) + 1})
        return pull(message, context)

    nodes = make_nodes(make_app(train))
    grid = wrap(nodes)
    for _ in range(3):
        exchange(nodes, grid, record_of(net()))
    for context in nodes.contexts.values():
        assert context.state["mine"] == ConfigRecord({"rounds": 3})
        assert set(context.state) == {"mine", OPENING}


def test_each_message_may_be_handled_by_a_new_mod() -> None:
    def fresh(message: Message, context: Context) -> Message:
        return CompressionMod()(message, context, pull)

    record = record_of(net())
    nodes, reference = make_nodes(fresh), make_nodes()
    grid, other = wrap(nodes, Codec()), wrap(reference, Codec())
    for number in range(3):
        model = record if number == 0 else record_of(seeded(small_net, number)())
        ours, wanted = exchange(nodes, grid, model), exchange(reference, other, model)
        for node, reply in ours.items():
            assert largest_difference(arrays_of(reply), arrays_of(wanted[node])) == 0


def test_messages_without_a_payload_pass_through_untouched() -> None:
    become_server_app()
    content = RecordDict({"arrays": record_of(net()), "config": ConfigRecord({"a": 1})})
    message = Message(content, FIRST, "train")
    got: list[Message] = []

    def call_next(inner: Message, context: Context) -> Message:
        got.append(inner)
        return Message(RecordDict({"arrays": record_of(net())}), reply_to=inner)

    context = make_context()
    reply = CompressionMod()(message, context, call_next)
    assert got == [message]
    assert got[0].content is content
    assert not context.state
    assert carrier(reply.content, UPLOAD) is None


def test_an_error_of_the_train_function_passes_as_it_is() -> None:
    from flwr.app import Error

    def train(message: Message, context: Context) -> Message:
        return Message(Error(77, "no data today"), reply_to=message)

    nodes = make_nodes(make_app(train))
    for reply in exchange(nodes, wrap(nodes), record_of(net())).values():
        assert (reply.error.code, reason_of(reply)) == (77, "no data today")


def changed(change: Callable[[Values], Any]) -> Callable[[Message, Context], Message]:
    """Return a train function that returns something odd."""

    def train(message: Message, context: Context) -> Message:
        values = arrays_of(pull(message, context))
        change(values)
        return reply_with(message, values)

    return train


def with_value(key: str, value: Any) -> Callable[[Values], Any]:
    return lambda values: values.update({key: value})


ODD: dict[str, tuple[Callable[[Values], Any], str]] = {
    "NaN": (with_value("2.bias", np.full(5, np.nan, np.float32)), "'2.bias'"),
    "infinite": (with_value("2.bias", np.full(5, np.inf, np.float32)), "'2.bias'"),
    "beyond float32": (with_value("2.bias", np.full(5, 1e300)), "'2.bias'"),
    "another shape": (with_value("2.bias", np.zeros(6, np.float32)), r"shape \(6,\)"),
    "transposed": (with_value("2.weight", np.zeros((8, 5), np.float32)), r"shape \(8, 5\)"),
    "an array more": (with_value("extra", np.zeros(1, np.float32)), "'extra' unknown"),
    "an array less": (lambda values: values.pop("2.bias"), "'2.bias' missing"),
    "none at all": (lambda values: values.clear(), "missing"),
    "words": (with_value("2.bias", np.array(["a"] * 5)), ""),
    "complex": (with_value("2.bias", np.full(5, 1 + 2j, np.complex64)), ""),
}


@pytest.mark.parametrize(
    "story",
    list(ODD),
)
def test_arrays_that_no_training_gives_are_refused_at_the_client(story: str) -> None:
    change, pattern = ODD[story]
    nodes = make_nodes(make_app(changed(change)))
    for reply in exchange(nodes, wrap(nodes), record_of(net())).values():
        assert re.search(pattern, reason_of(reply)), reason_of(reply)


def test_float64_and_reordered_arrays_of_a_client_are_taken() -> None:
    def train(message: Message, context: Context) -> Message:
        values = arrays_of(pull(message, context))
        return reply_with(message, {k: values[k].astype(float) for k in reversed(values)})

    record = record_of(net())
    nodes, reference = make_nodes(make_app(train)), make_nodes()
    ours, wanted = (
        exchange(nodes, wrap(nodes), record),
        exchange(reference, wrap(reference), record),
    )
    for node, reply in ours.items():
        assert largest_difference(arrays_of(reply), arrays_of(wanted[node])) == 0


def test_a_second_array_record_of_a_train_function_is_refused() -> None:
    def train(message: Message, context: Context) -> Message:
        reply = pull(message, context)
        reply.content["optimizer"] = record_of(net())
        return reply

    nodes = make_nodes(make_app(train))
    for reply in exchange(nodes, wrap(nodes), record_of(net())).values():
        assert "['arrays', 'optimizer']; wanted one, 'arrays'" in reason_of(reply)


def test_a_train_function_may_return_the_message_s_own_content() -> None:
    def train(message: Message, context: Context) -> Message:
        message.content["metrics"] = MetricRecord({"num-examples": 4})
        return Message(message.content, reply_to=message)

    nodes = make_nodes(make_app(train))
    record = record_of(net())
    for reply in exchange(nodes, wrap(nodes), record).values():
        assert largest_difference(arrays_of(reply), values_of(record)) == 0


@pytest.mark.parametrize(
    "number",
    [0, "3", "x", 1.5, float("nan"), 2**32 - 1, float("inf")],
)
def test_any_partition_id_works_with_the_grid(number: Any) -> None:
    nodes = InProcessGrid(make_app(stay), [{"partition-id": number}, {}])
    for reply in exchange(nodes, wrap(nodes), record_of(net())).values():
        assert not reply.has_error(), reason_of(reply)


@pytest.mark.parametrize("number", [-1, 2**32])
def test_a_partition_id_out_of_range_is_refused_with_the_range(number: int) -> None:
    nodes = InProcessGrid(make_app(stay), [{"partition-id": number}])
    for reply in exchange(nodes, wrap(nodes), record_of(net())).values():
        assert reason_of(reply) == f"client is {number}; allowed are 0 to 4294967295"


# --- mods of differential privacy ----------------------------------------------------------------


def clipping_run(
    codec: Codec | None, norm: float, seed: int, mods: list[Any], **options: Any
) -> tuple[list[Message], Values, dict[int, Values]]:
    """Train once under a clip norm; return replies, W and what each client received."""
    received: dict[int, Values] = {}

    def train(message: Message, context: Context) -> Message:
        arrays = message.content["arrays"]
        assert isinstance(arrays, ArrayRecord)
        received[context.node_id] = values_of(arrays)
        return pull(message, context)

    nodes = make_nodes(make_app(train, train_mods=mods), 3)
    record = record_of(seeded(small_net, seed)())
    grid = wrap(nodes, codec) if codec else nodes
    messages = messages_to(nodes, record, "train", {"clipping_norm": norm, **options})
    return list(grid.send_and_receive(messages, timeout=5)), values_of(record), received


def update_norm(reply: Values, w: Values) -> float:
    total = sum(float(np.sum(np.square(reply[k].astype(float) - w[k]))) for k in w)
    return math.sqrt(total)


CLIP_CODECS = {
    "fine": ALL_BLOCKS,
    "with dropout": Codec(),
    "coarse": Codec(selection="none", uplink_weight=1.0),
    "coarser": Codec(selection="none", uplink_weight=100.0),
    "one level": Codec(selection="none", uplink_weight=1e6, downlink_weight=1e3),
    "not quantized": LOSSLESS,
    "random blocks": Codec(selection="random", dropout_rate=0.3),
}


@pytest.mark.parametrize("story", CLIP_CODECS)
@pytest.mark.parametrize("mod", ["fixedclipping_mod", "adaptiveclipping_mod"])
def test_quantization_does_not_break_a_clip_norm(mod: str, story: str) -> None:
    import flwr.clientapp.mod as mods

    for seed in range(8):
        norm = float(np.random.default_rng(seed).uniform(0.01, 3))
        replies, w, _ = clipping_run(CLIP_CODECS[story], norm, seed, [getattr(mods, mod)])
        assert len(replies) == 3
        largest = max(float(np.abs(v).max()) for v in w.values())
        # adding to W and taking W away again rounds each element to float32
        slack = 2.0**-23 * (largest + norm) * math.sqrt(sum(v.size for v in w.values()))
        for reply in replies:
            assert update_norm(arrays_of(reply), w) <= norm + slack


def test_a_clip_norm_would_be_broken_without_care() -> None:
    """What the test above guards against does happen."""
    broken = 0
    for seed in range(20):
        values = np.random.default_rng(seed).normal(size=1000).astype(np.float32)
        quantizer = NNADQ(100.0)
        code = quantizer.measure(values, 32)
        if code.coding is Coding.LEVELS:
            rounded = dequantize(quantizer.quantize(values, code).signed(), code)
            broken += squared_norm(rounded) > squared_norm(values)
    assert broken > 5


def test_a_clip_norm_leaves_unquantized_updates_as_they_are() -> None:
    from flwr.clientapp.mod import fixedclipping_mod

    ours, _, _ = clipping_run(LOSSLESS, 0.5, 1, [fixedclipping_mod])
    plain, _, _ = clipping_run(None, 0.5, 1, [fixedclipping_mod])
    wanted = {reply.metadata.src_node_id: arrays_of(reply) for reply in plain}
    assert len(ours) == len(wanted) == 3
    for reply in ours:
        node = reply.metadata.src_node_id
        assert largest_difference(arrays_of(reply), wanted[node]) <= 1e-6


def test_a_clip_norm_with_stochastic_rounding_is_refused_with_the_reason() -> None:
    from flwr.clientapp.mod import fixedclipping_mod

    codec = Codec(uplink_quantizer="stochastic")
    replies, _, _ = clipping_run(codec, 0.5, 1, [fixedclipping_mod])
    for reply in replies:
        assert "uplink_quantizer is 'stochastic', whose rounding raises norms" in reason_of(reply)


def test_local_privacy_at_the_train_function_composes() -> None:
    from flwr.clientapp.mod import LocalDpMod

    mod = LocalDpMod(clipping_norm=0.4, sensitivity=1e-9, epsilon=10.0, delta=1e-5)
    nodes = make_nodes(make_app(train_mods=[mod]), 3)
    record = record_of(net())
    w = values_of(record)
    for reply in exchange(nodes, wrap(nodes, ALL_BLOCKS), record).values():
        assert update_norm(arrays_of(reply), w) == pytest.approx(0.4, rel=0.05)


@pytest.mark.parametrize("name", ["fixedclipping_mod", "adaptiveclipping_mod", "LocalDpMod"])
@pytest.mark.parametrize("serialize", [True, False])
def test_a_mod_of_privacy_outside_compression_is_refused(name: str, serialize: bool) -> None:
    import flwr.clientapp.mod as mods

    mod = getattr(mods, name)
    outer = mod(0.4, 0.1, 10.0, 1e-5) if name == "LocalDpMod" else mod
    nodes = make_nodes(make_app(mods=[outer, CompressionMod()]), serialize=serialize)
    messages = messages_to(nodes, record_of(net()), "train", {"clipping_norm": 1.0})
    replies = list(wrap(nodes).send_and_receive(messages, timeout=5))
    assert len(replies) == 2
    for reply in replies:
        assert "stands before CompressionMod; wanted" in reason_of(reply)
        assert "@app.train(mods=[fixedclipping_mod])" in reason_of(reply)


@pytest.mark.parametrize("serialize", [True, False])
def test_a_mod_of_privacy_right_behind_compression_works_for_training(serialize: bool) -> None:
    from flwr.clientapp.mod import fixedclipping_mod

    nodes = make_nodes(make_app(mods=[CompressionMod(), fixedclipping_mod]), serialize=serialize)
    messages = messages_to(nodes, record_of(net()), "train", {"clipping_norm": 0.3})
    for reply in wrap(nodes).send_and_receive(messages, timeout=5):
        assert update_norm(arrays_of(reply), values_of(record_of(net()))) <= 0.3 + 1e-5


def test_mods_that_measure_messages_work_on_both_sides() -> None:
    from flwr.clientapp.mod import arrays_size_mod, message_size_mod

    for mods in ([arrays_size_mod, CompressionMod()], [CompressionMod(), message_size_mod]):
        nodes = make_nodes(make_app(mods=mods))
        for reply in exchange(nodes, wrap(nodes), record_of(net())).values():
            assert not reply.has_error()


# --- shrink_factor -------------------------------------------------------------------------------


@st.composite
def float_vectors(draw: st.DrawFn) -> NDArray[np.float32]:
    size = draw(st.integers(1, 200))
    seed = draw(st.integers(0, 2**32 - 1))
    scale = 10.0 ** draw(st.floats(-30, 17))
    kind = draw(st.sampled_from(["normal", "sparse", "ties", "constant", "offset"]))
    generator = np.random.default_rng(seed)
    values = generator.normal(size=size)
    if kind == "sparse":
        values *= generator.random(size) < 0.05
    elif kind == "ties":
        values = np.round(values * 2) / 2 + 0.25
    elif kind == "constant":
        values[:] = values[0]
    elif kind == "offset":
        values += 50
    return np.asarray(values * scale, np.float32)


@given(float_vectors(), st.floats(-6, 8), st.sampled_from([16, 32]))
@settings(max_examples=150, deadline=None)
def test_what_is_shrunk_keeps_its_norm_when_it_is_quantized(
    values: NDArray[np.float32], log_weight: float, repr_bits: int
) -> None:
    quantizer: Quantizer = NNADQ(10.0**log_weight)
    factor = shrink_factor(values, quantizer, repr_bits)
    assert 0 < factor <= 1
    shrunk = values * np.float32(factor)
    code = quantizer.measure(shrunk, repr_bits)
    decoded = shrunk
    if code.coding is Coding.LEVELS:
        decoded = dequantize(quantizer.quantize(shrunk, code).signed(), code)
    elif code.coding is Coding.CONSTANT:
        decoded = np.full_like(values, code.offset)
    assert squared_norm(decoded) <= squared_norm(values) * (1 + 1e-6)
    original = quantizer.measure(values, repr_bits)
    if original.coding is Coding.LEVELS:
        plain = dequantize(quantizer.quantize(values, original).signed(), original)
        if squared_norm(plain) <= squared_norm(values):
            assert factor == 1  # nothing is shrunk without need


@given(float_vectors())
@settings(max_examples=30, deadline=None)
def test_nothing_is_shrunk_where_nothing_is_quantized(values: NDArray[np.float32]) -> None:
    assert shrink_factor(values, Unquantized(), 32) == 1


def test_empty_and_zero_differences_are_not_shrunk() -> None:
    for values in (np.zeros(0, np.float32), np.zeros(9, np.float32)):
        assert shrink_factor(values, NNADQ(1.0), 32) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("quantizer", [Unquantized(), NNADQ(1.0)])
def test_differences_that_are_not_finite_are_left_to_the_encoder(
    value: float, quantizer: Quantizer
) -> None:
    assert shrink_factor(np.asarray([1, value, 2], np.float32), quantizer, 32) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codec", [LOSSLESS, Codec(uplink_weight=1e-9, selection="none")])
def test_half_precision_differences_keep_their_norm_on_the_wire(
    dtype: torch.dtype, codec: Codec
) -> None:
    model = seeded(lambda: small_net().to(dtype))
    schema, _ = describe(record_of(model()), model)
    codec = dataclasses.replace(codec, bound_norm=True)
    for seed in range(20):
        start = {name: torch.zeros_like(value) for name, value in get_state(model()).items()}
        generator = torch.Generator().manual_seed(seed)
        trained = {
            name: 0.1 * torch.randn(value.shape, generator=generator)
            for name, value in start.items()
        }
        sent = send_up(schema, codec, start, trained)
        for name, value in trained.items():
            assert float(sent[name].double().norm()) <= float(value.double().norm()) * (1 + 1e-6)


def send_up(
    schema: ModelSchema, codec: Codec, start: ModelState, trained: ModelState
) -> ModelState:
    """Return the differences that an upload of a client holds."""
    method = FedOBD(codec=codec)
    header = Header(
        kind=Kind.BROADCAST, method=method.wire_id, round=1, stage=1, block_ids=all_blocks(schema)
    )
    client = ClientSession(method, schema, client=0)
    client.receive(Broadcast(header, start))
    upload = client.upload(trained, Report(num_examples=1, train_loss=0.0)).data
    sent = {name: torch.zeros(value.shape) for name, value in trained.items()}
    for _, segments in Payload.parse(upload, schema).blocks():
        for decoded in segments:
            spec = schema.tensors[decoded.segment.tensor]
            segment_of(sent, spec, decoded.segment).copy_(decoded.values)
    return sent


# --- openings ------------------------------------------------------------------------------------


def test_a_metric_that_is_no_number_is_named() -> None:
    keys = MetricKeys()
    for key in (keys.train_loss, keys.num_eval_examples):
        metrics: dict[str, Any] = {keys.num_examples: 3, key: [0.1, 0.2]}
        content = RecordDict({"metrics": MetricRecord(metrics)})
        with pytest.raises(UsageError, match=rf"reports '{key}' as \[0.1, 0.2\]; wanted a number"):
            _report(content, keys)


def make_opening(**changes: Any) -> Opening:
    schema, layout = describe(record_of(net()))
    values: dict[str, Any] = {"method": FedOBD(), "schema": schema, "layout": layout, "seed": 3}
    return Opening(**{**values, **changes})


@pytest.mark.parametrize(
    "opening",
    [
        make_opening(),
        make_opening(seed=-(2**70), shared_start=True),
        make_opening(metrics=MetricKeys(num_examples="n", eval_metric="f1")),
        make_opening(method=FedOBD(codec=Codec(selection="random", dropout_rate=0.125))),
    ],
    ids=["plain", "shared start", "metrics", "codec"],
)
def test_an_opening_comes_back_as_it_was(opening: Opening) -> None:
    for payload in (b"", b"\0", bytes(range(256)) * 9):
        assert Opening.unpack(opening.pack(payload)) == (opening, payload)


def refused(data: bytes) -> DecodeError:
    with pytest.raises(DecodeError) as error:
        Opening.unpack(data)
    return error.value


def test_every_prefix_of_an_opening_is_refused() -> None:
    data = make_opening().pack()
    for length in range(len(data)):
        assert refused(data[:length]).reason is DecodeReason.TRUNCATED


def test_every_flipped_bit_of_an_opening_is_refused() -> None:
    data = make_opening().pack()
    for position in range(len(data)):
        for bit in (0x01, 0x80):
            refused(data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :])


def seal_text(text: bytes, version: int = 1) -> bytes:
    return struct.pack("<4sBII", b"FOBO", version, len(text), zlib.crc32(text)) + text


def seal_terms(terms: object) -> bytes:
    return seal_text(zstandard.compress(json.dumps(terms).encode()))


def terms_of(opening: Opening) -> dict[str, Any]:
    data = opening.pack()
    terms = json.loads(zstandard.decompress(data[13:]))
    assert isinstance(terms, dict)
    return terms


@given(st.binary(max_size=300))
def test_random_bytes_are_no_opening(data: bytes) -> None:
    refused(data)
    refused(seal_text(data))
    refused(seal_text(zstandard.compress(data)))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, "fedobd", "fedavg", "float32", "parameter", 2**63, -1]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=12,
)


@given(json_values)
def test_any_json_under_a_right_checksum_is_an_opening_or_a_decode_error(value: Any) -> None:
    refused(seal_terms(value))


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return every container in a JSON value with each of its keys."""
    found: list[tuple[Any, Any]] = []
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        found += [(value, key), *places(inner)]
    return found


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_terms_with_one_value_changed_are_an_opening_or_a_decode_error(
    data: st.DataObject,
) -> None:
    terms = terms_of(make_opening(metrics=MetricKeys()))
    container, key = data.draw(st.sampled_from(places(terms)))
    if data.draw(st.booleans()):
        container[key] = data.draw(json_values)
    else:
        del container[key]
    try:
        opening, _ = Opening.unpack(seal_terms(terms))
    except DecodeError:
        return
    assert Opening.unpack(opening.pack()) == (opening, b"")


@pytest.mark.parametrize(
    "seed",
    [
        math.inf,
        -math.inf,
        1.5,
        math.nan,
        "x",
        None,
        [1],
    ],
)
def test_a_seed_that_is_no_whole_number_is_refused(seed: Any) -> None:
    assert refused(seal_terms({**terms_of(make_opening()), "seed": seed})).reason is (
        DecodeReason.FIELD
    )


def test_an_opening_that_unpacks_to_gigabytes_is_refused_before_it_does() -> None:
    bomb = zstandard.compress(b"[" + b" " * (1 << 27) + b"]")
    assert len(bomb) < 100_000
    assert "at most" in str(refused(seal_text(bomb)))
    unknown = zstandard.ZstdCompressor(write_content_size=False).compress(b"{}")
    refused(seal_text(unknown))


def test_deep_json_is_refused() -> None:
    refused(seal_text(zstandard.compress(b"[" * 100_000)))


def test_another_version_of_the_opening_is_refused_with_what_to_do() -> None:
    terms = make_opening().pack()[13:]
    assert "install the same fedobd on server and clients" in str(refused(seal_text(terms, 2)))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["keys"].pop(),
        lambda t: t["keys"].append(["new", "new"]),
        lambda t: t["schema"]["tensors"].pop(),
        lambda t: t["schema"]["blocks"].pop(),
        lambda t: t["options"]["codec"].update(dropout_rate=1.0),
        lambda t: t["options"]["codec"].update(uplink_quantizer="gzip"),
        lambda t: t.update(method="fedsgd"),
        lambda t: t["metrics"].update(more="x"),
    ],
)
def test_terms_that_do_not_fit_each_other_are_refused(change: Callable[[Any], Any]) -> None:
    terms = terms_of(make_opening(metrics=MetricKeys()))
    change(terms)
    refused(seal_terms(terms))


def test_a_hostile_opening_reaches_the_server_as_an_error_and_is_not_kept() -> None:
    become_server_app()
    good = make_opening()
    context = make_context()
    for data in (b"", b"FOBO", seal_terms({"seed": 1}), good.pack(b"no payload")):
        record = carry(b"x", BROADCAST, as_array(data, OPENING))
        message = Message(RecordDict({"arrays": record}), FIRST, "train")
        reply = CompressionMod()(message, context, stay)
        assert reply.has_error()
        assert not context.state


def test_an_altered_broadcast_is_an_error_reply_with_the_reason() -> None:
    nodes = make_nodes()
    grid = wrap(nodes)
    exchange(nodes, grid, record_of(net()))
    data = payloads(nodes.sent, BROADCAST)[0]
    for altered in (b"", data[:-1], data[:50] + b"\xff" + data[51:], data + b"\0", b"\0" * 99):
        context = nodes.contexts[FIRST]
        message = Message(RecordDict({"arrays": carry(altered, BROADCAST)}), FIRST, "train")
        reply = CompressionMod()(message, context, stay)
        assert reply.has_error()
        assert "[" in reason_of(reply)


# --- another version, another model --------------------------------------------------------------


def test_a_client_of_another_payload_format_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import fedobd.payload._wire as wire

    nodes = make_nodes()
    nodes.silent = {FIRST, SECOND}
    grid = wrap(nodes)
    ids = list(grid.push_messages(messages_to(nodes, record_of(net()))))
    monkeypatch.setattr(wire, "VERSION", VERSION + 1)
    nodes.silent = set()
    replies = list(grid.pull_messages(ids))
    assert len(replies) == 2
    for reply in replies:
        assert "[version]" in reason_of(reply)


def test_an_upload_of_another_payload_format_is_refused_by_the_server() -> None:
    nodes = make_nodes()

    def tamper(reply: Message) -> Message:
        arrays = reply.content["arrays"]
        assert isinstance(arrays, ArrayRecord)
        for key, array in arrays.items():
            data = array.data[:4] + bytes([VERSION + 1]) + array.data[5:]
            arrays[key] = Array(array.dtype, array.shape, array.stype, data)
        return reply

    nodes.tamper = tamper
    for reply in exchange(nodes, wrap(nodes), record_of(net())).values():
        assert "[version]" in reason_of(reply)


def test_a_client_opened_by_another_run_s_model_says_so_and_can_be_opened_again() -> None:
    nodes = make_nodes(make_app(stay))
    exchange(nodes, wrap(nodes), record_of(net()))
    other = seeded(lambda: nn.Linear(4, 3))
    replies = exchange(nodes, wrap(nodes), record_of(other()))
    for reply in replies.values():  # a new grid opens each node anew
        assert largest_difference(arrays_of(reply), values_of(record_of(other()))) == 0


# --- layouts -------------------------------------------------------------------------------------


def test_arrays_go_to_a_state_and_back() -> None:
    record = record_of(net())
    schema, layout = describe(record)
    state = layout.to_state(record, schema)
    assert list(state) == [spec.name for spec in schema.tensors]
    assert largest_difference(values_of(layout.to_arrays(state)), values_of(record)) == 0
    assert layout == Layout.of(schema)


def test_a_state_shares_no_memory_with_its_record() -> None:
    record = record_of(net())
    schema, layout = describe(record)
    for tensor in layout.to_state(record, schema).values():
        tensor.zero_()
    assert largest_difference(values_of(record), values_of(record_of(net()))) == 0


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 4)])
def test_element_types_and_shapes_survive(dtype: str, shape: tuple[int, ...]) -> None:
    values = {"x.weight": np.ones(2, np.float32), "y.num": np.ones(shape, dtype)}
    schema, layout = describe(from_values(values))
    back = values_of(layout.to_arrays(layout.to_state(from_values(values), schema)))
    assert back["y.num"].dtype == np.dtype(dtype)
    assert back["y.num"].shape == shape


def test_a_payload_is_no_array_of_a_model() -> None:
    record = record_of(net())
    schema, layout = describe(record)
    broken = ArrayRecord({**record, "2.bias": as_array(b"\0" * 20, UPLOAD)})
    with pytest.raises(UsageError, match="cannot be read"):
        layout.to_state(broken, schema)


def test_bfloat16_tensors_are_shown_as_float32() -> None:
    model = seeded(lambda: small_net().to(torch.bfloat16))
    schema, layout = describe(record_of(model()), model)
    shown = values_of(layout.to_arrays(get_state(model())))
    assert {value.dtype for value in shown.values()} == {np.dtype(np.float32)}
    assert {spec.dtype for spec in schema.tensors} == {torch.bfloat16}


# --- carriers ------------------------------------------------------------------------------------


@given(st.binary(max_size=50), st.sampled_from([BROADCAST, OPENING, UPLOAD, STATE]))
def test_a_payload_is_carried_by_its_kind_alone(payload: bytes, kind: str) -> None:
    record = carry(payload, kind)
    assert carried(record, kind) == payload
    for other in {BROADCAST, OPENING, UPLOAD, STATE} - {kind}:
        assert carried(record, other) is None
    content = RecordDict({"a": MetricRecord({"x": 1}), "b": ArrayRecord(), "c": record})
    assert carrier(content, kind) == "c"
    for nothing in (None, "text", MetricRecord({"x": 1}), ArrayRecord()):
        assert carried(nothing, kind) is None


def test_an_opening_rides_beside_the_broadcast() -> None:
    opening = as_array(b"open", OPENING)
    record = carry(b"model", BROADCAST, opening)
    assert (carried(record, BROADCAST), carried(record, OPENING)) == (b"model", b"open")
    assert record["opening"] is opening
    with pytest.raises(TypeError):
        record["payload"].numpy()


# --- identities ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, None),
        ({"partition-id": 3}, 3),
        ({"client-id": 5, "partition-id": 3}, 5),
        ({"client-id": "12"}, 12),
        ({"client-id": "clinic"}, None),
        ({"client-id": "clinic", "partition-id": 3}, None),
        ({"client-id": ""}, None),
        ({"client-id": 2.0}, 2),
        ({"client-id": 2.5}, None),
        ({"client-id": float("nan")}, None),
        ({"client-id": float("inf")}, None),
    ],
)
def test_a_client_id_is_a_whole_number_or_none(config: Any, wanted: int | None) -> None:
    assert client_id(make_context(**config)) == wanted


def test_a_node_says_who_it_is() -> None:
    become_server_app()
    request = Message(RecordDict({IDENTIFY: ConfigRecord({})}), FIRST, "query")
    for mod, has_model in ((CompressionMod(), False), (CompressionMod(net), True)):
        reply = mod(request, make_context(**{"client-id": 4}), stay)
        assert Identity.read(reply) == Identity(4, VERSION, has_model)


answers = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=8)


@given(st.dictionaries(st.sampled_from(["client-id", "format", "has-model", "x"]), answers))
def test_any_answer_is_an_identity_or_a_reason(entries: dict[str, Any]) -> None:
    become_server_app()
    request = Message(RecordDict({IDENTIFY: ConfigRecord({})}), FIRST, "query")
    content = RecordDict({IDENTIFY: ConfigRecord(entries)})
    found = Identity.read(Message(content, reply_to=request))
    assert isinstance(found, Identity | str)
    if isinstance(found, Identity):
        objection = found.objection(10, wants_model=False)
        legal = type(found.client) is int and 0 <= found.client < 10 and found.format == VERSION
        assert (objection is None) is legal


@pytest.mark.parametrize(
    ("identity", "reason"),
    [
        (Identity(0, VERSION, False), None),
        (Identity(9, VERSION, True), None),
        (Identity(10, VERSION, True), "its client-id is 10; allowed are 0 to 9"),
        (Identity(-1, VERSION, True), "its client-id is -1"),
        (Identity(None, VERSION, True), "neither client-id nor partition-id"),
        (Identity(1, VERSION + 1, True), "install the same fedobd on both"),
    ],
)
def test_an_identity_that_cannot_take_part_is_told_why(identity: Identity, reason: str) -> None:
    objection = identity.objection(10, wants_model=False)
    assert objection is None if reason is None else reason in str(objection)


def test_a_run_with_a_shared_start_wants_a_model() -> None:
    for has_model in (True, False):
        objection = Identity(1, VERSION, has_model).objection(10, wants_model=True)
        assert (objection is None) is has_model
    assert "CompressionMod(model_factory=...)" in str(objection)


def test_a_message_that_asks_for_a_broadcast_that_was_not_kept_is_refused() -> None:
    nodes = make_nodes()
    exchange(nodes, wrap(nodes), record_of(net()))
    content = RecordDict({"config": ConfigRecord({KEPT_ROUND: 4})})
    reply = CompressionMod()(Message(content, FIRST, "evaluate"), nodes.contexts[FIRST], stay)
    assert reply.has_error()


def test_a_strategy_with_a_clip_norm_runs_with_all_of_it() -> None:
    import flwr.serverapp.strategy as strategies
    from flwr.clientapp.mod import fixedclipping_mod

    strategy = strategies.DifferentialPrivacyClientSideFixedClipping(
        strategies.FedAvg(), 0.0, 0.25, 3
    )
    nodes = make_nodes(make_app(train_mods=[fixedclipping_mod]), 3)
    record = record_of(net())
    result = run_strategy(strategy, wrap(nodes, Codec()), record, 2)
    moved = update_norm(values_of(result.arrays), values_of(record))
    assert 0.05 < moved <= 0.5 + 1e-5
