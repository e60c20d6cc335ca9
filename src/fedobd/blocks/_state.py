"""ModelState: the values of a model's tensors by name, and the way in and out of a module.

A state is a plain dict that holds tied tensors once. Nothing here changes a tensor in place, apart
from `load_state`, whose purpose it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import nn

from fedobd._errors import UsageError
from fedobd.blocks._schema import ModelSchema, Role, Segment, TensorSpec

ModelState = dict[str, torch.Tensor]
"""Values by tensor name, each with its spec's shape."""


@dataclass(frozen=True, eq=False)
class StateStack(Sequence[ModelState]):
    """The states of several clients as one: tensors by name, shape (clients, *shape)."""

    values: ModelState

    @classmethod
    def of(cls, states: Sequence[ModelState]) -> StateStack:
        """Return the stack of some states, without a copy if they are one."""
        if isinstance(states, StateStack):
            return states
        if len(states) == 1:
            return cls({name: value.unsqueeze(0) for name, value in states[0].items()})
        return cls({name: torch.stack([state[name] for state in states]) for name in states[0]})

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    @overload
    def __getitem__(self, client: int) -> ModelState: ...
    @overload
    def __getitem__(self, client: slice) -> list[ModelState]: ...
    def __getitem__(self, client: int | slice) -> ModelState | list[ModelState]:
        if isinstance(client, slice):
            return [self[number] for number in range(len(self))[client]]
        return {name: value[client] for name, value in self.values.items()}


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, Role]]:
    """Yield the parameters and persistent buffers of a module, each once under its first name."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                role = Role.PARAMETER if parameter.requires_grad else Role.FROZEN
                yield prefix + name, parameter, role
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield prefix + name, buffer, Role.BUFFER


def view_state(model: nn.Module) -> ModelState:
    """Return the tensors of a module themselves, which change when it is trained."""
    return {name: tensor.detach() for name, tensor, _ in named_tensors(model)}


def get_state(model: nn.Module) -> ModelState:
    """Return copies of the tensors of a module on the CPU, in the module's own element types."""
    return {
        name: tensor.to("cpu", copy=True).contiguous()
        for name, tensor in view_state(model).items()
    }


def load_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copy a state into a module, casting to the module's element types.

    Raises:
        UsageError: a tensor of the module is missing in the state or has another shape there.
    """
    tensors = list(named_tensors(model))
    for name, tensor, _ in tensors:
        if name not in state:
            raise UsageError(f"the state holds no value for tensor {name!r} of the model")
        if state[name].shape != tensor.shape:
            raise UsageError(
                f"tensor {name!r} has shape {tuple(tensor.shape)} in the model and "
                f"{tuple(state[name].shape)} in the state"
            )
    with torch.no_grad():
        for name, tensor, _ in tensors:
            tensor.copy_(state[name])


def master_state(schema: ModelSchema, state: Mapping[str, torch.Tensor]) -> ModelState:
    """Return the server's copy of a state, with what is trained or averaged in float32.

    Raises:
        UsageError: a tensor of the schema is missing, or has another shape.
    """
    check_state(schema, state)
    master: ModelState = {}
    for spec in schema.tensors:
        value = state[spec.name].detach().to("cpu")
        average = spec.is_floating and spec.role is not Role.FROZEN
        master[spec.name] = value.to(torch.float32 if average else spec.dtype, copy=True)
    return master


def check_state(schema: ModelSchema, state: Mapping[str, torch.Tensor]) -> None:
    """Raise UsageError unless a state holds each tensor of the schema in its shape; any type."""
    for spec in schema.tensors:
        if spec.name not in state:
            raise UsageError(f"the state holds no value for tensor {spec.name!r}")
        if tuple(state[spec.name].shape) != spec.shape:
            raise UsageError(
                f"tensor {spec.name!r} has shape {tuple(state[spec.name].shape)}; wanted "
                f"{spec.shape}"
            )


def cast_state(schema: ModelSchema, state: Mapping[str, torch.Tensor]) -> ModelState:
    """Return copies of a state's tensors, in their shapes, in the model's own element types."""
    return {spec.name: state[spec.name].to(spec.dtype, copy=True) for spec in schema.tensors}


def state_fingerprint(schema: ModelSchema, state: Mapping[str, torch.Tensor]) -> bytes:
    """Return 16 bytes that two states share only if names, shapes, types and all values are equal.

    Values count in the model's element types.

    Raises:
        UsageError: a tensor is missing or has another shape.
    """
    check_state(schema, state)
    digest = hashlib.blake2b(schema.fingerprint, digest_size=16)
    for spec in schema.tensors:
        values = state[spec.name].detach().to("cpu", spec.dtype).reshape(-1).contiguous()
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.digest()


def segment_of(
    state: Mapping[str, torch.Tensor], spec: TensorSpec, segment: Segment
) -> torch.Tensor:
    """Return a segment's elements, 1-D, in the tensor's type; a view where it is contiguous."""
    return state[spec.name].detach().reshape(-1)[segment.start : segment.stop]
