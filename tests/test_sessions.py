"""Sessions: what they refuse and forgive, in what order they are called, whom they ask, and when
they stop.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Literal

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
    DecodeError,
    EarlyStop,
    EmptyRoundError,
    FedAvg,
    FedDropoutAvg,
    FedOBD,
    FedPAQ,
    Method,
    ModelSchema,
    ModelState,
    Report,
    Role,
    RoundPlan,
    ServerSession,
    UsageError,
    decompose,
)
from fedobd._masks import Mask
from fedobd._rounds import cohort_size, sample_cohort
from fedobd._wire import Kind
from tests.session_helpers import (
    MODELS,
    SEED,
    SHORT_METHODS,
    Engine,
    RoundLog,
    bits,
    bits_of,
    craft_upload,
    decode_broadcast,
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

every_method = pytest.mark.parametrize("name", sorted(METHODS))

MAX_EXAMPLES = 5000


# --- uploads that are refused --------------------------------------------------------------------


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
        return Broadcast.decode(self.log.broadcast, self.method, self.schema).header.kept

    def buffer_block(self) -> int:
        index = [spec.name for spec in self.schema.tensors].index("1.running_var")
        (number,) = (
            n
            for n, block in enumerate(self.schema.blocks)
            if any(segment.tensor == index for segment in block.segments)
        )
        return number


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
        lambda s: forge(s.upload, version=2),
        "version",
        "format version 2 came; this side reads 1",
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
        r"claims 5001 validation examples; at most 5000",
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
    assert record_of(other.play(straight)) == record
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
    broadcast = b"".join(server.broadcast())
    server.abort_round()
    resumed, _ = set_up(SHORT_METHODS[name], MODELS["tied"](), state_seed=5)
    resumed.restore(server.save())
    assert resumed.begin_round() == plan
    assert b"".join(resumed.broadcast()) == broadcast


# --- the order of calls --------------------------------------------------------------------------


def test_calls_that_want_an_open_round() -> None:
    server, _ = set_up(FedAvg(), MODELS["frozen"]())
    calls: list[Callable[[], object]] = [
        server.end_round,
        server.abort_round,
        lambda: list(server.broadcast()),
        lambda: list(server.opening(0)),
        lambda: server.needs_opening(0),
        lambda: server.receive(0, b""),
    ]
    for call in calls:
        with pytest.raises(UsageError, match="no round is open; call begin_round first"):
            call()


@every_method
def test_a_round_is_not_begun_twice_nor_saved_while_it_is_open(name: str) -> None:
    server, engine = set_up(SHORT_METHODS[name], MODELS["tied"]())
    server.begin_round()
    with pytest.raises(UsageError, match="round 1 has not been ended"):
        server.begin_round()
    with pytest.raises(UsageError, match="round 1 is open; a session is saved between rounds"):
        server.save()
    server.abort_round()
    server.save()
    engine.run(server)
    assert server.begin_round() is None
    assert server.begin_round() is None
    server.save()


@every_method
def test_a_client_uploads_only_after_it_has_received(name: str) -> None:
    _, engine = set_up(SHORT_METHODS[name], MODELS["tied"]())
    with pytest.raises(
        UsageError, match="client 2 cannot upload before it has received a broadcast"
    ):
        engine.session(2).upload(make_state(MODELS["tied"]()), make_report(2, 1))


def test_only_a_member_of_the_cohort_is_opened() -> None:
    server, _ = set_up(FedAvg(cohort=2), MODELS["frozen"]())
    plan = server.begin_round()
    assert plan is not None
    outsider = next(c for c in range(5) if c not in plan.cohort)
    with pytest.raises(UsageError, match=f"client {outsider} takes no part in round 1"):
        server.needs_opening(outsider)
    with pytest.raises(UsageError, match=f"client {outsider} takes no part in round 1"):
        list(server.opening(outsider))


@every_method
def test_a_round_that_was_never_broadcast_cannot_end_and_changes_nothing(name: str) -> None:
    """Uploads from before a crash reach a resumed session that has broadcast nothing."""
    server, engine = set_up(SHORT_METHODS[name], MODELS["tied"]())
    twin, _ = set_up(SHORT_METHODS[name], MODELS["tied"]())
    plan = twin.begin_round()
    assert plan is not None
    log = engine.ask(twin, plan)
    server.begin_round()
    for client in plan.cohort:
        server.receive(client, log.uploads[client])
    before = bits(server.state)
    with pytest.raises(UsageError, match="round 1 was ended before its broadcast was made"):
        server.end_round()
    assert bits(server.state) == before
    assert b"".join(server.broadcast()) == log.broadcast
    assert [u.client for u in server.end_round().uploads] == list(plan.cohort)


@every_method
def test_the_broadcast_is_the_same_each_time_and_may_come_in_chunks(name: str) -> None:
    server, _ = set_up(SHORT_METHODS[name], MODELS["batch_norm"]())
    server.begin_round()
    first = b"".join(server.broadcast())
    assert [b"".join(server.broadcast()) for _ in range(2)] == [first, first]


# --- what a client hands in ----------------------------------------------------------------------


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
            b"".join(client.upload(trained, make_report(scene.villain, 2)))


@pytest.mark.parametrize("selection", ["mbd", "random"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_tensor_of_a_dropped_block_that_is_not_finite_is_named(
    selection: Literal["mbd", "random"], value: float
) -> None:
    """The embedding can never be uploaded; that it has diverged must be told all the same."""
    method = FedOBD(codec=Codec(selection=selection), stage_one_rounds=2)
    server, engine = set_up(method, _BigEmbedding())
    plan = server.begin_round()
    assert plan is not None
    log = engine.ask(server, plan)
    client = engine.session(plan.cohort[0])
    trained = {name: tensor.clone() for name, tensor in client.receive(log.broadcast).items()}
    trained["embedding.weight"][0, 0] = value
    with pytest.raises(UsageError, match=r"tensor 'embedding\.weight' holds (NaN|an infinity)"):
        b"".join(client.upload(trained, make_report(plan.cohort[0], 1)))


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


def test_a_loss_beyond_float32_is_the_callers_fault_not_a_crash() -> None:
    """It travels as a float32; 1e300 is finite in float64 only."""
    scene = Scene(FedAvg(cohort=3))
    client = scene.engine.session(scene.villain)
    trained = client.receive(scene.log.broadcast)
    with pytest.raises(UsageError, match=r"train_loss is 1e\+300"):
        b"".join(client.upload(trained, Report(num_examples=1, train_loss=1e300)))


@pytest.mark.parametrize("client", [-1, 2**32])
def test_a_client_number_that_no_upload_can_hold_is_refused(client: int) -> None:
    server, engine = set_up(FedAvg(), MODELS["tied"]())
    server.begin_round()
    broadcast = b"".join(server.broadcast())

    def answer() -> bytes:
        session = ClientSession(FedAvg(), engine.schema, client=client)
        return b"".join(session.upload(session.receive(broadcast), make_report(0, 1)))

    with pytest.raises(UsageError, match=f"client is {client}; allowed are 0 to"):
        answer()


@every_method
def test_the_state_that_a_server_gives_out_is_not_its_own(name: str) -> None:
    """A model that runs on it in place (batch normalization does) must not change W."""
    server, _ = set_up(SHORT_METHODS[name], MODELS["batch_norm"]())
    before = bits(server.state)
    for value in server.state.values():
        value.zero_()
    assert bits(server.state) == before


def test_the_initial_model_must_be_finite() -> None:
    model = MODELS["tied"]()
    _, engine = set_up(FedOBD(), model)
    state = make_state(model)
    state["inner.bias"][2] = math.nan
    server = ServerSession(FedOBD(), engine.schema, state, num_clients=5)
    server.begin_round()
    with pytest.raises(UsageError, match=r"tensor 'inner\.bias' holds NaN"):
        b"".join(server.broadcast())


@every_method
def test_a_client_refuses_what_is_not_for_it(name: str) -> None:
    scene = Scene(SHORT_METHODS[name])
    client = scene.engine.session(scene.villain)
    broadcast = scene.log.broadcast
    other_id = SHORT_METHODS[name].wire_id % 5 + 1
    table: list[tuple[bytes, str, str]] = [
        (broadcast[:-1], "checksum", "was cut or altered"),
        (scene.upload, "kind", "a payload of kind UPLOAD came; wanted BROADCAST"),
        (b"".join(scene.server.opening(scene.villain)), "kind", "a payload of kind OPENING came"),
        (forge(broadcast, method=other_id), "method", f"method number {other_id} came; wanted"),
        (forge(broadcast, version=9), "version", "format version 9 came"),
        (forge(broadcast, flags=8), "field", "what a server sends must be whole values"),
        (forge(broadcast, fingerprint=b"x" * 16), "schema", "for another model or other blocks"),
    ]
    for payload, reason, text in table:
        with pytest.raises(DecodeError, match=text) as refused:
            client.receive(payload)
        assert refused.value.reason.value == reason
    with pytest.raises(DecodeError, match="a payload of kind BROADCAST came; wanted OPENING"):
        client.open(broadcast)
    with pytest.raises(UsageError, match="cannot upload before it has received"):
        client.upload(scene.log.trained[scene.villain], make_report(scene.villain, 2))
    received = client.receive(broadcast)
    assert bits(received) == bits(scene.log.starts[scene.villain])


@every_method
def test_a_broadcast_decoded_once_serves_every_client(name: str) -> None:
    scene = Scene(SHORT_METHODS[name], "frozen")
    shared = Broadcast.decode(scene.log.broadcast, scene.method, scene.schema)
    before = bits(shared.values)
    for number in scene.plan.cohort:
        client = scene.engine.session(number)
        assert bits(client.receive(shared)) == bits(scene.log.starts[number])
        upload = b"".join(client.upload(scene.log.trained[number], make_report(number, 2)))
        assert upload == scene.log.uploads[number]
    assert bits(shared.values) == before


# --- cohorts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cohort", "num_clients", "wanted"),
    [
        (0.5, 100, 50),
        (0.5, 5, 2),
        (0.5, 1, 1),
        (0.01, 10, 1),
        (1.0, 7, 7),
        (1, 7, 1),
        (7, 7, 7),
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.7, 10, 7),
    ],
)
def test_size_of_a_cohort(cohort: int | float, num_clients: int, wanted: int) -> None:
    """A count is a count; a fraction, as it is written in decimal, is rounded down and at least
    one client."""
    assert cohort_size(cohort, num_clients) == wanted
    assert len(sample_cohort(cohort, num_clients, 0, 1)) == wanted


def test_cohorts_follow_from_seed_and_round_alone() -> None:
    cohorts = [sample_cohort(4, 10, 0, number) for number in range(1, 30)]
    assert cohorts == [sample_cohort(4, 10, 0, number) for number in range(1, 30)]
    assert len(set(cohorts)) > 20
    assert cohorts != [sample_cohort(4, 10, 1, number) for number in range(1, 30)]
    for cohort in cohorts:
        assert list(cohort) == sorted(set(cohort))
        assert set(cohort) <= set(range(10))
        assert len(cohort) == 4


def test_cohorts_are_even_over_clients_and_pairs() -> None:
    rounds = 3000
    clients: Counter[int] = Counter()
    pairs: Counter[tuple[int, int]] = Counter()
    for number in range(rounds):
        cohort = sample_cohort(3, 10, 4, number)
        clients.update(cohort)
        pairs.update((a, b) for a in cohort for b in cohort if a < b)
    # five standard deviations of a binomial
    for counts, share, kinds in ((clients, 0.3, 10), (pairs, 6 / 90, 45)):
        assert len(counts) == kinds
        allowed = 5 * math.sqrt(rounds * share * (1 - share))
        assert all(abs(n - rounds * share) < allowed for n in counts.values())


def test_the_session_samples_as_the_rule_says() -> None:
    server, engine = set_up(FedAvg(rounds=4, cohort=0.5), MODELS["tied"](), num_clients=7)
    for number in range(1, 5):
        log = engine.play(server)
        assert log is not None
        assert log.plan.cohort == sample_cohort(0.5, 7, SEED, number)
        assert len(log.plan.cohort) == 3


# --- plans ---------------------------------------------------------------------------------------


def plans_of(method: Method, num_clients: int = 6) -> list[RoundPlan]:
    server, engine = set_up(method, nn.Linear(3, 2), num_clients=num_clients)
    return [log.plan for log in engine.run(server)]


def test_plans_of_both_stages() -> None:
    method = FedOBD(stage_one_rounds=3, stage_one_epochs=5, stage_two_epochs=4, cohort=0.5)
    plans = plans_of(method)
    first, second = plans[:3], plans[3:]
    assert [plan.round for plan in plans] == [1, 2, 3, 4, 5, 6, 7]
    assert [plan.stage for plan in plans] == [1, 1, 1, 2, 2, 2, 2]
    for plan in first:
        assert (plan.epochs, plan.schedule_start, plan.schedule_epochs) == (5, 0, 5)
        assert len(plan.cohort) == 3
    assert len({plan.cohort for plan in first}) > 1
    for index, plan in enumerate(second):
        assert (plan.epochs, plan.schedule_start, plan.schedule_epochs) == (1, index, 4)
        assert plan.cohort == (0, 1, 2, 3, 4, 5)
    assert [plan.run_start for plan in plans] == [0, 5, 10, 15, 16, 17, 18]
    assert {plan.run_epochs for plan in plans} == {19}


def test_without_stage_two_the_run_ends_after_stage_one() -> None:
    plans = plans_of(FedOBD(stage_one_rounds=2, stage_two_epochs=0))
    assert [(plan.round, plan.stage) for plan in plans] == [(1, 1), (2, 1)]


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"fedobd"}))
def test_baselines_have_one_stage_whose_rounds_start_the_schedule_anew(name: str) -> None:
    plans = plans_of(SHORT_METHODS[name])
    assert len(plans) == (5 if name == "smafd" else 4)
    for plan in plans:
        assert (plan.stage, plan.epochs) == (1, 2)
        assert (plan.schedule_start, plan.schedule_epochs) == (0, 2)


# --- early stop ----------------------------------------------------------------------------------


def run_with_metrics(
    method: Method, metrics: Mapping[int, float], *, test_set: bool = False
) -> list[RoundPlan]:
    """Play a run whose validation metric, or metric on the test set, is scripted by round."""
    server, engine = set_up(method, nn.Linear(3, 2), num_clients=2)
    plans = []

    def report(client: int, number: int) -> Report:
        metric = 0.1 * number if test_set else metrics.get(number, 0.9)
        return Report(
            num_examples=10,
            train_loss=1.0,
            num_validation_examples=5,
            validation_metric=metric,
        )

    engine.report = report
    while (log := engine.play(server)) is not None:
        plans.append(log.plan)
        if test_set:
            server.observe_test_metric(metrics.get(log.plan.round, 0.9))
    return plans


FLAT_FROM_TWO = {number: (0.5 if number == 1 else 0.6) for number in range(1, 50)}


def stages_of(plans: list[RoundPlan]) -> list[int]:
    return [plan.stage for plan in plans]


@pytest.mark.parametrize("source", ["validation", "test"])
def test_early_stop_leaves_each_stage_after_its_patience(source: str) -> None:
    """The metric rises last in round 2; stage 2 has its own patience."""
    stop = EarlyStop(source=source, min_gain=0.01, patience=3)
    method = FedOBD(stage_one_rounds=20, stage_two_epochs=12, cohort=1.0, stop=stop)
    plans = run_with_metrics(method, FLAT_FROM_TWO, test_set=source == "test")
    # stage 1: rounds 1 and 2 rise, 3 do not; stage 2: its first round is the best, 3 are not
    assert stages_of(plans) == [1] * 5 + [2] * 4
    assert [plan.round for plan in plans] == list(range(1, 10))
    assert [plan.schedule_start for plan in plans[5:]] == [0, 1, 2, 3]
    assert {plan.schedule_epochs for plan in plans[5:]} == {12}


@pytest.mark.parametrize("source", ["validation", "test"])
@pytest.mark.parametrize("name", sorted(set(METHODS) - {"fedobd"}))
def test_early_stop_ends_a_run_of_one_stage(name: str, source: str) -> None:
    stop = EarlyStop(source=source, patience=2)
    method = dataclasses.replace(
        SHORT_METHODS[name],  # type: ignore[type-var]
        rounds=30,
        cohort=1.0,
        stop=stop,
    )
    plans = run_with_metrics(method, FLAT_FROM_TWO, test_set=source == "test")
    assert len(plans) == 4


def test_the_patience_is_five_rounds_without_a_rise_of_a_thousandth() -> None:
    assert (EarlyStop().min_gain, EarlyStop().patience) == (0.001, 5)
    stop = EarlyStop(source="validation")
    method = FedOBD(stage_one_rounds=20, stage_two_epochs=0, cohort=1.0, stop=stop)
    flat = dict.fromkeys(range(1, 21), 0.5)
    assert len(run_with_metrics(method, flat)) == 6
    assert len(run_with_metrics(method, flat | {6: 0.5009})) == 6
    assert len(run_with_metrics(method, flat | {6: 0.5011})) == 11


def test_early_stop_is_off_unless_it_is_asked_for() -> None:
    assert EarlyStop().source == "off"
    for method in METHODS.values():
        assert method().stop == EarlyStop()
    method_ = FedOBD(stage_one_rounds=12, stage_two_epochs=8, cohort=1.0)
    falling = {number: 1 / number for number in range(1, 50)}
    for test_set in (False, True):
        plans = run_with_metrics(method_, falling, test_set=test_set)
        assert stages_of(plans) == [1] * 12 + [2] * 8


def test_small_rises_count_once_they_add_up() -> None:
    stop = EarlyStop(source="validation", min_gain=0.01, patience=2)
    method = FedOBD(stage_one_rounds=9, stage_two_epochs=0, cohort=1.0, stop=stop)
    creeping = {number: 0.5 + 0.006 * number for number in range(1, 20)}
    assert len(run_with_metrics(method, creeping)) == 9


def test_only_the_source_that_was_chosen_counts() -> None:
    stop = EarlyStop(source="validation", patience=2)
    method = FedOBD(stage_one_rounds=8, stage_two_epochs=0, cohort=1.0, stop=stop)
    # validation figures rise by 0.1 a round, the test set's are flat
    assert len(run_with_metrics(method, FLAT_FROM_TWO, test_set=True)) == 8


def test_rounds_without_validation_figures_never_stop_a_run() -> None:
    stop = EarlyStop(source="validation", patience=1)
    server, engine = set_up(FedAvg(rounds=6, stop=stop), nn.Linear(3, 2), num_clients=2)
    engine.report = lambda client, number: Report(num_examples=1, train_loss=1.0)
    assert len(engine.run(server)) == 6


def test_the_watch_is_saved_with_the_session() -> None:
    stop = EarlyStop(source="test", patience=3)
    method = FedOBD(stage_one_rounds=20, stage_two_epochs=1, cohort=1.0, stop=stop)
    server, engine = set_up(method, nn.Linear(3, 2), num_clients=2)
    stages = []
    while (log := engine.play(server)) is not None:
        stages.append(log.plan.stage)
        server.observe_test_metric(0.5)
        saved = server.save()
        server, _ = set_up(method, nn.Linear(3, 2), num_clients=2)
        server.restore(dataclasses.replace(saved, values=json.loads(json.dumps(saved.values))))
    assert stages == [1, 1, 1, 1, 2]


def test_a_test_metric_belongs_between_two_rounds() -> None:
    """In an open round it could leave the stage that the round's plan belongs to."""
    stop = EarlyStop(source="test", patience=1)
    server, engine = set_up(FedAvg(rounds=9, stop=stop), nn.Linear(3, 2), num_clients=2)
    engine.play(server)
    server.observe_test_metric(0.5)
    plan = server.begin_round()
    assert plan is not None
    log = engine.ask(server, plan)
    with pytest.raises(UsageError, match="round 2"):
        server.observe_test_metric(0.4)
    for client in plan.cohort:
        server.receive(client, log.uploads[client])
    assert server.end_round().round == 2


# --- the mean ------------------------------------------------------------------------------------

PLAIN = Codec(uplink_quantizer="none", downlink_quantizer="none", dropout_rate=0.5)


def test_a_dropped_block_counts_as_the_previous_global_one() -> None:
    """Two clients with weights 1 and 3 upload one block each, of three."""
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(4, 2))
    server, engine = set_up(FedOBD(codec=PLAIN, cohort=1.0), model, num_clients=2)
    plan = server.begin_round()
    assert plan is not None
    log = engine.ask(server, plan)
    before = server.state
    for client, (examples, block) in enumerate([(1, 0), (3, 1)]):
        start = log.starts[client]
        trained = {name: value + 1.0 for name, value in start.items()}
        upload = craft_upload(
            engine.method,
            engine.schema,
            plan,
            client,
            start,
            trained,
            kept=(block,),
            num_examples=examples,
        )
        assert server.receive(client, upload).blocks_kept == (block,)
    server.end_round()
    for name, change in (("0", 0.25), ("1", 0.75), ("2", 0.0)):
        for tensor in (f"{name}.weight", f"{name}.bias"):
            moved = server.state[tensor] - before[tensor]
            assert torch.allclose(moved, torch.full_like(moved, change), rtol=0, atol=1e-6)
    assert bits(server.state)["2.weight"] == bits(before)["2.weight"]


@pytest.mark.parametrize("stage_two_epochs", [0, 20])
def test_the_broadcasts_error_does_not_pile_up(stage_two_epochs: int) -> None:
    """With a coarse downlink and clients that change nothing, W keeps its bits for 20 rounds and
    more; a server that kept Ŵ instead would lose it in the first."""
    model = MODELS["batch_norm"]()
    codec = Codec(downlink_weight=5.0, uplink_weight=1e-3)
    method = FedOBD(codec=codec, stage_one_rounds=20, stage_two_epochs=stage_two_epochs)
    server, engine = set_up(method, model)
    engine.train = lambda schema, start, client, number: dict(start)
    before = bits(server.save().tensors)
    logs = engine.run(server)
    assert len(logs) == 20 + stage_two_epochs
    assert bits(server.save().tensors) == before
    held = decode_broadcast(logs[0], method, engine.schema)
    coarse = (held["3.weight"] - server.state["3.weight"]).abs().max()
    assert float(coarse) > 0.02, "the case must have a coarse downlink"
    assert bits(held) == bits(decode_broadcast(logs[-1], method, engine.schema))


def test_differences_are_added_to_w_and_not_to_what_clients_hold() -> None:
    """Every client moves by the same step from Ŵ; W moves by that step, from W."""
    model = MODELS["tied"]()
    codec = Codec(downlink_weight=5.0, uplink_quantizer="none", selection="none")
    server, engine = set_up(FedOBD(codec=codec, stage_one_rounds=5, stage_two_epochs=0), model)
    engine.train = lambda schema, start, client, number: {n: v + 0.125 for n, v in start.items()}
    before = server.state
    engine.run(server)
    for name, value in server.state.items():
        assert torch.allclose(value, before[name] + 5 * 0.125, rtol=0, atol=2e-6), name


# --- blocks that never travel --------------------------------------------------------------------


class _BigEmbedding(nn.Module):
    """An embedding of 120 of 148 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 4)
        self.hidden = nn.Linear(4, 4)
        self.output = nn.Linear(3, 2)


def shake(schema: ModelSchema, start: ModelState, client: int, number: int) -> ModelState:
    """Train the embedding most by far, and one of the others more than the other in turn."""
    trained = dict(start)
    for name, value in start.items():
        step = 5.0 if name.startswith("embedding") else 0.1
        if name.startswith("hidden" if number % 2 else "output"):
            step *= 3
        trained[name] = value + step * torch.linspace(-1, 1, value.numel()).reshape(value.shape)
    return trained


def test_a_block_larger_than_the_budget_is_reported() -> None:
    model = _BigEmbedding()
    method = FedOBD(codec=Codec(dropout_rate=0.3), stage_one_rounds=4, stage_two_epochs=2)
    server, engine = set_up(method, model)
    engine.train = lambda schema, start, client, number: shake(schema, dict(start), client, number)
    assert server.never_uploaded() == (0, 1, 2), "before the first round nothing was uploaded"
    before = server.state["embedding.weight"]
    for _ in range(4):
        record = record_of(engine.play(server))
        differences = record.uploads[0].block_differences
        assert differences is not None
        assert max(differences) == differences[0], "the block changed most, and yet:"
        assert server.never_uploaded() == (0,)
    assert bits_of(server.state["embedding.weight"]) == bits_of(before)
    engine.run(server)
    assert bits_of(server.state["embedding.weight"]) != bits_of(before)
    assert server.never_uploaded() == (0,), "stage 2 does not count"


def test_the_remedy_for_a_large_block_is_to_split_it() -> None:
    model = _BigEmbedding()
    schema = decompose(model, BlockRules(max_block_fraction=0.25))
    method = FedOBD(codec=Codec(selection="random"), stage_one_rounds=6, stage_two_epochs=0)
    server, engine = set_up(method, model, schema=schema)
    engine.run(server)
    assert len(schema.blocks) > 3
    assert server.never_uploaded() == ()


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"fedobd", "smafd"}))
def test_methods_that_send_every_block_report_none(name: str) -> None:
    server, engine = set_up(SHORT_METHODS[name], MODELS["batch_norm"]())
    engine.play(server)
    assert server.never_uploaded() == ()


# --- the delivery --------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_the_delivery_holds_the_whole_trained_model(name: str, kind: str) -> None:
    server, engine = set_up(SHORT_METHODS[name], MODELS[kind]())
    engine.run(server)
    payload = b"".join(server.delivery())
    delivery = Broadcast.decode(payload, engine.method, engine.schema, kind=Kind.DELIVERY)
    assert delivery.header.round == server.rounds
    assert delivery.header.kept == tuple(range(len(engine.schema.blocks)))
    exact = name != "fedobd"
    for spec in engine.schema.tensors:
        if spec.role is Role.FROZEN:
            assert spec.name not in delivery.values, "it travelled in the opening"
            continue
        value, wanted = delivery.values[spec.name], server.state[spec.name]
        assert value.dtype is spec.dtype
        if exact or spec.role is Role.BUFFER:
            assert torch.equal(value, wanted)
        else:
            assert torch.allclose(value.float(), wanted.float(), rtol=0, atol=0.05)
    with pytest.raises(DecodeError, match="kind DELIVERY came; wanted BROADCAST"):
        Broadcast.decode(payload, engine.method, engine.schema)


@every_method
def test_a_delivery_can_be_made_at_any_time_and_changes_nothing(name: str) -> None:
    """For a model that was saved before its last round, or before its first."""
    method = SHORT_METHODS[name]
    server, engine = set_up(method, MODELS["tied"]())
    straight, other = set_up(method, MODELS["tied"]())
    logs: list[RoundLog] = []
    for _ in range(straight.planned_rounds):
        delivery = b"".join(server.delivery())
        decoded = Broadcast.decode(delivery, method, engine.schema, kind=Kind.DELIVERY)
        assert set(decoded.values) == set(server.state)
        log = engine.play(server)
        assert log is not None
        logs.append(log)
    assert [log.emitted() for log in logs] == [log.emitted() for log in other.run(straight)]


def test_a_delivery_of_fedobd_is_quantized_like_its_broadcasts() -> None:
    """Stage 2 has begun: the model that a broadcast would hold next, byte for byte in values."""
    method = FedOBD(stage_one_rounds=2, stage_two_epochs=2, cohort=2)
    server, engine = set_up(method, MODELS["batch_norm"]())
    engine.play(server)
    delivery = b"".join(server.delivery())
    delivered = Broadcast.decode(delivery, method, engine.schema, kind=Kind.DELIVERY).values
    server.begin_round()
    broadcast = b"".join(server.broadcast())
    assert bits(delivered) == bits(Broadcast.decode(broadcast, method, engine.schema).values)
    assert len(delivery) == len(broadcast)


# --- what a client keeps -------------------------------------------------------------------------


def test_only_smafd_keeps_what_a_client_received() -> None:
    for name, method in SHORT_METHODS.items():
        server, engine = set_up(method, MODELS["tied"]())
        log = engine.play(server)
        assert log is not None
        for client in log.plan.cohort:
            kept = engine.kept[client]
            wanted = bits(log.starts[client]) if name == "smafd" else {}
            assert bits(kept) == wanted


def test_a_client_of_smafd_without_its_state_is_told_so() -> None:
    method = SMAFD(rounds=6, cohort=5)
    server, engine = set_up(method, MODELS["batch_norm"]())
    engine.play(server)
    server.begin_round()
    broadcast = b"".join(server.broadcast())
    assert not server.needs_opening(3)
    lost = ClientSession(method, engine.schema, client=3, seed=SEED)
    with pytest.raises(UsageError, match=r"client 3 has not kept tensor .* opening payload"):
        lost.receive(broadcast)
    found = Engine(method, engine.schema, kept=engine.kept).session(3)
    assert set(found.receive(broadcast)) == set(server.state)
