"""ImageCNN: a convolutional network with batch normalization for CIFAR-sized images.

References:
    Karen Simonyan, Andrew Zisserman. Very Deep Convolutional Networks for Large-Scale Image
    Recognition. ICLR 2015, arXiv 1409.1556, section 2 (stages of 3x3 convolutions).
    Sergey Ioffe, Christian Szegedy. Batch Normalization: Accelerating Deep Network Training by
    Reducing Internal Covariate Shift. ICML 2015, arXiv 1502.03167, section 3.2.
    Min Lin, Qiang Chen, Shuicheng Yan. Network In Network. ICLR 2014, arXiv 1312.4400, section 3.2
    (global average pooling in place of linear layers).
"""

from __future__ import annotations

import torch
from torch import nn

from fedobd.models._checks import check_counts

_STAGES = ((1,), (2,), (3,), (4, 4))
"""Channels of the convolutions of each stage, in units of `width`. Sides are halved early, as most
of the time goes into large ones."""


class ImageCNN(nn.Module):
    """Five 3x3 convolutions in four stages, each with batch normalization and ReLU.

    Max-pooling halves the sides between stages; the classifier reads the mean over what places
    are left. By default it has 334,826 parameters in six semantic blocks, and an image takes 13
    million multiplications. The last convolution holds 44 % of the parameters: split it with
    `max_block_fraction`.

    Args:
        num_classes: number of classes, one logit each.
        in_channels: channels of the images.
        width: channels of the first stage; the others have 2, 3 and 4 times as many.

    Raises:
        UsageError: an option is no integer of at least 1.

    Example:
        >>> ImageCNN(num_classes=100)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 100])
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, *, width: int = 32) -> None:
        super().__init__()
        check_counts("ImageCNN", num_classes=num_classes, in_channels=in_channels, width=width)
        self.features = nn.Sequential()
        channels = in_channels
        for number, factors in enumerate(_STAGES):
            if number > 0:
                self.features.append(nn.MaxPool2d(2))
            for factor in factors:
                convolution = nn.Conv2d(channels, factor * width, 3, padding=1, bias=False)
                nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
                channels = factor * width
                self.features.extend([convolution, nn.BatchNorm2d(channels), nn.ReLU()])
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits, float, shape (n, num_classes).

        Args:
            images: float, shape (n, in_channels, 32, 32); other sides of at least 8 work too.
        """
        logits: torch.Tensor = self.classifier(self.features(images).mean(dim=(2, 3)))
        return logits
