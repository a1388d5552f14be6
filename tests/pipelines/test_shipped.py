"""The models that ship with the code do what their figures say; floors are generous."""

from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline

from reelway.actors.generator import Student
from reelway.actors.judge import judge
from reelway.actors.pretraining import to_pixels
from reelway.actors.teacher import Teacher
from reelway.kernels.diffusion.noise import SampleKey
from reelway.kernels.objectives.reconstruction import psnr
from reelway.kernels.sprites.captions import parse
from reelway.kernels.sprites.render import render
from reelway.kernels.sprites.splits import clip_seed, prompts
from reelway.kernels.wan.vae import StreamingVAE
from reelway.pipelines.sprites import sample

ASSETS = Path(__file__).parents[2] / "assets"
TINY, STUDENT = ASSETS / "tiny", ASSETS / "tiny-student"
PROMPT = "a small red star drifts left over a navy background"
PROMPT_OF_STUDENT = "a large orange circle drifts slowly to the left over a navy background"
LEVEL = 1
FLOOR_TOTAL, FLOOR_SEMANTIC, FLOOR_SHAPES = 0.75, 0.6, 0.5  # of few prompts and few steps; the card has the figures


def test_shipped_vae_reconstructs_held_out_clips_to_their_end() -> None:
    vae = StreamingVAE.from_pretrained(TINY / "vae").requires_grad_(False)
    scenes = [scene for _, scene in prompts("heldout", 4, 0, 2)]
    clips = [render(scene, clip_seed("heldout", index), 81, level=2) for index, scene in enumerate(scenes)]
    pixels = torch.cat([to_pixels(torch.from_numpy(clip)[None]) for clip in clips])
    latents, _ = vae.encode(pixels)
    decoded, _ = vae.decode(latents)
    frames = psnr((pixels + 1) / 2, (decoded.float() + 1) / 2).mean(0)
    assert frames.mean() > 29
    assert frames[-16:].mean() > frames[:16].mean() - 1.5  # no worse where a stream has run for a while
    assert 0.7 < latents.std() < 1.4  # normalised


def test_shipped_teacher_is_what_diffusers_runs() -> None:
    """The same noise, prompt and steps give the same latents in `diffusers.WanPipeline` and here."""
    pipeline = WanPipeline.from_pretrained(TINY, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    teacher = Teacher.from_pretrained(TINY, autocast=False)
    noise = teacher.noise([SampleKey(0, PROMPT, 0)], (3, 8, 8))
    size = {"height": 64, "width": 64, "num_frames": 9}
    sampling = {"num_inference_steps": 10, "guidance_scale": 5.0, "output_type": "latent"}
    expected = pipeline(PROMPT, latents=noise.transpose(1, 2), **size, **sampling).frames.transpose(1, 2)
    grid = [1000 * sigma for sigma in pipeline.scheduler.sigmas.tolist()]
    found = teacher.sample([PROMPT], noise, grid, guidance=5.0)
    assert float((found - expected).norm() / expected.norm()) <= 1e-4


def test_shipped_teacher_makes_what_held_out_prompts_say() -> None:
    chosen = prompts("heldout", 8, 0, LEVEL)
    videos = sample(Teacher.from_pretrained(TINY), chosen, steps=16, guidance=4.0, seed=0)
    scores = judge(videos, [scene for _, scene in chosen], level=LEVEL).table
    swapped = judge(videos, [scene for _, scene in chosen[1:] + chosen[:1]], level=LEVEL).table
    print(scores, swapped["semantic"])
    assert scores["total"] >= FLOOR_TOTAL
    assert scores["semantic"] >= FLOOR_SEMANTIC
    assert scores["object_class"] >= FLOOR_SHAPES
    assert scores["semantic"] > swapped["semantic"] + 0.15  # of these prompts, not of any


def test_shipped_student_streams_what_a_prompt_says_and_stays_what_it_is() -> None:
    student = Student.from_pretrained(STUDENT)
    scene, _ = parse(PROMPT_OF_STUDENT)
    with student.open(PROMPT_OF_STUDENT, seed=1) as stream:
        video = np.concatenate([stream.next_chunk() for _ in range(28)])
    ends = [judge([clip], [scene], level=LEVEL).table for clip in (video[:81], video[-81:])]
    print(ends)
    assert ends[0]["color"] >= 0.8
    assert ends[0]["object_class"] >= 0.8
    assert ends[0]["scene"] >= 0.9
    assert ends[1]["total"] >= 0.9 * ends[0]["total"]  # 20 s on, four times the clips that it learned
