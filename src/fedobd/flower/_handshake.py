"""Handshake: what a client must know of a run before its first broadcast.

It travels once to each node, apart from the broadcast that all share: as bytes, in this order,

1. the magic `FOBO`, the version of this layout (u8), the length of 3 (u32, little endian);
2. the CRC-32 of 3 (u32);
3. a JSON object under zstandard: method and options, schema, keys of the arrays, seed;
4. the method's initial payload (docs/format.md), if it has one: frozen tensors, and for methods
   whose clients keep a state the whole model.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import zstandard
from flwr.app import Array, ArrayRecord
from torch import nn

from fedobd._errors import DecodeError, DecodeReason, UsageError
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
from fedobd.experiments import make_method, plain_values
from fedobd.flower._metrics import MetricKeys
from fedobd.sessions import Method

VERSION = 1
MAX_TERMS_BYTES = 1 << 26  # of the JSON; a schema takes some 100 bytes a tensor

_MAGIC = b"FOBO"
_HEAD = struct.Struct("<4sBII")
_ARRAY_TYPES = sorted(set(DTYPES) - {"bfloat16"})  # what NumPy, and so Flower, has


@dataclass(frozen=True, slots=True)
class ArrayKeys:
    """Which key of an ArrayRecord is which tensor of the model.

    A state dict names tied tensors more than once, the schema once.

    Args:
        pairs: each key, in the record's order, with the name of its tensor in the schema; tied
            tensors have several keys.
    """

    pairs: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, schema: ModelSchema) -> ArrayKeys:
        """Return the keys by which each tensor stands under its name in the schema."""
        return cls(tuple((spec.name, spec.name) for spec in schema.tensors))

    def to_state(
        self, record: ArrayRecord, schema: ModelSchema, *, cast: bool = True
    ) -> ModelState:
        """Return a record's values by tensor name.

        Args:
            record: an array for each key, of the shape of its tensor in the schema and of any
                element type of NumPy that the schema may have.
            schema: the model's.
            cast: whether to cast to the schema's element types; those of the arrays may be finer.

        Returns:
            Tensors of the schema's shapes, on the CPU, with memory of their own.

        Raises:
            UsageError: the record has other keys or shapes.
        """
        keys = {key for key, _ in self.pairs}
        if set(record) != keys:
            raise UsageError(
                "the ArrayRecord has other arrays than this run's model: "
                f"{_some(keys - set(record))} missing, {_some(set(record) - keys)} unknown"
            )
        specs = {spec.name: spec for spec in schema.tensors}
        state: ModelState = {}
        for key, name in self.pairs:
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
        """Return a record of a state's values.

        Args:
            state: tensors by name, of any shape, element type and device.

        Returns:
            Arrays of the same shapes and element types; bfloat16, which NumPy lacks, becomes
            float32.
        """
        arrays: dict[str, Array] = {}
        for name in dict.fromkeys(name for _, name in self.pairs):
            values = state[name].detach().to("cpu").contiguous()
            if values.dtype == torch.bfloat16:
                values = values.to(torch.float32)
            arrays[name] = Array(values.numpy())
        return ArrayRecord({key: arrays[name] for key, name in self.pairs})


@dataclass(frozen=True, slots=True, kw_only=True)
class Handshake:
    """What a client must know of a run.

    Args:
        method: the method with its options.
        schema: the model's schema.
        keys: the arrays that the user's functions see.
        seed: the run's seed.
        metrics: where a client's figures stand; None where the payload's are not heeded.
        shared_start: whether clients hold the initial model already.
    """

    method: Method
    schema: ModelSchema
    keys: ArrayKeys
    seed: int
    metrics: MetricKeys | None = None
    shared_start: bool = False

    def pack(self, payload: bytes = b"") -> bytes:
        """Return the bytes, with the method's initial payload."""
        terms = {
            "method": self.method.name,
            "options": plain_values(self.method),
            "schema": self.schema.to_json(),
            "keys": [list(pair) for pair in self.keys.pairs],
            "seed": self.seed,
            "metrics": asdict(self.metrics) if self.metrics else None,
            "shared_start": self.shared_start,
        }
        text = zstandard.compress(json.dumps(terms, separators=(",", ":")).encode(), 9)
        return _HEAD.pack(_MAGIC, VERSION, len(text), zlib.crc32(text)) + text + payload

    @classmethod
    def unpack(cls, data: bytes) -> tuple[Handshake, bytes]:
        """Return the handshake and the method's payload behind it.

        Raises:
            DecodeError: it is cut, altered, of another version, or not what a handshake holds.
        """
        if len(data) < _HEAD.size:
            raise DecodeError(DecodeReason.TRUNCATED, f"a handshake of {len(data)} bytes came")
        magic, version, length, checksum = _HEAD.unpack_from(data)
        if (magic, version) != (_MAGIC, VERSION):
            raise DecodeError(
                DecodeReason.VERSION,
                f"a handshake that starts with {magic!r}, version {version}, came; this side "
                f"reads {_MAGIC!r}, version {VERSION}; install the same fedobd on server and "
                "clients",
            )
        text, payload = data[_HEAD.size : _HEAD.size + length], data[_HEAD.size + length :]
        if len(text) < length:
            raise DecodeError(DecodeReason.TRUNCATED, "the handshake ends inside its terms")
        if zlib.crc32(text) != checksum:
            raise DecodeError(DecodeReason.CHECKSUM, "the handshake was altered")
        try:
            return cls._of_terms(json.loads(_decompress(text))), payload
        # What JSON of another shape raises, wherever it differs from what is looked for.
        except (
            zstandard.ZstdError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
            UsageError,
        ) as error:
            raise DecodeError(
                DecodeReason.FIELD, f"this is no handshake that this side understands: {error}"
            ) from error

    @classmethod
    def _of_terms(cls, terms: dict[str, Any]) -> Handshake:
        schema = ModelSchema.from_json(terms["schema"])
        keys = ArrayKeys(tuple((str(key), str(name)) for key, name in terms["keys"]))
        if {name for _, name in keys.pairs} != {spec.name for spec in schema.tensors}:
            raise UsageError("the keys of the arrays do not name the tensors of the schema")
        if type(terms["seed"]) is not int:
            raise UsageError(f"seed is {terms['seed']!r}; wanted a whole number")
        return cls(
            method=make_method(terms["method"], terms["options"]),
            schema=schema,
            keys=keys,
            seed=terms["seed"],
            metrics=None if terms["metrics"] is None else MetricKeys(**terms["metrics"]),
            shared_start=bool(terms["shared_start"]),
        )


def describe(
    record: ArrayRecord,
    model_factory: Callable[[], nn.Module] | None = None,
    rules: BlockRules | None = None,
) -> tuple[ModelSchema, ArrayKeys]:
    """Return schema and keys of the model whose values a record holds.

    Args:
        record: all values of the model, in the shapes and element types of its state dict.
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
        keys = ArrayKeys.of(schema)
    else:
        model = model_factory()
        schema = decompose(model, rules)
        names = {id(tensor): name for name, tensor, _ in named_tensors(model)}
        # With keep_vars tied entries are one object; without, each is a view of its own.
        entries = model.state_dict(keep_vars=True)
        for key, value in entries.items():
            if id(value) not in names:
                raise UsageError(
                    f"entry {key!r} of the model's state_dict is neither a parameter nor a "
                    "buffer, so it cannot travel; wanted a model without extra state"
                )
        keys = ArrayKeys(tuple((key, names[id(value)]) for key, value in entries.items()))
    keys.to_state(record, schema)
    return schema, keys


def _decompress(text: bytes) -> bytes:
    # The size is looked at first: a few bytes of zstandard may stand for gigabytes.
    size = zstandard.get_frame_parameters(text).content_size
    if size > MAX_TERMS_BYTES:
        raise UsageError(f"its terms take {size} bytes; at most {MAX_TERMS_BYTES} are taken")
    return zstandard.ZstdDecompressor().decompress(text)


def _check_type(key: str, array: Array) -> None:
    if array.dtype not in _ARRAY_TYPES:
        raise UsageError(
            f"array {key!r} has element type {array.dtype}; supported are "
            f"{', '.join(_ARRAY_TYPES)}"
        )


def _writable(key: str, array: Array) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """Return an array's values, in memory of their own: Flower's is read only."""
    _check_type(key, array)
    try:
        values = array.numpy()
    except (TypeError, ValueError) as error:
        raise UsageError(f"array {key!r} cannot be read: {error}") from error
    return np.array(values, order="C")  # flat views of a tensor must be views


def _some(keys: set[str]) -> str:
    names = sorted(keys)
    shown = ", ".join(map(repr, names[:3]))
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "none"
