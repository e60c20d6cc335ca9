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
from fedobd.training._evaluation import Loss, cross_entropy
from fedobd.training._local import (
    Augment,
    LocalResult,
    autocast,
    draw_batches,
    has_batch_norm,
    seeded,
)
from fedobd.training._options import TrainingOptions, learning_rate
from fedobd.training._stack import ClientStack, Tensors, clip


@dataclass(frozen=True, slots=True)
class ClientStart:
    """What one client of a stack begins a round with.

    Args:
        state: its values by name; frozen ones are the same for all clients.
        data: its data.
        seed: of the order of its batches.
    """

    state: ModelState
    data: ClientData
    seed: int


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
    clients: Sequence[ClientStart],
    plan: RoundPlan,
    *,
    options: TrainingOptions,
    loss: Loss = cross_entropy,
    augment: Augment | None = None,
) -> tuple[StateStack, list[LocalResult]]:
    """Train one model a client.

    Args:
        model: gives the computation and its device; its values are not used.
        clients: what each client begins with.
        plan: epochs, and the place in the schedule.
        options: optimizer, schedule, batch size.
        loss: mean loss of a batch; called under `torch.func.vmap`.
        augment: changes the inputs of each client's batch, with that client's draws.

    Returns:
        The clients' values, each tensor with shape (clients, *shape in the model), and what each
        client reports. Dropout draws other numbers than in `train_locally`.

    Raises:
        UsageError: a client's only batch has one example, and the model has batch normalization;
            or examples have unequal shapes, or the model cannot be computed under `vmap`.
    """
    trainer = _Trainer(model, clients, options, loss)
    orders = [torch.Generator().manual_seed(client.seed) for client in clients]
    sizes = [len(client.data.train) for client in clients]
    leave_single_out = has_batch_norm(model)
    model.train()
    with seeded(clients[0].seed, trainer.device):
        for epoch in range(plan.epochs):
            batches = [
                draw_batches(size, options.batch_size, order, leave_single_out)
                for size, order in zip(sizes, orders, strict=True)
            ]
            total = torch.zeros(len(clients), device=trainer.device)
            for step in _steps(batches):
                batch = take_together([clients[k].data.train for k in step.clients], step.batches)
                if augment is not None:
                    batch = _augmented(batch, augment, [orders[k] for k in step.clients])
                rates = [
                    learning_rate(options, plan, epoch, step.number, len(batches[k]))
                    for k in step.clients
                ]
                losses = trainer.step(step.clients, batch, rates)
                total[step.clients] += losses.to(total.dtype) * len(step.batches[0])
    seen = [sum(map(len, drawn)) for drawn in batches]
    results = [
        LocalResult(size, loss_sum / count)
        for size, loss_sum, count in zip(sizes, total.tolist(), seen, strict=True)
    ]
    return trainer.states(), results


def _augmented(batch: Examples, augment: Augment, orders: Sequence[torch.Generator]) -> Examples:
    """Change the inputs of each client's batch, with that client's draws."""
    changed = [augment(inputs, order) for inputs, order in zip(batch.inputs, orders, strict=True)]
    return Examples(torch.stack(changed), batch.targets)


def _steps(epochs: Sequence[list[torch.Tensor]]) -> Iterator[_Step]:
    """Yield the steps of an epoch: full batches of all clients that have one, then last ones.

    Each client's batches come in its own order, whoever it is stacked with: last batches may wait
    for all full ones, since they are the last of their client.

    Args:
        epochs: each client's batches, at least one.
    """
    most = max(len(batches[0]) for batches in epochs)
    last: defaultdict[int, defaultdict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number in range(max(map(len, epochs))):
        full = []
        for client, batches in enumerate(epochs):
            if number < len(batches):
                if len(batches[number]) == most:
                    full.append(client)
                else:
                    last[len(batches[number])][number].append(client)
        if full:
            yield _Step(full, [epochs[client][number] for client in full], number)
    for by_number in last.values():
        for number, clients in by_number.items():
            yield _Step(clients, [epochs[client][number] for client in clients], number)


class _Trainer:
    """Makes the steps of stacked clients.

    Args:
        model: gives the computation and its device.
        clients: what each client begins with.
        options: optimizer, schedule, batch size.
        loss: mean loss of a batch.
    """

    def __init__(
        self,
        model: nn.Module,
        clients: Sequence[ClientStart],
        options: TrainingOptions,
        loss: Loss,
    ) -> None:
        self.device = next(model.parameters()).device
        starts = [client.state for client in clients]
        parameters = {n: p for n, p, _ in named_tensors(model) if isinstance(p, nn.Parameter)}
        self._names = list(starts[0])
        self._frozen = {
            name: starts[0][name].to(self.device)
            for name, parameter in parameters.items()
            if not parameter.requires_grad
        }
        self._stack = ClientStack.of(starts, parameters, self._frozen, options, self.device)
        decays = [options.decay_of(len(client.data.train)) for client in clients]
        self._decays = torch.tensor(decays, device=self.device)
        self._options = options
        self._client_loss = _client_loss(model, self._frozen, loss, options)
        # "different": each client draws a dropout mask of its own, as it would alone.
        self._gradients: Callable[..., tuple[Tensors, tuple[torch.Tensor, Tensors]]] = vmap(
            grad(self._client_loss, has_aux=True), randomness="different"
        )
        # Looked for only where it matters: without decay a gradient of 0 moves nothing.
        self._unused: Collection[str] | None = None if any(decays) else ()

    def step(
        self, clients: Sequence[int], batch: Examples, rates: Sequence[float]
    ) -> torch.Tensor:
        """Make one step of some clients.

        Args:
            clients: their numbers in the stack, ascending.
            batch: their examples, inputs and targets with shape (clients, batch, ...).
            rates: their learning rates.

        Returns:
            Their mean losses, shape (clients,).
        """
        stack, options = self._stack, self._options
        numbers = torch.tensor(clients, device=self.device)
        part = stack if len(clients) == len(stack.steps) else stack.take(numbers)
        gradients, losses, part.buffers = self._differentiate(part, batch)
        if options.max_gradient_norm is not None:
            gradients = clip(gradients, options.max_gradient_norm)
        unused = self._unused or ()
        gradients = {name: value for name, value in gradients.items() if name not in unused}
        rates_here = torch.tensor(rates, device=self.device)
        part.update(options, gradients, rates_here, self._decays[numbers])
        if part is not stack:
            stack.put(numbers, part)
        return losses

    def _differentiate(
        self, part: ClientStack, batch: Examples
    ) -> tuple[Tensors, torch.Tensor, Tensors]:
        """Return the clients' gradients, their losses and their new buffers."""
        inputs, targets = batch.inputs.to(self.device), batch.targets.to(self.device)
        try:
            if self._unused is None:
                self._unused = self._find_unused(part, inputs[0], targets[0])
            gradients, (losses, buffers) = self._gradients(
                part.trained, part.buffers, inputs, targets
            )
        except torch.cuda.OutOfMemoryError:
            raise  # also a RuntimeError, and no fault of the model: a smaller stack may fit
        except RuntimeError as error:
            raise UsageError(
                f"the model or the loss cannot be computed for several clients at once ({error}); "
                "wanted simulation.stack = 1"
            ) from error
        return gradients, losses, buffers

    def _find_unused(
        self, part: ClientStack, inputs: torch.Tensor, targets: torch.Tensor
    ) -> Collection[str]:
        """Return the parameters that the loss does not depend on, from one client's batch.

        `torch.func.grad` gives zeros for them, and decay would move what torch's optimizers skip.
        """
        trained = {n: value[0].clone().requires_grad_() for n, value in part.trained.items()}
        buffers = {n: value[0] for n, value in part.buffers.items()}
        with seeded(0, self.device):  # what it draws here does not change what it draws later
            loss, _ = self._client_loss(trained, buffers, inputs, targets)
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        return {name for name, value in zip(trained, gradients, strict=True) if value is None}

    def states(self) -> StateStack:
        """Return the clients' values; frozen ones share one memory."""
        stack = self._stack
        values = {**stack.trained, **stack.buffers}
        for name, value in self._frozen.items():
            values[name] = value.expand(len(stack.steps), *value.shape)
        return StateStack({name: values[name] for name in self._names})


def _client_loss(
    model: nn.Module, frozen: Tensors, loss: Loss, options: TrainingOptions
) -> Callable[..., tuple[torch.Tensor, tuple[torch.Tensor, Tensors]]]:
    """Return the function that gives the loss of one client's batch.

    It takes trained values, buffers, inputs and targets. It returns the loss to differentiate,
    and beside it the loss as a value and the new buffers.
    """

    def client_loss(
        trained: Tensors, buffers: Tensors, inputs: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, Tensors]]:
        # Layers change buffers in place, and the stack's may lie in memory that clients share.
        values = {**trained, **{n: v.clone() for n, v in buffers.items()}, **frozen}
        # Fused attention has no rule for `vmap`, which would compute it client by client.
        with autocast(options, inputs.device), sdpa_kernel(SDPBackend.MATH):
            outputs = functional_call(model, values, (inputs,))
            value = loss(outputs, targets)
        return value, (value.detach(), {name: values[name] for name in buffers})

    return client_loss
