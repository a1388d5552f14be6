"""Stages of training on small models: over-all runs, interruptions, refusals, poisoned samples, what is left behind."""

import json
import logging
import pickle
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from reelway.actors.engine import OneRank, OptimizerSettings, TorchEngine
from reelway.actors.learning import regression
from reelway.actors.learning.batch import Batch
from reelway.actors.learning.causality import CausalityError
from reelway.actors.learning.regression import OdeLearner
from reelway.actors.model_files import velocity_digest
from reelway.cluster.dataset import ShardError
from reelway.kernels.causal.masks import bidirectional
from reelway.kernels.causal.student import StudentSettings
from reelway.kernels.wan.context import TextContext
from reelway.kernels.wan.weights import read_transformer
from reelway.pipelines import distill, initialize, students, telemetry, training
from reelway.pipelines.commands import plain_engines
from reelway.pipelines.hosting import Hosting, train_on_ray
from reelway.pipelines.recipe import InitializeRecipe, ZeroRecipe, load_recipe
from reelway.pipelines.samples import Deal, PromptBatches, ShardBatches, TrainingData, training_prompts
from reelway.pipelines.telemetry import read_curve
from reelway.pipelines.training import RUN, Stage, run_stage

sys.path.insert(0, str(Path(__file__).parent))
from trainings.jobs import (
    CAPTIONS,
    COMMON,
    INITIALIZE,
    RECIPE,
    SAMPLES,
    SHAPE,
    carry_out,
    distill_job,
    initialize_job,
    latents,
    resolved,
    same,
    small,
    weights_of,
    write_dataset,
)


@pytest.fixture(autouse=True, scope="module")
def _small_sheets() -> Iterator[None]:
    before, students.SAMPLES = students.SAMPLES, 2
    yield
    students.SAMPLES = before


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "trajectories")


@pytest.fixture(scope="module")
def initialized(small_teacher: Path, trajectories: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of 4 steps."""
    run = tmp_path_factory.mktemp("initialize") / "run"
    assert carry_out(initialize_job(small_teacher, trajectories, run))
    return run


# --- A run and what it leaves behind ----------------------------------------------------------------------------------


def test_a_run_leaves_a_student_and_its_record(initialized: Path, small_teacher: Path) -> None:
    model = initialized / "model"
    student = StudentSettings.read(model)
    assert student.timesteps == (1000.0, 750.0)
    assert student.origin["steps"] == 4
    assert student.origin["data"] == "set"
    assert student.origin["parent"]["model"] == "teacher"
    record = json.loads((initialized / RUN).read_text())
    assert record["status"] == "finished"
    assert record["causality"] == "passed"
    assert record["gate"]["passed"] is True
    assert record["gate"]["checks"]["loss_flattened"]["measured"] is None  # four steps tell nothing
    assert student.origin["recipe"] == record["fingerprint"]
    for name in ("vae/config.json", "tokenizer/tokenizer.json", "text_encoder/model.safetensors"):
        assert (model / name).read_bytes() == (small_teacher / name).read_bytes()
    _, exported = read_transformer(model)
    saved = torch.load(initialized / "checkpoints/step-000004/student/engine.pt", weights_only=True)
    assert all(torch.equal(exported[name], value.bfloat16()) for name, value in saved["average"].items())
    assert not same(saved["average"], saved["network"])


def test_a_run_leaves_curves_sheets_and_few_checkpoints(initialized: Path) -> None:
    rows = read_curve(initialized / "curve.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["gradient_norm"] > 0 for row in rows)
    scores = read_curve(initialized / "scores.jsonl")
    assert [row["step"] for row in scores] == [0, 4]
    assert all(0 <= row["score"] <= 1 for row in scores)
    assert sorted(path.name for path in (initialized / "sheets").iterdir()) == ["step-000000.png", "step-000004.png"]
    assert sorted(path.name for path in (initialized / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    assert any(path.name.startswith("events") for path in (initialized / "tensorboard").iterdir())


def test_a_finished_run_is_left_alone(initialized: Path, small_teacher: Path, trajectories: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in initialized.rglob("*") if path.is_file()}
    assert carry_out(initialize_job(small_teacher, trajectories, initialized))
    assert {path: path.stat().st_mtime_ns for path in initialized.rglob("*") if path.is_file()} == before


def test_a_job_is_plain(small_teacher: Path, trajectories: str, tmp_path: Path) -> None:
    job = initialize_job(small_teacher, trajectories, tmp_path)
    assert pickle.loads(pickle.dumps(job)) == job


def test_every_step_is_reported_after_its_checkpoint(small_teacher: Path, trajectories: str, tmp_path: Path) -> None:
    seen: dict[float, list[str]] = {}
    job = initialize_job(small_teacher, trajectories, tmp_path / "run", "initialize.keep=1")

    def report(metrics: dict[str, float]) -> None:
        seen[metrics["step"]] = [path.name for path in (tmp_path / "run/checkpoints").glob("*")]

    carry_out(job, report=report)
    assert seen == {1: [], 2: ["step-000002"], 3: ["step-000002"], 4: ["step-000004"]}


# --- Interruptions ----------------------------------------------------------------------------------------------------


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C within the step number `step`, once."""
    shown = telemetry.Telemetry.step

    def interrupted(self: telemetry.Telemetry, at: int, metrics: dict[str, float]) -> None:
        shown(self, at, metrics)
        if at == step:
            monkeypatch.setattr(telemetry.Telemetry, "step", shown)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(telemetry.Telemetry, "step", interrupted)


def test_an_interrupted_run_ends_with_the_weights_of_the_undisturbed_one(
    initialized: Path, small_teacher: Path, trajectories: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    job = initialize_job(small_teacher, trajectories, run)
    interrupt_at(0, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        carry_out(job)
    assert json.loads((run / RUN).read_text())["status"] == "interrupted"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000001"]
    carry_out(job)
    assert same(weights_of(run, 4), weights_of(initialized, 4))
    rows = [[row["loss"] for row in read_curve(folder / "curve.jsonl")] for folder in (run, initialized)]
    assert rows[0] == rows[1]


def test_a_killed_run_ends_with_the_weights_of_the_undisturbed_one(
    initialized: Path, small_teacher: Path, trajectories: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the fourth step and in the writing of a checkpoint: it goes on from the one after the second step."""
    run = tmp_path / "run"
    job = initialize_job(small_teacher, trajectories, run)
    step, calls = OdeLearner.step, []

    def killed(self: OdeLearner, batch: Batch) -> dict[str, float]:
        calls.append(batch.step)
        if batch.step == 3:
            raise MemoryError("killed")
        return step(self, batch)

    monkeypatch.setattr(OdeLearner, "step", killed)
    with pytest.raises(MemoryError):
        carry_out(job)
    (run / "checkpoints/step-000003.partial/student").mkdir(parents=True)
    (run / "checkpoints/step-000004.partial/student").mkdir(parents=True)
    monkeypatch.setattr(OdeLearner, "step", step)
    carry_out(job)
    assert same(weights_of(run, 4), weights_of(initialized, 4))


def test_ctrl_c_on_the_command_line(
    small_teacher: Path, trajectories: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(1, monkeypatch)
    run = tmp_path / "run"
    sets = [argument for override in INITIALIZE for argument in ("--set", override)]
    arguments = ["--teacher", str(small_teacher), "--data", trajectories, "--run", str(run)]
    line = [*arguments, "--recipe", str(RECIPE), *sets]
    result = CliRunner().invoke(initialize.app, line)
    assert result.exit_code == 130
    assert "The same command goes on from there." in result.stderr
    assert (run / "checkpoints/step-000002/complete.json").is_file()
    assert not (run / "model").exists()

    result = CliRunner().invoke(initialize.app, line)
    assert result.exit_code == 0
    assert "passed its gate" in result.stdout
    assert [row["step"] for row in read_curve(run / "curve.jsonl")] == [0, 1, 2, 3]
    assert (run / "model/student.json").is_file()


def test_a_sheet_that_was_due_when_the_run_was_killed_is_drawn(
    small_teacher: Path, trajectories: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint stands, its sheet does not: without it the gate would judge by an older one."""
    run, drawn = tmp_path / "run", students.StudentSheets.__call__
    job = initialize_job(small_teacher, trajectories, run)

    def killed(self: students.StudentSheets, done: int) -> dict[str, float]:
        if done == 4:
            raise MemoryError("killed")
        return drawn(self, done)

    monkeypatch.setattr(students.StudentSheets, "__call__", killed)
    with pytest.raises(MemoryError):
        carry_out(job)
    assert (run / "checkpoints/step-000004/complete.json").is_file()
    monkeypatch.setattr(students.StudentSheets, "__call__", drawn)
    carry_out(job)
    assert sorted(path.name for path in (run / "sheets").iterdir()) == ["step-000000.png", "step-000004.png"]
    assert [row["step"] for row in read_curve(run / "scores.jsonl")] == [0, 4]
    record = json.loads((run / RUN).read_text())
    assert (record["status"], record["step"], record["causality"]) == ("finished", 4, "passed")


def test_another_recipe_is_refused_with_the_difference(
    initialized: Path, small_teacher: Path, trajectories: str
) -> None:
    other = initialize_job(small_teacher, trajectories, initialized, "initialize.batch=6")
    with pytest.raises(ValueError, match=r"made by another run; recipe\.batch is 4 there and 6 now"):
        carry_out(other)
    stage = initialize_job(small_teacher, trajectories, initialized, method="causal-teacher")
    with pytest.raises(ValueError, match="stage is initialize-ode there and initialize-causal-teacher now"):
        carry_out(stage)


def test_how_a_run_is_carried_out_may_change(initialized: Path, small_teacher: Path, trajectories: str) -> None:
    more = ("initialize.micro_batch=2", "initialize.keep=1", "initialize.activation_checkpointing=true")
    assert carry_out(initialize_job(small_teacher, trajectories, initialized, *more))


# --- What stops a run -------------------------------------------------------------------------------------------------


def test_what_is_not_finite_stops_with_the_step_and_the_samples(
    small_teacher: Path, trajectories: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = TorchEngine.backward

    def spoilt(self: TorchEngine, loss: Tensor) -> None:
        backward(self, loss * float("nan") if self.updates == 3 else loss)

    monkeypatch.setattr(TorchEngine, "backward", spoilt)
    run = tmp_path / "run"
    with pytest.raises(
        FloatingPointError, match=r"step 3 of initialize-ode: .*loss nan.*samples s\d\d, .*that of step 2"
    ):
        carry_out(initialize_job(small_teacher, trajectories, run))
    record = json.loads((run / RUN).read_text())
    assert record["status"] == "stopped"
    assert "samples s" in record["reason"]


def test_a_loss_that_runs_away_stops_the_run_before_it_is_saved(
    small_teacher: Path, trajectories: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "ENOUGH", 3)
    step = OdeLearner.step

    def running_away(self: OdeLearner, batch: Batch) -> dict[str, float]:
        metrics = step(self, batch)
        return metrics | {"loss": metrics["loss"] * (1000 if batch.step == 3 else 1)}

    monkeypatch.setattr(OdeLearner, "step", running_away)
    run = tmp_path / "run"
    more = ("initialize.diverged=50", "initialize.checkpoint_every=1")
    with pytest.raises(
        FloatingPointError, match=r"step 3 of initialize-ode: diverged: loss .*above 50 times.*; samples s\d\d, "
    ):
        carry_out(initialize_job(small_teacher, trajectories, run, *more))
    assert json.loads((run / RUN).read_text())["status"] == "stopped"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000002", "step-000003"]


def test_a_student_that_sees_the_future_is_not_trained(
    small_teacher: Path, trajectories: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regression, "student_mask", lambda student, frames: bidirectional(frames))
    run = tmp_path / "run"
    with pytest.raises(CausalityError):
        carry_out(initialize_job(small_teacher, trajectories, run))
    assert "sees the future" in json.loads((run / RUN).read_text())["reason"]
    assert not (run / "checkpoints").exists()


def test_trajectories_of_another_student_are_refused(small_teacher: Path, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", timesteps=(1000.0, 833.3, 0.0))
    with pytest.raises(
        ValueError, match=r"holds states at \[1000, 833.3, 0\], the recipe's student needs \[1000, 750, 0\]"
    ):
        carry_out(initialize_job(small_teacher, data, tmp_path / "run"))
    clips = write_dataset(tmp_path / "clips", kind="latents")
    with pytest.raises(ValueError, match="must hold trajectories, holds latents"):
        carry_out(initialize_job(small_teacher, clips, tmp_path / "run"))


# --- Samples ----------------------------------------------------------------------------------------------------------


def poison(index: int, value: Tensor) -> Tensor:
    if index == 5:
        value[1, 2, 3] = float("nan")
    return value


def deal(**changes: Any) -> Deal:
    return replace(Deal(batch=4, lanes=2, seed=0, poisoned="fatal"), **changes)


def opened(address: str, *, clean_only: bool = False) -> TrainingData:
    return TrainingData.open(address, StudentSettings(timesteps=(1000, 750), window=6), clean_only=clean_only)


def taken(batches: Any, steps: range) -> list[tuple[str, ...]]:
    return [batches.take(step).keys for step in steps]


def test_a_poisoned_sample_is_named_and_stops_the_run(small_teacher: Path, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", spoil=poison)
    run = tmp_path / "run"
    with pytest.raises(ValueError, match=r"shard-000001\.tar: s05: 16 of 4608 latent values are not finite"):
        carry_out(initialize_job(small_teacher, data, run, "initialize.steps=20", "initialize.sheet_every=20"))
    record = json.loads((run / RUN).read_text())
    assert record["status"] == "stopped"
    assert record["left_out"] == 1


def test_a_poisoned_sample_is_left_out_named_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    batches = ShardBatches(opened(write_dataset(tmp_path / "data", spoil=poison)), deal(poisoned="skip"))
    with caplog.at_level(logging.WARNING):
        seen = {key for keys in taken(batches, range(3)) for key in keys}
    assert seen == {f"s{index:02d}" for index in range(SAMPLES)} - {"s05"}
    assert batches.left_out == 1
    assert "s05" in caplog.text
    again = ShardBatches(opened(str(tmp_path / "data")), deal(poisoned="skip"))
    batches.save(tmp_path / "cursor")
    again.load(tmp_path / "cursor")
    assert again.left_out == 1


@pytest.mark.parametrize("poisoned", ["fatal", "skip"])
def test_a_torn_shard_is_named(tmp_path: Path, poisoned: Any, caplog: pytest.LogCaptureFixture) -> None:
    address = write_dataset(tmp_path / "data")
    shard = tmp_path / "data" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:9000])
    batches = ShardBatches(opened(address), deal(poisoned=poisoned))
    if poisoned == "fatal":
        with pytest.raises(ValueError, match=r"shard-000001\.tar"):
            taken(batches, range(3))
    else:
        taken(batches, range(3))
    assert batches.left_out > 0


@pytest.mark.parametrize("poisoned", ["fatal", "skip"])
def test_a_missing_shard_is_named_and_counted(tmp_path: Path, poisoned: Any, caplog: pytest.LogCaptureFixture) -> None:
    address = write_dataset(tmp_path / "data")
    (tmp_path / "data" / "shard-000001.tar").unlink()
    batches = ShardBatches(opened(address), deal(poisoned=poisoned))
    with caplog.at_level(logging.WARNING):
        if poisoned == "fatal":
            with pytest.raises((ValueError, FileNotFoundError), match=r"shard-000001\.tar"):
                taken(batches, range(3))
        else:
            seen = {key for keys in taken(batches, range(3)) for key in keys}
            assert seen == {f"s{index:02d}" for index in range(SAMPLES) if not 4 <= index < 8}
            assert "shard-000001.tar" in caplog.text
    assert batches.left_out > 0


def test_a_data_set_without_one_good_sample_is_refused(tmp_path: Path) -> None:
    data = opened(write_dataset(tmp_path / "data", spoil=lambda index, value: value * float("inf")))
    with pytest.raises(ValueError, match="not one sample can be used"):
        taken(ShardBatches(data, deal(poisoned="skip")), range(1))


def test_batches_are_the_same_on_any_number_of_processes(trajectories: str) -> None:
    data = opened(trajectories)
    one = ShardBatches(data, deal())
    two = [ShardBatches(data, deal(rank=rank, ranks=2)) for rank in range(2)]
    for step in range(7):  # over the end of an epoch
        whole, halves = one.take(step), [half.take(step) for half in two]
        assert whole.keys == halves[0].keys + halves[1].keys
        assert [half.positions for half in halves] == [range(2), range(2, 4)]
        assert torch.equal(whole.latents, torch.cat([half.latents for half in halves]))
    with pytest.raises(ValueError, match=r"lanes: must be a multiple of the number of processes \(3\), got 2"):
        deal(rank=0, ranks=3)
    with pytest.raises(ValueError, match="12 samples are too few for 16 lanes"):
        ShardBatches(data, deal(batch=16, lanes=16))


def test_a_saved_cursor_goes_on_with_the_next_sample(trajectories: str, tmp_path: Path) -> None:
    first = ShardBatches(opened(trajectories), deal())
    taken(first, range(4))
    first.save(tmp_path)
    expected = taken(first, range(4, 9))
    for rank in range(2):  # a cursor belongs to its lane: another number of processes may go on
        half = ShardBatches(opened(trajectories), deal(rank=rank, ranks=2))
        half.load(tmp_path)
        assert taken(half, range(4, 9)) == [keys[2 * rank : 2 * rank + 2] for keys in expected]


def test_ends_of_trajectories_are_clips(trajectories: str, tmp_path: Path) -> None:
    batch = ShardBatches(opened(trajectories, clean_only=True), deal()).take(0)
    assert batch.latents.shape == (4, *SHAPE)
    assert torch.equal(batch.latents[0], latents(int(batch.keys[0][1:]), 3)[-1])
    clips = ShardBatches(opened(write_dataset(tmp_path / "data", kind="latents"), clean_only=True), deal()).take(0)
    assert torch.equal(clips.latents[0], latents(int(clips.keys[0][1:]), 3)[-1])
    assert clips.prompts[0] == CAPTIONS[int(clips.keys[0][1:]) % len(CAPTIONS)]


def test_prompts_come_in_epochs_on_any_number_of_processes() -> None:
    prompts = [f"prompt {index}" for index in range(6)]
    one = PromptBatches(prompts, deal())
    two = [PromptBatches(prompts, deal(rank=rank, ranks=2)) for rank in range(2)]
    seen = [text for step in range(3) for text in one.take(step).prompts]
    assert sorted(seen) == sorted(2 * prompts)
    assert sorted(seen[:6]) == prompts
    assert seen[:6] != seen[6:]
    assert one.take(2).prompts == two[0].take(2).prompts + two[1].take(2).prompts


def test_prompts_come_from_files_captions_and_the_embedded_world(trajectories: str, tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE)
    (tmp_path / "prompts.txt").write_text("one\ntwo\n\none\n")
    assert training_prompts(str(tmp_path / "prompts.txt"), recipe) == ["one", "two"]
    assert training_prompts(trajectories, recipe) == CAPTIONS
    sprites = training_prompts("sprites:train", recipe)
    assert len(sprites) == len(set(sprites)) > 1000
    with pytest.raises(FileNotFoundError, match="no such prompts"):
        training_prompts("sprites:test", recipe)


# --- The other methods ------------------------------------------------------------------------------------------------


def test_a_causal_teacher_is_trained_on_clips(small_teacher: Path, trajectories: str, tmp_path: Path) -> None:
    job = initialize_job(small_teacher, trajectories, tmp_path / "run", method="causal-teacher")
    assert carry_out(job)
    assert StudentSettings.read(tmp_path / "run/model").origin["method"] == "initialize-causal-teacher"


@pytest.mark.parametrize("method", ["causvid", "self-forcing", "long"])
def test_distillation_goes_on_to_the_same_weights(
    method: str,
    initialized: Path,
    small_teacher: Path,
    trajectories: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two runs, one of them interrupted in its third step: all networks and live streams go on bit for bit."""
    model = initialized / "model"
    runs = [tmp_path / "whole", tmp_path / "parts"]
    jobs = [distill_job(method, model, small_teacher, trajectories, run) for run in runs]
    carry_out(jobs[0])
    interrupt_at(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        carry_out(jobs[1])
    carry_out(jobs[1])
    for network in ("student", "critic"):
        assert same(weights_of(runs[0], 4, network), weights_of(runs[1], 4, network))
    assert not same(weights_of(runs[0], 2), weights_of(runs[0], 4))  # the student had its turn in the third step
    record = json.loads((runs[0] / RUN).read_text())
    assert record["gate"]["checks"]["gradient_finite"]["passed"] is True
    assert record["gate"]["checks"]["score_kept"]["measured"] is not None
    origin = StudentSettings.read(runs[0] / "model").origin
    assert origin["method"] == f"distill-{method}"
    assert origin["parent"]["method"] == "initialize-ode"


def test_the_students_rate_falls_over_its_own_updates(
    initialized: Path, small_teacher: Path, trajectories: str, tmp_path: Path
) -> None:
    """Of five steps of the critic two find the student's turn: its cosine is through after these two."""
    falls = ["student.final_share=0.0", "student.warmup_steps=0", "critic.final_share=1.0", "critic.warmup_steps=0"]
    changes = [*(f"distill.causvid.{change}" for change in falls), "distill.causvid.steps=5"]
    carry_out(distill_job("causvid", initialized / "model", small_teacher, trajectories, tmp_path, *changes))
    rows = read_curve(tmp_path / "curve.jsonl")
    assert [row["student_learning_rate"] for row in rows if "student_learning_rate" in row] == pytest.approx(
        [1e-4, 0.5e-4]
    )
    assert {row["critic_learning_rate"] for row in rows} == {1e-4}


def test_a_student_of_another_kind_is_refused(
    initialized: Path, small_teacher: Path, trajectories: str, tmp_path: Path
) -> None:
    model = initialized / "model"
    job = distill_job("causvid", model, small_teacher, trajectories, tmp_path, "student.block=2", "student.sink=2")
    with pytest.raises(ValueError, match=r"student\.json: block is 3, the recipe's student has 2"):
        carry_out(job)


# --- Whose text encoder, whose weights --------------------------------------------------------------------------------


def with_other(model: Path, folder: Path, part: str) -> Path:
    """A copy of a model with another text encoder or VAE."""
    shutil.copytree(model, folder)
    weights = next((folder / part).glob("*.safetensors"))
    save_file({name: value * 1.5 for name, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    return folder


def test_a_student_reads_its_own_text_encoder_and_the_score_networks_read_the_teachers(
    initialized: Path, small_teacher: Path, trajectories: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    class Watched(distill.DmdLearner):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            seen["scores"], seen["student"] = self._contexts, self.source._contexts

    monkeypatch.setattr(distill, "DmdLearner", Watched)
    other = with_other(initialized / "model", tmp_path / "student", "text_encoder")
    jobs = {
        name: distill_job("causvid", student, small_teacher, trajectories, tmp_path / name, "distill.causvid.steps=1")
        for name, student in (("same", initialized / "model"), ("own", other))
    }
    rows = {}
    for name, job in jobs.items():
        carry_out(job)
        rows[name] = {whose: contexts([CAPTIONS[0]]).rows for whose, contexts in seen.items()}
        rows[name]["copy"] = students._encoder(tmp_path / name / "model", torch.float32)([CAPTIONS[0]]).rows
    assert torch.equal(rows["same"]["student"], rows["same"]["scores"])
    assert torch.equal(rows["own"]["scores"], rows["same"]["scores"])
    assert not torch.allclose(rows["own"]["student"], rows["own"]["scores"])
    for found in rows.values():
        assert torch.equal(found["copy"], found["student"]), "the exported student has the encoder it was trained with"


def test_a_student_of_another_vae_is_refused(
    initialized: Path, small_teacher: Path, trajectories: str, tmp_path: Path
) -> None:
    other = with_other(initialized / "model", tmp_path / "student", "vae")
    job = distill_job("causvid", other, small_teacher, trajectories, tmp_path / "run")
    with pytest.raises(ValueError, match=r"student/vae: is not the teacher's \(.*\); both must have one VAE"):
        carry_out(job)


def test_the_fake_score_may_begin_with_another_model_than_the_teacher(
    initialized: Path, small_teacher: Path, trajectories: str, tmp_path: Path
) -> None:
    job = distill_job("causvid", initialized / "model", small_teacher, trajectories, tmp_path / "run")
    small_one = replace(job, critic=str(initialized / "model"))
    for chosen, model in ((job, small_teacher), (small_one, initialized / "model")):
        _, critic = distill._engines(chosen, chosen.settings()[1], plain_engines("cpu"), students.load_network)
        _, stored = read_transformer(model)
        assert all(torch.equal(value, stored[name].float()) for name, value in critic.weights().items())
    carry_out(replace(small_one, recipe=resolved(small("distill.causvid", "distill.causvid.steps=1"))))
    written = json.loads((tmp_path / "run/recipe.json").read_text())
    assert written["critic"] == velocity_digest(initialized / "model") != written["teacher"]
    with pytest.raises(ValueError, match=r"critic is .* there and None now"):
        carry_out(replace(job, recipe=resolved(small("distill.causvid", "distill.causvid.steps=1"))))


def test_a_teacher_in_the_computing_precision_sees_the_same(small_teacher: Path) -> None:
    engine = TorchEngine(students.load_network(small_teacher), OptimizerSettings(1e-3, 10), precision=torch.bfloat16)
    latents, levels = torch.randn(2, 3, 16, 4, 4), torch.full((2, 3), 650.0)
    text = TextContext.fold([torch.randn(4, 128), torch.randn(2, 128)])
    found = []
    for teacher in (
        students.load_network(small_teacher),
        distill.hold_whole(students.load_network(small_teacher), engine),
    ):
        with torch.no_grad(), engine.autocast():
            found.append(teacher(latents, levels, text))
    assert torch.equal(*found)
    assert teacher.proj_out.weight.dtype == torch.bfloat16


# --- Gates ------------------------------------------------------------------------------------------------------------


def test_a_gate_sees_a_fallen_score_and_a_gradient_that_is_no_number(tmp_path: Path) -> None:
    def write(name: str, *rows: dict[str, float]) -> None:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    row = {"step": 0, "loss": 1.0, "dmd_gradient": 0.8, "dmd_non_finite": 0.0}
    write("curve.jsonl", row, {"step": 1, "loss": 1.0})
    write("scores.jsonl", {"step": 0, "score": 0.8}, {"step": 4, "score": 0.79})
    assert [check.passed for check in distill.gate(tmp_path)] == [True, True]
    write("scores.jsonl", {"step": 0, "score": 0.8}, {"step": 4, "score": 0.75})
    write("curve.jsonl", row, row | {"dmd_non_finite": 3.0})
    assert [check.passed for check in distill.gate(tmp_path)] == [False, False]


def test_a_gate_sees_whether_a_loss_still_falls(tmp_path: Path) -> None:
    def check(losses: list[float]) -> Any:
        rows = ({"step": step, "loss": loss} for step, loss in enumerate(losses))
        (tmp_path / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return initialize._flattened(tmp_path)

    assert not check([1 / (1 + step) for step in range(80)]).passed
    assert check([0.1 + 0.8**step for step in range(80)]).passed
    assert check([1 / (1 + step) for step in range(20)]).measured is None


# --- The command line -------------------------------------------------------------------------------------------------


def test_a_dry_run_says_the_memory(initialized: Path, small_teacher: Path, trajectories: str, tmp_path: Path) -> None:
    sets = [argument for override in COMMON for argument in ("--set", override)]
    common = [
        "--teacher",
        str(small_teacher),
        "--run",
        str(tmp_path / "run"),
        "--recipe",
        str(RECIPE),
        *sets,
        "--dry-run",
    ]
    result = CliRunner().invoke(initialize.app, [*common, "--data", trajectories])
    assert result.exit_code == 0
    assert "student: weights" in result.stdout
    student = ["--student", str(initialized / "model"), "--prompts", "sprites:train"]
    zero = ["--engine", "zero", "--workers", "4", "--set", "zero.stage=3"]
    result = CliRunner().invoke(distill.app, [*common, "--method", "self-forcing", *student])
    assert result.exit_code == 0
    for line in ("student: moments", "critic: gradients", "teacher: weights", "activations", "KV cache", "in all"):
        assert line in result.stdout
    assert "teacher: gradients" not in result.stdout
    assert "ZeRO" not in result.stdout
    result = CliRunner().invoke(distill.app, [*common, "--method", "self-forcing", *student, *zero])
    assert result.exit_code == 0
    assert "ZeRO 3 *" in result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("app", "arguments", "message"),
    [
        (distill.app, ["--method", "causvid"], "--data: --method causvid needs it"),
        (distill.app, ["--method", "long"], "--prompts: --method long needs it"),
        (distill.app, ["--method", "long", "--device", "tpu"], "--device: must be cpu or cuda, got 'tpu'"),
        (initialize.app, ["--data", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_named(app: Any, arguments: list[str], message: str, small_teacher: Path, tmp_path: Path) -> None:
    common = ["--teacher", str(small_teacher), "--run", str(tmp_path)]
    student = ["--student", str(small_teacher)] if app is distill.app else []
    result = CliRunner().invoke(app, [*common, *student, *arguments])
    assert isinstance(result.exception, ValueError | FileNotFoundError)
    assert message in str(result.exception)


# --- Many ranks -------------------------------------------------------------------------------------------------------


class Counting:
    """A learner without networks, for the loop alone; every rank makes the same calls."""

    def __init__(self, rank: int) -> None:
        self.rank, self.updates, self.value = rank, 0, 0.0

    def step(self, batch: Batch) -> dict[str, float]:
        self.updates += 1
        self.value += sum(map(len, batch.prompts))
        return {"loss": 1.0}

    def check_causality(self, batch: Batch) -> None:
        pass

    def save(self, folder: Path) -> None:
        (folder / f"rank-{self.rank}").write_text(f"{self.updates} {self.value}")

    def load(self, folder: Path) -> None:
        updates, value = (folder / f"rank-{self.rank}").read_text().split()
        self.updates, self.value = int(updates), float(value)


class Two(OneRank):
    """One of two ranks in threads."""

    size = 2

    def __init__(self, rank: int, barrier: threading.Barrier, board: dict[int, dict[str, float]]) -> None:
        self.rank, self._barrier, self._board = rank, barrier, board

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        self._board[self.rank] = values
        self._barrier.wait()
        found = {name: (self._board[0][name] + self._board[1][name]) / 2 for name in values}
        self._barrier.wait()
        return found

    def gather(self, text: str) -> list[str]:
        self._board[self.rank] = text
        self._barrier.wait()
        found = [self._board[0], self._board[1]]
        self._barrier.wait()
        return found

    def barrier(self) -> None:
        self._barrier.wait()


def on_two_ranks(work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Poisoned(Counting):
    def step(self, batch: Batch) -> dict[str, float]:
        if batch.step == 2:
            raise FloatingPointError("update 2: gradient norm nan")
        return super().step(batch)


def test_a_step_that_is_not_finite_names_the_samples_of_all_ranks(tmp_path: Path) -> None:
    barrier, board = threading.Barrier(2, timeout=60), {}
    stage = Stage("counting", tmp_path, InitializeRecipe(steps=6, batch=4, lanes=2))
    messages: dict[int, str] = {}

    def work(rank: int) -> None:
        batches = PromptBatches(["a", "bb", "ccc"], deal(rank=rank, ranks=2))
        with pytest.raises(FloatingPointError) as ending:
            run_stage(stage, Poisoned(rank), batches, Two(rank, barrier, board))
        messages[rank] = str(ending.value)

    on_two_ranks(work)
    keys = PromptBatches(["a", "bb", "ccc"], deal()).take(2).keys
    assert f"samples {', '.join(keys)}; there is no checkpoint yet" in messages[0]
    assert messages[0] == messages[1]
    record = json.loads((tmp_path / RUN).read_text())
    assert (record["status"], record["reason"]) == ("stopped", messages[0])


def test_what_stops_one_rank_alone_is_recorded(tmp_path: Path) -> None:
    """The first rank waits for it, and can write nothing."""
    barrier, board = threading.Barrier(2, timeout=60), {}
    stage = Stage("counting", tmp_path, InitializeRecipe(steps=6, batch=4, lanes=2))
    endings: dict[int, str] = {}

    class Torn(PromptBatches):
        def take(self, step: int) -> Batch:
            if step == 3:
                raise ShardError("shard-000001.tar", "s05", "truncated")
            return super().take(step)

    def work(rank: int) -> None:
        kind = Torn if rank else PromptBatches
        try:
            run_stage(stage, Counting(rank), kind(["a"], deal(rank=rank, ranks=2)), Two(rank, barrier, board))
        except (ShardError, threading.BrokenBarrierError) as error:
            endings[rank] = type(error).__name__
            barrier.abort()

    on_two_ranks(work)
    assert endings == {0: "BrokenBarrierError", 1: "ShardError"}
    record = json.loads((tmp_path / RUN).read_text())
    assert record["status"] == "stopped"
    assert "s05" in record["reason"]


def test_ranks_write_one_checkpoint_and_stop_together(tmp_path: Path) -> None:
    """Two ranks in threads; one of them is interrupted, both save and stop; then both go on."""
    barrier = threading.Barrier(2, timeout=60)
    board: dict[int, dict[str, float]] = {}
    stage = Stage("counting", tmp_path, InitializeRecipe(steps=6, batch=4, lanes=2, checkpoint_every=4, keep=1))
    signals = {rank: threading.Event() for rank in range(2)}
    prompts = ["a", "bb", "ccc"]

    def work(rank: int, stops_after: int, endings: dict[int, Any]) -> None:
        learner = Counting(rank)

        def report(metrics: dict[str, float]) -> None:
            if learner.updates == stops_after and rank == 1:
                signals[rank].set()

        try:
            batches = PromptBatches(prompts, deal(rank=rank, ranks=2))
            ranks = Two(rank, barrier, board)
            run_stage(stage, learner, batches, ranks, report=report, interrupted=signals[rank].is_set)
            endings[rank] = learner.value
        except KeyboardInterrupt:
            endings[rank] = "interrupted"

    def run(stops_after: int) -> dict[int, Any]:
        endings: dict[int, Any] = {}
        on_two_ranks(lambda rank: work(rank, stops_after, endings))
        return endings

    assert run(stops_after=2) == {0: "interrupted", 1: "interrupted"}  # heard in the step after the signal
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]
    signals[1].clear()
    endings = run(stops_after=-1)
    whole = PromptBatches(prompts, deal())
    assert endings[0] + endings[1] == sum(len(text) for step in range(6) for text in whole.take(step).prompts)
    files = sorted(path.name for path in (tmp_path / "checkpoints/step-000006").iterdir())
    assert files == ["complete.json", "rank-0", "rank-1"]


# --- On Ray Train with DeepSpeed ZeRO ---------------------------------------------------------------------------------


def on_ray(job: Any, module: str, steps: int, zero: ZeroRecipe) -> bool:
    return train_on_ray(module, job, zero, steps, Hosting(2, "cpu", 1.0, 0.0, None), Console(quiet=True))


def test_two_zero_workers_train_what_one_plain_process_trains(
    ray_session: Any, small_teacher: Path, trajectories: str, tmp_path: Path
) -> None:
    plain = initialize_job(small_teacher, trajectories, tmp_path / "plain")
    exact = partial(TorchEngine, device="cpu", precision=torch.float32)
    assert initialize.train(plain, lambda network, settings: exact(network, settings), OneRank())
    hosted = replace(plain, run=str(tmp_path / "zero"), engine="zero")
    assert on_ray(hosted, "initialize", 4, ZeroRecipe(stage=2, precision="fp32"))
    losses = [[row["loss"] for row in read_curve(tmp_path / run / "curve.jsonl")] for run in ("plain", "zero")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(losses[1]) == 4
    states = [read_transformer(tmp_path / run / "model")[1] for run in ("plain", "zero")]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=2e-2, atol=1e-3)  # stored in bfloat16
    with pytest.raises(ValueError, match="engine is zero there and plain now"):
        carry_out(replace(hosted, engine="plain", recipe=resolved([*INITIALIZE, "initialize.steps=5"])))


@pytest.mark.slow
def test_distillation_runs_with_everything_sharded(
    ray_session: Any, small_teacher: Path, initialized: Path, trajectories: str, tmp_path: Path
) -> None:
    recipe = resolved(small("distill.causvid", "distill.causvid.critic_updates=1"))
    student, run = initialized / "model", tmp_path / "run"
    job = distill.DistillJob(recipe, "causvid", str(student), str(small_teacher), trajectories, None, str(run), "zero")
    assert on_ray(job, "distill", 4, ZeroRecipe(stage=3, precision="autocast"))
    rows = read_curve(run / "curve.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all("dmd_gradient" in row for row in rows[1:])
    assert all({"score", "real_score", "fake_score"} <= row.keys() for row in read_curve(run / "scores.jsonl"))
    assert StudentSettings.read(run / "model").origin["method"] == "distill-causvid"
