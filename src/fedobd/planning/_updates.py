"""Updates made up in place of training: how large they are, and how they are distributed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import torch

from fedobd._errors import UsageError
from fedobd.blocks import ModelSchema, ModelState, Role
from fedobd.sessions import RoundPlan
from fedobd.training import TrainingOptions, rate_factor

TYPICAL_UPDATE_SIZE = 0.1
"""RMS of a round's update over that of the weights, as measured in decoded uploads of FedOBD.

Preset `digits`, seeds 0 to 2: 0.5 in round 1, 0.1 in round 10, 0.02 in round 20, 0.0003 at the end
of stage 2. Preset `cifar10-small` on 15,000 images: 0.05 to 0.1 in stage 1, nearly the same in all
rounds, and in stage 2 in proportion to the learning rate (0.056, 0.039, 0.019, 0.004). Biases and
normalization have updates as large as those of the matrices, whatever their own values are.
Laplace draws of the RMS of real uploads took 1.0 to 1.2 of their bytes on the digits in stage 1,
1.3 in stage 2, and 0.9 on `cifar10-small`; normal draws 1.1 to 1.3, 1.5, and 1.1.
"""
FINE_TUNING_UPDATE_SIZE = 0.01
"""The same for a pretrained model.

MiniLM (22.7 M parameters) on IMDB with AdamW at 2e-4: the size at which a plan's uploads of stage
1 have the real ones' bytes, 7.9 MB each at β 1e-4; the whole run is then estimated at 1.12 times
its bytes, with 0.1 at 1.27 times.
"""

_STEPS = 16  # of an epoch, at which a schedule that moves with each batch is looked at
_POOL = 1 << 20  # draws that all tensors of an update share; a hundred million of them take long


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateModel:
    """Updates that stand for those of local training.

    The elements of an update follow a Laplace distribution. In a tensor of two or more dimensions
    their RMS is `size` times that of the tensor's initial values; in others, and in those that
    start at 0, it is `size` times the median of what those tensors have. Rounds whose schedule
    leaves the learning rate less time than the first round's have smaller updates, in proportion.

    Args:
        size: RMS of the first round's update over RMS of the weights, above 0.
        training: the schedule of the learning rate; the rest of it plays no part.

    Raises:
        UsageError: the size is out of range.
    """

    size: float = TYPICAL_UPDATE_SIZE
    training: TrainingOptions = TrainingOptions()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.size) and self.size > 0):
            raise UsageError(f"the update size is {self.size}; allowed are finite numbers above 0")

    def learning_time(self, plan: RoundPlan) -> float:
        """Return the round's local epochs, each weighted with its share of the full rate."""
        steps = 1 if self.training.schedule_step == "epoch" else _STEPS
        moments = range(plan.epochs * steps)
        return sum(rate_factor(self.training, plan, m / steps, 1 / steps) for m in moments) / steps

    def scales(self, schema: ModelSchema, initial: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Return the RMS of the first round's update for each floating tensor that changes.

        Args:
            schema: the model's schema.
            initial: the initial values by name, with the schema's shapes and dtypes.
        """
        changing = [s for s in schema.tensors if s.is_floating and s.role is not Role.FROZEN]
        sizes = {s.name: _rms(initial[s.name]) if len(s.shape) > 1 else 0.0 for s in changing}
        common = median([rms for rms in sizes.values() if rms > 0] or [1.0])
        return {name: self.size * (rms or common) for name, rms in sizes.items()}

    def train(
        self,
        start: Mapping[str, torch.Tensor],
        scales: Mapping[str, float],
        generator: torch.Generator,
    ) -> ModelState:
        """Return what training would have left, apart from integer tensors, which stay.

        Args:
            start: the received values by name, of any shapes and dtypes; the update is drawn in
                float32 and rounded to the dtype.
            scales: RMS of the update by tensor name; others stay as they are.
            generator: of the draws, on the CPU.
        """
        pool = _laplace(_POOL, generator)
        return {
            name: value + (scales[name] * _some(pool, value.shape, generator)).to(value.dtype)
            if name in scales
            else value
            for name, value in start.items()
        }


def _rms(values: torch.Tensor) -> float:
    norm = torch.linalg.vector_norm(values.detach().to(torch.float32))
    return float(norm) / math.sqrt(max(values.numel(), 1))


def _laplace(count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw from a Laplace distribution around 0 with RMS 1: differences of exponential draws."""
    draws = torch.empty(2, count).exponential_(math.sqrt(2), generator=generator)
    return draws[0] - draws[1]


def _some(pool: torch.Tensor, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Take values from a place of the pool drawn at random; after its end comes its start."""
    start = int(torch.randint(len(pool), (), generator=generator))
    stop = start + shape.numel()
    return pool.repeat(-(-stop // len(pool)))[start:stop].reshape(shape)
