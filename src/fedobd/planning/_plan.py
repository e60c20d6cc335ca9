"""Plan: what each method of a configuration will send."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fedobd.blocks import ModelSchema, decompose, get_state
from fedobd.experiments import RunConfig, build_data, initial_model, wants_vocab_size
from fedobd.methods import FedAvg, FedOBD
from fedobd.planning._method_plan import Federation, MethodPlan, plan_method
from fedobd.planning._updates import FINE_TUNING_UPDATE_SIZE, TYPICAL_UPDATE_SIZE, UpdateModel
from fedobd.sessions import Method, oversized_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the methods of a configuration will send, estimated.

    Args:
        schema: the model's schema, in the blocks of the configuration.
        federation: who takes part.
        updates: what stood for training.
        methods: one a method, in the order of the configuration, with FedAvg.
        dropout_rate: λ of FedOBD; None where it selects no blocks, or is not planned.
    """

    schema: ModelSchema
    federation: Federation
    updates: UpdateModel
    methods: tuple[MethodPlan, ...]
    dropout_rate: float | None

    def reduction(self, method: MethodPlan) -> float:
        """Return by which share of FedAvg's bytes a method sends less."""
        (fedavg,) = (m for m in self.methods if m.method == FedAvg.name)
        return 1 - method.total_bytes / fedavg.total_bytes

    def never_uploaded(self) -> tuple[int, ...]:
        """Return the numbers of the blocks that are too large for any upload of stage 1."""
        if self.dropout_rate is None:
            return ()
        return oversized_blocks(self.schema, self.dropout_rate)


def make_plan(
    config: RunConfig,
    *,
    update_size: float | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Estimate what each method of a configuration will send, from the real initial values.

    Data are loaded only where the model wants the size of their vocabulary; where it is given,
    embeddings start from random vectors. Where FedAvg is not among the methods, it is added, with
    all clients and as many rounds and epochs as the chosen method's first stage has.

    Args:
        config: the configuration; its method and seed are the run's.
        update_size: see `UpdateModel`; None for the typical one, which is smaller where the model
            starts from a checkpoint.
        on_step: is told what is done next.

    Raises:
        UsageError: the model cannot be built, or a cohort has more clients than there are.
    """
    if update_size is None:
        is_pretrained = config.model.options.get("checkpoint") is not None
        update_size = FINE_TUNING_UPDATE_SIZE if is_pretrained else TYPICAL_UPDATE_SIZE
    updates = UpdateModel(size=update_size, training=config.training.options)
    federation = Federation(
        num_clients=config.federation.clients,
        seed=config.federation.seed,
        shared_start=config.federation.shared_start,
    )
    on_step(f"building {config.model.name}")
    model = _initial_model(config)
    initial = get_state(model)
    plans = []
    for method in _with_fedavg(config):
        on_step(f"{method.name}: running a few rounds of one client")
        schema = decompose(model, config.block_rules(method))
        plans.append(plan_method(method, schema, initial, federation, updates))
    return Plan(
        schema=decompose(model, config.model.blocks),
        federation=federation,
        updates=updates,
        methods=tuple(plans),
        dropout_rate=_dropout_rate(config),
    )


def _initial_model(config: RunConfig) -> nn.Module:
    if wants_vocab_size(config.model):
        return initial_model(config, build_data(config).vocabulary)
    options = dict(config.model.options)
    if isinstance(options.get("vectors"), str):
        del options["vectors"]  # a file whose values want the words of the data
    model = config.model.model_copy(update={"options": options})
    return initial_model(config.model_copy(update={"model": model}))


def _with_fedavg(config: RunConfig) -> list[Method]:
    methods: dict[str, Method] = dict(config.methods)
    if FedAvg.name not in methods:
        first = config.chosen.stages()[0]
        methods[FedAvg.name] = FedAvg(rounds=first.rounds, epochs=first.epochs)
    return list(methods.values())


def _dropout_rate(config: RunConfig) -> float | None:
    fedobd = config.methods.get(FedOBD.name)
    if not isinstance(fedobd, FedOBD) or fedobd.codec.selection == "none":
        return None
    return fedobd.codec.dropout_rate
