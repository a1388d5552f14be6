"""Weights & Biases for real, offline; MLflow by its client's calls; what is asked for and not installed."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from reelway.pipelines import initialize, trackers
from reelway.pipelines.recipe import TINY, TelemetryRecipe
from reelway.pipelines.telemetry import Telemetry
from reelway.pipelines.trackers import IDENTITIES, check_trackers, open_trackers


def test_what_is_not_installed_is_one_line(
    monkeypatch: pytest.MonkeyPatch, small_teacher: Path, tmp_path: Path
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlflow" else found(name))
    with pytest.raises(ValueError, match=r"^telemetry\.trackers: mlflow is asked for and not installed; pip install"):
        check_trackers(TelemetryRecipe(trackers=["mlflow"]))
    check_trackers(TelemetryRecipe())
    line = ["--teacher", str(small_teacher), "--data", "nowhere", "--run", str(tmp_path / "run")]
    result = CliRunner().invoke(initialize.app, [*line, "--recipe", str(TINY), "--set", "telemetry.trackers=[mlflow]"])
    assert "mlflow is asked for and not installed" in str(result.exception), "before anything is read or started"
    assert not (tmp_path / "run").exists()


def test_nobody_is_told_anything_unless_the_recipe_says_so(tmp_path: Path) -> None:
    assert open_trackers(TelemetryRecipe(), "stage", tmp_path, {}) == []
    assert list(tmp_path.iterdir()) == []


def test_wandb_keeps_the_run_offline_and_goes_on_under_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("WANDB_CONSOLE", "off")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    run, recipe = tmp_path / "run", TelemetryRecipe(trackers=["wandb"], project="films")
    run.mkdir()
    Image.new("RGB", (8, 8)).save(run / "step-000002.png")
    identities = []
    for start in (0, 1):  # the second process begins again at step 1
        opened = open_trackers(recipe, "initialize-ode", run, {"seed": 7})
        telemetry = Telemetry("ode", run, start, 2, trackers=opened)
        for step in range(start, 2):
            telemetry.step(step, {"loss": 1.0 / (1 + step)})
        telemetry.sheet(2, run / "step-000002.png", {"score": 0.5})
        telemetry.close()
        identities.append(json.loads((run / IDENTITIES).read_text())["wandb"])
    assert identities[0] == identities[1]
    files = sorted((run / "wandb").glob(f"offline-run-*/run-{identities[0]}.wandb"))
    assert files, list((run / "wandb").iterdir())
    content = b"".join(file.read_bytes() for file in files)
    for word in (b"films", b"loss", b"score", b"initialize-ode", b"seed"):
        assert word in content, word


class Client:
    """The part of MLflow's client that is used, writing down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def get_experiment_by_name(self, name: str) -> Any:
        return None

    def create_experiment(self, name: str) -> str:
        return f"experiment {name}"

    def create_run(self, experiment: str, run_name: str) -> Any:
        self.told.append(("create", experiment, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="id"))

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **named: self.told.append((name, *arguments, *named.values()))


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    """MLflow does not install beside this project's pinned packages."""
    told = Client()
    module = SimpleNamespace(
        __spec__=SimpleNamespace(),
        MlflowClient=lambda: told,
        entities=SimpleNamespace(Metric=lambda *values: values),
        exceptions=SimpleNamespace(MlflowException=RuntimeError),
    )
    monkeypatch.setitem(sys.modules, "mlflow", module)  # type: ignore[arg-type]
    return told


def test_mlflow_is_told_the_figures_and_goes_on_in_its_run(
    client: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = TelemetryRecipe(trackers=["mlflow"], project="films")
    (one,) = open_trackers(recipe, "stage", tmp_path, {"seed": 7})
    one.log({"loss": 0.5}, 3)
    one.sheet(tmp_path / "step-000003.png", 3)
    one.close(failed=True)
    words = [entry[0] for entry in client.told]
    assert words == ["create", "log_dict", "log_batch", "log_artifact", "set_terminated"]
    assert client.told[0] == ("create", "experiment films", f"{tmp_path.name}: stage")
    ((name, value, _, step),) = client.told[2][2]
    assert (name, value, step) == ("loss", 0.5, 3)
    assert client.told[-1][1:] == ("id", "FAILED")

    (again,) = open_trackers(recipe, "stage", tmp_path, {"seed": 7})
    assert client.told[-1] == ("update_run", "id", "RUNNING")

    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("nobody answers")

    client.log_batch = away  # type: ignore[method-assign]
    again.log({"loss": 0.4}, 4)
    assert "figures of step 4 could not be sent: nobody answers" in caplog.text
    assert trackers.log.name in {record.name for record in caplog.records}
