"""Batch statistics: batch normalization without running statistics, so that no buffer travels."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def use_batch_statistics(model: nn.Module) -> None:
    """Switch every batch normalization of a model to the statistics of its batch, in place.

    They are used in training and in evaluation alike, as in the paper's experiments. The running
    mean, the running variance and the count of batches leave the model's state. What the model
    says of one example then depends on the batch that it comes with, and a batch of one example
    fails where a channel has one value only.

    Args:
        model: any module; layers that are no batch normalization stay as they are.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))
        >>> use_batch_statistics(model)
        >>> list(model.state_dict())
        ['0.weight', '0.bias', '1.weight', '1.bias']
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False
            module.running_mean = None
            module.running_var = None
            module.num_batches_tracked = None
