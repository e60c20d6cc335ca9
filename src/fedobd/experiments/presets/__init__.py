"""Presets: configurations that come with the package, as TOML files beside this module."""

from __future__ import annotations

from importlib.resources import files

from fedobd._errors import UsageError
from fedobd._lookup import nearest


def list_presets() -> dict[str, str]:
    """Return each preset's name with its first comment line."""
    presets = {}
    for entry in sorted(files(__package__).iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".toml"):
            first = entry.read_text(encoding="utf-8").partition("\n")[0]
            presets[entry.name.removesuffix(".toml")] = first.lstrip("# ")
    return presets


def preset_text(name: str) -> str:
    """Return a preset's TOML.

    Raises:
        UsageError: there is no such preset.
    """
    known = list_presets()
    if name not in known:
        raise UsageError(
            f"preset {name!r} is unknown; there are {', '.join(known)}, or give the path of a "
            f".toml file{nearest(name, known)}"
        )
    return (files(__package__) / f"{name}.toml").read_text(encoding="utf-8")
