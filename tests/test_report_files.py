"""What `fedobd report` writes: the page, Markdown, figures; and how it refuses."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

import fedobd.cli._report
from fedobd import UsageError
from fedobd.experiments import load_config, run
from fedobd.report import write_figures, write_markdown, write_report
from tests.toy import CONFIG

HOSTILE = "<script>alert('$x$ %{y}')</script>|`*"
"""A block's name; `</script>` would end a script, the rest is markup or an expression."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of FedOBD and one of FedPAQ; a block of the first has a hostile name."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "toy.toml").write_text(CONFIG, encoding="utf-8")
    config = load_config(str(folder / "toy.toml"))
    for method in ("fedobd", "fedpaq"):
        run(config.for_method(method, 0), folder / "runs" / method)
    schema = folder / "runs" / "fedobd" / "schema.json"
    values = json.loads(schema.read_text())
    values["blocks"][1][0] = HOSTILE
    schema.write_text(json.dumps(values))
    toml = folder / "runs" / "fedobd" / "config.toml"
    toml.write_text(f"# {HOSTILE} ```\n" + toml.read_text())
    records = folder / "runs" / "fedobd" / "rounds.jsonl"
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    for record in lines:
        for client in record["clients"]:
            client["blocks_kept"] = [0]  # so that the hostile block is warned of
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "runs"


class Elements(HTMLParser):
    """Collects what a browser would build from a page."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def elements(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Elements:
    """What is in the page of these runs."""
    file = tmp_path_factory.mktemp("page") / "report.html"
    write_report([made], file)
    return Elements(file.read_text(encoding="utf-8"))


def test_the_page_asks_for_nothing(elements: Elements) -> None:
    for tag, attributes in elements.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base"), tag
        assert "src" not in attributes, (tag, attributes)
        assert (attributes.get("href") or "#").startswith("#")
    (style,) = elements.texts["style"]
    assert "url(" not in style
    assert "@import" not in style


def test_only_the_two_scripts_of_the_page_may_run(elements: Elements) -> None:
    data, *scripts = elements.named("script")
    assert data == {"type": "application/json", "id": "charts"}
    assert scripts == [{}, {}]
    policy = next(m["content"] for m in elements.named("meta") if "http-equiv" in m)
    assert policy is not None
    assert "default-src 'none'" in policy
    for source in elements.texts["script"][1:]:
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert not any(name.startswith("on") for _, own in elements.tags for name in own)


def test_hostile_names_are_text(elements: Elements) -> None:
    assert len(elements.named("script")) == 3
    assert f"1 {HOSTILE}" in elements.texts["span"]
    assert any(HOSTILE in text for text in elements.texts["pre"])  # the TOML
    assert any(HOSTILE in text for text in elements.texts["p"])  # the warning


def views_of(drawings: dict[str, Any]) -> list[dict[str, Any]]:
    return [view for views in drawings["charts"].values() for view in views.values()]


def strings_of(value: Any, *keys: str) -> Iterator[str]:
    """Yield the strings that stand under some of the keys, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in keys and isinstance(inner, str):
                yield inner
            yield from strings_of(inner, *keys)
    elif isinstance(value, list):
        for inner in value:
            yield from strings_of(inner, *keys)


def test_charts_hold_names_as_text_and_not_in_expressions(elements: Elements) -> None:
    (source, *_) = elements.texts["script"]
    assert "<" not in source  # nothing that would end the script
    drawings = json.loads(source)
    named = [text for value in drawings["pool"] for text in value.get("texts", ())]
    assert any(text.endswith("%{y}')</script>|`* · 520") for text in named)
    expressions = list(strings_of(drawings, "expr", "filter", "test", "calculate", "signal"))
    assert len(expressions) > 3
    assert not any("alert" in text or "script" in text for text in expressions)


def test_columns_and_specifications_stand_in_the_page_once(elements: Elements) -> None:
    drawings = json.loads(elements.texts["script"][0])
    pool = drawings["pool"]
    texts = list(map(json.dumps, pool))
    assert len(set(texts)) == len(texts)
    views = views_of(drawings)
    used = {view["spec"] for view in views}
    used |= {n for view in views for data in view["data"].values() for n in data.values()}
    used |= {pool[number]["codes"] for number in used if "codes" in pool[number]}
    assert used == set(range(len(pool)))


def test_the_page_is_accessible_html(elements: Elements) -> None:
    assert elements.named("html") == [{"lang": "en"}]
    tags = [tag for tag, _ in elements.tags]
    assert (tags.count("h1"), tags.count("main")) == (1, 1)
    assert tags.count("caption") == tags.count("table") >= 6
    assert tags.count("figcaption") == tags.count("figure") == 5
    assert {own.get("scope") for own in elements.named("th")} == {"col", "row"}
    switches = [own["name"] for own in elements.named("input")]
    assert switches
    assert all(own["aria-label"] for own in elements.named("div") if own.get("role") == "img")
    ids = [own["id"] for _, own in elements.tags if "id" in own]
    assert len(set(ids)) == len(ids)


def test_the_page_warns_and_says_how_to_run_it_again(made: Path, elements: Elements) -> None:
    paragraphs = "".join(elements.texts["p"])
    assert "fedobd: clients left out some blocks in stage 1" in paragraphs
    assert "model.blocks.max_block_fraction" in paragraphs
    blocks = elements.texts["pre"]
    assert (
        f"fedobd run {made.resolve() / 'fedpaq' / 'config.toml'} --output fedpaq-again" in blocks
    )
    assert (made / "fedpaq" / "config.toml").read_text() in blocks


def test_several_models_have_a_list_of_sections(made: Path, tmp_path: Path) -> None:
    runs = shutil.copytree(made, tmp_path / "runs")
    config = runs / "fedpaq" / "config.toml"
    config.write_text(config.read_text().replace("learning_rate = 0.05", "learning_rate = 0.1"))
    write_report([runs], tmp_path / "report.html")
    elements = Elements((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [own["href"] for own in elements.named("a")] == ["#section-1", "#section-2"]
    assert elements.texts["a"] == [
        "tests.toy:make_data, tests.toy:make_model: training.learning_rate = 0.05",
        "tests.toy:make_data, tests.toy:make_model: training.learning_rate = 0.1",
    ]


# Markdown


def cells(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", line)) - 1


def test_markdown_has_whole_tables(made: Path, tmp_path: Path) -> None:
    write_markdown([made], tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for part in text.split("\n\n"):
        if part.startswith("|"):
            widths = {cells(line) for line in part.splitlines()}
            assert len(widths) == 1, part
    assert "<script" not in re.sub(r"(?s)````.*?````", "", text).replace("\\<", "")
    assert "1 \\<script\\>alert('$x$ %{y}')\\</script\\>\\|\\`\\*" in text
    assert "\n````toml\n# " in text  # a fence longer than the one inside
    assert "> **Warning.** fedobd: clients left out some blocks" in text
    summary = json.loads((made / "fedpaq" / "summary.json").read_text())
    assert f"{summary['final_metric']:.4f}" in text


# figures


def test_figures_are_png_and_svg(made: Path, tmp_path: Path) -> None:
    files = write_figures([made], tmp_path / "new" / "figures")
    names = [
        *("bytes-per-round", "accuracy-bytes", "accuracy-up", "accuracy-down", "accuracy-rounds"),
        *("bytes-by-block-fedobd", "bytes-by-use-fedobd"),
        *("bytes-by-block-fedpaq", "bytes-by-use-fedpaq", "uploads-fedobd"),
        *("bits-fedobd", "bits-fedpaq"),
        *("levels-up-fedobd", "levels-down-fedobd", "levels-up-fedpaq"),
    ]
    assert [f.name for f in files] == [f"{n}.{kind}" for n in names for kind in ("png", "svg")]
    for file in files:
        if file.suffix == ".png":
            with Image.open(file) as image:
                assert image.size[0] in (1050, 1500)  # 3.5 and 5 inches at 300 dpi
                assert image.convert("L").histogram()[0] > 100  # black ink
        else:
            text = file.read_text(encoding="utf-8")
            assert re.match(r'<svg [^>]*width="(252|360)pt"', text)  # the same in points
            assert "<script" not in text
    again = write_figures([made], tmp_path / "again")
    assert [f.read_bytes() for f in again] == [f.read_bytes() for f in files]


# the command and its refusals


def command(*words: str) -> Any:
    app = typer.Typer()
    app.command()(fedobd.cli._report.report_command)
    return CliRunner().invoke(app, words)


def test_the_command_writes_what_is_asked_for(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command(str(made))
    assert (done.exit_code, done.output) == (0, "wrote report.html\n")
    assert Path("report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    one = str(made / "fedpaq")
    done = command(one, one, "--format", "md", "-o", "own.md", "--figures", "pictures")
    assert (done.exit_code, done.output) == (0, "wrote own.md\nwrote 18 figures to pictures\n")
    assert Path("own.md").read_text(encoding="utf-8").startswith("# Report\n\n1 run of fedpaq;")
    assert len(list(Path("pictures").iterdir())) == 18  # FedPAQ leaves out no block
    assert command(one, "--format", "docx").exit_code == 2
    assert isinstance(command(str(tmp_path / "nothing")).exception, UsageError)


@pytest.mark.parametrize("name", ["rounds.jsonl", "report", "report.md"])
def test_a_slip_in_the_output_overwrites_nothing(made: Path, name: str) -> None:
    before = sorted(path.name for path in made.iterdir())
    refused = command(str(made / "fedpaq"), "-o", str(made / "fedpaq" / name)).exception
    assert isinstance(refused, UsageError)
    assert "wanted a name that ends in .html, as --format is html" in str(refused)
    assert sorted(path.name for path in made.iterdir()) == before


def test_output_that_cannot_be_written_is_refused(made: Path, tmp_path: Path) -> None:
    there = tmp_path / "missing" / "report.html"
    with pytest.raises(UsageError, match=r"report.html' cannot be written: there is no such"):
        write_report([made / "fedpaq"], there)
    with pytest.raises(UsageError, match="is a folder; wanted a file"):
        write_markdown([made / "fedpaq"], tmp_path)
    assert not list(tmp_path.parent.glob("*.part"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"figures cannot be written to '.*file'"):
        write_figures([made / "fedpaq"], tmp_path / "file")


def test_what_is_not_installed_is_named(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    wanted = r"this needs 'vl_convert', which is not installed; pip install 'fedobd\[report\]'"
    with pytest.raises(UsageError, match=wanted):
        write_report([made], tmp_path / "report.html")
    with pytest.raises(UsageError, match=wanted):
        write_figures([made], tmp_path)
    write_markdown([made], tmp_path / "report.md")  # needs no pictures


def test_vl_convert_is_imported_when_needed() -> None:
    package = Path(fedobd.cli._report.__file__).parent
    for file in (package / "_report.py", *(package / "report").glob("*.py")):
        for line in file.read_text(encoding="utf-8").splitlines():
            assert not re.match(r"(from|import) vl_convert", line), file
