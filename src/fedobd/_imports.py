"""A user's own objects by name: `package.module:object`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from fedobd._errors import UsageError

T = TypeVar("T")


def nearest(name: str, names: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the name that is most like a mistyped one, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def find_object(name: str, what: str, known: Mapping[str, T]) -> T:
    """Return a known object by its name, or a user's own by `package.module:object`.

    Args:
        name: a key of `known`, or a module's path, a colon, and a name in the module.
        what: what it is, for messages, such as `"model"`.
        known: the objects that have a name of their own.

    Raises:
        UsageError: the name is not known, or the module or the object in it is not there.
    """
    if name in known:
        return known[name]
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        raise UsageError(
            f"unknown {what} {name!r}{nearest(name, known)}; known are "
            f"{', '.join(known)}, or 'package.module:name' for one of your own"
        )
    try:
        found: object = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{what} {name!r} cannot be imported: {error}") from error
    return found  # type: ignore[return-value]
