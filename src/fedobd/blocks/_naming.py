"""Blocks of a model of which only the names, shapes and element types of its tensors are known.

The module of a tensor is its name without the last component, and a block is a module, or all that
is below the last number of its name: `encoder.layer.3.attention.query.weight` is of block
`encoder.layer.3`, `fc.weight` of `fc`. Names do not tell which layers act as one, nor which
parameters are frozen; `decompose`, which wants the model, does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from fedobd._errors import UsageError
from fedobd.blocks._decompose import BlockRules, ModuleGroup, build_schema, check_rules
from fedobd.blocks._schema import ModelSchema, Role, TensorSpec

# Buffers of torch's normalizations, and the position numbers of Hugging Face's embeddings.
_BUFFER_NAMES = ("running_mean", "running_var", "num_batches_tracked", "position_ids")


def guess_roles(
    names: Sequence[str], shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]
) -> tuple[TensorSpec, ...]:
    """Describe tensors, named as in a `state_dict`: parameters and buffers by name and type.

    A buffer is what holds no floating-point numbers, or has a name that ends in `running_mean` or
    another of a few. Other floating buffers, and frozen parameters, cannot be told from trainable
    ones.

    Raises:
        UsageError: the lengths differ, or an element type is not supported.

    Example:
        >>> specs = guess_roles(["fc.bias", "steps"], [(2,), ()], [torch.float32, torch.int64])
        >>> [str(spec.role) for spec in specs]
        ['parameter', 'buffer']
    """
    if not len(names) == len(shapes) == len(dtypes):
        raise UsageError(
            f"there are {len(names)} names, {len(shapes)} shapes and {len(dtypes)} element types; "
            "wanted one of each for every tensor"
        )
    specs = []
    for name, shape, dtype in zip(names, shapes, dtypes, strict=True):
        is_integer = not (dtype.is_floating_point or dtype.is_complex)
        is_buffer = is_integer or name.rpartition(".")[2] in _BUFFER_NAMES
        role = Role.BUFFER if is_buffer else Role.PARAMETER
        specs.append(TensorSpec(name, tuple(shape), dtype, role))
    return tuple(specs)


def decompose_names(tensors: Sequence[TensorSpec], rules: BlockRules | None = None) -> ModelSchema:
    """Cut a model into blocks by the names of its tensors, one block a module or numbered module.

    `guess_roles` describes the tensors of a list of arrays. The schema has them in the given
    order, and the blocks in the order in which their first modules appear. A tensor whose name
    has no dot counts as a module of its own. Rules have no `unit_classes`: classes are not known.

    Raises:
        UsageError: there is no trainable parameter, or one of a type that cannot be averaged; two
            tensors have one name; `unit_classes` is given, or a pattern matches no module.

    Example:
        >>> names = ["emb.weight", "layers.0.norm.weight", "layers.0.fc.weight", "fc.weight"]
        >>> specs = guess_roles(names, [(9, 4), (4,), (4, 4), (2, 4)], [torch.float32] * 4)
        >>> [(block.name, block.num_parameters) for block in decompose_names(specs).blocks]
        [('emb', 36), ('layers.0', 20), ('fc', 8)]
    """
    rules = rules or BlockRules()
    if rules.unit_classes:
        raise UsageError("unit_classes needs a model; where only names are known, use unit_names")
    by_module: dict[str, list[int]] = {}
    for number, spec in enumerate(tensors):
        by_module.setdefault(spec.name.rpartition(".")[0] or spec.name, []).append(number)
    check_rules(((path, "") for module in by_module for path in _paths(module)), rules)
    groups: dict[str, ModuleGroup] = {}
    for module in by_module:
        name = _block_name(module, rules) if rules.style == "semantic" else module
        groups.setdefault(name, ModuleGroup(name, "Module", [])).modules.append(module)
    return build_schema(tensors, by_module, groups.values(), rules)


def _block_name(module: str, rules: BlockRules) -> str:
    """Return the outermost module that `unit_names` wants whole, or the one up to a number."""
    paths = _paths(module)
    # Up to the last number: the first may count stages (`layers.0.blocks.1`) or whole models.
    numbered = [path for path in paths if path.rpartition(".")[2].isdigit()]
    return next((path for path in paths if rules.names_unit(path)), [module, *numbered][-1])


def _paths(module: str) -> list[str]:
    """Return the names of the modules around a module, outermost first, and its own."""
    return list(accumulate(module.split("."), "{}.{}".format))
