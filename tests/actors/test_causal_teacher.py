"""A causal teacher streams what its generator makes; a student's folder says of what size and kind it is."""

import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from reelway.actors.causal_teacher import CausalTeacher
from reelway.actors.generator import TINY_SIZE, Student
from reelway.actors.pretraining import to_video
from reelway.actors.teacher import Teacher
from reelway.actors.trajectories import device_kind
from reelway.cluster.storage import Storage
from reelway.kernels.causal.many_step import ManyStepGenerator
from reelway.kernels.causal.student import StudentSettings
from reelway.kernels.diffusion.noise import SampleKey, draw_noise
from reelway.pipelines.recipe import TINY, load_recipe
from reelway.pipelines.trajectory_job import Order, plan_job

PROMPT, NEGATIVE, GRID = "a red star drifts left", "a blue disk", [1000.0, 600.0, 0.0]


def changed(student: Path, folder: Path, **fields: object) -> Path:
    """A copy of a student with other fields in its student.json."""
    shutil.copytree(student, folder)
    content = json.loads((folder / "student.json").read_text())
    (folder / "student.json").write_text(json.dumps(content | fields))
    return folder


def test_a_streamed_clip_is_the_whole_clip_decoded(small_student: Path, tmp_path: Path) -> None:
    folder = changed(small_student, tmp_path / "causal", sampling="many-step")
    teacher = CausalTeacher.from_pretrained(folder, negative_prompt=NEGATIVE, autocast=False)
    key = SampleKey(3, PROMPT, 0)
    chunks = list(islice(teacher.stream(PROMPT, key, (4, 4), GRID, 2.0), 2))
    assert [len(chunk) for chunk in chunks] == [9, 12]

    plain, settings = Teacher.from_pretrained(folder, autocast=False), StudentSettings.read(folder)
    texts = (plain.encoder([PROMPT]), plain.encoder([NEGATIVE]))
    generator = ManyStepGenerator(plain.transformer, settings, *texts, [key], (4, 4), GRID, 2.0)
    with torch.no_grad():
        pixels, _ = plain.vae.decode(torch.cat([generator.next_block() for _ in range(2)], dim=1))
    whole = to_video(pixels)[0].numpy().astype(int)
    assert np.abs(np.concatenate(chunks).astype(int) - whole).max() <= 1  # the last bit of a rounding


def test_a_blocks_path_is_of_its_own_noise_and_the_past_alone(small_student: Path, tmp_path: Path) -> None:
    """From the clip's own noise to the streamed clip's end; a longer clip begins with the same paths."""
    folder = changed(small_student, tmp_path / "causal", sampling="many-step")
    teacher = CausalTeacher.from_pretrained(folder, negative_prompt=NEGATIVE, autocast=False)
    prompts, keys = [PROMPT, "a blue ring"], [SampleKey(3, PROMPT, 0), SampleKey(3, "a blue ring", 0)]
    record = (1000.0, GRID[1], 0.0)
    one, two = (teacher.paths(prompts, keys, (frames, 4, 4), GRID, record, 2.0) for frames in (3, 6))
    assert two.shape == (3, 2, 6, 16, 4, 4)
    assert torch.equal(two[:, :, :3], one)
    assert torch.equal(two[0], draw_noise(keys, range(6), (16, 4, 4)))

    texts = (teacher.encoder(prompts), teacher.encoder([NEGATIVE]))
    generator = ManyStepGenerator(teacher.transformer, teacher.settings, *texts, keys, (4, 4), GRID, 2.0)
    assert torch.equal(two[-1], torch.cat([generator.next_block() for _ in range(2)], dim=1))


def test_trajectories_of_a_causal_teacher_are_its_paths(small_student: Path, tmp_path: Path) -> None:
    """The data set says what else than the weights decides them; a student of few steps makes none."""
    changes = ["clip.height=32", "clip.width=32", "clip.frames=21", "trajectories.batch=2", "student.window=6"]
    recipe = load_recipe(TINY, [*changes, "trajectories.minimum_steps=4", "trajectories.dtype=float32"])
    folder = changed(small_student, tmp_path / "causal", sampling="many-step")
    order = Order(recipe, folder, [PROMPT, "a blue ring"], Storage.open(tmp_path / "set"))
    job = plan_job(order, device_kind("cpu"))
    assert job.info.made_by["causal"] == {"block": 3, "first_block": None, "window": 6, "sink": 3}
    threads = torch.get_num_threads()
    worker = job.worker()()
    made = [sample["trajectory.safetensors"]["latents"] for _, sample in worker.samples(job.shards[0])]
    assert worker.seconds_per_batch(job.shards[0].items.to_pylist()[:2]) > 0
    torch.set_num_threads(threads)

    settings, (items,) = job.settings, [job.shards[0].items.to_pylist()]
    teacher = CausalTeacher.from_pretrained(folder, negative_prompt=recipe.trajectories.negative_prompt)
    keys = [settings.key(item) for item in items]
    prompts = [item["prompt"] for item in items]
    expected = teacher.paths(prompts, keys, (6, 4, 4), settings.grid, settings.record, settings.guidance)
    torch.testing.assert_close(torch.stack(made, dim=1), expected, rtol=1e-4, atol=1e-4)

    with pytest.raises(ValueError, match="a student of few steps has no ODE path"):
        plan_job(replace(order, teacher=small_student), "cpu")
    other = changed(small_student, tmp_path / "other", sampling="many-step", block=2, sink=2)
    with pytest.raises(ValueError, match=r"student\.json: block is 2, the recipe's student has 3"):
        plan_job(replace(order, teacher=other), "cpu")


def test_a_model_of_many_steps_is_not_streamed_in_four(small_student: Path, tmp_path: Path) -> None:
    folder = changed(small_student, tmp_path / "causal", sampling="many-step")
    with pytest.raises(ValueError, match="a causal model of many steps, not a student"):
        Student.from_pretrained(folder)


def test_a_student_has_the_size_of_its_folder_and_old_folders_their_familys(
    small_student: Path, tmp_path: Path
) -> None:
    old = Student.from_pretrained(small_student)
    assert old.default_size == TINY_SIZE
    new = Student.from_pretrained(changed(small_student, tmp_path / "new", height=32, width=48))
    assert new.default_size == (32, 48)
    assert new.fingerprint == old.fingerprint  # a stream of the one goes on with the other
    with new.open(PROMPT) as stream:
        assert stream.next_chunk().shape == (9, 32, 48, 3)
