"""The blocks of each built-in model: names, kinds and numbers of parameters."""

from __future__ import annotations

from typing import Any

import pytest

from fedobd.blocks import decompose
from fedobd.models import build_model

CN, NC = "Conv2d+BatchNorm2d", "BatchNorm2d+Conv2d"
Row = tuple[str, str, int]


def densenet(bottleneck: bool) -> list[Row]:
    """Return the rows from the sizes of the layers, counted by hand."""
    rows: list[Row] = [("stem", "Conv2d", 3 * 9 * 24)]
    channels, num_layers = 24, 6 if bottleneck else 12
    for stage in (1, 2, 3):
        for layer in range(num_layers):
            if bottleneck:
                size = (2 * channels + channels * 48) + (2 * 48 + 48 * 9 * 12)
            else:
                size = 2 * channels + channels * 9 * 12
            rows.append((f"stages.dense{stage}.{layer}", "DenseLayer", size))
            channels += 12
        if stage < 3:
            kept = channels // 2 if bottleneck else channels
            size = 2 * channels + channels * kept
            rows.append((f"stages.transition{stage}.norm", NC, size))
            channels = kept
    rows.append(("norm", "BatchNorm2d", 2 * channels))
    rows.append(("classifier", "Linear", 10 * channels + 10))
    return rows


LAYERS: list[Row] = [
    ("layers.0", "TransformerEncoderLayer", 452_548),
    ("layers.1", "TransformerEncoderLayer", 452_548),
    ("classifier", "Linear", 101),
]

TABLES: dict[str, tuple[str, dict[str, Any], list[Row]]] = {
    "digits-cnn": (
        "digits-cnn",
        {},
        [
            ("features.0", CN, 384),
            ("features.3", CN, 18_624),
            ("features.7", CN, 37_056),
            ("classifier.1", "Linear", 32_896),
            ("classifier.3", "Linear", 1_290),
        ],
    ),
    "image-cnn": (
        "image-cnn",
        {},
        [
            ("features.0", CN, 928),
            ("features.4", CN, 18_560),
            ("features.8", CN, 55_488),
            ("features.12", CN, 110_848),
            ("features.15", CN, 147_712),
            ("classifier", "Linear", 1_290),
        ],
    ),
    "densenet40": ("densenet40", {}, densenet(True)),
    "densenet40 without bottleneck": ("densenet40", {"bottleneck": False}, densenet(False)),
    "resnet18": (
        "resnet18",
        {},
        [
            ("stem.0", CN, 1_856),
            ("stages.0.0", "BasicBlock", 73_984),
            ("stages.0.1", "BasicBlock", 73_984),
            ("stages.1.0", "BasicBlock", 230_144),
            ("stages.1.1", "BasicBlock", 295_424),
            ("stages.2.0", "BasicBlock", 919_040),
            ("stages.2.1", "BasicBlock", 1_180_672),
            ("stages.3.0", "BasicBlock", 3_673_088),
            ("stages.3.1", "BasicBlock", 4_720_640),
            ("classifier", "Linear", 5_130),
        ],
    ),
    "transformer": (
        "transformer",
        {"vocab_size": 50},
        [("embedding", "Embedding", 5_000), *LAYERS],
    ),
    "transformer, frozen embedding": (
        "transformer",
        {"vocab_size": 50, "frozen_embedding": True},
        LAYERS,
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_blocks(name: str) -> None:
    model, options, rows = TABLES[name]
    schema = decompose(build_model(model, **options))
    assert [(b.name, b.kind, b.num_parameters) for b in schema.blocks] == rows
    assert schema.num_parameters == sum(size for _, _, size in rows)


def test_frozen_embedding_is_in_no_block() -> None:
    schema = decompose(build_model("transformer", vocab_size=50, frozen_embedding=True))
    assert [schema.tensors[n].name for n in schema.frozen()] == ["embedding.weight"]
