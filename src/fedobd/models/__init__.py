"""Models to train: built-in ones by name, and a user's own by `package.module:factory`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fedobd._errors import UsageError
from fedobd._lookup import build_object, checkpoint_folder
from fedobd.models.batch_norm import use_batch_statistics
from fedobd.models.densenet import DenseLayer, DenseNet40
from fedobd.models.digits_cnn import DigitsCNN
from fedobd.models.huggingface import HuggingFaceImage, HuggingFaceText
from fedobd.models.image_cnn import ImageCNN
from fedobd.models.resnet import BasicBlock, ResNet18
from fedobd.models.transformer import TransformerClassifier

__all__ = [
    "MODELS",
    "BasicBlock",
    "DenseLayer",
    "DenseNet40",
    "DigitsCNN",
    "HuggingFaceImage",
    "HuggingFaceText",
    "ImageCNN",
    "ResNet18",
    "TransformerClassifier",
    "build_model",
    "checkpoint_folder",
    "use_batch_statistics",
]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "digits-cnn": DigitsCNN,
    "image-cnn": ImageCNN,
    "densenet40": DenseNet40,
    "resnet18": ResNet18,
    "transformer": TransformerClassifier,
    "hf-text": HuggingFaceText,
    "hf-image": HuggingFaceImage,
}
"""The models by the name that a configuration gives."""


def build_model(name: str, **options: Any) -> nn.Module:
    """Build a model by name.

    Args:
        name: a key of `MODELS`, or `package.module:factory` for a class or function of your own.
        **options: keyword arguments of the factory.

    Returns:
        The model that the factory made.

    Raises:
        UsageError: the name is unknown or cannot be imported, the factory does not take these
            options, or what it returns is no `nn.Module`.

    Example:
        >>> build_model("digits-cnn", num_classes=3).classifier[-1].out_features
        3
    """
    model = build_object(name, "model", MODELS, options)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"model {name!r}: the factory returned an object of type {type(model).__name__}; "
            "wanted a torch.nn.Module"
        )
    return model
