"""ResNet18: the residual network of 18 layers for 32x32 images.

References:
    Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun. Deep Residual Learning for Image
    Recognition. CVPR 2016, arXiv 1512.03385, sections 3.3 and 4.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fedobd.models._checks import check_counts

_STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))  # channels and first stride of each stage


class BasicBlock(nn.Module):
    """A residual unit of two 3x3 convolutions.

    Where the shapes of input and output differ, the shortcut is a 1x1 convolution with batch
    normalization (option B of the paper).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Add the residual to the shortcut.

        A float tensor of shape (n, in_channels, h, w) becomes (n, out_channels, h', w'), where a
        side is ceil(side / stride).
        """
        residual = F.relu(self.norm1(self.conv1(features)))
        residual = self.norm2(self.conv2(residual))
        return F.relu(residual + self.shortcut(features))


class ResNet18(nn.Module):
    """ResNet of 18 layers: four stages of two residual units; 11,173,962 parameters by default.

    Args:
        num_classes: number of classes, one logit each.
        in_channels: channels of the images.

    Raises:
        UsageError: an option is no integer of at least 1.

    Departs from the paper:
        The ImageNet network with the stem that is usual for 32x32 images: a 3x3 convolution with
        stride 1 in place of the 7x7 one with stride 2, and no max-pooling.

    Example:
        >>> ResNet18(num_classes=7)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 7])
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        check_counts("ResNet18", num_classes=num_classes, in_channels=in_channels)
        channels = _STAGES[0][0]
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )
        self.stages = nn.Sequential()
        for width, stride in _STAGES:
            first, second = BasicBlock(channels, width, stride), BasicBlock(width, width, 1)
            self.stages.append(nn.Sequential(first, second))
            channels = width
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits, float, shape (n, num_classes).

        Args:
            images: float, shape (n, in_channels, 32, 32); other sides work too.
        """
        features: torch.Tensor = self.stages(self.stem(images))
        logits: torch.Tensor = self.classifier(features.mean(dim=(2, 3)))
        return logits
