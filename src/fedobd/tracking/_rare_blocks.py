"""Rare blocks: those that were never or rarely uploaded in stage 1; what is said of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedobd.blocks import ModelSchema
from fedobd.sessions import Method

RARE = 0.05
"""A block that fewer of the uploads of stage 1 hold is uploaded rarely."""

_MOST_NAMED = 8  # blocks in a warning


@dataclass(frozen=True, slots=True, kw_only=True)
class RareBlock:
    """A block that was never or rarely uploaded in stage 1.

    Args:
        block: its name.
        parameters: how many it has, above 0.
        share: of the model's parameters.
        uploads: share of the accepted uploads of stage 1 that held it, below `RARE`.
    """

    block: str
    parameters: int
    share: float
    uploads: float


def rare_blocks(
    records: Iterable[Mapping[str, Any]], schema: ModelSchema
) -> tuple[RareBlock, ...]:
    """Return the blocks with parameters that were never or rarely uploaded, in the model's order.

    Args:
        records: the lines of a run's rounds.jsonl.
        schema: the model's schema.
    """
    uploads = [c["blocks_kept"] for r in records if r["stage"] == 1 for c in r["clients"]]
    counts = [0] * len(schema.blocks)
    for numbers in uploads:
        for number in numbers:
            counts[number] += 1
    return tuple(
        RareBlock(
            block=block.name,
            parameters=block.num_parameters,
            share=block.num_parameters / schema.num_parameters,
            uploads=count / len(uploads),
        )
        for block, count in zip(schema.blocks, counts, strict=True)
        if block.num_parameters and count < RARE * len(uploads)
    )


def rare_blocks_warning(
    method: Method, blocks_by_seed: Mapping[int, Sequence[RareBlock]]
) -> str | None:
    """Return what to say of a method's rare blocks; None where there are none.

    Args:
        method: the method with its options.
        blocks_by_seed: the rare blocks of each run by its seed.
    """
    cases: dict[str, list[int]] = {}
    for seed, blocks in blocks_by_seed.items():
        if blocks:
            cases.setdefault(_describe(blocks), []).append(seed)
    if not cases:
        return None
    texts = (
        f"{'Seeds' if len(seeds) > 1 else 'Seed'} {', '.join(map(str, seeds))}: {text}."
        for text, seeds in cases.items()
    )
    return (
        f"{method.name}: clients left out some blocks in stage 1, so the server hardly trained "
        f"them in it. {' '.join(texts)} {_advice(method)}"
    )


def _describe(blocks: Sequence[RareBlock]) -> str:
    never = [block for block in blocks if block.uploads == 0]
    rarely = [block for block in blocks if block.uploads > 0]
    parts = []
    if never:
        parts.append(f"no client uploaded {_list(never)}")
    if rarely:
        parts.append(f"fewer than {100 * RARE:.0f} % of the uploads held {_list(rarely)}")
    return "; ".join(parts)


def _list(blocks: Sequence[RareBlock]) -> str:
    if len(blocks) == 1:
        return f"block {blocks[0].block} ({_percent(blocks)} of the parameters)"
    named = [f"{b.block} ({_percent([b])})" for b in blocks[:_MOST_NAMED]]
    if len(blocks) > _MOST_NAMED:
        named.append(f"{len(blocks) - _MOST_NAMED} more")
    return f"blocks {', '.join(named)}, {_percent(blocks)} of the parameters in all"


def _percent(blocks: Sequence[RareBlock]) -> str:
    share = 100 * sum(block.share for block in blocks)
    return f"{share:.1f} %" if share >= 0.05 else "less than 0.1 %"


def _advice(method: Method) -> str:
    if method.unit != "semantic":  # its blocks are not those of model.blocks
        return "Lower dropout_rate."
    advice = "Split large blocks with model.blocks.max_block_fraction, lower dropout_rate"
    has_stage_two = any(stage.number == 2 for stage in method.stages())
    return f"{advice}{', or give stage 2 more epochs' if has_stage_two else ''}."
