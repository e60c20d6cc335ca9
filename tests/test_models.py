"""The models: sizes, shapes, padding, batch statistics, and finding a model by its name."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedobd._errors import UsageError
from fedobd.blocks import get_state, load_state, named_tensors
from fedobd.models import (
    MODELS,
    DenseLayer,
    DenseNet40,
    DigitsCNN,
    ImageCNN,
    ResNet18,
    TransformerClassifier,
    build_model,
    use_batch_statistics,
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def small_transformer(**options: Any) -> TransformerClassifier:
    sizes: dict[str, Any] = {"vocab_size": 30, "d_model": 8, "nhead": 2, "dim_feedforward": 16}
    return TransformerClassifier(**(sizes | options))


# Sizes and shapes


@pytest.mark.parametrize(
    ("name", "options", "num_parameters", "num_tensors"),
    [
        ("digits-cnn", {}, 90_250, 16),
        ("digits-cnn", {"num_classes": 3}, 90_250 - 7 * 129, 16),
        ("image-cnn", {}, 334_826, 17),
        ("image-cnn", {"num_classes": 100, "in_channels": 1}, 334_826 + 90 * 129 - 576, 17),
        ("image-cnn", {"width": 8}, 21_506, 17),
        ("densenet40", {}, 176_122, 119),
        ("densenet40", {"num_classes": 100}, 176_122 + 90 * 133, 119),
        ("densenet40", {"bottleneck": False}, 1_059_298, 119),
        ("resnet18", {}, 11_173_962, 62),
        ("resnet18", {"num_classes": 100, "in_channels": 1}, 11_173_962 + 90 * 513 - 1152, 62),
        ("transformer", {"vocab_size": 50}, 50 * 100 + 2 * 452_548 + 101, 27),
        ("transformer", {"vocab_size": 50, "frozen_embedding": True}, 2 * 452_548 + 101, 26),
    ],
)
def test_number_of_parameters(
    name: str, options: dict[str, Any], num_parameters: int, num_tensors: int
) -> None:
    trained = [p for p in build_model(name, **options).parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == num_parameters
    assert len(trained) == num_tensors


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: DigitsCNN(5, 2), (2, 8, 8)),
        (lambda: ImageCNN(100, 1, width=4), (1, 16, 16)),
        (lambda: DenseNet40(growth=4), (3, 16, 16)),
        (lambda: DenseNet40(7, 1, growth=4, bottleneck=False), (1, 8, 8)),
        (lambda: ResNet18(100), (3, 8, 8)),
    ],
)
def test_image_models_give_logits_and_gradients(
    build: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model, batch = build(), torch.randn(2, *shape)
    logits = model(batch)
    *_, bias = model.parameters()
    assert logits.shape == (2, len(bias))
    logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    with torch.no_grad():
        assert torch.cat([logits, model.eval()(batch)]).isfinite().all()


def test_densenet_halves_the_channels_only_with_bottleneck() -> None:
    compressed, plain = DenseNet40(), DenseNet40(bottleneck=False)
    assert [sum(isinstance(m, DenseLayer) for m in d.modules()) for d in (compressed, plain)] == [
        18,
        36,
    ]
    assert compressed.norm.num_features == 132
    assert plain.norm.num_features == 24 + 36 * 12
    assert DenseNet40(bottleneck=False, compression=0.5).norm.num_features < 456


def test_same_seed_gives_the_same_model() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(get_state(DigitsCNN()))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DigitsCNN(0), r"DigitsCNN: num_classes is 0; wanted an integer of at least 1"),
        (lambda: DigitsCNN(in_channels=-1), r"DigitsCNN: in_channels is -1"),
        (lambda: ImageCNN(width=0), r"ImageCNN: width is 0; wanted an integer of at least 1"),
        (lambda: ResNet18(num_classes="10"), r"ResNet18: num_classes is '10'; wanted an integer"),  # type: ignore[arg-type]
        (lambda: DenseNet40(growth=True), r"DenseNet40: growth is True"),
        (lambda: DenseNet40(compression=0), r"compression is 0; allowed are 0 < compression <= 1"),
        (lambda: DenseNet40(compression=1.5), r"compression is 1.5"),
        (lambda: small_transformer(nhead=3), r"d_model is 8 and nhead 3; d_model must be a mult"),
        (lambda: small_transformer(dropout=1.0), r"dropout is 1.0; allowed are 0 <= dropout < 1"),
        (lambda: small_transformer(num_layers=0), r"num_layers is 0"),
        (
            lambda: small_transformer(vectors=torch.zeros(30, 9)),
            r"vectors have shape \(30, 9\); wanted \(vocab_size, d_model\) = \(30, 8\)",
        ),
        (
            lambda: small_transformer(vectors=torch.zeros(30, 8, dtype=torch.int64)),
            r"vectors have element type torch.int64; wanted a float",
        ),
    ],
)
def test_wrong_options_are_refused(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build()


# Transformer


@pytest.mark.parametrize(("training", "tracked"), [(True, True), (False, True), (False, False)])
def test_padding_alone_gives_the_bias(training: bool, tracked: bool) -> None:
    model = small_transformer(num_outputs=3).train(training)
    tokens = torch.tensor([[3, 4, 5], [0, 0, 0], [0, 6, 0]])
    with torch.set_grad_enabled(tracked):  # without, torch takes its fast path
        logits = model(tokens)
    assert logits.shape == (3, 3)
    assert logits.isfinite().all()
    assert torch.equal(logits[1], model.classifier.bias)
    if tracked:
        logits.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_more_padding_changes_nothing() -> None:
    model = small_transformer().double().eval()
    tokens = torch.randint(1, 30, (4, 6))
    padded = torch.cat([tokens, torch.zeros(4, 5, dtype=torch.int64)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(model(padded), model(tokens), rtol=1e-5, atol=1e-6)


def test_fast_and_slow_path_agree() -> None:
    model = small_transformer().double().eval()
    tokens = torch.tensor([[3, 4, 5, 0], [0, 0, 0, 0], [7, 0, 9, 2]])
    slow = model(tokens)
    with torch.no_grad():
        fast = model(tokens)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)


def test_order_of_the_tokens_matters() -> None:
    model = small_transformer().eval()
    first, second = model(torch.tensor([[3, 4], [4, 3]]))
    assert not torch.allclose(first, second)


def test_positions_are_the_published_sinusoids_and_not_in_the_state() -> None:
    model = small_transformer(d_model=6, max_length=11)
    assert model.positions.shape == (11, 6)
    for place in (0, 1, 10):
        for pair in range(3):
            angle = place / 10_000 ** (2 * pair / 6)
            assert model.positions[place, 2 * pair] == pytest.approx(math.sin(angle), abs=1e-6)
            assert model.positions[place, 2 * pair + 1] == pytest.approx(math.cos(angle), abs=1e-6)
    assert "positions" not in model.state_dict()
    assert "positions" not in get_state(model)


def test_odd_width() -> None:
    model = small_transformer(d_model=5, nhead=1)
    assert model(torch.tensor([[1, 2]])).isfinite().all()


def test_frozen_embedding_with_vectors() -> None:
    vectors = torch.randn(30, 8, dtype=torch.float64)
    model = small_transformer(vectors=vectors, frozen_embedding=True)
    assert torch.equal(model.embedding.weight, vectors.float())
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert model.embedding.weight.grad is None
    assert small_transformer(vectors=vectors).embedding.weight.requires_grad


def test_encoder_layers_start_differently() -> None:
    first, second = (get_state(layer) for layer in small_transformer().layers)
    assert not torch.equal(first["linear1.weight"], second["linear1.weight"])


@pytest.mark.parametrize("shape", [(3,), (2, 301), (2, 0), (1, 2, 3)])
def test_tokens_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    message = rf"tokens have shape \({', '.join(map(str, shape))},?\); wanted \(n, length\) .* 300"
    with pytest.raises(UsageError, match=message):
        small_transformer()(torch.ones(shape, dtype=torch.int64))


def test_text_of_the_greatest_length() -> None:
    assert small_transformer()(torch.ones(2, 300, dtype=torch.int64)).isfinite().all()


# Batch statistics


@pytest.mark.parametrize(
    ("build", "channels"),
    [(DigitsCNN, 1), (ImageCNN, 3), (lambda: DenseNet40(growth=4), 3), (ResNet18, 3)],
)
def test_batch_statistics(build: Callable[[], nn.Module], channels: int) -> None:
    model, inputs = build(), torch.randn(2, channels, 8, 8)
    use_batch_statistics(model)
    assert list(model.buffers()) == []
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]
    assert all(role == "parameter" for _, _, role in named_tensors(model))
    with torch.no_grad():
        trained = model.train()(inputs)
        assert torch.equal(model.eval()(inputs), trained)
        assert list(model.buffers()) == []
        use_batch_statistics(model)
        assert torch.equal(model(inputs), trained)


def test_batch_statistics_are_those_of_the_batch() -> None:
    norm = nn.BatchNorm1d(2)
    use_batch_statistics(norm)
    values = 5 + 3 * torch.randn(1000, 2)
    normed = norm.eval()(values)
    torch.testing.assert_close(normed.mean(dim=0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(normed.var(dim=0), torch.ones(2), atol=2e-3, rtol=0)


def test_batch_statistics_leave_other_layers_alone() -> None:
    model = nn.Sequential(
        nn.SyncBatchNorm(3), nn.InstanceNorm1d(3, track_running_stats=True), nn.GroupNorm(1, 3)
    )
    use_batch_statistics(model)
    assert [name for name, _ in model.named_buffers()] == [
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    ]


def test_batch_statistics_of_one_example_fail_where_there_is_one_value() -> None:
    norm = nn.BatchNorm1d(2)
    use_batch_statistics(norm)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm.eval()(torch.zeros(1, 2))


# build_model


def test_names() -> None:
    assert list(MODELS) == [
        "digits-cnn",
        "image-cnn",
        "densenet40",
        "resnet18",
        "transformer",
        "hf-text",
        "hf-image",
    ]
    assert isinstance(build_model("densenet40", num_classes=3), DenseNet40)
    assert isinstance(build_model("torch.nn:Linear", in_features=2, out_features=3), nn.Linear)
    assert isinstance(build_model("fedobd.models.resnet:ResNet18", in_channels=1), ResNet18)


OWN = """
import torch
from torch import nn

HIDDEN = 7


class Net(nn.Module):
    def __init__(self, width: int = HIDDEN) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 1)

    @classmethod
    def wide(cls):
        import own_model_helper
        return cls(own_model_helper.WIDE)


def make(**options):
    return Net(**options)


def broken():
    raise RuntimeError("no weights")


def positive(width):
    if width < 1:
        raise ValueError(f"width is {width}")
    return Net(width)


def nothing():
    return None
"""


@pytest.fixture
def own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "own_model.py").write_text(OWN, encoding="utf-8")
    (tmp_path / "own_model_helper.py").write_text("WIDE = 99\n", encoding="utf-8")
    (tmp_path / "own_model_broken.py").write_text("1 / 0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_model"
    for name in [name for name in sys.modules if name.startswith("own_model")]:
        del sys.modules[name]


def test_own_model_by_module_and_name(own_model: str) -> None:
    before = list(sys.path)
    sizes = []
    for name, options in [("Net", {}), ("Net", {"width": 3}), ("make", {"width": 4})]:
        sizes.append(build_model(f"{own_model}:{name}", **options).layer.weight.numel())  # type: ignore[union-attr, operator]
    assert sizes == [7, 3, 4]
    assert build_model(f"{own_model}:Net.wide").layer.weight.numel() == 99  # type: ignore[union-attr, operator]
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digit-cnn", {}, r"model 'digit-cnn' is unknown; wanted one of digits-cnn, image-cnn, d"),
        ("digit-cnn", {}, r"or 'package.module:name' for your own; did you mean 'digits-cnn'"),
        ("zzz", {}, r"for your own$"),
        ("", {}, r"model '' is unknown"),
        ("own_model:", {}, r"'own_model:' does not have the form 'package.module:name'"),
        (":Net", {}, r"':Net' does not have the form"),
        ("own_model:Net()", {}, r"does not have the form"),
        ("./own_model.py:Net", {}, r"does not have the form"),
        ("own_modell:Net", {}, r"module 'own_modell' cannot be imported: ModuleNotFoundError"),
        ("own_model_broken:Net", {}, r"cannot be imported: ZeroDivisionError: division by zero"),
        ("own_model:net", {}, r"'own_model' has no 'net'.*did you mean 'Net'\?"),
        ("own_model:Net.narrow", {}, r"'own_model' has no 'Net.narrow'"),
        (
            "own_model:HIDDEN",
            {},
            r"'HIDDEN' is of type int; wanted a class or function",
        ),
        ("own_model:nothing", {}, r"returned an object of type NoneType; wanted a torch.nn.Mod"),
        ("own_model:nothing", {"width": 1}, r"has no option 'width'; it has none"),
        ("own_model:Net", {"widht": 1}, r"no option 'widht'; it has width; did you mean 'width'"),
        ("own_model:positive", {}, r"model 'own_model:positive': missing a required arg.*width"),
        (
            "own_model:positive",
            {"width": 0},
            r"refused its options {'width': 0}: ValueError: widt",
        ),
        ("own_model:broken", {}, r"'own_model:broken' cannot be built: RuntimeError: no weights"),
        ("own_model:make", {"depth": 2}, r"refused its options {'depth': 2}: TypeError: .*depth"),
        ("digits-cnn", {"classes": 3}, r"has no option 'classes'; it has num_classes, in_channel"),
        ("transformer", {}, r"model 'transformer': missing a required argument: 'vocab_size'"),
        ("resnet18", {"num_classes": 0}, r"ResNet18: num_classes is 0"),
    ],
)
@pytest.mark.usefixtures("own_model")
def test_wrong_names_and_options(name: str, options: dict[str, Any], message: str) -> None:
    before = list(sys.path)
    with pytest.raises(UsageError, match=message):
        build_model(name, **options)
    assert sys.path == before


# States


@pytest.mark.parametrize(
    "build",
    [lambda: ImageCNN(width=2), lambda: DenseNet40(growth=2), small_transformer],
)
def test_state_round_trip(build: Callable[[], nn.Module]) -> None:
    source, target = build(), build()
    load_state(target, get_state(source))
    loaded = get_state(target)
    for name, value in get_state(source).items():
        assert torch.equal(loaded[name], value), name
