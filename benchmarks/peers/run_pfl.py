"""FedAvg with pfl-research: one process, or torchrun's with `--processes N`.

Departs from pfl's habits so that the work is the same: clients are drawn without replacement, by
a sampler of our own, and each epoch reshuffles a client's data, when its dataset is made.
"""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Stopwatch, arguments
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops.selector import get_default_framework_module
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn import functional as F
from workloads import SEED, WORKLOADS, Workload, draw_cohort, make_data, make_model


class Classifier(nn.Module):
    """The model as pfl wants it: with `loss` and `metrics`; it keeps the sum of the losses."""

    def __init__(self, workload: Workload, stopwatch: Stopwatch) -> None:
        super().__init__()
        self.layers = make_model(workload)
        self.stopwatch = stopwatch
        self.loss_sum, self.examples = 0.0, 0

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return a batch's mean loss."""
        self.stopwatch.first_batch()
        loss = F.cross_entropy(self.layers(inputs), targets)
        self.loss_sum += loss.item() * len(targets)
        self.examples += len(targets)
        return loss

    @torch.no_grad()
    def metrics(self, inputs: Tensor, targets: Tensor) -> dict[str, Any]:
        """Return metrics; pfl always asks for them in its first round, a warm-up."""
        loss = F.cross_entropy(self.layers(inputs), targets, reduction="sum").item()
        return {"loss": Weighted(loss, len(targets))}


class RoundClock(TrainingProcessCallback):  # type: ignore[misc]
    """Notes the end of each round and this process's losses in it."""

    def __init__(self, stopwatch: Stopwatch, classifier: Classifier) -> None:
        self.stopwatch = stopwatch
        self.classifier = classifier
        self.last = (0.0, 0)

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Go on with the next round."""
        self.last = (self.classifier.loss_sum, self.classifier.examples)
        self.classifier.loss_sum, self.classifier.examples = 0.0, 0
        self.stopwatch.end_round(self.last[0] / self.last[1])
        return False, Metrics()


def make_dataset(workload: Workload, seed: int) -> FederatedDataset:
    """Return the clients' data; a client's is shuffled anew each time it takes part."""
    data = make_data(workload)
    generator = torch.Generator().manual_seed(seed)

    def make_user(client: int) -> PyTorchTensorDataset:
        inputs, targets = data[client]
        order = torch.randperm(len(targets), generator=generator)
        return PyTorchTensorDataset((inputs[order], targets[order]), user_id=str(client))

    cohorts = (draw_cohort(workload, number) for number in itertools.count(1))
    clients = itertools.chain.from_iterable(cohorts)
    return FederatedDataset(make_user, user_sampler=lambda: next(clients))


def simulate(workload: Workload, threads: int) -> None:
    """Run the rounds in this process, one of torchrun's or the only one."""
    torch.set_num_threads(threads)
    np.random.seed(SEED)  # noqa: NPY002 (the state that pfl draws its own seeds from)
    distributed = get_default_framework_module().distributed
    alone = distributed.world_size == 1
    stopwatch = Stopwatch(workload, root=os.getpid() if alone else os.getppid())
    classifier = Classifier(workload, stopwatch)
    model = PyTorchModel(
        model=classifier,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(classifier.parameters(), lr=1.0),
    )
    dataset = make_dataset(workload, SEED + distributed.global_rank)
    clock = RoundClock(stopwatch, classifier)
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=stopwatch.total_rounds,
            evaluation_frequency=stopwatch.total_rounds,
            train_cohort_size=workload.cohort,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(
            training_data=dataset, val_data=dataset, postprocessors=[WeightByDatapoints()]
        ),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=workload.learning_rate,
            local_batch_size=workload.batch_size,
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    losses = torch.tensor(clock.last, dtype=torch.float64)
    if not alone:
        torch.distributed.all_reduce(losses)
    if distributed.global_rank == 0:
        name = f"pfl 0.6.0, {distributed.world_size} × {threads} threads"
        stopwatch.report(name, loss=float(losses[0] / losses[1]))
    if not alone:
        torch.distributed.barrier()  # the others live until their memory is read
        torch.distributed.destroy_process_group()


def main() -> None:
    """Run it, under torchrun where several processes are asked for."""
    words = arguments(__doc__, processes=1).parse_args()
    workload = WORKLOADS[words.workload]
    workload = replace(workload, rounds=words.rounds or workload.rounds)
    threads = words.threads or (workload.threads if words.processes == 1 else 1)
    if words.processes > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += [f"--nproc-per-node={words.processes}", str(Path(__file__).resolve())]
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        os.execv(sys.executable, [*torchrun, *sys.argv[1:]])  # noqa: S606 (the same process)
    simulate(workload, threads)


if __name__ == "__main__":
    main()
