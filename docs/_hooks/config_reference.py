"""The configuration reference, from the models themselves: every key, and nothing by hand."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import griffe
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedobd.experiments import RunConfig, plain_values
from fedobd.methods import METHODS

_NOT_SET = "not set"
_WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}
_LIMITS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


@dataclass(frozen=True, slots=True)
class Option:
    """One key.

    Args:
        key: dotted, from the top.
        allowed: type and allowed values, in words.
        default: as TOML has it, in words where it has none.
        meaning: what it does.
    """

    key: str
    allowed: str
    default: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the configuration.

    Args:
        name: dotted; empty for the top.
        text: what it is for.
        options: its own keys, those of tables within left out.
    """

    name: str
    text: str
    options: tuple[Option, ...]


def tables() -> Iterator[Table]:
    """Yield all tables, each before those within it; one for the options of each method."""
    for table in _tables(RunConfig, ""):
        own = tuple(option for option in table.options if option.key != "methods")
        yield dataclasses.replace(table, options=own)
    for name, kind in METHODS.items():
        yield from _tables(kind, f"methods.{name}")


def render() -> str:
    """Return the reference as Markdown: a heading a table, a definition a key."""
    return "\n\n".join(_render(table) for table in tables())


def _render(table: Table) -> str:
    depth = 2 + table.name.count(".") - table.name.startswith("methods.")
    heading = f"`[{table.name}]` {{ #{table.name} }}" if table.name else "At the top { #top }"
    lines = [f"{'#' * depth} {heading}", "", table.text]
    for option in table.options:
        facts = f"{option.allowed} · default: {option.default}"
        lines += ["", f"`{option.key}` {{ #{option.key} }}", f":   {facts}", ""]
        lines += [f"    {option.meaning}"]
    return "\n".join(lines)


def _tables(kind: type[Any], name: str) -> Iterator[Table]:
    options, within = [], []
    meanings = _meanings(kind)
    for field, annotation, default, limits in _fields(kind):
        key = f"{name}.{field}" if name else field
        section = _section(annotation)
        if section is not None:
            within.append((section, key))
            continue
        allowed = ", ".join([_describe(annotation), *limits])
        options.append(Option(key, allowed, _as_toml(default), meanings[field]))
    yield Table(name, _text(kind), tuple(options))
    for section, key in within:
        yield from _tables(section, key)


def _fields(kind: type[Any]) -> Iterator[tuple[str, Any, Any, list[str]]]:
    """Yield name, type, default and limits of each field of a model or dataclass."""
    if issubclass(kind, BaseModel):
        for name, info in kind.model_fields.items():
            default = info.get_default(call_default_factory=True)
            yield name, info.annotation, default, _limits(info)
        return
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        yield field.name, hints[field.name], field.default, []


def _limits(info: FieldInfo) -> list[str]:
    return [
        f"{sign} {getattr(rule, attribute)}"
        for rule in info.metadata
        for attribute, sign in _LIMITS.items()
        if hasattr(rule, attribute)
    ]


def _section(annotation: Any) -> type[Any] | None:
    is_class = isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias)
    if is_class and (dataclasses.is_dataclass(annotation) or issubclass(annotation, BaseModel)):
        return typing.cast("type[Any]", annotation)
    return None


def _meanings(kind: type[Any]) -> dict[str, str]:
    """Return what the fields mean; a derived class's own line goes before its base's."""
    if issubclass(kind, BaseModel):
        return {name: info.description or "" for name, info in kind.model_fields.items()}
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        for section in _docstring(base):
            if section.kind is griffe.DocstringSectionKind.parameters:
                found.update({p.name: _one_line(p.description) for p in section.value})
    return found


def _text(kind: type[Any]) -> str:
    """Return the docstring without its sections."""
    texts = [
        section.value
        for section in _docstring(kind)
        if section.kind is griffe.DocstringSectionKind.text
    ]
    return "\n\n".join(texts)


def _docstring(kind: type[Any]) -> list[griffe.DocstringSection]:
    doc = griffe.Docstring(kind.__doc__ or "", lineno=1)
    return griffe.parse_google(doc, warnings=False)


def _one_line(text: str) -> str:
    line = re.sub(r"\s+", " ", text).strip()
    is_word = re.match(r"[a-z]{2}", line)  # and no symbol, such as the s of a quantizer
    return line[0].upper() + line[1:] if is_word else line


def _describe(annotation: Any) -> str:
    """Return a type in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        limits = [limit for info in arguments[1:] for limit in _limits(info)]
        return " ".join([_describe(arguments[0]), *limits])
    if origin is Literal:
        return ", ".join(f"`{_as_toml(value).strip('`')}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        members = [_describe(member) for member in arguments if member is not type(None)]
        return " or ".join(members)
    if origin is tuple:
        return f"list of {_describe(arguments[0])}"
    if origin is dict:
        return "table"
    return _WORDS[annotation]


def _as_toml(default: Any) -> str:
    if default is None:
        return _NOT_SET
    value = plain_values(default)
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f'`"{value}"`'
    return "`{}`" if value == {} else f"`{value}`"
