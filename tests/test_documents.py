"""What the documents say is true: the README's example runs, the package ships what it names."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from fedobd import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


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


def test_the_readme_names_every_command_and_every_module() -> None:
    for command in cli.app.registered_commands:
        assert f"`fedobd {command.name}" in README
    package = ROOT / "src" / "fedobd"
    tree = README[README.index("src/fedobd/\n") :]
    for entry in package.iterdir():
        if not entry.name.startswith("__") and entry.name != "py.typed":
            assert entry.name in tree, f"the README's tree lacks {entry.name}"


def test_the_architecture_names_every_module() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text[text.index("| module |") : text.index("The core (down to")]
    for entry in (ROOT / "src" / "fedobd").iterdir():
        if not entry.name.startswith("__") and entry.name != "py.typed":
            name = entry.stem if entry.suffix else entry.name + "/"
            assert f"`{name}`" in table, f"ARCHITECTURE.md lacks {name}"


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
