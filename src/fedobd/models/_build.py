"""From a model's name and options to the model; every mistake of the caller is a UsageError."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fedobd._errors import UsageError
from fedobd._lookup import build_object


def build_from(
    models: Mapping[str, Callable[..., nn.Module]], name: str, options: Mapping[str, Any]
) -> nn.Module:
    """Build a model from a table of factories or from `package.module:factory`."""
    model = build_object(name, "model", models, options)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"model {name!r}: the factory returned an object of type {type(model).__name__}; "
            "wanted a torch.nn.Module"
        )
    return model
