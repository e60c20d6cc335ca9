"""RunConfig: everything that a run's results depend on, as one typed value.

It is read from TOML (a preset or a file), changed key by key from the command line, and written
whole into the run folder, from where it runs again. A key that does not exist, a value of the
wrong type or out of range is refused with the key, the value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import functools
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from fedobd._errors import UsageError
from fedobd._lookup import nearest
from fedobd.blocks import BlockRules
from fedobd.data import Columns, ImageOptions, PartitionOptions, Splits, TextOptions
from fedobd.experiments.presets import preset_text
from fedobd.methods import METHODS
from fedobd.payload import MAX_EXAMPLES
from fedobd.sessions import Method
from fedobd.tracking import TrackerName
from fedobd.training import TrainingOptions


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(_Section):
    """What is learned from, and who has it."""

    name: str = Field(
        "digits",
        description="`digits`; a file or folder of images or texts (parquet, csv, json, arrow), "
        "or a data set's name on the hub, such as `uoft-cs/cifar10`; `nodes` where each node of a "
        "deployment has data of its own; or `package.module:function` that is called with "
        "num_clients, seed and the options and returns a FederatedData.",
    )
    columns: Columns = Field(default_factory=Columns, description="Which columns of a data set.")
    splits: Splits = Field(
        default_factory=Splits, description="Which splits of it, and how much of them."
    )
    image: ImageOptions = Field(
        default_factory=ImageOptions, description="What is done to images."
    )
    text: TextOptions = Field(default_factory=TextOptions, description="What is done to texts.")
    partition: PartitionOptions = Field(
        default_factory=PartitionOptions, description="How examples are shared out."
    )
    test_path: str | None = Field(
        None,
        description="File of arrays to test on, with data `nodes`; without it nothing is tested "
        "on the server.",
    )
    test_fraction: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="Share of the examples to test on, where there is no test split.",
    )
    validation_fraction: float = Field(
        0.1, ge=0, lt=1, description="Share of each client's examples to validate on."
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of the user's own function."
    )


class ModelConfig(_Section):
    """What is trained."""

    name: str = Field("digits-cnn", description="A built-in model, or `package.module:factory`.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of the factory."
    )
    batch_norm_statistics: Literal["running", "batch"] = Field(
        "running",
        description="Whether batch normalization keeps running statistics, which travel, or uses "
        "those of the batch in training and testing alike, the published setting.",
    )
    memory_format: Literal["contiguous", "channels_last"] = Field(
        "contiguous",
        description="How the values of convolutions lie in memory; channels_last is faster on "
        "most CPUs, and on GPUs with autocast.",
    )
    blocks: BlockRules = Field(
        default_factory=BlockRules, description="How the model is cut into blocks."
    )


class FederationConfig(_Section):
    """Who takes part."""

    clients: int = Field(10, ge=1, description="Number of clients.")
    seed: int = Field(0, description="The run's seed; all randomness follows from it.")
    shared_start: bool = Field(
        False,
        description="Clients hold the initial model already, so that the first broadcast is its "
        "fingerprint, not its values.",
    )
    max_examples: int = Field(
        MAX_EXAMPLES, ge=1, lt=2**40, description="The most examples that an upload may claim."
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig(TrainingOptions):
    """How clients train: `TrainingOptions`, and what they minimize.

    Args:
        loss: `cross-entropy`, `binary-cross-entropy`, or `package.module:function`.
        metric: `accuracy`, or `package.module:function`.
        function: `package.module:function` that replaces local training as a whole; None for the
            built-in one.
        device: where to train: `cpu`, `cuda`, `cuda:1`, or `auto` for CUDA where it is there.
    """

    loss: str = "cross-entropy"
    metric: str = "accuracy"
    function: str | None = None
    device: str = "cpu"

    @property
    def options(self) -> TrainingOptions:
        """The options of the built-in local training alone."""
        return TrainingOptions(**{name: getattr(self, name) for name in TrainingOptions.__slots__})


class SimulationConfig(_Section):
    """How the local engine runs clients, as far as results depend on it in their last bits."""

    stack: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1,
        description="How many clients are trained together, as one stack; 1 trains one after "
        "another, as every other engine does; `auto` measures what is fastest here, and the run "
        "folder's configuration says what that was.",
    )


class OutputConfig(_Section):
    """What is measured and kept beside the results."""

    evaluate_every: int = Field(
        1, ge=1, description="Test every so many rounds; the last round always."
    )
    evaluate_examples: int | None = Field(
        None,
        ge=1,
        description="Test on so many test examples, the same in every round; on all of them after "
        "the last round. Without it always on all.",
    )
    keep_payloads: bool = Field(
        False, description="Keep every payload as a file, for `fedobd inspect`."
    )
    trackers: tuple[TrackerName, ...] = Field(
        (), description="Tools that are given the figures of each round as it ends."
    )
    tracking_uri: str | None = Field(
        None,
        description="MLflow's server, or a database such as `sqlite:///all.db`; without it the "
        "file `mlflow.db` beside the run folder.",
    )

    @model_validator(mode="after")
    def _check_tracking(self) -> OutputConfig:
        if self.tracking_uri is not None and "mlflow" not in self.trackers:
            raise UsageError(
                f"tracking_uri is {self.tracking_uri!r}, and trackers has no 'mlflow', which it "
                "is for"
            )
        return self


class RunConfig(_Section):
    """Everything that a run's results depend on."""

    method: str = Field("fedobd", description="The method to run, one of `methods`.")
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    federation: FederationConfig = Field(default_factory=FederationConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    simulation: SimulationConfig = Field(default_factory=SimulationConfig)
    output: OutputConfig = Field(default_factory=OutputConfig)
    methods: dict[str, Any] = Field(
        default_factory=dict, description="Options of each method by its name."
    )

    @model_validator(mode="after")
    def _check_methods(self) -> RunConfig:
        checked = {name: make_method(name, options) for name, options in self.methods.items()}
        if self.method not in checked:
            checked[self.method] = _method_class(self.method)()
        object.__setattr__(self, "methods", checked)
        return self

    @property
    def chosen(self) -> Method:
        """The method to run, with its options."""
        method: Method = self.methods[self.method]
        return method

    def block_rules(self, method: Method) -> BlockRules:
        """Return how a method wants the model cut: by `model.blocks`, or by layer or tensor."""
        return self.model.blocks if method.unit == "semantic" else BlockRules(style=method.unit)

    def for_method(self, name: str, seed: int) -> RunConfig:
        """Return the configuration of a single run: one method, one seed.

        Raises:
            UsageError: there is no such method.
        """
        changed = self.to_dict()
        changed["method"] = name
        changed["methods"] = {name: changed["methods"].get(name, {})}
        changed["federation"]["seed"] = seed
        return parse_config(changed)

    def with_stack(self, stack: int) -> RunConfig:
        """Return the configuration with this number of clients in a stack."""
        changed = self.to_dict()
        changed["simulation"]["stack"] = stack
        return parse_config(changed)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, every key present that has a value."""
        plain = plain_values(self)
        assert isinstance(plain, dict)
        return plain

    def to_toml(self) -> str:
        """Return TOML that `parse_config` reads back to an equal configuration."""
        return tomli_w.dumps(self.to_dict())


def plain_values(value: Any) -> Any:
    """Return a section or a method's options as what JSON and TOML can hold, without None."""
    if isinstance(value, BaseModel):
        return plain_values({name: getattr(value, name) for name in type(value).model_fields})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain_values({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {name: plain_values(item) for name, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    return value


def make_method(name: str, options: Any) -> Method:
    """Return the method of this name with options given as plain values.

    Raises:
        UsageError: there is no such method, or an option is unknown or not allowed.
    """
    if isinstance(options, Method):
        return options
    method = _validate(_method_class(name), options, f"methods.{name}")
    assert isinstance(method, Method)
    return method


def _method_class(name: str) -> type[Method]:
    if name not in METHODS:
        raise UsageError(
            f"method {name!r} is unknown; allowed are {', '.join(METHODS)}{nearest(name, METHODS)}"
        )
    return METHODS[name]


def _validate(kind: type[Any], value: Any, path: str) -> Any:
    """Turn plain values into a dataclass or model; a UsageError names each wrong key."""
    _check_keys(kind, value, path)
    try:
        return _adapter(kind).validate_python(value)  # type: ignore[arg-type]  # type[Any]
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            key = ".".join([*filter(None, [path]), *map(str, _without_types(fault["loc"]))])
            lines.append(f"{key}: {fault['input']!r} is not allowed: {fault['msg']}")
        raise UsageError("; ".join(dict.fromkeys(lines))) from error
    except UsageError as error:
        if path and not str(error).startswith(path):
            raise UsageError(f"{path}: {error}") from error
        raise


@functools.cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    """Return the validator of a type; making one takes milliseconds, using it microseconds."""
    return TypeAdapter(kind)


def _without_types(place: Iterable[int | str]) -> list[int | str]:
    """Leave out what pydantic adds for the members of a union."""
    added = ("constrained-", "literal[")
    return [
        p
        for p in place
        if p not in ("int", "float", "str") and not (isinstance(p, str) and p.startswith(added))
    ]


def _check_keys(kind: Any, value: Any, path: str) -> None:
    """Refuse keys that do not exist, with the nearest that does."""
    kind = _section_of(kind)
    if kind is None:
        return
    if not isinstance(value, Mapping):
        if isinstance(value, kind):
            return
        raise UsageError(f"{path}: {value!r} is not allowed: a table is wanted")
    hints = typing.get_type_hints(kind)
    if issubclass(kind, BaseModel):
        names = list(kind.model_fields)
    else:
        names = [field.name for field in dataclasses.fields(kind)]
    for key, inner in value.items():
        place = f"{path}.{key}" if path else str(key)
        if key not in names:
            raise UsageError(
                f"key {place!r} is unknown; allowed here are {', '.join(names)}"
                f"{nearest(str(key), names)}"
            )
        section = _section_of(hints[key])
        if section is not None:
            _validate(section, inner, place)  # so that an error names the innermost section


def _section_of(kind: Any) -> type[Any] | None:
    """Return the dataclass or model that a type stands for, None for a plain value."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        members = [m for m in typing.get_args(kind) if m is not type(None)]
        kind = members[0] if len(members) == 1 else None
    if isinstance(kind, type) and (dataclasses.is_dataclass(kind) or issubclass(kind, BaseModel)):
        return kind
    return None


def parse_config(values: Mapping[str, Any]) -> RunConfig:
    """Turn plain values into a configuration.

    Raises:
        UsageError: a key does not exist, or a value is not allowed.
    """
    config = _validate(RunConfig, values, "")
    assert isinstance(config, RunConfig)
    return config


def load_config(source: str, *, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a preset or a TOML file, and change single keys.

    Args:
        source: a preset's name, or the path of a TOML file.
        overrides: `key=value` with a dotted key, such as `methods.fedobd.codec.dropout_rate=0.5`;
            the value as in TOML, or else taken as text.

    Raises:
        UsageError: there is no such preset or file, it is no TOML, or a key or value is not
            allowed.
    """
    path = Path(source)
    if path.suffix == ".toml" or path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"configuration file {source!r} cannot be read: {error}") from error
    else:
        text = preset_text(source)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"configuration file {source!r} is not TOML: {error}") from error
    for override in overrides:
        _override(values, override)
    return parse_config(values)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {override!r}: wanted key=value, such as federation.clients=20")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *sections, last = key.strip().split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UsageError(f"--set {override!r}: {section!r} is a value, not a table")
        values = inner
    values[last] = value
