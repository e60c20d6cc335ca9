"""From a model's name and options to the model; every mistake of the caller is a UsageError."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fedobd._errors import UsageError
from fedobd._imports import find_object, nearest


def build_from(
    models: Mapping[str, Callable[..., nn.Module]], name: str, options: Mapping[str, Any]
) -> nn.Module:
    """Build a model from a table of factories or from `package.module:factory`."""
    factory = find_object(name, "model", models)
    _check_options(factory, name, options)
    try:
        model = factory(**options)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"model {name!r} refused its options {dict(options)!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
    except UsageError:
        raise
    except Exception as error:  # the user's own code
        raise UsageError(
            f"model {name!r} cannot be built: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"model {name!r}: the factory returned an object of type {type(model).__name__}; "
            "wanted a torch.nn.Module"
        )
    return model


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
                    f"{', '.join(named) or 'none'}{nearest(option, named)}"
                )
    try:
        signature.bind(**options)
    except TypeError as error:
        raise UsageError(f"model {name!r}: {error}") from error
