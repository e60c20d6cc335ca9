"""What the documents say is true: their code runs, the package ships what they name."""

from __future__ import annotations

import ast
import difflib
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from fedobd import cli
from tests.document_helpers import LANGUAGES, ROOT, Page, blocks_of, documents, run_command

README = (ROOT / "README.md").read_text(encoding="utf-8")


NOT_RUN = [
    ("docs/flower.md", "Flower leaves a SuperLink behind"),
    ("docs/runs.md", "the folders are examples"),
]


@pytest.mark.parametrize("document", documents())
def test_the_code_of_a_document_runs(
    document: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    modules = set(sys.modules)
    page = Page()
    try:
        for block in blocks_of(document):
            assert block.language in LANGUAGES, block.place
            if block.reason is None:
                page.play(block)
    finally:
        for name in set(sys.modules) - modules:
            if getattr(sys.modules[name], "__file__", None) == str(tmp_path / f"{name}.py"):
                del sys.modules[name]


def test_what_is_not_run_is_known() -> None:
    marked = [block for document in documents() for block in blocks_of(document) if block.reason]
    assert [(block.document, block.reason) for block in marked] == NOT_RUN


def test_the_start_page_says_what_the_comparison_shows(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    short = ["methods.fedobd.stage_one_rounds=1", "methods.fedobd.stage_two_epochs=1"]
    options = [*short, "methods.fedavg.rounds=1", "methods.fedavg.cohort=2"]
    sets = [word for option in options for word in ("--set", option)]
    chosen = ["--methods", "fedobd,fedavg", "--output", str(tmp_path / "out")]
    shown = run_command(["compare", "digits", *chosen, *sets])
    assert (
        "| method | final acc. | uplink MB | downlink MB | total MB | less than FedAvg |" in page
    )
    for word in ("final", "acc.", "uplink", "total", "less than", "FedAvg"):
        assert word in shown
    assert shown.splitlines()[-1] == f"report: {tmp_path / 'out' / 'report.html'}"
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<h3>Which blocks were uploaded</h3>" in html  # named in the questions


def test_the_flower_page_shows_the_difference_of_the_examples() -> None:
    (shown,) = [b.code for b in blocks_of("docs/flower-steps.md") if b.language == "diff"]
    before, after = (code_lines(ROOT / "examples" / f"flower_{n}.py") for n in ("before", "after"))
    difference = list(difflib.unified_diff(before, after, n=0, lineterm=""))
    rest = ("---", "+++", "@@")
    changed = [line for line in difference if len(line) > 1 and not line.startswith(rest)]
    assert shown.splitlines() == changed


def code_lines(file: Path) -> list[str]:
    """Return the lines of a module after its docstring."""
    text = file.read_text(encoding="utf-8")
    return text.splitlines()[ast.parse(text).body[0].end_lineno :]


def test_the_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert 15 <= len(code.strip().splitlines()) <= 30
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102 - our own document
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["1", "1"], ["2", "1"], ["3", "1"], ["4", "2"], ["5", "2"]
    ]  # fmt: skip


def code_of(document: str, title: str) -> list[str]:
    """Return the Python blocks of a document that start with a comment."""
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return [block for block in blocks if block.startswith(f"# {title}\n")]


@pytest.mark.parametrize("way", [0, 1])
def test_the_apps_of_the_flower_page_run(way: int, capsys: pytest.CaptureFixture[str]) -> None:
    from flwr.app import Context, RecordDict

    from tests.flower_grid import InProcessGrid

    (client,) = code_of("flower.md", "client_app.py")
    server = code_of("flower.md", "server_app.py")[way]
    names: list[dict[str, Any]] = [{}, {}]
    exec(compile(client, "client_app.py", "exec"), names[0])  # noqa: S102 - our own document
    exec(compile(server, "server_app.py", "exec"), names[1])  # noqa: S102
    nodes = [{"partition-id": number, "num-partitions": 3} for number in range(3)]
    grid = InProcessGrid(names[0]["app"], nodes)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    names[1]["app"](grid, context)
    shown = capsys.readouterr().out.strip().splitlines()
    assert len(shown) == (1, 3)[way], shown
    assert all(re.search(r"[1-9]\d{3,}", line) for line in shown), "bytes are shown"


PACKAGES = sorted(file.parent.name for file in (ROOT / "src" / "fedobd").glob("*/__init__.py"))


def test_the_readme_names_every_command_and_every_package() -> None:
    for command in cli.app.registered_commands:
        assert f"`fedobd {command.name}" in README
    tree = README[README.index("src/fedobd/\n") :]
    for name in PACKAGES:
        assert f"{name}/ " in tree, f"the README's tree lacks {name}"


def test_the_architecture_names_every_package_and_fits_a_page() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text[text.index("| package |") : text.index("## The way of a payload")]
    for name in PACKAGES:
        assert f"`{name}/`" in table, f"ARCHITECTURE.md lacks {name}"
    assert len(text.splitlines()) <= 120


def test_wheel_and_source_archive_hold_what_runs_need(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    (source,) = tmp_path.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry,) = [n for n in names if n.endswith("entry_points.txt")]
        assert "fedobd = fedobd.cli:main" in archive.read(entry).decode()
        (metadata,) = [n for n in names if n.endswith("METADATA")]
        needs = re.findall(
            r"^Requires-Dist: ([\w-]+)(?!.*extra)", archive.read(metadata).decode(), re.M
        )
    assert {
        "fedobd/py.typed",
        "fedobd/data/digits.npz",
        "fedobd/data/DIGITS_SOURCE.md",
        "fedobd/experiments/presets/digits.toml",
    } <= names
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert not any(n.startswith("tests") for n in names)
    with tarfile.open(source) as archive:
        files = {"/".join(n.split("/")[1:]) for n in archive.getnames()}
    assert {"src/fedobd/py.typed", "pyproject.toml", "LICENSE", "README.md"} <= files
    assert set(needs) == {
        "torch", "numpy", "numba", "zstandard",
        "safetensors", "pydantic", "typer", "rich", "tomli-w",
    }  # fmt: skip
