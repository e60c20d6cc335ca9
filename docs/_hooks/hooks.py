"""What MkDocs calls while it builds the site; see mkdocs.yml."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import command_reference
import config_reference
import formulas
import griffe
import repository_links
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent.parent

DOCUMENTS = {
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/RESULTS.md": "benchmarks.md",
    "examples/deployment/README.md": "deployment.md",
}
"""Documents that lie elsewhere in the repository, and the pages that they are."""

NO_RESULTS = "# Results on real data\n\nNot made here: `make results` writes this page.\n"

_ABOUT = re.compile(r"^\{\{ about (?P<module>[\w.]+) \}\}$", flags=re.MULTILINE)
_API = re.compile(r"^\{\{ api (?P<module>[\w.]+) \}\}$", flags=re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie under docs."""
    for document, page in DOCUMENTS.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / document)))
    if files.get_file_from_path("results.md") is None:
        files.append(File.generated(config, "results.md", content=NO_RESULTS))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what is made from the code, and change links and formulas."""
    pages = {f"docs/{file.src_uri}": file.src_uri for file in files.documentation_pages()}
    pages.update(DOCUMENTS)
    place = {name: document for document, name in pages.items()}[page.file.src_uri]
    markdown = markdown.replace("{{ configuration }}", config_reference.render())
    markdown = markdown.replace("{{ commands }}", command_reference.render())
    markdown = _ABOUT.sub(lambda match: about(match["module"]), markdown)
    markdown = _API.sub(lambda match: api_entries(match["module"]), markdown)
    return formulas.to_mathml(repository_links.relink(markdown, place, pages))


def about(module: str) -> str:
    """Return a module's docstring."""
    return inspect.getdoc(importlib.import_module(module)) or ""


def api_entries(module: str) -> str:
    """Return an entry for each public name of a module, for mkdocstrings."""
    return "\n\n".join(f"::: {module}.{name}" for name in public_names(module))


def public_names(module: str) -> list[str]:
    """Return what `__all__` lists; without one what is defined and documented in a module."""
    found = importlib.import_module(module)
    if hasattr(found, "__all__"):
        return list(found.__all__)
    members = griffe.load(module, search_paths=[ROOT / "src"]).members.items()
    return [
        name
        for name, member in members
        if not (name.startswith("_") or member.is_alias) and member.has_docstring
    ]
