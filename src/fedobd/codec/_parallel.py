"""Work spread over an executor that the caller brings, or done here one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def spread(
    executor: Executor | None, function: Callable[[Item], Result], items: Iterable[Item]
) -> list[Result]:
    """Return the function's results in the order of the items, whoever works them out."""
    if executor is None:
        return [function(item) for item in items]
    return list(executor.map(function, items))
