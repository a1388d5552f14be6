"""What a teacher in training knows of single pictures, in a minute: `python benchmarks/teacher_pictures.py RUN`.

RUN is a folder of `reelway pretrain`, finished or not, or a teacher's folder. Two tables: the oracle's scores of
pictures for held-out prompts, and the velocity loss of held-out pictures by noise level, for their own captions and for
captions in which every shape, or every colour, is another one. Where the losses part is where the word decides.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reelway.actors.pretraining import to_pixels
from reelway.actors.teacher import Teacher
from reelway.kernels.diffusion.noise import SampleKey
from reelway.kernels.diffusion.schedule import timesteps
from reelway.kernels.sprites.captions import VOCABULARY, caption
from reelway.kernels.sprites.oracle import grade
from reelway.kernels.sprites.render import render
from reelway.kernels.sprites.scene import COLORS, SHAPES, Scene
from reelway.kernels.sprites.splits import clip_seed, prompts, sample_scene
from reelway.kernels.wan.config import CONFIGS
from reelway.kernels.wan.text import TextEncoder, tiny_text_encoder
from reelway.kernels.wan.transformer import VideoTransformer
from reelway.kernels.wan.vae import StreamingVAE

SHOWN = ("object_class", "color", "spatial_relationship", "multiple_objects", "scene", "imaging_quality")
REPEATS = 5  # of a picture, which the oracle judges as a video
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


def teacher_folder(text: str) -> Path:
    """The folder of that name, if `read_teacher` can read it."""
    folder = Path(text)
    if not (folder / "model_index.json").is_file() and not list(folder.glob("teacher-*/checkpoint.pt")):
        raise argparse.ArgumentTypeError(
            f"{folder}: neither a teacher's folder nor a run that has saved a teacher's checkpoint"
        )
    return folder


def read_teacher(folder: Path) -> tuple[Teacher, str]:
    """A finished model, or the newest averaged weights of a run; and what it is."""
    if (folder / "model_index.json").is_file():
        return Teacher.from_pretrained(folder), str(folder)
    phase = sorted(folder.glob("teacher-*/checkpoint.pt"))[-1]
    config, step = CONFIGS["tiny"], torch.load(phase, weights_only=True, mmap=True)["step"]
    transformer, encoder = VideoTransformer(config), tiny_text_encoder(VOCABULARY, config.text_dim)
    transformer.load_state_dict(_average(phase, "transformer."))
    encoder.model.load_state_dict(_average(folder / "text" / "checkpoint.pt", "text_encoder."))
    vae = StreamingVAE.from_pretrained(folder / "model" / "vae")
    shift = json.loads((folder / "recipe.json").read_text())["pretrain"]["teacher"]["shift"]
    teacher = Teacher(transformer, TextEncoder(encoder.model, encoder.tokenizer), vae, shift=shift)
    return teacher, f"{phase.parent.name}, step {step}"


def _average(path: Path, prefix: str) -> dict[str, Any]:
    weights = torch.load(path, weights_only=True)["learner"]["average"]
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def picture_scores(teacher: Teacher, options: argparse.Namespace) -> dict[str, float]:
    """The oracle's mean scores of one-frame samples for held-out prompts."""
    chosen = prompts("heldout", options.count, 0, options.level)
    texts, shape = [text for text, _ in chosen], (1, options.side, options.side)
    noise = teacher.noise([SampleKey(0, text, 0) for text in texts], shape)
    latents = teacher.sample(texts, noise, timesteps(options.steps, teacher.shift), options.guidance)
    videos = np.repeat(teacher.decode(latents).numpy(), REPEATS, axis=1)
    grades = [grade(video, scene, level=options.level).scores for video, (_, scene) in zip(videos, chosen, strict=True)]
    return {name: float(np.mean([scores[name] for scores in grades if name in scores])) for name in SHOWN}


@torch.no_grad()
def losses_by_level(teacher: Teacher, options: argparse.Namespace) -> list[dict[str, float]]:
    """A row for each noise level: the mean squared error of the velocity under each kind of caption."""
    seeds = [clip_seed("heldout", index) for index in range(options.pictures)]
    scenes = [sample_scene("heldout", seed, level=options.level) for seed in seeds]
    size = options.side * teacher.vae.spatial_factor
    pairs = list(zip(scenes, seeds, strict=True))
    frames = np.stack([render(scene, seed, 1, level=options.level, size=size) for scene, seed in pairs])
    latents, _ = teacher.vae.encode(to_pixels(torch.from_numpy(frames)))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    kinds = {"right": scenes, "shape": [_changed(scene, "shape", SHAPES) for scene in scenes]}
    kinds["color"] = [_changed(scene, "color", tuple(COLORS)) for scene in scenes]
    captions = {name: [caption(*pair) for pair in zip(some, seeds, strict=True)] for name, some in kinds.items()}
    contexts = {name: teacher.encoder.embed(*teacher.encoder.tokenize(texts)) for name, texts in captions.items()}
    rows = []
    for level in LEVELS:
        noisy, at = (1 - level) * latents + level * noise, torch.full((len(seeds), 1), 1000 * level)
        errors = {name: teacher.transformer(noisy, at, context) for name, context in contexts.items()}
        losses = {name: float((error - (noise - latents)).square().mean()) for name, error in errors.items()}
        rows.append({"level": level, **losses})
    return rows


def _changed(scene: Scene, attribute: str, values: tuple[str, ...]) -> Scene:
    """Every sprite with the attribute's next value."""
    sprites = []
    for sprite in scene.sprites:
        following = values[(values.index(getattr(sprite, attribute)) + 1) % len(values)]
        sprites.append(replace(sprite, **{attribute: following}))
    return replace(scene, sprites=tuple(sprites))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=teacher_folder, help="a run of `reelway pretrain`, or a teacher's folder")
    parser.add_argument("--count", type=int, default=48, help="prompts of the pictures that are graded")
    parser.add_argument("--pictures", type=int, default=256, help="of the losses")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--level", type=int, default=1, help="of the sprites world")
    parser.add_argument("--side", type=int, default=8, help="latents of a picture's side")
    options = parser.parse_args()
    teacher, name = read_teacher(options.folder)
    print(f"{name}: {options.count} held-out prompts, {options.steps} steps, guidance {options.guidance}\n")
    scores = picture_scores(teacher, options)
    print(f"| {' | '.join(scores)} |\n|{'---|' * len(scores)}")
    print(f"| {' | '.join(f'{value:.3f}' for value in scores.values())} |\n")
    print("| noise level | loss | with other shapes | with other colors |\n|---|---|---|---|")
    for row in losses_by_level(teacher, options):
        more = (row["shape"] - row["right"], row["color"] - row["right"])
        print(f"| {row['level']:g} | {row['right']:.4f} | {more[0]:+.4f} | {more[1]:+.4f} |")


if __name__ == "__main__":
    main()
