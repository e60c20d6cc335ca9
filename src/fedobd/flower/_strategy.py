"""FedOBDStrategy: a whole method over Flower, thin over the core's ServerSession.

Flower's own `Strategy.start` (flwr 1.42) always begins at round 1, runs all of its rounds and has
no hook to end early: resuming, stages and early stop need a `start` of our own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from logging import INFO, WARNING, getLogger
from pathlib import Path
from types import MappingProxyType

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import nn

from fedobd._errors import EmptyRoundError, UsageError
from fedobd.blocks import BlockRules, ModelState
from fedobd.experiments import RunFolder, make_record, plain_values
from fedobd.flower._clients import ClientRegistry
from fedobd.flower._handshake import ArrayKeys, Handshake, describe
from fedobd.flower._messages import POLL_SECONDS, reason_of
from fedobd.flower._metrics import Figures, MetricKeys, mean_of, numbers_in
from fedobd.flower._round_driver import RoundDriver
from fedobd.methods import FedOBD
from fedobd.payload import DEFAULT_LIMITS, MAX_EXAMPLES, Limits
from fedobd.sessions import Method, RoundPlan, RoundRecord, ServerSession, cohort_size
from fedobd.simulation import Callback, RoundResult
from fedobd.training import Evaluation

logger = getLogger("flwr")  # where Flower shows what a ServerApp says


class FedOBDStrategy(Strategy):
    """Trains with FedOBD, or any other method of fedobd, over Flower.

    Clients have `CompressionMod`. Their identity is the `client-id` of their node config, or else
    its `partition-id`, from 0 to num_clients - 1: cohorts, seeds and records go by it. A train
    function finds `epochs`, `stage` and `server-round` in the message's ConfigRecord, beside
    `schedule-start`, `schedule-epochs`, `run-start` and `run-epochs` for learning-rate schedules.

    Args:
        method: the method with its options; None for FedOBD with its defaults.
        num_clients: how many clients there are.
        model_factory: makes the model, so that blocks and frozen parameters are known; None to go
            by the names and shapes of the arrays.
        rules: how the model is cut into blocks; None for the method's.
        seed: the run's seed.
        round_timeout: seconds from the sending of a round's messages after which replies are late
            and are left out.
        min_replies: the fewest accepted uploads of a round; with fewer it is repeated.
        max_attempts: how often a round is tried before the run fails.
        join_timeout: seconds to wait at the start for all clients, and later for `min_replies`.
        evaluate: have clients evaluate the model that they received, with the app's evaluate
            function, on the round's broadcast: the model does not travel again.
        checkpoint_dir: a run folder to keep records and checkpoints in; None for none.
        resume: go on from the checkpoint in that folder.
        shared_start: clients hold the initial model already; they need
            `CompressionMod(model_factory=...)`.
        max_examples: the largest number of examples that an upload may claim.
        limits: what an upload may take at most.
        metric_keys: where clients report examples, loss and evaluation.
        poll_seconds: pause between two looks for replies.

    Raises:
        UsageError: a value is outside what is allowed.

    References:
        FedOBD (arXiv 2208.05174), algorithms 1 and 2.
    """

    def __init__(
        self,
        method: Method | None = None,
        *,
        num_clients: int,
        model_factory: Callable[[], nn.Module] | None = None,
        rules: BlockRules | None = None,
        seed: int = 0,
        round_timeout: float = 3600.0,
        min_replies: int = 1,
        max_attempts: int = 3,
        join_timeout: float = 600.0,
        evaluate: bool = False,
        checkpoint_dir: str | Path | None = None,
        resume: bool = False,
        shared_start: bool = False,
        max_examples: int = MAX_EXAMPLES,
        limits: Limits = DEFAULT_LIMITS,
        metric_keys: MetricKeys | None = None,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        _check_counts(num_clients=num_clients, min_replies=min_replies, max_attempts=max_attempts)
        _check_seconds(round_timeout=round_timeout, join_timeout=join_timeout)
        if not 0 <= poll_seconds < math.inf:
            raise UsageError(f"poll_seconds is {poll_seconds}; allowed are seconds from 0")
        if resume and checkpoint_dir is None:
            raise UsageError("resume needs checkpoint_dir, the folder of the run to go on with")
        self.method = method or FedOBD()
        least = min(cohort_size(stage.cohort, num_clients) for stage in self.method.stages())
        if min_replies > least:
            raise UsageError(
                f"min_replies is {min_replies}; the smallest cohort of {self.method.name} with "
                f"{num_clients} clients has {least}"
            )
        self.num_clients = num_clients
        self.records: list[RoundRecord] = []
        """The records of the rounds that this object has run."""
        self.result = Result()
        """What clients reported in the last run, by round."""
        self._model_factory = model_factory
        self._rules = rules
        self._seed = seed
        self._round_timeout = round_timeout
        self._min_replies = min_replies
        self._max_attempts = max_attempts
        self._join_timeout = join_timeout
        self._evaluate = evaluate
        self._checkpoint_dir = checkpoint_dir
        self._resume = resume
        self._shared_start = shared_start
        self._max_examples = max_examples
        self._limits = limits
        self._metric_keys = metric_keys or MetricKeys()
        self._poll_seconds = poll_seconds

    # --- a whole run

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Train to the end of the method's last stage.

        Args:
            grid: the ServerApp's grid.
            initial_arrays: the initial model, in the shapes of its state dict.
            num_rounds: at most so many rounds, and later more with `resume`; None for all that
                the method plans.
            timeout: takes the place of `round_timeout`, if given.
            train_config: entries to add to the config of train messages.
            evaluate_config: entries to add to that of evaluate messages.
            evaluate_fn: evaluates the server's model before the first round and after each.

        Returns:
            The trained arrays; per round the mean of the clients' train metrics with
            `num-replies`, `uplink-bytes` and `downlink-bytes` (payloads), the mean of their
            evaluation, and what `evaluate_fn` gave.

        Raises:
            EmptyRoundError: a round had fewer than `min_replies` uploads `max_attempts` times.
            FedOBDError: fewer than `min_replies` clients can be reached.
            UsageError: the arrays do not fit the model, or the folder holds another run.
        """
        self._check_start(num_rounds, timeout)
        server, keys = self._new_session(initial_arrays)
        folder = self._open_folder(server)
        result = self.result = Result()
        self.summary()

        def evaluate(number: int) -> None:
            if evaluate_fn is None:
                return
            metrics = evaluate_fn(number, keys.to_arrays(server.state))
            if metrics is not None:
                result.evaluate_metrics_serverapp[number] = metrics
                logger.log(INFO, "fedobd: round %d: server evaluation %s", number, dict(metrics))

        if server.rounds == 0:
            evaluate(0)
        last = None if num_rounds is None else server.rounds + num_rounds
        configs = {"train": train_config, "evaluate": evaluate_config}
        rounds = self.run(grid, server, keys, configs=configs)
        while not server.is_finished and server.rounds != last:
            done = next(rounds)
            if folder is not None:
                # In this order: a record without its checkpoint is cut off when a run goes on.
                folder.append_record(make_record(done))
                folder.save_checkpoint(server.save())
            evaluate(done.record.round)
        result.arrays = keys.to_arrays(server.state)
        return result

    def _check_start(self, num_rounds: int | None, timeout: float | None) -> None:
        if self.method.stop.source == "test":
            raise UsageError(
                "the method stops early on a test set, which this has not got; wanted "
                "EarlyStop(source='validation')"
            )
        if timeout is not None:
            _check_seconds(timeout=timeout)
            self._round_timeout = timeout
        if num_rounds is not None and num_rounds < 0:
            raise UsageError(f"num_rounds is {num_rounds}; allowed are numbers from 0")

    def _new_session(self, initial_arrays: ArrayRecord) -> tuple[ServerSession, ArrayKeys]:
        unit = self.method.unit
        rules = self._rules if unit == "semantic" else BlockRules(style=unit)
        schema, keys = describe(initial_arrays, self._model_factory, rules)
        server = ServerSession(
            self.method,
            schema,
            keys.to_state(initial_arrays, schema),
            num_clients=self.num_clients,
            seed=self._seed,
            shared_start=self._shared_start,
            limits=replace(self._limits, max_examples=self._max_examples),
        )
        return server, keys

    def _open_folder(self, server: ServerSession) -> RunFolder | None:
        if self._checkpoint_dir is None:
            return None
        folder = RunFolder(Path(self._checkpoint_dir))
        options = {
            "method": self.method.name,
            "options": plain_values(self.method),
            "clients": self.num_clients,
            "seed": self._seed,
            "shared_start": self._shared_start,
            "model": server.schema.fingerprint.hex(),
        }
        folder.start(options, resume=self._resume)
        folder.write_json("schema.json", server.schema.to_json())
        saved = folder.load_checkpoint()
        if saved is not None:
            server.restore(saved)
        folder.cut_records(server.rounds)
        return folder

    def run(
        self,
        grid: Grid,
        server: ServerSession,
        keys: ArrayKeys | None = None,
        *,
        configs: Mapping[str, ConfigRecord | None] = MappingProxyType({}),
        evaluate: Callable[[ModelState], Evaluation] | None = None,
        should_evaluate: Callable[[RoundPlan], bool] = lambda plan: True,
        callback: Callback | None = None,
    ) -> Iterator[RoundResult]:
        """Run the remaining rounds of a session; between two yields it can be saved.

        Args:
            grid: the ServerApp's grid.
            server: the session.
            keys: the arrays that clients see; None for the tensors of the schema.
            configs: entries to add to the config of messages, by kind: `train`, `evaluate`.
            evaluate: evaluates a state on the test set.
            should_evaluate: in which rounds.
            callback: sees payloads, and clients that have uploaded.

        Yields:
            Each round when it has ended.

        Raises:
            EmptyRoundError, FedOBDError: see `start`.
        """
        driver = self._join(grid, server, keys or ArrayKeys.of(server.schema), callback)
        while not server.is_finished:
            began = time.perf_counter()
            driver.seconds.clear()
            record = self._train(grid, configs.get("train") or ConfigRecord())
            if self._evaluate:
                self._evaluate_clients(grid, configs.get("evaluate") or ConfigRecord())
            plan = driver.plan
            assert plan is not None
            test = None
            if evaluate is not None and should_evaluate(plan):
                test = evaluate(server.state)
                server.observe_test_metric(test.metric)
            seconds = {**driver.seconds, "round": time.perf_counter() - began}
            yield RoundResult(record=record, test=test, seconds=seconds)

    def _join(
        self, grid: Grid, server: ServerSession, keys: ArrayKeys, callback: Callback | None
    ) -> RoundDriver:
        """Take up a session, and wait for its clients."""
        self._server, self._keys = server, keys
        handshake = Handshake(
            method=server.method,
            schema=server.schema,
            keys=keys,
            seed=server.seed,
            metrics=self._metric_keys,
            shared_start=self._shared_start,
        )
        self._registry = ClientRegistry(
            grid, self.num_clients, wants_model=self._shared_start, poll_seconds=self._poll_seconds
        )
        self._driver = RoundDriver(
            grid,
            server,
            handshake,
            round_timeout=self._round_timeout,
            poll_seconds=self._poll_seconds,
            keep_broadcast=self._evaluate,
            callback=callback,
        )
        self._registry.gather(self.num_clients, self._min_replies, self._join_timeout)
        return self._driver

    def _train(self, grid: Grid, config: ConfigRecord) -> RoundRecord:
        """Run the training of a round, again where too few uploads came."""
        number = self._server.rounds + 1
        for _ in range(self._max_attempts):
            messages = self.configure_train(number, ArrayRecord(), config, grid)
            _, metrics = self.aggregate_train(number, self._driver.exchange(messages))
            if metrics is not None:
                self.result.train_metrics_clientapp[number] = metrics
                return self.records[-1]
            logger.log(WARNING, "fedobd: round %d had too few uploads and is repeated", number)
        left_out = self._driver.left_out
        raise EmptyRoundError(
            f"round {number} had fewer than {self._min_replies} uploads in {self._max_attempts} "
            "attempts; the last one left out "
            + "; ".join(f"client {client}: {why}" for client, why in sorted(left_out.items()))
        )

    def _evaluate_clients(self, grid: Grid, config: ConfigRecord) -> None:
        number = self._server.rounds
        messages = self.configure_evaluate(number, ArrayRecord(), config, grid)
        metrics = self.aggregate_evaluate(number, self._driver.exchange(messages))
        if metrics is not None:
            self.result.evaluate_metrics_clientapp[number] = metrics

    @property
    def handshake_bytes(self) -> int:
        """Bytes of all handshakes that were sent.

        Of them the records hold the method's initial payloads (frozen tensors, for some methods
        the model), and not the schema and the options, which no other engine sends.
        """
        return self._driver.handshake_bytes

    # --- the hooks of Flower's Strategy

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Begin the round and return its messages; the arrays are the session's, not these."""
        nodes = self._registry.gather(self._min_replies, self._min_replies, self._join_timeout)
        return self._driver.begin(nodes, config)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Accumulate uploads as they come and end the round.

        Returns:
            The new arrays and the round's figures; (None, None) where it has to be repeated.
        """
        reported: dict[int, Figures] = {}
        for reply in replies:
            client = self._driver.receive(reply)
            if client is not None:
                reported[client] = numbers_in(reply.content)
        record = self._driver.end(self._min_replies)
        if record is None:
            return None, None
        self.records.append(record)
        weighted = [(reported[u.client], u.report.num_examples) for u in record.uploads]
        metrics = MetricRecord({**mean_of(weighted), **self._figures(record)})
        return self._keys.to_arrays(self._server.state), metrics

    def _figures(self, record: RoundRecord) -> Figures:
        """Return what a round's record says; it has the last word over what clients report."""
        names = self._metric_keys
        figures = {
            names.train_loss: record.train_loss,
            names.eval_loss: record.validation_loss,
            names.eval_metric: record.validation_metric,
            "num-replies": len(record.uploads),
            "uplink-bytes": record.uplink_bytes,
            "downlink-bytes": record.downlink_bytes,
        }
        return {name: figure for name, figure in figures.items() if figure is not None}

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Ask the clients of the round to evaluate the broadcast that they kept."""
        return self._driver.evaluation(config)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the mean of the clients' metrics, weighted by their examples."""
        weighted = []
        for reply in replies:
            if reply.has_error():
                logger.log(WARNING, "fedobd: an evaluation failed: %s", reason_of(reply))
                continue
            entries = numbers_in(reply.content)
            weight = entries.pop(self._metric_keys.num_examples, None)
            if isinstance(weight, int) and 1 <= weight <= self._max_examples:
                weighted.append((entries, weight))
        return MetricRecord({**mean_of(weighted)}) if weighted else None

    def summary(self) -> None:
        """Log the method with its options."""
        logger.log(INFO, "fedobd: %s, %d clients", self.method, self.num_clients)


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise UsageError(f"{name} is {value}; allowed are numbers from 1")


def _check_seconds(**seconds: float) -> None:
    for name, value in seconds.items():
        if not 0 < value < math.inf:
            raise UsageError(f"{name} is {value}; allowed are seconds above 0")
