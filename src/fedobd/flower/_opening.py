"""Opening: what a client must know of a run before its first broadcast.

It travels once to each node, apart from the broadcast that all share: as bytes, in this order,

1. the magic `FOBO`, the layout's version (u8), the length of 3 (u32, little endian);
2. the CRC-32 of 3 (u32);
3. a JSON object under zstandard: method and options, schema, keys of the arrays, seed;
4. the method's opening payload (docs/format.md), if it has one: frozen tensors, and for methods
   whose clients keep a state the whole model.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import asdict, dataclass
from typing import Any

import zstandard

from fedobd._errors import DecodeError, DecodeReason, UsageError
from fedobd.blocks import ModelSchema
from fedobd.experiments import make_method, plain_values
from fedobd.flower._layout import Layout
from fedobd.sessions import Method

VERSION = 1
MAX_TERMS_BYTES = 1 << 26  # of the JSON; a schema takes some 100 bytes a tensor

_MAGIC = b"FOBO"
_HEAD = struct.Struct("<4sBII")


def _decompress(text: bytes) -> bytes:
    size = zstandard.get_frame_parameters(text).content_size
    if size > MAX_TERMS_BYTES:
        raise UsageError(f"its terms take {size} bytes; at most {MAX_TERMS_BYTES} are taken")
    return zstandard.ZstdDecompressor().decompress(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricKeys:
    """The names under which a client's train function reports figures in its MetricRecord.

    Args:
        num_examples: examples it trained on, the client's weight; must be there.
        train_loss: mean training loss.
        num_eval_examples: examples on which it evaluated the model it received.
        eval_loss: mean loss on them.
        eval_metric: mean metric on them, by which a stage can be left early.
    """

    num_examples: str = "num-examples"
    train_loss: str = "train_loss"
    num_eval_examples: str = "num-eval-examples"
    eval_loss: str = "eval_loss"
    eval_metric: str = "eval_acc"


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What a client must know of a run.

    Args:
        method: the method with its options.
        schema: the model's schema.
        layout: the arrays that the user's functions see.
        seed: the run's seed.
        metrics: where a client's figures stand; None where the payload's are not heeded.
        shared_start: whether clients hold the initial model already.
    """

    method: Method
    schema: ModelSchema
    layout: Layout
    seed: int
    metrics: MetricKeys | None = None
    shared_start: bool = False

    def pack(self, payload: bytes = b"") -> bytes:
        """Return the bytes, with the method's opening payload."""
        terms = {
            "method": self.method.name,
            "options": plain_values(self.method),
            "schema": self.schema.to_json(),
            "keys": [list(pair) for pair in self.layout.keys],
            "seed": self.seed,
            "metrics": asdict(self.metrics) if self.metrics else None,
            "shared_start": self.shared_start,
        }
        text = zstandard.compress(json.dumps(terms, separators=(",", ":")).encode(), 9)
        return _HEAD.pack(_MAGIC, VERSION, len(text), zlib.crc32(text)) + text + payload

    @classmethod
    def unpack(cls, data: bytes) -> tuple[Opening, bytes]:
        """Return the opening and the method's payload behind it.

        Raises:
            DecodeError: it is cut, altered, of another version, or not what an opening holds.
        """
        if len(data) < _HEAD.size:
            raise DecodeError(DecodeReason.TRUNCATED, f"an opening of {len(data)} bytes came")
        magic, version, length, checksum = _HEAD.unpack_from(data)
        if (magic, version) != (_MAGIC, VERSION):
            raise DecodeError(
                DecodeReason.VERSION,
                f"an opening that starts with {magic!r}, version {version}, came; this side reads "
                f"{_MAGIC!r}, version {VERSION}; install the same fedobd on server and clients",
            )
        text, payload = data[_HEAD.size : _HEAD.size + length], data[_HEAD.size + length :]
        if len(text) < length:
            raise DecodeError(DecodeReason.TRUNCATED, "the opening ends inside its terms")
        if zlib.crc32(text) != checksum:
            raise DecodeError(DecodeReason.CHECKSUM, "the opening was altered")
        try:
            return cls._of_terms(json.loads(_decompress(text))), payload
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
                DecodeReason.FIELD, f"this is no opening that this side understands: {error}"
            ) from error

    @classmethod
    def _of_terms(cls, terms: dict[str, Any]) -> Opening:
        schema = ModelSchema.from_json(terms["schema"])
        layout = Layout(tuple((str(key), str(name)) for key, name in terms["keys"]))
        names = {spec.name for spec in schema.tensors}
        if {name for _, name in layout.keys} != names:
            raise UsageError("the keys of the arrays do not name the tensors of the schema")
        if type(terms["seed"]) is not int:
            raise UsageError(f"seed is {terms['seed']!r}; wanted a whole number")
        return cls(
            method=make_method(terms["method"], terms["options"]),
            schema=schema,
            layout=layout,
            seed=terms["seed"],
            metrics=None if terms["metrics"] is None else MetricKeys(**terms["metrics"]),
            shared_start=bool(terms["shared_start"]),
        )
