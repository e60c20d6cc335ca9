"""Whole rounds of every method against a slow reference in plain NumPy float64.

The reference is written from the methods' descriptions alone: it shares nothing with the package
but the seeds of random draws. It works on dicts of arrays and on blocks written out by hand. Only
where the arithmetic is part of the method (NNADQ, differences) does it compute in float32.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from fedobd import (
    SMAFD,
    BlockRules,
    Codec,
    FedAvg,
    FedDropoutAvg,
    FedOBD,
    FedPAQ,
    Method,
    ModelState,
    Payload,
    Report,
    decompose,
)
from fedobd._seeds import derive_seed, make_generator
from tests.session_helpers import SEED, Engine, RoundLog, make_report, record_of, set_up, train

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

ROUNDS = pytest.mark.parametrize("rounds_before", [0, 2])


def _model() -> nn.Module:
    """Four blocks of 48, 72, 27 and 8 parameters, the first with buffers."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.Linear(8, 3),
        nn.Linear(3, 2),
    )


CONV_BLOCK = ["0.weight", "0.bias", "1.weight", "1.bias"]
BUFFERS = ["1.running_mean", "1.running_var"]
COUNTER = "1.num_batches_tracked"
PARAMETER_BLOCKS = [
    CONV_BLOCK,
    ["3.weight", "3.bias"],
    ["4.weight", "4.bias"],
    ["5.weight", "5.bias"],
]
BUFFER_BLOCK = 0
PARAMETERS = [name for block in PARAMETER_BLOCKS for name in block]


# --- the reference -------------------------------------------------------------------------------


def as_float32(state: Mapping[str, torch.Tensor], name: str) -> Float32:
    array: Float32 = state[name].to(torch.float32).numpy().reshape(-1)
    return array


def float32_difference(trained: Float32, start: Float32) -> Float32:
    difference: Float32 = np.subtract(trained, start, dtype=np.float32)
    return difference


def reference_nnadq(values: Float32, repr_bits: int, beta: float) -> Float32:
    """Levels and back, one element at a time."""
    half = np.float32(0.5)
    low, high = np.float32(min(values)), np.float32(max(values))
    a = np.float32(np.float32(high * half) + np.float32(low * half))
    d = max(np.float32(high - a), np.float32(a - low))
    if d == 0:
        return np.full(values.size, a, np.float32)
    s = min(max(1, math.floor(math.sqrt(math.log(4) * repr_bits * float(d) / beta))), 2**22)
    if math.ceil(math.log2(s + 1)) + 1 >= repr_bits:
        return values
    decoded = []
    for v in values:
        scaled = np.float32(np.float32(np.float32(v - a) / d) * np.float32(s))
        level = min(max(round(float(scaled)), -s), s)
        step = np.float32(d / np.float32(s))
        decoded.append(np.float32(np.float32(np.float32(level) * step) + a))
    return np.array(decoded, np.float32)


def reference_qsgd(values: Float32, num_levels: int, generator: torch.Generator) -> Float32:
    largest = max(abs(float(v)) for v in values)
    if largest == 0:
        return np.zeros_like(values)
    draws = torch.rand(values.size, generator=generator).tolist()
    decoded = []
    for v, draw in zip(values.astype(float), draws, strict=True):
        y = num_levels * abs(v) / largest
        level = math.floor(y) + (draw < y - math.floor(y))
        decoded.append(math.copysign(level * largest / num_levels, v))
    return np.array(decoded, np.float32)


def reference_mask(seed: int, rate: float, count: int) -> list[bool]:
    """SplitMix64 on Python's integers: output number i is kept when it is at least ⌊λ · 2^64⌋."""
    full = 2**64
    kept = []
    state = seed
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % full
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % full
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % full
        z ^= z >> 31
        kept.append(z >= math.floor(Fraction(str(rate)) * full))
    return kept


def reference_selection(
    differences: Mapping[str, Float32], rate: str
) -> tuple[tuple[int, ...], list[float]]:
    """Blocks by mean block difference while they fit into (1 - λ)·|W|, and the differences."""
    sizes = [sum(differences[name].size for name in block) for block in PARAMETER_BLOCKS]
    mbd = []
    for block, size in zip(PARAMETER_BLOCKS, sizes, strict=True):
        squares = [float(x) ** 2 for name in block for x in differences[name]]
        mbd.append(math.sqrt(math.fsum(squares)) / size)
    kept: list[int] = []
    left = (1 - Fraction(rate)) * sum(sizes)
    for number in sorted(range(len(sizes)), key=lambda n: -mbd[n]):
        if sizes[number] <= left:
            kept.append(number)
            left -= sizes[number]
    return tuple(sorted(kept)), mbd


def weighted_mean(values: Sequence[Float64], weights: Sequence[int]) -> Float64:
    total = np.zeros_like(values[0])
    for value, weight in zip(values, weights, strict=True):
        total += value * weight
    return total / sum(weights)


# --- playing a round and comparing ---------------------------------------------------------------


class Played:
    """One round in the middle of a run, with W before and after it."""

    def __init__(
        self,
        method: Method,
        rounds_before: int,
        model: nn.Module | None = None,
        scales: Mapping[str, float] | None = None,
    ) -> None:
        server, engine = set_up(method, model or _model())
        if scales is not None:
            engine.train = lambda schema, start, client, number: scaled_training(
                engine, start, client, number, scales
            )
        for _ in range(rounds_before):
            engine.play(server)
        self.before: ModelState = server.save().tensors
        log = engine.play(server)
        assert log is not None
        self.log: RoundLog = log
        self.record = record_of(log)
        self.after: ModelState = server.save().tensors
        self.schema = engine.schema
        self.clients = log.plan.cohort
        self.weights = [make_report(c, log.plan.round).num_examples for c in self.clients]

    def payload(self, client: int) -> Payload:
        return Payload.parse(self.log.uploads[client], self.schema)

    def trained(self, client: int, name: str) -> Float32:
        return as_float32(self.log.trained[client], name)

    def w(self, name: str) -> Float64:
        return as_float32(self.before, name).astype(np.float64)

    def check(self, name: str, wanted: Float64, rounding_only: bool = False) -> None:
        came = as_float32(self.after, name).astype(np.float64)
        largest = float(np.abs(wanted).max())
        error = np.abs(came - wanted)
        if rounding_only:
            half_ulp = np.spacing(np.abs(wanted).astype(np.float32)).astype(np.float64) / 2
            assert (error <= half_ulp * 1.0001 + 2.0**-30 * largest).all(), name
        else:
            assert (error <= 1e-6 * largest).all(), (name, error.max(), largest)
        assert not np.array_equal(came, self.w(name)), f"{name} was not changed"

    def check_buffers(self, kept_by: Mapping[int, Sequence[int]] | None = None) -> None:
        """Running statistics are averaged as values; of clients that dropped them the server's
        count; the counter is the largest.
        """
        senders = [c for c in self.clients if kept_by is None or BUFFER_BLOCK in kept_by[c]]
        assert senders, "the case must send buffers"
        for name in BUFFERS:
            values = [
                self.trained(c, name).astype(np.float64) if c in senders else self.w(name)
                for c in self.clients
            ]
            self.check(name, weighted_mean(values, self.weights))
        assert self.after[COUNTER].dtype is torch.int64
        assert int(self.after[COUNTER]) == max(int(self.log.trained[c][COUNTER]) for c in senders)


def scaled_training(
    engine: Engine,
    start: Mapping[str, torch.Tensor],
    client: int,
    number: int,
    scales: Mapping[str, float],
) -> ModelState:
    """Made-up training whose steps are scaled tensor by tensor."""
    trained = train(engine.schema, start, client, number)
    for name, scale in scales.items():
        step = (trained[name] - start[name]).to(torch.float32) * scale
        trained[name] = (start[name].to(torch.float32) + step).to(start[name].dtype)
    return trained


def scale_blocks(*factors: float) -> dict[str, float]:
    return {
        name: factor
        for block, factor in zip(PARAMETER_BLOCKS, factors, strict=True)
        for name in block
    }


# --- FedOBD --------------------------------------------------------------------------------------


def check_fedobd_round(
    played: Played, *, rate: str, up: float, down: float, stage: int, repr_bits: int = 32
) -> dict[int, tuple[int, ...]]:
    """Compare a whole round with the reference, and return the blocks that it kept by client."""
    assert played.log.plan.stage == stage
    dtype = torch.float32 if repr_bits == 32 else torch.bfloat16
    received = {}
    for name in PARAMETERS:
        decoded = reference_nnadq(played.w(name).astype(np.float32), repr_bits, down)
        received[name] = torch.from_numpy(decoded).to(dtype).to(torch.float32).numpy()
    kept_by: dict[int, tuple[int, ...]] = {}
    sent: dict[int, dict[str, Float64]] = {}
    for client in played.clients:
        for name in PARAMETERS:
            start = as_float32(played.log.starts[client], name)
            assert np.array_equal(start, received[name]), f"Ŵ of {name}"
        differences = {
            n: float32_difference(played.trained(client, n), received[n]) for n in PARAMETERS
        }
        kept, mbd = reference_selection(differences, rate)
        kept_by[client] = kept if stage == 1 else tuple(range(len(PARAMETER_BLOCKS)))
        header = played.payload(client).header
        assert header.is_difference
        assert header.block_ids == kept_by[client]
        assert header.block_differences == pytest.approx(mbd, rel=1e-6)
        names = [name for number in kept_by[client] for name in PARAMETER_BLOCKS[number]]
        sent[client] = {
            n: reference_nnadq(differences[n], repr_bits, up).astype(np.float64) for n in names
        }
    for name in PARAMETERS:
        zero = np.zeros(received[name].size)
        parts = [sent[client].get(name, zero) for client in played.clients]
        if any(name in sent[client] for client in played.clients):
            played.check(name, played.w(name) + weighted_mean(parts, played.weights))
        else:
            assert np.array_equal(as_float32(played.after, name), played.w(name))
    return kept_by


@ROUNDS
@pytest.mark.parametrize("rate", ["0.3", "0.6"])
@pytest.mark.parametrize("beta", [1e-3, 1e-1])
def test_fedobd_stage_one(rounds_before: int, rate: str, beta: float) -> None:
    codec = Codec(uplink_weight=beta, downlink_weight=beta / 2, dropout_rate=float(rate))
    method = FedOBD(codec=codec, stage_one_rounds=3, cohort=4)
    played = Played(method, rounds_before, scales=scale_blocks(3.0, 1.0, 1.0, 1.0))
    kept_by = check_fedobd_round(played, rate=rate, up=beta, down=beta / 2, stage=1)
    assert any(len(kept) < len(PARAMETER_BLOCKS) for kept in kept_by.values())
    played.check_buffers(kept_by)


def test_fedobd_skips_a_block_that_does_not_fit_and_scans_on() -> None:
    """The largest block comes second by mean block difference and does not fit any more."""
    codec = Codec(dropout_rate=0.3)
    method = FedOBD(codec=codec, stage_one_rounds=1, cohort=2)
    played = Played(method, 0, scales=scale_blocks(100.0, 20.0, 1.0, 1e-3))
    kept_by = check_fedobd_round(played, rate="0.3", up=1e-3, down=1e-3, stage=1)
    assert set(kept_by.values()) == {(0, 2, 3)}


def test_fedobd_fills_the_budget_to_the_last_parameter() -> None:
    """(1 - 0.2)·155 is 124 exactly; blocks of 72 + 48 = 120 fit, 72 + 48 + 8 = 128 do not, nor
    72 + 48 + 27. With λ = 0.0 all of them fit."""
    wide = FedOBD(codec=Codec(dropout_rate=0.0), stage_one_rounds=1, cohort=2)
    kept_by = check_fedobd_round(Played(wide, 0), rate="0", up=1e-3, down=1e-3, stage=1)
    assert set(kept_by.values()) == {(0, 1, 2, 3)}
    tight = FedOBD(codec=Codec(dropout_rate=0.2), stage_one_rounds=1, cohort=2)
    played = Played(tight, 0, scales=scale_blocks(30.0, 100.0, 1.0, 1e-3))
    kept_by = check_fedobd_round(played, rate="0.2", up=1e-3, down=1e-3, stage=1)
    assert set(kept_by.values()) == {(0, 1)}


@pytest.mark.parametrize("rounds_before", [1, 3])
def test_fedobd_stage_two(rounds_before: int) -> None:
    codec = Codec(uplink_weight=1e-2, downlink_weight=1e-3)
    method = FedOBD(codec=codec, stage_one_rounds=1, stage_two_epochs=3, cohort=2)
    played = Played(method, rounds_before)
    assert len(played.clients) == 5
    check_fedobd_round(played, rate="0.3", up=1e-2, down=1e-3, stage=2)
    played.check_buffers()


def test_fedobd_of_a_16_bit_model_quantizes_float32_differences_with_repr_16() -> None:
    codec = Codec(uplink_weight=1e-2, downlink_weight=1e-3)
    method = FedOBD(codec=codec, stage_one_rounds=3, cohort=3)
    model = _model().to(torch.bfloat16)
    played = Played(method, 1, model, scale_blocks(3.0, 1.0, 1.0, 1.0))
    check_fedobd_round(played, rate="0.3", up=1e-2, down=1e-3, stage=1, repr_bits=16)


# --- FedAvg --------------------------------------------------------------------------------------


@ROUNDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fedavg(rounds_before: int, dtype: torch.dtype) -> None:
    played = Played(FedAvg(rounds=3), rounds_before, _model().to(dtype))
    assert len(played.clients) == 5
    for name in PARAMETERS:
        values = []
        for client in played.clients:
            start = as_float32(played.log.starts[client], name)
            w = torch.from_numpy(played.w(name)).to(torch.float32).to(dtype)
            assert np.array_equal(start, w.to(torch.float32).numpy())
            values.append(played.trained(client, name).astype(np.float64))
        wanted = weighted_mean(values, played.weights)
        played.check(name, wanted, rounding_only=True)
    if dtype is torch.float32:
        played.check_buffers()


# --- FedPAQ --------------------------------------------------------------------------------------


@ROUNDS
@pytest.mark.parametrize("num_levels", [255, 3])
def test_fedpaq(rounds_before: int, num_levels: int) -> None:
    played = Played(FedPAQ(rounds=3, levels=num_levels), rounds_before)
    decoded: dict[int, dict[str, Float64]] = {}
    for client in played.clients:
        generator = make_generator(SEED, "rounding", played.log.plan.round, client)
        decoded[client] = {}
        header = played.payload(client).header
        assert header.is_difference
        assert header.block_ids == (0, 1, 2, 3)
        for name in PARAMETERS:
            start = as_float32(played.log.starts[client], name)
            assert np.array_equal(start, as_float32(played.before, name)), "float32 downlink"
            difference = float32_difference(played.trained(client, name), start)
            levels = reference_qsgd(difference, num_levels, generator)
            decoded[client][name] = levels.astype(np.float64)
    for name in PARAMETERS:
        mean = weighted_mean([decoded[c][name] for c in played.clients], played.weights)
        played.check(name, played.w(name) + mean)
    played.check_buffers()


def test_fedpaq_is_unbiased() -> None:
    """Over many clients with the same difference, the mean of the levels comes near to it."""
    model = nn.Linear(4, 1, bias=False)
    server, engine = set_up(FedPAQ(rounds=1, levels=4, cohort=1.0), model, num_clients=600)
    step = torch.tensor([[0.001, 0.13, -0.377, 0.5]])
    engine.train = lambda schema, start, client, number: {"weight": start["weight"] + step}
    engine.report = lambda client, number: Report(num_examples=1, train_loss=1.0)
    before = server.state["weight"]
    engine.play(server)
    error = (server.state["weight"] - before - step).abs().max()
    # one level is 0.125, so that one draw deviates by 0.0625 at most: 4 standard errors
    assert float(error) < 4 * 0.0625 / math.sqrt(600)
    assert float(error) > 0


# --- FedDropoutAvg -------------------------------------------------------------------------------


@ROUNDS
@pytest.mark.parametrize("rate", [0.3, 0.9, 0.0])
def test_feddropoutavg(rounds_before: int, rate: float) -> None:
    method = FedDropoutAvg(rounds=3, dropout_rate=rate, cohort=3)
    played = Played(method, rounds_before)
    sizes = {name: played.w(name).size for name in PARAMETERS}
    total = sum(sizes.values())
    masks = {}
    for client in played.clients:
        header = played.payload(client).header
        assert header.mask is not None
        assert not header.is_difference
        masks[client] = reference_mask(header.mask.seed, rate, total)
        sent = played.payload(client).num_bytes.raw
        assert sent == 4 * sum(masks[client]), "only kept elements travel"
    assert len(set(map(tuple, masks.values()))) == (1 if rate == 0 else len(played.clients))
    position = never = 0
    for name in PARAMETERS:
        wanted = played.w(name).copy()
        for i in range(sizes[name]):
            senders = [c for c in played.clients if masks[c][position + i]]
            if senders:
                weights = [played.weights[played.clients.index(c)] for c in senders]
                values = [float(played.trained(c, name)[i]) for c in senders]
                total_weight = sum(weights)
                wanted[i] = math.fsum(v * w for v, w in zip(values, weights, strict=True))
                wanted[i] /= total_weight
            else:
                never += 1
                assert as_float32(played.after, name)[i] == np.float32(played.w(name)[i])
        position += sizes[name]
        if not np.array_equal(wanted, played.w(name)):
            played.check(name, wanted, rounding_only=True)
    assert (never > 0) is (rate > 0), "the case must have elements that nobody sent"
    played.check_buffers()


# --- SMAFD ---------------------------------------------------------------------------------------

SMAFD_LOSSES = [1.0, 0.8, 0.6, 0.9, 0.5, 0.5, 0.4, 0.7, 0.3]


class ReferenceSMAFD:
    """The server's choice of sub-models, tensor by tensor."""

    def __init__(self, sizes: Sequence[int], rate: str) -> None:
        self.sizes = sizes
        self.wanted = (1 - Fraction(rate)) * sum(sizes)
        self.scores = [0.0] * len(sizes)
        self.submodel: list[int] | None = None
        self.loss: float | None = None
        self.drawn = 0

    def begin(self, number: int) -> list[int]:
        if self.submodel is None:
            self.drawn += 1
            # the same draws as the session: scores as weights first, then the others evenly
            generator = make_generator(derive_seed(SEED, "server", number), "submodel")
            scored = [n for n, score in enumerate(self.scores) if score > 0]
            others = [n for n, score in enumerate(self.scores) if score == 0]
            order = []
            if scored:
                weights = torch.tensor([self.scores[n] for n in scored], dtype=torch.float64)
                picks = torch.multinomial(weights, len(scored), generator=generator).tolist()
                order += [scored[i] for i in picks]
            picks = torch.randperm(len(others), generator=generator).tolist()
            order += [others[i] for i in picks]
            self.submodel, reached = [], 0
            while reached < self.wanted:
                tensor = order.pop(0)
                self.submodel.append(tensor)
                reached += self.sizes[tensor]
        return sorted(self.submodel)

    def end(self, losses: Sequence[float]) -> None:
        loss = math.fsum(losses) / len(losses)
        fell = self.loss is not None and loss < self.loss
        if fell:
            assert self.loss is not None
            assert self.submodel is not None
            for tensor in self.submodel:
                self.scores[tensor] = (self.loss - loss) / self.loss
        else:
            self.submodel = None
        self.loss = loss


def smafd_report(client: int, number: int) -> Report:
    """Losses that differ between clients, so that an example-weighted mean would be another."""
    loss = SMAFD_LOSSES[number - 1] + (0.4 if client == 0 else 0.0)
    return Report(num_examples=1000 if client == 0 else 100 + client, train_loss=loss)


@pytest.mark.parametrize("rate", ["0.3", "0.7"])
def test_smafd_over_several_rounds(rate: str) -> None:
    method = SMAFD(rounds=len(SMAFD_LOSSES), cohort=3, dropout_rate=float(rate))
    server, engine = set_up(method, _model())
    engine.report = smafd_report
    sizes = [spec.num_elements for spec in server.schema.tensors if spec.name in PARAMETERS]
    reference = ReferenceSMAFD(sizes, rate)
    last_received: dict[int, dict[str, Float32]] = {}
    everything = [*PARAMETERS, *BUFFERS]
    buffer_block = len(PARAMETERS)
    for number in range(1, len(SMAFD_LOSSES) + 1):
        before = {n: as_float32(server.save().tensors, n) for n in everything}
        log = engine.play(server)
        assert log is not None
        submodel = reference.begin(number)
        names = [PARAMETERS[n] for n in submodel]
        reached = sum(sizes[n] for n in submodel)
        assert reached >= reference.wanted
        assert reached - max(sizes[n] for n in submodel) < reference.wanted
        for payload in (log.broadcast, *log.uploads.values()):
            header = Payload.parse(payload, server.schema).header
            assert header.block_ids == (*submodel, buffer_block), f"round {number}"
        for client in log.plan.cohort:
            assert (client in log.openings) is (client not in last_received)
            if client not in last_received:
                last_received[client] = dict(before)
            for name in (*names, *BUFFERS):
                last_received[client][name] = before[name]
            for name in everything:
                start = as_float32(log.starts[client], name)
                assert np.array_equal(start, last_received[client][name]), f"{number} {name}"
        weights = [smafd_report(c, number).num_examples for c in log.plan.cohort]
        after = server.save().tensors
        for name in everything:
            came = as_float32(after, name).astype(np.float64)
            if name not in names and name not in BUFFERS:
                assert np.array_equal(came, before[name])
                continue
            trained = [as_float32(log.trained[c], name) for c in log.plan.cohort]
            wanted = weighted_mean([t.astype(np.float64) for t in trained], weights)
            assert np.abs(came - wanted).max() <= 1e-6 * np.abs(wanted).max(), name
        losses = [float(np.float32(smafd_report(c, number).train_loss)) for c in log.plan.cohort]
        reference.end(losses)
        assert server.save().values["memory"]["scores"][:buffer_block] == pytest.approx(
            reference.scores, rel=1e-12
        )
    assert 2 <= reference.drawn < len(SMAFD_LOSSES), "the case must keep and redraw"
    assert any(
        not np.array_equal(last_received[c][n], as_float32(server.state, n))
        for c in last_received
        for n in PARAMETERS
    )


def test_smafd_stops_when_the_size_is_reached_exactly() -> None:
    """Tensors of 3, 3, 3 and 1 parameters and λ = 0.7: (1 - λ)·|W| is 3 exactly, so one tensor of
    3 is enough, or the single one and one of 3; never 6 or 7."""
    model = nn.Module()
    for index, size in enumerate([3, 3, 3, 1]):
        model.register_parameter(f"p{index}", nn.Parameter(torch.zeros(size)))
    held = set()
    for seed in range(12):
        server, _ = set_up(SMAFD(dropout_rate=0.7), model, seed=seed)
        server.begin_round()
        header = Payload.parse(server.broadcast().data, server.schema).header
        held.add(sum(server.schema.blocks[n].num_parameters for n in header.block_ids))
    assert held == {3, 4}


def test_each_client_has_a_mask_of_its_own_in_each_round() -> None:
    server, engine = set_up(FedDropoutAvg(rounds=3, cohort=1.0), _model())
    for log in engine.run(server):
        for client, upload in log.uploads.items():
            mask = Payload.parse(upload, server.schema).header.mask
            assert mask is not None
            assert mask.seed == derive_seed(SEED, "uplink", log.plan.round, client)


def test_smafd_draws_scored_tensors_with_their_scores_as_weights() -> None:
    """Of three tensors of like size one is drawn: the first three times as often as the second."""
    model = nn.Module()
    for index in range(3):
        model.register_parameter(f"p{index}", nn.Parameter(torch.zeros(4)))
    method = SMAFD(dropout_rate=0.9)
    schema = decompose(model, BlockRules(style="tensor"))
    drawn: Counter[int] = Counter()
    for seed in range(400):
        memory = method.begin({"scores": [0.75, 0.25, 0.0]}, schema, seed)
        drawn.update(memory["submodel"])
    assert drawn[0] + drawn[1] == 400
    assert abs(drawn[0] - 300) < 5 * math.sqrt(400 * 0.75 * 0.25)


def test_smafd_scores_are_positive_where_losses_are_negative() -> None:
    """From -1 to -3 a loss falls by twice its size, from 0 by 2 of nothing, which counts as 1."""
    for before, score in ((-1.0, 2.0), (0.0, 2.0), (4.0, 0.5)):
        server, engine = set_up(SMAFD(rounds=2, cohort=2, dropout_rate=0.3), _model())
        engine.report = lambda client, number, first=before: Report(  # type: ignore[misc]
            num_examples=10, train_loss=first - 2.0 * (number - 1)
        )
        engine.play(server)
        log = engine.play(server)
        assert log is not None
        kept = Payload.parse(log.broadcast, server.schema).header.block_ids
        scores = server.save().values["memory"]["scores"]
        assert [scores[number] for number in kept] == [score] * len(kept)


def test_smafd_prefers_tensors_with_a_score() -> None:
    """After a fall and a rise, the scored tensors come first, so that all of a too small
    sub-model's are drawn again."""
    losses = [1.0, 0.9, 0.8, 2.0]
    method = SMAFD(rounds=5, cohort=2, dropout_rate=0.9)
    server, engine = set_up(method, _model())
    engine.report = lambda client, number: Report(
        num_examples=10, train_loss=losses[number - 1] if number <= 4 else 1.0
    )
    kept = []
    for _ in range(5):
        log = engine.play(server)
        assert log is not None
        kept.append(Payload.parse(log.broadcast, server.schema).header.block_ids)
    assert kept[1] == kept[2] == kept[3], "falling losses keep the sub-model, the rise ends it"
    scored = set(kept[1]) - {len(PARAMETERS)}
    redrawn = set(kept[4]) - {len(PARAMETERS)}
    assert redrawn <= scored or redrawn >= scored
