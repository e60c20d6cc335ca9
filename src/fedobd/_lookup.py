"""A user's objects and checkpoints by name: `package.module:object`, a folder, `package:name`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fedobd._errors import UsageError

_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # in one file, or in several
PACKAGE = "package:"
"""Begins the name of a folder in an installed package."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the name most like a mistyped one, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def no_such(what: str, name: str, known: Iterable[str]) -> UsageError:
    """Return the error for a name that stands for nothing known, and is no path to an object."""
    known = list(known)
    wanted = f"one of {', '.join(known)}, or " if known else ""
    return UsageError(
        f"{what} {name!r} is unknown; wanted {wanted}'package.module:name' for your own"
        f"{nearest(name, known)}"
    )


def find_object(name: str, what: str, known: Mapping[str, Callable[..., Any]]) -> Any:
    """Return a known function or class by its name, or a user's by `package.module:object`.

    Args:
        name: a key of `known`, or a module's path, a colon, and a name in the module.
        what: what it is, for messages, such as `"model"`.
        known: the functions and classes that have a short name.

    Raises:
        UsageError: the name is not known, or the module or the object in it is not there or
            cannot be called.
    """
    if name in known:
        return known[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise no_such(what, name, known)
    parts = attribute.split(".")
    if not all(part.isidentifier() for part in [*module_name.split("."), *parts]):
        raise UsageError(f"{what} {name!r} does not have the form 'package.module:name'")
    try:
        thing: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module raises when it is imported
        raise UsageError(
            f"{what} {name!r}: module {module_name!r} cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error
    for part in parts:
        if not hasattr(thing, part):
            public = [n for n in vars(thing) if not n.startswith("_")]
            raise UsageError(
                f"{what} {name!r}: module {module_name!r} has no {attribute!r}"
                f"{nearest(part, public)}"
            )
        thing = getattr(thing, part)
    if not callable(thing):
        raise UsageError(
            f"{what} {name!r}: {attribute!r} is of type {type(thing).__name__}; "
            "wanted a class or function"
        )
    return thing


def build_object(
    name: str, what: str, known: Mapping[str, Callable[..., Any]], options: Mapping[str, Any]
) -> Any:
    """Call a known factory, or a user's, with options by name.

    Args:
        name: see `find_object`.
        what: see `find_object`.
        known: see `find_object`.
        options: its arguments.

    Raises:
        UsageError: it is not there, has no such option or lacks one, or does not take their
            values, or fails.
    """
    factory = find_object(name, what, known)
    _check_options(factory, what, name, options)
    try:
        return factory(**options)
    except UsageError:
        raise
    except Exception as error:  # of any kind: it may be a user's code
        refused = f"refused its options {dict(options)!r}"
        fault = refused if isinstance(error, TypeError | ValueError) else "cannot be built"
        raise UsageError(f"{what} {name!r} {fault}: {type(error).__name__}: {error}") from error


def _check_options(
    factory: Callable[..., Any], what: str, name: str, options: Mapping[str, Any]
) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some callables written in C have none
        return
    takes = signature.parameters.values()
    named = [p.name for p in takes if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not any(p.kind is p.VAR_KEYWORD for p in takes):
        for option in options:
            if option not in named:
                raise UsageError(
                    f"{what} {name!r} has no option {option!r}; it has "
                    f"{', '.join(named) or 'none'}{nearest(option, named)}"
                )
    try:
        signature.bind(**options)
    except TypeError as error:
        raise UsageError(f"{what} {name!r}: {error}") from error


def not_installed(what: str, error: ModuleNotFoundError, extra: str) -> UsageError:
    """Return the error for a package of an extra that is not there.

    Args:
        what: what needs it.
        error: names the package.
        extra: the extra that brings it.
    """
    return UsageError(
        f"{what} needs {error.name!r}, which is not installed; pip install 'fedobd[{extra}]'"
    )


def checkpoint_folder(checkpoint: str) -> Path:
    """Find the folder of a pretrained model; nothing is downloaded.

    Args:
        checkpoint: path of a folder with `config.json` and `model.safetensors`; or
            `package:name`, for the one such folder in the installed package of that import name,
            at its top or one level below; or `package:name/folder` for a certain one. The package
            is not imported.

    Returns:
        The path of the folder. Its tokenizer, where it has one, is to be found there as well.

    Raises:
        UsageError: the package is not installed, or there is no such folder, or what is in it is
            no model in the safetensors format.

    Example:
        >>> checkpoint_folder("no/such/folder")
        Traceback (most recent call last):
            ...
        fedobd._errors.UsageError: checkpoint 'no/such/folder': there is no such folder
    """
    if not isinstance(checkpoint, str) or not checkpoint:
        raise UsageError(
            f"checkpoint is {checkpoint!r}; wanted the path of a folder, or 'package:name'"
        )
    if checkpoint.startswith(PACKAGE):
        folder = _folder_in_package(checkpoint)
    else:
        folder = Path(checkpoint).expanduser()
    if not folder.is_dir():
        raise UsageError(f"checkpoint {checkpoint!r}: there is no such folder")
    if (folder / "adapter_config.json").exists():
        raise UsageError(
            f"checkpoint {checkpoint!r} holds an adapter; wanted a whole model, into which the "
            "adapter has been merged"
        )
    if not (folder / _CONFIG).is_file():
        raise UsageError(f"checkpoint {checkpoint!r} holds no {_CONFIG}")
    if not _has_weights(folder):
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".h5"))
        instead = f" but {', '.join(others)}" if others else ""
        raise UsageError(
            f"checkpoint {checkpoint!r} holds no {_WEIGHTS[0]}{instead}; weights are read in the "
            "safetensors format only"
        )
    return folder


def _folder_in_package(checkpoint: str) -> Path:
    name, _, inner = checkpoint.removeprefix(PACKAGE).partition("/")
    if not name.isidentifier():
        raise UsageError(
            f"checkpoint {checkpoint!r} does not have the form 'package:name' or "
            "'package:name/folder'"
        )
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # of modules such as `__main__`
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"checkpoint {checkpoint!r}: no package {name!r} is installed")
    tops = [Path(place) for place in spec.submodule_search_locations]
    if inner:
        return next((top / inner for top in tops if (top / inner).is_dir()), tops[0] / inner)
    places = [place for top in tops for place in (top, *sorted(top.iterdir()))]
    folders = [p for p in places if (p / _CONFIG).is_file() and _has_weights(p)]
    if len(folders) != 1:
        names = ", ".join(f"'{PACKAGE}{name}/{p.name}'" for p in folders if p not in tops)
        raise UsageError(
            f"checkpoint {checkpoint!r}: {len(folders)} folders in {tops[0]} hold {_CONFIG} and "
            f"{_WEIGHTS[0]}" + (f"; name one: {names}" if names else "; wanted one")
        )
    return folders[0]


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _WEIGHTS)
