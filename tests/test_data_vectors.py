"""Word vectors: read from either form, refused where they do not fit, and given to a model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedobd import UsageError
from fedobd.data import load_vectors
from fedobd.experiments import RunConfig, parse_config, run
from fedobd.experiments._build import build_experiment
from tests.data_helpers import (
    TINY,
    changes,
    image_folder,
    keep_offline,
    load,
    refusal,
    text_folder,
    write_parquet,
    write_vectors,
)


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_offline(tmp_path, monkeypatch)
    (tmp_path / "tiny.toml").write_text(TINY, encoding="utf-8")


VOCABULARY = ("[PAD]", "[UNK]", "film", "good", "bad")


def as_parquet(file: Path, words: list[str], vectors: torch.Tensor) -> Path:
    return write_parquet(file, {"word": words, "vector": vectors.tolist()})


@pytest.mark.parametrize("form", ["txt", "parquet"])
def test_known_words_have_their_vectors_and_padding_none(form: str, tmp_path: Path) -> None:
    words = ["the", "bad", "[PAD]", "good", "other"]
    file = tmp_path / f"vectors.{form}"
    if form == "txt":
        values = write_vectors(file, words, 7)
    else:
        values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
        as_parquet(file, words, values)
    vectors = load_vectors(file, VOCABULARY)
    assert (vectors.shape, vectors.dtype) == ((5, 7), torch.float32)
    assert torch.equal(vectors[4], values[1])
    assert torch.equal(vectors[3], values[3])
    assert torch.equal(vectors[0], torch.zeros(7))
    assert not any(torch.equal(vectors[n], row) for n in (1, 2) for row in values)
    assert torch.equal(load_vectors(str(file), VOCABULARY), vectors)


def test_both_forms_give_the_same(tmp_path: Path) -> None:
    words = ["bad", "good", "film"]
    values = write_vectors(tmp_path / "a.txt", words, 4)
    file = as_parquet(tmp_path / "a.parquet", words, values)
    assert torch.equal(
        load_vectors(tmp_path / "a.txt", VOCABULARY), load_vectors(file, VOCABULARY)
    )


def test_words_that_lack_are_drawn_with_the_deviation_of_those_that_are_there(
    tmp_path: Path,
) -> None:
    known = [f"k{n}" for n in range(200)]
    values = write_vectors(tmp_path / "a.txt", known, 20)
    vocabulary = ["[PAD]", *known, *(f"u{n}" for n in range(200))]
    vectors = load_vectors(tmp_path / "a.txt", vocabulary, seed=3)
    drawn = vectors[201:]
    # 4,000 draws: the deviation is within 5 standard errors of its own, 5 / sqrt(2 * 4000).
    assert float(drawn.std()) == pytest.approx(float(values.std()), rel=5 / math.sqrt(8000))
    assert abs(float(drawn.mean())) < 5 * float(values.std()) / math.sqrt(4000)
    assert torch.equal(load_vectors(tmp_path / "a.txt", vocabulary, seed=3), vectors)
    other = load_vectors(tmp_path / "a.txt", vocabulary, seed=4)
    assert torch.equal(other[:201], vectors[:201])
    assert not torch.equal(other[201:], drawn)
    assert len({tuple(row) for row in drawn.tolist()}) == 200


def write_lines(*lines: str) -> Any:
    def make(folder: Path) -> str:
        (folder / "a.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return "a.txt"

    return make


def missing(_: Path) -> str:
    return "none.txt"


def binary(folder: Path) -> str:
    (folder / "a.bin").write_bytes(bytes(range(128, 256)))
    return "a.bin"


def no_parquet(folder: Path) -> str:
    (folder / "a.parquet").write_bytes(b"this is no parquet file")
    return "a.parquet"


def other_columns(folder: Path) -> str:
    write_parquet(folder / "a.parquet", {"token": ["good"], "vector": [[1.0]]})
    return "a.parquet"


def of_two_widths(folder: Path) -> str:
    columns = {"word": ["good", "bad"], "vector": [[1.0, 2.0], [1.0]]}
    write_parquet(folder / "a.parquet", columns)
    return "a.parquet"


def no_lists(folder: Path) -> str:
    write_parquet(folder / "a.parquet", {"word": ["good"], "vector": [1.0]})
    return "a.parquet"


WRONG = {
    "missing": (missing, r"'none.txt' cannot be read: .*No such file"),
    "folder": (lambda folder: ".", r"'.' cannot be read: .*[Dd]irectory"),
    "binary": (binary, r"'a.bin' cannot be read: .*utf-8"),
    "no parquet": (no_parquet, r"'a.parquet' cannot be read: "),
    "other columns": (other_columns, r"'a.parquet' cannot be read: .*word"),
    "no lists": (no_lists, r"'a.parquet' cannot be read: column 'vector' holds double; wanted "
                 r"lists of numbers"),
    "two widths": (write_lines("film 1 2 3", "good 1 2"), r"'a.txt': row 1 has 2 numbers, the "
                   r"first 3"),
    "two widths in parquet": (of_two_widths, r"'a.parquet': row 1 has 1 numbers, the first 2"),
    "a header": (write_lines("2 3", "good 1 2 3"), r"'a.txt': row 1 has 3 numbers, the first 1"),
    "words": (write_lines("good one two"), r"'a.txt' cannot be read: .*'one'"),
    "a word alone": (write_lines("good"), r"'a.txt' cannot be read: "),
    "other words": (write_lines("gut 1 2", "schlecht 3 4"), r"'a.txt' have none of the 5 words of "
                    r"the data"),
    "nothing": (write_lines(), r"'a.txt' (cannot be read|have none of the 5 words)"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(WRONG))
def test_what_are_no_vectors_is_refused(name: str, tmp_path: Path) -> None:
    make, message = WRONG[name]
    with pytest.raises(UsageError, match="word vectors " + message):
        load_vectors(make(tmp_path), VOCABULARY)


@pytest.mark.parametrize("line", [". . . 5 6", "at name@domain.com 5 6", "bad 5 6 "])
def test_words_with_spaces_and_blanks_at_the_end_are_read(line: str, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(f"good 1 2\n{line}\n", encoding="utf-8")
    vectors = load_vectors(file, VOCABULARY)
    assert vectors[3].tolist() == [1, 2]


def test_the_first_word_may_hold_spaces_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("of a 3 4\ngood 1 2\n", encoding="utf-8")
    assert load_vectors(tmp_path / "a.txt", VOCABULARY)[3].tolist() == [1, 2]


def test_a_vector_that_is_missing_is_refused(tmp_path: Path) -> None:
    columns: dict[str, list[Any]] = {"word": ["good", "bad"], "vector": [[1.0, 2.0], None]}
    write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(UsageError, match=r"a.parquet'.* row 1"):
        load_vectors(tmp_path / "a.parquet", VOCABULARY)


def test_vectors_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("good nan 2\nbad 3 inf\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"a.txt'.* row 0"):
        load_vectors(tmp_path / "a.txt", VOCABULARY)


# In models

ENCODER: dict[str, Any] = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "num_layers": 1}


def small(folder: Path, file: Path, **options: Any) -> RunConfig:
    return parse_config(
        {
            "data": {"name": str(folder), "text": {"length": 12, "min_count": 1}},
            "model": {
                "name": "transformer",
                "options": {**ENCODER, "vectors": str(file), **options},
            },
            "federation": {"clients": 2, "seed": 3},
            "training": {"loss": "binary-cross-entropy", "batch_size": 8, "learning_rate": 0.1},
            "method": "fedavg",
            "methods": {"fedavg": {"rounds": 1, "epochs": 1}},
        }
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_starts_from_them_and_frozen_ones_stay(frozen: bool, tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "set")
    values = write_vectors(tmp_path / "glove.txt", ["good", "bad", "unseen"], 8)
    config = small(folder, tmp_path / "glove.txt", frozen_embedding=frozen)
    experiment = build_experiment(config)
    words = build_words(folder)
    start = experiment.initial["embedding.weight"]
    assert torch.equal(start[words.index("good")], values[0])
    assert torch.equal(start[words.index("bad")], values[1])
    assert torch.equal(start, load_vectors(tmp_path / "glove.txt", words, seed=3))
    run(config, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")["embedding.weight"]
    assert torch.equal(after, start) == frozen


def build_words(folder: Path) -> list[str]:
    from fedobd.data import TextOptions

    return list(load(folder, text=TextOptions(min_count=1, length=12)).vocabulary or ())


def test_vectors_that_do_not_fit_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = text_folder(tmp_path / "set")
    write_vectors(tmp_path / "glove.txt", ["good", "bad"], 6)
    words = len(build_words(folder))
    settings = changes(
        data__name=folder,
        data__text__min_count=1,
        model__name="transformer",
        model__options='{d_model=8, nhead=2, vectors="glove.txt"}',
        training__loss="binary-cross-entropy",
    )
    said = refusal(capfd, "run", "tiny.toml", *settings)
    assert said.endswith(
        f"vectors have shape ({words}, 6); wanted (vocab_size, d_model) = ({words}, 8)"
    )
    lacking = changes(model__options='{d_model=8, nhead=2, vectors="glove.6B.txt"}')
    said = refusal(capfd, "run", "tiny.toml", *settings, *lacking)
    assert said.startswith("word vectors 'glove.6B.txt' cannot be read: ")


def test_vectors_are_for_texts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = changes(
        data__name=image_folder(tmp_path / "set"),
        model__name="transformer",
        model__options='{vocab_size=5, vectors="glove.txt"}',
    )
    said = refusal(capfd, "run", "tiny.toml", *settings)
    assert said == "model.options.vectors is for data that are texts"


def test_numbers_are_read_to_the_last_digit(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("good -0.1234567 1e-5\n", encoding="utf-8")
    vector = load_vectors(tmp_path / "a.txt", VOCABULARY)[3].numpy()
    assert vector.tolist() == np.array([-0.1234567, 1e-5], np.float32).tolist()
