"""Code blocks of documents: found, checked, and run in order.

A block whose first line is a comment with a file's name (`# own.toml`) is that file too, for later
blocks of its page. A block that is not run has the title "not run in the tests: why", which the
site shows above it.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import shlex
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import typer.main

from fedobd import cli, flower
from fedobd.experiments import list_presets, load_config, parse_config

ROOT = Path(__file__).parent.parent

LANGUAGES = {"python", "bash", "toml", "diff", "json", "math", "text", ""}

CHEAP = (
    "fedobd blocks ",
    "fedobd presets",
    "fedobd compare own.toml ",
    "fedobd run digits --json ",
)
"""How commands begin that are run; others are checked down to their options and keys."""

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)(?P<info>[^\n]*)\n(?P<code>.*?)^(?P=indent)```$",
    flags=re.DOTALL | re.MULTILINE,
)
_NOT_RUN = re.compile(r' title="not run in the tests: (?P<reason>[^"]+)"')
_FILE = re.compile(r"# (?P<name>\w+\.(py|toml))\n")


@dataclass(frozen=True, slots=True)
class Block:
    """A block of code.

    Args:
        document: the path of its document, from the repository's root.
        line: where it begins.
        language: as the fence says.
        code: without the indentation of its fence.
        reason: why it is not run; None where it is.
    """

    document: str
    line: int
    language: str
    code: str
    reason: str | None

    @property
    def place(self) -> str:
        return f"{self.document}:{self.line}"


def documents() -> list[str]:
    """Return the README and the pages of docs, but for results, which a program writes."""
    pages = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
    return ["README.md", *(page for page in pages if not page.startswith("docs/results"))]


def blocks_of(document: str) -> Iterator[Block]:
    """Yield the blocks of a document."""
    text = (ROOT / document).read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        mark = _NOT_RUN.fullmatch(match["info"])
        assert mark or not match["info"].strip(), f"{document}: {match['info']}"
        line = text.count("\n", 0, match.start()) + 1
        code = textwrap.dedent(match["code"])
        yield Block(document, line, match["language"], code, mark["reason"] if mark else None)


@dataclass(slots=True)
class Page:
    """A page whose blocks are played in order, in the current folder.

    Args:
        names: what its Python blocks have defined.
        shown: what its last command printed.
    """

    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "page"})
    shown: str = ""

    def play(self, block: Block) -> None:
        """Run a block, or check it as far as its language allows."""
        file = _FILE.match(block.code)
        if file:
            Path(file["name"]).write_text(block.code, encoding="utf-8")
        if block.language == "python":
            exec(compile(block.code, block.place, "exec"), self.names)  # noqa: S102 - our own
        elif block.language == "bash":
            for words in commands(block.code):
                self._command(words)
        elif block.language == "toml":
            parse_config(tomllib.loads(block.code))
        elif block.language == "json":
            self._json(block.code)
        elif block.language == "diff":
            check_diff(block.code)

    def _command(self, words: list[str]) -> None:
        program, *rest = words
        if program == "fedobd":
            check_command(rest)
            if shlex.join(words).startswith(CHEAP):
                self.shown = run_command(rest)
        elif program == "pip":
            check_install(rest)
        elif program == "make":
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert all(re.search(rf"^{re.escape(t)}:", makefile, re.M) for t in rest), words
        else:
            assert program == "python", f"{words} is not run, and the block does not say so"
            assert (ROOT / rest[0]).is_file(), words

    def _json(self, code: str) -> None:
        """Check that a sample has the keys of what the command before it printed."""
        printed = json.loads(self.shown.splitlines()[0])
        for line in code.splitlines():
            assert json.loads(line).keys() <= printed.keys()


def commands(code: str) -> Iterator[list[str]]:
    """Yield the words of each command, without comments and variables set for it alone."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"\w+=", words[0]):
            del words[0]
        if words:
            yield words


def check_command(words: list[str]) -> None:
    """Raise unless the command line takes these words, and its configuration these keys."""
    command = typer.main.get_command(cli.app)
    rest = list(words)
    while isinstance(command, click.Group):
        command = command.commands[rest.pop(0)]
    parameters = command.make_context("fedobd", rest).params
    source = parameters.get("source")
    if source in list_presets() or (source and Path(source).is_file()):
        load_config(source, overrides=parameters.get("overrides") or [])


def run_command(words: list[str]) -> str:
    """Run the command line in this process and return what it printed."""
    before, path = sys.argv, list(sys.path)
    sys.argv = ["fedobd", *words]
    status: int | str | None = None
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            cli.main()
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.argv, sys.path[:] = before, path
    assert status in (None, 0), words
    return out.getvalue()


def check_install(words: list[str]) -> None:
    """Raise unless the extras of a `pip install` are there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert words[0] == "install"
    for extras in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(project["optional-dependencies"]), words


def check_diff(code: str) -> None:
    """Raise unless a diff changes line for line, to what is Python and is there.

    Lines that are only added are imports.
    """
    lines = [line for line in code.splitlines() if len(line) > 1]
    removed = [line[1:].strip() for line in lines if line.startswith("-")]
    added = [line[1:].strip() for line in lines if line.startswith("+")]
    imports = [line for line in added if re.match(r"(from|import) ", line)]
    assert len(added) - len(imports) == len(removed)
    for line in [*removed, *added]:
        ast.parse(line)
    for name in re.findall(r"fedobd\.flower\.(\w+)", "\n".join(added)):
        assert name in flower.__all__
