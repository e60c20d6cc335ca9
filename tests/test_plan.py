"""Plans: what is estimated before training lies near what is then sent."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from fedobd import (
    METHODS,
    FedAvg,
    FedOBD,
    RoundPlan,
    ServerSession,
    UsageError,
    decompose,
    get_state,
)
from fedobd._seeds import derive_seed
from fedobd.cli._plan import plan_command
from fedobd.experiments import (
    RunConfig,
    Summary,
    build_experiment,
    initial_model,
    load_config,
    parse_config,
    run,
)
from fedobd.models import build_model
from fedobd.planning import Federation, MethodPlan, StagePlan, UpdateModel, make_plan, plan_method
from fedobd.planning._method_plan import _newcomers, _sampled
from fedobd.training import TrainingOptions
from tests import toy

app = typer.Typer()
app.command()(plan_command)

CUT = [
    "methods.fedobd={stage_one_rounds=4, stage_one_epochs=1, stage_two_epochs=3, cohort=2}",
    *(
        f"methods.{name}={{rounds=4, epochs=1, cohort=2}}"
        for name in ("fedavg", "fedpaq", "feddropoutavg", "smafd")
    ),
    "data.partition.name=iid",
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plan(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what `fedobd plan` shows."""
    app(args=words.split(), standalone_mode=False)
    return capsys.readouterr().out


def of_method(config: RunConfig, name: str, **options: Any) -> MethodPlan:
    return next(p for p in make_plan(config, **options).methods if p.method == name)


# what is promised


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_estimate_is_near_what_a_cut_run_of_the_digits_sends(
    name: str, tmp_path: Path
) -> None:
    config = load_config("digits", overrides=CUT).for_method(name, 0)
    estimate, real = of_method(config, name), run(config, tmp_path / "run")
    assert estimate.total_bytes == pytest.approx(real.total_bytes, rel=0.25)
    assert estimate.downlink_bytes == pytest.approx(real.downlink_bytes, rel=0.25)
    assert estimate.uplink_bytes == pytest.approx(real.uplink_bytes, rel=0.4)
    if name in ("fedavg", "feddropoutavg"):
        assert estimate.total_bytes == pytest.approx(real.total_bytes, rel=0.01)


@pytest.mark.parametrize("shared_start", [False, True])
@pytest.mark.parametrize("name", ["fedavg", "smafd", "fedobd"])
def test_openings_and_a_shared_start_are_counted_as_sessions_do(
    name: str, shared_start: bool, tmp_path: Path
) -> None:
    """Frozen parameters are sent before a client's first round; a shared start leaves them out."""
    config = toy.config(
        name,
        model={"options": {"frozen": True}},
        federation={"shared_start": shared_start},
    )
    estimate = of_method(config, name)
    real: Summary = run(config, tmp_path / "run")
    records = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    rounds = [json.loads(line) for line in records]
    assert estimate.initialized * estimate.initial_bytes == sum(r["opening_bytes"] for r in rounds)
    assert estimate.initial_rounds == sum(bool(r["opened"]) for r in rounds)
    assert (estimate.initial_bytes < 100) is shared_start
    if name == "fedavg":
        assert estimate.downlink_bytes == real.downlink_bytes


def test_the_schedule_shrinks_what_stage_two_uploads() -> None:
    stages = {}
    for schedule in ("cosine", "constant"):
        config = load_config(
            "digits", overrides=[*CUT, f"training.schedule={schedule}"]
        ).for_method("fedobd", 0)
        stages[schedule] = of_method(config, "fedobd").stages
    assert stages["cosine"][1].uplink_bytes < 0.95 * stages["constant"][1].uplink_bytes


def test_larger_updates_take_half_a_bit_a_parameter_for_each_doubling() -> None:
    config = load_config("digits", overrides=CUT).for_method("fedobd", 0)
    size, more = (
        of_method(config, "fedobd", update_size=size).stages[1].uplink_bytes for size in (0.2, 0.4)
    )
    assert 8 * (more - size) / 90_250 == pytest.approx(0.5, abs=0.1)


def from_checkpoint(checkpoint: str | None = None) -> torch.nn.Module:
    assert checkpoint in (None, "here")
    return toy.make_model()


@pytest.mark.parametrize(("checkpoint", "size"), [(None, 0.1), ("here", 0.01)])
def test_pretrained_models_have_smaller_updates(checkpoint: str | None, size: float) -> None:
    options = {} if checkpoint is None else {"checkpoint": checkpoint}
    model = {"name": "tests.test_plan:from_checkpoint", "options": options}
    assert make_plan(toy.config("fedobd", model=model)).updates.size == size


def test_a_plan_is_the_same_each_time() -> None:
    config = load_config("digits", overrides=CUT).for_method("fedpaq", 3)
    assert make_plan(config).methods == make_plan(config).methods


def test_a_model_starts_from_the_values_that_a_run_starts_from() -> None:
    config = toy.config("fedobd", federation={"seed": 7})
    found = get_state(initial_model(config))
    wanted = build_experiment(config).initial
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("seed", [1, 7])
def test_the_values_that_a_run_starts_from_follow_from_its_seed(seed: int) -> None:
    found = get_state(initial_model(toy.config("fedobd").for_method("fedobd", seed)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "model"))
        wanted = get_state(toy.make_model())
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_millions_of_rounds_are_planned_at_once() -> None:
    many = FedAvg(rounds=2_000_000, cohort=0.5)
    opened = _newcomers(many, Federation(num_clients=10))
    assert sum(opened) == 10
    assert len(opened) < 100


def test_fedavg_with_all_clients_is_added_to_compare_with() -> None:
    config = load_config("digits", overrides=CUT).for_method("fedpaq", 0)
    made = make_plan(config)
    paq, avg = made.methods
    assert (paq.method, avg.method) == ("fedpaq", "fedavg")
    assert [(s.rounds, s.epochs, s.cohort) for s in avg.stages] == [(4, 1, 10)]
    assert made.reduction(avg) == 0
    assert made.reduction(paq) == pytest.approx(1 - paq.total_bytes / avg.total_bytes)


# its parts


@pytest.mark.parametrize("first_apart", [False, True])
@pytest.mark.parametrize("rounds", [1, 2, 5, 6, 100])
def test_played_rounds_stand_for_every_round_once(rounds: int, first_apart: bool) -> None:
    for most in (1, 5):
        played = list(_sampled(rounds, most, first_apart=first_apart))
        assert sum(weight for _, weight in played) == rounds
        assert len(played) <= most + first_apart
        numbers = [number for number, _ in played]
        assert numbers == sorted(set(numbers))
        assert 0 <= numbers[0] <= numbers[-1] < rounds
        assert not first_apart or played[0] == (0, 1)


def test_a_session_skips_to_a_round_that_there_is_and_to_no_other() -> None:
    model = toy.make_model()
    method = FedOBD(stage_one_rounds=3, stage_two_epochs=2)
    server = ServerSession(method, decompose(model), get_state(model), num_clients=2)
    server.skip_to(1, 1)
    begun = server.begin_round()
    assert begun is not None
    assert (begun.round, begun.stage, server.rounds) == (5, 2, 4)
    with pytest.raises(UsageError, match="round 5 is open"):
        server.skip_to(0, 0)
    server.abort_round()
    for stage, stage_rounds in ((0, 3), (0, -1), (2, 0)):
        with pytest.raises(UsageError, match=r"there is no round -?\d of stage \d in fedobd"):
            server.skip_to(stage, stage_rounds)


def test_the_middle_round_of_each_run_is_played() -> None:
    assert list(_sampled(10, 2, first_apart=False)) == [(2, 5), (7, 5)]
    assert list(_sampled(11, 2, first_apart=True)) == [(0, 1), (3, 5), (8, 5)]
    assert list(_sampled(5, 3, first_apart=False)) == [(0, 1), (1, 2), (3, 2)]


def test_bytes_of_many_rounds_are_those_of_each_round() -> None:
    """All broadcasts and uploads of FedAvg are as large, but the fingerprint of a shared start."""
    model = toy.make_model()
    schema, state = decompose(model), get_state(model)

    def stage(rounds: int, shared_start: bool) -> StagePlan:
        (found,) = plan_method(
            FedAvg(rounds=rounds, epochs=1, cohort=2),
            schema,
            state,
            Federation(num_clients=4, shared_start=shared_start),
            UpdateModel(),
        ).stages
        return found

    first, many = stage(1, shared_start=True), stage(23, shared_start=True)
    whole = stage(2, shared_start=False).downlink_bytes
    assert first.downlink_bytes < 100 < whole
    assert 23 * many.downlink_bytes == pytest.approx(first.downlink_bytes + 22 * whole)
    assert many.uplink_bytes == pytest.approx(first.uplink_bytes)
    assert (many.rounds, many.cohort) == (23, 2)


def test_only_the_first_broadcast_of_a_run_is_a_fingerprint() -> None:
    model = toy.make_model()
    schema, state = decompose(model), get_state(model)
    method = FedOBD(stage_one_rounds=3, stage_one_epochs=1, stage_two_epochs=2)
    later = [
        plan_method(
            method, schema, state, Federation(num_clients=4, shared_start=shared), UpdateModel()
        ).stages[1]
        for shared in (False, True)
    ]
    assert later[1].downlink_bytes == pytest.approx(later[0].downlink_bytes, rel=0.02)
    assert later[1].uplink_bytes == pytest.approx(later[0].uplink_bytes, rel=0.02)


def test_updates_follow_a_laplace_distribution_of_the_wanted_size() -> None:
    start = {"w": torch.zeros(300, 1000), "n": torch.tensor(3), "b": torch.ones(1500, 1000)}
    made = UpdateModel().train(start, {"w": 0.02, "b": 0.5}, torch.Generator().manual_seed(1))
    update = made["w"].double()
    assert float(update.square().mean().sqrt()) == pytest.approx(0.02, rel=0.02)
    assert float(update.mean()) == pytest.approx(0, abs=2e-4)
    assert float(update.pow(4).mean() / update.square().mean() ** 2) == pytest.approx(6, rel=0.05)
    assert float((made["b"] - 1).square().mean().sqrt()) == pytest.approx(0.5, rel=0.02)
    assert made["n"] is start["n"]
    assert not start["w"].any()


def test_vectors_and_what_starts_at_zero_change_as_much_as_the_middle_matrix() -> None:
    model = toy.make_model(frozen=True)
    schema = decompose(model)
    state = get_state(model)
    state["6.weight"] = torch.zeros(4, 8)
    scales = UpdateModel(size=0.5).scales(schema, state)
    matrix = float(state["0.weight"].square().mean().sqrt())
    assert scales["0.weight"] == pytest.approx(0.5 * matrix)
    assert {scales[name] for name in ("6.weight", "0.bias", "1.weight", "1.running_var")} == {
        scales["0.weight"]
    }
    assert "4.weight" not in scales  # frozen
    assert "1.num_batches_tracked" not in scales


def test_the_middle_of_the_matrices_is_their_median() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    state = get_state(model)
    for number, rms in enumerate((9.0, 1.0, 2.0)):
        state[f"{number}.weight"] = torch.full((4, 4), rms)
    scales = UpdateModel(size=0.5).scales(decompose(model), state)
    assert [scales[f"{number}.weight"] for number in range(3)] == [4.5, 0.5, 1.0]
    assert {scales[f"{number}.bias"] for number in range(3)} == {1.0}


def test_the_learning_time_of_a_round_follows_the_schedule() -> None:
    whole = RoundPlan(
        round=1,
        stage=1,
        cohort=(0,),
        epochs=2,
        schedule_start=0,
        schedule_epochs=2,
        run_start=0,
        run_epochs=2,
    )
    last = dataclasses.replace(whole, epochs=1, schedule_start=1)
    by_batch = UpdateModel(training=TrainingOptions(schedule_step="batch"))
    assert by_batch.learning_time(whole) == pytest.approx(1, abs=0.05)
    expected = 0.5 - 1 / math.pi  # of a cosine's second half
    assert by_batch.learning_time(last) == pytest.approx(expected, abs=0.05)
    by_epoch = UpdateModel(training=TrainingOptions(schedule_step="epoch"))
    assert by_epoch.learning_time(whole) == pytest.approx(1.5)
    constant = UpdateModel(training=TrainingOptions(schedule="constant"))
    assert constant.learning_time(whole) == 2


@pytest.mark.parametrize("size", [0.0, -1.0, math.inf, math.nan])
def test_update_sizes_out_of_range_are_refused(size: float) -> None:
    with pytest.raises(UsageError, match=r"the update size is .*; allowed are finite numbers"):
        UpdateModel(size=size)


def test_time_on_a_link_is_transfer_and_training_of_one_client() -> None:
    stages = (
        StagePlan(
            number=1, rounds=10, epochs=2, cohort=5, uplink_bytes=100.0, downlink_bytes=300.0
        ),
        StagePlan(number=2, rounds=4, epochs=1, cohort=20, uplink_bytes=50.0, downlink_bytes=50.0),
    )
    made = MethodPlan(
        method="fedobd", stages=stages, initial_bytes=1000, initialized=20, initial_rounds=6
    )
    assert made.uplink_bytes == 10 * 5 * 100 + 4 * 20 * 50
    assert made.downlink_bytes == 10 * 5 * 300 + 4 * 20 * 50 + 20 * 1000
    assert made.seconds(8000) == pytest.approx((10 * 400 + 4 * 100 + 6 * 1000) / 1000)
    assert made.seconds(8000, 3) == pytest.approx(made.seconds(8000) + 3 * (20 + 4))


def test_a_cohort_above_the_number_of_clients_is_refused() -> None:
    model = build_model("digits-cnn")
    schema, state = decompose(model), get_state(model)
    with pytest.raises(UsageError, match="a cohort of 5 clients was asked for; there are 3"):
        plan_method(FedAvg(cohort=5), schema, state, Federation(num_clients=3), UpdateModel())


# the command


def test_the_table_fits_80_columns_and_holds_every_method(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = plan("digits --rounds 200 --clients 50 --cohort 10", capsys)
    table = shown[: shown.index("estimate:")]
    assert all(len(line) <= 80 for line in table.splitlines())
    assert "…" not in table
    assert "9 blocks, 90,250 parameters" in table
    lines = {line.split()[0]: line for line in table.splitlines() if line[:1].isalpha()}
    assert set(METHODS) <= set(lines)
    assert "200 × 50" in lines["fedavg"]
    assert "200 × 10" in lines["smafd"]
    assert re.search(r"stage 1 +200 × 10 +[\d.]+ kB +[\d.]+ kB", table)
    assert re.search(r"stage 2 +5 × 50 ", table)
    assert "estimated traffic, 50 clients" in shown
    assert "estimate: up and down per round are one client's; updates have 0.1 of" in shown
    assert "each client has a link of its own of 10 Mbit/s" in shown
    assert "warning" not in shown


def test_json_holds_what_the_table_says(capsys: pytest.CaptureFixture[str]) -> None:
    words = "digits-cnn --rounds 3 --epochs 2 --stage-two-epochs 1 --cohort 0.3 --clients 20"
    more = " --weight 1e-2 --seconds-per-client 2 --json --link 1Gbit/s --update-size 0.05"
    made = json.loads(plan(words + more, capsys))
    assert (made["is_estimate"], made["update_size"], made["clients"]) == (True, 0.05, 20)
    assert made["link_bits_per_s"] == 1e9
    fedobd, fedavg = made["methods"][:2]
    assert [(s["rounds"], s["epochs"], s["cohort"]) for s in fedobd["stages"]] == [
        (3, 2, 6),
        (1, 1, 20),
    ]
    assert fedavg["stages"][0]["cohort"] == 20
    assert fedobd["total_bytes"] == fedobd["uplink_bytes"] + fedobd["downlink_bytes"]
    assert 0.8 < fedobd["reduction_fedavg"] < 1
    assert fedobd["seconds"] == pytest.approx(2 * (3 * 2 + 1), abs=0.1)
    assert len(made["blocks"]) == 5


def test_blocks_that_never_fit_are_named_with_the_remedy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = "digits-cnn --rounds 2 --dropout-rate 0.7"
    shown = plan(words, capsys).replace("\n", " ")
    assert "warning: features.7 (41.1 %), classifier.1 (36.4 %): larger than (1 - λ)" in shown
    assert "--max-block-fraction 0.2, or lower --dropout-rate" in shown
    assert "warning" not in plan(f"{words} --max-block-fraction 0.2", capsys)


def test_toml_files_and_set_are_followed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "own.toml").write_text(toy.CONFIG, encoding="utf-8")
    own = f"{tmp_path}/own.toml --json"
    made = json.loads(plan(own, capsys))
    assert made["parameters"] == decompose(toy.make_model()).num_parameters
    assert [s["rounds"] for s in made["methods"][0]["stages"]] == [3, 2]
    wide = json.loads(plan(f"{own} --set model.options.width=8 --set federation.seed=4", capsys))
    assert wide["parameters"] > made["parameters"]
    assert wide["seed"] == 4


def test_a_vocabulary_can_be_given_in_place_of_the_data() -> None:
    config = parse_config(
        {
            "model": {
                "name": "transformer",
                "options": {"vocab_size": 40, "d_model": 8, "nhead": 2, "vectors": "no.txt"},
            }
        }
    )
    assert make_plan(config).schema.num_parameters > 8 * 40


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nonsense", "model 'nonsense' is unknown; wanted one of digits-cnn"),
        ("digits --link fast", "--link 'fast': wanted a speed above 0 in bit/s"),
        ("digits --link 0Mbit/s", "--link '0Mbit/s': wanted a speed above 0"),
        ("digits --cohort many", "--cohort 'many': wanted a count of clients, such as 5"),
        ("digits --cohort 11", "a cohort of 11 clients was asked for; there are 10"),
        ("digits-cnn --options [1]", "--options '[1]': wanted a JSON object"),
        ("digits-cnn --options {", "--options '{' is not JSON"),
        ("digits-cnn --set a=1", "--set 'a=1' changes a preset or TOML file"),
        ("digits --dropout-rate 2", "dropout_rate λ is 2.0"),
        ("digits --seconds-per-client -1", "--seconds-per-client is -1.0"),
        ("digits --update-size 0", "the update size is 0.0"),
        ("transformer", "model 'transformer'"),
    ],
)
def test_mistakes_are_refused(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        plan(words, capsys)
