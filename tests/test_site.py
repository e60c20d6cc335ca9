"""The site builds, holds all that is public, and needs no network."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
from pydantic import TypeAdapter

from fedobd import METHODS, cli
from fedobd.experiments import RunConfig

ROOT = Path(__file__).parent.parent

PACKAGES = (
    "fedobd", "fedobd.data", "fedobd.models", "fedobd.simulation", "fedobd.experiments",
    "fedobd.flower", "fedobd.planning", "fedobd.report", "fedobd.tracking",
)  # fmt: skip
MODULES = ("fedobd.training", "fedobd.training")  # without a list of what is public

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")


class PageReader(HTMLParser):
    """Finds what a page holds: ids, addresses that it loads, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.loads: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            if value and (name in ("src", "srcset") or (name == "href" and tag == "link")):
                self.loads.append(value)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PageReader]:
    """The pages by their paths, from a build in which a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = {}
    for file in folder.rglob("*.html"):
        page = pages[file.relative_to(folder).as_posix()] = PageReader()
        page.feed(file.read_text(encoding="utf-8"))
    return pages


def keys_of(schema: dict[str, Any], part: dict[str, Any], path: str) -> Iterator[str]:
    """Yield the keys of a JSON schema that hold a value."""
    name = part.get("$ref", "").rpartition("/")[2]
    fields = schema["$defs"][name] if name else part
    if "properties" not in fields:
        yield path
        return
    for key, inner in fields["properties"].items():
        yield from keys_of(schema, inner, f"{path}.{key}" if path else key)


def test_every_key_of_the_configuration_is_on_its_page(site: dict[str, PageReader]) -> None:
    schema = TypeAdapter(RunConfig).json_schema()
    keys = [key for key in keys_of(schema, schema, "") if key != "methods"]
    for name, kind in METHODS.items():
        schema = TypeAdapter(kind).json_schema()
        keys += keys_of(schema, schema, f"methods.{name}")
    page = site["configuration.html"]
    assert [key for key in keys if key not in page.ids] == []
    assert len(keys) > 80
    assert {"data.partition.alpha", "methods.fedobd.codec.bound_norm", "simulation.stack"} <= set(
        keys
    )


def test_every_key_is_explained() -> None:
    sys.path.insert(0, str(ROOT / "docs" / "_hooks"))
    try:
        reference = importlib.import_module("config_reference")
    finally:
        del sys.path[0]
    for table in reference.tables():
        assert table.text, table.name
        for option in table.options:
            assert option.meaning, option.key
            assert option.default, option.key


def test_every_command_and_option_is_on_its_page(site: dict[str, PageReader]) -> None:
    page = site["commands.html"]
    text = "".join(page.text)
    left = [("fedobd", typer.main.get_command(cli.app))]
    while left:
        name, command = left.pop()
        if isinstance(command, click.Group):
            left += [(f"{name}-{inner}", own) for inner, own in command.commands.items()]
            continue
        assert name in page.ids
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert all(word in text for word in parameter.opts), (name, parameter.opts)
    assert "A preset's name or the path of a TOML file." in text


def test_every_public_name_is_on_a_page_and_documented(site: dict[str, PageReader]) -> None:
    griffe = pytest.importorskip("griffe")
    ids = {name for path, page in site.items() if path.startswith("api/") for name in page.ids}
    loaded = griffe.load("fedobd", search_paths=[ROOT / "src"], resolve_aliases=True)
    public = [f"{p}.{name}" for p in PACKAGES for name in importlib.import_module(p).__all__]
    assert [path for path in public if path not in ids] == []
    documented = {path: loaded[path.removeprefix("fedobd.")].has_docstring for path in public}
    assert [path for path, has in documented.items() if not has] == []


@pytest.mark.parametrize("module", MODULES)
def test_every_public_definition_of_a_module_is_on_a_page(
    module: str, site: dict[str, PageReader]
) -> None:
    file = Path(importlib.import_module(module).__file__ or "")
    body = ast.parse(file.read_text(encoding="utf-8")).body
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            assert f"{module}.{node.name}" in site["api/training.html"].ids


def test_no_page_loads_anything_from_a_network(site: dict[str, PageReader]) -> None:
    for path, page in site.items():
        assert [place for place in page.loads if re.match(r"(\w+:)?//", place)] == [], path


def test_nothing_is_left_unfilled(site: dict[str, PageReader]) -> None:
    for path, page in site.items():
        text = "".join(page.text)
        assert "{{" not in text, path
        assert "::: " not in text, path
    assert "\\frac" not in "".join(site["method.html"].text)


def test_documents_from_elsewhere_are_pages(site: dict[str, PageReader]) -> None:
    titles = {
        "architecture.html": "Architecture",
        "benchmarks.html": "Results",
        "changelog.html": "Changelog",
        "deployment.html": "A Flower deployment, whole",
        "results.html": "Results on real data",
    }
    for path, title in titles.items():
        assert any(part.strip() == title for part in site[path].text), path
