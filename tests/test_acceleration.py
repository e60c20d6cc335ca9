"""What makes a model faster changes no bit of what it computes, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fedobd.models.image_cnn import ImageCNN
from fedobd.training._acceleration import pooling_first


def overlapping() -> nn.Module:
    pool = nn.MaxPool2d(3, stride=1, padding=1, dilation=1, ceil_mode=True)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), pool, nn.Flatten(), nn.Linear(7200, 4))


def in_the_middle() -> nn.Module:
    """Many windows hold nothing above 0, and many hold equal values."""
    inner = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), inner, nn.Flatten(), nn.Linear(512, 4))


def watched(module: nn.Module, seen: list[str]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the module's computation, which then notes its name when it is used."""
    inner = module.forward

    def forward(value: torch.Tensor) -> torch.Tensor:
        seen.append(type(module).__name__)
        return inner(value)  # type: ignore[no-any-return]

    return forward


@pytest.mark.parametrize("make", [overlapping, in_the_middle, lambda: ImageCNN(4, width=8)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pooling_first_changes_no_bit(
    make: Callable[[], nn.Module], layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = make().to(memory_format=layout)  # type: ignore[call-overload]
    inputs = torch.randn(5, 3, 32, 32).mul(2).round().to(memory_format=layout)
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def compute() -> list[torch.Tensor]:
        model.load_state_dict(state)
        model.zero_grad()
        images = inputs.clone().requires_grad_()
        outputs = model(images)
        outputs.square().sum().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        return [outputs, images.grad, *gradients]

    usual = compute()
    seen: list[str] = []
    for module in model.modules():
        if isinstance(module, nn.ReLU | nn.MaxPool2d):
            monkeypatch.setattr(module, "forward", watched(module, seen))
    with pooling_first(model):
        faster = compute()
    assert all(map(torch.equal, usual, faster))
    assert seen[:2] == ["MaxPool2d", "ReLU"]
    seen.clear()
    compute()
    assert seen[:2] == ["ReLU", "MaxPool2d"]


class Own(nn.Sequential):
    """Computes something of its own from its layers."""


def with_hook() -> nn.Sequential:
    layers = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    layers[0].register_forward_hook(lambda *_: None)
    return layers


@pytest.mark.parametrize(
    "layers",
    [
        nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        nn.Sequential(nn.ReLU(), nn.MaxPool2d(2, return_indices=True)),
        nn.Sequential(nn.LeakyReLU(-1.0), nn.MaxPool2d(2)),
        nn.Sequential(nn.ReLU(), nn.AvgPool2d(2)),
        nn.Sequential(nn.MaxPool2d(2), nn.ReLU()),
        Own(nn.ReLU(), nn.MaxPool2d(2)),
        with_hook(),
    ],
)
def test_what_might_notice_is_left_alone(layers: nn.Sequential) -> None:
    with pooling_first(nn.ModuleList([layers])):
        assert "forward" not in vars(layers)


def test_the_order_comes_back_after_an_error() -> None:
    layers = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    with pytest.raises(RuntimeError), pooling_first(layers), pooling_first(layers):
        layers(torch.zeros(1, 1, 1, 1))
    assert "forward" not in vars(layers)
