"""MLflow: a run of an experiment, by the client of ``mlflow-skinny``."""

import os
from logging import WARNING, getLogger
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from job.config.field import format_value
from job.run.tracker import StepRecord, TrackedRun

_KEY_TAG = "lanes.key"
_STEP_TAG = "lanes.step"  # the last step that the server has, set with its metrics
_MAX_VALUE, _MAX_METRICS, _MAX_PARAMS = 6000, 1000, 100  # characters, and items of a request, that MLflow accepts
_CLIENT_ENVIRONMENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}  # seconds


class MlflowTracker:
    """A run of MLflow; the experiment is that of MLFLOW_EXPERIMENT_NAME, or ``lanes``."""

    def __init__(self, run: TrackedRun) -> None:
        for name, value in _CLIENT_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        getLogger("mlflow").setLevel(WARNING)
        self.run, self.run_id = run, ""
        self.client = MlflowClient(None if run.target == "env" else run.target)

    def open(self, run_id: str, key: str) -> tuple[str, int]:
        """Continues the run, or creates one with a tag that is the key."""
        self.run_id = run_id or self._find_or_create(key)
        self.client.update_run(self.run_id, status="RUNNING")
        return self.run_id, int(self.client.get_run(self.run_id).data.tags.get(_STEP_TAG, -1))

    def _find_or_create(self, key: str) -> str:
        experiment = self._experiment()
        found = self.client.search_runs([experiment], f"tags.`{_KEY_TAG}` = '{key}'", max_results=1)
        run = found[0] if found else self.client.create_run(experiment, run_name=self.run.name, tags={_KEY_TAG: key})
        return run.info.run_id

    def describe(self) -> None:
        """Logs the configuration as parameters, which cannot be changed later."""
        known = self.client.get_run(self.run_id).data.params
        values = {name: value for name, value in self.run.config.items() if name not in known}
        params = [Param(name, format_value(value)[:_MAX_VALUE]) for name, value in values.items()]
        for start in range(0, len(params), _MAX_PARAMS):
            self.client.log_batch(self.run_id, params=params[start : start + _MAX_PARAMS])

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "lanes")
        experiment = self.client.get_experiment_by_name(name)
        return experiment.experiment_id if experiment else self.client.create_experiment(name)

    def log(self, records: list[StepRecord]) -> None:
        """Logs the steps' metrics with the tag of the last step; a request that is repeated changes nothing."""
        for record in records:
            for kind, text in record.texts.items():
                self.client.log_text(self.run_id, text, f"samples/{record.step:09}-{kind}.txt")
        metrics = [
            Metric(name, value, round(1000 * record.time), record.step)
            for record in records
            for name, value in record.metrics.items()
        ]
        tag = RunTag(_STEP_TAG, str(records[-1].step))
        for start in range(0, len(metrics), _MAX_METRICS):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + _MAX_METRICS])
        self.client.log_batch(self.run_id, tags=[tag])

    def upload(self, checkpoint: Path) -> None:
        """Logs the checkpoint's files as artifacts."""
        self.client.log_artifacts(self.run_id, str(checkpoint), "checkpoint")

    def close(self, *, finished: bool) -> None:
        """Marks the run as finished, or as one that was stopped."""
        self.client.set_terminated(self.run_id, "FINISHED" if finished else "KILLED")


create_tracker = MlflowTracker
