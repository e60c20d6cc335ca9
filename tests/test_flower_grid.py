"""CodecGrid: any of Flower's strategies runs on it, and sees W plus what clients changed."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

import fedobd.flower._model_codec as codec_module
from fedobd import Codec, UsageError, decompose
from fedobd.flower import CodecGrid, CompressionMod
from fedobd.flower._handshake import Handshake, describe
from fedobd.flower._messages import BROADCAST, HANDSHAKE, UPLOAD
from fedobd.models import DigitsCNN
from fedobd.payload import encode_payload
from tests.flower_grid import FIRST_NODE_ID, InProcessGrid
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
    quick_collections,
    reason_of,
    record_of,
    reply_with,
    run_strategy,
    seeded,
    small_net,
    stay,
    target,
    values_of,
    wrap,
)

FIRST, SECOND, THIRD = FIRST_NODE_ID, FIRST_NODE_ID + 1, FIRST_NODE_ID + 2

net = seeded(small_net)

pytestmark = pytest.mark.usefixtures(quick_collections.__name__)


def norm_net() -> nn.Module:
    """With a BatchNorm, whose counter is an integer of 0 dimensions."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))


class Tied(nn.Module):
    """An embedding whose weight is the output layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 4)
        self.middle = nn.Linear(4, 4)
        self.output = nn.Linear(4, 12, bias=False)
        self.output.weight = self.embedding.weight


class Scaled(nn.Module):
    """Parameters and buffers of 0 dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.fc = nn.Linear(3, 2)
        self.register_buffer("steps", torch.tensor(7))


def frozen_net() -> nn.Module:
    model = small_net()
    for parameter in model[0].parameters():  # type: ignore[index]
        parameter.requires_grad_(False)
    return model


def fed_avg(**options: Any) -> Any:
    from flwr.serverapp.strategy import FedAvg

    return FedAvg(**options)


# --- stock strategies ----------------------------------------------------------------------------

PLAIN = (
    "FedAvg",
    "FedAvgM",
    "FedAdagrad",
    "FedAdam",
    "FedYogi",
    "FedProx",
    "FedMedian",
    "FedTrimmedAvg",
    "Krum",
    "MultiKrum",
    "Bulyan",
    "QFedAvg",
    "DifferentialPrivacyServerSideFixedClipping",
    "DifferentialPrivacyServerSideAdaptiveClipping",
    "DifferentialPrivacyClientSideFixedClipping",
    "DifferentialPrivacyClientSideAdaptiveClipping",
)

NUM_NODES = 4


def make_strategy(name: str) -> tuple[Any, list[Any]]:
    """Return a strategy and the mods that its clients' train function needs."""
    import flwr.serverapp.strategy as strategies
    from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod

    if name.startswith("Differential"):
        make = getattr(strategies, name)
        inner = strategies.FedAvg()
        if "Fixed" in name:
            strategy = make(inner, 0.1, 0.7, NUM_NODES)
            return strategy, [fixedclipping_mod] if "Client" in name else []
        strategy = make(inner, 0.1, NUM_NODES, initial_clipping_norm=0.7)
        return strategy, [adaptiveclipping_mod] if "Client" in name else []
    options: dict[str, dict[str, Any]] = {
        "FedProx": {"proximal_mu": 0.1},
        "QFedAvg": {"client_learning_rate": 0.5, "q": 0.2},
        "Bulyan": {"num_malicious_nodes": 0},
        "FedTrimmedAvg": {"beta": 0.25},
        "FedAvgM": {"server_momentum": 0.5},
    }
    return getattr(strategies, name)(**options.get(name, {})), []


@functools.cache
def outcome(name: str, codec: Codec | None, num_rounds: int = 2) -> tuple[Any, InProcessGrid]:
    """Run a stock strategy, with a codec or on the bare grid."""
    strategy, train_mods = make_strategy(name)
    nodes = make_nodes(make_app(train_mods=train_mods), NUM_NODES)
    grid = nodes if codec is None else wrap(nodes, codec)
    result = run_strategy(strategy, grid, record_of(net()), num_rounds)
    if codec is not None:
        check_traffic(grid, nodes)
    return result, nodes


def check_traffic(grid: Any, nodes: InProcessGrid) -> None:
    """All array bytes that travelled are payloads, and Traffic counts every one."""
    sent = {stype: sum(map(len, payloads(nodes.sent, stype))) for stype in (BROADCAST, HANDSHAKE)}
    received = sum(map(len, payloads(nodes.replies, UPLOAD)))
    assert grid.traffic.broadcasts == sent[BROADCAST]
    assert grid.traffic.handshakes == sent[HANDSHAKE]
    assert grid.traffic.uploads == received
    assert array_bytes(nodes.sent) == sum(sent.values())
    assert array_bytes(nodes.replies) == received


def array_bytes(messages: list[Message]) -> int:
    return sum(
        len(array.data)
        for message in messages
        if message.has_content()
        for record in message.content.array_records.values()
        for array in record.values()
    )


@pytest.mark.parametrize("name", PLAIN)
def test_a_stock_strategy_ends_with_the_same_model_where_nothing_is_quantized(name: str) -> None:
    plain, _ = outcome(name, None)
    ours, _ = outcome(name, LOSSLESS)
    first, second = values_of(plain.arrays), values_of(ours.arrays)
    # a reply is W + (trained - W): three float32 roundings, which an adaptive rule may amplify
    tolerance = 1e-4 if name in ("FedAdam", "FedYogi", "FedAdagrad") else 2e-6
    assert largest_difference(first, second) <= tolerance
    assert [v.dtype for v in first.values()] == [v.dtype for v in second.values()]
    assert plain.train_metrics_clientapp.keys() == ours.train_metrics_clientapp.keys() == {1, 2}
    for number, metrics in plain.train_metrics_clientapp.items():
        assert metrics.keys() == ours.train_metrics_clientapp[number].keys()
        assert dict(ours.train_metrics_clientapp[number]) == pytest.approx(dict(metrics))
    for number, metrics in plain.evaluate_metrics_clientapp.items():
        found = dict(ours.evaluate_metrics_clientapp[number])
        assert found == pytest.approx(dict(metrics), rel=1e-3)


@pytest.mark.parametrize("name", PLAIN)
def test_a_stock_strategy_ends_near_it_where_payloads_are_quantized(name: str) -> None:
    plain, _ = outcome(name, None)
    ours, nodes = outcome(name, ALL_BLOCKS)
    difference = largest_difference(values_of(plain.arrays), values_of(ours.arrays))
    # β = 0.001 puts some 210·√d levels on each side, and clients pull towards fixed targets
    assert 0 < difference < (0.2 if name in ("FedAdam", "FedYogi", "FedAdagrad") else 0.02)
    assert not payloads(nodes.replies, "numpy.ndarray")


@pytest.mark.parametrize("name", ["FedAvg", "FedAdam", "FedMedian", "Krum"])
def test_a_stock_strategy_runs_with_blocks_dropped(name: str) -> None:
    ours, nodes = outcome(name, Codec(dropout_rate=0.5))
    assert set(ours.train_metrics_clientapp) == {1, 2}
    uploads = payloads(nodes.replies, UPLOAD)
    whole = payloads(outcome(name, ALL_BLOCKS)[1].replies, UPLOAD)
    assert len(uploads) == len(whole) == 2 * NUM_NODES
    assert sum(map(len, uploads)) < sum(map(len, whole))
    assert all(np.isfinite(v).all() for v in values_of(ours.arrays).values())


@pytest.mark.parametrize("serialize", [True, False])
def test_a_round_is_the_same_with_and_without_serialization(serialize: bool) -> None:
    nodes = make_nodes(num_nodes=3, serialize=serialize)
    result = run_strategy(fed_avg(), wrap(nodes, Codec()), record_of(net()), 3)
    reference = make_nodes(num_nodes=3)
    wanted = run_strategy(fed_avg(), wrap(reference, Codec()), record_of(net()), 3)
    assert payloads(nodes.sent, BROADCAST) == payloads(reference.sent, BROADCAST)
    assert largest_difference(values_of(result.arrays), values_of(wanted.arrays)) == 0


@pytest.mark.parametrize(
    "codec",
    [
        Codec(selection="random", dropout_rate=0.4),
        Codec(
            uplink_quantizer="stochastic",
            downlink_quantizer="stochastic",
            selection="random",
            stochastic_levels=7,
        ),
        Codec(uplink_weight=10.0, downlink_weight=10.0, selection="none"),
    ],
    ids=["random blocks", "stochastic and random", "coarse"],
)
def test_two_runs_of_one_seed_send_the_same_bytes(codec: Codec) -> None:
    runs = []
    for seed in (5, 5, 6):
        nodes = make_nodes(num_nodes=3)
        result = run_strategy(fed_avg(), wrap(nodes, codec, seed=seed), record_of(net()), 2)
        uploads = sorted(payloads(nodes.replies, UPLOAD))
        runs.append((payloads(nodes.sent, BROADCAST), uploads, values_of(result.arrays)))
    assert runs[0][:2] == runs[1][:2]
    assert largest_difference(runs[0][2], runs[1][2]) == 0
    by_chance = codec.selection == "random" or codec.uplink_quantizer == "stochastic"
    assert (runs[0][1] != runs[2][1]) is by_chance


# --- what a strategy sees of a reply -------------------------------------------------------------


def exchange(
    grid: CodecGrid, nodes: InProcessGrid, record: ArrayRecord, kind: str = "train"
) -> dict[int, Message]:
    """Send an ArrayRecord to all nodes; return their replies by node."""
    replies = grid.send_and_receive(messages_to(nodes, record, kind), timeout=5)
    return {reply.metadata.src_node_id: reply for reply in replies}


def arrays_of(reply: Message) -> Values:
    assert not reply.has_error(), reply.error
    record = reply.content["arrays"]
    assert isinstance(record, ArrayRecord)
    return values_of(record)


def test_a_reply_is_w_plus_the_difference_to_what_the_client_received() -> None:
    seen: dict[int, tuple[Values, Values]] = {}

    def train(message: Message, context: Any) -> Message:
        reply = pull(message, context)
        before = message.content["arrays"]
        assert isinstance(before, ArrayRecord)
        seen[context.node_id] = (values_of(before), arrays_of(reply))
        return reply

    codec = Codec(downlink_weight=5.0, uplink_quantizer="none", selection="none")
    nodes = make_nodes(make_app(train))
    record = record_of(net())
    replies = exchange(wrap(nodes, codec), nodes, record)
    w = values_of(record)
    for node, (received, trained) in seen.items():
        assert largest_difference(w, received) > 0.01  # the broadcast was coarse
        wanted = {key: w[key] + (trained[key] - received[key]) for key in w}
        assert largest_difference(arrays_of(replies[node]), wanted) == 0


def test_a_dropped_block_comes_back_as_w_to_the_bit() -> None:
    codec = Codec(dropout_rate=0.5, downlink_weight=5.0)
    nodes = make_nodes()
    record = record_of(net())
    w = values_of(record)
    for reply in exchange(wrap(nodes, codec), nodes, record).values():
        came = arrays_of(reply)
        same = {key for key in w if np.array_equal(came[key], w[key])}
        assert same
        assert same != set(w)
        for weight, bias in (("0.weight", "0.bias"), ("2.weight", "2.bias")):
            assert (weight in same) == (bias in same)


@pytest.mark.parametrize("codec", [Codec(downlink_weight=5.0), LOSSLESS])
@pytest.mark.parametrize("factory", [small_net, norm_net, Scaled, Tied])
def test_w_stays_as_it_is_over_many_rounds_in_which_clients_change_nothing(
    factory: Callable[[], nn.Module], codec: Codec
) -> None:
    nodes = make_nodes(make_app(stay))
    record = record_of(seeded(factory)())
    result = run_strategy(fed_avg(fraction_evaluate=0.0), wrap(nodes, codec), record, 4)
    first, last = values_of(record), values_of(result.arrays)
    for key, value in first.items():
        assert np.array_equal(value, last[key]), key


def sixteen_bits() -> nn.Module:
    return small_net().to(torch.float16)


def bfloat() -> nn.Module:
    return small_net().to(torch.bfloat16)


def between(record: ArrayRecord) -> ArrayRecord:
    """Return values that a strategy may hold, between two that 16 bits can hold."""
    return from_values({k: v.astype(np.float32) * 1.0009 for k, v in values_of(record).items()})


@pytest.mark.parametrize("factory", [sixteen_bits, bfloat])
def test_a_strategy_may_hold_finer_values_than_a_model_of_16_bits(
    factory: Callable[[], nn.Module],
) -> None:
    model = seeded(factory)
    grid = wrap(nodes := make_nodes(make_app(stay)), ALL_BLOCKS, model_factory=model)
    exchange(grid, nodes, record_of(model()))
    w = between(record_of(model()))
    for reply in exchange(grid, nodes, w).values():
        assert largest_difference(arrays_of(reply), values_of(w)) == 0


def test_float64_arrays_come_back_as_w_where_nothing_changed() -> None:
    w = {k: v.astype(np.float64) * (1 + 1e-10) for k, v in values_of(record_of(net())).items()}
    nodes = make_nodes(make_app(stay))
    for reply in exchange(wrap(nodes), nodes, from_values(w)).values():
        assert largest_difference(arrays_of(reply), w) == 0


def test_an_upload_into_fortran_ordered_arrays_is_not_lost() -> None:
    w = {k: np.asfortranarray(v) for k, v in values_of(record_of(net())).items()}
    assert any(not v.flags.c_contiguous for v in w.values())
    nodes = make_nodes()
    for node, reply in exchange(wrap(nodes), nodes, from_values(w)).items():
        for key, value in arrays_of(reply).items():
            wanted = w[key] + 0.5 * (target(key, w[key].shape, node - FIRST) - w[key])
            assert np.allclose(value, wanted, atol=1e-6), key


def test_a_client_may_return_fortran_ordered_arrays() -> None:
    def train(message: Message, context: Any) -> Message:
        values = arrays_of(pull(message, context))
        return reply_with(message, {k: np.asfortranarray(v) for k, v in values.items()})

    record = record_of(net())
    nodes, reference = make_nodes(make_app(train)), make_nodes()
    ours = exchange(wrap(nodes), nodes, record)
    wanted = exchange(wrap(reference), reference, record)
    for node, reply in ours.items():
        assert largest_difference(arrays_of(reply), arrays_of(wanted[node])) == 0


def test_lists_of_arrays_are_told_apart_by_position() -> None:
    arrays = [np.arange(12, dtype=np.float32).reshape(3, 4), np.ones(4, np.float32)]
    record = ArrayRecord(arrays)
    nodes = make_nodes()
    for node, reply in exchange(wrap(nodes), nodes, record).items():
        came = arrays_of(reply)
        assert list(came) == list(record)
        for key, value in zip(came, arrays, strict=True):
            wanted = value + 0.5 * (target(key, value.shape, node - FIRST) - value)
            assert np.allclose(came[key], wanted, atol=1e-5)


def test_counters_go_on_as_without_the_grid_after_fedavg_made_them_float64() -> None:
    results = []
    for codec in (None, LOSSLESS, Codec(selection="none")):
        nodes = make_nodes(make_app(count_and_pull), 3)
        grid = nodes if codec is None else wrap(nodes, codec)
        result = run_strategy(fed_avg(), grid, record_of(seeded(norm_net)()), 3)
        results.append(values_of(result.arrays))
    plain, lossless, quantized = results
    assert plain["1.num_batches_tracked"].dtype == np.float64
    assert largest_difference(plain, lossless) <= 2e-6
    for key in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert np.allclose(plain[key], quantized[key], atol=1e-6)  # buffers are never quantized
        assert plain[key].dtype == quantized[key].dtype


def count_and_pull(message: Message, context: Any) -> Message:
    """Train as a module does: what came is loaded into the module's own types."""
    record = message.content["arrays"]
    assert isinstance(record, ArrayRecord)
    model = seeded(norm_net)()
    model.load_state_dict(record.to_torch_state_dict())
    message.content["arrays"] = ArrayRecord(model.state_dict())
    return pull(message, context)


def test_tensors_of_0_dimensions_come_back_trained() -> None:
    model = seeded(Scaled)
    nodes = make_nodes()
    for factory in (None, model):
        for reply in exchange(
            wrap(nodes, model_factory=factory), nodes, record_of(model())
        ).values():
            came = arrays_of(reply)
            assert came["scale"].shape == came["steps"].shape == ()
            assert float(came["scale"]) != 1.5
            assert came["steps"].dtype == np.int64
            assert int(came["steps"]) in (10, 11)
        for node in (FIRST, SECOND):
            nodes.forget(node)


# --- models whose factory the grid is given ------------------------------------------------------


class WithExtraState(nn.Linear):
    """Keeps something in its state_dict that is neither parameter nor buffer."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.ones(1)

    def set_extra_state(self, state: torch.Tensor) -> None:
        pass


def test_extra_state_cannot_travel() -> None:
    model = WithExtraState(2, 2)
    with pytest.raises(UsageError, match=r"entry '_extra_state' of the model's state_dict is"):
        describe(record_of(model), lambda: WithExtraState(2, 2))


def test_tied_tensors_travel_once_and_come_back_under_both_names() -> None:
    model = seeded(Tied)
    sizes = []
    for factory in (None, model):
        nodes = make_nodes()
        grid = wrap(nodes, model_factory=factory)
        replies = exchange(grid, nodes, record_of(model()))
        sizes.append(len(payloads(nodes.sent, BROADCAST)[0]))
        for reply in replies.values():
            came = arrays_of(reply)
            assert list(came) == list(model().state_dict())
            if factory is not None:
                assert np.array_equal(came["embedding.weight"], came["output.weight"])
    assert sizes[0] - sizes[1] == pytest.approx(12 * 4 * 4, abs=16)


def test_frozen_parameters_travel_once_and_come_back_as_w() -> None:
    model = seeded(frozen_net)
    received: list[Values] = []

    def train(message: Message, context: Any) -> Message:
        record = message.content["arrays"]
        assert isinstance(record, ArrayRecord)
        received.append(values_of(record))
        return pull(message, context)

    nodes = make_nodes(make_app(train))
    grid = wrap(nodes, Codec(selection="none"), model_factory=model)
    result = run_strategy(fed_avg(), grid, record_of(model()), 3)
    w = values_of(record_of(model()))
    frozen = [key for key in w if key.startswith("0.")]
    for values in received:
        for key in frozen:
            assert np.array_equal(values[key], w[key])
    for key in frozen:  # the mean of equal values, as FedAvg rounds it
        assert np.allclose(values_of(result.arrays)[key], w[key], atol=1e-7)
    trained = sum(v.nbytes for k, v in w.items() if k not in frozen)
    whole = sum(v.nbytes for v in w.values())
    bare = wrap(reference := make_nodes(), LOSSLESS)
    exchange(bare, reference, record_of(model()))
    thin = wrap(reference2 := make_nodes(), LOSSLESS, model_factory=model)
    exchange(thin, reference2, record_of(model()))
    saved = len(payloads(reference.sent, BROADCAST)[0]) - len(
        payloads(reference2.sent, BROADCAST)[0]
    )
    assert saved == pytest.approx(whole - trained, abs=16)


def test_a_bfloat16_model_trains_through_float32_arrays() -> None:
    model = seeded(bfloat)
    nodes = make_nodes()
    grid = wrap(nodes, Codec(selection="none"), model_factory=model)
    result = run_strategy(fed_avg(), grid, record_of(model()), 6)
    for key, value in values_of(result.arrays).items():
        wanted = np.mean([target(key, value.shape, c) * (10 + c) for c in (0, 1)], axis=0) / 10.5
        assert value.dtype == np.float32
        assert np.allclose(value, wanted, atol=0.06), key


def test_names_alone_and_a_model_factory_give_the_same_tensors() -> None:
    model = seeded(DigitsCNN)
    record = record_of(model())
    by_name, keys = describe(record)
    by_model, other = describe(record, model)
    assert by_model == decompose(model())
    assert by_name.tensors == by_model.tensors
    assert keys == other
    assert by_name.num_parameters == by_model.num_parameters


# --- what travels --------------------------------------------------------------------------------


def test_a_broadcast_is_encoded_once_a_round_and_shared_by_all_its_messages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    encode = encode_payload

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return encode(*args, **options)

    monkeypatch.setattr(codec_module, "encode_payload", counted)
    nodes = make_nodes(num_nodes=5)
    run_strategy(fed_avg(), wrap(nodes, Codec()), record_of(net()), 3)
    trains = [m for m in nodes.sent if m.metadata.message_type == "train"]
    evaluates = [m for m in nodes.sent if m.metadata.message_type == "evaluate"]
    assert len(trains) == len(evaluates) == 15
    assert len(calls) == 4  # the first model, and one after each round
    objects = [payloads([m], BROADCAST)[0] for m in nodes.sent]
    for start in range(0, 30, 5):
        assert len({id(data) for data in objects[start : start + 5]}) == 1
    # a round is evaluated on what the next one trains from
    for evaluated, trained in ((5, 10), (15, 20)):
        assert objects[evaluated] is objects[trained]
    assert len({id(data) for data in objects}) == 4


def test_messages_of_a_round_share_one_content_where_the_strategys_did() -> None:
    pushed: list[Message] = []

    class Watching(InProcessGrid):
        def push_messages(self, messages: Any) -> list[str]:
            messages = list(messages)
            pushed.extend(messages)
            return super().push_messages(messages)

    nodes = Watching(make_app(), [{"partition-id": n} for n in range(4)])
    grid = wrap(nodes, Codec())
    run_strategy(fed_avg(fraction_evaluate=0.0), grid, record_of(net()), 2)
    assert len({id(message.content) for message in pushed[:4]}) == 1
    assert len({id(message.content) for message in pushed[4:]}) == 1


def test_the_strategys_own_messages_and_arrays_are_not_changed() -> None:
    nodes = make_nodes(serialize=False)
    record = record_of(net())
    messages = messages_to(nodes, record)
    before = dict(record)
    wrap(nodes, Codec()).send_and_receive(messages, timeout=5)
    for message in messages:
        assert message.content["arrays"] is record
    assert dict(record) == before
    assert all(array.stype == "numpy.ndarray" for array in record.values())


def test_arrays_that_were_changed_in_place_are_encoded_anew() -> None:
    nodes = make_nodes(make_app(stay))
    grid = wrap(nodes)
    record = record_of(net())
    exchange(grid, nodes, record)
    record["3.bias"] = Array(np.full(2, 9.0, np.float32))
    for reply in exchange(grid, nodes, record).values():
        assert np.array_equal(arrays_of(reply)["3.bias"], [9, 9])


def test_two_models_in_one_push_are_answered_apart() -> None:
    nodes = make_nodes(make_app(stay))
    grid = wrap(nodes, ALL_BLOCKS)
    records = [record_of(net()), record_of(seeded(small_net, 8)())]
    messages = [messages_to(nodes, record)[i] for i, record in enumerate(records)]
    replies = {r.metadata.src_node_id: r for r in grid.send_and_receive(messages, timeout=5)}
    for node, record in zip((FIRST, SECOND), records, strict=True):
        assert largest_difference(arrays_of(replies[node]), values_of(record)) == 0


def test_a_handshake_goes_once_to_each_node_and_never_in_the_broadcast() -> None:
    nodes = make_nodes(num_nodes=3)
    grid = wrap(nodes, Codec())
    run_strategy(fed_avg(), grid, record_of(net()), 3)
    greeted = [m.metadata.dst_node_id for m in nodes.sent if payloads([m], HANDSHAKE)]
    assert sorted(greeted) == [FIRST, SECOND, THIRD]
    assert len(set(payloads(nodes.sent, HANDSHAKE))) == 1
    handshake, rest = Handshake.unpack(payloads(nodes.sent, HANDSHAKE)[0])
    assert rest == b""
    assert handshake.schema == describe(record_of(net()))[0]
    for message in nodes.sent:
        assert len(message.content.array_records) == 1
        arrays = message.content["arrays"]
        assert isinstance(arrays, ArrayRecord)
        assert "payload" in arrays
        assert len(payloads([message], BROADCAST)) == 1
        kinds = {type(r).__name__ for r in message.content.values()}
        assert kinds == {"ArrayRecord", "ConfigRecord"}
    assert grid.traffic.resent == 0


@pytest.mark.parametrize("factory", [None, seeded(frozen_net)])
def test_a_node_that_forgot_is_greeted_again_within_the_round(
    factory: Callable[[], nn.Module] | None,
) -> None:
    nodes = make_nodes(num_nodes=3)
    grid = wrap(nodes, LOSSLESS, model_factory=factory)
    record = record_of(seeded(frozen_net)())
    before = exchange(grid, nodes, record)
    nodes.forget(SECOND)
    after = exchange(grid, nodes, record)
    assert after.keys() == before.keys() == {FIRST, SECOND, THIRD}
    for node, reply in after.items():
        assert largest_difference(arrays_of(reply), arrays_of(before[node])) == 0
    assert grid.traffic.resent == 1
    assert len(payloads(nodes.sent, HANDSHAKE)) == 4
    check_traffic(grid, nodes)
    nodes.forget(SECOND)
    exchange(grid, nodes, record)
    assert grid.traffic.resent == 2


def test_a_node_that_forgets_each_message_is_answered_with_an_error_after_one_try() -> None:
    nodes = make_nodes(make_app(stay))
    mod = CompressionMod()

    def forgetful(message: Message, context: Any) -> Message:
        reply = mod(message, context, stay)
        context.state = RecordDict()
        return reply

    nodes._app = forgetful
    grid = wrap(nodes)
    for _ in range(3):
        assert len(exchange(grid, nodes, record_of(net()))) == 2
    assert grid.traffic.resent == 4

    def deaf(message: Message, context: Any) -> Message:
        record = message.content["arrays"]
        assert isinstance(record, ArrayRecord)
        if "opening" in record:
            del record["opening"]
        return mod(message, context, stay)

    nodes = make_nodes(deaf)
    grid = wrap(nodes)
    for reply in exchange(grid, nodes, record_of(net())).values():
        assert reply.has_error()
        assert "this node holds no opening payload" in reason_of(reply)
    assert grid.traffic.resent == 2


def test_a_reply_is_addressed_as_an_answer_to_the_message_that_was_pushed() -> None:
    nodes = make_nodes(num_nodes=3)
    grid = wrap(nodes)
    record = record_of(net())
    exchange(grid, nodes, record)
    nodes.forget(SECOND)
    ids = list(grid.push_messages(messages_to(nodes, record)))
    replies: list[Message] = []
    while len(replies) < 3:
        replies += grid.pull_messages(ids)
    assert sorted(r.metadata.reply_to_message_id for r in replies) == sorted(ids)
    for reply in replies:
        assert reply.metadata.message_type == "train"
        assert ids.index(reply.metadata.reply_to_message_id) == (
            reply.metadata.src_node_id - FIRST
        )
    assert list(grid.pull_messages(ids)) == []


@pytest.mark.parametrize("codec", [Codec(), LOSSLESS])
def test_a_shared_start_sends_a_fingerprint_instead_of_the_first_model(codec: Codec) -> None:
    nodes = make_nodes(make_app(mods=[CompressionMod(model_factory=net)]))
    grid = wrap(nodes, codec, shared_start=True)
    first = exchange(grid, nodes, record_of(net()))
    assert len(payloads(nodes.sent, BROADCAST)[0]) < 100
    for node, reply in first.items():
        for key, value in values_of(record_of(net())).items():
            wanted = value + 0.5 * (target(key, value.shape, node - FIRST) - value)
            if codec == LOSSLESS:
                assert np.allclose(arrays_of(reply)[key], wanted, atol=1e-6)
    second = exchange(grid, nodes, record_of(seeded(small_net, 4)()))
    assert not any(reply.has_error() for reply in second.values())
    assert len(payloads(nodes.sent, BROADCAST)[-1]) > 100


def test_a_shared_start_is_refused_by_clients_without_a_model() -> None:
    nodes = make_nodes()
    grid = wrap(nodes, shared_start=True)
    for _ in range(2):
        for reply in exchange(grid, nodes, record_of(net())).values():
            assert reply.has_error()
            assert "wanted CompressionMod(model_factory=...)" in reason_of(reply)
    result = run_strategy(fed_avg(), grid, record_of(net()), 2)
    assert result.train_metrics_clientapp == {}


def test_a_shared_start_is_refused_by_clients_of_another_model() -> None:
    nodes = make_nodes(make_app(mods=[CompressionMod(model_factory=seeded(small_net, 9))]))
    for reply in exchange(wrap(nodes, shared_start=True), nodes, record_of(net())).values():
        assert "holds another initial model than the server" in reason_of(reply)


def test_a_shared_start_works_for_tied_tensors() -> None:
    model = seeded(Tied)
    for factory in (model, None):
        nodes = make_nodes(make_app(stay, mods=[CompressionMod(model_factory=model)]))
        grid = wrap(nodes, shared_start=True, model_factory=factory)
        for reply in exchange(grid, nodes, record_of(model())).values():
            assert largest_difference(arrays_of(reply), values_of(record_of(model()))) == 0


# --- what goes wrong at the server ---------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_w_that_is_not_finite_is_refused_with_the_tensor_named(value: float) -> None:
    nodes = make_nodes()
    values = values_of(record_of(net()))
    values["2.bias"] = values["2.bias"] * np.float32(value)
    grid = wrap(nodes, Codec())
    with pytest.raises(UsageError, match=r"2\.bias"):
        exchange(grid, nodes, from_values(values))
    assert nodes.sent == []
    exchange(grid, nodes, record_of(net()))  # and the grid can go on


def test_another_model_in_mid_run_is_refused() -> None:
    nodes = make_nodes()
    grid = wrap(nodes)
    exchange(grid, nodes, record_of(net()))
    with pytest.raises(UsageError, match="other arrays than this run's model"):
        exchange(grid, nodes, record_of(seeded(norm_net)()))
    values = values_of(record_of(net()))
    values["3.bias"] = np.zeros(3, np.float32)
    with pytest.raises(
        UsageError, match=r"'3\.bias' has shape \(3,\); this run's model has \(2,\)"
    ):
        exchange(grid, nodes, from_values(values))


def test_arrays_that_cannot_be_averaged_are_refused() -> None:
    nodes = make_nodes()
    for bad in (np.zeros(3, np.complex64), np.zeros(3, np.uint16), np.array(["a"])):
        with pytest.raises(UsageError, match="element type"):
            exchange(wrap(nodes), nodes, from_values({"w": np.ones(2, np.float32), "bad": bad}))


def test_a_model_that_does_not_fit_its_factory_is_refused() -> None:
    nodes = make_nodes()
    with pytest.raises(UsageError, match="missing"):
        exchange(wrap(nodes, model_factory=seeded(norm_net)), nodes, record_of(net()))


# --- what goes wrong at clients ------------------------------------------------------------------


def change_upload(
    change: Callable[[bytes], bytes], node: int = FIRST
) -> Callable[[Message], Message]:
    """Return a function for `tamper` that alters the upload of one node."""

    def tamper(reply: Message) -> Message:
        if reply.metadata.src_node_id == node and reply.has_content():
            for record in reply.content.array_records.values():
                for key, array in record.items():
                    data = change(array.data)
                    record[key] = Array(array.dtype, (len(data),), array.stype, data)
        return reply

    return tamper


ALTERATIONS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "truncated"),
    "cut short": (lambda data: data[:20], "truncated|checksum"),
    "cut by a byte": (lambda data: data[:-1], "checksum"),
    "a byte too many": (lambda data: data + b"\0", "checksum"),
    "a flipped bit": (lambda data: data[:40] + bytes([data[40] ^ 4]) + data[41:], "checksum"),
    "another version": (lambda data: data[:4] + b"\x7f" + data[5:], "version"),
    "text": (lambda data: b"<html>502 Bad Gateway</html>" * 9, "version|checksum|field"),
}


def test_an_altered_upload_reaches_the_strategy_as_an_error() -> None:
    nodes = make_nodes(num_nodes=len(ALTERATIONS) + 2)
    grid = wrap(nodes, Codec())
    changes = [change_upload(c, FIRST + i) for i, (c, _) in enumerate(ALTERATIONS.values())]

    def tamper(reply: Message) -> Message:
        for change in changes:
            reply = change(reply)
        return reply

    nodes.tamper = tamper
    replies = exchange(grid, nodes, record_of(net()))
    for node, reply in sorted(replies.items())[len(ALTERATIONS) :]:
        assert not reply.has_error(), node
    for (story, (_, reason)), (_, reply) in zip(
        ALTERATIONS.items(), sorted(replies.items()), strict=False
    ):
        assert reason_of(reply).startswith("fedobd refused the upload: "), story
        assert any(f"[{name}]" in reason_of(reply) for name in reason.split("|")), story
    assert grid.traffic.refused == len(ALTERATIONS)
    result = run_strategy(fed_avg(), grid, record_of(net()), 2)
    assert set(result.train_metrics_clientapp) == {1, 2}  # rounds go on without them


def test_uploads_of_other_rounds_models_and_kinds_are_refused() -> None:
    nodes = make_nodes()
    grid = wrap(nodes, Codec())
    exchange(grid, nodes, record_of(net()))
    old = payloads(nodes.replies, UPLOAD)[0]
    other = make_nodes()
    exchange(wrap(other), other, record_of(seeded(norm_net)()))
    foreign = payloads(other.replies, UPLOAD)[0]
    broadcast = payloads(nodes.sent, BROADCAST)[0]
    for number, (data, reason) in enumerate(
        ((old, "round"), (foreign, "schema"), (broadcast, "kind")), 20
    ):
        nodes.tamper = change_upload(lambda _, data=data: data)  # type: ignore[misc]
        replies = exchange(grid, nodes, record_of(seeded(small_net, number)()))
        assert replies[FIRST].has_error()
        assert f"[{reason}]" in reason_of(replies[FIRST])
        assert not replies[SECOND].has_error()


def test_an_upload_over_the_budget_is_refused() -> None:
    nodes = make_nodes()
    generous, strict = wrap(nodes, ALL_BLOCKS), wrap(nodes, Codec(dropout_rate=0.5))
    exchange(generous, nodes, record_of(net()))
    data = payloads(nodes.replies, UPLOAD)[0]
    nodes.tamper = change_upload(lambda _: data)
    replies = exchange(strict, nodes, record_of(net()))
    assert "(1 - λ)·|W|" in reason_of(replies[FIRST])


ABSURD = {
    "none": 0,
    "less than none": -3,
    "beyond belief": 10**18,
    "a part of one": 0.25,
    "not a number": float("nan"),
    "infinite": float("inf"),
    "a list": [10, 10],
}


def claimed(node: int) -> Any:
    """Return the number of examples that a node reports: each a story of its own, but the last."""
    return [*ABSURD.values(), 10][node - FIRST]


def test_an_absurd_number_of_examples_is_refused() -> None:
    def train(message: Message, context: Any) -> Message:
        values = arrays_of(pull(message, context))
        return reply_with(message, values, claimed(context.node_id))

    nodes = make_nodes(make_app(train), len(ABSURD) + 1)
    replies = exchange(wrap(nodes, Codec()), nodes, record_of(net()))
    honest = FIRST + len(ABSURD)
    assert {node for node, reply in replies.items() if not reply.has_error()} == {honest}
    for node in replies.keys() - {honest}:
        assert "allowed are 1 to 10000000" in reason_of(replies[node])


def test_an_absurd_number_of_examples_of_an_evaluation_does_not_end_the_run() -> None:
    def evaluate(message: Message, context: Any) -> Message:
        number = claimed(context.node_id)
        metrics = MetricRecord(
            {"num-examples": number, "eval_loss": 1.0 if number == 10 else 99.0}
        )
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    nodes = make_nodes(make_app(evaluate=evaluate), len(ABSURD) + 1)
    result = run_strategy(fed_avg(), wrap(nodes), record_of(net()), 1)
    assert result.evaluate_metrics_clientapp[1]["eval_loss"] == pytest.approx(1.0)


def test_more_examples_are_taken_where_the_operator_says_so() -> None:
    def train(message: Message, context: Any) -> Message:
        return reply_with(message, arrays_of(pull(message, context)), 10**9)

    nodes = make_nodes(make_app(train))
    replies = exchange(wrap(nodes, max_examples=10**10), nodes, record_of(net()))
    assert not any(reply.has_error() for reply in replies.values())


def test_a_reply_with_a_second_array_record_does_not_end_the_run() -> None:
    nodes = make_nodes(num_nodes=3)

    def tamper(reply: Message) -> Message:
        if reply.metadata.src_node_id == FIRST:
            reply.content["more"] = record_of(net())
        return reply

    nodes.tamper = tamper
    result = run_strategy(fed_avg(fraction_evaluate=0.0), wrap(nodes), record_of(net()), 1)
    assert set(result.train_metrics_clientapp) == {1}


def test_nan_from_a_client_reaches_the_strategy_as_its_error() -> None:
    def train(message: Message, context: Any) -> Message:
        values = arrays_of(pull(message, context))
        if context.node_id == FIRST:
            values["2.bias"] = values["2.bias"] * np.float32(np.nan)
        return reply_with(message, values)

    nodes = make_nodes(make_app(train), 3)
    replies = exchange(wrap(nodes, Codec()), nodes, record_of(net()))
    assert replies[FIRST].has_error()
    assert "2.bias" in reason_of(replies[FIRST])
    assert not replies[SECOND].has_error()


def test_a_sum_beyond_float32_is_refused() -> None:
    def train(message: Message, context: Any) -> Message:
        return reply_with(message, {"a.weight": np.array([-3e38, 1], np.float32)})

    nodes = make_nodes(make_app(train))
    w = from_values({"a.weight": np.array([3e38, 1], np.float32)})
    for reply in exchange(wrap(nodes), nodes, w).values():
        assert reply.has_error()
        assert "a.weight" in reason_of(reply)


def test_a_client_that_raises_is_an_error_reply_and_no_more() -> None:
    def train(message: Message, context: Any) -> Message:
        if context.node_id == FIRST:
            raise RuntimeError("out of memory")
        return pull(message, context)

    nodes = make_nodes(make_app(train), 3)
    replies = exchange(wrap(nodes), nodes, record_of(net()))
    assert "out of memory" in reason_of(replies[FIRST])
    assert replies[FIRST].metadata.src_node_id == FIRST
    assert not replies[SECOND].has_error()


def test_a_client_without_the_mod_is_an_error_reply_with_a_hint() -> None:
    def echo(message: Message, context: Any) -> Message:
        """A client that never looks into what it returns."""
        content = RecordDict({"arrays": record_of(net()), "metrics": MetricRecord({"n": 1})})
        return Message(content, reply_to=message)

    nodes = make_nodes(make_app(mods=[]), 2)  # reads the arrays as usual
    for reply in exchange(wrap(nodes), nodes, record_of(net())).values():
        assert reply.has_error()
        assert "fedobd.broadcast" in reason_of(reply) or "type" in reason_of(reply).lower()
    nodes = make_nodes(make_app(echo, mods=[]))
    for reply in exchange(wrap(nodes), nodes, record_of(net())).values():
        assert "is CompressionMod the first mod of its ClientApp?" in reason_of(reply)


def test_offline_and_silent_nodes_do_not_hold_a_round() -> None:
    nodes = make_nodes(num_nodes=4)
    grid = wrap(nodes, Codec())
    record = record_of(net())
    nodes.silent = {SECOND}
    messages = messages_to(nodes, record)
    nodes.offline = {FIRST}
    replies = {r.metadata.src_node_id: r for r in grid.send_and_receive(messages, timeout=0.001)}
    assert SECOND not in replies
    assert sorted(replies) == [FIRST, THIRD, THIRD + 1]  # the error names the node, too
    assert replies[FIRST].has_error()
    nodes.offline = set()
    nodes.silent = set()
    after = exchange(grid, nodes, record)  # greeted although the first handshake never came
    assert len(after) == 4
    assert not any(reply.has_error() for reply in after.values())
    assert grid.traffic.resent == 1


def test_a_late_reply_is_decoded_against_the_round_that_it_answers() -> None:
    nodes = make_nodes(make_app(stay), 2)
    grid = wrap(nodes, ALL_BLOCKS)
    first, second = record_of(net()), record_of(seeded(small_net, 5)())
    nodes.late = {FIRST: float("inf")}
    ids = list(grid.push_messages(messages_to(nodes, first)))
    assert len(list(grid.pull_messages(ids))) == 1
    nodes.late = {}
    exchange(grid, nodes, second)
    nodes.release()
    (late,) = grid.pull_messages(ids)
    assert largest_difference(arrays_of(late), values_of(first)) == 0


def test_messages_that_were_given_up_are_not_kept_for_ever() -> None:
    nodes = make_nodes(num_nodes=3)
    grid = wrap(nodes)
    nodes.silent = {SECOND}
    for number in range(4):
        record = record_of(seeded(small_net, number)())
        grid.send_and_receive(messages_to(nodes, record), timeout=0.001)
    assert len(grid._pending) <= 1


def test_a_reply_to_a_message_that_was_given_up_never_shows_a_payload() -> None:
    nodes = make_nodes()
    grid = wrap(nodes)
    nodes.late = {SECOND: math.inf}
    replies = list(grid.send_and_receive(messages_to(nodes, record_of(net())), timeout=0.001))
    assert len(replies) == 1
    nodes.release()
    late = grid.pull_messages([message.metadata.message_id for message in nodes.sent])
    assert payloads(list(late), UPLOAD) == []


def test_a_reply_that_comes_after_its_message_s_time_to_live_is_still_decoded() -> None:
    nodes = make_nodes()
    grid = wrap(nodes)
    content = RecordDict({"arrays": record_of(net()), "config": ConfigRecord({})})
    nodes.late = {SECOND: 1}
    message = Message(content, SECOND, "train", ttl=0.001)
    ids = list(grid.push_messages([message]))
    assert list(grid.pull_messages(ids)) == []
    while time.time() < message.metadata.created_at + message.metadata.ttl:
        pass
    (late,) = grid.pull_messages(ids)
    assert not payloads([late], UPLOAD)


# --- what passes through -------------------------------------------------------------------------


@pytest.mark.parametrize("serialize", [True, False])
def test_messages_without_arrays_pass_as_they_are(serialize: bool) -> None:
    nodes = make_nodes(serialize=serialize)
    grid = wrap(nodes)
    extra = MetricRecord({"x": 1.5})
    messages = messages_to(nodes, None, "query", {"a": 1}, extra=extra)
    replies = list(grid.send_and_receive(messages, timeout=5))
    answer = ConfigRecord({"saw": ["config", "extra"]})
    assert [r.content["answer"] for r in replies] == [answer] * 2
    assert [m.content for m in nodes.sent] == [m.content for m in messages]
    assert grid.traffic == type(grid.traffic)()


def test_a_query_with_arrays_may_be_answered_without_any() -> None:
    nodes = make_nodes()
    grid = wrap(nodes)
    for reply in exchange(grid, nodes, record_of(net()), "query").values():
        assert not reply.has_error(), reason_of(reply)
        assert reply.content["answer"] == ConfigRecord({"saw": ["arrays", "config"]})


def test_an_evaluation_that_returns_arrays_is_decoded_too() -> None:
    nodes = make_nodes(make_app(evaluate=pull))
    for reply in exchange(wrap(nodes), nodes, record_of(net()), "evaluate").values():
        assert all(np.isfinite(v).all() for v in arrays_of(reply).values())


def test_actions_of_train_are_compressed_like_train() -> None:
    app = make_app()
    app.train("stage2")(pull)
    nodes = make_nodes(app)
    grid = wrap(nodes)
    replies = exchange(grid, nodes, record_of(net()), "train.stage2")
    for reply in replies.values():
        assert list(arrays_of(reply)) == list(record_of(net()))
    assert len(payloads(nodes.replies, UPLOAD)) == 2


def test_records_beside_the_arrays_reach_both_sides_unchanged() -> None:
    seen: list[Any] = []

    def train(message: Message, context: Any) -> Message:
        seen.append((dict(message.content["config"]), dict(message.content["control"])))
        reply = pull(message, context)
        reply.content["words"] = ConfigRecord({"text": "ä", "raw": b"\0\1", "list": [1, 2]})
        return reply

    nodes = make_nodes(make_app(train))
    control = ConfigRecord({"c": [1.5, -2.0], "flag": True})
    messages = messages_to(nodes, record_of(net()), "train", {"lr": 0.1}, control=control)
    for reply in wrap(nodes).send_and_receive(messages, timeout=5):
        words = {"text": "ä", "raw": b"\0\1", "list": [1, 2]}
        assert dict(reply.content["words"]) == words
    assert seen == [({"lr": 0.1}, dict(control))] * 2


def test_another_key_of_the_arrays_can_be_named() -> None:
    def train(message: Message, context: Any) -> Message:
        record = message.content["model"]
        assert isinstance(record, ArrayRecord)
        content = RecordDict({"model": record, "metrics": MetricRecord({"num-examples": 3})})
        return Message(content, reply_to=message)

    app = ClientApp(mods=[CompressionMod()])
    app.train()(train)
    nodes = make_nodes(app)
    grid = wrap(nodes, arrayrecord_key="model")
    strategy = fed_avg(arrayrecord_key="model", fraction_evaluate=0.0)
    result = run_strategy(strategy, grid, record_of(net()), 2)
    assert largest_difference(values_of(result.arrays), values_of(record_of(net()))) <= 1e-6
    assert payloads(nodes.sent, BROADCAST)
    check_traffic(grid, nodes)


def test_arrays_under_another_key_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    nodes = make_nodes()
    grid = wrap(nodes, arrayrecord_key="weights")
    for _ in range(2):
        grid.push_messages(messages_to(nodes, record_of(net())))
    said = [record.getMessage() for record in caplog.records if "arrayrecord_key" in record.msg]
    assert said == [
        "fedobd: a message holds arrays under 'arrays', which are not compressed; "
        "CodecGrid(arrayrecord_key=...) is 'weights'"
    ]


def test_the_grid_hands_on_what_is_not_about_payloads() -> None:
    nodes = make_nodes(num_nodes=3)
    grid = wrap(nodes)
    assert list(grid.get_node_ids()) == [FIRST, SECOND, THIRD]
    nodes.offline = {SECOND}
    assert list(grid.get_node_ids()) == [FIRST, THIRD]
    run: Any = object()
    grid.set_run(run)
    assert grid.run is nodes.run is run
    message = grid.create_message(RecordDict(), "query", FIRST, "3", ttl=60.0)
    assert message.metadata.group_id == "3"
    assert list(grid.push_messages([])) == []
    assert list(grid.send_and_receive([])) == []


def test_ttl_group_and_type_of_a_message_are_kept() -> None:
    nodes = make_nodes()
    content = RecordDict({"arrays": record_of(net()), "config": ConfigRecord({})})
    message = Message(content, SECOND, "train", ttl=77.0, group_id="round 9")
    list(wrap(nodes).send_and_receive([message], timeout=5))
    meta = nodes.sent[0].metadata
    assert (meta.dst_node_id, meta.message_type) == (SECOND, "train")
    assert (meta.ttl, meta.group_id) == (77.0, "round 9")


def test_a_second_start_on_the_same_grid_goes_on() -> None:
    nodes = make_nodes(num_nodes=3)
    grid = wrap(nodes, Codec())
    first = run_strategy(fed_avg(), grid, record_of(net()), 2)
    second = run_strategy(fed_avg(), grid, first.arrays, 2)
    assert set(second.train_metrics_clientapp) == {1, 2}
    assert len(payloads(nodes.sent, HANDSHAKE)) == 3
    check_traffic(grid, nodes)


def test_trees_of_xgboost_pass_as_they_are() -> None:
    from flwr.serverapp.strategy import FedXgbBagging

    tree = json.dumps(
        {
            "learner": {
                "gradient_booster": {
                    "model": {
                        "gbtree_model_param": {"num_trees": "1", "num_parallel_tree": "1"},
                        "iteration_indptr": [0, 1],
                        "trees": [{"id": 0}],
                        "tree_info": [0],
                    }
                }
            }
        }
    )

    def train(message: Message, context: Any) -> Message:
        values = {"0": np.frombuffer(tree.encode(), np.uint8)}
        return reply_with(message, values)

    nodes = make_nodes(make_app(train))
    empty = ArrayRecord([np.zeros(0, np.uint8)])
    result = run_strategy(FedXgbBagging(fraction_evaluate=0.0), wrap(nodes), empty, 3)
    assert set(result.train_metrics_clientapp) == {1, 2, 3}
