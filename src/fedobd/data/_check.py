"""Check: what a data set holds, and every kind of thing that is wrong with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedobd._errors import UsageError
from fedobd.data._images import GREY_MODES, WIDE_MODES
from fedobd.data._source import Source

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 1000  # rows that are read at a time
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
        sides: the widths and heights of its images.
        is_grey: whether its images are grey; None where there are none.
        faults: what is wrong, with the rows.
    """

    name: str
    rows: int
    columns: tuple[str, ...]
    examples_by_class: tuple[int, ...]
    inputs: str
    sides: frozenset[tuple[int, int]]
    is_grey: bool | None
    faults: tuple[str, ...]


def check_split(
    source: Source, split: Dataset, name: str, *, like: SplitReport | None = None
) -> SplitReport:
    """Look at every row of a split.

    Args:
        source: the data set.
        split: one of its splits.
        name: the split's name.
        like: the report of the split to train on, whose images must be of the same kind and size.
    """
    seen = _Seen(source, source.class_numbers(split), like.is_grey if like else None)
    for batch in split.select_columns([source.input, source.target]).iter(_BATCH):
        for value, target in zip(batch[source.input], batch[source.target], strict=True):
            seen.add(value, target)
    seen.compare_sizes(like)
    return SplitReport(
        name=name,
        rows=seen.rows,
        columns=tuple(split.column_names),
        examples_by_class=tuple(seen.by_class[i] for i in range(len(source.classes))),
        inputs=_sizes(seen.images) if source.kind == "image" else _lengths(seen.lengths),
        sides=frozenset(seen.sides),
        is_grey=seen.is_grey,
        faults=tuple(
            f"{fault}: {len(rows)} rows ({_first(rows)})" if rows else fault
            for fault, rows in seen.faults.items()
        ),
    )


@dataclass(slots=True)
class _Seen:
    """What was seen of a split's rows so far.

    Args:
        source: the data set.
        numbers: the number of the class that each value is.
        is_grey: whether images must be grey; None to take it from the first.
    """

    source: Source
    numbers: dict[Any, int]
    is_grey: bool | None
    rows: int = 0
    by_class: Counter[int] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)
    sides: set[tuple[int, int]] = field(default_factory=set)
    lengths: list[int] = field(default_factory=list)
    faults: dict[str, list[int]] = field(default_factory=dict)

    def add(self, value: Any, target: Any) -> None:
        """Look at the next row."""
        number = self.numbers.get(target)
        if number is None:
            self._note(f"class {target!r} is none of the {len(self.source.classes)}")
        else:
            self.by_class[number] += 1
        if self.source.kind == "image":
            self._add_image(value)
        elif isinstance(value, str) and value.strip():
            self.lengths.append(len(value.split()))
        else:
            self._note("no text")
        self.rows += 1

    def _add_image(self, value: Any) -> None:
        try:
            picture = self.source.picture(value, self.rows)
        except UsageError:
            self._note("an image that cannot be decoded")
            return
        if picture is None:
            self._note("no image")
            return
        if self.is_grey is None:
            self.is_grey = picture.mode in GREY_MODES
        if picture.mode.startswith(WIDE_MODES):
            self._note(f"an image of mode {picture.mode!r}; wanted 8 bits a channel")
        elif self.is_grey and picture.mode not in GREY_MODES:
            self._note("an image with colours; the first one to train on is grey")
        self.images[f"{picture.width}x{picture.height} {picture.mode}"] += 1
        self.sides.add(picture.size)

    def _note(self, fault: str) -> None:
        self.faults.setdefault(fault, []).append(self.rows)

    def compare_sizes(self, like: SplitReport | None) -> None:
        """Note images of several sizes, in this split or compared with another."""
        if len(self.sides) > 1:
            common = self.images.most_common(_MOST_NAMED)
            named = ", ".join(f"{image} ({count})" for image, count in common)
            fault = f"images of {len(self.sides)} sizes: {named}"
        elif like and len(self.sides) == len(like.sides) == 1 and self.sides != like.sides:
            fault = f"images of {_sizes(self.images)}, in split {like.name!r} {like.inputs}"
        else:
            return
        self.faults[f"{fault}; wanted data.image.side"] = []  # of no row in particular


def _sizes(images: Counter[str]) -> str:
    return _first([size for size, _ in images.most_common()])


def _first(values: list[Any]) -> str:
    more = ", …" if len(values) > _MOST_NAMED else ""
    return ", ".join(map(str, values[:_MOST_NAMED])) + more


def _lengths(lengths: list[int]) -> str:
    if not lengths:
        return "no words"
    ordered = sorted(lengths)
    half, most = ordered[len(ordered) // 2], ordered[int(0.9 * len(ordered))]
    return f"{ordered[0]} to {ordered[-1]} words, median {half}, 90 % up to {most}"
