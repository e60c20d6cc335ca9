"""Small data sets as Hugging Face publishes them, in folders of the tests' own; no network."""

from __future__ import annotations

import io
import logging
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from fedobd import cli
from fedobd.data import Columns, ImageOptions, LoadedData, Splits, TextOptions, load_data

WORDS = [
    "the", "film", "is", "a", "good", "bad", "long", "short", "story", "of", "two", "people",
    "who", "met", "once",
]  # fmt: skip


def keep_offline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put all caches into a folder, and let no library ask the network."""
    import datasets
    import huggingface_hub.constants

    connect = socket.socket.connect

    def refuse(*_: object) -> NoReturn:
        pytest.fail("a connection was tried")

    def stay(endpoint: socket.socket, address: Any) -> None:
        if endpoint.family != socket.AF_UNIX:  # between processes of this machine
            refuse()
        connect(endpoint, address)

    for name, value in caches(folder).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "hf" / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", stay)
    for handler in logging.getLogger("datasets").handlers:
        monkeypatch.setattr(handler, "stream", _Stderr())
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(folder)


class _Stderr:
    """The standard error output of now; a handler keeps that of when it was made."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def caches(folder: Path) -> dict[str, str]:
    """Return the environment that keeps a process offline, its caches in a folder."""
    return {
        "FEDOBD_CACHE": str(folder / "cache"),
        "HF_HOME": str(folder / "hf"),
        "HF_DATASETS_CACHE": str(folder / "hf" / "datasets"),
        "HF_HUB_OFFLINE": "1",
    }


def pictures(count: int, *, side: int = 8, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """Return images as uint8, shape (count, channels, side, side)."""
    shape = (count, channels, side, side)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Return an image of shape (channels, height, width) as a PNG file."""
    array = pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, 2)
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(stream, "png")
    return stream.getvalue()


def image_rows(
    images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8],
    labels: Sequence[Any],
    *,
    column: str = "img",
    target: str = "label",
) -> dict[str, list[Any]]:
    """Return columns as CIFAR-10 has them: the images as structs of a PNG file and a path."""
    encoded = [{"bytes": png(pixels), "path": f"{n}.png"} for n, pixels in enumerate(images)]
    return {column: encoded, target: list(labels)}


def write_parquet(file: Path, columns: Mapping[str, object]) -> Path:
    """Write columns to a parquet file that no library but pyarrow has seen."""
    import pyarrow as pa
    from pyarrow import parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(dict(columns)), file)
    return file


def image_folder(
    folder: Path,
    *,
    train: int = 40,
    test: int = 10,
    classes: int = 10,
    target: str = "label",
    **how: int,
) -> Path:
    """Write a data set of images in the layout of the hub; row n is of class n % classes."""
    for seed, (split, count) in enumerate({"train": train, "test": test}.items()):
        images = pictures(count, seed=seed, **how)
        rows = image_rows(images, [n % classes for n in range(count)], target=target)
        write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", rows)
    return folder


def sentences(count: int, *, seed: int = 0, length: int = 12) -> list[str]:
    """Return texts of known words; those of odd number are short of 'good'."""
    generator = np.random.default_rng(seed)
    texts = []
    for n in range(count):
        words = list(generator.choice(WORDS, length))
        words[0] = "bad" if n % 2 else "good"
        texts.append(" ".join(words))
    return texts


def text_folder(folder: Path, *, train: int = 40, test: int = 10, **how: int) -> Path:
    """Write a data set of texts in the layout of the hub; row n is of class n % 2."""
    for seed, (split, count) in enumerate({"train": train, "test": test}.items()):
        rows = {"text": sentences(count, seed=seed, **how), "label": [n % 2 for n in range(count)]}
        write_parquet(folder / "plain_text" / f"{split}-00000-of-00001.parquet", rows)
    return folder


def load(
    path: Path | str,
    *,
    columns: Columns | None = None,
    splits: Splits | None = None,
    image: ImageOptions | None = None,
    text: TextOptions | None = None,
    channels_last: bool = False,
) -> LoadedData:
    """Load a data set, all options their defaults where nothing is said."""
    return load_data(
        str(path),
        columns=columns or Columns(),
        splits=splits or Splits(),
        image=image or ImageOptions(),
        text=text or TextOptions(min_count=1, length=8),
        channels_last=channels_last,
    )


def write_vectors(file: Path, words: Sequence[str], width: int) -> torch.Tensor:
    """Write vectors as GloVe comes; return them, float32, shape (words, width)."""
    values = torch.from_numpy(
        np.random.default_rng(5).normal(0, 0.4, (len(words), width)).round(4).astype(np.float32)
    )
    lines = [
        " ".join([word, *(f"{number:.4f}" for number in row)])
        for word, row in zip(words, values.tolist(), strict=True)
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return values


class Outcome:
    """What a command did: its exit status and what it wrote."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


def fedobd(capsys: pytest.CaptureFixture[str], *words: str) -> Outcome:
    """Run the command in this process, as its entry point does."""
    before, path = sys.argv, list(sys.path)
    sys.argv = ["fedobd", *words]
    capsys.readouterr()
    try:
        cli.main()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    finally:
        sys.argv, sys.path[:] = before, path
    out, err = capsys.readouterr()
    return Outcome(status, out, err)


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the one line with which a command refuses; nothing is left behind.

    What the command line would leave is a run folder or a part of a cache entry.
    """
    done = fedobd(capsys, *words)
    assert done.status == 2, done.out + done.err
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    assert not Path("runs").exists()
    assert parts() == []
    return line.removeprefix("error: ")


def entries() -> list[str]:
    """Return the names in the cache of the working folder."""
    return sorted(path.name for path in Path("cache").glob("*"))


def parts() -> list[str]:
    """Return those of cache entries that are no whole ones."""
    return [name for name in entries() if not re.fullmatch(r"[0-9a-f]{24}-(train|test)", name)]


TINY = """
method = "fedobd"

[model]
name = "image-cnn"
options = { width = 2 }

[federation]
clients = 2
seed = 1

[training]
learning_rate = 0.05
batch_size = 8

[methods]
fedobd = { stage_one_rounds = 1, stage_one_epochs = 1, stage_two_epochs = 1, cohort = 1.0 }
fedavg = { rounds = 1, epochs = 1 }
"""
"""A configuration of two clients and two rounds; its data come by `data.name`."""


def changes(**values: Any) -> list[str]:
    """Return `--set` for keys in which `__` stands for a dot."""
    words = []
    for key, value in values.items():
        words += ["--set", f"{key.replace('__', '.')}={value}"]
    return words
