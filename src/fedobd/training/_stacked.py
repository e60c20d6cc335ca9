"""Stacked training: the clients of a round trained together, along a leading dimension.

The values of all clients are stacked, and each step computes the gradients of all of them at once
(`torch.func`): small models fill a large device, and tiny ones save most of what a step costs
beside its arithmetic. Every client sees its own batches in the order of `train_locally`; results
are the same up to the rounding of another order of additions.

Clients have unequal numbers of examples. Full batches are stacked for those that have one left;
last batches, which are shorter, for those with equally many examples in them. Rows are never
padded, since they would enter the statistics of batch normalization.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedobd._errors import UsageError
from fedobd.blocks import ModelState, StateStack, named_tensors
from fedobd.data import ClientData, Examples, take_together
from fedobd.sessions import RoundPlan
from fedobd.training._acceleration import pooling_first
from fedobd.training._local import (
    Augment,
    LocalResult,
    Loss,
    TrainingOptions,
    autocast,
    cross_entropy,
    has_batch_norm,
    rate_factor,
    seed_device,
)

_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # of torch.optim.AdamW

Tensors = dict[str, torch.Tensor]
Gradient = Callable[..., tuple[Tensors, tuple[torch.Tensor, Tensors]]]
ClientLoss = Callable[..., tuple[torch.Tensor, tuple[torch.Tensor, Tensors]]]
"""One client's loss from trained values, buffers, inputs and targets; also its value alone, and
the new buffers."""


@dataclass(slots=True)
class _Stack:
    """The clients' values and the state of their optimizers; each tensor has them first.

    Args:
        trained: parameters that are trained.
        buffers: buffers.
        moments: the optimizer's running means by their names.
        steps: how many steps each client has made, shape (clients,).
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
    ) -> _Stack:
        """Stack what the clients start from; their optimizers are fresh."""
        values = {
            name: _stacked([start[name] for start in starts], device)
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

    def take(self, clients: torch.Tensor) -> _Stack:
        """Return copies of some clients' tensors."""
        return _Stack(
            trained={name: value[clients] for name, value in self.trained.items()},
            buffers={name: value[clients] for name, value in self.buffers.items()},
            moments={
                kind: {name: value[clients] for name, value in values.items()}
                for kind, values in self.moments.items()
            },
            steps=self.steps[clients],
        )

    def put(self, clients: torch.Tensor, part: _Stack) -> None:
        """Put such copies back."""
        pairs = [(self.trained, part.trained), (self.buffers, part.buffers)]
        pairs += [(self.moments[kind], part.moments[kind]) for kind in self.moments]
        for whole, some in pairs:
            for name, value in some.items():
                whole[name] = _own(whole[name])
                whole[name][clients] = value
        self.steps[clients] = part.steps


@dataclass(frozen=True, slots=True)
class _Step:
    """One step of some of the clients.

    Args:
        clients: which ones, ascending.
        batches: the numbers of each one's examples, all equally many.
        number: how many batches of the epoch lie behind each of them.
    """

    clients: list[int]
    batches: list[torch.Tensor]
    number: int


def train_stacked(
    model: nn.Module,
    starts: Sequence[ModelState],
    data: Sequence[ClientData],
    plan: RoundPlan,
    seeds: Sequence[int],
    *,
    options: TrainingOptions,
    loss: Loss = cross_entropy,
    augment: Augment | None = None,
) -> tuple[StateStack, list[LocalResult]]:
    """Train one model a client.

    Args:
        model: gives the computation and its device; its values are not used.
        starts: the values that each client starts from, by name; frozen ones are the same.
        data: each client's data.
        plan: epochs, and the place in the schedule.
        seeds: of each client's order of batches.
        options: optimizer, schedule, batch size.
        loss: mean loss of a batch; called under `torch.func.vmap`.
        augment: changes the inputs of each client's batch, with that client's draws.

    Returns:
        The clients' values, and what each reports. Dropout draws other numbers than in
        `train_locally`.

    Raises:
        UsageError: a client's only batch has one example, and the model has batch normalization;
            or examples have unequal shapes, or the model cannot be computed under `vmap`.
    """
    device = next(model.parameters()).device
    parameters = {name: p for name, p, _ in named_tensors(model) if isinstance(p, nn.Parameter)}
    frozen = {n: starts[0][n].to(device) for n, p in parameters.items() if not p.requires_grad}
    sizes = [len(own.train) for own in data]
    stack = _Stack.of(starts, parameters, frozen, options, device)
    trainer = _Trainer(stack, _loss_of_one(model, frozen, loss, options, device), options, sizes)
    orders = [torch.Generator().manual_seed(seed) for seed in seeds]
    model.train()
    generators = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with generators, pooling_first(model):
        seed_device(seeds[0], device)
        for epoch in range(plan.epochs):
            batches = _draw(sizes, orders, options.batch_size, has_batch_norm(model))
            total = torch.zeros(len(data), device=device)
            for step in _steps(batches):
                batch = take_together([data[k].train for k in step.clients], step.batches)
                if augment is not None:
                    batch = _augmented(batch, augment, [orders[k] for k in step.clients])
                rates = [
                    _rate(options, plan, epoch, step.number, len(batches[k])) for k in step.clients
                ]
                losses = trainer.move(step, batch, rates)
                total[step.clients] += losses.to(total.dtype) * len(step.batches[0])
    seen = [sum(map(len, own)) for own in batches]
    results = [
        LocalResult(size, loss / count)
        for size, loss, count in zip(sizes, total.tolist(), seen, strict=True)
    ]
    whole = {**stack.trained, **stack.buffers}
    whole |= {name: value.expand(len(data), *value.shape) for name, value in frozen.items()}
    return StateStack({name: whole[name] for name in starts[0]}), results


def _draw(
    sizes: Sequence[int],
    orders: Sequence[torch.Generator],
    batch_size: int,
    leave_single_out: bool,
) -> list[list[torch.Tensor]]:
    """Return each client's batches of an epoch, in order: the numbers of their examples."""
    drawn = [
        _batches(torch.randperm(size, generator=order), batch_size)
        for size, order in zip(sizes, orders, strict=True)
    ]
    if leave_single_out:
        drawn = [[batch for batch in batches if len(batch) > 1] for batches in drawn]
    if not all(drawn):
        raise UsageError(
            "a client has a single training example, which batch normalization cannot use"
        )
    return drawn


def _batches(order: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Return its parts; as `torch.split`, which takes three times as long for a single one."""
    return [order[start : start + size] for start in range(0, len(order), size)]


def _augmented(batch: Examples, augment: Augment, orders: Sequence[torch.Generator]) -> Examples:
    """Change the inputs of each client's batch, with that client's draws."""
    changed = [augment(own, order) for own, order in zip(batch.inputs, orders, strict=True)]
    return Examples(torch.stack(changed), batch.targets)


def _moments(options: TrainingOptions) -> tuple[str, ...]:
    if options.optimizer == "adamw":
        return "first", "second"
    return ("momentum",) if options.momentum else ()


def _stacked(values: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return values one a client; where several are the same tensor, they share its memory."""
    if len(values) > 1 and all(value is values[0] for value in values):
        one = values[0].detach().to(device)
        return one.unsqueeze(0).expand(len(values), *one.shape)
    return torch.stack([value.detach().to(device) for value in values])


def _own(value: torch.Tensor) -> torch.Tensor:
    """Return a stacked tensor that can be written to: no client shares another's memory."""
    return value.clone() if value.stride(0) == 0 else value


def _loss_of_one(
    model: nn.Module,
    frozen: Tensors,
    loss: Loss,
    options: TrainingOptions,
    device: torch.device,
) -> ClientLoss:
    """Return the function that gives the loss of one client's batch."""

    def loss_of(
        trained: Tensors, buffers: Tensors, inputs: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, Tensors]]:
        values = {**trained, **{n: v.clone() for n, v in buffers.items()}, **frozen}
        with autocast(options, device), sdpa_kernel(SDPBackend.MATH):
            outputs = functional_call(model, values, (inputs,))
            value = loss(outputs, targets)
        return value, (value.detach(), {name: values[name] for name in buffers})

    return loss_of


def _steps(epochs: Sequence[list[torch.Tensor]]) -> Iterator[_Step]:
    """Yield the steps of an epoch: full batches of all clients that have one, then last ones."""
    most = max(len(batches[0]) for batches in epochs)
    longest = max(map(len, epochs))
    last: defaultdict[int, list[int]] = defaultdict(list)
    for number in range(longest):
        full = []
        for client, batches in enumerate(epochs):
            if number < len(batches):
                if len(batches[number]) == most:
                    full.append(client)
                else:
                    last[len(batches[number])].append(client)
        if full:
            yield _Step(full, [epochs[client][number] for client in full], number)
    for clients in last.values():
        by_number: defaultdict[int, list[int]] = defaultdict(list)
        for client in clients:
            by_number[len(epochs[client]) - 1].append(client)
        for number, members in sorted(by_number.items()):
            yield _Step(members, [epochs[client][number] for client in members], number)


def _rate(
    options: TrainingOptions, plan: RoundPlan, epoch: int, number: int, batches: int
) -> float:
    step = 1 / batches if options.schedule_step == "batch" else 1.0
    done = number * step if options.schedule_step == "batch" else 0.0
    return options.learning_rate * rate_factor(options, plan, epoch + done, step)


class _Trainer:
    """Makes the steps of stacked clients.

    Args:
        stack: their values, which it changes.
        loss_of: gives the loss of one client's batch.
        options: optimizer, schedule, batch size.
        sizes: how many training examples each client has.
    """

    def __init__(
        self, stack: _Stack, loss_of: ClientLoss, options: TrainingOptions, sizes: Sequence[int]
    ) -> None:
        decay = options.weight_decay
        decays = [1 / n if decay == "1/n" else float(decay) for n in sizes]
        self._stack, self._loss_of, self._options = stack, loss_of, options
        self._gradient: Gradient = vmap(grad(loss_of, has_aux=True), randomness="different")
        self._unused: Collection[str] | None = None if any(decays) else ()
        self._device = stack.steps.device
        self._decays = torch.tensor(decays, device=self._device)

    def move(self, step: _Step, batch: Examples, rates: Sequence[float]) -> torch.Tensor:
        """Make one step of some clients; return their losses, shape (clients of the step,)."""
        stack, options, device = self._stack, self._options, self._device
        numbers = torch.tensor(step.clients, device=device)
        part = stack if len(step.clients) == len(stack.steps) else stack.take(numbers)
        inputs, targets = batch.inputs.to(device), batch.targets.to(device)
        try:
            if self._unused is None:
                self._unused = self._find_unused(part, inputs[0], targets[0])
            gradients, (losses, buffers) = self._gradient(
                part.trained, part.buffers, inputs, targets
            )
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UsageError(
                f"the model or the loss cannot be computed for several clients at once ({error}); "
                "wanted simulation.stack = 1"
            ) from error
        if options.max_gradient_norm is not None:
            _clip(gradients, options.max_gradient_norm)
        part.steps += 1
        part.buffers = buffers
        update = _sgd if options.optimizer == "sgd" else _adamw
        rates_here = torch.tensor(rates, device=device)
        for name, gradient in gradients.items():
            if name not in self._unused:
                update(options, part, name, gradient, rates_here, self._decays[numbers])
        if part is not stack:
            stack.put(numbers, part)
        return losses

    def _find_unused(
        self, part: _Stack, inputs: torch.Tensor, targets: torch.Tensor
    ) -> Collection[str]:
        """Return the parameters that the loss does not depend on, from one client's batch.

        `torch.func.grad` gives zeros for them, and decay would move what torch's optimizers skip.
        """
        trained = {n: value[0].clone().requires_grad_() for n, value in part.trained.items()}
        buffers = {n: value[0] for n, value in part.buffers.items()}
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            loss, _ = self._loss_of(trained, buffers, inputs, targets)
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        return {name for name, found in zip(trained, gradients, strict=True) if found is None}


def _clip(gradients: Tensors, most: float) -> None:
    """Scale each client's gradients down to a Euclidean norm."""
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
    factors = (most / (norms + 1e-6)).clamp(max=1.0)
    for name, value in gradients.items():
        gradients[name] = value * _column(factors, value).to(value.dtype)


def _column(numbers: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return one number a client in the shape that multiplies a stacked tensor."""
    return numbers.reshape(-1, *(1 for _ in like.shape[1:]))


def _sgd(
    options: TrainingOptions,
    stack: _Stack,
    name: str,
    gradient: torch.Tensor,
    rates: torch.Tensor,
    decays: torch.Tensor,
) -> None:
    """Make a step of `torch.optim.SGD` with one rate and decay a client."""
    value = stack.trained[name]
    if options.weight_decay:
        gradient = gradient.addcmul(_column(decays, value), value)  # others may share its memory
    if options.momentum:
        gradient = stack.moments["momentum"][name].mul_(options.momentum).add_(gradient)
    if value.stride(0) == 0:  # clients share it: one pass writes to memory of their own
        stack.trained[name] = value.addcmul(_column(-rates, value), gradient).to(value.dtype)
    else:
        value.addcmul_(_column(-rates, value), gradient)


def _adamw(
    options: TrainingOptions,
    stack: _Stack,
    name: str,
    gradient: torch.Tensor,
    rates: torch.Tensor,
    decays: torch.Tensor,
) -> None:
    """Make a step of `torch.optim.AdamW`, its defaults apart from rate and decay."""
    value = stack.trained[name] = _own(stack.trained[name])
    first, second = stack.moments["first"][name], stack.moments["second"][name]
    value.mul_(_column(1 - rates * decays, value))
    first.lerp_(gradient, 1 - _BETAS[0])
    second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
    sizes = (rates / (1 - _BETAS[0] ** stack.steps)).to(rates.dtype)
    bias = (1 - _BETAS[1] ** stack.steps).sqrt().to(rates.dtype)
    roots = (second.sqrt() / _column(bias, value)).add_(_EPSILON)
    value.addcmul_(_column(-sizes, value), first / roots)
