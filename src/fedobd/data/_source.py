"""Source: data sets of images or texts, from a hub or from local files, and their columns."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedobd._errors import UsageError, describe
from fedobd._lookup import nearest
from fedobd.data._images import Picture

if TYPE_CHECKING:
    from datasets import Dataset, Image

INPUT_COLUMNS = ("img", "image", "text", "sentence", "content", "review")
TARGET_COLUMNS = ("label", "fine_label", "labels", "target")

_BUILDERS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".arrow": "arrow",
    ".json": "json",
    ".jsonl": "json",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns of a data set are used.

    Args:
        input: images or texts; None for the first of the usual names.
        target: the class; None for the first of the usual names.
        client: whose example it is, for the partition `natural`.
    """

    input: str | None = None
    target: str | None = None
    client: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """Which splits of a data set are used.

    Args:
        train: what the clients share.
        test: what is tested on; where the data set has none, a part of the training split is set
            aside.
        max_train: the most training examples that are used, drawn at random and the same in every
            run; None for all.
        max_test: the most test examples, also of those that are set aside.

    Raises:
        UsageError: a number is below 1.
    """

    train: str = "train"
    test: str = "test"
    max_train: int | None = None
    max_test: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_train", "max_test"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; allowed are numbers from 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A data set that was opened.

    Args:
        train: its training split, mapped from disk; images as they are encoded.
        test: its test split, None where there is none.
        input: the column of the images or texts.
        target: the column of the classes.
        classes: their names, in the order of their numbers.
        decoder: decodes the images; None where the inputs are texts.
    """

    train: Dataset
    test: Dataset | None
    input: str
    target: str
    classes: tuple[str, ...]
    decoder: Image | None

    @property
    def kind(self) -> Literal["image", "text"]:
        """What the inputs are."""
        return "text" if self.decoder is None else "image"

    def class_numbers(self, split: Dataset) -> dict[Any, int]:
        """Return the number of the class that each value of a split's column of classes is."""
        import datasets

        by_name: dict[Any, int] = {name: number for number, name in enumerate(self.classes)}
        feature = split.features[self.target]
        if isinstance(feature, datasets.ClassLabel):  # each split may number the names anew
            return {n: by_name[name] for n, name in enumerate(feature.names) if name in by_name}
        return by_name | {number: number for number in range(len(self.classes))}

    def targets(self, split: Dataset) -> NDArray[np.int64]:
        """Return the class numbers of a split's rows, int64, shape (n,).

        Raises:
            UsageError: a row has no class, or one that is not among the classes.
        """
        values = split[self.target][:]
        numbers = self.class_numbers(split)
        for row, value in enumerate(values):
            if value not in numbers:
                classes = ", ".join(self.classes[:5]) + (", …" if len(self.classes) > 5 else "")
                raise UsageError(
                    f"row {row} of column {self.target!r} holds {value!r}, which is none of the "
                    f"{len(self.classes)} classes {classes}"
                )
        return np.array([numbers[value] for value in values], np.int64)

    def picture(self, encoded: dict[str, Any] | None, row: int) -> Picture | None:
        """Decode an image; None where there is none.

        Args:
            encoded: what the column of images holds.
            row: where, for messages.

        Raises:
            UsageError: it cannot be decoded.
        """
        if encoded is None:
            return None
        assert self.decoder is not None
        try:
            return self.decoder.decode_example(encoded)
        except Exception as error:  # any that a decoder of one of many formats may raise
            raise UsageError(
                f"the image of row {row} cannot be decoded: {describe(error)}"
            ) from error


def open_source(name: str, *, columns: Columns, splits: Splits) -> Source:
    """Open a data set.

    Args:
        name: a file or folder (parquet, csv, json, arrow, or what `save_to_disk` wrote), or a
            data set's name on the hub.
        columns: which columns.
        splits: which splits.

    Raises:
        UsageError: it is not there, or lacks a split or column that is wanted.
    """
    train, test = _open(name, splits)
    where = f"data {name!r}"
    input_ = _column(train, columns.input, INPUT_COLUMNS, "input", where)
    target = _column(train, columns.target, TARGET_COLUMNS, "target", where)
    if columns.client is not None:
        _column(train, columns.client, (), "client", where)
    if len(train) == 0:
        raise UsageError(f"{where}: the split {splits.train!r} has no rows")
    _check_target(train, target, where)
    if test is not None:
        in_test = f"{where}, split {splits.test!r}"
        _column(test, input_, (), "input", in_test)
        _check_target(test, _column(test, target, (), "target", in_test), in_test)
    decoder = _decoder(train, input_, where)
    if decoder is not None:
        encoded = replace(decoder, decode=False)
        train = train.cast_column(input_, encoded)
        test = test.cast_column(input_, encoded) if test is not None else None
    return Source(
        train=train,
        test=test,
        input=input_,
        target=target,
        classes=_classes(train, target, where),
        decoder=decoder,
    )


def _open(name: str, splits: Splits) -> tuple[Dataset, Dataset | None]:
    import datasets

    path = Path(name).expanduser()
    if not path.exists() and (name.startswith((".", "/", "~")) or path.suffix in _BUILDERS):
        raise UsageError(f"data {name!r}: there is no such file or folder")
    datasets.disable_progress_bars()
    try:
        with _quiet():
            opened = _open_files(path, splits) if path.exists() else datasets.load_dataset(name)
    except UsageError:
        raise
    except Exception as error:  # a hub that cannot be reached, files that are none: many kinds
        hint = "" if path.exists() else "; without a network, give the path of local files"
        says_nothing = isinstance(error, datasets.exceptions.DatasetGenerationError)
        reason = describe(error.__cause__ if says_nothing and error.__cause__ else error)
        raise UsageError(f"data {name!r} cannot be opened: {reason}{hint}") from error
    if isinstance(opened, datasets.Dataset):
        opened = {splits.train: opened}
    if splits.train not in opened:
        raise UsageError(
            f"data {name!r} has the splits {', '.join(opened) or 'none'}; "
            f"data.splits.train is {splits.train!r}{nearest(splits.train, opened)}"
        )
    # Sets may be saved with a format such as torch's; values are taken as plain Python ones.
    test = opened[splits.test].with_format(None) if splits.test in opened else None
    return opened[splits.train].with_format(None), test


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep datasets from logging what is wrong, which is said in the error that it raises."""
    from datasets.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _open_files(path: Path, splits: Splits) -> Any:
    import datasets

    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        return datasets.load_from_disk(str(path))
    if path.is_file():
        files = {splits.train: [path]}
    else:
        known = sorted(f for f in path.rglob("*") if f.suffix in _BUILDERS and f.is_file())
        files = {
            split: chosen
            for split in (splits.train, splits.test)
            if (chosen := [f for f in known if f.name.startswith(split) or f.parent.name == split])
        }
        if not files.get(splits.train):
            names = ", ".join(f.name for f in known[:5]) or "no such file"
            raise UsageError(
                f"data {str(path)!r}: wanted files {splits.train}* of "
                f"{', '.join(sorted(_BUILDERS))}; there is {names}"
            )
    suffixes = {file.suffix for chosen in files.values() for file in chosen}
    builder = _BUILDERS.get(next(iter(suffixes)))
    if builder is None or len(suffixes) > 1:
        endings = ", ".join(suffix or "without an ending" for suffix in sorted(suffixes))
        raise UsageError(
            f"data {str(path)!r}: files {endings}; wanted one of {', '.join(sorted(_BUILDERS))}"
        )
    patterns = {split: [glob.escape(str(f)) for f in chosen] for split, chosen in files.items()}
    return datasets.load_dataset(builder, data_files=patterns)


def _column(
    split: Dataset, wanted: str | None, usual: Iterable[str], what: str, where: str
) -> str:
    names = split.column_names
    for name in usual if wanted is None else (wanted,):
        if name in names:
            return name
    hint = f"data.columns.{what} is {wanted!r}" if wanted else f"set data.columns.{what}"
    raise UsageError(
        f"{where} has the columns {', '.join(names)}; {hint}{nearest(wanted or '', names)}"
    )


def _decoder(train: Dataset, column: str, where: str) -> Image | None:
    """Return what decodes the images of a column; None for texts."""
    import datasets

    feature = train.features[column]
    if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
        return None
    is_encoded = isinstance(feature, dict) and "bytes" in feature
    if is_encoded or getattr(feature, "dtype", None) == "binary":
        return datasets.Image()
    if not isinstance(feature, datasets.Image):
        raise UsageError(f"{where}: column {column!r} holds {feature}; wanted images or texts")
    return replace(feature, decode=True)


def _check_target(split: Dataset, target: str, where: str) -> None:
    """Refuse a column of lists, tables or the like."""
    import datasets

    feature = split.features[target]
    if not isinstance(feature, datasets.Value | datasets.ClassLabel):
        raise UsageError(
            f"{where}: column {target!r} holds {feature}; wanted whole numbers or texts"
        )


def _classes(train: Dataset, target: str, where: str) -> tuple[str, ...]:
    import datasets

    feature = train.features[target]
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    values = train.unique(target)
    if None in values:
        raise UsageError(f"{where}: a row of column {target!r} is empty")
    if all(isinstance(value, str) for value in values):
        return tuple(sorted(values))
    if not all(isinstance(value, int) for value in values):
        raise UsageError(
            f"{where}: column {target!r} holds {feature}; wanted whole numbers or texts"
        )
    if min(values) < 0:
        raise UsageError(
            f"{where}: column {target!r} holds {min(values)}; classes are numbered from 0"
        )
    # A few numbers may be missing from a part of a set; more look like identifiers or scores.
    if max(values) >= 2 * len(values) + 100:
        raise UsageError(
            f"{where}: column {target!r} holds {len(values)} values up to {max(values)}; "
            "classes are numbered from 0 without gaps"
        )
    return tuple(map(str, range(max(values) + 1)))
