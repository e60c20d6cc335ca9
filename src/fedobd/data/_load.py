"""Load: a data set of images or texts, prepared once and mapped from disk afterwards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fedobd._errors import UsageError
from fedobd._lookup import not_installed
from fedobd._seeds import make_generator
from fedobd.data._examples import Prepare
from fedobd.data._images import ImageOptions, Normalization, decode_images
from fedobd.data._source import Columns, Source, Splits, open_source
from fedobd.data._store import Contents, StoredExamples, stored
from fedobd.data._text import TextOptions, encode_texts, make_tokenizer, read_tokenizer, vocabulary

if TYPE_CHECKING:
    from datasets import Dataset

_VERSION = 3  # of what is stored; other versions are made anew
_BATCH = 1000  # rows that are read at a time
_MOST_MEASURED = 10_000  # images that mean and deviation are taken from


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedData:
    """A data set that is ready to be shared out.

    Args:
        train: its training examples, inputs as they are stored.
        test: its test examples; None where the data set has none.
        train_numbers: which training examples are used, int64, shape (n,).
        test_numbers: which test examples are used, int64, shape (m,).
        prepare: turns stored inputs into what a model takes: uint8 images of shape (n, channels,
            height, width) into normalized float32 ones, int32 tokens of shape (n, length) into
            int64.
        classes: their names.
        vocabulary: the tokens of texts, in the order of their numbers; None for images.
        padding: the number of the token that texts are padded with; None for images.
        clients: whose each training example is, where a column says so.
    """

    train: StoredExamples
    test: StoredExamples | None
    train_numbers: torch.Tensor
    test_numbers: torch.Tensor
    prepare: Prepare
    classes: tuple[str, ...]
    vocabulary: tuple[str, ...] | None
    padding: int | None
    clients: tuple[Any, ...] | None


def load_data(
    name: str,
    *,
    columns: Columns,
    splits: Splits,
    image: ImageOptions,
    text: TextOptions,
    channels_last: bool = False,
) -> LoadedData:
    """Load a data set: decode or tokenize it, unless that was done before.

    Args:
        name: a file or folder, or a data set's name on the hub; see `open_source`.
        columns: which columns.
        splits: which splits, and how much of them.
        image: what is done to images.
        text: what is done to texts.
        channels_last: whether images lie in memory with their channels last.

    Raises:
        UsageError: `fedobd[data]` is not installed, or the data set is not there, or a row of it
            cannot be used.
    """
    try:
        source = open_source(name, columns=columns, splits=splits)
    except ModuleNotFoundError as error:
        raise not_installed(f"data {name!r}", error, "data") from error
    clients = None if columns.client is None else _owners(source.train, columns.client)
    key = _key(source, image, text)
    if source.kind == "image":
        train, test = _store(source, key, partial(_image_contents, source, image))
        # Every so many of them, in the order of the file: the same mean in every run.
        sample = train.inputs[:: max(1, len(train) // _MOST_MEASURED)]
        prepare: Prepare = Normalization.of(sample, image, channels_last=channels_last)
        words = padding = None
    else:
        train, test = _store(source, key, partial(_text_contents, source, text))
        prepare = to_token_ids
        words, padding = tuple(train.facts["vocabulary"]), train.facts["padding"]
    if test is not None and test.inputs.shape[1:] != train.inputs.shape[1:]:
        raise UsageError(
            f"data {name!r}: the test images have shape {tuple(test.inputs.shape[1:])}, those to "
            f"train on {tuple(train.inputs.shape[1:])}; set data.image.side to bring all to one "
            "size"
        )
    return LoadedData(
        train=train,
        test=test,
        train_numbers=draw_numbers(len(train), splits.max_train),
        test_numbers=draw_numbers(0 if test is None else len(test), splits.max_test),
        prepare=prepare,
        classes=source.classes,
        vocabulary=words,
        padding=padding,
        clients=clients,
    )


def to_token_ids(tokens: torch.Tensor) -> torch.Tensor:
    """Return stored tokens, of any integer type, as what models take: int64, the same shape."""
    return tokens.to(torch.int64)


def _owners(train: Dataset, column: str) -> tuple[Any, ...]:
    owners = tuple(train[column][:])
    if None in owners:
        raise UsageError(
            f"row {owners.index(None)} of column {column!r} is empty; wanted the client whose "
            "example it is"
        )
    return owners


def draw_numbers(total: int, most: int | None) -> torch.Tensor:
    """Draw so many of all examples, the same in every run.

    Args:
        total: how many examples there are.
        most: how many are drawn; None, or more than there are, for all.

    Returns:
        Their numbers in ascending order, int64, shape (examples drawn,).
    """
    if most is None or most >= total:
        return torch.arange(total)
    order = torch.randperm(total, generator=make_generator(0, "subset", total))
    return order[:most].sort().values


def _key(source: Source, image: ImageOptions, text: TextOptions) -> str:
    made_of: dict[str, Any] = {
        "version": _VERSION,
        "splits": [s._fingerprint for s in (source.train, source.test) if s is not None],
        "columns": [source.input, source.target],
    }
    if source.kind == "image":
        made_of["side"] = image.side
    else:
        made_of["text"] = asdict(text)
        if text.tokenizer is not None:
            made_of["tokenizer"] = hashlib.blake2b(read_tokenizer(text.tokenizer)).hexdigest()
    digest = hashlib.blake2b(json.dumps(made_of, sort_keys=True).encode(), digest_size=12)
    return digest.hexdigest()


def _store(
    source: Source, key: str, make: Callable[[Dataset, StoredExamples | None], Contents]
) -> tuple[StoredExamples, StoredExamples | None]:
    """Store both splits; `make` is given the stored training split with the test split."""
    train, test = stored(f"{key}-train", lambda: make(source.train, None)), source.test
    return train, None if test is None else stored(f"{key}-test", lambda: make(test, train))


def _image_contents(
    source: Source, options: ImageOptions, split: Dataset, train: StoredExamples | None
) -> Contents:
    rows = enumerate(value for batch in _batches(split, source.input) for value in batch)
    pictures = (source.picture(encoded, row) for row, encoded in rows)
    channels = None if train is None else train.inputs.shape[1]
    images = decode_images(pictures, options.side, channels)
    return (image[None] for image in images), source.targets(split), {}


def _text_contents(
    source: Source, options: TextOptions, split: Dataset, train: StoredExamples | None
) -> Contents:
    from tokenizers import Tokenizer

    targets = source.targets(split)  # before texts are read: what is wrong is said at once
    if train is not None:
        tokenizer = Tokenizer.from_str(train.facts["tokenizer"])
        return encode_texts(_batches(split, source.input), tokenizer), targets, {}
    texts = (text for batch in _batches(split, source.input) for text in batch if text)
    tokenizer = make_tokenizer(options, texts)
    assert tokenizer.padding is not None
    facts = {
        "tokenizer": tokenizer.to_str(),
        "vocabulary": vocabulary(tokenizer),
        "padding": tokenizer.padding["pad_id"],
    }
    return encode_texts(_batches(split, source.input), tokenizer), targets, facts


def _batches(split: Dataset, column: str) -> Iterator[list[Any]]:
    for batch in split.select_columns([column]).iter(_BATCH):
        yield batch[column]
