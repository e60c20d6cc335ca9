"""Word vectors: pretrained values for the embedding of a vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedobd._errors import UsageError
from fedobd._lookup import not_installed
from fedobd._seeds import make_generator


def load_vectors(path: str | Path, vocabulary: Sequence[str], *, seed: int = 0) -> torch.Tensor:
    """Load the vectors of a vocabulary's words.

    Args:
        path: a text file with a word and its numbers on each line, as GloVe comes, or a parquet
            file with the columns `word` and `vector`. In a text, what stands before the numbers
            is the word, spaces included, as in some lines of glove.840B.300d.
        vocabulary: the words in the order of their token ids; the first is the padding.
        seed: of the vectors of words that the file lacks.

    Returns:
        float32, shape (words, numbers of a vector): that of the padding is 0; one that the file
        lacks is drawn from a normal distribution with the deviation of those that it has.

    Raises:
        UsageError: the file cannot be read, is of neither form, has a number that is not finite,
            or has none of the words.
    """
    path = Path(path)
    numbers = {word: number for number, word in enumerate(vocabulary)}
    known: dict[int, NDArray[np.float32]] = {}
    width = None
    for row, (word, values) in enumerate(_rows(path)):
        width = len(values) if width is None else width
        fault = None if np.isfinite(values).all() else "numbers that are not finite"
        if len(values) != width:
            fault = f"{len(values)} numbers, the first {width}"
        if fault is not None:
            raise UsageError(f"word vectors {str(path)!r}: row {row} has {fault}")
        if word in numbers:
            known[numbers[word]] = values
    if not known or width is None:
        raise UsageError(
            f"word vectors {str(path)!r} have none of the {len(vocabulary)} words of the data"
        )
    # Known words draw too, so that what another word draws depends on its number alone.
    vectors = torch.randn(len(vocabulary), width, generator=make_generator(seed, "vectors"))
    values_of_known = torch.from_numpy(np.stack(list(known.values())))
    vectors *= values_of_known.std()
    vectors[torch.tensor(list(known))] = values_of_known
    vectors[0] = 0
    return vectors


def _rows(path: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    try:
        if path.suffix == ".parquet":
            yield from _parquet_rows(path)
        else:
            with path.open(encoding="utf-8") as lines:
                for row, line in enumerate(lines):
                    yield _parse_line(line.rstrip("\n "), row)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"word vectors {str(path)!r} cannot be read: {error}") from error


def _parse_line(line: str, row: int) -> tuple[str, NDArray[np.float32]]:
    """Take a word and its numbers apart; numbers are all that stand at the end."""
    parts = line.split(" ")
    if len(parts) == 1:
        raise ValueError(f"row {row} has no numbers")
    try:
        return parts[0], np.array(parts[1:], np.float32)
    except ValueError:
        start = len(parts) - sum(1 for _ in takewhile(_is_number, reversed(parts)))
        if start == len(parts):
            raise
        return " ".join(parts[:start]), np.array(parts[start:], np.float32)


def _is_number(part: str) -> bool:
    try:
        float(part)
    except ValueError:
        return False
    return True


def _parquet_rows(path: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    try:
        from pyarrow import parquet, types
    except ModuleNotFoundError as error:
        raise not_installed(f"word vectors: {str(path)!r}", error, "data") from error
    table: Any = parquet.read_table(path, columns=["word", "vector"])
    vectors = table["vector"]
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    if not any(is_list(vectors.type) for is_list in lists):
        raise ValueError(f"column 'vector' holds {vectors.type}; wanted lists of numbers")
    for row, (word, vector) in enumerate(zip(table["word"].to_pylist(), vectors, strict=True)):
        if not vector.is_valid:
            raise ValueError(f"row {row} has no vector")
        yield word, vector.values.to_numpy(zero_copy_only=False).astype(np.float32)
