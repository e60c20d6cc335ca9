"""The command line as a user meets it: what it shows, and how it refuses."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from tests.data_helpers import fedobd
from tests.toy import CONFIG

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.toml").write_text(CONFIG, encoding="utf-8")


def test_run_shows_progress_a_summary_and_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    done = fedobd(capsys, "run", "toy.toml", "--method", "fedpaq", "--seed", "3")
    assert done.status == 0, done.err
    assert "fedpaq: seed 3, 3 rounds" in done.out
    assert re.search(r"fedpaq: round 3/3 stage 1 accuracy 0\.\d{4} loss \d\.\d{4} sent", done.out)
    (folder,) = Path("runs").iterdir()
    assert f"run folder: {folder}" in done.out
    summary = json.loads((folder / "summary.json").read_text())
    assert f"{summary['final_metric']:.4f}" in done.out
    assert (summary["method"], summary["seed"]) == ("fedpaq", 3)


def test_run_with_a_shared_start_and_again(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("run", "toy.toml", "--method", "smafd", "--output", "out")
    done = fedobd(capsys, *words, "--set", "federation.shared_start=true")
    assert done.status == 0, done.err
    first = json.loads(Path("out/rounds.jsonl").read_text().splitlines()[0])
    assert all(client["downlink_bytes"] < 400 for client in first["clients"])
    before = Path("out/summary.json").read_bytes()
    done = fedobd(capsys, *words, "--set", "federation.shared_start=true", "--resume")
    assert done.status == 0, done.err
    assert Path("out/summary.json").read_bytes() == before
    done = fedobd(capsys, *words, "--resume")
    assert done.status == 2
    assert "shared_start" in done.err


def test_the_device_of_the_command_goes_before_that_of_the_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--set", 'training.device="gpu"', "-q")
    assert fedobd(capsys, "run", "toy.toml", *words, "--device", "cpu", "-o", "one").status == 0
    assert 'device = "cpu"' in Path("one/config.toml").read_text()
    done = fedobd(capsys, "compare", "toy.toml", "--device", "gpu", "-o", "all")
    assert done.status == 2
    assert "training.device is 'gpu'" in done.err


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("meta", "training.device is 'meta'; allowed are 'cpu', 'cuda' and 'auto'"),
        ("cuda:2", "training.device is 'cuda:2'; CUDA devices here: 2, from cuda:0"),
    ],
)
def test_devices_that_are_not_there(
    device: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    done = fedobd(capsys, "run", "toy.toml", "--device", device)
    assert (done.status, done.err.strip()) == (2, f"error: {message}")


def test_a_gpu_without_memory_is_an_error_that_says_what_to_change(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr("fedobd.cli._run.run", full)
    done = fedobd(capsys, "run", "toy.toml")
    assert done.status == 2
    assert done.err.startswith("error: CUDA out of memory. Tried to allocate 9 GiB\n")
    assert "smaller simulation.stack or training.batch_size" in done.err


def test_names_with_brackets_are_printed_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedobd.cli._run.run", interrupt)
    done = fedobd(capsys, "run", "toy.toml", "-o", "runs[/a]")
    assert done.status == 130
    assert "--output runs[/a] --resume goes on from the last round" in done.err
    Path("bracketed.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.ModuleDict({'layer[/x]': nn.Linear(4, 4), 'b': nn.Linear(1, 1)})\n"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    done = fedobd(capsys, "blocks", "bracketed:make", "--dropout-rate", "0.7")
    assert done.status == 0, done.err
    assert done.out.count("layer[/x]") == 2  # in the table, and in the warning


def test_quiet_runs_print_nothing_and_leave_the_same_folder(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("run", "toy.toml", "--method", "fedavg")
    done = fedobd(capsys, *words, "--quiet", "-o", "quiet")
    assert (done.status, done.out, done.err) == (0, "", "")
    assert fedobd(capsys, *words, "-o", "loud").status == 0
    names = {
        name: sorted(path.name for path in Path(name).iterdir()) for name in ("quiet", "loud")
    }
    assert names["quiet"] == names["loud"]
    assert {"report.html", "run.log", "summary.json"} <= set(names["quiet"])
    compared = fedobd(capsys, "compare", "toy.toml", "--methods", "fedpaq", "-q", "-o", "all")
    assert (compared.status, compared.out, compared.err) == (0, "", "")
    assert Path("all/report.html").is_file()


def test_json_is_all_that_stands_on_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("compare", "toy.toml", "--methods", "fedobd,fedavg", "--seeds", "0,1", "-o", "all")
    done = fedobd(capsys, *words, "--json", "--log-level", "info")
    assert done.status == 0, done.err
    found = [json.loads(line) for line in done.out.splitlines()]
    runs = [("fedobd", 0, 5), ("fedavg", 0, 3), ("fedobd", 1, 5), ("fedavg", 1, 3)]
    assert [(f["method"], f["seed"], f.get("round")) for f in found if f["type"] == "round"] == [
        (method, seed, number + 1) for method, seed, rounds in runs for number in range(rounds)
    ]
    summaries = [(f["method"], f["seed"], f["rounds"]) for f in found if f["type"] == "summary"]
    assert summaries == runs
    assert done.err.count("info: round ") == 16
    resumed = fedobd(capsys, *words, "--json", "--resume")
    assert resumed.out == done.out
    assert resumed.err == ""


def test_the_report_is_written_or_its_extra_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("run", "toy.toml", "--method", "fedavg", "-o", "run")
    assert fedobd(capsys, *words).out.splitlines()[-1] == "report: run/report.html"
    assert Path("run/report.html").read_text(encoding="utf-8").startswith("<!")
    Path("run/report.html").unlink()
    monkeypatch.setattr("fedobd.cli._run.find_spec", lambda name: None)
    done = fedobd(capsys, *words, "--resume")
    assert done.out.splitlines()[-1] == "report: pip install 'fedobd[report]'"
    assert not Path("run/report.html").exists()


def test_compare_ends_with_one_table_that_fits_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = fedobd(capsys, "compare", "toy.toml", "--seeds", "0,1", "-o", "all")
    assert done.status == 0, done.err
    table = done.out[done.out.index("5 methods, seeds 0, 1") :]
    assert all(len(line) <= 80 for line in table.splitlines())
    assert "…" not in table
    comparison = json.loads(Path("all/comparison.json").read_text())
    for row in comparison["rows"]:
        (line,) = [text for text in table.splitlines() if text.startswith(row["method"] + " ")]
        words = line.split()
        assert words[1] == f"{row['final_metric']:.4f}"
        assert words[3:6] == [
            f"{row[key] / 1e6:.2f}" for key in ("uplink_bytes", "downlink_bytes", "total_bytes")
        ]
    assert f"* {comparison['best_baseline']}, the baseline" in table
    assert "run folder: all" in done.out
    again = fedobd(capsys, "compare", "toy.toml", "--seeds", "0,1", "-o", "all", "--resume")
    assert again.status == 0
    assert again.out[again.out.index("5 methods") :] == table


def test_the_warning_of_a_block_that_is_never_uploaded(capsys: pytest.CaptureFixture[str]) -> None:
    done = fedobd(capsys, "run", "toy.toml", "--set", "model.options.width=8", "-o", "run")
    assert done.status == 0, done.err
    assert re.search(
        r"warning: fedobd: clients left out some blocks in stage 1.*Seed 1: no client uploaded "
        r"block 4 \(8\d\.\d % of the parameters\)\.",
        done.err,
    )
    assert "max_block_fraction" in done.err


def test_blocks_shows_the_table_and_marks_what_cannot_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    done = fedobd(capsys, "blocks", "digits-cnn", "--dropout-rate", "0.7")
    assert done.status == 0, done.err
    assert "5 blocks, 90,250 parameters; budget at λ = 0.7: 27,075" in done.out
    lines = done.out.splitlines()[3:8]
    assert [("never" in line) for line in lines] == [False, False, True, True, False]
    assert "warning: features.7, classifier.1: larger than (1 - λ)" in done.out
    split = fedobd(capsys, "blocks", "digits-cnn", "--max-block-fraction", "0.2")
    assert "9 blocks" in split.out
    assert "warning" not in split.out
    tensors = fedobd(capsys, "blocks", "digits-cnn", "--style", "tensor")
    assert "17 blocks" in tensors.out
    own = fedobd(capsys, "blocks", "tests.toy:make_model", "--options", '{"width": 2}')
    assert own.status == 0, own.err
    assert "3 blocks" in own.out


def test_a_users_own_module_in_the_current_folder_is_found(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("mine_xyz.py").write_text(
        "from torch import nn\ndef make(n=3):\n    return nn.Linear(n, 2)\n", encoding="utf-8"
    )
    done = fedobd(capsys, "blocks", "mine_xyz:make")
    assert done.status == 0, done.err
    assert "8 parameters" in done.out


def test_inspect_shows_what_a_payload_holds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    fedobd(capsys, "run", "toy.toml", "-o", "run", "--set", "output.keep_payloads=true")
    record = json.loads(Path("run/rounds.jsonl").read_text().splitlines()[0])
    client = record["clients"][0]
    file = f"run/payloads/round-0001/upload-{client['client']}.fobd"
    done = fedobd(capsys, "inspect", file)
    assert done.status == 0, done.err
    for fact in (
        "upload payload", "fedobd", "differences", f"{client['uplink_bytes']:,}",
        f"{len(client['blocks_kept'])} of 3", str(client["num_examples"]),
    ):  # fmt: skip
        assert fact in done.out
    broadcast = fedobd(capsys, "inspect", "run/payloads/round-0005/broadcast.fobd")
    assert "3 of 3" in broadcast.out
    stage = next(line for line in broadcast.out.splitlines() if "stage" in line)
    assert "2" in stage
    Path("alone.fobd").write_bytes(Path(file).read_bytes())
    alone = fedobd(capsys, "inspect", "alone.fobd")
    assert (alone.status, "lies in no run folder" in alone.err) == (2, True)
    given = fedobd(capsys, "inspect", "alone.fobd", "--schema", "run/schema.json")
    assert given.status == 0
    damaged = bytearray(Path(file).read_bytes())
    damaged[-20] ^= 1
    Path("alone.fobd").write_bytes(damaged)
    for words, message in (
        (("alone.fobd", "--schema", "run/schema.json"), r"cut or altered.*\[checksum\]"),
        (("missing.fobd",), r"'missing.fobd' cannot be read: No such file"),
        (("toy.toml", "--schema", "run/schema.json"), r"this is no payload of fedobd"),
        (("alone.fobd", "--schema", "toy.toml"), r"'toy.toml' is not JSON"),
        (("alone.fobd", "--schema", "run/summary.json"), r"this is not a model schema"),
    ):
        refused = fedobd(capsys, "inspect", *words)
        assert refused.status == 2
        assert re.search(message, refused.err), refused.err


def test_presets_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    listed = fedobd(capsys, "presets").out
    assert "digits" in listed
    assert "fedobd[data,minilm]" in listed
    printed = fedobd(capsys, "presets", "digits")
    Path("copy.toml").write_text(printed.out, encoding="utf-8")
    copied = fedobd(capsys, "run", "copy.toml", "--set", "federation.clients=2000")
    assert (copied.status, "cannot be shared among 2000 clients" in copied.err) == (2, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "digts"], r"preset 'digts' is unknown.*did you mean 'digits'\?"),
        (
            ["run", "toy.toml", "--method", "fedob"],
            r"method 'fedob' is unknown.*did you mean 'fedobd'",
        ),
        (["run", "toy.toml", "--resume"], r"--resume needs --output"),
        (["run", "toy.toml", "--workers", "-1"], r"workers is -1"),
        (["run", "toy.toml", "-q", "--json"], r"--quiet and --json were both given"),
        (["run", "toy.toml", "--log-level", "loud"], r"'loud' is unknown; allowed are debug"),
        (["run", "toy.toml", "--set", "output.trackers=['a']"], r"'tensorboard' or 'mlflow'"),
        (["compare", "toy.toml", "--seeds", "a"], r"--seeds 'a': wanted whole numbers"),
        (["compare", "toy.toml", "--methods", "fedavg,fedx"], r"method 'fedx' is unknown"),
        (["blocks", "digits-cn"], r"digits-cnn"),
        (["blocks", "torch.nn:ReLU"], r"no trainable parameters"),
        (["blocks", "digits-cnn", "--options", "{"], r"is not JSON"),
        (["blocks", "digits-cnn", "--options", "[1]"], r"wanted a JSON object"),
        (["blocks", "digits-cnn", "--style", "paper"], r"--style 'paper': allowed are semantic"),
        (["blocks", "digits-cnn", "--dropout-rate", "1"], r"dropout_rate λ is 1.0"),
        (["blocks", "digits-cnn", "--unit-class", "("], r"is no regular expression"),
        (["presets", "mnist"], r"preset 'mnist' is unknown"),
    ],
)
def test_mistakes_end_with_status_2_and_one_message(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    done = fedobd(capsys, *words)
    assert done.status == 2
    assert done.err.startswith("error: ")
    assert re.search(message, done.err), done.err
    assert "Traceback" not in done.err
    assert not Path("runs").exists()


def test_wrong_words_and_no_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert fedobd(capsys, "fly").status == 2
    assert fedobd(capsys, "run").status == 2
    assert "fedobd 0." in fedobd(capsys, "--version").out
    shown = fedobd(capsys, "--help").out
    for command in ("run", "compare", "blocks", "inspect", "presets"):
        assert command in shown


def test_the_working_folder_does_not_stay_on_the_path(capsys: pytest.CaptureFixture[str]) -> None:
    here = os.getcwd()  # noqa: PTH109 - compared with an entry of sys.path
    fedobd(capsys, "presets")
    assert here not in sys.path
