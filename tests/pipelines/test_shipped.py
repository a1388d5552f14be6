"""The models that ship with the code do what their figures say; floors are generous."""

from pathlib import Path

import torch
from diffusers import WanPipeline

from reelway.actors.judge import judge
from reelway.actors.pretraining import to_pixels
from reelway.actors.teacher import Teacher
from reelway.kernels.diffusion.noise import SampleKey
from reelway.kernels.objectives.reconstruction import psnr
from reelway.kernels.sprites.render import render
from reelway.kernels.sprites.splits import clip_seed, prompts
from reelway.kernels.wan.vae import StreamingVAE
from reelway.pipelines.sprites import sample

TINY = Path(__file__).parents[2] / "assets" / "tiny"
PROMPT = "a small red star drifts left over a navy background"
LEVEL = 2
FLOOR_TOTAL, FLOOR_SEMANTIC = 0.88, 0.6


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
    videos = sample(Teacher.from_pretrained(TINY), chosen, steps=20, guidance=5.0, seed=0)
    scores = judge(videos, [scene for _, scene in chosen], level=LEVEL).table
    swapped = judge(videos, [scene for _, scene in chosen[1:] + chosen[:1]], level=LEVEL).table
    assert scores["total"] >= FLOOR_TOTAL
    assert scores["semantic"] >= FLOOR_SEMANTIC
    assert scores["semantic"] > swapped["semantic"] + 0.25  # of these prompts, not of any
