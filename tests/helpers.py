"""Builders that the tests share: schemas, states, headers, payloads, and models to cut."""

from __future__ import annotations

import functools
import math
import signal
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from numpy.typing import NDArray
from torch import nn

from fedobd.blocks import Block, ModelSchema, ModelState, Role, Segment, TensorSpec, segment_of
from fedobd.codec import Mask, Quantizer, Unquantized
from fedobd.models import (
    DenseNet40,
    DigitsCNN,
    ResNet18,
    TransformerClassifier,
    use_batch_statistics,
)
from fedobd.payload import Header, Kind, Payload, Report, Source, encode_payload

Piece = int | tuple[int, int, int]
"""A whole tensor by its number, or tensor number, first and past-the-last element."""


def law(max_examples: int) -> settings:
    """Settings of a Hypothesis test: the same examples on every run, no clock."""
    return settings(max_examples=max_examples, deadline=None, derandomize=True)


def heed_ctrl_c() -> None:
    """Take Ctrl-C as a terminal's child does: a shell's background jobs start by ignoring it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def with_checksum(data: bytes) -> bytes:
    """Return the bytes with their last four replaced by the CRC-32 of those before."""
    body = data[:-4]
    return body + struct.pack("<I", zlib.crc32(body))


def parameter(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> TensorSpec:
    return TensorSpec(name, shape, dtype, Role.PARAMETER)


def buffer(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> TensorSpec:
    return TensorSpec(name, shape, dtype, Role.BUFFER)


def frozen(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> TensorSpec:
    return TensorSpec(name, shape, dtype, Role.FROZEN)


def make_schema(specs: Sequence[TensorSpec], *blocks: Sequence[Piece]) -> ModelSchema:
    """Build a schema; without blocks, each tensor that is not frozen is a block of its own."""
    if not blocks:
        blocks = tuple([i] for i, spec in enumerate(specs) if spec.role is not Role.FROZEN)
    built = []
    for number, pieces in enumerate(blocks):
        segments = tuple(
            Segment(piece, 0, specs[piece].num_elements)
            if isinstance(piece, int)
            else Segment(*piece)
            for piece in pieces
        )
        count = sum(s.num_elements for s in segments if specs[s.tensor].role is Role.PARAMETER)
        built.append(Block(f"b{number}", "Test", (f"b{number}",), segments, count))
    return ModelSchema(tuple(specs), tuple(built))


def random_tensor(
    spec: TensorSpec, rng: np.random.Generator, scale: float = 1.0, offset: float = 0.0
) -> torch.Tensor:
    if spec.is_floating:
        values = np.asarray(rng.standard_normal(spec.shape) * scale + offset)
    else:
        values = np.asarray(rng.integers(0, 2 if spec.dtype is torch.bool else 100, spec.shape))
    # a copy, since an empty tensor that is made from NumPy has a stride of 0
    return torch.zeros(spec.shape, dtype=spec.dtype).copy_(torch.from_numpy(values))


def random_state(
    schema: ModelSchema, seed: int, scale: float = 1.0, offset: float = 0.0
) -> ModelState:
    rng = np.random.default_rng(seed)
    return {spec.name: random_tensor(spec, rng, scale, offset) for spec in schema.tensors}


def source_of(
    schema: ModelSchema,
    state: Mapping[str, torch.Tensor],
    start: Mapping[str, torch.Tensor] | None = None,
) -> Source:
    """Give segments of a state; with a start, float32 differences to it for parameters."""

    def source(segment: Segment) -> torch.Tensor:
        spec = schema.tensors[segment.tensor]
        values = segment_of(state, spec, segment)
        if start is None or spec.role is not Role.PARAMETER:
            return values
        return values.to(torch.float32) - segment_of(start, spec, segment).to(torch.float32)

    return source


def header_of(
    schema: ModelSchema,
    kind: Kind = Kind.BROADCAST,
    *,
    kept: Sequence[int] | None = None,
    is_difference: bool = False,
    mask: Mask | None = None,
    block_differences: tuple[float, ...] | None = None,
    report: Report | None = None,
    is_lossless: bool = False,
    start: bytes | None = None,
) -> Header:
    is_upload = kind is Kind.UPLOAD
    return Header(
        kind=kind,
        method=1,
        round=3,
        stage=1,
        block_ids=tuple(range(len(schema.blocks)) if kept is None else kept),
        is_difference=is_difference,
        client=7 if is_upload else None,
        report=(report or Report(num_examples=5, train_loss=0.5)) if is_upload else None,
        mask=mask,
        block_differences=block_differences,
        is_lossless=is_lossless,
        start=start,
    )


def encode(
    schema: ModelSchema,
    state: Mapping[str, torch.Tensor],
    header: Header | None = None,
    quantizer: Quantizer | None = None,
    *,
    start: Mapping[str, torch.Tensor] | None = None,
) -> bytes:
    """Return the payload; stochastic levels are drawn from one and the same seed."""
    payload = encode_payload(
        schema,
        header or header_of(schema),
        source_of(schema, state, start),
        quantizer or Unquantized(),
        generator=torch.Generator().manual_seed(0),
        frozen=lambda spec: state[spec.name],
    )
    return payload.data


def read_all(data: bytes, schema: ModelSchema) -> Payload:
    """Parse a payload and decode all that it holds."""
    payload = Payload.parse(data, schema)
    for _ in payload.frozen():
        pass
    for _ in payload.blocks():
        pass
    return payload


def as_float32(values: torch.Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = values.detach().reshape(-1).to(torch.float32).numpy()
    return array


def ulp_of(value: float) -> float:
    """Distance between float32 numbers of the value's magnitude."""
    return math.ldexp(1.0, max(math.frexp(value)[1] - 24, -149)) if value else 2.0**-149


def error_bound(values: NDArray[np.float32], span: float, num_levels: int) -> float:
    """NNADQ's bound on the error of an element: d / (2 s) + 5 ulp(max |v|)."""
    ulp = ulp_of(float(np.abs(values).max()))
    return span / (2 * num_levels) + 5 * ulp


class TinyModel(nn.Module):
    """Convolution, batch normalization with buffers, a frozen layer, and tied output weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.table = nn.Embedding(5, 3)
        self.fixed = nn.Linear(3, 3)
        self.fixed.requires_grad_(False)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.table.weight


def tiny_model(seed: int = 0) -> TinyModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyModel()


# --- known models, and parts of others -----------------------------------------------------------


def hugging_face(name: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name.partition('For')[0].removesuffix('LMHeadModel')}Config")
    model: nn.Module = getattr(transformers, name)(config(**options))
    return model


TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 40}

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def with_batch_statistics() -> nn.Module:
    model = DenseNet40()
    use_batch_statistics(model)
    return model


def partly_frozen() -> nn.Module:
    model = DigitsCNN()
    model.features[:6].requires_grad_(False)
    return model


def bfloat16() -> nn.Module:
    return DigitsCNN().to(torch.bfloat16)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "digits": DigitsCNN,
    "digits partly frozen": partly_frozen,
    "digits bfloat16": bfloat16,
    "densenet": DenseNet40,
    "densenet batch statistics": with_batch_statistics,
    "resnet": ResNet18,
    "transformer": lambda: TransformerClassifier(30, frozen_embedding=True),
    "torch transformer": lambda: nn.Transformer(16, 2, 1, 1, 32, batch_first=True),
    "bert": lambda: hugging_face("BertForSequenceClassification", **SIZES, **TOKENS),
    "gpt2": lambda: hugging_face(
        "GPT2LMHeadModel", n_embd=16, n_layer=2, n_head=2, n_positions=20, **TOKENS
    ),
    "vit": lambda: hugging_face("ViTForImageClassification", image_size=8, patch_size=4, **SIZES),
    "llama": lambda: hugging_face("LlamaForCausalLM", **SIZES, **TOKENS),
    "llama tied": lambda: hugging_face(
        "LlamaForCausalLM", tie_word_embeddings=True, **SIZES, **TOKENS
    ),
    "albert": lambda: hugging_face(
        "AlbertForSequenceClassification", embedding_size=8, **SIZES, **TOKENS
    ),
}


@functools.cache
def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def conv(inputs: int = 2, outputs: int = 2) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3)


def norm() -> nn.Module:
    return nn.BatchNorm2d(2)


def chain(letters: str) -> nn.Sequential:
    """Build a chain from letters: c convolution, n normalization, a activation, p, l, d."""
    layers: dict[str, Callable[[], nn.Module]] = {
        "c": conv,
        "n": norm,
        "a": nn.ReLU,
        "p": lambda: nn.MaxPool2d(2),
        "l": lambda: nn.Linear(2, 2),
        "d": lambda: nn.Dropout(0.5),
    }
    return nn.Sequential(*(layers[letter]() for letter in letters))


class Held(nn.Module):
    """A module with a parameter and a buffer of its own, and children."""

    def __init__(self, *children: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("cache", torch.zeros(9), persistent=False)
        self.inner = nn.Sequential(*children)
