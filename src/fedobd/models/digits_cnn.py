"""DigitsCNN: a small convolutional network for the 8x8 digits that come with the package."""

from __future__ import annotations

import torch
from torch import nn

from fedobd.models._checks import check_counts


class DigitsCNN(nn.Module):
    """Three convolutions with batch normalization, then two linear layers.

    It has 90,250 parameters and five semantic blocks, enough to watch block dropout at work in
    seconds on a CPU.

    Args:
        num_classes: number of classes, one logit each.
        in_channels: channels of the images.

    Raises:
        UsageError: an option is no integer of at least 1.

    Example:
        >>> DigitsCNN()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        check_counts("DigitsCNN", num_classes=num_classes, in_channels=in_channels)
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64 * 2 * 2, 128),
            nn.ReLU(),
            nn.Linear(128, num_classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits, float, shape (n, num_classes), of float images (n, in_channels, 8, 8)."""
        logits: torch.Tensor = self.classifier(self.features(images))
        return logits
