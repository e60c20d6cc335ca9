"""Load: a data set of images or texts, prepared once and mapped from disk afterwards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from fedobd._errors import UsageError
from fedobd._lookup import not_installed
from fedobd._seeds import make_generator
from fedobd.data._examples import Prepare
from fedobd.data._images import ImageOptions, Normalization, decode_images
from fedobd.data._source import Columns, Source, Splits, open_source
from fedobd.data._store import StoredExamples, Write, stored
from fedobd.data._text import TextOptions, encode_texts, make_tokenizer, read_tokenizer, vocabulary

if TYPE_CHECKING:
    from datasets import Dataset

_VERSION = 3  # of what is stored; other versions are made anew
_BATCH = 1000
_MOST_MEASURED = 10_000  # images that mean and deviation are taken from


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedData:
    """A data set that is ready to be shared out.

    Args:
        train: its training examples, inputs as they are stored.
        test: its test examples; None where the data set has none.
        train_numbers: which training examples are used, int64, shape (n,).
        test_numbers: which test examples are used.
        prepare: turns stored inputs into what a model takes.
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
        train, test = _store_images(source, key, image)
        prepare: Prepare = _normalization(train, image, channels_last)
        words = padding = None
    else:
        train, test = _store_texts(source, key, text)
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
    """Return stored tokens as what models take: int64."""
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
    """Draw so many of all examples, the same in every run; None for all. Return their numbers."""
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


def _store_images(
    source: Source, key: str, options: ImageOptions
) -> tuple[StoredExamples, StoredExamples | None]:
    def store(split: Dataset, name: str, channels: int | None = None) -> StoredExamples:
        def make(write: Write) -> None:
            targets = source.targets(split)
            rows = enumerate(p for batch in _batches(split, source.input) for p in batch)
            pictures = (source.picture(encoded, row) for row, encoded in rows)
            images = (image[None] for image in decode_images(pictures, options.side, channels))
            write(images, targets, {})

        return stored(f"{key}-{name}", make)

    train = store(source.train, "train")
    if source.test is None:
        return train, None
    return train, store(source.test, "test", channels=train.inputs.shape[1])


def _store_texts(
    source: Source, key: str, options: TextOptions
) -> tuple[StoredExamples, StoredExamples | None]:
    def make_train(write: Write) -> None:
        targets = source.targets(source.train)
        texts = (t for batch in _batches(source.train, source.input) for t in batch if t)
        tokenizer = make_tokenizer(options, texts)
        tokens = encode_texts(_batches(source.train, source.input), tokenizer)
        assert tokenizer.padding is not None
        facts = {
            "tokenizer": tokenizer.to_str(),
            "vocabulary": vocabulary(tokenizer),
            "padding": tokenizer.padding["pad_id"],
        }
        write(tokens, targets, facts)

    train = stored(f"{key}-train", make_train)

    def make_test(write: Write) -> None:
        from tokenizers import Tokenizer

        assert source.test is not None
        tokenizer = Tokenizer.from_str(train.facts["tokenizer"])
        tokens = encode_texts(_batches(source.test, source.input), tokenizer)
        write(tokens, source.targets(source.test), {})

    return train, None if source.test is None else stored(f"{key}-test", make_test)


def _batches(split: Dataset, column: str) -> Iterator[list[Any]]:
    for batch in split.select_columns([column]).iter(_BATCH):
        yield batch[column]


def _normalization(
    train: StoredExamples, options: ImageOptions, channels_last: bool
) -> Normalization:
    step = max(1, len(train) // _MOST_MEASURED)
    return Normalization.of(train.inputs[::step], options, channels_last=channels_last)
