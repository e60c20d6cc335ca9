"""Checks of the options that the models share."""

from __future__ import annotations

from fedobd._errors import UsageError


def check_counts(model: str, **counts: int) -> None:
    """Raise UsageError where an option of a model is no integer of at least 1."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"{model}: {name} is {value!r}; wanted an integer of at least 1")


def check_fraction(model: str, **fractions: float) -> None:
    """Raise UsageError where an option of a model is no number with 0 <= number < 1."""
    for name, value in fractions.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < 1:
            raise UsageError(f"{model}: {name} is {value!r}; allowed are 0 <= {name} < 1")
