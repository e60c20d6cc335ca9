"""Imports point one way only, and the core needs no adapter's framework."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import fedobd

PACKAGE = Path(fedobd.__file__).parent

LAYERS = (
    ("_errors", "_checksum", "_format"),
    ("_seeds", "_imports", "_checkpoint", "_parallel", "_kernels", "_varint", "_planes"),
    ("_tables",),
    ("_schema",),
    ("_state",),
    ("_blocks",),
    ("_naming",),
    ("_quantization", "_masks"),
    ("_entropy", "_wire"),
    ("_frames",),
    ("_encoding", "_payload"),
    ("_selection", "_aggregation", "_rounds"),
    ("_codec", "_method"),
    ("_clipping", "_intake"),
    ("_server",),
    ("_client",),
    ("methods",),
    ("",),  # fedobd/__init__.py, the public API of the core
    ("data", "models", "_acceleration"),
    ("training",),
    ("stacked",),
    ("simulation",),
    ("tracking",),
    ("experiments",),
    ("flower", "planning"),
    ("display", "report"),
    ("data_commands", "plan_commands", "report_commands"),
    ("cli",),
    ("__main__",),
)
"""Lowest first; a module imports from layers below its own, or from its own package."""

CORE = LAYERS[: LAYERS.index(("",)) + 1]


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


def test_public_names_are_sorted_and_there() -> None:
    assert fedobd.__all__ == sorted(
        fedobd.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n)
    )
    for name in fedobd.__all__:
        thing = getattr(fedobd, name)
        assert name == "ModelState" or thing.__doc__, f"{name} has no docstring"
