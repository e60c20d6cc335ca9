"""`fedobd data`: what is said about a data set, and who has what of it."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedobd.experiments import build_data, load_config
from tests.data_helpers import (
    TINY,
    changes,
    entries,
    fedobd,
    image_folder,
    image_rows,
    keep_offline,
    pictures,
    refusal,
    sentences,
    text_folder,
    write_parquet,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:Specifying null_placement in SortOptions:FutureWarning",  # pyarrow of datasets
)


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_offline(tmp_path, monkeypatch)
    (tmp_path / "tiny.toml").write_text(TINY, encoding="utf-8")


def rows_of(shown: str) -> list[list[str]]:
    """Return the cells of all tables' rows, without their heads."""
    return [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in shown.splitlines()
        if line.startswith("│")
    ]


def heads_of(shown: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("┃").split("┃")]
        for line in shown.splitlines()
        if line.startswith("┃")
    ]


# check


def test_check_says_what_images_there_are(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    image_folder(tmp_path / "set", train=34, test=10, classes=4)
    done = fedobd(capfd, "data", "check", "set")
    assert done.status == 0, done.err
    assert "set: images in column 'img', 4 classes in column 'label'" in done.out
    assert heads_of(done.out) == [
        ["split", "rows", "inputs", "columns"],
        ["class", "in train", "in test"],
    ]
    assert rows_of(done.out) == [
        ["train", "34", "8x8 RGB", "img, label"],
        ["test", "10", "8x8 RGB", "img, label"],
        ["0", "9", "3"],
        ["1", "9", "3"],
        ["2", "8", "2"],
        ["3", "8", "2"],
    ]
    assert done.out.endswith("nothing is wrong with it\n")
    assert done.err == ""
    assert entries() == []  # nothing is prepared for a look


def test_check_says_what_texts_there_are(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = [*sentences(30, length=12), *sentences(5, length=7), *sentences(1, length=25)]
    labels = ["pos", "neg", "neg"] * 12
    write_parquet(
        tmp_path / "a.parquet", {"id": list(range(36)), "review": texts, "target": labels}
    )
    done = fedobd(capfd, "data", "check", "a.parquet")
    assert done.status == 0, done.err
    assert "a.parquet: texts in column 'review', 2 classes in column 'target'" in done.out
    assert rows_of(done.out) == [
        ["train", "36", "7 to 25 words, median 12, 90 % up to 12", "id, review, target"],
        ["neg", "24"],
        ["pos", "12"],
    ]
    assert "no split 'test': a part of 'train' will be set aside" in done.out


def test_check_takes_columns_and_splits(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    columns: dict[str, list[Any]] = {
        "text": sentences(6), "label": [0, 1] * 3, "other": [2, 1, 0] * 2,
    }  # fmt: skip
    write_parquet(tmp_path / "set" / "learn.parquet", columns)
    write_parquet(tmp_path / "set" / "judge.parquet", {n: v[:2] for n, v in columns.items()})
    words = ("set", "--train-split", "learn", "--test-split", "judge", "--target", "other")
    done = fedobd(capfd, "data", "check", *words, "--input", "text")
    assert done.status == 0, done.err
    assert "3 classes in column 'other'" in done.out
    assert [row[:2] for row in rows_of(done.out)[:2]] == [["learn", "6"], ["judge", "2"]]
    assert rows_of(done.out)[2:] == [["0", "2", "0"], ["1", "2", "1"], ["2", "2", "1"]]
    said = refusal(capfd, "data", "check", *words, "--input", "txt")
    assert said.endswith("data.columns.input is 'txt'; did you mean 'text'?")


def test_check_sums_up_many_classes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    columns = {"text": sentences(60), "label": [*range(25), *range(25), *range(10)]}
    write_parquet(tmp_path / "a.parquet", columns)
    done = fedobd(capfd, "data", "check", "a.parquet")
    rows = rows_of(done.out)[1:]
    assert len(rows) == 21
    assert rows[:20] == [[str(n), "3" if n < 10 else "2"] for n in range(20)]
    assert rows[20] == ["5 more", "2 to 2 each"]


def test_check_names_every_fault_and_ends_with_status_2(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    columns = image_rows([*pictures(9), *pictures(2, side=6)], [*[0, 1] * 5, 0])
    columns["img"][4] = None
    write_parquet(tmp_path / "set" / "train.parquet", columns)
    write_parquet(tmp_path / "set" / "test.parquet", image_rows(pictures(8), [5] * 7 + [0]))
    done = fedobd(capfd, "data", "check", "set")
    assert (done.status, done.err) == (2, "")
    faults = [line for line in done.out.splitlines() if line.startswith("wrong: ")]
    assert faults == [
        "wrong: split 'train': no image: 1 rows (4)",
        "wrong: split 'train': images of 2 sizes: 8x8 RGB (8), 6x6 RGB (2); wanted "
        "data.image.side",
        "wrong: split 'test': class 5 is none of the 2: 7 rows (0, 1, 2, 3, 4, …)",
    ]
    assert "nothing is wrong" not in done.out


def test_check_names_empty_texts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    texts: list[str | None] = ["good", "", "bad", None, "  ", "fine"]
    write_parquet(tmp_path / "a.parquet", {"text": texts, "label": [0, 1] * 3})
    done = fedobd(capfd, "data", "check", "a.parquet")
    assert done.status == 2
    assert "wrong: split 'train': no text: 3 rows (1, 3, 4)" in done.out


def test_check_counts_all_rows(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    texts: list[str | None] = ["good", "", "bad", None, "  ", "fine"]
    write_parquet(tmp_path / "a.parquet", {"text": texts, "label": [0, 1] * 3})
    assert rows_of(fedobd(capfd, "data", "check", "a.parquet").out)[0][1] == "6"


def test_check_compares_the_sizes_of_both_splits(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_parquet(tmp_path / "set" / "train.parquet", image_rows(pictures(8), [0, 1] * 4))
    write_parquet(tmp_path / "set" / "test.parquet", image_rows(pictures(4, side=9), [0, 1] * 2))
    done = fedobd(capfd, "data", "check", "set")
    assert done.status == 2
    assert (
        "wrong: split 'test': images of 9x9 RGB, in split 'train' 8x8 RGB; wanted data.image.side"
        in done.out
    )


def test_check_takes_grey_images_among_coloured_ones(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images = [*pictures(3), *pictures(3, channels=1)]
    write_parquet(tmp_path / "set" / "train.parquet", image_rows(images, [0, 1] * 3))
    assert fedobd(capfd, "data", "check", "set").status == 0


def test_check_finds_colours_among_grey_images_and_more_than_8_bits(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(buffer, "PNG")
    rows = image_rows([*pictures(3, channels=1), *pictures(1)], [0, 1] * 2)
    wide = {"bytes": buffer.getvalue(), "path": None}
    write_parquet(
        tmp_path / "set" / "train.parquet",
        {"img": [*rows["img"], wide], "label": [*rows["label"], 0]},
    )
    write_parquet(tmp_path / "set" / "test.parquet", image_rows(pictures(2), [0, 1]))
    done = fedobd(capfd, "data", "check", "set")
    assert done.status == 2
    found = [line for line in done.out.splitlines() if line.startswith("wrong")]
    assert found == [
        "wrong: split 'train': an image with colours; the first one to train on is grey: 1 rows "
        "(3)",
        "wrong: split 'train': an image of mode 'I;16'; wanted 8 bits a channel: 1 rows (4)",
        "wrong: split 'test': an image with colours; the first one to train on is grey: 2 rows "
        "(0, 1)",
    ]


@pytest.mark.parametrize("command", ["check", "partition"])
def test_names_with_brackets_are_shown(
    command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    columns = {"text": sentences(8), "label": ["[bold]", "[/b]"] * 4}
    write_parquet(tmp_path / "a.parquet", columns)
    if command == "check":
        shown = fedobd(capfd, "data", "check", "./a.parquet").out
    else:
        shown = fedobd(
            capfd, "data", "partition", "tiny.toml", *changes(data__name="./a.parquet")
        ).out
    assert "[bold]" in shown
    assert "[/b]" in shown


# partition


def test_partition_shows_who_has_what(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    image_folder(tmp_path / "set", train=63, test=9, classes=3)
    settings = changes(
        data__name="./set",
        federation__clients=4,
        data__partition__name="dirichlet",
        data__partition__min_examples=3,
    )
    done = fedobd(capfd, "data", "partition", "tiny.toml", *settings)
    assert done.status == 0, done.err
    assert heads_of(done.out) == [["client", "0", "1", "2", "all"]]
    table = [[int(cell) for cell in row] for row in rows_of(done.out)]
    assert [row[0] for row in table] == [0, 1, 2, 3]
    assert [sum(row[1:4]) for row in table] == [row[4] for row in table]
    assert [sum(row[n] for row in table) for n in (1, 2, 3)] == [21, 21, 21]
    config = load_config("tiny.toml", overrides=settings[1::2])
    for row, own in zip(table, build_data(config).federated.clients, strict=True):
        held = torch.cat([own.train.targets, own.validation.targets])
        assert torch.bincount(held, minlength=3).tolist() == row[1:4]


def test_partition_of_a_preset_shows_its_clients(capfd: pytest.CaptureFixture[str]) -> None:
    done = fedobd(capfd, "data", "partition", "digits")
    table = rows_of(done.out)
    assert (done.status, len(table)) == (0, 10)
    assert sum(int(row[-1]) for row in table) == 1797 - 359
    assert all(len(line) <= 80 for line in done.out.splitlines())


def test_partition_shades_many_classes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    labels = [n % 12 for n in range(240)] + [0] * 160
    write_parquet(tmp_path / "set" / "train.parquet", {"text": sentences(400), "label": labels})
    write_parquet(tmp_path / "set" / "test.parquet", {"text": sentences(4), "label": [0] * 4})
    settings = changes(
        data__name="./set",
        federation__clients=5,
        data__partition__name="shard",
    )
    done = fedobd(capfd, "data", "partition", "tiny.toml", *settings)
    assert done.status == 0, done.err
    assert heads_of(done.out) == [["client", "12 classes, the darker the more", "classes", "all"]]
    config = load_config("tiny.toml", overrides=settings[1::2])
    clients = build_data(config).federated.clients
    counts = torch.stack(
        [
            torch.bincount(torch.cat([own.train.targets, own.validation.targets]), minlength=12)
            for own in clients
        ]
    )
    lines = [line for line in done.out.splitlines() if line.startswith("│")]
    for line, row in zip(lines, counts, strict=True):
        _, _, shades, classes, total, _ = line.split("│")
        cells = shades[1:13]
        assert [cell != " " for cell in cells] == (row > 0).tolist()
        darkness = [" ░▒▓█".index(cell) for cell in cells]
        for one, dark in zip(row.tolist(), darkness, strict=True):
            assert dark == -(-4 * one // int(counts.max()))
        assert int(classes) == int((row > 0).sum())
        assert int(total) == int(row.sum())
    assert "█" in done.out


@pytest.mark.parametrize("classes", [3, 12, 30])
def test_partition_draws_a_png(
    classes: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    image_folder(tmp_path / "set", train=90, classes=classes)
    settings = changes(data__name="./set", federation__clients=6)
    done = fedobd(capfd, "data", "partition", "tiny.toml", *settings, "-o", "a picture.png")
    assert done.status == 0, done.err
    assert "wrote a picture.png" in done.out
    assert Path("a picture.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open("a picture.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert all(300 < side < 3000 for side in picture.size)
        assert len(picture.convert("RGB").getcolors(2**24) or ()) > 20


@pytest.mark.parametrize(
    ("file", "reason"),
    [("no/such/folder/a.png", "No such file or directory"), (".", "Is a directory")],
)
def test_a_picture_that_cannot_be_written_is_named(
    file: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capfd, "data", "partition", "digits", "-o", file)
    assert said == f"'{file}' cannot be written: {reason}"


def test_a_picture_of_classes_with_dollars_is_drawn(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    columns = {"text": sentences(8), "label": ["$\\more$", "less"] * 4}
    write_parquet(tmp_path / "a.parquet", columns)
    settings = changes(data__name="./a.parquet")
    assert fedobd(capfd, "data", "partition", "tiny.toml", *settings, "-o", "a.png").status == 0


@pytest.mark.parametrize("name", ["nodes", "tests.toy:make_data"])
def test_partition_needs_classes(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    said = refusal(capfd, "data", "partition", "tiny.toml", *changes(data__name=name))
    assert said == f"the classes of data '{name}' are not known"


def test_commands_are_listed(capfd: pytest.CaptureFixture[str]) -> None:
    shown = fedobd(capfd, "data", "--help").out
    assert re.search(r"check\s+Say what a data set holds", shown)
    assert re.search(r"partition\s+Show how many examples", shown)


def test_texts_are_shared_out_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text_folder(tmp_path / "set", train=40)
    done = fedobd(capfd, "data", "partition", "tiny.toml", *changes(data__name="./set"))
    assert [row[0::3] for row in rows_of(done.out)] == [["0", "20"], ["1", "20"]]
