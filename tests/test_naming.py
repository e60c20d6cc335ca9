"""Blocks from names alone: next to `decompose` on known models, rules, errors, and laws."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn
from torch.nn.utils import parametrizations

from fedobd._errors import UsageError
from fedobd.blocks import (
    BlockRules,
    BlockStyle,
    ModelSchema,
    Role,
    TensorSpec,
    decompose,
    decompose_names,
    guess_roles,
)
from fedobd.models import MODELS as BUILT_IN
from fedobd.models import build_model
from tests.helpers import MODELS as KNOWN
from tests.helpers import (
    SIZES,
    TOKENS,
    Held,
    buffer,
    chain,
    conv,
    frozen,
    hugging_face,
    law,
    parameter,
)
from tests.test_block_laws import check_parts, covered

Partition = set[frozenset[str]]
CN, NC = "Convolution+Normalization", "Normalization+Convolution"


def partition(schema: ModelSchema) -> Partition:
    """Return for each block the names of its tensors."""
    return {frozenset(schema.tensors[s.tensor].name for s in b.segments) for b in schema.blocks}


def partition_of(named: Mapping[str, torch.Tensor], rules: BlockRules | None = None) -> Partition:
    return partition(decompose_names(described(named), rules))


def described(named: Mapping[str, torch.Tensor]) -> tuple[TensorSpec, ...]:
    values = list(named.values())
    return guess_roles(list(named), [v.shape for v in values], [v.dtype for v in values])


def floats(*names: str) -> list[TensorSpec]:
    return [parameter(name, 2, 2) for name in names]


def kinds(tensors: Sequence[TensorSpec], rules: BlockRules | None = None) -> list[tuple[str, str]]:
    return [(block.name, block.kind) for block in decompose_names(tensors, rules).blocks]


# --- known models --------------------------------------------------------------------------------


class ConvUnit(nn.Module):
    """A residual unit as torchvision writes it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3), nn.BatchNorm2d(outputs)
        if inputs != outputs:
            pair = nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs)
            self.downsample = nn.Sequential(*pair)


ResidualUnit: type[ConvUnit] = type("ResidualUnit", (ConvUnit,), {})


class StagedNet(nn.Module):
    """ResNet-18 with torchvision's names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 7), nn.BatchNorm2d(4)
        for stage, (inputs, outputs) in enumerate([(4, 4), (4, 8), (8, 12), (12, 16)], start=1):
            units = ResidualUnit(inputs, outputs), ResidualUnit(outputs, outputs)
            self.add_module(f"layer{stage}", nn.Sequential(*units))
        self.fc = nn.Linear(16, 2)


class DenseNet(nn.Module):
    """DenseNet with torchvision's names."""

    def __init__(self) -> None:
        super().__init__()
        unit: type[nn.Sequential] = type("_DenseLayer", (nn.Sequential,), {})
        self.features = nn.Sequential()
        self.features.add_module("conv0", conv())
        self.features.add_module("norm0", nn.BatchNorm2d(2))
        for stage in (1, 2):
            stack = nn.Sequential()
            for number in (1, 2, 3):
                parts = {"norm1": nn.BatchNorm2d(2), "conv1": conv()}
                parts |= {"norm2": nn.BatchNorm2d(2), "conv2": conv()}
                dense = unit()
                for name, part in parts.items():
                    dense.add_module(name, part)
                stack.add_module(f"denselayer{number}", dense)
            self.features.add_module(f"denseblock{stage}", stack)
            transition = nn.Sequential()
            transition.add_module("norm", nn.BatchNorm2d(2))
            transition.add_module("relu", nn.ReLU())
            transition.add_module("conv", conv())
            self.features.add_module(f"transition{stage}", transition)
        self.classifier = nn.Linear(2, 2)


class EncoderNet(nn.Module):
    """Encoder and attention of torch beside other layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3, enable_nested_tensor=False
        )
        self.pool = nn.MultiheadAttention(8, 2)
        self.rnn = nn.LSTM(8, 8, 2)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def bare(name: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**options)
    model: nn.Module = getattr(transformers, f"{name}Model")(config)
    return model


def stages(**options: Any) -> dict[str, Any]:
    return {"depths": [2, 2], "num_channels": 3, **options}


BUILT_IN_OPTIONS: dict[str, dict[str, Any]] = {
    "transformer": {"vocab_size": 30},
    "hf-text": {"config": {"model_type": "bert", "vocab_size": 30, **SIZES}},
    "hf-image": {"config": {"model_type": "vit", "image_size": 8, "patch_size": 4, **SIZES}},
}

NETS: dict[str, Callable[[], nn.Module]] = {
    **{
        f"built-in {name}": functools.partial(build_model, name, **BUILT_IN_OPTIONS.get(name, {}))
        for name in BUILT_IN
    },
    **{name: make for name, make in KNOWN.items() if name not in ("albert", "vit")},
    "staged": StagedNet,
    "dense": DenseNet,
    "encoder": EncoderNet,
    "vgg": lambda: nn.Sequential(chain("cnacnap"), chain("cnacnap"), nn.Flatten(), chain("lal")),
    "pre-activation": lambda: chain("cnacnacl"),
    "parametrized": lambda: nn.Sequential(
        parametrizations.weight_norm(conv()), nn.BatchNorm2d(2), nn.Linear(2, 2)
    ),
    "spectral": lambda: nn.Sequential(
        parametrizations.spectral_norm(conv()), nn.BatchNorm2d(2), nn.Linear(2, 2)
    ),
    "norm without parameters": lambda: nn.Sequential(
        conv(), nn.BatchNorm2d(2, affine=False), nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False)
    ),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(4, 2, 3), nn.GroupNorm(1, 2)),
    "vit": KNOWN["vit"],
    "bert of 1 layer": lambda: bare("Bert", **SIZES | TOKENS | {"num_hidden_layers": 1}),
    "distilbert": lambda: bare(
        "DistilBert", dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=40
    ),
    "roberta": lambda: hugging_face("RobertaForSequenceClassification", **SIZES, **TOKENS),
    "electra": lambda: bare("Electra", embedding_size=8, **SIZES, **TOKENS),
    "t5": lambda: bare("T5", d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, **TOKENS),
    "bart": lambda: bare(
        "Bart",
        d_model=16,
        **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32),
        **TOKENS,
    ),
    "switch": lambda: bare(
        "SwitchTransformers",
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_heads=2,
        num_experts=4,
        num_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        **TOKENS,
    ),
    "swin": lambda: bare(
        "Swin", **stages(image_size=16, patch_size=2, embed_dim=8, num_heads=[2, 2])
    ),
    "resnet of transformers": lambda: hugging_face(
        "ResNetForImageClassification", **stages(embedding_size=4, hidden_sizes=[8, 16])
    ),
    "convnext": lambda: bare("ConvNext", **stages(num_stages=2, hidden_sizes=[8, 16])),
    "mobilenet v1": lambda: bare("MobileNetV1", depth_multiplier=0.25),
    "mobilenet v2": lambda: bare("MobileNetV2", depth_multiplier=0.25),
}


@functools.cache
def net_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name]()


@pytest.mark.parametrize("name", NETS)
def test_same_blocks_as_from_the_model(name: str) -> None:
    model = net_of(name)
    schema = decompose(model)
    named = decompose_names(schema.tensors)
    assert partition(named) == partition(schema)
    assert named.tensors == schema.tensors
    assert [block.layers for block in named.blocks] == [block.layers for block in schema.blocks]
    if name != "spectral" and not schema.frozen():  # its buffers `_u` and `_v` are floats
        state = model.state_dict()
        assert described({t.name: state[t.name] for t in schema.tensors}) == schema.tensors


def test_built_in_models_by_their_state_alone() -> None:
    for name in BUILT_IN:
        model = net_of(f"built-in {name}")
        assert partition_of(model.state_dict()) == partition(decompose(model)), name


@pytest.mark.parametrize("name", ["staged", "vgg", "bert", "swin", "built-in digits-cnn"])
def test_model_within_a_model(name: str) -> None:
    model = net_of(name)
    wrapped = nn.Sequential(model, nn.Linear(2, 2))
    inner = {frozenset(f"0.{n}" for n in block) for block in partition(decompose(model))}
    expected = inner | {frozenset({"1.weight", "1.bias"})}
    assert partition(decompose_names(decompose(wrapped).tensors)) == expected


# --- where names say less, or more, than classes -------------------------------------------------


def differing(model: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names of the blocks that only `decompose` has, and that only the names give."""
    schema = decompose(model)
    named = decompose_names(schema.tensors)
    both = partition(schema) & partition(named)

    def rest(of: ModelSchema) -> list[str]:
        layers = [[of.tensors[s.tensor].name for s in b.segments] for b in of.blocks]
        blocks = zip(of.blocks, layers, strict=True)
        return [block.name for block, names in blocks if frozenset(names) not in both]

    return rest(schema), rest(named)


def test_albert_has_its_projection_apart() -> None:
    # Nothing in the names says that AlbertTransformer is one unit.
    encoder = "albert.encoder"
    assert differing(KNOWN["albert"]()) == (
        [encoder],
        [f"{encoder}.embedding_hidden_mapping_in", f"{encoder}.albert_layer_groups.0"],
    )


def test_only_layer_of_a_small_model_is_cut() -> None:
    # It would be nearly the whole model, as one that is wrapped is.
    model = bare("Albert", **SIZES | TOKENS | {"embedding_size": 8})
    assert len(differing(model)[1]) == 2
    layer = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1, enable_nested_tensor=False
    )
    assert differing(layer) == (
        ["layers.0"],
        [f"layers.0.{n}" for n in ("self_attn", "linear1", "linear2", "norm1", "norm2")],
    )


def test_units_of_unknown_classes_are_seen() -> None:
    # As the Fire modules of SqueezeNet; `decompose` knows no such class and cuts each layer.
    fire: type[nn.Sequential] = type("Fire", (nn.Sequential,), {})

    def unit() -> nn.Module:
        module = fire()
        module.add_module("squeeze", conv())
        module.add_module("expand", conv())
        return module

    model = nn.Sequential(unit(), nn.ReLU(), unit(), chain("l"))
    layers = [f"{n}.{part}" for n in (0, 2) for part in ("squeeze", "expand")]
    assert differing(model) == (layers, ["0", "2"])


def test_layers_without_tensors_between_do_not_show() -> None:
    assert differing(chain("cpnl")) == (["0", "2"], ["0"])


def test_tensors_of_the_root_are_blocks_of_their_own() -> None:
    assert differing(nn.Linear(2, 2)) == (["(model)"], ["weight", "bias"])
    assert differing(nn.ParameterList([torch.zeros(2), torch.zeros(3)])) == (
        ["(model)"],
        ["0", "1"],
    )


def test_tied_tensors_come_twice_in_a_state_dict() -> None:
    model = net_of("gpt2")
    assert partition_of(model.state_dict()) == partition(decompose(model)) | {
        frozenset({"lm_head.weight"})
    }


def test_frozen_parameters_do_not_show_in_a_state_dict() -> None:
    model = net_of("digits partly frozen")
    whole = partition(decompose(net_of("digits")))
    assert partition_of(model.state_dict()) == whole != partition(decompose(model))


# --- rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits partly frozen", "bert", "gpt2", "built-in resnet18"])
@pytest.mark.parametrize("fraction", [None, 0.2, 0.01])
@pytest.mark.parametrize("style", ["semantic", "layer", "tensor"])
def test_styles_and_parts_as_from_the_model(
    name: str, style: BlockStyle, fraction: float | None
) -> None:
    rules = BlockRules(style=style, max_block_fraction=fraction)
    schema = decompose(net_of(name), rules)
    named = decompose_names(schema.tensors, rules)
    assert [(b.name, b.segments) for b in named.blocks] == [
        (b.name, b.segments) for b in schema.blocks
    ]


@pytest.mark.parametrize("letters", ["cna", "nac", "can", "ncna", "cncn", "ncnc", "cca", "lnac"])
def test_patterns(letters: str) -> None:
    model = chain(f"{letters}l")
    assert partition(decompose_names(decompose(model).tensors)) == partition(decompose(model))


def test_pairs() -> None:
    pair = [parameter("a.conv.weight", 8, 4, 3), parameter("a.norm.weight", 8)]
    assert kinds(pair) == [("a.conv", CN)]
    assert kinds(pair[::-1]) == [("a.norm", NC)]
    assert kinds([pair[0], buffer("a.norm.running_mean", 8)]) == [("a.conv", CN)]
    assert kinds([pair[0], parameter("b.norm.weight", 8)])[1] == ("b.norm", "Normalization")
    assert kinds([pair[0], parameter("a.norm.weight", 16)])[1] == ("a.norm", "Normalization")
    assert kinds([pair[0], *floats("a.fc.weight"), pair[1]]) == [
        ("a.conv", "Convolution"),
        ("a.fc", "Layer"),
        ("a.norm", "Normalization"),
    ]


def test_numbers_that_make_units() -> None:
    def blocks(*names: str) -> list[str]:
        others = [f"{letter}.weight" for letter in "uvwxyz"]
        found = [block.name for block in decompose_names(floats(*names, *others)).blocks]
        return [name for name in found if name not in others and "." in name]

    assert blocks("h.3.a.weight", "h.3.b.weight") == ["h.3"]
    assert blocks("m.h3.a.weight", "m.h3.b.weight") == ["m.h3"]
    assert blocks("m.h_3.a.weight", "m.h_3.b.c.weight") == ["m.h_3"]
    assert blocks("mlp.0.weight", "mlp.0.bias", "mlp.2.weight") == ["mlp.0", "mlp.2"]
    assert blocks("m.1.0.weight", "m.1.2.weight") == ["m.1.0", "m.1.2"]  # a list
    assert blocks("m.3x.a.weight", "m.3x.b.weight") == ["m.3x.a", "m.3x.b"]


def test_frozen_layers_count_as_layers() -> None:
    tensors = [frozen("h.0.a.weight", 2), *floats("h.0.b.weight", "x.weight", "y.weight")]
    assert [name for name, _ in kinds(tensors)] == ["h.0", "x", "y"]


def test_names_that_make_units() -> None:
    names = ["e.Embeddings.word.weight", "e.Embeddings.norm.weight", "e.embed.weight"]
    assert kinds(floats(*names)) == [("e.Embeddings", "Unit"), ("e.embed", "Layer")]
    names = ["patch_embeddings.0.proj.weight", "patch_embeddings.1.proj.weight"]
    assert [n for n, _ in kinds(floats(*names))] == [n.removesuffix(".weight") for n in names]
    names = ["a.in_proj_weight", "a.out_proj.weight", "b.out_proj.weight"]
    assert kinds(floats(*names)) == [("a", "Unit"), ("b.out_proj", "Layer")]


def test_only_numbers() -> None:
    tensors = floats("0", "1", "2")
    assert kinds(tensors) == [("0", "Layer"), ("1", "Layer"), ("2", "Layer")]
    assert kinds(tensors, BlockRules(style="layer")) == kinds(tensors)


def test_tensors_of_a_module_that_lie_apart() -> None:
    schema = decompose_names(floats("a.weight", "b.weight", "a.bias"))
    assert [spec.name for spec in schema.tensors] == ["a.weight", "b.weight", "a.bias"]
    assert [[s.tensor for s in b.segments] for b in schema.blocks] == [[0, 2], [1]]


def test_buffers_without_company_join_the_block_before() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2, affine=False), nn.Linear(2, 2), Held())
    schema = decompose(model)
    assert partition(decompose_names(schema.tensors)) == partition(schema)
    apart = [buffer("x.steps"), *floats("y.weight"), buffer("z.steps"), *floats("w.weight")]
    assert [b.layers for b in decompose_names(apart).blocks] == [("x", "y", "z"), ("w",)]


def test_unit_names() -> None:
    tensors = floats("a.b.c.weight", "a.b.d.weight", "a.e.weight", "f.weight", "g")

    def found(*patterns: str) -> list[str]:
        return [name for name, _ in kinds(tensors, BlockRules(unit_names=patterns))]

    assert found() == ["a.b.c", "a.b.d", "a.e", "f", "g"]
    assert found("a.b") == ["a.b", "a.e", "f", "g"]
    assert found("a.b", "a") == ["a", "f", "g"]
    assert found("?.?") == ["a.b", "a.e", "f", "g"]
    pair = [parameter("0.weight", 2, 2, 3), parameter("1.weight", 2)]
    assert [n for n, _ in kinds(pair, BlockRules(unit_names=("1",)))] == ["0", "1"]


def test_roles() -> None:
    float32, int64 = torch.float32, torch.int64
    names = ["n.running_mean", "n.running_var", "n.num_batches_tracked", "e.position_ids"]
    for name in (*names, "running_mean"):
        assert guess_roles([name], [(2,)], [float32])[0].role is Role.BUFFER
    for dtype in (int64, torch.bool, torch.uint8):
        assert guess_roles(["a.weight"], [(2,)], [dtype])[0].role is Role.BUFFER
    for dtype in (float32, torch.bfloat16, torch.float64):
        assert guess_roles(["a.weight"], [[2]], [dtype]) == (
            parameter("a.weight", 2, dtype=dtype),
        )
    assert guess_roles(["running_mean.weight"], [()], [float32])[0].role is Role.PARAMETER


# --- errors --------------------------------------------------------------------------------------


def test_errors() -> None:
    tensors = floats("a.weight", "b.weight")
    with pytest.raises(UsageError, match="unit_classes needs a model; where only names are known"):
        decompose_names(tensors, BlockRules(unit_classes=("Block",)))
    with pytest.raises(UsageError, match=r"unit_names: 'c\.\*' matches no module of the model"):
        decompose_names(tensors, BlockRules(unit_names=("c.*",)))
    with pytest.raises(UsageError, match=r"two tensors have the name 'a\.weight'"):
        decompose_names([*tensors, tensors[0]])
    with pytest.raises(
        UsageError, match=r"parameter 'n' has element type torch.int64; wanted a fl"
    ):
        decompose_names([*tensors, parameter("n", dtype=torch.int64)])
    for nothing in ([], [buffer("a.running_mean", 2)], [parameter("a", 0)]):
        with pytest.raises(UsageError, match="the model has no trainable parameters"):
            decompose_names(nothing)
    with pytest.raises(UsageError, match="1 names, 0 shapes and 2 element types; wanted one of"):
        guess_roles(["a"], [], [torch.float32] * 2)
    with pytest.raises(UsageError, match=r"'a' has element type torch.complex64; supported are"):
        guess_roles(["a"], [()], [torch.complex64])


# --- laws ----------------------------------------------------------------------------------------


COMPONENTS = (
    *("0", "1", "2", "layer1", "layer2", "h_3", "conv", "norm", "embeddings", "experts", ""),
    *("weight", "bias", "running_mean", "in_proj_weight", "parametrizations", "original1"),
)


@st.composite
def tensor_lists(draw: st.DrawFn) -> list[TensorSpec]:
    """Draw tensors with names that mean something, or with any."""
    dotted = st.lists(st.sampled_from(COMPONENTS), min_size=1, max_size=6).map(".".join)
    names = draw(st.lists(dotted | st.text(max_size=9), unique=True, min_size=1, max_size=25))
    shapes = [tuple(draw(st.lists(st.integers(0, 4), max_size=5))) for _ in names]
    dtypes = [draw(st.sampled_from([torch.float32, torch.float16, torch.int64])) for _ in names]
    specs = guess_roles(names, shapes, dtypes)
    fixed = draw(st.sets(st.sampled_from(range(len(names))), max_size=3))
    return [
        dataclasses.replace(spec, role=Role.FROZEN) if number in fixed else spec
        for number, spec in enumerate(specs)
    ]


@law(400)
@given(
    tensors=tensor_lists(),
    style=st.sampled_from(["semantic", "layer", "tensor"]),
    fraction=st.one_of(st.none(), st.floats(0.01, 1)),
    seed=st.integers(0, 99),
)
def test_laws_of_any_names(
    tensors: list[TensorSpec], style: BlockStyle, fraction: float | None, seed: int
) -> None:
    rules = BlockRules(style=style, max_block_fraction=fraction)
    if not any(t.role is Role.PARAMETER and t.num_elements for t in tensors):
        with pytest.raises(UsageError, match="no trainable parameters"):
            decompose_names(tensors, rules)
        return
    schema = decompose_names(tensors, rules)
    assert list(schema.tensors) == tensors
    for spec, counts in zip(tensors, covered(schema), strict=True):
        assert (counts == (spec.role is not Role.FROZEN)).all(), spec.name
    assert all(block.segments for block in schema.blocks)
    assert decompose_names(tensors, rules) == schema
    if fraction is not None:
        check_parts(schema, fraction)
    elif style == "semantic":
        layers = decompose_names(tensors, BlockRules(style="layer"))
        trained = {spec.name for spec in tensors if spec.role is Role.PARAMETER}
        blocks = [names & trained for names in partition(schema)]
        for names in partition(layers):
            assert any(names & trained <= block for block in blocks), "no module is torn apart"
    other = random.Random(seed).sample(tensors, len(tensors))  # noqa: S311
    shuffled = decompose_names(other, rules)
    assert sorted(t.name for t in shuffled.tensors) == sorted(t.name for t in tensors)
    assert shuffled.num_parameters == schema.num_parameters
