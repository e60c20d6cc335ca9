"""Imports point one way only, and the core needs no adapter's framework."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedobd

PACKAGE = Path(fedobd.__file__).parent

LAYERS = (
    ("_errors", "_seeds", "_format"),
    ("_lookup",),
    ("blocks", "codec"),
    ("payload",),
    ("sessions",),
    ("methods",),
    ("",),  # fedobd/__init__.py, the public API of the core
    ("data", "models"),
    ("training",),
    ("simulation",),
    ("tracking",),
    ("experiments",),
    ("flower", "planning"),
    ("report",),
    ("cli",),
    ("__main__",),
)
"""Lowest first; a module imports from layers below its own, or from its own package."""


def unit_of(module: str) -> str:
    """Return the layer unit of a dotted module name: its first part below `fedobd`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports_of(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"relative import in {file}"
    return {name for name in found if name.split(".")[0] == "fedobd"}


def test_every_module_has_a_layer_and_imports_only_from_below() -> None:
    rank = {unit: number for number, layer in enumerate(LAYERS) for unit in layer}
    checked = 0
    for file in sorted(PACKAGE.rglob("*.py")):
        relative = file.relative_to(PACKAGE).with_suffix("")
        parts = [part for part in relative.parts if part != "__init__"]
        unit = parts[0] if parts else ""
        assert unit in rank, f"{relative} has no layer"
        for imported in imports_of(file):
            other = unit_of(imported)
            if other == unit and unit and (PACKAGE / unit).is_dir():
                continue  # within a package
            assert rank[other] < rank[unit], (
                f"{relative} imports {imported}, which is not below it"
            )
            checked += 1
    assert checked > 50


def test_packages_are_used_through_their_faces() -> None:
    """Nobody imports an underscore module of another package."""
    checked = 0
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).parts
        package = parts[0] if len(parts) > 1 else ""
        for imported in imports_of(file):
            other = imported.split(".")[1:]
            if len(other) > 1 and other[0] != package:
                assert not other[1].startswith("_"), (
                    f"{file.relative_to(PACKAGE)} imports {imported}, which its package keeps"
                )
                checked += 1
    assert checked  # the compiled loops at least


@pytest.mark.parametrize(
    "package", [d.name for d in PACKAGE.iterdir() if (d / "__init__.py").exists()]
)
def test_a_face_lists_what_it_offers(package: str) -> None:
    face = importlib.import_module(f"fedobd.{package}")
    assert face.__doc__
    assert face.__all__ == sorted(
        face.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n)
    )
    for name in face.__all__:
        assert hasattr(face, name)


def test_no_import_cycle_within_a_package() -> None:
    edges = {
        ".".join(("fedobd", *file.relative_to(PACKAGE).with_suffix("").parts)): imports_of(file)
        for file in PACKAGE.rglob("*.py")
        if file.name != "__init__.py"
    }

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import cycle: {' -> '.join((*path, module))}"
        for imported in edges.get(module, ()):
            visit(imported, (*path, module))

    for module in edges:
        visit(module, ())


def test_the_core_imports_only_torch_numpy_numba_and_zstandard() -> None:
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in "
        "('pydantic', 'typer', 'rich', 'safetensors', 'flwr', 'datasets', 'transformers', "
        "'tomli_w'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import fedobd, fedobd.training, fedobd.simulation, fedobd.models, fedobd.data\n"
        "print(fedobd.__version__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, fedobd.__version__), done.stderr


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Yield the functions of a module and the methods of its classes that are not private."""
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_"]
    for body in (tree.body, *(node.body for node in classes)):
        for node in body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield node


def test_functions_that_take_tensors_say_their_shapes_and_types() -> None:
    checked, silent = 0, []
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.parent.name == "report":  # whose arrays are points of curves
            continue
        for function in public_functions(ast.parse(file.read_text(encoding="utf-8"))):
            taken = [*function.args.args, *function.args.kwonlyargs]
            annotations = " ".join(ast.unparse(a.annotation) for a in taken if a.annotation)
            text = ast.get_docstring(function) or ""
            if re.search(r"\bTensor\b|NDArray|Float32", annotations) and text[:4] != "See ":
                checked += 1
                if not (
                    re.search("shape|1-D|scalar", text) and re.search("float|int|bool|type", text)
                ):
                    silent.append(f"{file.relative_to(PACKAGE)}: {function.name}")
    assert checked > 40
    assert silent == []


def test_public_names_are_sorted_and_there() -> None:
    assert fedobd.__all__ == sorted(
        fedobd.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n)
    )
    for name in fedobd.__all__:
        thing = getattr(fedobd, name)
        assert name == "ModelState" or thing.__doc__, f"{name} has no docstring"
