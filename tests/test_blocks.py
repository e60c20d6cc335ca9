"""Semantic blocks: tables of known models, and the laws that every decomposition keeps."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn.utils import parametrizations

from fedobd._blocks import BlockRules, BlockStyle, decompose
from fedobd._errors import UsageError
from fedobd._schema import ModelSchema, Role, Segment
from fedobd._state import cast_state, check_state, get_state, load_state, master_state
from fedobd.models import (
    DenseNet40,
    DigitsCNN,
    ResNet18,
    TransformerClassifier,
    use_batch_statistics,
)

Row = tuple[str, int, int]
"""Kind, number of layers, number of parameters of a block."""

NOTHING_TO_TRAIN = "the model has no trainable parameters; at least one tensor must have requires"


# The models


def hugging_face(name: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name.partition('For')[0].removesuffix('LMHeadModel')}Config")
    model: nn.Module = getattr(transformers, name)(config(**options))
    return model


TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 40}
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def with_batch_statistics() -> nn.Module:
    model = DenseNet40()
    use_batch_statistics(model)
    return model


def partly_frozen() -> nn.Module:
    model = DigitsCNN()
    model.features[:6].requires_grad_(False)
    return model


def bfloat16() -> nn.Module:
    return DigitsCNN().to(torch.bfloat16)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "digits": DigitsCNN,
    "digits partly frozen": partly_frozen,
    "digits bfloat16": bfloat16,
    "densenet": DenseNet40,
    "densenet batch statistics": with_batch_statistics,
    "resnet": ResNet18,
    "transformer": lambda: TransformerClassifier(30, frozen_embedding=True),
    "torch transformer": lambda: nn.Transformer(16, 2, 1, 1, 32, batch_first=True),
    "bert": lambda: hugging_face("BertForSequenceClassification", **SIZES, **TOKENS),
    "gpt2": lambda: hugging_face(
        "GPT2LMHeadModel", n_embd=16, n_layer=2, n_head=2, n_positions=20, **TOKENS
    ),
    "vit": lambda: hugging_face("ViTForImageClassification", image_size=8, patch_size=4, **SIZES),
    "llama": lambda: hugging_face("LlamaForCausalLM", **SIZES, **TOKENS),
    "llama tied": lambda: hugging_face(
        "LlamaForCausalLM", tie_word_embeddings=True, **SIZES, **TOKENS
    ),
    "albert": lambda: hugging_face(
        "AlbertForSequenceClassification", embedding_size=8, **SIZES, **TOKENS
    ),
}


@functools.cache
def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def table(model: nn.Module, rules: BlockRules | None = None) -> list[Row]:
    return [(b.kind, len(b.layers), b.num_parameters) for b in decompose(model, rules).blocks]


def dense_layers(channels: int) -> list[Row]:
    widths = range(channels, channels + 6 * 12, 12)
    return [("DenseLayer", 4, 2 * w + w * 48 + 2 * 48 + 48 * 12 * 9) for w in widths]


DENSENET: list[Row] = [
    ("Conv2d", 1, 648),
    *dense_layers(24),
    ("BatchNorm2d+Conv2d", 2, 2 * 96 + 96 * 48),
    *dense_layers(48),
    ("BatchNorm2d+Conv2d", 2, 2 * 120 + 120 * 60),
    *dense_layers(60),
    ("BatchNorm2d", 1, 264),
    ("Linear", 1, 1330),
]

TABLES: dict[str, list[Row]] = {
    "digits": [
        ("Conv2d+BatchNorm2d", 2, 384),
        ("Conv2d+BatchNorm2d", 2, 18_624),
        ("Conv2d+BatchNorm2d", 2, 37_056),
        ("Linear", 1, 32_896),
        ("Linear", 1, 1_290),
    ],
    "digits partly frozen": [
        ("Conv2d+BatchNorm2d", 4, 37_056),
        ("Linear", 1, 32_896),
        ("Linear", 1, 1_290),
    ],
    "densenet": DENSENET,
    "densenet batch statistics": DENSENET,
    "resnet": [
        ("Conv2d+BatchNorm2d", 2, 1_856),
        ("BasicBlock", 4, 73_984),
        ("BasicBlock", 4, 73_984),
        ("BasicBlock", 6, 230_144),
        ("BasicBlock", 4, 295_424),
        ("BasicBlock", 6, 919_040),
        ("BasicBlock", 4, 1_180_672),
        ("BasicBlock", 6, 3_673_088),
        ("BasicBlock", 4, 4_720_640),
        ("Linear", 1, 5_130),
    ],
    "transformer": [
        ("TransformerEncoderLayer", 6, 452_548),
        ("TransformerEncoderLayer", 6, 452_548),
        ("Linear", 1, 101),
    ],
    "torch transformer": [
        ("TransformerEncoderLayer", 6, 2_224),
        ("LayerNorm", 1, 32),
        ("TransformerDecoderLayer", 9, 3_344),
        ("LayerNorm", 1, 32),
    ],
    "bert": [
        ("BertEmbeddings", 4, 40 * 16 + 512 * 16 + 2 * 16 + 32),
        ("BertLayer", 8, 2_224),
        ("BertLayer", 8, 2_224),
        ("Linear", 1, 272),
        ("Linear", 1, 34),
    ],
    "gpt2": [
        ("Embedding", 1, 640),
        ("Embedding", 1, 320),
        ("GPT2Block", 6, 3_280),
        ("GPT2Block", 6, 3_280),
        ("LayerNorm", 1, 32),
    ],
    "vit": [
        ("ViTEmbeddings", 2, 16 + 5 * 16 + 3 * 4 * 4 * 16 + 16),
        ("ViTLayer", 8, 2_224),
        ("ViTLayer", 8, 2_224),
        ("LayerNorm", 1, 32),
        ("Linear", 1, 34),
    ],
    "llama": [
        ("Embedding", 1, 640),
        ("LlamaDecoderLayer", 9, 2_592),
        ("LlamaDecoderLayer", 9, 2_592),
        ("LlamaRMSNorm", 1, 16),
        ("Linear", 1, 640),
    ],
    "llama tied": [
        ("Embedding", 1, 640),
        ("LlamaDecoderLayer", 9, 2_592),
        ("LlamaDecoderLayer", 9, 2_592),
        ("LlamaRMSNorm", 1, 16),
    ],
    "albert": [
        ("AlbertEmbeddings", 4, 40 * 8 + 512 * 8 + 2 * 8 + 16),
        ("AlbertTransformer", 9, 144 + 2_224),
        ("Linear", 1, 272),
        ("Linear", 1, 34),
    ],
}


@pytest.mark.parametrize("name", TABLES)
def test_table(name: str) -> None:
    assert table(model_of(name)) == TABLES[name]


def test_block_names() -> None:
    names = [block.name for block in decompose(model_of("digits")).blocks]
    assert names == ["features.0", "features.3", "features.7", "classifier.1", "classifier.3"]
    names = [block.name for block in decompose(model_of("gpt2")).blocks]
    assert names == [
        "transformer.wte",
        "transformer.wpe",
        "transformer.h.0",
        "transformer.h.1",
        "transformer.ln_f",
    ]


# Laws


def covered(schema: ModelSchema) -> list[np.ndarray]:
    """Count for every element of every tensor the blocks that hold it."""
    counts = [np.zeros(spec.num_elements, np.uint8) for spec in schema.tensors]
    for block in schema.blocks:
        for segment in block.segments:
            counts[segment.tensor][segment.start : segment.stop] += 1
    return counts


def check_laws(model: nn.Module, schema: ModelSchema) -> None:
    """Hold a schema to the laws, read from torch's own lists of parameters and buffers."""
    roles = {name: "parameter" if p.requires_grad else "frozen" for name, p in tied_once(model)}
    kept = set(model.state_dict(keep_vars=True))
    roles |= {name: "buffer" for name, _ in model.named_buffers() if name in kept}
    assert {spec.name: str(spec.role) for spec in schema.tensors} == roles

    for spec, counts in zip(schema.tensors, covered(schema), strict=True):
        assert (counts == (spec.role is not Role.FROZEN)).all(), spec.name
    segments = [s for block in schema.blocks for s in block.segments]
    buffers = [s.tensor for s in segments if schema.tensors[s.tensor].role is Role.BUFFER]
    assert len(buffers) == len(set(buffers)), "a buffer lies whole in one block"

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert schema.num_parameters == trained
    assert sum(block.num_parameters for block in schema.blocks) == trained
    assert len({block.name for block in schema.blocks}) == len(schema.blocks)
    for block in schema.blocks:
        holders = [schema.tensors[s.tensor].name.rpartition(".")[0] for s in block.segments]
        assert list(block.layers) == list(dict.fromkeys(holders))
    again = ModelSchema.from_json(json.loads(json.dumps(schema.to_json())))
    assert again == schema
    assert again.fingerprint == schema.fingerprint


def tied_once(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=True))


def check_parts(schema: ModelSchema, fraction: float) -> None:
    limit = fraction * schema.num_parameters
    for block in schema.blocks:
        if block.num_parameters > limit:
            parameters = [
                s
                for s in block.segments
                if schema.tensors[s.tensor].role is Role.PARAMETER and s.num_elements
            ]
            assert len(parameters) == 1, block.name
            assert parameters[0].num_elements == row_length(schema, parameters[0]), block.name


def row_length(schema: ModelSchema, segment: Segment) -> int:
    return math.prod(schema.tensors[segment.tensor].shape[1:])


@pytest.mark.parametrize("style", ["semantic", "layer", "tensor"])
@pytest.mark.parametrize("name", MODELS)
def test_laws(name: str, style: BlockStyle) -> None:
    model = model_of(name)
    schema = decompose(model, BlockRules(style=style))
    check_laws(model, schema)
    assert decompose(model, BlockRules(style=style)).fingerprint == schema.fingerprint


@pytest.mark.parametrize("fraction", [0.5, 0.05, 0.003])
@pytest.mark.parametrize("name", [n for n in MODELS if n != "resnet"])
def test_laws_of_split_blocks(name: str, fraction: float) -> None:
    model = model_of(name)
    for style in ("semantic", "layer", "tensor"):
        schema = decompose(model, BlockRules(style=style, max_block_fraction=fraction))
        check_laws(model, schema)
        check_parts(schema, fraction)


@pytest.mark.parametrize("name", MODELS)
def test_style_layer_has_a_block_for_each_layer_with_parameters(name: str) -> None:
    model = model_of(name)
    blocks = decompose(model, BlockRules(style="layer")).blocks
    wanted: list[tuple[str, int]] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        count = sum(p.numel() for p in own if id(p) not in seen)
        seen.update(map(id, own))
        if count:
            wanted.append((path or "(model)", count))
    assert [(block.name, block.num_parameters) for block in blocks] == wanted


@pytest.mark.parametrize("name", MODELS)
def test_style_tensor_has_a_block_for_each_parameter_and_one_for_buffers(name: str) -> None:
    model = model_of(name)
    schema = decompose(model, BlockRules(style="tensor"))
    wanted = [(n, p.numel(), 1) for n, p in tied_once(model) if p.requires_grad]
    buffers = sum(spec.role is Role.BUFFER for spec in schema.tensors)
    if buffers:
        wanted.append(("(buffers)", 0, buffers))
    assert [(b.name, b.num_parameters, len(b.segments)) for b in schema.blocks] == wanted


def test_tied_weights_are_there_once() -> None:
    names = {spec.name for spec in decompose(model_of("gpt2")).tensors}
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names
    llama, tied = decompose(model_of("llama")), decompose(model_of("llama tied"))
    assert llama.num_parameters - tied.num_parameters == 640


def test_frozen_layers_are_in_no_block_and_their_buffers_in_one() -> None:
    schema = decompose(model_of("digits partly frozen"))
    assert [schema.tensors[n].name for n in schema.frozen()] == [
        f"features.{layer}.{tensor}" for layer in (0, 1, 3, 4) for tensor in ("weight", "bias")
    ]
    # Buffers before the first block with something to train go with that block.
    assert schema.blocks[0].layers == ("features.1", "features.4", "features.7", "features.8")


# Patterns


def conv(inputs: int = 2, outputs: int = 2) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3)


def norm() -> nn.Module:
    return nn.BatchNorm2d(2)


def chain(letters: str) -> nn.Sequential:
    """Build a chain from letters: c convolution, n normalization, a activation, p, l, d."""
    layers: dict[str, Callable[[], nn.Module]] = {
        "c": conv,
        "n": norm,
        "a": nn.ReLU,
        "p": lambda: nn.MaxPool2d(2),
        "l": lambda: nn.Linear(2, 2),
        "d": lambda: nn.Dropout(0.5),
    }
    return nn.Sequential(*(layers[letter]() for letter in letters))


CN, NC, C, N, L = "Conv2d+BatchNorm2d", "BatchNorm2d+Conv2d", "Conv2d", "BatchNorm2d", "Linear"


@pytest.mark.parametrize(
    ("letters", "kinds"),
    [
        ("cna", [CN]),
        ("cn", [CN]),
        ("nac", [NC]),
        ("nc", [NC]),
        ("can", [CN]),
        ("ncna", [NC, N]),
        ("cnacna", [CN, CN]),
        ("cncn", [CN, CN]),
        ("nacnac", [NC, NC]),
        ("ncnc", [NC, NC]),
        ("cnadcna", [CN, CN]),
        ("cnapcnap", [CN, CN]),
        ("cnacnal", [CN, CN, L]),
        ("nacnacnal", [NC, NC, N, L]),
        ("cca", [C, C]),
        ("cpn", [C, N]),
        ("na", [N]),
        ("ln", [L, N]),
        ("lnac", [L, NC]),
        ("acnacn", [CN, CN]),
        ("cnanac", [CN, NC]),
    ],
)
def test_patterns(letters: str, kinds: list[str]) -> None:
    model = chain(letters)
    assert [row[0] for row in table(model)] == kinds
    check_laws(model, decompose(model))


@pytest.mark.parametrize(
    ("layers", "kind"),
    [
        ((nn.Conv1d(2, 2, 3), nn.BatchNorm1d(2)), "Conv1d+BatchNorm1d"),
        ((nn.Conv3d(2, 2, 3), nn.InstanceNorm3d(2, affine=True)), "Conv3d+InstanceNorm3d"),
        ((nn.ConvTranspose2d(2, 2, 3), nn.BatchNorm2d(2)), "ConvTranspose2d+BatchNorm2d"),
        ((nn.Conv2d(2, 2, 3), nn.GroupNorm(1, 2), nn.SiLU()), "Conv2d+GroupNorm"),
        ((nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.PReLU()), "Conv2d+BatchNorm2d+PReLU"),
        ((nn.Conv2d(2, 2, 3), nn.SyncBatchNorm(2), nn.ReLU6()), "Conv2d+SyncBatchNorm"),
        ((nn.LayerNorm(2), nn.GELU(), nn.Conv1d(2, 2, 1)), "LayerNorm+Conv1d"),
        ((nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2, affine=False), nn.ELU()), "Conv2d+BatchNorm2d"),
    ],
)
def test_patterns_of_other_layers(layers: tuple[nn.Module, ...], kind: str) -> None:
    model = nn.Sequential(*layers)
    assert [row[0] for row in table(model)] == [kind]
    check_laws(model, decompose(model))


def test_run_inside_a_module_with_other_children() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1, self.relu = conv(), norm(), nn.ReLU()
            self.body = nn.Sequential(chain("cna"), chain("cna"))
            self.fc = nn.Linear(2, 2)

    names = [(b.name, b.kind) for b in decompose(Net()).blocks]
    assert names == [("conv1", CN), ("body.0.0", CN), ("body.1.0", CN), ("fc", L)]


def test_units_by_class_name() -> None:
    def unit(name: str) -> nn.Module:
        base: type[nn.Module] = type(name, (nn.Sequential,), {})
        return base(nn.Linear(2, 2), nn.Linear(2, 2))

    yes = [
        "Block",
        "MyBlock",
        "Bottleneck",
        "_DenseLayer",
        "FooLayer",
        "XEncoderLayer",
        "PosEmbeddings",
    ]
    no = ["DenseBlock", "_DenseBlock", "Stage", "Model"]
    for name in (*yes, *no):
        kinds = [row[0] for row in table(nn.Sequential(unit(name)))]
        assert kinds == ([name] if name in yes else [L, L]), name


def test_model_that_is_itself_named_as_a_unit_is_cut() -> None:
    assert len(table(nn.TransformerEncoderLayer(4, 2, 8))) > 1


# Where parameters are held


class Held(nn.Module):
    """A module with a parameter and a buffer of its own, and children."""

    def __init__(self, *children: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("cache", torch.zeros(9), persistent=False)
        self.inner = nn.Sequential(*children)


def test_parameters_held_by_the_root() -> None:
    model = Held(nn.Linear(2, 2))
    blocks = decompose(model).blocks
    assert [(b.name, b.kind, b.num_parameters) for b in blocks] == [
        ("(model)", "Held", 3),
        ("inner.0", "Linear", 6),
    ]
    check_laws(model, decompose(model))


def test_parameters_held_by_a_module_with_children() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Held(Held(nn.Linear(2, 2))))
    schema = decompose(model)
    assert [b.name for b in schema.blocks] == ["0", "1", "1.inner.0", "1.inner.0.inner.0"]
    assert schema.blocks[1].layers == ("1",)
    check_laws(model, schema)


def test_layer_used_twice_is_one_block() -> None:
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(3, 1))
    assert [(b.name, b.num_parameters) for b in decompose(model).blocks] == [("0", 12), ("3", 4)]
    check_laws(model, decompose(model))


@pytest.mark.parametrize(("shared", "other", "second"), [(norm, conv, 38), (conv, norm, 4)])
def test_layers_shared_between_runs(
    shared: Callable[[], nn.Module], other: Callable[[], nn.Module], second: int
) -> None:
    layer = shared()
    model = nn.Sequential(nn.Sequential(layer, other()), nn.Sequential(layer, other()))
    check_laws(model, decompose(model))
    assert [b.num_parameters for b in decompose(model).blocks] == [42, second]


def test_unit_that_shares_a_layer_with_an_earlier_one() -> None:
    shared = nn.Linear(2, 2)
    layers = [nn.TransformerEncoderLayer(4, 2, 8) for _ in range(2)]
    for layer in layers:
        layer.add_module("extra", shared)
    model = nn.Sequential(*layers)
    schema = decompose(model)
    check_laws(model, schema)
    first, second = schema.blocks
    assert first.num_parameters - second.num_parameters == 6


def test_buffers_without_company_join_the_block_before() -> None:
    model = nn.Sequential(
        nn.BatchNorm1d(2, affine=False), nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False)
    )
    schema = decompose(model)
    assert [b.layers for b in schema.blocks] == [("0", "1", "2")]
    check_laws(model, schema)


def test_zero_size_and_zero_dim_tensors() -> None:
    model = nn.ParameterDict(
        {"empty": nn.Parameter(torch.zeros(0, 3)), "scalar": nn.Parameter(torch.tensor(1.0))}
    )
    for style in ("semantic", "layer", "tensor"):
        for fraction in (None, 0.5):
            schema = decompose(model, BlockRules(style=style, max_block_fraction=fraction))
            assert schema.num_parameters == 1
            assert ModelSchema.from_json(schema.to_json()) == schema


@pytest.mark.parametrize(
    "model", [nn.ReLU(), nn.Sequential(), nn.Linear(2, 2).requires_grad_(False)]
)
@pytest.mark.parametrize("style", ["semantic", "layer", "tensor"])
def test_nothing_to_train(model: nn.Module, style: BlockStyle) -> None:
    with pytest.raises(UsageError, match=NOTHING_TO_TRAIN):
        decompose(model, BlockRules(style=style))


def test_parameters_of_a_type_that_cannot_be_averaged() -> None:
    complex_model = nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    with pytest.raises(UsageError, match=r"tensor '0' has element type torch.complex64; supp"):
        decompose(complex_model)


# Rules


def test_unit_classes() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

    model = nn.Sequential(Mixer(), Mixer(), nn.Linear(2, 1))
    assert [row[0] for row in table(model)] == [L] * 5
    assert table(model, BlockRules(unit_classes=("Mixer",))) == [
        ("Mixer", 2, 12),
        ("Mixer", 2, 12),
        ("Linear", 1, 3),
    ]
    assert len(table(model, BlockRules(unit_classes=("Mix.*",)))) == 3
    with pytest.raises(UsageError, match=r"unit_classes: '\(' is no regular expression: "):
        BlockRules(unit_classes=("(",))


def test_unit_names_outermost_match() -> None:
    model = nn.Sequential(chain("ll"), chain("ll"), nn.Linear(2, 1))
    assert [(b.name, b.num_parameters) for b in decompose(model, names("0")).blocks] == [
        ("0", 12),
        ("1.0", 6),
        ("1.1", 6),
        ("2", 3),
    ]
    assert len(decompose(model, names("[01]")).blocks) == 3
    assert len(decompose(model, names("?", "?.?")).blocks) == 3
    assert len(decompose(model, names("1.*")).blocks) == 5


def names(*patterns: str) -> BlockRules:
    return BlockRules(unit_names=patterns)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "blocks"}, r"style is 'blocks'; allowed are 'semantic', 'layer' and 'tensor'"),
        ({"max_block_fraction": 0}, r"max_block_fraction is 0; allowed are 0 < fraction <= 1"),
        ({"max_block_fraction": 1.5}, r"max_block_fraction is 1.5"),
        ({"max_block_fraction": math.nan}, r"max_block_fraction is nan"),
        ({"style": "layer", "unit_names": ("a",)}, r"have no effect with style 'layer'"),
        ({"style": "tensor", "unit_classes": ("a",)}, r"have no effect with style 'tensor'"),
    ],
)
def test_rules_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BlockRules(**options)


# Splitting


def split_sizes(model: nn.Module, fraction: float) -> list[int]:
    blocks = decompose(model, BlockRules(max_block_fraction=fraction)).blocks
    return [block.num_parameters for block in blocks]


def test_parts_are_balanced_and_named() -> None:
    model = nn.Sequential(nn.Embedding(100, 10), nn.Linear(10, 1))
    blocks = decompose(model, BlockRules(max_block_fraction=0.3)).blocks
    assert [(b.name, b.kind, b.num_parameters) for b in blocks] == [
        ("0[1/4]", "Embedding", 250),
        ("0[2/4]", "Embedding", 250),
        ("0[3/4]", "Embedding", 250),
        ("0[4/4]", "Embedding", 250),
        ("1", "Linear", 11),
    ]
    assert [(s.start, s.stop) for b in blocks[:4] for s in b.segments] == [
        (0, 250),
        (250, 500),
        (500, 750),
        (750, 1000),
    ]


def test_single_row_is_not_split() -> None:
    assert split_sizes(nn.Linear(100, 2, bias=False), 0.01) == [100, 100]
    assert split_sizes(nn.Linear(7, 1), 0.1) == [7, 1]


def test_whole_share_splits_nothing() -> None:
    for name in ("digits", "gpt2", "albert"):
        rules = BlockRules(max_block_fraction=1.0)
        assert decompose(model_of(name), rules) == decompose(model_of(name))


def test_buffers_stay_whole_when_split() -> None:
    model = nn.Sequential(nn.Conv2d(4, 64, 3), nn.BatchNorm2d(64))
    schema = decompose(model, BlockRules(max_block_fraction=0.2))
    check_laws(model, schema)
    assert len(schema.blocks) > 4
    buffers = [
        schema.tensors[s.tensor].name
        for block in schema.blocks
        for s in block.segments
        if schema.tensors[s.tensor].role is Role.BUFFER
    ]
    assert buffers == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 60),
    row=st.integers(1, 40),
    fraction=st.floats(0.01, 1),
    bias=st.booleans(),
)
def test_laws_of_a_split_layer(rows: int, row: int, fraction: float, bias: bool) -> None:
    model = nn.Linear(row, rows, bias=bias)
    schema = decompose(model, BlockRules(max_block_fraction=fraction))
    check_laws(model, schema)
    check_parts(schema, fraction)
    sizes = [block.num_parameters for block in schema.blocks]
    limit = max(1, math.floor(fraction * sum(sizes)))
    rows_a_part = max(1, limit // row)
    assert len(sizes) <= math.ceil(rows / rows_a_part) + math.ceil(rows / limit)


# Hypothesis: random stacks


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv": conv,
    "conv1d": lambda: nn.Conv1d(1, 2, 2, bias=False),
    "norm": norm,
    "bare norm": lambda: nn.BatchNorm2d(2, affine=False),
    "group norm": lambda: nn.GroupNorm(1, 2),
    "relu": nn.ReLU,
    "prelu": nn.PReLU,
    "linear": lambda: nn.Linear(2, 3),
    "pool": lambda: nn.MaxPool2d(2),
    "embedding": lambda: nn.Embedding(5, 2),
    "lstm": lambda: nn.LSTM(2, 2),
    "attention": lambda: nn.MultiheadAttention(2, 1),
    "held": Held,
}


@st.composite
def stacks(draw: st.DrawFn) -> nn.Module:
    """Draw a tree of layers; some are frozen, some are used twice."""
    used: list[nn.Module] = []

    def layer(name: str) -> nn.Module:
        if used and draw(st.integers(0, 9)) == 0:
            return draw(st.sampled_from(used))
        used.append(LAYERS[name]().requires_grad_(draw(st.integers(0, 4)) > 0))
        return used[-1]

    leaf = st.sampled_from(sorted(LAYERS))
    tree = draw(st.lists(st.one_of(leaf, st.lists(leaf, max_size=6)), max_size=8))
    return nn.Sequential(
        *(
            layer(item) if isinstance(item, str) else nn.Sequential(*map(layer, item))
            for item in tree
        )
    )


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    model=stacks(),
    style=st.sampled_from(["semantic", "layer", "tensor"]),
    fraction=st.one_of(st.none(), st.floats(0.01, 1)),
)
def test_laws_of_random_stacks(
    model: nn.Module, style: BlockStyle, fraction: float | None
) -> None:
    rules = BlockRules(style=style, max_block_fraction=fraction)
    if not any(p.requires_grad for p in model.parameters()):
        with pytest.raises(UsageError):
            decompose(model, rules)
        return
    schema = decompose(model, rules)
    check_laws(model, schema)
    if fraction is not None:
        check_parts(schema, fraction)
    if style == "semantic":
        plain = decompose(model)
        parts = {re.sub(r"\[\d+/\d+\]$", "", block.name): block.kind for block in schema.blocks}
        assert parts == {block.name: block.kind for block in plain.blocks}
        layers = decompose(model, BlockRules(style="layer"))
        assert len(plain.blocks) <= len(layers.blocks)


# Proposed: these fail today


def test_adapter_named_as_the_layer_that_it_wraps() -> None:
    wrapper: type[nn.Module] = type("Conv2d", (nn.Sequential,), {})
    model = nn.Sequential(wrapper(conv(), conv()), norm())
    schema = decompose(model)
    check_laws(model, schema)
    assert table(model) == [(CN, 3, 80)]


def test_parametrized_layers() -> None:
    model = nn.Sequential(
        parametrizations.weight_norm(conv()),
        norm(),
        parametrizations.spectral_norm(nn.Linear(2, 2)),
    )
    assert [row[0] for row in table(model)] == [
        "ParametrizedConv2d+BatchNorm2d",
        "ParametrizedLinear",
    ]
    check_laws(model, decompose(model))


@pytest.mark.parametrize(
    "model", [nn.BatchNorm1d(3, affine=False), nn.BatchNorm1d(3).requires_grad_(False)]
)
def test_buffers_but_nothing_to_train(model: nn.Module) -> None:
    with pytest.raises(UsageError, match=NOTHING_TO_TRAIN):
        decompose(model)


def test_lazy_model() -> None:
    with pytest.raises(UsageError, match=r"tensor '0.weight' has no shape yet; run a lazy model"):
        decompose(nn.Sequential(nn.LazyLinear(3)))


def test_rules_of_the_user_come_before_runs() -> None:
    assert [row[0] for row in table(chain("cna"), names("1"))] == [C, N]
    rules = BlockRules(unit_classes=("BatchNorm2d",))
    assert [row[0] for row in table(chain("cna"), rules)] == [C, N]


def test_patterns_that_match_nothing() -> None:
    with pytest.raises(UsageError, match=r"unit_names: 'encodr.*' matches no module of the model"):
        decompose(chain("cl"), names("encodr.*"))
    with pytest.raises(UsageError, match="unit_classes: 'Mixr' matches no module of the model"):
        decompose(chain("cl"), BlockRules(unit_classes=("Mixr",)))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(rows=st.integers(1, 60), row=st.integers(1, 40), fraction=st.floats(0.01, 1))
def test_parts_differ_by_at_most_a_row(rows: int, row: int, fraction: float) -> None:
    sizes = split_sizes(nn.Linear(row, rows, bias=False), fraction)
    assert max(sizes) - min(sizes) <= row


def test_block_of_one_row_keeps_its_name() -> None:
    blocks = decompose(nn.Linear(7, 1, bias=False), BlockRules(max_block_fraction=0.1)).blocks
    assert [block.name for block in blocks] == ["(model)"]


def test_mobile_units() -> None:
    for name in ("InvertedResidual", "MBConv", "ResnetBlock2D", "ResNetBottleNeck"):
        unit: type[nn.Module] = type(name, (nn.Sequential,), {})
        assert [r[0] for r in table(nn.Sequential(unit(*chain("cnacna"))))] == [name]


def test_kind_names_only_layers_of_the_block() -> None:
    shared = norm()
    model = nn.Sequential(nn.Sequential(conv(), shared), nn.Sequential(conv(), shared))
    assert [row[0] for row in table(model)] == [CN, C]


# States


@pytest.mark.parametrize("name", MODELS)
def test_state_round_trip(name: str) -> None:
    model, schema = model_of(name), decompose(model_of(name))
    state = get_state(model)
    assert [(n, tuple(v.shape), v.dtype) for n, v in state.items()] == [
        (spec.name, spec.shape, spec.dtype) for spec in schema.tensors
    ]
    check_state(schema, state)
    torch.manual_seed(1)
    other = MODELS[name]()
    load_state(other, state)
    for tensor, value in get_state(other).items():
        assert torch.equal(value, state[tensor]), tensor
    back = cast_state(schema, master_state(schema, state))
    assert all(torch.equal(back[tensor], state[tensor]) for tensor in state)


def test_tied_weights_stay_tied() -> None:
    model = MODELS["gpt2"]()
    state = get_state(model)
    state["transformer.wte.weight"] = torch.ones(40, 16)
    load_state(model, state)
    head = model.get_parameter("lm_head.weight")
    assert head is model.get_parameter("transformer.wte.weight")
    assert (head == 1).all()


def test_load_casts_to_the_types_of_the_model() -> None:
    model = nn.BatchNorm1d(2).to(torch.bfloat16)
    state = {name: value.double() for name, value in get_state(model).items()}
    state["weight"] = torch.tensor([1.0, 1 + 2**-20], dtype=torch.float64)
    state["num_batches_tracked"] = torch.tensor(5.0)
    load_state(model, state)
    assert model.weight.dtype == torch.bfloat16
    assert model.weight.tolist() == [1.0, 1.0]
    assert get_state(model)["num_batches_tracked"].dtype == torch.int64
    assert get_state(model)["num_batches_tracked"].item() == 5


def test_missing_and_wrong_tensors() -> None:
    model = nn.Linear(3, 2)
    schema, state = decompose(model), get_state(model)
    missing = {"weight": state["weight"]}
    wrong = state | {"bias": torch.zeros(3)}
    for check in (lambda s: check_state(schema, s), lambda s: master_state(schema, s)):
        with pytest.raises(UsageError, match="the state holds no value for tensor 'bias'"):
            check(missing)
        with pytest.raises(UsageError, match=r"'bias' has shape \(3,\); wanted \(2,\)"):
            check(wrong)
    with pytest.raises(UsageError, match="no value for tensor 'bias' of the model"):
        load_state(model, missing)
    with pytest.raises(UsageError, match=r"has shape \(2,\) in the model and \(3,\) in the state"):
        load_state(model, wrong)
