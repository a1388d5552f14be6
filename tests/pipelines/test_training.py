"""Stages of training on small models: over-all runs, interruptions, refusals, poisoned samples, what is left behind."""

import json
import logging
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from reelway.actors.engine import OneRank, TorchEngine
from reelway.actors.learning import regression
from reelway.actors.learning.batch import Batch
from reelway.actors.learning.causality import CausalityError
from reelway.actors.learning.regression import OdeLearner
from reelway.cluster.dataset import DatasetInfo, TensorSpec, create_dataset
from reelway.cluster.manifest import merge_manifest, plan
from reelway.cluster.shards import write_shard
from reelway.cluster.storage import Storage
from reelway.kernels.causal.masks import bidirectional
from reelway.kernels.causal.student import StudentSettings
from reelway.kernels.wan.config import CONFIGS
from reelway.kernels.wan.context import TextContext
from reelway.kernels.wan.transformer import VideoTransformer
from reelway.kernels.wan.weights import read_transformer
from reelway.pipelines import distill, initialize, students, telemetry
from reelway.pipelines.commands import plain_engines
from reelway.pipelines.hosting import Hosting, train_on_ray
from reelway.pipelines.memory import TrainedClips
from reelway.pipelines.recipe import InitializeRecipe, ZeroRecipe, load_recipe
from reelway.pipelines.samples import Deal, PromptBatches, ShardBatches, TrainingData, training_prompts
from reelway.pipelines.telemetry import read_curve
from reelway.pipelines.training import RUN, Stage, run_stage

RECIPE = Path(__file__).parents[2] / "configs" / "tiny.yaml"
SHAPE = (6, 16, 4, 4)  # latent frames, channels, height, width: 21 frames of 32x32
SAMPLES = 12
CAPTIONS = [
    f"a {color} {shape} drifts left" for color in ("red", "blue", "green") for shape in ("star", "disk", "ring")
]
COMMON = [
    "clip.height=32",
    "clip.width=32",
    "clip.frames=21",
    "student.timesteps=[1000, 500]",
    "student.window=6",
]


def small(section: str, *more: str) -> list[str]:
    values = {"steps": 4, "batch": 4, "lanes": 2, "checkpoint_every": 2, "sheet_every": 4}
    return [*COMMON, *(f"{section}.{name}={value}" for name, value in values.items()), *more]


INITIALIZE = small("initialize", "initialize.optimizer.learning_rate=1e-3", "initialize.optimizer.ema_decay=0.5")


def resolved(overrides: list[str]) -> dict[str, Any]:
    return load_recipe(RECIPE, overrides).model_dump(mode="json")


def latents(index: int, states: int) -> Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(states, *SHAPE, generator=generator).to(torch.float16)


def write_dataset(
    folder: Path,
    kind: str = "trajectories",
    samples: int = SAMPLES,
    spoil: Callable[[int, Tensor], Tensor] = lambda index, value: value,
    timesteps: tuple[float, ...] = (1000.0, 750.0, 0.0),
) -> str:
    """A data set as `reelway trajectories` or `reelway ingest` leaves it; the tiny recipe's shift warps 500 to 750."""
    states = (3,) if kind == "trajectories" else ()
    tensors, text = ("trajectory.safetensors", "prompt.txt") if states else ("latents.safetensors", "caption.txt")
    spec = TensorSpec(shape=(*states, *SHAPE), dtype="float16")
    made_by = {"timesteps": list(timesteps)} if states else {}
    info = DatasetInfo(kind=kind, fields={tensors: {"latents": spec}, text: {}}, made_by=made_by, fingerprint="set")
    storage = Storage.open(folder)
    create_dataset(storage, info)
    keys = [f"s{index:02d}" for index in range(samples)]
    for shard in plan(keys, 4, "set"):
        values = ((key, spoil(int(key[1:]), latents(int(key[1:]), 3))) for key in shard.keys)
        samples_of = (
            (key, {tensors: {"latents": value if states else value[-1]}, text: CAPTIONS[int(key[1:]) % len(CAPTIONS)]})
            for key, value in values
        )
        write_shard(storage, shard, samples_of)
    merge_manifest(storage)
    return str(folder)


@pytest.fixture(autouse=True, scope="module")
def _small_sheets() -> Iterator[None]:
    before, students.SAMPLES = students.SAMPLES, 2
    yield
    students.SAMPLES = before


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "trajectories")


def initialize_job(teacher: Path, data: str, run: Path, *more: str, method: str = "ode") -> initialize.InitializeJob:
    recipe = resolved([*INITIALIZE, *small("causal_teacher"), *more])
    return initialize.InitializeJob(recipe, method, str(teacher), str(teacher), data, str(run))


def carry_out(job: Any, **more: Any) -> bool:
    module = distill if isinstance(job, distill.DistillJob) else initialize
    return module.train(job, plain_engines("cpu"), OneRank(), **more)


def weights_of(run: Path, step: int, network: str = "student") -> dict[str, Tensor]:
    folder = run / "checkpoints" / f"step-{step:06d}" / network
    return torch.load(folder / "engine.pt", weights_only=True)["network"]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


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


def test_every_step_is_reported_with_its_checkpoint(small_teacher: Path, trajectories: str, tmp_path: Path) -> None:
    seen: list[tuple[float, Path | None]] = []
    job = initialize_job(small_teacher, trajectories, tmp_path / "run", "initialize.keep=1")
    carry_out(job, report=lambda metrics, saved: seen.append((metrics["loss"], saved)))
    assert [saved.name if saved else None for _, saved in seen] == [None, "step-000002", None, "step-000004"]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000004"]


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
    sets = [argument for override in INITIALIZE for argument in ("--set", override)]
    arguments = ["--teacher", str(small_teacher), "--data", trajectories, "--run", str(tmp_path / "run")]
    result = CliRunner().invoke(initialize.app, [*arguments, "--recipe", str(RECIPE), *sets])
    assert result.exit_code == 130
    assert "The same command goes on from there." in result.stderr
    assert (tmp_path / "run/checkpoints/step-000002/complete.json").is_file()


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


def distill_job(method: str, student: Path, teacher: Path, data: str, run: Path, *more: str) -> distill.DistillJob:
    section = f"distill.{method.replace('-', '_')}"
    changes = [f"{section}.critic_updates=2", f"{section}.student.learning_rate=1e-4", "distill.long.rollout_frames=12"]
    recipe = resolved([*small(section, *changes), *more])
    prompts = None if method == "causvid" else "sprites:train"
    return distill.DistillJob(
        recipe, method, str(student), str(teacher), data if method == "causvid" else None, prompts, str(run)
    )


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


def test_a_student_of_another_kind_is_refused(
    initialized: Path, small_teacher: Path, trajectories: str, tmp_path: Path
) -> None:
    model = initialized / "model"
    job = distill_job("causvid", model, small_teacher, trajectories, tmp_path, "student.block=2", "student.sink=2")
    with pytest.raises(ValueError, match=r"student\.json: block is 3, the recipe's student has 2"):
        carry_out(job)


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
    result = CliRunner().invoke(distill.app, [*common, "--method", "self-forcing", *student])
    assert result.exit_code == 0
    for line in ("student: optimiser", "critic: gradients", "teacher: weights", "activations", "KV cache", "in all"):
        assert line in result.stdout
    assert "teacher: gradients" not in result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("layers", [1, 3])
def test_estimated_activations_are_those_that_autograd_keeps(layers: int) -> None:
    """Within a fifth, on the tiny model, weights aside."""
    config = replace(CONFIGS["tiny"], num_layers=layers)
    network = VideoTransformer(config)
    text = TextContext.fold([torch.randn(4, config.text_dim)])
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = network(torch.randn(2, 6, 16, 8, 8), torch.full((2, 6), 500.0), text)
    clips = TrainedClips(2, 6, config.tokens_per_frame(8, 8), checkpointing=False)
    assert out.requires_grad
    assert clips.activations(config, torch.float32) == pytest.approx(sum(kept.values()), rel=0.2)


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

    def barrier(self) -> None:
        self._barrier.wait()


def test_ranks_write_one_checkpoint_and_stop_together(tmp_path: Path) -> None:
    """Two ranks in threads; one of them is interrupted, both save and stop; then both go on."""
    barrier = threading.Barrier(2, timeout=60)
    board: dict[int, dict[str, float]] = {}
    stage = Stage("counting", tmp_path, InitializeRecipe(steps=6, batch=4, lanes=2, checkpoint_every=4, keep=1))
    signals = {rank: threading.Event() for rank in range(2)}
    prompts = ["a", "bb", "ccc"]

    def work(rank: int, stops_after: int, endings: dict[int, Any]) -> None:
        learner = Counting(rank)

        def report(metrics: dict[str, float], saved: Path | None) -> None:
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
        threads = [threading.Thread(target=work, args=(rank, stops_after, endings)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
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
    assert StudentSettings.read(run / "model").origin["method"] == "distill-causvid"
