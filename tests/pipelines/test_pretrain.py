"""`reelway pretrain` on a tiny world: every stage, an interruption, a second run, and what diffusers makes of it."""

import json
import signal
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from typer.testing import CliRunner

from reelway.pipelines import pretrain as job
from reelway.pipelines.pretraining import loop
from reelway.pipelines.pretraining.loop import read_curve
from reelway.pipelines.recipe import PretrainRecipe, load_recipe

RECIPE = Path(__file__).parents[2] / "configs" / "tiny.yaml"
SMALL = [
    "pretrain.world.size=16",
    "pretrain.world.frames=9",
    "pretrain.vae.network.base_dim=8",
    "pretrain.vae.phases=[{steps: 4, batch: 2, clip_frames: 5}, {steps: 2, batch: 1, clip_frames: 9}]",
    "pretrain.teacher.clips=6",
    "pretrain.teacher.steps=6",
    "pretrain.teacher.batch=4",
]


def recipe(*more: str) -> PretrainRecipe:
    return load_recipe(RECIPE, [*SMALL, *more]).pretrain


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain") / "run"
    job.pretrain(recipe(), folder, stages=set(job.Stage))
    return folder


def test_diffusers_pipeline_runs_the_model(run: Path) -> None:
    pipeline = WanPipeline.from_pretrained(run / "model", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline("a red star", height=16, width=16, num_frames=9, num_inference_steps=2, output_type="np").frames
    assert frames.shape == (1, 9, 16, 16, 3)


def test_curves_have_every_step(run: Path) -> None:
    for stage, steps in (("vae-1", 4), ("vae-2", 2), ("teacher", 6)):
        rows = read_curve(run / stage / "curve.jsonl")
        assert [row["step"] for row in rows] == list(range(steps))
        assert all(row["gradient_norm"] > 0 for row in rows)


def test_a_second_run_does_nothing(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("checkpoint.pt")}
    job.pretrain(recipe(), run, stages=set(job.Stage))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("checkpoint.pt")} == before


def test_interrupted_run_ends_with_the_weights_of_the_undisturbed_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curve, calls = loop.Curve.append, []

    def interrupted(self: loop.Curve, row: dict[str, float]) -> None:
        curve(self, row)
        calls.append(row["step"])
        if len(calls) in (3, 7):  # within the VAE's training, then within the teacher's
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop.Curve, "append", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            job.pretrain(recipe(), tmp_path / "run", stages=set(job.Stage))
    job.pretrain(recipe(), tmp_path / "run", stages=set(job.Stage))
    for stage in ("vae-1", "vae-2", "teacher"):
        saved, expected = (
            torch.load(folder / stage / "checkpoint.pt", weights_only=True)["learner"]["network"]
            for folder in (tmp_path / "run", run)
        )
        assert all(torch.equal(saved[name], expected[name]) for name in expected)


def test_another_recipe_is_refused_with_the_difference(run: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher\.batch is 4 there and 3 now"):
        job.pretrain(recipe("pretrain.teacher.batch=3"), run, stages=set(job.Stage))


def test_a_given_vae_is_not_trained_again(run: Path, tmp_path: Path) -> None:
    small = [argument for override in SMALL for argument in ("--set", override)]
    arguments = ["--run", str(tmp_path), "--vae", str(run / "model" / "vae"), "--stage", "vae", *small]
    assert CliRunner().invoke(job.app, ["--recipe", str(RECIPE), *arguments]).exit_code == 0
    weights = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "model/vae" / weights).read_bytes() == (run / "model/vae" / weights).read_bytes()
    assert not (tmp_path / "vae-1").exists()


def test_resolved_recipe_is_beside_the_result(run: Path) -> None:
    written = json.loads((run / "recipe.json").read_text())
    assert written["pretrain"] == recipe().model_dump(mode="json")
    assert len(written["fingerprint"]) == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "none.yaml"], "no such file: none.yaml"),
        (
            ["--recipe", str(RECIPE), "--set", "pretrain.teacher.batch=0"],
            "pretrain.teacher.batch: Input should be",
        ),
        (["--recipe", str(RECIPE), "--set", "pretrain.teacher.batches=2"], "Extra inputs are not permitted"),
        (["--recipe", str(RECIPE), "--set", "teacher"], "expected a.b=value, got 'teacher'"),
        (["--recipe", str(RECIPE), "--device", "cuda"], "no CUDA device here"),
        (["--recipe", str(RECIPE), "--vae", "none"], "--vae none: no config.json"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(job.app, [*arguments, "--run", str(tmp_path)])
    assert isinstance(result.exception, ValueError | FileNotFoundError)
    assert message in str(result.exception)
