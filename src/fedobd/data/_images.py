"""Images: from pictures to tensors, and what is done to batches of them.

Pictures are decoded once, when a data set is read; normalization and augmentation work on whole
batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from fedobd._errors import UsageError

Picture = Any
"""A `PIL.Image.Image`."""

GREY_MODES = ("1", "L")
WIDE_MODES = ("I", "F")
"""How the modes of pictures begin that have more than 8 bits a channel."""

_VALUES_AT_ONCE = 4096 * 3 * 32 * 32  # widened to float64 for mean and deviation: 96 MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOptions:
    """What is done to images.

    Args:
        side: pixels that height and width are brought to; None leaves images as they are, and
            all must then have one size.
        mean: of each channel, where 1 is the brightest; None for that of the training split.
        std: standard deviation of each channel, in (0, 1]; None for that of the training split.
        flip: whether training images are mirrored left to right, each with probability 1/2.
        crop_padding: pixels by which training images are moved at most, up or down and left or
            right; what comes in has the mean colour.

    Raises:
        UsageError: an option is outside what is allowed.
    """

    side: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    flip: bool = False
    crop_padding: int = 0

    def __post_init__(self) -> None:
        if self.side is not None and self.side < 1:
            raise UsageError(f"side is {self.side}; allowed are numbers from 1")
        if self.mean is not None and not all(0 <= value <= 1 for value in self.mean):
            raise UsageError(f"mean is {self.mean}; allowed are numbers from 0 to 1")
        if self.std is not None and not all(0 < value <= 1 for value in self.std):
            raise UsageError(f"std is {self.std}; allowed are numbers above 0, up to 1")
        if self.crop_padding < 0:
            raise UsageError(f"crop_padding is {self.crop_padding}; allowed are numbers from 0")


def decode_images(
    pictures: Iterable[Picture], side: int | None, channels: int | None = None
) -> Iterator[NDArray[np.uint8]]:
    """Yield images as uint8 arrays of one shape (channels, height, width).

    Args:
        pictures: what the data set holds.
        side: height and width to bring them to; None leaves them as they are.
        channels: 1 for grey images, 3 for coloured ones; None for what the first one is. Grey ones
            among coloured ones become coloured.

    Raises:
        UsageError: an image has another size than the first, has colours where others are grey, or
            more than 8 bits a channel, or is no image.
    """
    size = None
    for row, picture in enumerate(pictures):
        if picture is None:
            raise UsageError(f"row {row} has no image")
        if picture.mode.startswith(WIDE_MODES):
            raise UsageError(
                f"the image of row {row} has the mode {picture.mode!r}; wanted 8 bits a channel"
            )
        is_grey = picture.mode in GREY_MODES
        if size is None:
            size = (side, side) if side is not None else picture.size
            channels = channels or (1 if is_grey else 3)
        if channels == 1 and not is_grey:
            raise UsageError(
                f"the image of row {row} has colours (mode {picture.mode!r}), those before it, or "
                "to train on, are grey; wanted images that all have colours, or none of them"
            )
        if side is not None and picture.size != size:
            picture = picture.resize(size)
        if picture.size != size:
            assert size is not None
            raise UsageError(
                f"the image of row {row} is {picture.size[0]} by {picture.size[1]} pixels, the "
                f"first one {size[0]} by {size[1]}; set data.image.side to bring all to one size"
            )
        pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"), np.uint8)
        yield pixels[None] if channels == 1 else np.moveaxis(pixels, 2, 0)


@dataclass(frozen=True, slots=True)
class Normalization:
    """Turns uint8 images into float32 ones of mean 0 and deviation 1 in each channel.

    Args:
        mean: of each channel, in [0, 1].
        std: standard deviation of each channel.
        channels_last: whether the result lies in memory with its channels last.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels_last: bool = False

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return images, uint8, shape (n, channels, height, width), as float32 of that shape."""
        scale = 1 / (255 * torch.tensor(self.std))
        shift = -torch.tensor(self.mean) / torch.tensor(self.std)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        values = images.to(torch.float32).contiguous(memory_format=layout)
        return values.mul_(_by_channel(scale, images)).add_(_by_channel(shift, images))

    @classmethod
    def of(
        cls, images: torch.Tensor, options: ImageOptions, *, channels_last: bool = False
    ) -> Normalization:
        """Take what options do not give from images, uint8, shape (n, channels, height, width).

        Raises:
            UsageError: the options are for another number of channels.
        """
        count, channels = images.shape[0] * images.shape[2] * images.shape[3], images.shape[1]
        totals = torch.zeros(2, channels, dtype=torch.float64)
        for part in torch.split(images, max(1, _VALUES_AT_ONCE // images[0].numel())):
            values = part.to(torch.float64) / 255
            totals += torch.stack([values.sum((0, 2, 3)), values.square().sum((0, 2, 3))])
        mean = totals[0] / count
        # The least deviation keeps images of one colour finite; it is far below 1/255.
        std = (totals[1] / count - mean.square()).clamp(min=1e-12).sqrt()
        for name, given in (("mean", options.mean), ("std", options.std)):
            if given is not None and len(given) != channels:
                raise UsageError(
                    f"data.image.{name} has {len(given)} values; the images have {channels} "
                    "channels"
                )
        return cls(
            options.mean or tuple(mean.tolist()),
            options.std or tuple(std.tolist()),
            channels_last,
        )


def _by_channel(values: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    return values.to(images.device).reshape(1, -1, 1, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """Random mirroring and moving of training images, batch by batch.

    Args:
        flip: see `ImageOptions`.
        crop_padding: see `ImageOptions`.
    """

    flip: bool = False
    crop_padding: int = 0

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return augmented images of the same shape, type and memory layout.

        Args:
            images: normalized ones, float, shape (n, channels, height, width); not changed.
            generator: a CPU generator, of which all draws are made.
        """
        count, _, height, width = images.shape
        padding = self.crop_padding
        offsets = torch.randint(2 * padding + 1, (2, count, 1), generator=generator)
        rows = torch.arange(height) + offsets[0]
        columns = torch.arange(width).expand(count, -1)
        if self.flip:
            mirrored = torch.rand(count, 1, generator=generator) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        columns = columns + offsets[1]
        # Rows and columns are picked with channels last, so that one index moves all channels.
        padded = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1)
        which = torch.arange(count).reshape(-1, 1, 1)
        device = images.device
        moved = padded[
            which.to(device), rows.unsqueeze(2).to(device), columns.unsqueeze(1).to(device)
        ]
        channels_last = images.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return moved.permute(0, 3, 1, 2).contiguous(memory_format=layout)
