"""Texts: from strings to token ids of one length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedobd._errors import UsageError
from fedobd._lookup import PACKAGE, checkpoint_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PADDING, UNKNOWN = "[PAD]", "[UNK]"
"""The first two entries of a vocabulary that is made here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """What is done to texts.

    Args:
        length: tokens a text, from 1: longer ones are cut, shorter ones padded.
        tokenizer: a `tokenizer.json` of Hugging Face's `tokenizers`, or a folder with one, or
            `package:name` for that of a pretrained model in an installed package; None for the
            words of the training split, in lower case.
        min_count: how often a word must occur there to get a token of its own, from 1.
        max_words: the most words that get one, the most frequent; None for all.

    Raises:
        UsageError: an option is outside what is allowed.
    """

    length: int = 300
    tokenizer: str | None = None
    min_count: int = 5
    max_words: int | None = None

    def __post_init__(self) -> None:
        for name in ("length", "min_count", "max_words"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; allowed are numbers from 1")


def make_tokenizer(options: TextOptions, texts: Iterable[str]) -> Tokenizer:
    """Read a tokenizer, or make one of the words of some texts.

    Args:
        options: which tokenizer; how long the texts become.
        texts: the training texts.

    Raises:
        UsageError: the tokenizer's file is not there or is none, or it has no padding.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    if options.tokenizer is not None:
        content = read_tokenizer(options.tokenizer)
        try:
            tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing more exact
            file = str(_tokenizer_file(options.tokenizer))
            raise UsageError(f"tokenizer {file!r} cannot be read: {error}") from error
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Replace(Regex("<[^>]*>"), " "), normalizers.Lowercase()]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordLevelTrainer(
            vocab_size=2 + options.max_words if options.max_words else 2**31 - 1,
            min_frequency=options.min_count,
            special_tokens=[PADDING, UNKNOWN],
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
    padding = (tokenizer.padding or {}).get("pad_token", PADDING)
    number = tokenizer.token_to_id(padding)
    if number is None:
        raise UsageError(
            f"the tokenizer {options.tokenizer!r} has no token {padding!r} to pad texts with"
        )
    tokenizer.enable_truncation(options.length)
    tokenizer.enable_padding(length=options.length, pad_id=number, pad_token=padding)
    return tokenizer


def read_tokenizer(name: str) -> bytes:
    """Return what the file of a tokenizer holds; see `TextOptions` for its name.

    Raises:
        UsageError: there is no such file.
    """
    file = _tokenizer_file(name)
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"tokenizer {str(file)!r} cannot be read: {error.strerror}") from error


def _tokenizer_file(name: str) -> Path:
    path = checkpoint_folder(name) if name.startswith(PACKAGE) else Path(name).expanduser()
    return path / "tokenizer.json" if path.is_dir() else path


def vocabulary(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return a tokenizer's tokens in the order of their numbers; no gap stays without a name."""
    numbers = tokenizer.get_vocab()
    tokens = [f"[gap {number}]" for number in range(max(numbers.values()) + 1)]
    for token, number in numbers.items():
        tokens[number] = token
    return tuple(tokens)


def encode_texts(texts: Iterable[list[str]], tokenizer: Tokenizer) -> Iterator[NDArray[np.int32]]:
    """Yield batches of texts as token ids, int32, shape (texts of the batch, length).

    Raises:
        UsageError: a text is missing or empty.
    """
    row = 0
    for batch in texts:
        for number, text in enumerate(batch):
            if not isinstance(text, str) or not text.strip():
                raise UsageError(f"the text of row {row + number} is empty")
        row += len(batch)
        ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(batch)]
        yield np.asarray(ids, np.int32)
