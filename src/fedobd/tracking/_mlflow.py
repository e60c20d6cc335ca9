"""MLflow: a run's parameters, figures and summary in a local SQLite store or on a server."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, final

from fedobd._errors import UsageError
from fedobd._lookup import not_installed
from fedobd.tracking._tracker import Tracker

EXPERIMENT = "fedobd"
STORE = "mlflow.db"
RUN_ID = "mlflow_run_id.txt"

_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # it tells of every table that it makes
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # 7 of its own, which take minutes
}
"""Environment variables that MLflow reads when it is imported; what the user has set stays."""

_BATCH = 100  # parameters at a time, MLflow's limit
_FINISHED = "FINISHED"


@final
class MLflowTracker(Tracker):
    """Logs to a run of the MLflow experiment `fedobd`, named like the run folder.

    The run's id is kept in the run folder, so that a run that goes on does so in MLflow too;
    rounds that MLflow has already are not logged again.

    Args:
        uri: a server (`http://...`) or a database (`sqlite:///...`); None for the file `mlflow.db`
            in the folder that holds the run folder, which the runs of a comparison share.

    Raises:
        UsageError: mlflow is not installed.
    """

    name: ClassVar[str] = "mlflow"

    def __init__(self, uri: str | None = None) -> None:
        super().__init__()
        self._mlflow = _import_mlflow()
        self._uri = uri
        self._run_id = ""
        self._last_step = 0
        self._was_finished = False

    def _begin(self, parameters: Mapping[str, Any], folder: Path) -> None:
        around = folder.absolute().parent
        uri = self._uri or f"sqlite:///{around / STORE}"
        # Artifacts are not logged; without a place for them MLflow would name one in this folder.
        artifacts = (around / "mlartifacts").as_uri() if self._uri is None else None
        try:
            self._client = self._mlflow.MlflowClient(uri)
            self._find_run(folder)
            if not self._run_id:
                experiment = self._experiment(artifacts)
                run = self._client.create_run(experiment, run_name=folder.absolute().name)
                self._run_id = run.info.run_id
                (folder / RUN_ID).write_text(f"{self._run_id}\n", encoding="utf-8")
            self._log_parameters(parameters)
        except self._mlflow.MlflowException as error:
            asked, failed, _ = str(error).partition(" failed with exception")
            reason = f"{asked} failed; is the server there?" if failed else asked.strip()
            raise UsageError(f"MLflow cannot use output.tracking_uri {uri!r}: {reason}") from error

    def _find_run(self, folder: Path) -> None:
        """Find the run that an earlier start of this one has logged to, if the store has it."""
        file = folder / RUN_ID
        if not file.exists():
            return
        run_id = file.read_text(encoding="utf-8").strip()
        try:
            status = self._client.get_run(run_id).info.status
        except self._mlflow.MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # another store than before
                return
            raise
        self._run_id = run_id
        self._was_finished = status == _FINISHED
        if not self._was_finished:
            self._client.update_run(run_id, status="RUNNING")
        history = self._client.get_metric_history(run_id, "round/seconds")
        self._last_step = max((metric.step for metric in history), default=0)

    def _experiment(self, artifacts: str | None) -> str:
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        if experiment is not None:
            return str(experiment.experiment_id)
        return str(self._client.create_experiment(EXPERIMENT, artifact_location=artifacts))

    def _log_parameters(self, parameters: Mapping[str, Any]) -> None:
        entries = [
            self._mlflow.entities.Param(
                key, value if isinstance(value, str) else json.dumps(value)
            )
            for key, value in parameters.items()
        ]
        for start in range(0, len(entries), _BATCH):
            self._client.log_batch(self._run_id, params=entries[start : start + _BATCH])

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step > self._last_step:
            self._log_metrics(step, metrics)
            self._last_step = step

    def _log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        entries = [self._mlflow.entities.Metric(k, v, now, step) for k, v in metrics.items()]
        self._client.log_batch(self._run_id, metrics=entries)

    def _close(self, summary: Mapping[str, float] | None) -> None:
        if self._was_finished:
            return
        if summary is not None:
            self._log_metrics(self._last_step, summary)
        self._client.set_terminated(self._run_id, _FINISHED if summary is not None else "KILLED")


def _import_mlflow() -> ModuleType:
    """Import MLflow, which takes seconds, with its telemetry and its messages turned off."""
    for variable, value in _SETTINGS.items():
        os.environ.setdefault(variable, value)
    try:
        return import_module("mlflow")
    except ModuleNotFoundError as error:
        raise not_installed("this", error, "mlflow") from error
