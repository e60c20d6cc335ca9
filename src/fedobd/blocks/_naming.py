"""Semantic blocks of a model of which only the names, shapes and element types are known.

A server that holds arrays and no module reads the structure from the names. The module of a
tensor is its name without the last component. Rules kept here:
- a module is a candidate where its name ends in a number, and it holds two layers or more that are
  no mere pair of convolution and normalization, and it is no list (below it come numbers only)
  and no expert of a mixture (below `experts`);
- of nested candidates the outermost is a unit that is no stage (half of its layers or more lie in
  candidates that follow each other and look alike) and is not nearly the whole model;
- a module is a unit as well where its name says embedding, or where it holds `in_proj_weight`, as
  attention does;
- what is left is cut as by `decompose`: a convolution and a normalization next to each other form
  a block, and any other module is a block of its own.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from fedobd._errors import UsageError
from fedobd.blocks._decompose import BlockRules, Group, build_schema
from fedobd.blocks._schema import ModelSchema, Role, TensorSpec

BUFFER_NAMES = ("running_mean", "running_var", "num_batches_tracked", "position_ids")
"""Last components of names that mark a buffer."""

_PARAMETRIZED = ".parametrizations."  # between a module and what torch makes its weight of
_NUMBERED = re.compile(r"\w*\d")
_EMBEDDING = re.compile(r"\w*embeddings?", re.IGNORECASE)
_WEIGHTS = ("weight", "running_mean", "original1", "original")  # the first that is there
_KINDS = {1: "Normalization", 3: "Convolution", 4: "Convolution", 5: "Convolution"}
"""What a module is, by the dimensions of its weight."""

_PAIRS = ([1, 3], [1, 4], [1, 5])
_LARGEST_SHARE = 0.75  # of all layers; above, a unit would be the model itself, wrapped


def guess_roles(
    names: Sequence[str], shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]
) -> tuple[TensorSpec, ...]:
    """Describe tensors, telling buffers from parameters by name and element type.

    Args:
        names: names as in a module's `state_dict`.
        shapes: the shape of each.
        dtypes: the element type of each.

    Returns:
        A spec for each: a buffer where the last component of the name is one of `BUFFER_NAMES` or
        the elements are not floating-point numbers, and else a parameter. Other floating buffers,
        and frozen parameters, cannot be told from trainable ones.

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
        is_buffer = is_integer or _last(name) in BUFFER_NAMES
        role = Role.BUFFER if is_buffer else Role.PARAMETER
        specs.append(TensorSpec(name, tuple(shape), dtype, role))
    return tuple(specs)


def decompose_names(tensors: Sequence[TensorSpec], rules: BlockRules | None = None) -> ModelSchema:
    """Cut a model into semantic blocks by the names and shapes of its tensors.

    Args:
        tensors: every tensor of the model; `guess_roles` describes a list of arrays.
        rules: how to cut; None for semantic blocks. Patterns of `unit_names` are on names of
            modules. Classes are not known, so `unit_classes` must be empty.

    Returns:
        The schema: the tensors in the given order, and the blocks in the order in which their
        first modules appear. A tensor whose name has no dot counts as a module of its own.

    Raises:
        UsageError: there is no trainable parameter, or one of a type that cannot be averaged; two
            tensors have one name; `unit_classes` is given, or a pattern matches no module.

    Example:
        >>> shapes = {"0.weight": (8, 1, 3, 3), "1.weight": (8,), "1.bias": (8,), "3.bias": (2,)}
        >>> specs = guess_roles(list(shapes), list(shapes.values()), [torch.float32] * 4)
        >>> [(block.name, block.num_parameters) for block in decompose_names(specs).blocks]
        [('0', 88), ('3', 2)]
    """
    rules = rules or BlockRules()
    if rules.unit_classes:
        raise UsageError("unit_classes needs a model; where only names are known, use unit_names")
    by_module: dict[str, list[int]] = {}
    for number, spec in enumerate(tensors):
        by_module.setdefault(_module_of(spec.name), []).append(number)
    if rules.style == "semantic":
        groups = _groups(_Tree.of(tensors, by_module), rules.unit_names)
    else:
        groups = [Group(path, "Layer", [path]) for path in by_module]
    return build_schema(tensors, by_module, groups, rules)


def _module_of(name: str) -> str:
    if _PARAMETRIZED in name:
        return name.partition(_PARAMETRIZED)[0]
    return name.rpartition(".")[0] or name


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _prefixes(path: str) -> Iterator[str]:
    """Yield the paths of the modules around a module, outermost first, and its own."""
    return (path[: match.start()] for match in re.finditer(r"\.|\Z", path))


@dataclass(frozen=True, slots=True)
class _Tree:
    """The tree of modules that names span.

    Args:
        weights: the shape of the weight of each module that holds tensors, in order of appearance;
            `()` where there is none.
        layers: the modules with parameters at and below each path.
        attention: the modules that hold `in_proj_weight`.
        candidates: the paths that may be units for their number.
    """

    weights: dict[str, tuple[int, ...]]
    layers: dict[str, list[str]]
    attention: frozenset[str]
    candidates: frozenset[str]

    @classmethod
    def of(cls, tensors: Sequence[TensorSpec], by_module: Mapping[str, Sequence[int]]) -> _Tree:
        weights: dict[str, tuple[int, ...]] = {}
        layers: dict[str, list[str]] = {}
        attention = set()
        for path, numbers in by_module.items():
            shapes = {_last(tensors[n].name): tensors[n].shape for n in numbers}
            weights[path] = next((shapes[name] for name in _WEIGHTS if name in shapes), ())
            if "in_proj_weight" in shapes:
                attention.add(path)
            if any(tensors[n].role is not Role.BUFFER for n in numbers):
                for prefix in _prefixes(path):
                    layers.setdefault(prefix, []).append(path)
        bare = cls(weights, layers, frozenset(attention), frozenset())
        return replace(bare, candidates=frozenset(filter(bare._may_be_unit, layers)))

    def is_pair(self, *paths: str) -> bool:
        """Whether these are a convolution and a normalization with fitting numbers of channels."""
        weights = sorted((self.weights[path] for path in paths), key=len)
        return [len(w) for w in weights] in _PAIRS and weights[0][0] in weights[1][:2]

    def is_unit(self, path: str) -> bool:
        """Whether the name, or what is below it, makes a unit of a module."""
        if path in self.attention:
            return True
        if _EMBEDDING.fullmatch(_last(path)):
            return path in self.layers and not self._is_list(path)
        return (
            path in self.candidates
            and len(self.layers[path]) <= _LARGEST_SHARE * len(self.weights)
            and not self._is_stage(path)
        )

    def _may_be_unit(self, path: str) -> bool:
        layers = self.layers[path]
        return (
            _NUMBERED.fullmatch(_last(path)) is not None
            and ".experts." not in path
            and len(layers) > 1
            and not self.is_pair(*layers)
            and not self._is_list(path)
        )

    def _is_list(self, path: str) -> bool:
        below = (layer[len(path) + 1 :] for layer in self.layers[path])
        return all(name.partition(".")[0].isdigit() for name in below)

    def _is_stage(self, path: str) -> bool:
        lists: dict[str, list[str]] = {}
        for inner in dict.fromkeys(p for layer in self.layers[path] for p in _prefixes(layer)):
            if inner in self.candidates and inner.startswith(f"{path}."):
                lists.setdefault(inner.rpartition(".")[0], []).append(inner)
        alike = [paths for paths in lists.values() if self._look_alike(paths)]
        held = {layer for paths in alike for inner in paths for layer in self.layers[inner]}
        return 2 * len(held) >= len(self.layers[path])

    def _look_alike(self, paths: Sequence[str]) -> bool:
        """Whether two that follow each other hold the same layers; one may have more."""
        inner = [{layer.removeprefix(path) for layer in self.layers[path]} for path in paths]
        return any(a <= b or b <= a for a, b in pairwise(inner))


def _groups(tree: _Tree, patterns: Sequence[str]) -> Iterable[Group]:
    """Return groups of modules, in order; every module is in exactly one."""
    paths = dict.fromkeys(p for path in tree.weights for p in _prefixes(path))
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
            raise UsageError(f"unit_names: {pattern!r} matches no module of the model")
    named = {path for path in paths if any(fnmatch.fnmatchcase(path, p) for p in patterns)}
    units = named | set(filter(tree.is_unit, paths))
    groups: dict[str, Group] = {}
    single: str | None = None  # the module before, where it is no part of a unit or pair
    for path, weight in tree.weights.items():
        unit = next((p for p in _prefixes(path) if p in units), None)
        kind = _KINDS.get(len(weight), "Layer")
        if unit is not None:
            groups.setdefault(unit, Group(unit, "Unit", [])).modules.append(path)
            single = None
        elif (
            single is not None and _parent(single) == _parent(path) and tree.is_pair(single, path)
        ):
            groups[single].modules.append(path)
            groups[single].kind += f"+{kind}"
            single = None
        else:
            groups[path] = Group(path, kind, [path])
            single = path
    return groups.values()
