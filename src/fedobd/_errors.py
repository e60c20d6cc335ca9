"""Errors: one base class, one subclass for each party that can be at fault.

`UsageError` is the caller's mistake, `DecodeError` the peer's bytes, `EmptyRoundError` a round to
which nobody contributed. Any other exception that leaves the package is a defect of the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum


class FedOBDError(Exception):
    """Base class of every error that this package raises on purpose."""


class UsageError(FedOBDError):
    """The caller asked for something that cannot be done.

    A value, model or file is wrong, or the order of calls.
    """


class EmptyRoundError(FedOBDError):
    """A round ended without a single accepted upload; the engine stops or repeats it."""


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise UsageError unless a value is one of several names."""
    if value not in allowed:
        names = ", ".join(map(repr, allowed[:-1]))
        raise UsageError(f"{name} is {value!r}; allowed are {names} and {allowed[-1]!r}")


def describe(error: BaseException) -> str:
    """Return the kind and the first line of what a library says; further ones are often lists."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"


class DecodeReason(StrEnum):
    """Why bytes from a peer were refused."""

    TRUNCATED = "truncated"
    TRAILING = "trailing bytes"
    CHECKSUM = "checksum"
    VERSION = "version"
    KIND = "kind"
    METHOD = "method"
    SCHEMA = "schema"
    START = "start"
    ROUND = "round"
    CLIENT = "client"
    DUPLICATE = "duplicate"
    LIMIT = "limit"
    FIELD = "field"
    STREAM = "stream"
    NOT_FINITE = "not finite"


class DecodeError(FedOBDError):
    """A payload was refused; nothing of it has been used.

    Args:
        reason: the kind of fault, for programs.
        message: what was wrong, what came, what was wanted and where, for people.
    """

    def __init__(self, reason: DecodeReason, message: str) -> None:
        super().__init__(f"{message} [{reason}]")
        self.reason = reason
        self._message = message

    def __reduce__(self) -> tuple[type[DecodeError], tuple[DecodeReason, str]]:
        return type(self), (self.reason, self._message)
