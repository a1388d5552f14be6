"""`reelway pretrain` on a tiny world: every stage, an interruption, a second run, and what diffusers makes of it."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanPipeline
from PIL import Image
from typer.testing import CliRunner

from reelway.actors.encoder import vae_digest
from reelway.actors.teacher import Teacher
from reelway.cluster.dataset import DatasetInfo, TensorSpec, create_dataset
from reelway.cluster.manifest import merge_manifest, plan
from reelway.cluster.shards import write_shard
from reelway.cluster.storage import Storage
from reelway.kernels.sprites.captions import VOCABULARY
from reelway.kernels.wan.text import TextEncoder
from reelway.pipelines import pretrain as job
from reelway.pipelines.pretraining import loop, teacher
from reelway.pipelines.pretraining.card import write_card
from reelway.pipelines.pretraining.latents import _renderers, load_latents, make_latents
from reelway.pipelines.pretraining.loop import read_curve
from reelway.pipelines.pretraining.text import train_text
from reelway.pipelines.recipe import FineTuneRecipe, PretrainRecipe, load_recipe

RECIPE = Path(__file__).parents[2] / "configs" / "tiny.yaml"
SMALL = [
    "pretrain.world.size=16",
    "pretrain.world.frames=9",
    "pretrain.vae.network.base_dim=8",
    "pretrain.vae.phases=[{steps: 4, batch: 2, clip_frames: 5}, {steps: 2, batch: 1, clip_frames: 9}]",
    "pretrain.text={steps: 3, batch: 4}",
    "pretrain.teacher.clips={3: 6, 1: 10}",
    "pretrain.teacher.phases=[{steps: 4, turns: [{frames: 3, clips: 4}]}, "
    "{steps: 3, turns: [{frames: 3, clips: 2}, {frames: 1, clips: 5}]}]",
]


def recipe(*more: str) -> PretrainRecipe:
    return load_recipe(RECIPE, [*SMALL, *more]).pretrain


def wait_until(true: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    return true()


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
    for stage, steps in (("vae-1", 4), ("vae-2", 2), ("text", 3), ("teacher-1", 4), ("teacher-2", 3)):
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
        if len(calls) in (3, 8, 11):  # within the VAE's training, the text encoder's, the teacher's
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop.Curve, "append", interrupted)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            job.pretrain(recipe(), tmp_path / "run", stages=set(job.Stage))
    job.pretrain(recipe(), tmp_path / "run", stages=set(job.Stage))
    for stage in ("vae-1", "vae-2", "text", "teacher-1", "teacher-2"):
        saved, expected = (
            torch.load(folder / stage / "checkpoint.pt", weights_only=True)["learner"]["network"]
            for folder in (tmp_path / "run", run)
        )
        assert all(torch.equal(saved[name], expected[name]) for name in expected)


@pytest.mark.parametrize("ahead", [False, True])
def test_the_next_batch_is_made_meanwhile_but_not_beside_a_report(ahead: bool, tmp_path: Path) -> None:
    made, trained, steps = [], [], 9

    class Recorder:
        def step(self, batch: int) -> dict[str, float]:
            trained.append(batch)
            if ahead and batch not in (3, 7, 8):  # before the reports, and the last
                assert wait_until(lambda: made[-1] == batch + 1, 20)
            assert made[-1] == batch + (ahead and batch not in (3, 7, 8))
            return {"loss": 0.0}

        def state_dict(self) -> dict[str, int]:
            return {}

    def batch_at(step: int) -> int:
        made.append(step)
        return step

    reports: list[int] = []
    loop.train("test", tmp_path, Recorder(), batch_at, steps, every=(4, reports.append), ahead=ahead)
    assert trained == made == list(range(steps))
    assert reports == [4, 8, 9]


def test_clips_for_a_gpu_are_rendered_by_processes_as_here(run: Path) -> None:
    with _renderers(recipe(), "cpu") as here, _renderers(recipe(), "cuda") as elsewhere:
        pairs = zip(*(render(3, range(2, 8), (4, 8)) for render in (here, elsewhere)), strict=True)
        for ours, theirs in pairs:
            assert ours.caption == theirs.caption
            assert (ours.frames == theirs.frames).all()
            assert (ours.maps == theirs.maps).all()


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(run: Path, tmp_path: Path) -> None:
    for name in ("recipe.json", "model", "text", "latents"):
        source = run / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, tmp_path / name)
    job.pretrain(recipe(), tmp_path, stages={job.Stage.teacher}, compiled=True)
    compiled, eager = (read_curve(folder / "teacher-2" / "curve.jsonl") for folder in (tmp_path, run))
    for ours, theirs in zip(compiled, eager, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["map_loss"] == pytest.approx(theirs["map_loss"], rel=1e-3)


def test_another_recipe_is_refused_with_the_difference(run: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher\.shift is 3.0 there and 2.0 now"):
        job.pretrain(recipe("pretrain.teacher.shift=2.0"), run, stages=set(job.Stage))


def test_a_given_vae_is_not_trained_again(run: Path, tmp_path: Path) -> None:
    small = [argument for override in SMALL for argument in ("--set", override)]
    arguments = ["--run", str(tmp_path), "--vae", str(run / "model" / "vae"), "--stage", "vae", *small]
    assert CliRunner().invoke(job.app, ["--recipe", str(RECIPE), *arguments]).exit_code == 0
    weights = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "model/vae" / weights).read_bytes() == (run / "model/vae" / weights).read_bytes()
    assert not (tmp_path / "vae-1").exists()


def test_clips_of_each_length_come_in_turn_and_none_is_left_out() -> None:
    chosen = recipe().teacher.phases[1]
    portions = [teacher._portion(chosen.turns, step) for step in range(5)]
    assert [turn.frames for turn, _ in portions] == [3, 1, 3, 1, 3]
    assert [first for _, first in portions] == [0, 0, 2, 5, 4]
    rows = [
        teacher._rows(count, first, turn.clips, 0)
        for count, (turn, first) in zip((6, 10, 6, 10, 6), portions, strict=True)
    ]
    assert sorted(torch.cat(rows[::2]).tolist()) == list(range(6))
    assert sorted(torch.cat(rows[1::2]).tolist()) == list(range(10))


def test_more_clips_of_a_length_are_made_where_the_last_part_was_short(tmp_path: Path, run: Path) -> None:
    shutil.copytree(run / "model" / "vae", tmp_path / "model" / "vae")
    few, more = (recipe(f"pretrain.teacher.clips={{1: {count}, 3: 4}}") for count in (6, 9))
    make_latents(few, tmp_path, "cpu")
    first = load_latents(few, tmp_path, [1])[1]
    make_latents(more, tmp_path, "cpu")
    second = load_latents(more, tmp_path, [1])[1]
    assert (len(first.captions), len(second.captions)) == (6, 9)
    assert second.captions[:6] == first.captions
    # bfloat16, and encoded in batches of another size
    torch.testing.assert_close(second.latents[:6], first.latents, rtol=0, atol=0.05)


def test_a_turn_trains_on_timesteps_of_its_own_law_and_shift(run: Path) -> None:
    """Stratified uniform u goes to 1000 s u / (1 + (s - 1) u), so a batch's median is that of one half.

    Of a logit-normal batch of ten, at most three lie outside noise levels 0.24 to 0.76; of a uniform one, four or more.
    """
    ten = "frames: 1, clips: 10"
    turns = f"[{{{ten}, shift: 1.0}}, {{{ten}}}, {{{ten}, shift: 1.0, law: logit-normal}}]"
    chosen = recipe(f"pretrain.teacher.phases=[{{steps: 1, turns: {turns}}}]")
    reader = SimpleNamespace(tokenize=lambda texts: (torch.zeros(len(texts), 1), torch.ones(len(texts), 1)))
    data = load_latents(chosen, run, [1])
    batches = [teacher.batch_at(chosen, 0, reader, data, step).timesteps for step in range(3)]
    assert [levels.median() for levels in batches[:2]] == pytest.approx([500, 750], abs=80)
    outside = [int(((levels < 240) | (levels > 760)).sum()) for levels in batches[::2]]
    assert outside[0] >= 4
    assert outside[1] <= 3


def test_a_turn_without_clips_of_its_length_is_refused() -> None:
    with pytest.raises(ValueError, match="a turn of 2 latent frames needs clips of that length"):
        recipe("pretrain.teacher.phases=[{steps: 1, turns: [{frames: 2, clips: 1}]}]")


def test_the_text_encoder_learns_to_tell_what_captions_say(tmp_path: Path) -> None:
    """Chance is about one in five answers."""
    small = recipe("pretrain.text={steps: 50, batch: 32, optimizer: {learning_rate: 4.0e-3, ema_decay: 0.9}}")
    train_text(small, tmp_path, "cpu")
    rows = read_curve(tmp_path / "text" / "curve.jsonl")
    assert rows[-1]["accuracy"] > 0.6 > 0.4 > rows[0]["accuracy"]
    assert "heldout" in (tmp_path / "text" / "accuracy.txt").read_text()


def test_maps_teach_the_middle_block_and_are_left_out_of_the_model(run: Path) -> None:
    rows = read_curve(run / "teacher-2" / "curve.jsonl")
    assert all(row["map_loss"] > 0 for row in rows)
    names = Teacher.from_pretrained(run / "model").transformer.state_dict()
    assert not any("map_reader" in name for name in names)


def test_without_maps_only_the_velocity_is_trained(tmp_path: Path, run: Path) -> None:
    plain = recipe(
        "pretrain.teacher.map_weight=0", "pretrain.teacher.phases=[{steps: 1, turns: [{frames: 3, clips: 4}]}]"
    )
    shutil.copytree(run / "model" / "vae", tmp_path / "model" / "vae")
    job.pretrain(plain, tmp_path, stages=set(job.Stage))
    (row,) = read_curve(tmp_path / "teacher-1" / "curve.jsonl")
    assert "map_loss" not in row
    first = read_curve(run / "teacher-1" / "curve.jsonl")[0]
    assert row["loss"] == pytest.approx(first["loss"], rel=1e-5)  # the same weights, clips and noise


def test_a_teacher_begins_with_given_weights(tmp_path: Path, run: Path) -> None:
    """At a rate of next to nothing the teacher that comes out is the one that went in; another one is refused."""
    optimizer = "{learning_rate: 1.0e-30, weight_decay: 0.0}"
    turns = "[{frames: 1, clips: 2}]"
    still = recipe(f"pretrain.teacher.phases=[{{steps: 1, turns: {turns}, optimizer: {optimizer}}}]")
    shutil.copytree(run / "model" / "vae", tmp_path / "model" / "vae")
    job.pretrain(still, tmp_path, stages=set(job.Stage), init=run / "model")
    before, after = (Teacher.from_pretrained(path / "model").transformer for path in (run, tmp_path))
    for name, value in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], value, rtol=0, atol=1e-20)
    with pytest.raises(ValueError, match=r"made with another recipe; init is \w{64} there and None now"):
        job.pretrain(still, tmp_path, stages=set(job.Stage))
    write_card(tmp_path, count=1, pictures=1, steps=2, guidance=1.0)
    assert "begun with the weights of another teacher" in (tmp_path / "model" / "README.md").read_text()


def test_a_teacher_of_another_size_is_refused_before_anything_is_made(tmp_path: Path, small_teacher: Path) -> None:
    given = {"init": small_teacher, "vae": small_teacher / "vae"}
    with pytest.raises(ValueError, match=r"--init .*: transformer/config\.json: differs from the recipe's model, tiny"):
        job.pretrain(recipe(), tmp_path / "run", stages=set(job.Stage), **given)
    assert not (tmp_path / "run").exists()


def test_card_tells_how_the_model_was_made_and_what_it_scores(run: Path) -> None:
    write_card(run, count=2, pictures=1, steps=2, guidance=1.0)
    text = (run / "model" / "README.md").read_text()
    scores = json.loads((run / "model" / "card" / "scores.json").read_text())["scores"]
    assert f"| total | {scores['rendering']['total']:.3f} |" in text
    assert scores["rendering"]["total"] > 0.95 > scores["teacher"]["total"]
    assert "3 updates on clips of so many latent frames: 2 of 3, 5 of 1 in turn" in text
    assert "by length in latent frames: 6 of 3, 10 of 1" in text
    for picture in ("loss.png", "samples.png"):
        assert f"(card/{picture})" in text
        assert Image.open(run / "model" / "card" / picture).width > 300


def test_card_of_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a finished run"):
        write_card(tmp_path, count=1, pictures=1, steps=1, guidance=1.0)


def test_resolved_recipe_is_beside_the_result(run: Path) -> None:
    written = json.loads((run / "recipe.json").read_text())
    assert written["pretrain"] == recipe().model_dump(mode="json")
    assert len(written["fingerprint"]) == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "none.yaml"], "no such file: none.yaml"),
        (
            ["--recipe", str(RECIPE), "--set", "pretrain.teacher.clips={3: 0}"],
            "pretrain.teacher.clips.3: Input should be",
        ),
        (["--recipe", str(RECIPE), "--set", "pretrain.teacher.batches=2"], "Extra inputs are not permitted"),
        (["--recipe", str(RECIPE), "--set", "teacher"], "expected a.b=value, got 'teacher'"),
        (["--recipe", str(RECIPE), "--device", "cuda"], "no CUDA device here"),
        (["--recipe", str(RECIPE), "--device", "tpu"], "--device: must be cpu or cuda, got 'tpu'"),
        (["--recipe", str(RECIPE), "--vae", "none"], "--vae none: no config.json"),
        (["--recipe", str(RECIPE), "--init", "none"], "none/transformer/config.json: no such file"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(job.app, [*arguments, "--run", str(tmp_path)])
    assert isinstance(result.exception, ValueError | FileNotFoundError)
    assert message in str(result.exception)


# --- Fine-tuning -------------------------------------------------------------------------------------------

CLIPS, CLIP = 5, (3, 16, 4, 4)
TUNING = FineTuneRecipe(steps=4, batch=2)  # its third batch goes over the end of the first epoch


def _latent_set(folder: Path, shape: tuple[int, ...] = CLIP, vae: str | None = None) -> Storage:
    info = DatasetInfo(
        kind="latents",
        fields={"latents.safetensors": {"latents": TensorSpec(shape=shape, dtype="float16")}, "caption.txt": {}},
        made_by={"command": "test"} | ({} if vae is None else {"vae": vae}),
        fingerprint=f"clips of {shape}",
    )
    storage = Storage.open(folder)
    create_dataset(storage, info)
    generator = torch.Generator().manual_seed(5)
    clips = {f"k{i}": torch.randn(shape, generator=generator).half() for i in range(CLIPS)}
    for shard in plan(list(clips), 2, info.fingerprint):
        words = {key: f"a {VOCABULARY[int(key[1])]} star" for key in shard.keys}
        samples = ((k, {"latents.safetensors": {"latents": clips[k]}, "caption.txt": words[k]}) for k in shard.keys)
        write_shard(storage, shard, samples)
    merge_manifest(storage)
    return storage


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return _latent_set(tmp_path_factory.mktemp("latents") / "set")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, latents: Storage, small_teacher: Path) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "run"
    job.tune(TUNING, folder, latents, small_teacher)
    return folder


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_tuning_moves_the_transformer_and_nothing_else(tuned: Path, small_teacher: Path) -> None:
    before, after = _files(small_teacher), _files(tuned / "model")
    assert before.keys() == after.keys()
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert {name for name in before if before[name] != after[name]} - {"transformer/config.json"} == {weights}
    assert Teacher.from_pretrained(tuned / "model").shift == Teacher.from_pretrained(small_teacher).shift
    assert [row["step"] for row in read_curve(tuned / "teacher" / "curve.jsonl")] == [0, 1, 2, 3]


def test_tuning_begins_with_the_given_weights(tmp_path: Path, latents: Storage, small_teacher: Path) -> None:
    """At a rate of next to nothing the model that comes out is the model that went in."""
    still = FineTuneRecipe(steps=1, batch=2, optimizer={"learning_rate": 1e-30, "weight_decay": 0.0})
    job.tune(still, tmp_path / "run", latents, small_teacher)
    before, after = (Teacher.from_pretrained(path).transformer for path in (small_teacher, tmp_path / "run" / "model"))
    for name, value in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], value, rtol=0, atol=1e-20)


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_tuning_goes_on_with_the_data_it_had_not_seen(
    tuned: Path,
    tmp_path: Path,
    latents: Storage,
    small_teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_after: int,
) -> None:
    append = loop.Curve.append

    def interrupted(self: loop.Curve, row: dict[str, float]) -> None:
        append(self, row)
        if row["step"] + 1 == stop_after:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop.Curve, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        job.tune(TUNING, tmp_path / "run", latents, small_teacher)
    monkeypatch.undo()
    job.tune(TUNING, tmp_path / "run", latents, small_teacher)
    found, expected = (
        torch.load(folder / "teacher" / "checkpoint.pt", weights_only=True)["learner"]
        for folder in (tmp_path / "run", tuned)
    )
    assert found["clips"] == expected["clips"]
    assert found["clips"]["reader"]["epoch"] == 1
    weights = expected["tuner"]["network"]
    assert all(torch.equal(found["tuner"]["network"][name], value) for name, value in weights.items())
    assert _files(tmp_path / "run" / "model") == _files(tuned / "model")


def test_tuning_by_the_command_line(tuned: Path, tmp_path: Path, latents: Storage, small_teacher: Path) -> None:
    small = ["--set", "finetune.steps=4", "--set", "finetune.batch=2"]
    arguments = ["--latents", latents.uri, "--init", str(small_teacher), "--run", str(tmp_path), *small]
    result = CliRunner().invoke(job.app, arguments)
    assert result.exit_code == 0, result.output
    assert _files(tmp_path / "model") == _files(tuned / "model")


def test_tuning_from_another_model_or_in_another_runs_folder_is_refused(
    run: Path, tuned: Path, tmp_path: Path, latents: Storage, small_teacher: Path, small_student: Path
) -> None:
    with pytest.raises(ValueError, match="is a student; training takes the bidirectional teacher"):
        job.tune(TUNING, tmp_path / "run", latents, small_student)
    assert not (tmp_path / "run").exists()
    other = tmp_path / "other"
    shutil.copytree(small_teacher, other)
    job.write_model(other, Teacher.from_pretrained(run / "model").transformer, _encoder(other), shift=3.0)
    with pytest.raises(ValueError, match=r"made with another recipe; init is \w{64} there and \w{64} now"):
        job.tune(TUNING, tuned, latents, other)
    with pytest.raises(ValueError, match="holds the results of pretrain, not finetune"):
        job.tune(TUNING, run, latents, small_teacher)


def _encoder(folder: Path) -> TextEncoder:
    return TextEncoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((3, 8, 4, 4), "have 8 channels, the model takes 16"),
        ((3, 16, 5, 4), "latent size 5x4 is not a multiple of the patch 2x2"),
        ((2, 3, 16, 4, 4), r"must be clips \[F, C, H, W\] of one size, got \[2, 3, 16, 4, 4\]"),
    ],
)
def test_latents_that_the_model_does_not_take_are_refused(
    tmp_path: Path, small_teacher: Path, shape: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=rf"dataset\.json: .*{words}"):
        job.tune(TUNING, tmp_path / "run", _latent_set(tmp_path / "set", shape), small_teacher)
    assert not (tmp_path / "run").exists()


def test_latents_of_another_vae_are_refused(tmp_path: Path, small_teacher: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset\.json: vae: the latents were made with another VAE"):
        job.tune(TUNING, tmp_path / "run", _latent_set(tmp_path / "set", vae="0123"), small_teacher)
    assert not (tmp_path / "run").exists()
    own = _latent_set(tmp_path / "own", vae=vae_digest(small_teacher))
    job.tune(FineTuneRecipe(steps=1, batch=1), tmp_path / "run", own, small_teacher)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--latents", "set"], "--latents: fine-tuning needs --init too"),
        (["--latents", "set", "--init", "model", "--stage", "vae"], "--stage vae: fine-tuning has one stage"),
        (["--latents", "set", "--init", "model", "--vae", "v"], "--vae v: fine-tuning takes the VAE of --init"),
        (["--latents", "set", "--init", "model"], "model/transformer/config.json: no such file"),
    ],
)
def test_mistakes_of_tuning_are_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(job.app, [*arguments, "--run", str(tmp_path / "run")])
    assert isinstance(result.exception, ValueError | FileNotFoundError)
    assert message in str(result.exception)
    assert not (tmp_path / "run").exists()
