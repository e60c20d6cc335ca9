"""Uploads of clients that were trained together: byte for byte those of each client alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedobd import Codec, FedAvg, FedDropoutAvg, FedOBD, FedPAQ, Method, UsageError
from fedobd.blocks import ModelSchema, ModelState, Segment, StateStack
from fedobd.codec import NNADQ, Coding, Mask, Quantizer, Stochastic, Unquantized
from fedobd.codec._quantization import _round_here, _round_there
from fedobd.payload import Header, Kind, encode_payload, encode_payloads
from fedobd.sessions import ClientSession, encode_uploads
from tests.helpers import (
    buffer,
    header_of,
    law,
    make_schema,
    parameter,
    random_state,
    source_of,
)
from tests.session_helpers import MODELS, SHORT_METHODS, make_report, set_up

VARIANTS: dict[str, Method] = {
    **SHORT_METHODS,
    "fedobd, random blocks, stochastic": FedOBD(
        codec=Codec(selection="random", uplink_quantizer="stochastic", stochastic_levels=70_000),
        stage_one_rounds=2,
        stage_two_epochs=1,
        cohort=3,
    ),
    "fedobd, bounded norms": FedOBD(
        codec=Codec(bound_norm=True, uplink_weight=0.1), stage_one_rounds=2, cohort=3
    ),
    "fedobd, not quantized": FedOBD(
        codec=Codec(uplink_quantizer="none"), stage_one_rounds=2, cohort=3, lossless=True
    ),
    "fedavg, lossless": FedAvg(rounds=2, cohort=3, lossless=True),
    "fedpaq, two levels": FedPAQ(rounds=2, cohort=3, levels=2),
    "feddropoutavg, lossless": FedDropoutAvg(rounds=2, cohort=3, lossless=True),
}


def together(
    sessions: list[ClientSession], states: list[ModelState], number: int
) -> dict[int, bytes]:
    """Return the uploads of some clients, made together."""
    first = sessions[0]
    uploads = encode_uploads(
        first.method,
        first.schema,
        [session.received for session in sessions],
        StateStack.of(states),
        [make_report(session.client, number) for session in sessions],
        seed=first.seed,
    )
    return {s.client: upload.data for s, upload in zip(sessions, uploads, strict=True)}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", VARIANTS)
def test_uploads_of_a_stack_are_those_of_each_alone(name: str, kind: str) -> None:
    server, engine = set_up(VARIANTS[name], MODELS[kind]())
    played = 0
    while (plan := server.begin_round()) is not None:
        log = engine.ask(server, plan)
        sessions = [engine.session(client) for client in plan.cohort]
        for session in sessions:
            session.receive(log.broadcast)
        trained = [log.trained[client] for client in plan.cohort]
        assert together(sessions, trained, plan.round) == log.uploads
        for client, upload in log.uploads.items():
            server.receive(client, upload)
        server.end_round()
        played += 1
    assert played >= 2


def test_a_client_that_diverged_is_found_in_a_stack() -> None:
    server, engine = set_up(FedOBD(cohort=3, codec=Codec(dropout_rate=0.7)), MODELS["tied"]())
    plan = server.begin_round()
    assert plan is not None
    log = engine.ask(server, plan)
    for name in log.trained[plan.cohort[0]]:
        sessions = [engine.session(client) for client in plan.cohort]
        for session in sessions:
            session.receive(log.broadcast)
        trained = [dict(log.trained[client]) for client in plan.cohort]
        trained[1][name] = torch.full_like(trained[1][name], torch.nan)
        if trained[1][name].is_floating_point():
            with pytest.raises(UsageError, match=f"tensor '{name}' holds NaN"):
                together(sessions, trained, plan.round)


SCHEMA = make_schema(
    [
        parameter("w", 30, 4),
        buffer("mean", 5),
        parameter("half", 40, dtype=torch.bfloat16),
        parameter("long", 7, dtype=torch.float64),
        buffer("seen", dtype=torch.int64),
        parameter("none", 0),
    ],
    [(0, 0, 33), 1],
    [(0, 33, 120), 2, 5],
    [3, 4],
)


def alone(
    schema: ModelSchema, state: ModelState, header: Header, quantizer: Quantizer, place: int
) -> bytes:
    payload = encode_payload(
        schema,
        header,
        source_of(schema, state),
        quantizer,
        generator=torch.Generator().manual_seed(place),
    )
    return payload.data


quantizers = st.sampled_from(
    (Unquantized(), NNADQ(1e-3), NNADQ(1e-8), Stochastic(3), Stochastic(100_000))
)
clients = st.lists(
    st.tuples(
        st.sets(st.integers(0, 2)),  # blocks that it sends
        quantizers,
        st.sampled_from((1e-30, 0.0, 1.0, 1e36)),  # scale: also constants and ranges too large
        st.booleans(),  # masked
    ),
    min_size=1,
    max_size=6,
)


@law(150)
@given(clients, st.integers(0, 1000), st.booleans())
def test_payloads_of_a_stack_are_those_of_each_alone(
    drawn: list[tuple[set[int], Quantizer, float, bool]], seed: int, lossless: bool
) -> None:
    headers, states = [], []
    for place, (kept, _, scale, masked) in enumerate(drawn):
        mask = Mask.of_rate(place, 0.4) if masked else None
        header = header_of(SCHEMA, Kind.UPLOAD, kept=sorted(kept), mask=mask, is_lossless=lossless)
        headers.append(replace(header, client=place))
        states.append(random_state(SCHEMA, seed + place, scale))
    stack = StateStack.of(states)

    def source(segment: Segment) -> torch.Tensor:
        spec = SCHEMA.tensors[segment.tensor]
        flat = stack.values[spec.name].reshape(len(states), spec.num_elements)
        return flat[:, segment.start : segment.stop]

    chosen = [quantizer for _, quantizer, _, _ in drawn]
    made = encode_payloads(
        SCHEMA,
        headers,
        source,
        chosen,
        generator=[torch.Generator().manual_seed(n) for n in range(len(drawn))].__getitem__,
    )
    assert [payload.data for payload in made] == [
        alone(SCHEMA, state, header, quantizer, place)
        for place, (state, header, quantizer) in enumerate(
            zip(states, headers, chosen, strict=True)
        )
    ]


@law(60)
@given(st.lists(st.floats(-12, 3), min_size=1, max_size=5), st.integers(1, 3000), st.integers(0))
def test_a_stack_is_quantized_where_it_lies_to_the_same_levels(
    betas: list[float], count: int, seed: int
) -> None:
    # on a GPU the same operations run there; here both paths run on the CPU
    values = np.random.default_rng(seed).standard_t(3, (len(betas), count)).astype(np.float32)
    codes = [NNADQ(10**beta).measure(row, 64) for beta, row in zip(betas, values, strict=True)]
    rows = [n for n, code in enumerate(codes) if code.coding is Coding.LEVELS]
    if not rows:
        return
    codes = [codes[n] for n in rows]
    here = _round_here(values[rows], codes, None)
    there = _round_there(torch.from_numpy(values[rows]), codes)
    for one, other in zip(here, there, strict=True):
        assert one.num_levels == other.num_levels
        assert one.symbols.dtype == other.symbols.dtype
        assert np.array_equal(one.symbols, other.symbols)
        assert np.array_equal(one.counts, other.counts)


def test_a_stack_is_a_sequence_of_states() -> None:
    states = [random_state(SCHEMA, seed) for seed in range(3)]
    stack = StateStack.of(states)
    assert len(stack) == 3
    assert StateStack.of(stack) is stack
    for own, state in zip(stack, states, strict=True):
        assert list(own) == list(state)
        assert all(torch.equal(own[name], state[name]) for name in state)
    last, middle = stack[:0:-1]
    assert torch.equal(last["w"], states[2]["w"])
    assert torch.equal(middle["w"], states[1]["w"])
    (one,) = StateStack.of(states[:1])
    assert one["w"].data_ptr() == states[0]["w"].data_ptr()
