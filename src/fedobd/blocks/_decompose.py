"""Semantic blocks: a module is cut into runs of consecutive layers that act as one unit.

A module whose class or name marks it as a unit (an embedding, a Transformer layer) is one block
with all that it holds. Among the remaining layers, a normalization and a convolution that follow
each other form a block, with activations around them; any other layer with parameters is a block
of its own.

References:
    Yuanyuan Chen, Zichen Chen, Pengcheng Wu, Han Yu. FedOBD: Opportunistic Block Dropout for
    Efficiently Training Large-scale Neural Networks through Federated Learning. IJCAI 2023, arXiv
    2208.05174, section 3.1.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from fedobd._errors import UsageError, check_choice
from fedobd.blocks._schema import Block, ModelSchema, Role, Segment, TensorSpec
from fedobd.blocks._state import named_tensors

BlockStyle = Literal["semantic", "layer", "tensor"]

UNIT_CLASSES = (
    r"\w*Embeddings?",
    r"\w*Layer",
    r"(?!\w*Dense)\w*Block(V\d)?([123]D)?",
    r"\w*Bottle[nN]eck",
    r"\w*Residual(Unit)?",
    r"\w*MBConv",
    r"AlbertTransformer",
    r"MultiheadAttention",
)
"""Class names (whole, as regular expressions) whose modules are units. A `DenseBlock` holds units
and is none."""

_LONGEST_RUN = 16  # layers that are looked at for one run
_CONVOLUTION = re.compile(r"(Lazy)?Conv(Transpose)?[123]d")
_NORMALIZATION = re.compile(r"\w*(Batch|Instance|Group|Layer|RMS)Norm(Act)?([123]d)?")
_ACTIVATION = re.compile(
    r"(Leaky|P|R)?ReLU6?|ELU|SELU|CELU|GELU|SiLU|Mish|Hard(swish|tanh|sigmoid)|Sigmoid|Tanh"
    r"|Soft(plus|sign)|Dropout[123]?d?|Identity"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRules:
    """How a model is cut into blocks.

    Args:
        style: `"semantic"` for the paper's blocks; `"layer"` for one block a layer (the paper's
            ablation); `"tensor"` for one block a parameter tensor, with all buffers in a last
            block (the unit of SMAFD).
        unit_classes: further class names, as regular expressions on the whole name, whose modules
            are one block.
        unit_names: patterns such as `encoder.layers.*` on module names; the outermost module that
            matches is one block.
        max_block_fraction: blocks with a larger share of the parameters are split by rows (the
            first dimension) into parts of at most this share; a single row is never split. None
            splits nothing.

    Raises:
        UsageError: a value is outside what is allowed.
    """

    style: BlockStyle = "semantic"
    unit_classes: tuple[str, ...] = ()
    unit_names: tuple[str, ...] = ()
    max_block_fraction: float | None = None

    def __post_init__(self) -> None:
        check_choice("style", self.style, get_args(BlockStyle))
        if self.max_block_fraction is not None and not 0 < self.max_block_fraction <= 1:
            raise UsageError(
                f"max_block_fraction is {self.max_block_fraction}; allowed are 0 < fraction <= 1"
            )
        if self.style != "semantic" and (self.unit_classes or self.unit_names):
            raise UsageError(
                f"unit_classes and unit_names have no effect with style {self.style!r}"
            )
        for pattern in self.unit_classes:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(
                    f"unit_classes: {pattern!r} is no regular expression: {error}"
                ) from error

    def names_unit(self, path: str) -> bool:
        """Whether `unit_names` wants the module of this name as one block."""
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self.unit_names)


@dataclass(slots=True)
class ModuleGroup:
    """A block in the making: its modules with their names, in order."""

    name: str
    kind: str
    modules: list[str]


def decompose(model: nn.Module, rules: BlockRules | None = None) -> ModelSchema:
    """Cut a model, which is not changed, into blocks: the paper's, unless rules say otherwise.

    The schema has every tensor once (tied parameters under their first name), and the blocks in
    the order in which their first layers were registered.

    Raises:
        UsageError: the model has no trainable parameter, or parameters of a type that cannot be
            averaged.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2))
        >>> [(block.kind, block.num_parameters) for block in decompose(model).blocks]
        [('Conv2d+BatchNorm2d', 96), ('Linear', 18)]
    """
    rules = rules or BlockRules()
    specs: list[TensorSpec] = []
    by_module: dict[str, list[int]] = {}
    for number, (name, tensor, role) in enumerate(named_tensors(model)):
        if is_lazy(tensor):
            raise UsageError(
                f"tensor {name!r} has no shape yet; run a lazy model once before it is cut"
            )
        specs.append(TensorSpec(name, tuple(tensor.shape), tensor.dtype, role))
        by_module.setdefault(name.rpartition(".")[0], []).append(number)
    return build_schema(specs, by_module, _groups(model, rules), rules)


def build_schema(
    specs: Sequence[TensorSpec],
    by_module: Mapping[str, Sequence[int]],
    groups: Iterable[ModuleGroup],
    rules: BlockRules,
) -> ModelSchema:
    """Turn tensors, their numbers by module, and groups of modules into a schema.

    Every module with tensors is in exactly one group; style "tensor" looks at none.
    """
    for spec in specs:
        if spec.role is Role.PARAMETER and not spec.is_floating:
            raise UsageError(
                f"parameter {spec.name!r} has element type {spec.dtype}; wanted a float"
            )
    if rules.style == "tensor":
        blocks = _tensor_blocks(specs)
    else:
        blocks = _grouped_blocks(specs, by_module, groups)
    if rules.max_block_fraction is not None:
        total = sum(block.num_parameters for block in blocks)
        limit = max(1, math.floor(rules.max_block_fraction * total))
        blocks = [part for block in blocks for part in _split(block, specs, limit)]
    return ModelSchema(tuple(specs), tuple(blocks))


def _groups(model: nn.Module, rules: BlockRules) -> Iterator[ModuleGroup]:
    """Yield groups of modules; every module with tensors is in exactly one."""
    if rules.style == "layer":
        for path, module in model.named_modules():
            yield ModuleGroup(path, type(module).__name__, [path])
        return
    classes = [re.compile(pattern) for pattern in (*UNIT_CLASSES, *rules.unit_classes)]

    def is_unit(path: str, module: nn.Module) -> bool:
        is_of_class = any(c.fullmatch(type(module).__name__) for c in classes)
        return path != "" and (is_of_class or rules.names_unit(path))

    check_rules(((path, type(m).__name__) for path, m in model.named_modules() if path), rules)
    yield from _walk(model, "", is_unit, set())


def check_rules(modules: Iterable[tuple[str, str]], rules: BlockRules) -> None:
    """Raise UsageError where a pattern of the rules matches none of these names and classes."""
    modules = list(modules)
    for pattern in rules.unit_names:
        if not any(fnmatch.fnmatchcase(path, pattern) for path, _ in modules):
            raise UsageError(f"unit_names: {pattern!r} matches no module of the model")
    for pattern in rules.unit_classes:
        if not any(re.fullmatch(pattern, kind) for _, kind in modules):
            raise UsageError(f"unit_classes: {pattern!r} matches no module of the model")


def _walk(
    module: nn.Module, path: str, is_unit: Callable[[str, nn.Module], bool], seen: set[int]
) -> Iterator[ModuleGroup]:
    if id(module) in seen:
        return
    if is_unit(path, module) or is_parametrized(module):
        yield ModuleGroup(path, type(module).__name__, _claim(module, path, seen))
        return
    seen.add(id(module))
    yield ModuleGroup(path, type(module).__name__, [path])
    children = [(f"{path}.{n}" if path else n, child) for n, child in module.named_children()]
    position = 0
    while position < len(children):
        length = _run_length(children[position : position + _LONGEST_RUN], is_unit, seen)
        if length > 1:
            run = children[position : position + length]
            kind = "+".join(type(child).__name__ for _, child in run if _holds_tensors(child))
            claimed = [inner for name, child in run for inner in _claim(child, name, seen)]
            yield ModuleGroup(run[0][0], kind, claimed)
        else:
            name, child = children[position]
            yield from _walk(child, name, is_unit, seen)
        position += length


def _claim(module: nn.Module, path: str, seen: set[int]) -> list[str]:
    """Mark a module and all below it as seen; return the names of those that were not."""
    names = []
    for name, inner in module.named_modules(prefix=path):
        if id(inner) not in seen:
            seen.add(id(inner))
            names.append(name)
    return names


def _holds_tensors(module: nn.Module) -> bool:
    return next(named_tensors(module), None) is not None


def _run_length(
    children: Sequence[tuple[str, nn.Module]],
    is_unit: Callable[[str, nn.Module], bool],
    seen: set[int],
) -> int:
    """Return the length of the run of convolution, normalization and activations at the start.

    It is 1 where there is none. A unit, and a layer that belongs to an earlier block, ends it.
    """

    def role(path: str, module: nn.Module) -> str:
        name = type(module).__name__
        if is_parametrized(module):
            name = name.removeprefix("Parametrized")
        if is_unit(path, module) or (id(module) in seen and _holds_tensors(module)):
            return "-"
        for letter, pattern in (("c", _CONVOLUTION), ("n", _NORMALIZATION), ("a", _ACTIVATION)):
            if pattern.fullmatch(name):
                return letter
        return "-"

    letters = "".join(role(path, module) for path, module in children)
    match = re.match(r"ca*na*|na*c(?!a*n)a*|na*c", letters)
    return match.end() if match else 1


def _grouped_blocks(
    specs: Sequence[TensorSpec],
    by_module: Mapping[str, Sequence[int]],
    groups: Iterable[ModuleGroup],
) -> list[Block]:
    """Turn groups into blocks; buffers without trainable company join the block before them."""
    blocks: list[tuple[ModuleGroup, list[int]]] = []
    strays: list[int] = []
    for group in groups:
        numbers = [n for name in group.modules for n in by_module.get(name, ())]
        numbers = [n for n in numbers if specs[n].role is not Role.FROZEN]
        if any(specs[n].role is Role.PARAMETER for n in numbers):
            blocks.append((group, strays + numbers))
            strays = []
        elif blocks:
            blocks[-1][1].extend(numbers)
        else:
            strays += numbers
    return [
        _block_of(group.name or "(model)", group.kind, _whole(numbers, specs), specs)
        for group, numbers in blocks
    ]


def _tensor_blocks(specs: Sequence[TensorSpec]) -> list[Block]:
    blocks = [
        _block_of(spec.name, "Tensor", _whole([number], specs), specs)
        for number, spec in enumerate(specs)
        if spec.role is Role.PARAMETER
    ]
    buffers = [number for number, spec in enumerate(specs) if spec.role is Role.BUFFER]
    if buffers:
        blocks.append(_block_of("(buffers)", "Buffers", _whole(buffers, specs), specs))
    return blocks


def _whole(numbers: Iterable[int], specs: Sequence[TensorSpec]) -> list[Segment]:
    return [Segment(n, 0, specs[n].num_elements) for n in numbers]


def _block_of(
    name: str, kind: str, segments: Sequence[Segment], specs: Sequence[TensorSpec]
) -> Block:
    layers = dict.fromkeys(specs[s.tensor].name.rpartition(".")[0] for s in segments)
    count = sum(s.num_elements for s in segments if specs[s.tensor].role is Role.PARAMETER)
    return Block(name, kind, tuple(layers), tuple(segments), count)


def _split(block: Block, specs: Sequence[TensorSpec], limit: int) -> list[Block]:
    """Split a block between rows into parts of at most `limit` parameters and of like size."""
    # Aimed at one part, each takes as many rows as fit: that makes the fewest.
    parts = _cut(block, specs, limit, len(_cut(block, specs, limit, 1)))
    if len(parts) == 1:
        return [block]
    return [
        _block_of(f"{block.name}[{i}/{len(parts)}]", block.kind, part, specs)
        for i, part in enumerate(parts, start=1)
    ]


def _cut(block: Block, specs: Sequence[TensorSpec], limit: int, aim: int) -> list[list[Segment]]:
    """Cut a block's segments into about `aim` parts of at most `limit` parameters, or one row."""
    parts: list[list[Segment]] = [[]]
    used, left = 0, block.num_parameters
    target = math.ceil(left / aim)
    for segment in block.segments:
        spec = specs[segment.tensor]
        if spec.role is Role.BUFFER or segment.num_elements == 0:
            parts[-1].append(segment)
            continue
        row = segment.num_elements // (spec.shape[0] if spec.shape else 1)
        start = segment.start
        while start < segment.stop:
            rows = min(math.ceil((target - used) / row), (limit - used) // row)
            if rows < 1 and used > 0:
                # Aimed anew for each part, so that what whole rows add is shared by the rest.
                used, target = 0, math.ceil(left / max(1, aim - len(parts)))
                parts.append([])
                continue
            stop = min(segment.stop, start + max(1, rows) * row)
            parts[-1].append(Segment(segment.tensor, start, stop))
            used += stop - start
            left -= stop - start
            start = stop
    return parts
