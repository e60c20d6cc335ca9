"""Semantic blocks: tables of known models, patterns of layers, rules and splitting."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from fedobd._errors import UsageError
from fedobd.blocks import BlockRules, BlockStyle, ModelSchema, Role, decompose
from tests.helpers import Held, chain, conv, model_of, norm
from tests.test_block_laws import check_laws

Row = tuple[str, int, int]
"""Kind, number of layers, number of parameters of a block."""

NOTHING_TO_TRAIN = "the model has no trainable parameters; at least one tensor must have requires"


def table(model: nn.Module, rules: BlockRules | None = None) -> list[Row]:
    return [(b.kind, len(b.layers), b.num_parameters) for b in decompose(model, rules).blocks]


# --- known models --------------------------------------------------------------------------------


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


# --- patterns ------------------------------------------------------------------------------------


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
        ("caaaana", [CN]),
    ],
)
def test_patterns(letters: str, kinds: list[str]) -> None:
    model = chain(letters)
    assert [row[0] for row in table(model)] == kinds
    check_laws(model, decompose(model))


def test_an_activation_that_several_runs_share_ends_none_of_them() -> None:
    shared = nn.ReLU()
    runs = [nn.Sequential(nn.Conv2d(2, 2, 1), shared, nn.BatchNorm2d(2)) for _ in range(2)]
    assert [row[0] for row in table(nn.Sequential(*runs))] == [CN, CN]


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


def test_mobile_units() -> None:
    for name in ("InvertedResidual", "MBConv", "ResnetBlock2D", "ResNetBottleNeck"):
        unit: type[nn.Module] = type(name, (nn.Sequential,), {})
        assert [r[0] for r in table(nn.Sequential(unit(*chain("cnacna"))))] == [name]


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


# --- where parameters are held -------------------------------------------------------------------


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


def test_kind_names_only_layers_of_the_block() -> None:
    shared = norm()
    model = nn.Sequential(nn.Sequential(conv(), shared), nn.Sequential(conv(), shared))
    assert [row[0] for row in table(model)] == [CN, C]


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


@pytest.mark.parametrize(
    "model", [nn.BatchNorm1d(3, affine=False), nn.BatchNorm1d(3).requires_grad_(False)]
)
def test_buffers_but_nothing_to_train(model: nn.Module) -> None:
    with pytest.raises(UsageError, match=NOTHING_TO_TRAIN):
        decompose(model)


def test_parameters_of_a_type_that_cannot_be_averaged() -> None:
    complex_model = nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    with pytest.raises(UsageError, match=r"tensor '0' has element type torch.complex64; supp"):
        decompose(complex_model)


def test_lazy_model() -> None:
    with pytest.raises(UsageError, match=r"tensor '0.weight' has no shape yet; run a lazy model"):
        decompose(nn.Sequential(nn.LazyLinear(3)))


# --- rules ---------------------------------------------------------------------------------------


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


def test_rules_of_the_user_come_before_runs() -> None:
    assert [row[0] for row in table(chain("cna"), names("1"))] == [C, N]
    rules = BlockRules(unit_classes=("BatchNorm2d",))
    assert [row[0] for row in table(chain("cna"), rules)] == [C, N]


def test_patterns_that_match_nothing() -> None:
    with pytest.raises(UsageError, match=r"unit_names: 'encodr.*' matches no module of the model"):
        decompose(chain("cl"), names("encodr.*"))
    with pytest.raises(UsageError, match="unit_classes: 'Mixr' matches no module of the model"):
        decompose(chain("cl"), BlockRules(unit_classes=("Mixr",)))


# --- splitting -----------------------------------------------------------------------------------


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


def test_block_of_one_row_keeps_its_name() -> None:
    blocks = decompose(nn.Linear(7, 1, bias=False), BlockRules(max_block_fraction=0.1)).blocks
    assert [block.name for block in blocks] == ["(model)"]


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
