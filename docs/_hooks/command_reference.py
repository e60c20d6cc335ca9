"""The command reference, from the commands themselves."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator

import click
import typer.main

from fedobd.cli import app


def commands() -> Iterator[tuple[str, click.Command]]:
    """Yield every command with its whole name, such as `fedobd data check`."""
    yield from _leaves("fedobd", typer.main.get_command(app))


def _leaves(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield name, command
        return
    for inner, member in command.commands.items():
        yield from _leaves(f"{name} {inner}", member)


def render() -> str:
    """Return the reference as Markdown: a heading a command, a definition a parameter."""
    return "\n\n".join(_render(name, command) for name, command in commands())


def _render(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=name)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    help_text = re.sub(r"\n(?!\n)", " ", command.help or "")
    lines = [f"## `{name}` {{ #{name.replace(' ', '-')} }}", "", help_text]
    lines += ["", "```text", usage, "```"]
    texts = _texts(command)
    for parameter in command.params:
        lines += ["", f"{_names(parameter)}", f":   {_facts(parameter)}"]
        text = texts.get(parameter.name or "")
        if text:
            lines += ["", f"    {text}"]
    return "\n".join(lines)


def _texts(command: click.Command) -> dict[str, str]:
    """Return the help of each parameter; click 8.5 drops that of typer's arguments."""
    hints = typing.get_type_hints(command.callback, include_extras=True)
    return {
        name: info.help
        for name, hint in hints.items()
        for info in getattr(hint, "__metadata__", ())
        if info.help
    }


def _names(parameter: click.Parameter) -> str:
    if isinstance(parameter, click.Argument):
        return f"`{parameter.human_readable_name}`"
    return ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))


def _facts(parameter: click.Parameter) -> str:
    """Return type, default and whether it must be given."""
    if isinstance(parameter.type, click.Choice):
        kind = " or ".join(f"`{choice}`" for choice in parameter.type.choices)
    elif isinstance(parameter, click.Option) and parameter.is_flag:
        kind = "flag"
    else:
        kind = parameter.type.name
    facts = [kind]
    if parameter.required:
        facts.append("must be given")
    elif isinstance(parameter.default, str | int | float) and kind != "flag":
        facts.append(f"default: `{parameter.default}`" if parameter.default != "" else "")
    if parameter.multiple or parameter.nargs == -1:
        facts.append("repeatable")
    return " · ".join(filter(None, facts))
