"""ClientStack: values and optimizer state of clients that are trained together.

Each tensor has the clients first. The optimizers are those of torch with one learning rate and one
weight decay a client, which torch's own cannot have within a tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from fedobd.blocks import ModelState
from fedobd.training._options import TrainingOptions

_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # the defaults of torch.optim.AdamW

Tensors = dict[str, torch.Tensor]


@dataclass(slots=True)
class ClientStack:
    """Values and optimizer state; each tensor has the clients first.

    Args:
        trained: parameters that are trained.
        buffers: buffers.
        moments: the optimizer's running means by their names.
        steps: how many steps each client has made, float64, shape (clients,).
    """

    trained: Tensors
    buffers: Tensors
    moments: dict[str, Tensors]
    steps: torch.Tensor

    @classmethod
    def of(
        cls,
        starts: Sequence[ModelState],
        parameters: Collection[str],
        frozen: Collection[str],
        options: TrainingOptions,
        device: torch.device,
    ) -> ClientStack:
        """Stack what the clients start from, with fresh optimizers.

        Args:
            starts: each client's values.
            parameters: names of the parameters; other values are buffers.
            frozen: names of values that are left out.
            options: names the optimizer.
            device: where the stack lies.
        """
        values = {
            name: _stack([start[name] for start in starts], device)
            for name in starts[0]
            if name not in frozen
        }
        trained = {name: value for name, value in values.items() if name in parameters}
        return cls(
            trained=trained,
            buffers={name: value for name, value in values.items() if name not in parameters},
            moments={
                kind: {name: torch.zeros_like(value) for name, value in trained.items()}
                for kind in _moments(options)
            },
            steps=torch.zeros(len(starts), dtype=torch.float64, device=device),
        )

    def take(self, clients: torch.Tensor) -> ClientStack:
        """Return copies of some clients' tensors; clients is int64, shape (n,)."""
        return ClientStack(
            trained={name: value[clients] for name, value in self.trained.items()},
            buffers={name: value[clients] for name, value in self.buffers.items()},
            moments={
                kind: {name: value[clients] for name, value in values.items()}
                for kind, values in self.moments.items()
            },
            steps=self.steps[clients],
        )

    def put(self, clients: torch.Tensor, part: ClientStack) -> None:
        """Put such copies back at their clients, int64 of shape (clients,)."""
        pairs = [(self.trained, part.trained), (self.buffers, part.buffers)]
        pairs += [(self.moments[kind], part.moments[kind]) for kind in self.moments]
        for whole, some in pairs:
            for name, value in some.items():
                whole[name] = _unshared(whole[name])
                whole[name][clients] = value
        self.steps[clients] = part.steps

    def update(
        self,
        options: TrainingOptions,
        gradients: Tensors,
        rates: torch.Tensor,
        decays: torch.Tensor,
    ) -> None:
        """Make one step of the optimizer for every client.

        Args:
            options: optimizer, momentum and the norm that gradients are scaled down to.
            gradients: by name, shape (clients, *shape of the tensor).
            rates: learning rates, float32, shape (clients,).
            decays: weight decays, float32, shape (clients,).
        """
        self.steps += 1
        update = self._sgd if options.optimizer == "sgd" else self._adamw
        for name, gradient in gradients.items():
            update(options, name, gradient, rates, decays)

    def _sgd(
        self,
        options: TrainingOptions,
        name: str,
        gradient: torch.Tensor,
        rates: torch.Tensor,
        decays: torch.Tensor,
    ) -> None:
        """Make a step of `torch.optim.SGD`."""
        value = self.trained[name]
        if options.weight_decay:
            # Not in place: where two parameters are added, their gradients are one tensor.
            gradient = gradient.addcmul(_column(decays, value), value)
        if options.momentum:
            gradient = self.moments["momentum"][name].mul_(options.momentum).add_(gradient)
        if _is_shared(value):  # the first step: the one pass that also parts the clients' memory
            self.trained[name] = value.addcmul(_column(-rates, value), gradient).to(value.dtype)
        else:
            value.addcmul_(_column(-rates, value), gradient)

    def _adamw(
        self,
        options: TrainingOptions,
        name: str,
        gradient: torch.Tensor,
        rates: torch.Tensor,
        decays: torch.Tensor,
    ) -> None:
        """Make a step of `torch.optim.AdamW`, its defaults apart from rate and decay."""
        value = self.trained[name] = _unshared(self.trained[name])
        first, second = self.moments["first"][name], self.moments["second"][name]
        value.mul_(_column(1 - rates * decays, value))
        first.lerp_(gradient, 1 - _BETAS[0])
        second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
        # The powers in float64: at the first steps 1 - 0.999^t is a small difference of near ones.
        sizes = (rates / (1 - _BETAS[0] ** self.steps)).to(rates.dtype)
        bias = (1 - _BETAS[1] ** self.steps).sqrt().to(rates.dtype)
        roots = (second.sqrt() / _column(bias, value)).add_(_EPSILON)
        value.addcmul_(_column(-sizes, value), first / roots)


def _moments(options: TrainingOptions) -> tuple[str, ...]:
    if options.optimizer == "adamw":
        return "first", "second"
    return ("momentum",) if options.momentum else ()


def clip(gradients: Tensors, most: float) -> Tensors:
    """Return each client's gradients scaled down to a Euclidean norm.

    Args:
        gradients: by name, shape (clients, *shape of the tensor).
        most: the largest norm of one client's gradients together.
    """
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
    factors = (most / (norms + 1e-6)).clamp(max=1.0)  # 1e-6 as in torch's clip_grad_norm_
    return {
        name: value * _column(factors, value).to(value.dtype) for name, value in gradients.items()
    }


def _column(numbers: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return one number a client in the shape that multiplies a stacked tensor."""
    return numbers.reshape(-1, *(1 for _ in like.shape[1:]))


def _stack(values: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return values one a client.

    All clients of a round usually start from one broadcast: the same tensors are not copied for
    each until the first step writes to them.
    """
    if len(values) > 1 and all(value is values[0] for value in values):
        one = values[0].detach().to(device)
        return one.unsqueeze(0).expand(len(values), *one.shape)
    return torch.stack([value.detach().to(device) for value in values])


def _is_shared(value: torch.Tensor) -> bool:
    """Whether the clients of a stacked tensor share one memory, as `expand` gives it."""
    return value.stride(0) == 0


def _unshared(value: torch.Tensor) -> torch.Tensor:
    """Return a stacked tensor that can be written to."""
    return value.clone() if _is_shared(value) else value
