"""CompressionMod and what it is made of: handshakes, keys of arrays, carriers, identities."""

from __future__ import annotations

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
from torch import nn

from fedobd import (
    Codec,
    DecodeError,
    DecodeReason,
    UsageError,
    get_state,
)
from fedobd.flower import CompressionMod, MetricKeys
from fedobd.flower._clients import client_id, read_client
from fedobd.flower._handshake import ArrayKeys, Handshake, describe
from fedobd.flower._messages import (
    BROADCAST,
    HANDSHAKE,
    IDENTIFY,
    KEPT_ROUND,
    STATE,
    UPLOAD,
    as_array,
    carried,
    carrier,
    carry,
)
from fedobd.flower._metrics import make_report
from fedobd.methods import FedOBD
from fedobd.payload import VERSION
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
        assert set(context.state) == {"mine", HANDSHAKE}


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


@pytest.mark.parametrize(
    ("mod", "story"),
    [
        *(("fixedclipping_mod", story) for story in CLIP_CODECS),
        ("adaptiveclipping_mod", "with dropout"),
    ],
)
def test_quantization_does_not_break_a_clip_norm(mod: str, story: str) -> None:
    import flwr.clientapp.mod as mods

    for seed in range(3):
        norm = float(np.random.default_rng(seed).uniform(0.01, 3))
        replies, w, _ = clipping_run(CLIP_CODECS[story], norm, seed, [getattr(mods, mod)])
        assert len(replies) == 3
        largest = max(float(np.abs(v).max()) for v in w.values())
        # adding to W and taking W away again rounds each element to float32
        slack = 2.0**-23 * (largest + norm) * math.sqrt(sum(v.size for v in w.values()))
        for reply in replies:
            assert update_norm(arrays_of(reply), w) <= norm + slack


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


# --- handshakes ----------------------------------------------------------------------------------


def test_a_metric_that_is_no_number_is_named() -> None:
    keys = MetricKeys()
    for key in (keys.train_loss, keys.num_eval_examples):
        metrics: dict[str, Any] = {keys.num_examples: 3, key: [0.1, 0.2]}
        content = RecordDict({"metrics": MetricRecord(metrics)})
        with pytest.raises(UsageError, match=rf"reports '{key}' as \[0.1, 0.2\]; wanted a number"):
            make_report(content, keys)


def make_handshake(**changes: Any) -> Handshake:
    schema, keys = describe(record_of(net()))
    values: dict[str, Any] = {"method": FedOBD(), "schema": schema, "keys": keys, "seed": 3}
    return Handshake(**{**values, **changes})


@pytest.mark.parametrize(
    "handshake",
    [
        make_handshake(),
        make_handshake(seed=-(2**70), shared_start=True),
        make_handshake(metrics=MetricKeys(num_examples="n", eval_metric="f1")),
        make_handshake(method=FedOBD(codec=Codec(selection="random", dropout_rate=0.125))),
    ],
    ids=["plain", "shared start", "metrics", "codec"],
)
def test_a_handshake_comes_back_as_it_was(handshake: Handshake) -> None:
    for payload in (b"", b"\0", bytes(range(256)) * 9):
        assert Handshake.unpack(handshake.pack(payload)) == (handshake, payload)


def refused(data: bytes) -> DecodeError:
    with pytest.raises(DecodeError) as error:
        Handshake.unpack(data)
    return error.value


def test_every_prefix_of_a_handshake_is_refused() -> None:
    data = make_handshake().pack()
    for length in range(len(data)):
        assert refused(data[:length]).reason is DecodeReason.TRUNCATED


def test_every_flipped_bit_of_a_handshake_is_refused() -> None:
    data = make_handshake().pack()
    for position in range(len(data)):
        for bit in (0x01, 0x80):
            refused(data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :])


def seal_text(text: bytes, version: int = 1) -> bytes:
    return struct.pack("<4sBII", b"FOBO", version, len(text), zlib.crc32(text)) + text


def seal_terms(terms: object) -> bytes:
    return seal_text(zstandard.compress(json.dumps(terms).encode()))


def terms_of(handshake: Handshake) -> dict[str, Any]:
    data = handshake.pack()
    terms = json.loads(zstandard.decompress(data[13:]))
    assert isinstance(terms, dict)
    return terms


@given(st.binary(max_size=300))
def test_random_bytes_are_no_handshake(data: bytes) -> None:
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
@settings(max_examples=50, deadline=None)
def test_any_json_under_a_right_checksum_is_a_handshake_or_a_decode_error(value: Any) -> None:
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
@settings(max_examples=150, deadline=None)
def test_terms_with_one_value_changed_are_a_handshake_or_a_decode_error(
    data: st.DataObject,
) -> None:
    terms = terms_of(make_handshake(metrics=MetricKeys()))
    container, key = data.draw(st.sampled_from(places(terms)))
    if data.draw(st.booleans()):
        container[key] = data.draw(json_values)
    else:
        del container[key]
    try:
        handshake, _ = Handshake.unpack(seal_terms(terms))
    except DecodeError:
        return
    assert Handshake.unpack(handshake.pack()) == (handshake, b"")


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
    assert refused(seal_terms({**terms_of(make_handshake()), "seed": seed})).reason is (
        DecodeReason.FIELD
    )


def test_a_handshake_that_unpacks_to_gigabytes_is_refused_before_it_does() -> None:
    bomb = zstandard.compress(b"[" + b" " * (1 << 27) + b"]")
    assert len(bomb) < 100_000
    assert "at most" in str(refused(seal_text(bomb)))
    unknown = zstandard.ZstdCompressor(write_content_size=False).compress(b"{}")
    refused(seal_text(unknown))


def test_deep_json_is_refused() -> None:
    refused(seal_text(zstandard.compress(b"[" * 100_000)))


def test_another_version_of_the_handshake_is_refused_with_what_to_do() -> None:
    terms = make_handshake().pack()[13:]
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
    terms = terms_of(make_handshake(metrics=MetricKeys()))
    change(terms)
    refused(seal_terms(terms))


def test_a_hostile_handshake_reaches_the_server_as_an_error_and_is_not_kept() -> None:
    become_server_app()
    good = make_handshake()
    context = make_context()
    for data in (b"", b"FOBO", seal_terms({"seed": 1}), good.pack(b"no payload")):
        record = carry(b"x", BROADCAST, as_array(data, HANDSHAKE))
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


def test_a_client_greeted_by_another_run_s_model_can_be_greeted_again() -> None:
    nodes = make_nodes(make_app(stay))
    exchange(nodes, wrap(nodes), record_of(net()))
    other = seeded(lambda: nn.Linear(4, 3))
    replies = exchange(nodes, wrap(nodes), record_of(other()))
    for reply in replies.values():  # a new grid greets each node anew
        assert largest_difference(arrays_of(reply), values_of(record_of(other()))) == 0


# --- keys of arrays ------------------------------------------------------------------------------


def test_arrays_go_to_a_state_and_back() -> None:
    record = record_of(net())
    schema, keys = describe(record)
    state = keys.to_state(record, schema)
    assert list(state) == [spec.name for spec in schema.tensors]
    assert largest_difference(values_of(keys.to_arrays(state)), values_of(record)) == 0
    assert keys == ArrayKeys.of(schema)


def test_a_state_shares_no_memory_with_its_record() -> None:
    record = record_of(net())
    schema, keys = describe(record)
    for tensor in keys.to_state(record, schema).values():
        tensor.zero_()
    assert largest_difference(values_of(record), values_of(record_of(net()))) == 0


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 4)])
def test_element_types_and_shapes_survive(dtype: str, shape: tuple[int, ...]) -> None:
    values = {"x.weight": np.ones(2, np.float32), "y.num": np.ones(shape, dtype)}
    schema, keys = describe(from_values(values))
    back = values_of(keys.to_arrays(keys.to_state(from_values(values), schema)))
    assert back["y.num"].dtype == np.dtype(dtype)
    assert back["y.num"].shape == shape


def test_a_payload_is_no_array_of_a_model() -> None:
    record = record_of(net())
    schema, keys = describe(record)
    broken = ArrayRecord({**record, "2.bias": as_array(b"\0" * 20, UPLOAD)})
    with pytest.raises(UsageError, match="cannot be read"):
        keys.to_state(broken, schema)


def test_bfloat16_tensors_are_shown_as_float32() -> None:
    model = seeded(lambda: small_net().to(torch.bfloat16))
    schema, keys = describe(record_of(model()), model)
    shown = values_of(keys.to_arrays(get_state(model())))
    assert {value.dtype for value in shown.values()} == {np.dtype(np.float32)}
    assert {spec.dtype for spec in schema.tensors} == {torch.bfloat16}


# --- carriers ------------------------------------------------------------------------------------


@given(st.binary(max_size=50), st.sampled_from([BROADCAST, HANDSHAKE, UPLOAD, STATE]))
def test_a_payload_is_carried_by_its_kind_alone(payload: bytes, kind: str) -> None:
    record = carry(payload, kind)
    assert carried(record, kind) == payload
    for other in {BROADCAST, HANDSHAKE, UPLOAD, STATE} - {kind}:
        assert carried(record, other) is None
    content = RecordDict({"a": MetricRecord({"x": 1}), "b": ArrayRecord(), "c": record})
    assert carrier(content, kind) == "c"
    for nothing in (None, "text", MetricRecord({"x": 1}), ArrayRecord()):
        assert carried(nothing, kind) is None


def test_a_handshake_rides_beside_the_broadcast() -> None:
    handshake = as_array(b"open", HANDSHAKE)
    record = carry(b"model", BROADCAST, handshake)
    assert (carried(record, BROADCAST), carried(record, HANDSHAKE)) == (b"model", b"open")
    assert record["opening"] is handshake
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


def answer(entries: dict[str, Any]) -> Message:
    become_server_app()
    request = Message(RecordDict({IDENTIFY: ConfigRecord({})}), FIRST, "query")
    return Message(RecordDict({IDENTIFY: ConfigRecord(entries)}), reply_to=request)


def test_a_node_says_who_it_is_and_whether_it_has_a_model() -> None:
    become_server_app()
    request = Message(RecordDict({IDENTIFY: ConfigRecord({})}), FIRST, "query")
    for mod, has_model in ((CompressionMod(), False), (CompressionMod(net), True)):
        reply = mod(request, make_context(**{"client-id": 4}), stay)
        assert read_client(reply, 10, wants_model=False) == 4
        with_model = read_client(reply, 10, wants_model=True)
        if has_model:
            assert with_model == 4
        else:
            assert "CompressionMod(model_factory=...)" in str(with_model)


values = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=8)


@given(st.dictionaries(st.sampled_from(["client-id", "format", "has-model", "x"]), values))
def test_any_answer_is_a_client_or_a_reason(entries: dict[str, Any]) -> None:
    client = read_client(answer(entries), 10, wants_model=False)
    number, version = entries.get("client-id"), entries.get("format")
    if type(number) is int and 0 <= number < 10 and version == VERSION:
        assert client == number
    else:
        assert isinstance(client, str)


@pytest.mark.parametrize(
    ("client", "version", "reason"),
    [
        (10, VERSION, "its client-id is 10; allowed are 0 to 9"),
        (-1, VERSION, "its client-id is -1"),
        (None, VERSION, "neither client-id nor partition-id"),
        (1, VERSION + 1, "install the same fedobd on both"),
        (None, None, "no identity that this version understands"),
        ("0", VERSION, "no identity that this version understands"),
        (0.0, VERSION, "no identity that this version understands"),
        ([0], VERSION, "no identity that this version understands"),
        (True, VERSION, "no identity that this version understands"),
        (0, "1", "no identity that this version understands"),
    ],
)
def test_a_node_that_cannot_take_part_is_told_why(client: Any, version: Any, reason: str) -> None:
    entries = {"client-id": client, "format": version, "has-model": True}
    entries = {key: value for key, value in entries.items() if value is not None}
    assert reason in str(read_client(answer(entries), 10, wants_model=False))


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
