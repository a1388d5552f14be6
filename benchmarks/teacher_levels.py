"""At which noise levels a teacher in training loses a video: `python benchmarks/teacher_levels.py RUN`.

RUN is as for teacher_pictures.py. Renderings of held-out prompts are noised to a level and denoised from there, as
SDEdit does (arXiv 2108.01073); the oracle grades what comes out. What is lost between two levels is what the teacher
does not decide well there; so that is where its timesteps should lie.
"""

import argparse

import numpy as np
import torch
from teacher_pictures import read_teacher, teacher_folder
from torch import Tensor

from reelway.actors.judge import judge
from reelway.actors.pretraining import to_pixels
from reelway.actors.teacher import Teacher
from reelway.kernels.diffusion.noise import SampleKey
from reelway.kernels.diffusion.schedule import timesteps
from reelway.kernels.sprites.render import render
from reelway.kernels.sprites.scene import Scene
from reelway.kernels.sprites.splits import clip_seed, prompts

SHOWN = ("total", "temporal_style", "motion_smoothness", "subject_consistency", "object_class", "color")


def true_latents(teacher: Teacher, scenes: list[Scene], options: argparse.Namespace) -> Tensor:
    """Renderings, encoded: [B, F, C, H, W]."""
    truth = [
        render(scene, clip_seed("heldout", index), options.frames, level=options.level)
        for index, scene in enumerate(scenes)
    ]
    with torch.no_grad():
        latents, _ = teacher.vae.encode(to_pixels(torch.from_numpy(np.stack(truth))))
    return latents


def scores_from(
    teacher: Teacher, chosen: list[tuple[str, Scene]], clean: Tensor, level: float, options: argparse.Namespace
) -> dict[str, float]:
    """The oracle's mean scores of videos that begin as the truth, noised to `level`."""
    texts, scenes = [text for text, _ in chosen], [scene for _, scene in chosen]
    noise = teacher.noise([SampleKey(0, text, 0) for text in texts], (clean.shape[1], *clean.shape[-2:]))
    grid = [1000 * level, *(step for step in timesteps(options.steps, teacher.shift) if step < 1000 * level - 1)]
    latents = teacher.sample(texts, (1 - level) * clean + level * noise, grid, options.guidance)
    table = judge(list(teacher.decode(latents).numpy()), scenes, level=options.level).table
    return {name: table[name] for name in SHOWN}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=teacher_folder, help="a run of `reelway pretrain`, or a teacher's folder")
    parser.add_argument("--levels", type=float, nargs="+", default=[1.0, 0.93, 0.87, 0.75, 0.5])
    parser.add_argument("--count", type=int, default=12, help="held-out prompts")
    parser.add_argument("--steps", type=int, default=24, help="of the whole grid; a lower level begins later")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--level", type=int, default=1, help="of the sprites world")
    options = parser.parse_args()
    if not all(0 < level <= 1 for level in options.levels):
        parser.error(f"--levels: noise levels lie in (0, 1], got {options.levels}")
    teacher, name = read_teacher(options.folder)
    print(f"{name}: {options.count} held-out prompts, {options.steps} steps, guidance {options.guidance}\n")
    print(f"| noise level | {' | '.join(SHOWN)} |\n|---|{'---|' * len(SHOWN)}")
    chosen = prompts("heldout", options.count, 0, options.level)
    clean = true_latents(teacher, [scene for _, scene in chosen], options)
    for level in options.levels:
        scores = scores_from(teacher, chosen, clean, level, options)
        print(f"| {level:g} | {' | '.join(f'{scores[name]:.3f}' for name in SHOWN)} |", flush=True)


if __name__ == "__main__":
    main()
