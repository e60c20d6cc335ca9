"""Check: what a data set holds, and every kind of thing that is wrong with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedobd.data._source import Source

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 1000
_MOST_NAMED = 5  # rows of one kind of fault, or sizes of images


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitReport:
    """What one split holds.

    Args:
        name: the split's name.
        rows: how many rows it has.
        columns: the names of its columns.
        examples_by_class: how many examples each class has, in the order of the classes.
        inputs: the sizes of its images, the most common first, or how many words its texts have.
        faults: what is wrong, with the rows.
    """

    name: str
    rows: int
    columns: tuple[str, ...]
    examples_by_class: tuple[int, ...]
    inputs: str
    faults: tuple[str, ...]


def check_split(source: Source, split: Dataset, name: str) -> SplitReport:
    """Look at every row of a split.

    Args:
        source: the data set.
        split: one of its splits.
        name: the split's name.
    """
    faults: dict[str, list[int]] = {}
    numbers: dict[Any, int] = {i: i for i in range(len(source.classes))}
    numbers |= {text: i for i, text in enumerate(source.classes)}
    by_class: Counter[int] = Counter()
    sizes: Counter[str] = Counter()
    lengths: list[int] = []
    row = 0
    for batch in split.select_columns([source.input, source.target]).iter(_BATCH):
        for value, target in zip(batch[source.input], batch[source.target], strict=True):
            number = numbers.get(target)
            if number is None:
                _note(faults, f"class {target!r} is none of the {len(source.classes)}", row)
            else:
                by_class[number] += 1
            if source.kind == "image" and value is not None:
                sizes[f"{value.size[0]}x{value.size[1]} {value.mode}"] += 1
            elif source.kind == "text" and isinstance(value, str) and value.strip():
                lengths.append(len(value.split()))
            else:
                _note(faults, f"no {source.kind}", row)
            row += 1
    if len(sizes) > 1:
        named = ", ".join(f"{size} ({count})" for size, count in sizes.most_common(_MOST_NAMED))
        _note(faults, f"images of {len(sizes)} sizes: {named}; wanted data.image.side", None)
    return SplitReport(
        name=name,
        rows=row,
        columns=tuple(split.column_names),
        examples_by_class=tuple(by_class[i] for i in range(len(source.classes))),
        inputs=_list_of(sizes) if source.kind == "image" else _range_of(lengths),
        faults=tuple(_text_of(what, rows) for what, rows in faults.items()),
    )


def _list_of(sizes: Counter[str]) -> str:
    common = [size for size, _ in sizes.most_common(_MOST_NAMED)]
    return ", ".join(common) + (", …" if len(sizes) > len(common) else "")


def _range_of(lengths: list[int]) -> str:
    if not lengths:
        return "no words"
    ordered = sorted(lengths)
    half, most = ordered[len(ordered) // 2], ordered[int(0.9 * len(ordered))]
    return f"{ordered[0]} to {ordered[-1]} words, median {half}, 90 % up to {most}"


def _note(faults: dict[str, list[int]], what: str, row: int | None) -> None:
    rows = faults.setdefault(what, [])
    if row is not None:
        rows.append(row)


def _text_of(what: str, rows: list[int]) -> str:
    if not rows:
        return what
    named = ", ".join(map(str, rows[:_MOST_NAMED])) + (", …" if len(rows) > _MOST_NAMED else "")
    return f"{what}: {len(rows)} rows ({named})"
