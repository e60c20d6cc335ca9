"""Wrong and missing uploads: what a server refuses and records, and what no client makes."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Callable
from typing import Literal

import pytest

from fedobd import (
    BlockRules,
    ClientSession,
    Codec,
    DecodeError,
    EmptyRoundError,
    FedAvg,
    FedDropoutAvg,
    FedOBD,
    FedPAQ,
    Method,
    Report,
    Role,
    UsageError,
    decompose,
)
from fedobd.codec import Mask
from tests.session_helpers import (
    MAX_EXAMPLES,
    MODELS,
    SHORT_METHODS,
    Scene,
    big_embedding,
    bits,
    bits_of,
    craft_upload,
    every_method,
    field_of,
    forge,
    forge_values,
    make_report,
    make_schema,
    make_state,
    record_of,
    seal,
    set_up,
    train,
)

# --- uploads that are refused --------------------------------------------------------------------


Forgery = Callable[[Scene], bytes]


def other_model(scene: Scene) -> bytes:
    """An upload that is right in every respect but the model."""
    schema = make_schema(MODELS["tied"](), scene.method)
    state = make_state(MODELS["tied"]())
    kept = tuple(range(len(schema.blocks)))
    trained = train(schema, state, 0, 1)
    return craft_upload(scene.method, schema, scene.plan, scene.villain, state, trained, kept=kept)


def other_blocks(scene: Scene) -> bytes:
    """The same model, cut in another way."""
    schema = decompose(scene.model, BlockRules(style="layer"))
    client = scene.villain
    start, trained = scene.log.starts[client], scene.log.trained[client]
    kept = tuple(range(len(schema.blocks)))
    return craft_upload(scene.method, schema, scene.plan, client, start, trained, kept=kept)


def other_method(scene: Scene) -> bytes:
    """The same round's broadcast, answered by a client of another method."""
    method: Method = FedPAQ() if scene.method.name != "fedpaq" else FedAvg()
    return scene.craft(method, kept=scene.all_blocks())


def not_a_number(scene: Scene, value: float) -> bytes:
    """A running variance that is no finite number; other values come before and after it."""
    block = scene.buffer_block()
    sent = scene.sent_blocks()
    if scene.method.name == "feddropoutavg":
        upload = scene.upload
    elif scene.method.name == "fedobd" and scene.plan.stage == 1:
        upload = scene.craft(kept=(block, 2))
    else:
        upload = scene.craft(kept=sent)
    variance = scene.log.trained[scene.villain]["1.running_var"]
    before = bits_of(variance)
    return forge_values(upload, before, before[:12] + struct.pack("<f", value))


def last_value(upload: bytes, value: float) -> bytes:
    """Another last value of the last block, which is plain; all blocks before it are sound."""
    return seal(upload[:-8] + struct.pack("<f", value))


def far_away(scene: Scene) -> bytes:
    """A running mean beyond what a round can legally change; parameters come before it."""
    trained = scene.log.trained[scene.villain]
    trained["1.running_mean"] = trained["1.running_mean"] + 1e9
    block = scene.buffer_block()
    stage_one_of_fedobd = scene.method.name == "fedobd" and scene.plan.stage == 1
    kept = (block, 2) if stage_one_of_fedobd else scene.sent_blocks()
    mask = None
    if isinstance(scene.method, FedDropoutAvg):
        mask = Mask.of_rate(1, scene.method.dropout_rate)
    return scene.craft(kept=kept, mask=mask)


def bit_flipped(where: float) -> Forgery:
    def flip(scene: Scene) -> bytes:
        upload = bytearray(scene.upload)
        # after magic and version, whose own refusals come first
        upload[5 + int(where * (len(upload) - 6))] ^= 0x10
        return bytes(upload)

    return flip


ANY_METHOD: dict[str, tuple[Forgery, str, str]] = {
    "cut to nothing": (lambda s: b"", "truncated", "0 bytes came; the shortest payload has"),
    "cut to a header": (lambda s: s.upload[:20], "truncated", "20 bytes came"),
    "cut in the middle": (
        lambda s: s.upload[: len(s.upload) // 2],
        "checksum",
        "the payload was cut or altered",
    ),
    "cut by a byte": (lambda s: s.upload[:-1], "checksum", "the payload was cut or altered"),
    "cut under a right checksum": (lambda s: seal(s.upload[:-12]), "field|truncated", "byte"),
    "a byte too many": (lambda s: s.upload + b"\0", "checksum", "was cut or altered"),
    "a byte too many under a right checksum": (
        lambda s: seal(s.upload[:-4] + b"\0"),
        "trailing bytes",
        "1 bytes follow the last frame",
    ),
    "bit flipped in the header": (bit_flipped(0.0), "checksum", "was cut or altered"),
    "bit flipped in the values": (bit_flipped(0.7), "checksum", "was cut or altered"),
    "bit flipped in the checksum": (bit_flipped(1.0), "checksum", "was cut or altered"),
    "no payload at all": (lambda s: b"GET " + s.upload[4:], "version", "no payload of fedobd"),
    "another version": (
        lambda s: forge(s.upload, version=1),
        "version",
        "format version 1 came; this side reads 2",
    ),
    "another model": (other_model, "schema", "the payload is for another model or other blocks"),
    "other blocks": (other_blocks, "schema", "the payload is for another model or other blocks"),
    "the last round's upload": (
        lambda s: s.first.uploads[s.villain],
        "round",
        "a payload of round 1, stage 1 came; wanted round 2, stage",
    ),
    "another round": (lambda s: forge(s.upload, round=3), "round", "a payload of round 3"),
    "another stage": (lambda s: forge(s.upload, stage=9), "round", r"round 2, stage 9 came"),
    "another method": (other_method, "method", r"a payload of method number \d came; wanted"),
    "an unknown method": (
        lambda s: forge(s.upload, method=200),
        "method",
        "a payload of method number 200 came; wanted",
    ),
    "the broadcast sent back": (
        lambda s: s.log.broadcast,
        "kind",
        "a payload of kind BROADCAST came; wanted UPLOAD",
    ),
    "an unknown kind": (lambda s: forge(s.upload, kind=7), "kind", "payload kind 7 is not known"),
    "the upload of another client": (
        lambda s: s.log.uploads[s.good[0]],
        "client",
        r"client \d sent an upload of client \d",
    ),
    "no examples": (
        lambda s: forge(s.upload, num_examples=0),
        "limit",
        r"client \d claims 0 examples; allowed are 1 to 5000",
    ),
    "minus one example": (
        lambda s: forge(s.upload, num_examples=2**64 - 1),
        "field",
        "num_examples is 18446744073709551615",
    ),
    "examples above the cap": (
        lambda s: forge(s.upload, num_examples=MAX_EXAMPLES + 1),
        "limit",
        r"client \d claims 5001 examples; allowed are 1 to 5000",
    ),
    "validation examples above the cap": (
        lambda s: forge(s.upload, num_validation_examples=MAX_EXAMPLES + 1),
        "limit",
        r"claims 5001 validation examples; allowed are 0 to 5000",
    ),
    "a loss that is NaN": (
        lambda s: forge(s.upload, train_loss=math.nan),
        "field",
        "train_loss is nan; wanted a finite",
    ),
    "a metric that is infinite": (
        lambda s: forge(s.upload, validation_metric=math.inf),
        "field",
        "validation_metric is inf; wanted a finite",
    ),
    "NaN": (lambda s: not_a_number(s, math.nan), "not finite", r"'1\.running_var' holds NaN"),
    "infinity": (lambda s: not_a_number(s, -math.inf), "not finite", r"'1\.running_var' holds"),
    "a change beyond the legal range": (
        far_away,
        "limit",
        r"tensor '1\.running_mean' would change by 1e\+09 in one round; at most",
    ),
    "differences for values or values for differences": (
        lambda s: forge(s.upload, flags=int(field_of(s.upload, "flags")) ^ 8),
        "method",
        r"the upload holds (differences|values); \w+ sends the other",
    ),
    "a block that is missing": (
        lambda s: s.craft(
            kept=tuple(n for n in s.sent_blocks() if n != s.sent_blocks()[-1]),
            mask=Mask.of_rate(1, s.method.dropout_rate)
            if isinstance(s.method, FedDropoutAvg)
            else None,
        ),
        "method",
        "every block|blocks; the",
    ),
    "a mask that does not belong": (
        lambda s: s.craft(kept=s.sent_blocks(), mask=Mask.of_rate(1, 0.5)),
        "method",
        "has no mask|must hold every block under a mask of λ",
    ),
}
"""Forged uploads that every method refuses: how one is made, the reason and the text."""

LATE = FedOBD(stage_one_rounds=1, stage_two_epochs=2)
"""FedOBD whose second round is the first of stage 2."""

SCENES: dict[str, Method] = {**SHORT_METHODS, "fedobd-stage-2": LATE}

OF_ONE_METHOD: dict[str, tuple[str, Forgery, str, str]] = {
    "too many blocks for λ": (
        "fedobd",
        lambda s: s.craft(kept=s.all_blocks()),
        "method",
        r"an upload of stage 1 holds 147 parameters; \(1 - λ\)·\|W\| is 102",
    ),
    "one block too many for λ": (
        "fedobd",
        lambda s: s.craft(kept=(0, 1)),
        "method",
        r"an upload of stage 1 holds 120 parameters; \(1 - λ\)·\|W\| is 102",
    ),
    "no block in stage 2": (
        "fedobd-stage-2",
        lambda s: s.craft(kept=()),
        "method",
        "an upload of fedobd holds 0 blocks; the 3 of the broadcast were wanted",
    ),
    "a block of stage 2 is missing": (
        "fedobd-stage-2",
        lambda s: s.craft(kept=(0, 2)),
        "method",
        "an upload of fedobd holds 2 blocks; the 3 of the broadcast were wanted",
    ),
    "NaN in the last block of fedavg": (
        "fedavg",
        lambda s: last_value(s.upload, math.nan),
        "not finite",
        r"tensor '4\.bias' holds NaN or an infinity",
    ),
    "NaN in the last kept value of feddropoutavg": (
        "feddropoutavg",
        lambda s: last_value(s.upload, math.nan),
        "not finite",
        r"tensor '4\.bias' holds NaN or an infinity",
    ),
    "infinity in the last block of fedobd": (
        "fedobd",
        lambda s: last_value(s.craft(kept=(0, 2)), math.inf),
        "not finite",
        r"tensor '4\.bias' holds NaN or an infinity",
    ),
    "a last value of fedavg beyond the legal range": (
        "fedavg",
        lambda s: last_value(s.upload, 1e30),
        "limit",
        r"tensor '4\.bias' would change by 1e\+30 in one round; at most \d",
    ),
    "no mask": (
        "feddropoutavg",
        lambda s: s.craft(kept=s.all_blocks()),
        "method",
        "must hold every block under a mask of λ = 0.3",
    ),
    "a block outside the sub-model": (
        "smafd",
        lambda s: s.craft(kept=s.all_blocks()),
        "method",
        r"an upload of smafd holds \d blocks; the \d of the broadcast were wanted",
    ),
}

FORGERIES = [
    pytest.param(scene, forgery, id=f"{scene}-{forgery}")
    for scene in SCENES
    for forgery in ANY_METHOD
    if not (scene == "fedobd" and forgery == "a block that is missing")
] + [pytest.param(scene, forgery, id=forgery) for forgery, (scene, *_) in OF_ONE_METHOD.items()]


def finish(scene: Scene, *, villain_too: bool) -> None:
    """Hand in the uploads of all the others, and the villain's right one where it is wanted."""
    for client in scene.good[1:]:
        scene.server.receive(client, scene.log.uploads[client])
    if villain_too:
        scene.server.receive(scene.villain, scene.upload)


@pytest.mark.parametrize(("scene_name", "forgery"), FORGERIES)
def test_a_wrong_upload_is_refused_recorded_and_leaves_no_trace(
    scene_name: str, forgery: str
) -> None:
    if forgery in ANY_METHOD:
        make, reason, text = ANY_METHOD[forgery]
    else:
        _, make, reason, text = OF_ONE_METHOD[forgery]
    method = SCENES[scene_name]
    clean, scene = Scene(method), Scene(method)
    clean.server.receive(clean.good[0], clean.log.uploads[clean.good[0]])
    finish(clean, villain_too=True)
    record_without = clean.server.end_round()

    upload = make(scene)
    scene.server.receive(scene.good[0], scene.log.uploads[scene.good[0]])
    with pytest.raises(DecodeError, match=text) as refused:
        scene.server.receive(scene.villain, upload)
    assert refused.value.reason.value in reason.split("|")
    finish(scene, villain_too=True)
    record = scene.server.end_round()

    (refusal,) = record.refusals
    assert refusal.client == scene.villain
    assert refusal.reason == refused.value.reason.value
    assert refusal.message == str(refused.value)
    assert refusal.uplink_bytes == len(upload)
    assert record.uplink_bytes == record_without.uplink_bytes + len(upload)
    assert (
        dataclasses.replace(record, refusals=(), uplink_bytes=record_without.uplink_bytes)
        == record_without
    )
    json.dumps(dataclasses.asdict(record))
    assert bits(scene.server.save().tensors) == bits(clean.server.save().tensors)
    assert scene.server.save().values == clean.server.save().values


@every_method
def test_weights_are_those_of_the_uploads_that_arrived(name: str) -> None:
    """A client whose only upload is refused counts as one that never answered."""
    lost, refused = Scene(SHORT_METHODS[name]), Scene(SHORT_METHODS[name])
    for scene in (lost, refused):
        scene.server.receive(scene.good[0], scene.log.uploads[scene.good[0]])
    with pytest.raises(DecodeError, match="was cut or altered"):
        refused.server.receive(refused.villain, refused.upload[:-1])
    finish(lost, villain_too=False)
    finish(refused, villain_too=False)
    records = lost.server.end_round(), refused.server.end_round()
    assert records[0].uploads == records[1].uploads
    assert len(records[0].uploads) == len(lost.plan.cohort) - 1
    assert records[0].train_loss == records[1].train_loss
    assert records[0].downlink_bytes == len(lost.log.broadcast) * len(lost.plan.cohort) + sum(
        map(len, lost.log.openings.values())
    ), "the broadcast went to the lost client too"
    assert bits(lost.server.save().tensors) == bits(refused.server.save().tensors)


@every_method
def test_a_client_outside_the_cohort_is_refused(name: str) -> None:
    scene = Scene(SHORT_METHODS[name])
    outsider = next(c for c in range(5) if c not in scene.plan.cohort)
    upload = forge(scene.upload, client=outsider)
    text = f"client {outsider} takes no part in round 2"
    for client in (outsider, 5, -1):
        with pytest.raises(DecodeError, match=f"client {client} takes no part") as refused:
            scene.server.receive(client, upload)
        assert refused.value.reason.value == "client"
    scene.server.receive(scene.good[0], scene.log.uploads[scene.good[0]])
    finish(scene, villain_too=True)
    record = scene.server.end_round()
    assert [(r.client, r.reason) for r in record.refusals] == [
        (client, "client") for client in sorted([-1, outsider, 5])
    ]
    assert any(text in refusal.message for refusal in record.refusals)
    clean = Scene(SHORT_METHODS[name])
    clean.server.receive(clean.good[0], clean.log.uploads[clean.good[0]])
    finish(clean, villain_too=True)
    assert record.uploads == clean.server.end_round().uploads
    assert bits(scene.server.save().tensors) == bits(clean.server.save().tensors)


@every_method
def test_a_second_upload_of_a_client_is_refused_whether_or_not_it_is_the_same(name: str) -> None:
    scene, clean = Scene(SHORT_METHODS[name]), Scene(SHORT_METHODS[name])
    for each in (scene, clean):
        each.server.receive(each.good[0], each.log.uploads[each.good[0]])
    again = scene.log.uploads[scene.good[0]]
    for second in (again, forge(again, num_examples=1)):
        with pytest.raises(
            DecodeError, match=f"client {scene.good[0]} has uploaded in round 2 already"
        ) as refused:
            scene.server.receive(scene.good[0], second)
        assert refused.value.reason.value == "duplicate"
    finish(scene, villain_too=True)
    finish(clean, villain_too=True)
    record, wanted = scene.server.end_round(), clean.server.end_round()
    assert [r.reason for r in record.refusals] == ["duplicate", "duplicate"]
    assert record.uploads == wanted.uploads
    assert record.uplink_bytes == wanted.uplink_bytes + 2 * len(again)
    assert bits(scene.server.save().tensors) == bits(clean.server.save().tensors)


def test_records_do_not_depend_on_the_order_of_refusals() -> None:
    records = []
    for order in (1, -1):
        scene = Scene(SHORT_METHODS["fedobd"])
        bad = [(scene.villain, scene.upload[:-1]), (scene.good[0], b""), (scene.good[0], b"x")]
        for client, upload in bad[::order]:
            with pytest.raises(DecodeError):
                scene.server.receive(client, upload)
        scene.server.receive(scene.good[0], scene.log.uploads[scene.good[0]])
        finish(scene, villain_too=True)
        records.append(scene.server.end_round())
    assert records[0] == records[1]
    assert len(records[0].refusals) == 3


def test_uploads_may_be_any_kind_of_buffer() -> None:
    scene, other = Scene(FedAvg(cohort=3)), Scene(FedAvg(cohort=3))
    kinds: list[Callable[[bytes], bytes | bytearray | memoryview]]
    kinds = [bytes, bytearray, memoryview]
    for kind, client in zip(kinds, scene.plan.cohort, strict=True):
        scene.server.receive(client, kind(scene.log.uploads[client]))
        other.server.receive(client, other.log.uploads[client])
    assert scene.server.end_round() == other.server.end_round()
    assert bits(scene.server.state) == bits(other.server.state)


# --- rounds without an upload --------------------------------------------------------------------


@every_method
def test_a_round_without_an_upload_is_an_error_and_can_be_begun_again(name: str) -> None:
    server, engine = set_up(SHORT_METHODS[name], MODELS["frozen"]())
    engine.play(server)
    before, kept = bits(server.save().tensors), dict(engine.kept)
    plan = server.begin_round()
    assert plan is not None
    first = engine.ask(server, plan)
    with pytest.raises(EmptyRoundError, match=r"round 2: no upload was accepted from 3 clients$"):
        server.end_round()
    with pytest.raises(DecodeError, match="was cut or altered"):
        server.receive(plan.cohort[0], first.uploads[plan.cohort[0]][:-1])
    with pytest.raises(
        EmptyRoundError, match=rf"3 clients \(client {plan.cohort[0]}: .* cut or altered"
    ):
        server.end_round()
    server.abort_round()
    assert server.rounds == 1
    assert bits(server.save().tensors) == before

    engine.kept = kept
    assert server.begin_round() == plan
    again = engine.ask(server, plan)
    assert again.emitted() == first.emitted(), "openings of an aborted round count as not sent"
    for client in plan.cohort:
        server.receive(client, again.uploads[client])
    record = server.end_round()
    assert record.refusals == ()
    assert server.rounds == 2

    straight, other = set_up(SHORT_METHODS[name], MODELS["frozen"]())
    other.play(straight)
    undisturbed = record_of(other.play(straight))
    assert record == dataclasses.replace(
        undisturbed,
        uplink_bytes=undisturbed.uplink_bytes + len(first.uploads[plan.cohort[0]]) - 1,
        downlink_bytes=2 * undisturbed.downlink_bytes,
    ), "the bytes of the aborted attempt were sent all the same"
    assert bits(straight.save().tensors) == bits(server.save().tensors)


@every_method
def test_an_empty_round_stays_open_for_uploads_that_come_late(name: str) -> None:
    scene = Scene(SHORT_METHODS[name])
    with pytest.raises(EmptyRoundError, match="no upload was accepted"):
        scene.server.end_round()
    scene.server.receive(scene.villain, scene.upload)
    assert [u.client for u in scene.server.end_round().uploads] == [scene.villain]


@every_method
def test_an_aborted_round_can_be_saved_and_resumed_elsewhere(name: str) -> None:
    server, _ = set_up(SHORT_METHODS[name], MODELS["tied"]())
    plan = server.begin_round()
    broadcast = server.broadcast().data
    server.abort_round()
    resumed, _ = set_up(SHORT_METHODS[name], MODELS["tied"](), state_seed=5)
    resumed.restore(server.save())
    assert resumed.begin_round() == plan
    assert resumed.broadcast().data == broadcast


# --- uploads that a client does not make ---------------------------------------------------------


@every_method
@pytest.mark.parametrize(("value", "text"), [(math.nan, "NaN"), (math.inf, "an infinity")])
def test_a_trained_tensor_that_is_not_finite_is_named(name: str, value: float, text: str) -> None:
    scene = Scene(SHORT_METHODS[name])
    client = scene.engine.session(scene.villain)
    start = client.receive(scene.log.broadcast)
    kept = scene.sent_blocks() if name == "smafd" else scene.all_blocks()
    for number in kept:
        spec = scene.schema.tensors[scene.schema.blocks[number].segments[0].tensor]
        if spec.role is not Role.PARAMETER:
            continue
        trained = train(scene.schema, start, scene.villain, 2)
        trained[spec.name].reshape(-1)[0] = value
        with pytest.raises(
            UsageError, match=rf"tensor '{spec.name}' holds {text}.* training has diverged"
        ):
            client.upload(trained, make_report(scene.villain, 2))


@pytest.mark.parametrize("selection", ["mbd", "random"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_tensor_of_a_dropped_block_that_is_not_finite_is_named(
    selection: Literal["mbd", "random"], value: float
) -> None:
    """The embedding can never be uploaded; that it has diverged must be told all the same."""
    method = FedOBD(codec=Codec(selection=selection), stage_one_rounds=2)
    server, engine = set_up(method, big_embedding())
    plan = server.begin_round()
    assert plan is not None
    log = engine.ask(server, plan)
    client = engine.session(plan.cohort[0])
    trained = {name: tensor.clone() for name, tensor in client.receive(log.broadcast).items()}
    trained["embedding.weight"][0, 0] = value
    with pytest.raises(UsageError, match=r"tensor 'embedding\.weight' holds (NaN|an infinity)"):
        client.upload(trained, make_report(plan.cohort[0], 1))


@every_method
def test_trained_values_must_be_complete_and_of_the_right_shape(name: str) -> None:
    scene = Scene(SHORT_METHODS[name])
    client = scene.engine.session(scene.villain)
    trained = train(scene.schema, client.receive(scene.log.broadcast), scene.villain, 2)
    report = make_report(scene.villain, 2)
    with pytest.raises(UsageError, match=r"tensor '3\.bias' has shape \(1, 8\); wanted \(8,\)"):
        client.upload({**trained, "3.bias": trained["3.bias"].reshape(1, 8)}, report)
    del trained["4.weight"]
    with pytest.raises(UsageError, match=r"the state holds no value for tensor '4\.weight'"):
        client.upload(trained, report)


def test_a_client_without_examples_cannot_upload() -> None:
    scene = Scene(FedAvg(cohort=3))
    client = scene.engine.session(scene.villain)
    trained = client.receive(scene.log.broadcast)
    with pytest.raises(UsageError, match="trained on no examples; at least 1 is wanted"):
        client.upload(trained, Report(num_examples=0, train_loss=1.0))
    with pytest.raises(UsageError, match=r"num_examples is -1; allowed are 0 to 2\^63 - 1"):
        Report(num_examples=-1, train_loss=1.0)
    with pytest.raises(UsageError, match="train_loss is nan; wanted a finite"):
        Report(num_examples=1, train_loss=math.nan)


def test_nominal_bits_of_broadcasts_and_openings_are_32_a_value() -> None:
    """45 frozen values come in an opening, 84 trained ones in each broadcast; no buffers."""
    server, engine = set_up(FedAvg(rounds=3, cohort=3), MODELS["frozen"]())
    opened: set[int] = set()
    for log in engine.run(server):
        new = set(log.plan.cohort) - opened
        opened |= new
        record = record_of(log)
        assert record.downlink_nominal_bits == 32 * (3 * 84 + len(new) * 45)
        assert record.uplink_nominal_bits == 32 * 3 * 84


def test_the_bytes_of_every_aborted_attempt_count_once() -> None:
    server, engine = set_up(FedAvg(rounds=2, cohort=3), MODELS["tied"]())
    up = down = 0
    for attempt in (1, 2, 3):
        plan = server.begin_round()
        assert plan is not None
        log = engine.ask(server, plan)
        down += len(plan.cohort) * len(log.broadcast)
        for client in plan.cohort[:attempt]:
            server.receive(client, log.uploads[client])
            up += len(log.uploads[client])
        if attempt < 3:
            server.abort_round()
    record = server.end_round()
    assert (record.uplink_bytes, record.downlink_bytes) == (up, down)
    last = engine.play(server)
    assert last is not None
    record = record_of(last)
    assert record.uplink_bytes == sum(map(len, last.uploads.values()))
    assert record.downlink_bytes == 3 * len(last.broadcast)


def test_an_upload_may_claim_as_many_examples_as_are_allowed() -> None:
    scene = Scene(FedAvg(cohort=3))
    most = forge(scene.upload, num_examples=MAX_EXAMPLES, num_validation_examples=MAX_EXAMPLES)
    record = scene.server.receive(scene.villain, most)
    claimed = record.report
    assert (claimed.num_examples, claimed.num_validation_examples) == (MAX_EXAMPLES,) * 2


def test_a_loss_beyond_float32_is_the_callers_fault_not_a_crash() -> None:
    """It travels as a float32; 1e300 is finite in float64 only."""
    scene = Scene(FedAvg(cohort=3))
    client = scene.engine.session(scene.villain)
    trained = client.receive(scene.log.broadcast)
    with pytest.raises(UsageError, match=r"train_loss is 1e\+300"):
        client.upload(trained, Report(num_examples=1, train_loss=1e300))


@pytest.mark.parametrize("client", [-1, 2**32])
def test_a_client_number_that_no_upload_can_hold_is_refused(client: int) -> None:
    server, engine = set_up(FedAvg(), MODELS["tied"]())
    server.begin_round()
    broadcast = server.broadcast().data

    def answer() -> bytes:
        session = ClientSession(FedAvg(), engine.schema, client=client)
        return session.upload(session.receive(broadcast), make_report(0, 1)).data

    with pytest.raises(UsageError, match=f"client is {client}; allowed are 0 to"):
        answer()
