"""Folders of pretrained models: on the disk, or in an installed package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from fedobd._errors import UsageError

_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # in one file, or in several
PACKAGE = "package:"
"""Begins the name of a folder in an installed package."""


def checkpoint_folder(checkpoint: str) -> Path:
    """Find the folder of a pretrained model; nothing is downloaded.

    Args:
        checkpoint: path of a folder with `config.json` and `model.safetensors`; or
            `package:name`, for the one such folder in the installed package of that import name,
            at its top or one level below; or `package:name/folder` for a certain one. The package
            is not imported.

    Returns:
        The path of the folder. Its tokenizer, where it has one, is to be found there as well.

    Raises:
        UsageError: the package is not installed, or there is no such folder, or what is in it is
            no model in the safetensors format.

    Example:
        >>> checkpoint_folder("no/such/folder")
        Traceback (most recent call last):
            ...
        fedobd._errors.UsageError: checkpoint 'no/such/folder': there is no such folder
    """
    if not isinstance(checkpoint, str) or not checkpoint:
        raise UsageError(
            f"checkpoint is {checkpoint!r}; wanted the path of a folder, or 'package:name'"
        )
    if checkpoint.startswith(PACKAGE):
        folder = _folder_in_package(checkpoint)
    else:
        folder = Path(checkpoint).expanduser()
    if not folder.is_dir():
        raise UsageError(f"checkpoint {checkpoint!r}: there is no such folder")
    if (folder / "adapter_config.json").exists():
        raise UsageError(
            f"checkpoint {checkpoint!r} holds an adapter; wanted a whole model, into which the "
            "adapter has been merged"
        )
    if not (folder / _CONFIG).is_file():
        raise UsageError(f"checkpoint {checkpoint!r} holds no {_CONFIG}")
    if not _has_weights(folder):
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".h5"))
        found = f" but {', '.join(others)}" if others else ""
        raise UsageError(
            f"checkpoint {checkpoint!r} holds no {_WEIGHTS[0]}{found}; weights are read in the "
            "safetensors format only"
        )
    return folder


def _folder_in_package(checkpoint: str) -> Path:
    name, _, inner = checkpoint.removeprefix(PACKAGE).partition("/")
    if not name.isidentifier():
        raise UsageError(
            f"checkpoint {checkpoint!r} does not have the form 'package:name' or "
            "'package:name/folder'"
        )
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # of modules such as `__main__`
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"checkpoint {checkpoint!r}: no package {name!r} is installed")
    tops = [Path(place) for place in spec.submodule_search_locations]
    if inner:
        return next((top / inner for top in tops if (top / inner).is_dir()), tops[0] / inner)
    places = [place for top in tops for place in (top, *sorted(top.iterdir()))]
    found = [p for p in places if (p / _CONFIG).is_file() and _has_weights(p)]
    if len(found) != 1:
        names = ", ".join(f"'{PACKAGE}{name}/{p.name}'" for p in found if p not in tops)
        raise UsageError(
            f"checkpoint {checkpoint!r}: {len(found)} folders in {tops[0]} hold {_CONFIG} and "
            f"{_WEIGHTS[0]}" + (f"; name one: {names}" if names else "; wanted one")
        )
    return found[0]


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _WEIGHTS)
