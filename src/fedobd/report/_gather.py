"""Gather: run folders to sections of runs that can be compared.

Runs whose configurations differ in the method, its options and the seed alone stand in one
section; in it, runs that differ in the seed alone are one variant.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from fedobd._errors import UsageError
from fedobd.methods import METHODS
from fedobd.report._run import Run, is_run, read_run
from fedobd.tracking import flatten


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A method with its options, over its seeds.

    Args:
        label: the method's name, with the options that tell it from others of the section.
        number: in the whole report; the same label has the same.
        runs: one or more, by seed.
    """

    label: str
    number: int
    runs: tuple[Run, ...]

    @property
    def method(self) -> str:
        """The method's name."""
        return self.runs[0].method

    @property
    def is_finished(self) -> bool:
        """Whether any run of it has ended."""
        return any(run.is_finished for run in self.runs)

    @property
    def counted(self) -> tuple[Run, ...]:
        """The runs that tables are made of: those that have ended, or all where none has."""
        return tuple(run for run in self.runs if run.is_finished) or self.runs

    @property
    def shown(self) -> Run:
        """The run whose blocks are shown: the first that has ended, or that with most rounds."""
        if self.is_finished:
            return self.counted[0]
        return max(self.runs, key=lambda run: len(run.rounds))


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Runs on the same data, model and clients.

    Args:
        title: data and model.
        settings: what tells it from other sections of the same title; empty where none is.
        metric: what was measured on the test set, such as `test accuracy`.
    """

    title: str
    settings: str
    metric: str
    variants: tuple[Variant, ...]
    notes: tuple[str, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """All runs."""
        return tuple(run for variant in self.variants for run in variant.runs)


def gather(paths: Sequence[Path]) -> tuple[Section, ...]:
    """Read run folders, and folders of them such as a comparison's; each counts once."""
    if not paths:
        raise UsageError("no run was named; wanted at least one run folder")
    folders = list(dict.fromkeys(f.resolve() for path in paths for f in _folders(path)))
    read = {folder: read_run(folder) for folder in folders}
    runs = _named([run for run in read.values() if run is not None])
    if not runs:
        raise UsageError(
            f"no round has ended in {', '.join(repr(str(f)) for f in folders)}; a report needs one"
        )
    empty = tuple(folder for folder, run in read.items() if run is None)
    return _sections(runs, empty)


def _named(runs: Sequence[Run]) -> list[Run]:
    """Tell runs apart whose folders have the same name, by the folders around them."""
    counts = Counter(run.folder.name for run in runs)
    return [
        replace(run, name=f"{run.folder.parent.name}/{run.folder.name}")
        if counts[run.folder.name] > 1
        else run
        for run in runs
    ]


def _folders(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UsageError(f"run {str(path)!r} {what}; wanted a run folder, or a comparison's")
    if is_run(path):
        yield path
        return
    inner = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and is_run(folder)]
    if not inner:
        raise UsageError(
            f"folder {str(path)!r} is no run and holds none; wanted a run folder, with "
            "config.toml and schema.json, or a comparison's"
        )
    yield from inner


def _sections(runs: Sequence[Run], empty: Sequence[Path]) -> tuple[Section, ...]:
    groups = _grouped(runs, _settings)
    titles = [_title(group[0]) for _, group in groups]
    told = _told(titles, [settings for settings, _ in groups])
    numbers = {name: number for number, name in enumerate(METHODS)}  # a color for each method
    sections = []
    for title, telling, (_, group) in zip(titles, told, groups, strict=True):
        variants = _variants(group, numbers)
        sections.append(
            Section(
                title=title,
                settings=telling,
                metric=f"test {group[0].config.training.metric}",
                variants=variants,
                notes=tuple(_notes(variants, empty)),
            )
        )
        empty = ()  # named once
    return tuple(sections)


def _title(run: Run) -> str:
    """Return data and model of a run, a path by its last part."""
    data = Path(run.config.data.name)
    return f"{data.name if data.is_absolute() else data}, {run.config.model.name}"


def _variants(runs: Sequence[Run], numbers: dict[str, int]) -> tuple[Variant, ...]:
    groups = sorted(
        _grouped(runs, _options), key=lambda group: list(METHODS).index(group[0]["method"])
    )
    names = [options["method"] for options, _ in groups]
    told = _told(names, [options for options, _ in groups])
    labels = [", ".join(filter(None, pair)) for pair in zip(names, told, strict=True)]
    return tuple(
        Variant(
            label=label,
            number=numbers.setdefault(label, len(numbers)),
            runs=tuple(sorted(group, key=lambda run: (run.seed, run.folder))),
        )
        for label, (_, group) in zip(labels, groups, strict=True)
    )


def _settings(run: Run) -> dict[str, Any]:
    """Return what runs of a section have in common, by dotted key."""
    plain = run.config.to_dict()
    for key in ("method", "methods", "simulation", "output"):
        del plain[key]
    del plain["federation"]["seed"]
    return flatten(plain, ".")


def _options(run: Run) -> dict[str, Any]:
    """Return the run's method, and its options by dotted key."""
    options = run.config.to_dict()["methods"][run.method]
    return {"method": run.method, **flatten(options, ".")}


def _grouped(
    runs: Iterable[Run], key: Callable[[Run], dict[str, Any]]
) -> list[tuple[dict[str, Any], list[Run]]]:
    """Return runs with equal keys together, after their key, in the order of the first of each."""
    groups: dict[str, tuple[dict[str, Any], list[Run]]] = {}
    for run in runs:
        values = key(run)
        text = json.dumps(values, sort_keys=True, default=str)
        groups.setdefault(text, (values, []))[1].append(run)
    return list(groups.values())


def _told(names: Sequence[str], values: Sequence[dict[str, Any]]) -> list[str]:
    """Return for each name the values that tell it from others of the same name."""
    texts = []
    for name, mine in zip(names, values, strict=True):
        others = [other for same, other in zip(names, values, strict=True) if same == name]
        keys = dict.fromkeys(key for other in others for key in other)
        telling = [k for k in keys if any(o.get(k) != others[0].get(k) for o in others)]
        texts.append(", ".join(_setting(key, mine) for key in telling))
    return texts


def _setting(key: str, values: Mapping[str, Any]) -> str:
    if key not in values:
        return f"no {key}"
    value = values[key]
    return f"{key} = {value if isinstance(value, str) else json.dumps(value)}"


def _notes(variants: Sequence[Variant], empty: Sequence[Path]) -> Iterator[str]:
    for folder in empty:
        yield f"Run {folder.name} is left out: no round of it has ended."
    for variant in variants:
        for run in variant.runs:
            if not run.is_finished:
                use = "leave it out" if variant.is_finished else "take the rounds that have ended"
                yield (
                    f"Run {run.name} has not finished: {len(run.rounds)} of "
                    f"{run.planned_rounds} planned rounds have ended; the tables {use}."
                )
            if run.results.stops_on_test:
                yield (f"Run {run.name} stopped on the test set, which flatters its results.")
        for seed, same in groupby(variant.counted, key=lambda run: run.seed):
            names = [run.name for run in same]
            if len(names) > 1:
                yield (
                    f"Runs {', '.join(names)} have the same configuration and seed {seed}; each "
                    "counts."
                )
