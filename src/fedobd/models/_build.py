"""From a model's name and options to the model; every mistake of the caller is a UsageError."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from fedobd._errors import UsageError


def build_from(
    models: Mapping[str, Callable[..., nn.Module]], name: str, options: Mapping[str, Any]
) -> nn.Module:
    """Build a model from a table of factories or from `package.module:factory`."""
    with _current_directory_importable():
        factory = models[name] if name in models else _import_factory(models, name)
        _check_options(factory, name, options)
        try:
            model = factory(**options)
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"model {name!r} refused its options {dict(options)!r}: "
                f"{type(error).__name__}: {error}"
            ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"model {name!r}: the factory returned an object of type {type(model).__name__}; "
            "wanted a torch.nn.Module"
        )
    return model


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    """Let the current directory be searched last: it cannot shadow an installed package."""
    here = str(Path.cwd())
    missing = here not in sys.path and "" not in sys.path
    if missing:
        sys.path.append(here)
        importlib.invalidate_caches()
    try:
        yield
    finally:
        if missing and here in sys.path:
            sys.path.remove(here)


def _import_factory(models: Mapping[str, object], name: str) -> Callable[..., Any]:
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise UsageError(
            f"model {name!r} is unknown; wanted one of {', '.join(models)}, or "
            f"'package.module:factory' for your own{_nearest(name, models)}"
        )
    parts = attribute.split(".")
    if not all(part.isidentifier() for part in [*module_name.split("."), *parts]):
        raise UsageError(f"model {name!r} does not have the form 'package.module:factory'")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise UsageError(
            f"model {name!r}: module {module_name!r} cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error
    for part in parts:
        try:
            found = getattr(found, part)
        except Exception as error:  # a lazy module may raise anything
            raise UsageError(
                f"model {name!r}: module {module_name!r} has no {attribute!r}"
                f"{_nearest(part, dir(found))}"
            ) from error
    if not callable(found):
        raise UsageError(
            f"model {name!r}: {attribute!r} is of type {type(found).__name__}; wanted a class or "
            "function that returns a torch.nn.Module"
        )
    factory: Callable[..., Any] = found
    return factory


def _check_options(factory: Callable[..., Any], name: str, options: Mapping[str, Any]) -> None:
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
                    f"model {name!r} has no option {option!r}; it has "
                    f"{', '.join(named) or 'none'}{_nearest(option, named)}"
                )
    try:
        signature.bind(**options)
    except TypeError as error:
        raise UsageError(f"model {name!r}: {error}") from error


def _nearest(name: str, names: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
