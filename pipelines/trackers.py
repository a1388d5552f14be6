"""Weights & Biases and MLflow, where a recipe asks for them: thin, and imported only then."""

import importlib
import importlib.util
import json
import logging
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from .recipe import TelemetryRecipe

IDENTITIES = "trackers.json"  # in a run's folder: what the trackers call the run, so that it goes on there

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """A place of somebody else's where the curves of a run go."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Figures of a step. A step may come again after a restart."""
        ...

    def sheet(self, path: Path, step: int) -> None:
        """A picture that was drawn after so many steps."""
        ...

    def close(self, *, failed: bool) -> None:
        """The process is done with the run; it may go on in another one."""
        ...


class WandbTracker:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it in the run's folder."""

    def __init__(self, project: str, name: str, folder: Path, identity: str, config: Mapping[str, Any]) -> None:
        wandb: Any = importlib.import_module("wandb")
        self._image = wandb.Image
        self._run = wandb.init(
            project=project, name=name, dir=str(folder), id=identity, resume="allow", config=dict(config)
        )
        # W&B's own count may not go back, as ours does after a restart.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def sheet(self, path: Path, step: int) -> None:
        self._run.log({"sheet": self._image(str(path)), "step": step})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MlflowTracker:
    """A run of an MLflow server, or of MLFLOW_TRACKING_URI. A server that is away for a while does not stop a run."""

    def __init__(self, project: str, name: str, identity: str | None, config: Mapping[str, Any]) -> None:
        mlflow: Any = importlib.import_module("mlflow")
        self._client = mlflow.MlflowClient()
        self._metric = mlflow.entities.Metric
        self._errors = (mlflow.exceptions.MlflowException, OSError)
        if identity is None:
            found = self._client.get_experiment_by_name(project)
            experiment = found.experiment_id if found else self._client.create_experiment(project)
            identity = self._client.create_run(experiment, run_name=name).info.run_id
            self._client.log_dict(identity, dict(config), "recipe.json")
        else:
            self._client.update_run(identity, status="RUNNING")
        self.identity: str = identity

    def log(self, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._try("figures", step, lambda: self._client.log_batch(self.identity, metrics=metrics))

    def sheet(self, path: Path, step: int) -> None:
        self._try("the sheet", step, lambda: self._client.log_artifact(self.identity, str(path), "sheets"))

    def close(self, *, failed: bool) -> None:
        status = "FAILED" if failed else "FINISHED"
        self._try("the end", -1, lambda: self._client.set_terminated(self.identity, status))

    def _try(self, what: str, step: int, send: Any) -> None:
        try:
            send()
        except self._errors as error:
            log.warning("mlflow: %s of step %d could not be sent: %s", what, step, error)


def check_trackers(recipe: TelemetryRecipe) -> None:
    """ValueError where one is asked for that is not installed."""
    for name in recipe.trackers:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"telemetry.trackers: {name} is asked for and not installed; pip install {name}")


def open_trackers(recipe: TelemetryRecipe, stage: str, folder: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """Those that the recipe asks for, going on where the folder's run has been before. config: what the run is."""
    check_trackers(recipe)
    path = folder / IDENTITIES
    identities: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    name = f"{folder.name}: {stage}"
    found: list[Tracker] = []
    for kind in recipe.trackers:
        if kind == "wandb":
            identities.setdefault(kind, uuid.uuid4().hex[:12])
            found.append(WandbTracker(recipe.project, name, folder, identities[kind], config))
        else:
            mlflow = MlflowTracker(recipe.project, name, identities.get(kind), config)
            identities[kind] = mlflow.identity
            found.append(mlflow)
    if found:
        path.write_text(json.dumps(identities) + "\n")
    return found
