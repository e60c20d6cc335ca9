"""Sources: data sets in every form and layout, what is wrong with some, and the cache."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import threading
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedobd import UsageError
from fedobd.data import (
    Columns,
    ImageOptions,
    LoadedData,
    Splits,
    TextOptions,
    _load,
    _store,
    gather,
    move_to,
    select,
)
from fedobd.data._images import decode_images
from fedobd.data._store import StoredExamples, stored
from fedobd.experiments import RunConfig, build_data, parse_config, run
from tests.data_helpers import (
    TINY,
    changes,
    entries,
    fedobd,
    image_folder,
    image_rows,
    keep_offline,
    load,
    parts,
    pictures,
    refusal,
    sentences,
    text_folder,
    write_parquet,
)


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_offline(tmp_path, monkeypatch)
    (tmp_path / "tiny.toml").write_text(TINY, encoding="utf-8")


def texts_of(loaded: LoadedData, examples: StoredExamples | None) -> list[str]:
    """Return the texts that tokens stand for."""
    assert loaded.vocabulary is not None
    assert examples is not None
    return [
        " ".join(loaded.vocabulary[token] for token in row if token)
        for row in examples.inputs.tolist()
    ]


# Forms and layouts

TEXTS, LABELS = sentences(6, length=6), [0, 1, 1, 0, 1, 0]


def as_parquet(folder: Path) -> Path:
    return write_parquet(folder / "set.parquet", {"text": TEXTS, "label": LABELS})


def as_csv(folder: Path) -> Path:
    lines = [f'"{text}",{label}' for text, label in zip(TEXTS, LABELS, strict=True)]
    (folder / "set.csv").write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    return folder / "set.csv"


def as_jsonl(folder: Path) -> Path:
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
    (folder / "set.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder / "set.jsonl"


def as_json(folder: Path) -> Path:
    return as_jsonl(folder).rename(folder / "set.json")


def as_arrow(folder: Path) -> Path:
    import pyarrow as pa

    table = pa.table({"text": TEXTS, "label": LABELS})
    with (
        pa.OSFile(str(folder / "set.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as writer,
    ):
        writer.write_table(table)
    return folder / "set.arrow"


def as_saved(folder: Path) -> Path:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": TEXTS, "label": LABELS}).save_to_disk(folder / "set")
    return folder / "set"


datasets_leaves_csv_open = pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning",
    "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning",
)
"""The csv reader of `datasets` leaves the closing of files to the garbage collector."""

FORMS = [
    as_parquet,
    pytest.param(as_csv, marks=datasets_leaves_csv_open),
    as_jsonl,
    as_json,
    as_arrow,
    as_saved,
]


@pytest.mark.parametrize("form", FORMS)
def test_one_file_of_any_form_is_a_training_split(
    form: Callable[[Path], Path], tmp_path: Path
) -> None:
    loaded = load(form(tmp_path))
    assert texts_of(loaded, loaded.train) == TEXTS
    assert loaded.train.targets.tolist() == LABELS
    assert (loaded.test, loaded.classes) == (None, ("0", "1"))
    assert len(loaded.test_numbers) == 0


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("train.parquet", "test.parquet"),
        ("train/0000.parquet", "test/0000.parquet"),
    ],
)
def test_folders_in_the_layouts_of_the_hub_have_two_splits(
    train: str, test: str, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    write_parquet(folder / train, {"text": TEXTS, "label": LABELS})
    write_parquet(folder / test, {"text": TEXTS[3:], "label": LABELS[3:]})
    (folder / "README.md").write_text("what it is", encoding="utf-8")
    loaded = load(folder)
    assert texts_of(loaded, loaded.train) == TEXTS
    assert texts_of(loaded, loaded.test) == TEXTS[3:]
    assert loaded.test is not None
    assert loaded.test.targets.tolist() == LABELS[3:]


def test_a_split_of_several_files_is_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for number in (2, 0, 1):
        rows = slice(2 * number, 2 * number + 2)
        columns = {"text": TEXTS[rows], "label": LABELS[rows]}
        write_parquet(folder / f"train-{number:05}-of-00003.parquet", columns)
    loaded = load(folder)
    assert texts_of(loaded, loaded.train) == TEXTS
    assert loaded.train.targets.tolist() == LABELS


def test_splits_have_the_names_that_are_given(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    made = datasets.Dataset.from_dict({"text": TEXTS, "label": LABELS})
    both = {"learn": made, "judge": made.select(range(2))}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "saved")
    loaded = load(tmp_path / "saved", splits=Splits(train="learn", test="judge"))
    assert (len(loaded.train), len(loaded.test or ())) == (6, 2)
    alone = load(tmp_path / "saved", splits=Splits(train="judge"))
    assert (len(alone.train), alone.test) == (2, None)


def test_saved_images_and_their_classes_are_read(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    images = pictures(6)
    names = ["cat", "dog", "bird"]
    features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=names))
    rows = image_rows(images, [0, 1, 2, 0, 1, 1])
    made = datasets.Dataset.from_dict(rows, features=features)
    split = {"train": made, "test": made.select([2, 5])}
    datasets.DatasetDict(split).save_to_disk(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert loaded.classes == ("cat", "dog", "bird")
    assert loaded.vocabulary is None
    assert np.array_equal(loaded.train.inputs.numpy(), images)
    assert loaded.test is not None
    assert np.array_equal(loaded.test.inputs.numpy(), images[[2, 5]])
    assert loaded.test.targets.tolist() == [2, 1]
    assert loaded.train.targets.tolist() == [0, 1, 2, 0, 1, 1]


# Columns and classes


@pytest.mark.parametrize(
    ("name", "target"),
    [("text", "label"), ("sentence", "labels"), ("content", "fine_label"), ("review", "target")],
)
def test_usual_names_of_columns_are_found(name: str, target: str, tmp_path: Path) -> None:
    columns = {"idx": list(range(6)), name: TEXTS, target: LABELS}
    loaded = load(write_parquet(tmp_path / "a.parquet", columns))
    assert texts_of(loaded, loaded.train) == TEXTS
    assert loaded.train.targets.tolist() == LABELS


def test_columns_are_those_that_are_given(tmp_path: Path) -> None:
    other = [text.upper() for text in reversed(TEXTS)]
    columns = {
        "text": TEXTS, "label": LABELS, "title": other, "stars": [2, 0, 1, 2, 0, 1],
    }  # fmt: skip
    file = write_parquet(tmp_path / "a.parquet", columns)
    loaded = load(file, columns=Columns(input="title", target="stars"))
    assert texts_of(loaded, loaded.train) == [text.lower() for text in other]
    assert loaded.train.targets.tolist() == [2, 0, 1, 2, 0, 1]
    assert loaded.classes == ("0", "1", "2")
    images = write_parquet(tmp_path / "b.parquet", image_rows(pictures(4), [0, 1] * 2))
    assert np.array_equal(load(images).train.inputs.numpy(), pictures(4))


def test_classes_of_text_are_in_the_order_of_the_alphabet_in_both_splits(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    names = ["pos", "neg", "neutral", "neg", "pos", "pos"]
    write_parquet(folder / "train.parquet", {"text": TEXTS, "label": names})
    write_parquet(folder / "test.parquet", {"text": TEXTS[:2], "label": ["pos", "neutral"]})
    loaded = load(folder)
    assert loaded.classes == ("neg", "neutral", "pos")
    assert loaded.train.targets.tolist() == [2, 0, 1, 0, 2, 2]
    assert loaded.test is not None
    assert loaded.test.targets.tolist() == [2, 1]


def test_numbered_classes_count_to_the_highest_one(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", {"text": TEXTS, "label": [0, 4, 2, 2, 0, 4]})
    loaded = load(file)
    assert loaded.classes == ("0", "1", "2", "3", "4")
    assert loaded.train.targets.tolist() == [0, 4, 2, 2, 0, 4]


def test_true_and_false_are_two_classes(tmp_path: Path) -> None:
    labels = [True, False, False, True, True, False]
    loaded = load(write_parquet(tmp_path / "a.parquet", {"text": TEXTS, "label": labels}))
    assert loaded.classes == ("0", "1")
    assert loaded.train.targets.tolist() == list(map(int, labels))


# How much of it


def test_so_many_examples_are_the_same_in_every_run(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "set", train=60, test=30)
    splits = Splits(max_train=25, max_test=7)
    first, again = load(folder, splits=splits), load(folder, splits=splits)
    assert (len(first.train_numbers), len(first.test_numbers)) == (25, 7)
    assert torch.equal(first.train_numbers, again.train_numbers)
    assert torch.equal(first.test_numbers, again.test_numbers)
    assert len(set(first.train_numbers.tolist())) == 25
    assert first.train_numbers.tolist() != list(range(25))  # a random part, not the head
    assert int(first.train_numbers.max()) < 60
    used = []
    for seed in (1, 2):
        values = {"data": {"name": str(folder), "splits": {"max_train": 25, "max_test": 7}}}
        built = build_data(
            parse_config({**values, "federation": {"clients": 3, "seed": seed}})
        ).federated
        clients = [gather(client.train).inputs for client in built.clients]
        clients += [gather(client.validation).inputs for client in built.clients]
        used.append((sorted(torch.cat(clients).tolist()), gather(built.test).inputs.tolist()))
        assert len(used[-1][0]) == 25
    assert used[0] == used[1]


def test_more_than_there_are_means_all(tmp_path: Path) -> None:
    loaded = load(text_folder(tmp_path / "set"), splits=Splits(max_train=1000, max_test=10))
    assert loaded.train_numbers.tolist() == list(range(40))
    assert loaded.test_numbers.tolist() == list(range(10))


def test_a_part_is_set_aside_where_there_is_no_test_split(tmp_path: Path) -> None:
    texts = [f"text number w{n}" for n in range(50)]
    file = write_parquet(tmp_path / "a.parquet", {"text": texts, "label": [0, 1] * 25})

    def shared(seed: int, **data: Any) -> tuple[set[int], set[int]]:
        values = {"name": str(file), "test_fraction": 0.3, "text": {"min_count": 1}, **data}
        built = build_data(
            parse_config({"data": values, "federation": {"clients": 4, "seed": seed}})
        ).federated
        held: list[int] = []
        for client in built.clients:
            held += gather(client.train).inputs[:, 2].tolist()
            held += gather(client.validation).inputs[:, 2].tolist()
        tested = gather(built.test).inputs[:, 2].tolist()
        assert len({*held, *tested}) == len(held) + len(tested)
        return set(held), set(tested)

    held, tested = shared(0)
    assert (len(held), len(tested)) == (35, 15)
    assert shared(0) == (held, tested)
    assert shared(1)[1] != tested
    part_held, part_tested = shared(0, splits={"max_train": 20})
    assert (len(part_held), len(part_tested)) == (14, 6)


def test_max_test_holds_for_what_is_set_aside(tmp_path: Path) -> None:
    values = {"name": str(as_parquet(tmp_path)), "splits": {"max_test": 1}, "test_fraction": 0.5}
    built = build_data(parse_config({"data": values, "federation": {"clients": 2}}))
    assert len(built.federated.test) == 1


@pytest.mark.parametrize("name", ["max_train", "max_test"])
def test_none_of_the_examples_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=rf"{name} is 0; allowed are numbers from 1"):
        replace(Splits(), **{name: 0})  # type: ignore[arg-type]


# What is wrong

Make = Callable[[Path], str]


def missing(_: Path) -> str:
    return "./nothing.parquet"


def not_reachable(_: Path) -> str:
    return "uoft-cs/cifar10"


def other_columns(folder: Path) -> str:
    return str(write_parquet(folder / "a.parquet", {"picture": TEXTS, "label": LABELS}))


def no_labels(folder: Path) -> str:
    return str(write_parquet(folder / "a.parquet", {"text": TEXTS, "lable": LABELS}))


def no_train_files(folder: Path) -> str:
    write_parquet(folder / "set" / "validation.parquet", {"text": TEXTS, "label": LABELS})
    return "./set"


def other_splits(folder: Path) -> str:
    import datasets

    datasets.disable_progress_bars()
    made = datasets.Dataset.from_dict({"text": TEXTS, "label": LABELS})
    datasets.DatasetDict({"trained": made, "dev": made}).save_to_disk(folder / "set")
    return "./set"


def texts_with(*labels: Any, test: tuple[Any, ...] | None = None) -> Make:
    def make(folder: Path) -> str:
        columns = {"text": TEXTS[: len(labels)], "label": list(labels)}
        write_parquet(folder / "set" / "train.parquet", columns)
        if test is not None:
            columns = {"text": TEXTS[: len(test)], "label": list(test)}
            write_parquet(folder / "set" / "test.parquet", columns)
        return "./set"

    return make


def with_text(text: str | None) -> Make:
    def make(folder: Path) -> str:
        texts = [*TEXTS[:4], text, TEXTS[5]]
        write_parquet(folder / "set" / "train.parquet", {"text": texts, "label": LABELS})
        write_parquet(folder / "set" / "test.parquet", {"text": TEXTS, "label": LABELS})
        return "./set"

    return make


def unlabelled_test(folder: Path) -> str:
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["neg", "pos"])
    )
    made = datasets.Dataset.from_dict({"text": TEXTS, "label": LABELS}, features=features)
    hidden = datasets.Dataset.from_dict({"text": TEXTS, "label": [-1] * 6}, features=features)
    datasets.DatasetDict({"train": made, "test": hidden}).save_to_disk(folder / "set")
    return "./set"


def sizes(folder: Path) -> str:
    images = [*pictures(3), *pictures(1, side=6), *pictures(4)]
    write_parquet(folder / "set" / "train.parquet", image_rows(images, [0, 1] * 4))
    return "./set"


def other_test_size(folder: Path) -> str:
    write_parquet(folder / "set" / "train.parquet", image_rows(pictures(8), [0, 1] * 4))
    write_parquet(folder / "set" / "test.parquet", image_rows(pictures(4, side=9), [0, 1] * 2))
    return "./set"


def no_image(folder: Path) -> str:
    rows = image_rows(pictures(8), [0, 1] * 4)
    rows["img"][5] = None
    write_parquet(folder / "set" / "train.parquet", rows)
    return "./set"


def damaged(folder: Path) -> str:
    file = write_parquet(folder / "set" / "train.parquet", {"text": TEXTS, "label": LABELS})
    data = bytearray(file.read_bytes())
    data[4:80] = bytes(76)
    file.write_bytes(data)
    return "./set"


def no_parquet(folder: Path) -> str:
    (folder / "set").mkdir()
    (folder / "set" / "train.parquet").write_bytes(b"this is no parquet file")
    return "./set"


def no_json(folder: Path) -> str:
    (folder / "set.jsonl").write_text('{"text": "good", "label": 1}\n{"text":\n', encoding="utf-8")
    return "./set.jsonl"


def mixed(folder: Path) -> str:
    write_parquet(folder / "set" / "train.parquet", {"text": TEXTS, "label": LABELS})
    as_csv(folder).rename(folder / "set" / "test.csv")
    return "./set"


def of_no_form(folder: Path) -> str:
    (folder / "set.txt").write_text("good film, 1\n", encoding="utf-8")
    return "./set.txt"


def numbers(folder: Path) -> str:
    return str(write_parquet(folder / "a.parquet", {"text": [1.5] * 6, "label": LABELS}))


OPENING: list[tuple[Make, str]] = [
    (missing, r"data './nothing.parquet': there is no such file or folder"),
    (not_reachable, r"data 'uoft-cs/cifar10' cannot be opened: ConnectionError: .*cifar10.*; "
     r"without a network, give the path of local files"),
    (other_columns, r"data .*a.parquet' has the columns picture, label; set data.columns.input"),
    (no_labels, r"has the columns text, lable; set data.columns.target"),
    (no_train_files, r"data 'set': wanted files train\* of .arrow, .csv, .json, .jsonl, "
     r".parquet; there is validation.parquet"),
    (other_splits, r"data './set' has the splits trained, dev; data.splits.train is 'train'; "
     r"did you mean 'trained'\?"),
    (texts_with(0, 1, -1, 0), r"column 'label' holds -1; classes are numbered from 0"),
    (texts_with(0, 1, None, 0), r"data './set': a row of column 'label' is empty"),
    (texts_with(0, 70_000, 2), r"column 'label' holds 3 values up to 70000; classes are numbered "
     r"from 0 without gaps"),
    (texts_with(0.5, 1.0), r"column 'label' holds .*; wanted whole numbers or texts"),
    (damaged, r"data './set' cannot be opened: "),
    (mixed, r"data 'set': files .csv, .parquet; wanted one of .arrow, .csv, .json"),
    (of_no_form, r"data 'set.txt': files .txt; wanted one of .arrow, .csv, .json"),
    (numbers, r"column 'text' holds .*; wanted images or texts"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"), OPENING, ids=[f"{n}-{m.__name__}" for n, (m, _) in enumerate(OPENING)]
)
def test_what_cannot_be_opened_is_refused_with_one_line(
    make: Make, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capfd, "data", "check", make(tmp_path))
    assert_matches(message, said)
    assert entries() == []


@pytest.mark.parametrize("command", [["run"], ["data", "partition"]], ids=" ".join)
def test_every_command_refuses_what_cannot_be_opened(
    command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make, message = OPENING[2]
    assert_matches(
        message, refusal(capfd, *command, "tiny.toml", *changes(data__name=make(tmp_path)))
    )
    assert entries() == []


def assert_matches(message: str, said: str) -> None:
    assert re.search(message, said), said


@pytest.mark.parametrize("make", [no_parquet, no_json], ids=lambda make: make.__name__)
def test_files_that_are_none_are_refused_with_one_line(
    make: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = make(tmp_path)
    said = refusal(capfd, "data", "check", name)
    assert_matches(rf"data '{name}' cannot be opened: .*(Parquet|JSON)", said)


PREPARING: list[tuple[Make, dict[str, Any], str]] = [
    (texts_with(0, 1, 2, 1, test=(0, 3)), {}, r"row 1 of column 'label' holds 3, which is none of "
     r"the 3 classes 0, 1, 2"),
    (texts_with("neg", "pos", "pos", test=("neg", "so-so")), {}, r"row 1 of column 'label' holds "
     r"'so-so', which is none of the 2 classes neg, pos"),
    (unlabelled_test, {}, r"row 0 of column 'label' holds -1, which is none of the 2 classes neg"),
    (sizes, {}, r"the image of row 3 is 6 by 6 pixels, the first one 8 by 8; set data.image.side "
     r"to bring all to one size"),
    (other_test_size, {}, r"data './set': the test images have shape \(3, 9, 9\), those to train "
     r"on \(3, 8, 8\); set data.image.side"),
    (no_image, {}, r"row 5 has no image"),
    (with_text(""), {}, r"the text of row 4 is empty"),
    (with_text(" \n"), {}, r"the text of row 4 is empty"),
    (with_text(None), {}, r"the text of row 4 is empty"),
    (texts_with(0, 1, 0, 1), {"federation__clients": 4}, r"3 examples cannot be shared among 4 "
     r"clients; allowed are 1 to 3 clients"),
    (texts_with(0, 1, 0, 1, 0, 1), {"data__partition__name": "natural"},
     r"the partition 'natural' wants data.columns.client"),
    (texts_with(0, 1), {"data__columns__client": "lable"}, r"has the columns text, label; "
     r"data.columns.client is 'lable'; did you mean 'label'\?"),
    (texts_with(0, 1), {"data__columns__input": "txt"}, r"has the columns text, label; "
     r"data.columns.input is 'txt'; did you mean 'text'\?"),
    (texts_with(0, 1), {"data__columns__target": "Label"}, r"data.columns.target is 'Label'; "
     r"did you mean 'label'\?"),
    (texts_with(0, 1), {"data__splits__train": "trains"}, r"data 'set': wanted files trains\*"),
    (texts_with(0, 1), {"data__splits__max_train": 0}, r"data.splits: max_train is 0; allowed"),
    (texts_with(0, 1), {"data__image__side": 0}, r"data.image: side is 0; allowed are numbers"),
    (texts_with(0, 1), {"data__text__length": 0}, r"data.text: length is 0; allowed are numbers"),
    (texts_with(0, 1), {"data__partition__name": "iids"}, r"data.partition.name: 'iids' is not "
     r"allowed: .*'iid', 'dirichlet'"),
    (texts_with(0, 1), {"data__text__tokenizer": "none.json"}, r"tokenizer 'none.json' cannot be "
     r"read: "),
    (texts_with(0, 1), {"data__test_path": "a.npz"}, r"data.test_path is for data 'nodes'; data "
     r"is './set'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "values", "message"),
    PREPARING,
    ids=[f"{n}-{m.__name__}" for n, (m, _, _) in enumerate(PREPARING)],
)
def test_what_cannot_be_prepared_is_refused_and_leaves_no_part(
    make: Make,
    values: dict[str, Any],
    message: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    settings = changes(data__name=make(tmp_path), **values)
    assert_matches(message, refusal(capfd, "data", "partition", "tiny.toml", *settings))
    again = refusal(capfd, "run", "tiny.toml", *settings)  # nothing of it was kept
    assert_matches(message, again)


@pytest.mark.parametrize("make", [sizes, other_test_size], ids=lambda make: make.__name__)
def test_side_brings_images_of_unequal_size_to_one(make: Make, tmp_path: Path) -> None:
    loaded = load(make(tmp_path), image=ImageOptions(side=8))
    for examples in (loaded.train, loaded.test):
        assert examples is None or examples.inputs.shape == (len(examples), 3, 8, 8)


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(
    "row", [{"bytes": b"no PNG file", "path": None}, {"bytes": None, "path": None}]
)
def test_an_image_that_cannot_be_decoded_is_named(
    row: dict[str, Any], command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = image_rows(pictures(8), [0, 1] * 4)
    rows["img"][5] = row
    write_parquet(tmp_path / "set" / "train.parquet", rows)
    if command == "run":
        said = refusal(capfd, "run", "tiny.toml", *changes(data__name="./set"))
        assert_matches(r"row 5", said)
    else:
        done = fedobd(capfd, "data", "check", "./set")
        assert done.status == 2
        assert_matches(r"wrong: split 'train': .*\(5\)", done.out)


def test_an_image_that_is_too_large_to_decode_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [*pictures(3, side=4), *pictures(1)]
    write_parquet(tmp_path / "set" / "train.parquet", image_rows(images, [0, 1] * 2))
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 20)
    with pytest.raises(UsageError, match=r"image of row 3 cannot be decoded: DecompressionBomb"):
        load(tmp_path / "set", image=ImageOptions(side=4))


def test_a_column_that_the_test_split_lacks_is_named_by_its_key(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    train = datasets.Dataset.from_dict({"text": TEXTS, "label": LABELS})
    test = datasets.Dataset.from_dict({"words": TEXTS, "label": LABELS})
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "set")
    with pytest.raises(UsageError, match=r"split 'test' has the columns words, label") as caught:
        load(tmp_path / "set")
    assert "data.columns.test" not in str(caught.value)


def test_lists_of_classes_are_refused(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", {"text": TEXTS, "label": [[0], [1]] * 3})
    with pytest.raises(UsageError, match=r"column 'label' holds .*; wanted whole numbers or text"):
        load(file)


def test_paths_with_brackets_are_paths(tmp_path: Path) -> None:
    file = as_parquet(tmp_path).rename(tmp_path / "set[1].parquet")
    assert len(load(file).train) == 6


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_without_rows_is_refused(split: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in ("train", "test"):
        as_jsonl(tmp_path).rename(tmp_path / "set" / f"{name}.jsonl")
    (tmp_path / "set" / f"{split}.jsonl").write_text("", encoding="utf-8")
    message = rf"data './set'( cannot be opened: |: the split '{split}' has no rows)"
    with pytest.raises(UsageError, match=message):
        load("./set")


def small(data: dict[str, Any], **changes: Any) -> RunConfig:
    return parse_config(tomllib.loads(TINY) | {"data": data} | changes)


TRANSFORMER = {"name": "transformer", "options": {"d_model": 4, "nhead": 1, "dim_feedforward": 4}}


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("images", {"model": {"name": "image-cnn", "options": {"num_classes": 3}}},
         r"model 'image-cnn' with loss 'cross-entropy' tells 3 classes apart; data './set' has 4 "
         r"classes: set model.options.num_classes"),
        ("images", {"training": {"loss": "binary-cross-entropy"}}, r"with loss "
         r"'binary-cross-entropy' tells 2 classes apart; data './set' has 4 classes"),
        ("images", {"model": {"name": "image-cnn", "options": {"in_channels": 1}}},
         r"model 'image-cnn' does not fit data './set', examples of shape \(3, 8, 8\): "
         r"RuntimeError: .*channels"),
        ("texts", {}, r"model 'image-cnn' does not fit data './set', texts of 8 tokens: "),
        ("texts", {"model": TRANSFORMER}, r"'cross-entropy' tells 1 classes apart; data './set' "
         r"has 2 classes: set model.options.num_outputs"),
        ("texts", {"model": TRANSFORMER, "data": {"image": {"flip": True}}}, r"data.image.flip "
         r"and data.image.crop_padding are for images; data './set' holds texts of 8 tokens"),
        ("images", {"model": TRANSFORMER}, r"model 'transformer': missing .*'vocab_size'"),
    ],
)  # fmt: skip
def test_models_and_options_that_do_not_fit_the_data_are_refused(
    kind: str, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    if kind == "images":
        image_folder(folder, classes=4)
        data: dict[str, Any] = {"name": "./set"}
    else:
        text_folder(folder)
        data = {"name": "./set", "text": {"min_count": 1, "length": 8}}
    config = small(
        {**data, **values.get("data", {})}, **{k: values[k] for k in values if k != "data"}
    )
    with pytest.raises(UsageError, match=message):
        run(config, tmp_path / "out")


# Cache


def counting(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Count the calls of a function that makes what is stored."""
    calls: list[str] = []
    inner = getattr(_load, name)

    def counted(*words: Any, **options: Any) -> Any:
        calls.append(name)
        return inner(*words, **options)

    monkeypatch.setattr(_load, name, counted)
    return calls


def test_images_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = image_folder(tmp_path / "set")
    calls = counting(monkeypatch, "decode_images")
    first = load(folder)
    assert len(calls) == 2
    assert len(entries()) == 2
    again = load(folder, splits=Splits(max_train=5), image=ImageOptions(mean=(0.5,) * 3))
    assert len(calls) == 2
    assert len(entries()) == 2
    assert torch.equal(first.train.inputs, again.train.inputs)
    assert torch.equal(first.train.targets, again.train.targets)
    load(folder, image=ImageOptions(side=4))
    assert len(calls) == 4
    assert len(entries()) == 4
    assert parts() == []


def test_texts_are_tokenized_once_for_each_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = text_folder(tmp_path / "set")
    calls = counting(monkeypatch, "encode_texts")
    first = load(folder)
    again = load(folder)
    assert len(calls) == 2
    assert first.vocabulary == again.vocabulary
    assert torch.equal(first.train.inputs, again.train.inputs)
    for number, options in enumerate(
        (
            TextOptions(min_count=1, length=9),
            TextOptions(min_count=2, length=9),
            TextOptions(min_count=1, length=9, max_words=3),
        ),
        start=2,
    ):
        for _ in range(2):
            load(folder, text=options)
        assert len(calls) == 2 * number
        assert len(entries()) == 2 * number


def test_other_columns_are_another_entry(tmp_path: Path) -> None:
    columns = {"text": TEXTS, "label": LABELS, "title": TEXTS[::-1], "stars": LABELS[::-1]}
    file = write_parquet(tmp_path / "a.parquet", columns)
    first = load(file)
    second = load(file, columns=Columns(input="title"))
    third = load(file, columns=Columns(target="stars"))
    assert texts_of(second, second.train) == texts_of(first, first.train)[::-1] == TEXTS[::-1]
    assert third.train.targets.tolist() == LABELS[::-1]
    assert len(entries()) == 3


def test_a_file_that_has_changed_is_read_anew(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", {"text": TEXTS, "label": LABELS})
    load(file)
    write_parquet(file, {"text": TEXTS[::-1], "label": [1 - n for n in LABELS]})
    os.utime(file, (0, 0))  # another time of change, on any clock
    loaded = load(file)
    assert texts_of(loaded, loaded.train) == TEXTS[::-1]
    assert loaded.train.targets.tolist() == [1 - n for n in LABELS]
    assert len(entries()) == 2


def tokenizer_file(file: Path, words: list[str]) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    numbers = {word: n for n, word in enumerate(["[PAD]", "[UNK]", *words])}
    made = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))  # noqa: S106 - no password
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    file.parent.mkdir(exist_ok=True)
    made.save(str(file))
    return file


@pytest.mark.parametrize("by_folder", [False, True])
def test_a_tokenizer_that_has_changed_is_used(by_folder: bool, tmp_path: Path) -> None:
    texts = write_parquet(tmp_path / "a.parquet", {"text": TEXTS, "label": LABELS})
    file = tokenizer_file(tmp_path / "own" / "tokenizer.json", ["good", "bad"])
    options = TextOptions(length=8, tokenizer=str(file.parent if by_folder else file))
    assert load(texts, text=options).vocabulary == ("[PAD]", "[UNK]", "good", "bad")
    tokenizer_file(file, ["film"])
    assert load(texts, text=options).vocabulary == ("[PAD]", "[UNK]", "film")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_or_ctrl_c_leaves_no_part(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = image_folder(tmp_path / "set")
    inner = decode_images

    def fails(*given: Any) -> Any:
        for number, image in enumerate(inner(*given)):
            if number == 7:
                raise error("stop")
            yield image

    monkeypatch.setattr(_load, "decode_images", fails)
    with pytest.raises(error, match="stop"):
        load(folder)
    assert entries() == []
    monkeypatch.setattr(_load, "decode_images", inner)
    assert len(load(folder).train) == 40


def test_what_is_stored_goes_to_another_process_as_a_path(tmp_path: Path) -> None:
    loaded = load(image_folder(tmp_path / "set"))
    data = pickle.dumps(loaded.train)
    assert len(data) < 500
    again = pickle.loads(data)  # noqa: S301 - our own bytes
    assert torch.equal(again.inputs, loaded.train.inputs)
    assert torch.equal(again.targets, loaded.train.targets)
    assert torch.equal(
        again.take(torch.tensor([3, 1])).inputs, loaded.train.inputs[torch.tensor([3, 1])]
    )


def test_writing_to_what_is_mapped_does_not_change_the_file(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "set")
    loaded = load(folder)
    before = loaded.train.inputs.clone()
    loaded.train.inputs.zero_()
    assert torch.equal(load(folder).train.inputs, before)


def test_a_set_lies_on_the_device_where_it_fits(tmp_path: Path) -> None:
    """The device without memory, "meta", stands for a GPU: it keeps shapes and places alone."""
    meta, loaded = torch.device("meta"), load(image_folder(tmp_path / "set"))
    size = loaded.train.inputs.nbytes + loaded.train.targets.nbytes
    for examples in (loaded.train, gather(loaded.train)):
        assert move_to(examples, meta, most_bytes=size - 1) is examples
        moved = move_to(examples, meta, most_bytes=size)
        taken = select(moved, torch.arange(1, len(moved))).take(torch.tensor([2, 0]))
        assert (taken.inputs.device, taken.targets.device) == (meta, meta)
        assert taken.inputs.shape == (2, *loaded.train.inputs.shape[1:])


def test_a_gpu_holds_data_that_take_a_quarter_of_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, torch.device, int]] = []

    def note(examples: Any, device: torch.device, *, most_bytes: int) -> Any:
        asked.append((len(examples), device, most_bytes))
        return examples

    monkeypatch.setattr("fedobd.experiments._data.move_to", note)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (4000, 9000))
    settings = parse_config(
        {**tomllib.loads(TINY), "data": {"name": str(image_folder(tmp_path / "set"))}}
    )
    here = build_data(settings).federated
    assert asked == []
    there = build_data(settings, "cuda:1", workers=3).federated  # each process with a copy
    loaded = load(tmp_path / "set")
    assert loaded.test is not None
    wanted = [(len(part), torch.device("cuda:1"), 250) for part in (loaded.test, loaded.train)]
    assert sorted(asked, key=str) == sorted(wanted, key=str)
    for one, other in zip(here.clients, there.clients, strict=True):
        assert torch.equal(gather(one.train).inputs, gather(other.train).inputs)


def test_two_that_make_the_same_entry_at_once_both_get_it() -> None:
    both = threading.Barrier(2, timeout=10)
    results: list[StoredExamples] = []

    def batches() -> Iterator[NDArray[np.uint8]]:
        yield np.ones((3, 2), np.uint8)
        both.wait()  # each has made its own

    def make() -> Any:
        both.wait()  # each has seen that there is none
        return batches(), np.arange(3), {"a": 1}

    def want() -> None:
        results.append(stored("0" * 24 + "-train", make))

    threads = [threading.Thread(target=want) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [examples.facts for examples in results] == [{"a": 1}] * 2
    assert all(torch.equal(e.targets, torch.arange(3)) for e in results)
    assert (len(entries()), parts()) == (1, [])


def test_a_disk_that_is_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of the size of files stands for it; Python ignores the signal that goes with it."""
    folder = image_folder(tmp_path / "set", train=400)
    load(folder / "data" / "test-00000-of-00001.parquet")  # what is read is in the caches
    monkeypatch.setenv("FEDOBD_CACHE", str(tmp_path / "full"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    inner = _store._write

    def write(*given: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        try:
            inner(*given)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(_store, "_write", write)
    with pytest.raises(UsageError, match=r"the cache '.*full' cannot be written: File too large"):
        load(folder)
    assert list((tmp_path / "full").iterdir()) == []


def test_a_cache_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = image_folder(tmp_path / "set")
    load(folder)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("numpy.load", refuse)
    with pytest.raises(UsageError, match=r"cache '.*cache' cannot be read: Permission denied"):
        load(folder)


def test_others_may_read_what_is_in_the_cache(tmp_path: Path) -> None:
    load(image_folder(tmp_path / "set"))
    usual = tmp_path / "usual"
    usual.mkdir()
    assert len(entries()) == 2
    for name in entries():
        assert Path("cache", name).stat().st_mode == usual.stat().st_mode


def test_the_classes_of_a_split_go_by_their_names(tmp_path: Path) -> None:
    import datasets

    def made(names: list[str], labels: list[int]) -> Any:
        features = datasets.Features(
            text=datasets.Value("string"), label=datasets.ClassLabel(names=names)
        )
        rows = {"text": ["a b"] * len(labels), "label": labels}
        return datasets.Dataset.from_dict(rows, features=features)

    train = made(["cat", "cow", "dog"], [0, 1, 2])
    for names, wanted in ((["cat", "dog"], [0, 2, 2]), (["dog", "cat"], [2, 0, 0])):
        split = datasets.DatasetDict({"train": train, "test": made(names, [0, 1, 1])})
        split.save_to_disk(tmp_path / "-".join(names))
        test = load(tmp_path / "-".join(names)).test
        assert test is not None
        assert test.targets.tolist() == wanted
    split = datasets.DatasetDict({"train": train, "test": made(["cat", "hen"], [0, 1])})
    split.save_to_disk(tmp_path / "other")
    with pytest.raises(UsageError, match=r"row 1 of column 'label' holds 1, which is none"):
        load(tmp_path / "other")


def test_a_set_that_was_saved_with_a_format_is_as_without(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import datasets

    rows = {"text": ["a b", "c"] * 4, "label": [0, 1] * 4, "who": [0, 0, 1, 1] * 2}
    datasets.Dataset.from_dict(rows).with_format("torch").save_to_disk(tmp_path / "set")
    loaded = load(tmp_path / "set", columns=Columns(client="who"))
    assert loaded.clients == (0, 0, 1, 1) * 2
    done = fedobd(capfd, "data", "check", "set")
    assert done.status == 0, done.out


def test_options_of_data_are_for_ones_own_function(tmp_path: Path) -> None:
    for name in ("digits", "nodes", str(image_folder(tmp_path / "set"))):
        settings = parse_config({"data": {"name": name, "options": {"size": 3}}})
        with pytest.raises(UsageError, match=r"data.options is for your own function; data is"):
            build_data(settings)


def test_fewer_of_the_digits(tmp_path: Path) -> None:
    values = {"name": "digits", "splits": {"max_train": 50, "max_test": 7}}
    built = build_data(parse_config({"data": values, "federation": {"clients": 2}})).federated
    assert sum(len(c.train) + len(c.validation) for c in built.clients) == 40
    assert len(built.test) == 7


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = as_parquet(tmp_path)
    monkeypatch.setenv("FEDOBD_CACHE", str(file))  # a file, not a folder
    assert_matches(
        r"set.parquet.* cannot be written",
        refusal(capfd, "run", "tiny.toml", *changes(data__name="./set.parquet")),
    )
