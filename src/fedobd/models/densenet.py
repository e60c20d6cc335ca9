"""DenseNet40: densely connected convolutional networks for 32x32 images.

References:
    Gao Huang, Zhuang Liu, Laurens van der Maaten, Kilian Q. Weinberger. Densely Connected
    Convolutional Networks. CVPR 2017, arXiv 1608.06993, sections 3 and 4.2.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from fedobd._errors import UsageError
from fedobd.models._checks import check_counts

_NUM_DENSE_BLOCKS = 3
_DEPTH = 40
_BOTTLENECK_WIDTH = 4  # the paper's 4k channels between the two convolutions, section 3


class DenseLayer(nn.Module):
    """One layer of a dense block: it adds `growth` channels to those that it is given.

    Args:
        in_channels: channels of the input.
        growth: channels that the layer adds (the paper's k).
        bottleneck: whether a 1x1 convolution to 4 * growth channels comes before the 3x3 one.
    """

    def __init__(self, in_channels: int, growth: int, bottleneck: bool) -> None:
        super().__init__()
        units: OrderedDict[str, nn.Module] = OrderedDict()
        width = in_channels
        if bottleneck:
            width = _BOTTLENECK_WIDTH * growth
            units["norm1"] = nn.BatchNorm2d(in_channels)
            units["relu1"] = nn.ReLU()
            units["conv1"] = nn.Conv2d(in_channels, width, 1, bias=False)
        units["norm2"] = nn.BatchNorm2d(width)
        units["relu2"] = nn.ReLU()
        units["conv2"] = nn.Conv2d(width, growth, 3, padding=1, bias=False)
        self.unit = nn.Sequential(units)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Add channels: float, shape (n, in_channels, h, w) to (n, in_channels + growth, h, w)."""
        return torch.cat([features, self.unit(features)], dim=1)


class DenseNet40(nn.Module):
    """DenseNet of depth 40 with three dense blocks.

    With the defaults this is DenseNet-BC, which halves the channels between the dense blocks: 6
    layers of two convolutions in each dense block, 176,122 parameters in 119 tensors for 10
    classes. With `bottleneck=False` it has 12 layers of one convolution in each dense block and
    keeps all channels in the transitions (compression 1): 1,059,298 parameters. Both variants
    start with a convolution to 2 * growth = 24 channels.

    Args:
        num_classes: number of classes, one logit each.
        in_channels: channels of the images.
        growth: channels that each layer adds.
        bottleneck: whether a layer has a 1x1 convolution before its 3x3 one.
        compression: share of the channels that a transition keeps, 0 < share <= 1; None for 0.5
            with bottleneck and 1 without.

    Raises:
        UsageError: an option is outside what is allowed.

    Departs from the paper:
        The paper's plain DenseNet starts with 16 channels, which gives 1,019,722 parameters;
        the FedOBD experiments start both variants with 2 * growth.

    Example:
        >>> DenseNet40()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        growth: int = 12,
        bottleneck: bool = True,
        compression: float | None = None,
    ) -> None:
        super().__init__()
        check_counts("DenseNet40", num_classes=num_classes, in_channels=in_channels, growth=growth)
        if compression is None:
            compression = 0.5 if bottleneck else 1.0
        if not 0 < compression <= 1:
            raise UsageError(
                f"DenseNet40: compression is {compression!r}; allowed are 0 < compression <= 1"
            )
        # Depth counts the stem, two transitions and the classifier beside the layers.
        num_layers = (_DEPTH - 4) // _NUM_DENSE_BLOCKS // (2 if bottleneck else 1)
        channels = 2 * growth
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.stages = nn.Sequential()
        for number in range(1, _NUM_DENSE_BLOCKS + 1):
            widths = [channels + layer * growth for layer in range(num_layers)]
            layers = nn.Sequential(*(DenseLayer(width, growth, bottleneck) for width in widths))
            self.stages.add_module(f"dense{number}", layers)
            channels += num_layers * growth
            if number < _NUM_DENSE_BLOCKS:
                kept = max(1, math.floor(channels * compression))
                self.stages.add_module(f"transition{number}", _transition(channels, kept))
                channels = kept
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits, float, shape (n, num_classes).

        Args:
            images: float, shape (n, in_channels, 32, 32); other sides of at least 4 work too.
        """
        features: torch.Tensor = self.stages(self.stem(images))
        pooled = F.relu(self.norm(features)).mean(dim=(2, 3))
        logits: torch.Tensor = self.classifier(pooled)
        return logits


def _transition(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            norm=nn.BatchNorm2d(in_channels),
            relu=nn.ReLU(),
            conv=nn.Conv2d(in_channels, out_channels, 1, bias=False),
            pool=nn.AvgPool2d(2),
        )
    )
