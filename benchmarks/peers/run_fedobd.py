"""fedobd's own simulator on the workloads that its peers are timed on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from measure import Stopwatch, arguments, now
from torch import nn
from workloads import SEED, WORKLOADS, Workload, draw_cohort, make_data, make_model

from fedobd import BlockRules, FedAvg, FedOBD, Method, RoundPlan, ServerSession, decompose
from fedobd import get_state as values_of
from fedobd.data import ClientData, Examples, select
from fedobd.simulation import ClientSetup, open_pool, simulate
from fedobd.training import TrainingOptions, train_locally, train_stacked


@dataclass(frozen=True)
class Source:
    """A client's data: a part of one set, as `fedobd.data.federate` shares it out.

    The set is made once in each process, as every peer does.
    """

    workload: Workload

    def __call__(self, client: int) -> ClientData:
        """Return a client's data."""
        whole, count = whole_of(self.workload), self.workload.examples
        numbers = torch.arange(client * count, (client + 1) * count)
        return ClientData(select(whole, numbers), select(whole, numbers[:0]))


@cache
def whole_of(workload: Workload) -> Examples:
    """Return all clients' examples, one client's after another's."""
    parts = make_data(workload)
    layout = torch.channels_last if len(workload.shape) == 3 else torch.contiguous_format
    inputs = torch.cat([inputs for inputs, _ in parts]).to(memory_format=layout)
    return Examples(inputs, torch.cat([targets for _, targets in parts]))


class Server(ServerSession):
    """A session that draws the cohorts of the workload."""

    workload: Workload

    def begin_round(self, available: Collection[int] | None = None) -> RoundPlan | None:
        """Begin a round of the clients that every peer trains in it."""
        return super().begin_round(draw_cohort(self.workload, self.rounds + 1))


def make(workload: Workload, channels_last: bool) -> nn.Module:
    """Return the model."""
    model = make_model(workload)
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def method_of(name: str, workload: Workload, rounds: int) -> Method:
    """Return the method, with the workload's cohort and one epoch a round."""
    if name == "fedavg":
        return FedAvg(rounds=rounds, epochs=1, cohort=workload.cohort)
    return FedOBD(
        stage_one_rounds=rounds, stage_one_epochs=1, stage_two_epochs=0, cohort=workload.cohort
    )


def main() -> None:
    """Run it."""
    parser = arguments(__doc__, processes=0)
    parser.add_argument("--method", choices=("fedavg", "fedobd"), default="fedavg")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--stack", type=int, default=1)
    parser.add_argument("--cohort", type=int)
    parser.add_argument("--clients", type=int)
    words = parser.parse_args()
    workload = WORKLOADS[words.workload]
    workload = replace(
        workload,
        rounds=words.rounds or workload.rounds,
        cohort=words.cohort or workload.cohort,
        num_clients=words.clients or workload.num_clients,
    )
    stopwatch = Stopwatch(workload)
    options = TrainingOptions(
        learning_rate=workload.learning_rate,
        momentum=0.0,
        batch_size=workload.batch_size,
        schedule="constant",
    )
    model = make_model(workload)
    rules = BlockRules(max_block_fraction=0.2 if words.method == "fedobd" else None)
    schema = decompose(model, rules)
    method = method_of(words.method, workload, stopwatch.total_rounds)
    setup = ClientSetup(
        method=method,
        schema=schema,
        seed=SEED,
        make_model=partial(make, workload, words.channels_last),
        data=Source(workload),
        train=partial(train_locally, options=options),
        stack=words.stack,
        train_together=partial(train_stacked, options=options),
    )
    server = Server(method, schema, values_of(model), num_clients=workload.num_clients, seed=SEED)
    server.workload = workload
    with open_pool(setup, words.processes) as pool:
        stopwatch.first_batch(now())
        for played in simulate(server, pool):
            stopwatch.end_round(played.record.train_loss)
        shown = {phase: round(spent, 4) for phase, spent in played.seconds.items()}
        kept = sum(len(u.block_ids) for u in played.record.uploads)
        share = sum(
            schema.blocks[number].num_parameters
            for upload in played.record.uploads
            for number in upload.block_ids
        ) / (schema.num_parameters * len(played.record.uploads))
        print(f"last round: {shown}, {kept} blocks, {share:.2f} of the parameters")
        name = f"fedobd, {words.method}, {words.processes} workers, stack {words.stack}"
        stopwatch.report(name + (", channels_last" if words.channels_last else ""))


if __name__ == "__main__":
    main()
