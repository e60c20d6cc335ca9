"""Layout: which key of an ArrayRecord is which tensor of the model.

A state dict names tied tensors more than once, the schema once; and it knows nothing of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import nn

from fedobd._errors import UsageError
from fedobd.blocks import (
    DTYPES,
    BlockRules,
    ModelSchema,
    ModelState,
    decompose,
    decompose_names,
    guess_roles,
    named_tensors,
)

_ARRAY_TYPES = frozenset(
    name for name in DTYPES if name != "bfloat16"
)  # what NumPy, and so Flower, has


@dataclass(frozen=True, slots=True)
class Layout:
    """The arrays of a record, in order.

    Args:
        keys: each key with the name of its tensor in the schema; tied tensors have several keys.
    """

    keys: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, schema: ModelSchema) -> Layout:
        """Return the layout in which each tensor stands under its own name."""
        return cls(tuple((spec.name, spec.name) for spec in schema.tensors))

    def to_state(
        self, record: ArrayRecord, schema: ModelSchema, *, cast: bool = True
    ) -> ModelState:
        """Return a record's values by tensor name, cast to the schema's element types.

        Without `cast` they keep their own, which may be finer than the model's.

        Raises:
            UsageError: the record has other keys or shapes.
        """
        wanted = [key for key, _ in self.keys]
        if set(record) != set(wanted):
            missing = sorted(set(wanted) - set(record))
            unknown = sorted(set(record) - set(wanted))
            raise UsageError(
                "the ArrayRecord has other arrays than this run's model: "
                f"{_some(missing)} missing, {_some(unknown)} unknown"
            )
        specs = {spec.name: spec for spec in schema.tensors}
        state: ModelState = {}
        for key, name in self.keys:
            if name not in state:
                values = torch.from_numpy(_writable(key, record[key]))
                if tuple(values.shape) != specs[name].shape:
                    raise UsageError(
                        f"array {key!r} has shape {tuple(values.shape)}; this run's model has "
                        f"{specs[name].shape}"
                    )
                state[name] = values.to(specs[name].dtype) if cast else values
        return state

    def to_arrays(self, state: Mapping[str, torch.Tensor]) -> ArrayRecord:
        """Return a record of a state's values; bfloat16, which Flower lacks, becomes float32."""
        arrays: dict[str, Array] = {}
        made: dict[str, Array] = {}
        for key, name in self.keys:
            if name not in made:
                values = state[name].detach().to("cpu").contiguous()
                if values.dtype == torch.bfloat16:
                    values = values.to(torch.float32)
                made[name] = Array(values.numpy())
            arrays[key] = made[name]
        return ArrayRecord(arrays)


def describe(
    record: ArrayRecord,
    model_factory: Callable[[], nn.Module] | None = None,
    rules: BlockRules | None = None,
) -> tuple[ModelSchema, Layout]:
    """Return schema and layout of the model whose values a record holds.

    Args:
        record: all values of the model.
        model_factory: makes the model; None to go by names and shapes alone.
        rules: how to cut it into blocks.

    Raises:
        UsageError: the record does not fit the model, or an array is of a type that cannot be
            averaged.
    """
    if model_factory is None:
        for key, array in record.items():
            _check_type(key, array)
        specs = guess_roles(
            list(record),
            [tuple(array.shape) for array in record.values()],
            [DTYPES[array.dtype] for array in record.values()],
        )
        schema = decompose_names(specs, rules)
        layout = Layout.of(schema)
    else:
        model = model_factory()
        schema = decompose(model, rules)
        names = {id(tensor): name for name, tensor, _ in named_tensors(model)}
        entries = model.state_dict(keep_vars=True)
        for key, value in entries.items():
            if id(value) not in names:
                raise UsageError(
                    f"entry {key!r} of the model's state_dict is neither a parameter nor a "
                    "buffer, so it cannot travel; wanted a model without extra state"
                )
        layout = Layout(tuple((key, names[id(value)]) for key, value in entries.items()))
    layout.to_state(record, schema)
    return schema, layout


def _check_type(key: str, array: Array) -> None:
    if array.dtype not in _ARRAY_TYPES:
        raise UsageError(
            f"array {key!r} has element type {array.dtype}; supported are "
            f"{', '.join(sorted(_ARRAY_TYPES))}"
        )


def _writable(key: str, array: Array) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    _check_type(key, array)
    try:
        values = array.numpy()
    except (TypeError, ValueError) as error:
        raise UsageError(f"array {key!r} cannot be read: {error}") from error
    return np.array(values, order="C")  # flat views of a tensor must be views


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "none"
