"""Check: what a data set holds, and every kind of thing that is wrong with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedobd.data._source import Source

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 1000
_MOST_ROWS = 5  # that are named for one kind of fault


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitReport:
    """What one split holds.

    Args:
        name: the split's name.
        columns: the names of its columns.
        examples_by_class: how many examples each class has, in the order of the classes.
        inputs: how often each size of images or each length of texts (in tens of words) occurs.
        faults: what is wrong, with the rows.
    """

    name: str
    columns: tuple[str, ...]
    examples_by_class: tuple[int, ...]
    inputs: dict[str, int]
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
    inputs: Counter[str] = Counter()
    row = 0
    for batch in split.select_columns([source.input, source.target]).iter(_BATCH):
        for value, target in zip(batch[source.input], batch[source.target], strict=True):
            number = numbers.get(target)
            if number is None:
                _note(faults, f"class {target!r} is none of the {len(source.classes)}", row)
            else:
                by_class[number] += 1
            found = _size_of(value) if source.kind == "image" else _length_of(value)
            if found is None:
                _note(faults, f"no {source.kind}", row)
            else:
                inputs[found] += 1
            row += 1
    if source.kind == "image" and len(inputs) > 1:
        sizes = ", ".join(f"{size} ({count})" for size, count in inputs.most_common(_MOST_ROWS))
        _note(faults, f"images of {len(inputs)} sizes: {sizes}; wanted data.image.side", None)
    return SplitReport(
        name=name,
        columns=tuple(split.column_names),
        examples_by_class=tuple(by_class[i] for i in range(len(source.classes))),
        inputs=dict(inputs),
        faults=tuple(_text_of(what, rows) for what, rows in faults.items()),
    )


def _size_of(picture: Any) -> str | None:
    return None if picture is None else f"{picture.size[0]}x{picture.size[1]} {picture.mode}"


def _length_of(text: Any) -> str | None:
    if not isinstance(text, str) or not text.strip():
        return None
    tens = len(text.split()) // 10 * 10
    return f"{tens} to {tens + 9} words"


def _note(faults: dict[str, list[int]], what: str, row: int | None) -> None:
    rows = faults.setdefault(what, [])
    if row is not None:
        rows.append(row)


def _text_of(what: str, rows: list[int]) -> str:
    if not rows:
        return what
    named = ", ".join(map(str, rows[:_MOST_ROWS])) + (", …" if len(rows) > _MOST_ROWS else "")
    return f"{what}: {len(rows)} rows ({named})"
