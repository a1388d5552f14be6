"""Trainings under fire: whatever is killed, and whenever, the run ends with the weights of the undisturbed one."""

import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from reelway.cluster.training import TrainingInterrupted
from reelway.pipelines import hosting, students
from reelway.pipelines.hosting import Hosting, train_on_ray
from reelway.pipelines.recipe import ZeroRecipe
from reelway.pipelines.telemetry import read_curve

sys.path.insert(0, str(Path(__file__).parent))
from faults.kills import descendants, wait_until
from trainings.jobs import INITIALIZE, RECIPE, carry_out, distill_job, initialize_job, same, weights_of, write_dataset

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

STAGES = ("initialize", "causvid", "self-forcing", "long")
STEPS, MANY_STEPS = 6, 60
WORKER = b"ray::RayTrainWorker"


@pytest.fixture(autouse=True, scope="module")
def _small_sheets() -> Iterator[None]:
    before, students.SAMPLES = students.SAMPLES, 2
    yield
    students.SAMPLES = before


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "trajectories")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- One process --------------------------------------------------------------------------------------------------


@pytest.mark.timeout(1200)
def test_a_killed_command_goes_on_to_the_same_weights(small_teacher: Path, trajectories: str, tmp_path: Path) -> None:
    """SIGKILL at some moment after the second step, as the machine does it; then the same job again."""
    rng = random.Random(0)
    whole, run = tmp_path / "whole", tmp_path / "run"
    more = ("initialize.steps=8", "initialize.sheet_every=8")
    carry_out(initialize_job(small_teacher, trajectories, whole, *more))
    words = [sys.executable, "-m", "reelway.pipelines.cli", "initialize", "--recipe", str(RECIPE)]
    words += ["--teacher", str(small_teacher), "--data", trajectories, "--run", str(run)]
    words += [word for change in (*INITIALIZE, *more) for word in ("--set", change)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        # Steps take long enough to be hit: where it ends by itself first, there is nothing to see.
        assert wait_until(lambda: len(read_curve(run / "curve.jsonl")) >= 3 or process.poll() is not None, 900)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
    assert process.returncode == -signal.SIGKILL
    carry_out(initialize_job(small_teacher, trajectories, run, *more))
    assert same(weights_of(run, 8), weights_of(whole, 8))
    losses = [[row["loss"] for row in read_curve(folder / "curve.jsonl")] for folder in (run, whole)]
    assert losses[0] == losses[1]
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in whole.iterdir())


# --- Workers on Ray -----------------------------------------------------------------------------------------------


class Killer:
    """Kills one of a training's workers, once, a moment after a step's news: 0 is before the first."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.after, self.pause, self.victim = rng.randrange(STEPS - 1), rng.uniform(0, 0.3), rng.random()
        self.struck: list[int] = []
        self._lock = threading.Lock()

    def strike(self, done: int) -> None:
        with self._lock:
            if self.struck or done < self.after:
                return
            time.sleep(self.pause)
            workers = descendants(WORKER)
            if workers:
                self.struck.append(workers[int(self.victim * len(workers))])
                os.kill(self.struck[0], signal.SIGKILL)

    def at_the_start(self) -> None:
        wait_until(lambda: descendants(WORKER), 120)
        self.strike(0)


@contextmanager
def watched(act: Callable[[int], Any]) -> Iterator[None]:
    """Call `act` with every step's number, when the driver hears of it."""
    shown = hosting._shown

    @contextmanager
    def with_act(*arguments: Any) -> Iterator[Any]:
        with shown(*arguments) as show:

            def also(metrics: dict[str, float]) -> None:
                show(metrics)
                act(int(metrics["step"]))

            yield also

    hosting._shown = with_act
    try:
        yield
    finally:
        hosting._shown = shown


def job_of(stage: str, student: Path, teacher: Path, data: str, run: Path, steps: int = STEPS) -> Any:
    section = "initialize" if stage == "initialize" else f"distill.{stage.replace('-', '_')}"
    more = [f"{section}.steps={steps}", f"{section}.sheet_every={steps}"]
    if stage == "initialize":
        return replace(initialize_job(teacher, data, run, *more), engine="zero")
    return replace(distill_job(stage, student, teacher, data, run, *more), engine="zero")


def on_ray(stage: str, job: Any, workers: int = 2) -> str:
    """What the driver says of a training."""
    said = Console(file=io.StringIO(), width=200)
    module = "initialize" if stage == "initialize" else "distill"
    zero = ZeroRecipe(stage=2, precision="fp32")
    train_on_ray(module, job, zero, STEPS, Hosting(workers, "cpu", 1.0, 0.0, None), said)
    return said.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.fixture(scope="module")
def undisturbed(
    ray_session: Any, small_teacher: Path, small_student: Path, trajectories: str, tmp_path_factory: Any
) -> Callable[[str], Path]:
    """The folder of a stage's undisturbed run, made when it is asked for."""
    folder, made = tmp_path_factory.mktemp("undisturbed"), set()

    def run_of(stage: str) -> Path:
        if stage not in made:
            on_ray(stage, job_of(stage, small_student, small_teacher, trajectories, folder / stage))
            made.add(stage)
        return Path(folder / stage)

    return run_of


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_whose_worker_is_killed_ends_with_the_weights_of_the_undisturbed_one(
    stage: str,
    seed: int,
    undisturbed: Callable[[str], Path],
    small_teacher: Path,
    small_student: Path,
    trajectories: str,
    tmp_path: Path,
) -> None:
    """Weights, averages, optimisers, live streams and cursors, bit by bit."""
    expected, killer = undisturbed(stage), Killer(seed)
    job = job_of(stage, small_student, small_teacher, trajectories, tmp_path / stage)
    with watched(killer.strike):
        starter = threading.Thread(target=killer.at_the_start) if killer.after == 0 else None
        if starter:
            starter.start()
        said = on_ray(stage, job)
        if starter:
            starter.join()
    assert killer.struck, "nothing was killed"
    if killer.after:  # else the first ones may be gone before anybody heard of them
        assert "workers were lost: started again" in said
    last = f"checkpoints/step-{STEPS:06d}"
    assert files_of(tmp_path / stage / last) == files_of(expected / last)
    for name in ("transformer/diffusion_pytorch_model.safetensors", "student.json"):
        assert (tmp_path / stage / "model" / name).read_bytes() == (expected / "model" / name).read_bytes()
    losses = [[row["loss"] for row in read_curve(run / "curve.jsonl")] for run in (tmp_path / stage, expected)]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["initialize", "long"])
def test_another_number_of_workers_goes_on_or_is_refused(
    stage: str,
    ray_session: Any,
    small_teacher: Path,
    small_student: Path,
    trajectories: str,
    tmp_path: Path,
) -> None:
    """Ctrl-C with two workers, the same line with one: the batches are the same; live rollouts cannot move.

    Steps enough for some to be left when the driver has heard of the second; by then the oldest checkpoints are gone.
    """
    job = job_of(stage, small_student, small_teacher, trajectories, tmp_path / stage, MANY_STEPS)
    interrupt = watched(lambda done: os.kill(os.getpid(), signal.SIGINT) if done == 2 else None)
    with interrupt, pytest.raises(TrainingInterrupted):
        on_ray(stage, job)
    assert len(read_curve(tmp_path / stage / "curve.jsonl")) < MANY_STEPS
    if stage == "long":
        with pytest.raises(ValueError, match="live rollouts go on only with as many processes as before"):
            on_ray(stage, job, workers=1)
        return
    on_ray(stage, job, workers=1)
    on_ray(stage, replace(job, run=str(tmp_path / "undisturbed")))
    losses = [[row["loss"] for row in read_curve(tmp_path / name / "curve.jsonl")] for name in (stage, "undisturbed")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[0]) == MANY_STEPS
