"""The models that ship with the code do what their figures say; floors are generous."""

from pathlib import Path

import torch

from reelway.actors.pretraining import to_pixels
from reelway.kernels.objectives.reconstruction import psnr
from reelway.kernels.sprites.render import render
from reelway.kernels.sprites.splits import clip_seed, prompts
from reelway.kernels.wan.vae import StreamingVAE

TINY = Path(__file__).parents[2] / "assets" / "tiny"


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
