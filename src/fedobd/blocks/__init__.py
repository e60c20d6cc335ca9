"""Blocks: what a model is to federated training: its tensors, its values, its semantic blocks."""

from __future__ import annotations

from fedobd.blocks._decompose import BlockRules, BlockStyle, decompose
from fedobd.blocks._naming import decompose_names, guess_roles
from fedobd.blocks._schema import DTYPES, Block, ModelSchema, Role, Segment, TensorSpec
from fedobd.blocks._state import (
    ModelState,
    StateStack,
    cast_state,
    check_state,
    get_state,
    load_state,
    master_state,
    named_tensors,
    segment_of,
    state_fingerprint,
    view_state,
)

__all__ = [
    "DTYPES",
    "Block",
    "BlockRules",
    "BlockStyle",
    "ModelSchema",
    "ModelState",
    "Role",
    "Segment",
    "StateStack",
    "TensorSpec",
    "cast_state",
    "check_state",
    "decompose",
    "decompose_names",
    "get_state",
    "guess_roles",
    "load_state",
    "master_state",
    "named_tensors",
    "segment_of",
    "state_fingerprint",
    "view_state",
]
