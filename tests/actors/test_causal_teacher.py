"""A causal teacher streams what its generator makes; a student's folder says of what size and kind it is."""

import json
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from reelway.actors.causal_teacher import CausalTeacher
from reelway.actors.generator import TINY_SIZE, Student
from reelway.actors.pretraining import to_video
from reelway.actors.teacher import Teacher
from reelway.kernels.causal.many_step import ManyStepGenerator
from reelway.kernels.causal.student import StudentSettings
from reelway.kernels.diffusion.noise import SampleKey

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
