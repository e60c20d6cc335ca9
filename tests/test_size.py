"""Modules, functions and lists of parameters stay short enough to be read in one go."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import fedobd

PACKAGE = Path(fedobd.__file__).parent

MAX_MODULE_LINES = 450
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 7

OPTIONS_OF_USERS = {
    # what a user chooses, each with a default; Flower's own strategies take theirs so
    "flower/_grid.py: CodecGrid.__init__",
    "flower/_strategy.py: FedOBDStrategy.__init__",
    # the keys of `model.options` in a configuration
    "models/transformer.py: TransformerClassifier.__init__",
}
"""Constructors that may take more parameters."""


def functions_of(
    node: ast.AST, scope: tuple[str, ...] = ()
) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield all functions below a node, with their dotted names."""
    for child in ast.iter_child_nodes(node):
        inner = scope
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            inner = (*scope, child.name)
        if isinstance(child, ast.FunctionDef):
            yield ".".join(inner), child
        yield from functions_of(child, inner)


def decorators_of(function: ast.FunctionDef) -> list[str]:
    return [ast.unparse(decorator) for decorator in function.decorator_list]


def is_kernel(function: ast.FunctionDef) -> bool:
    """Whether Numba compiles it: its arguments are arrays, and calls in it are not free."""
    return any(name.partition("(")[0] == "compiled" for name in decorators_of(function))


def is_command(file: Path, function: ast.FunctionDef) -> bool:
    """Whether the command line makes an option of each parameter."""
    return file.parent == PACKAGE / "cli" and function.name.endswith("_command")


def num_parameters(function: ast.FunctionDef) -> int:
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    is_bound = bool(positional) and positional[0].arg in ("self", "cls")
    stars = [arguments.vararg, arguments.kwarg]
    return len(positional) - is_bound + len(arguments.kwonlyargs) + len(stars) - stars.count(None)


def all_functions() -> Iterator[tuple[Path, str, ast.FunctionDef]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        for name, function in functions_of(ast.parse(file.read_text(encoding="utf-8"))):
            yield file, f"{file.relative_to(PACKAGE).as_posix()}: {name}", function


def test_modules_are_short() -> None:
    lengths = {
        file.relative_to(PACKAGE).as_posix(): len(file.read_text(encoding="utf-8").splitlines())
        for file in PACKAGE.rglob("*.py")
    }
    assert len(lengths) > 50
    assert {name: n for name, n in lengths.items() if n > MAX_MODULE_LINES} == {}


def test_functions_are_short() -> None:
    lengths = {
        name: (function.end_lineno or 0) - function.lineno + 1
        for _, name, function in all_functions()
    }
    assert len(lengths) > 500
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}


def test_parameters_are_few() -> None:
    counts = {
        name: num_parameters(function)
        for file, name, function in all_functions()
        if not is_kernel(function) and not is_command(file, function)
    }
    assert {name for name, n in counts.items() if n > MAX_PARAMETERS} == OPTIONS_OF_USERS
