"""Stage 2: render the training clips and encode them once, in parts that appear whole or not at all."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...actors.pretraining import to_pixels
from ...kernels.wan.vae import StreamingVAE
from ..recipe import PretrainRecipe
from .world import clip

PART = 400  # clips in one file
BATCH = 8  # clips encoded at once


@dataclass(frozen=True)
class LatentSet:
    """latents: bfloat16 [N, F, C, H, W], normalised; captions: N texts."""

    latents: Tensor
    captions: list[str]


def make_latents(recipe: PretrainRecipe, run: Path, device: str) -> None:
    """Write `run/latents/part-*.safetensors`, leaving out the parts that are there."""
    folder = run / "latents"
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, recipe.teacher.clips, PART)
    missing = [start for start in starts if not _part(folder, start).exists()]
    if not missing:
        return
    vae = StreamingVAE.from_pretrained(run / "model" / "vae").to(device)
    with Progress() as progress:
        task = progress.add_task("latents", total=len(starts), completed=len(starts) - len(missing))
        for start in missing:
            _write_part(recipe, vae, folder, range(start, min(start + PART, recipe.teacher.clips)))
            progress.advance(task)


def load_latents(recipe: PretrainRecipe, run: Path) -> LatentSet:
    """The whole set in memory: 43 kB a clip."""
    latents, captions = [], []
    for start in range(0, recipe.teacher.clips, PART):
        path = _part(run / "latents", start)
        latents.append(load_file(path)["latents"])
        captions.extend(json.loads(path.with_suffix(".json").read_text()))
    return LatentSet(torch.cat(latents), captions)


def _part(folder: Path, start: int) -> Path:
    return folder / f"part-{start // PART:04d}.safetensors"


@torch.no_grad()
def _write_part(recipe: PretrainRecipe, vae: StreamingVAE, folder: Path, indices: range) -> None:
    captions, latents = [], []
    device = next(vae.parameters()).device
    for first in range(indices.start, indices.stop, BATCH):
        texts, videos = zip(*(clip(recipe, index) for index in indices[first - indices.start :][:BATCH]), strict=True)
        captions.extend(texts)
        with torch.autocast(device.type, torch.bfloat16):
            encoded, _ = vae.encode(to_pixels(torch.from_numpy(np.stack(videos)).to(device)))
        latents.append(encoded.cpu().bfloat16())
    path = _part(folder, indices.start)
    path.with_suffix(".json").write_text(json.dumps(captions))
    temporary = path.with_suffix(".tmp")
    save_file({"latents": torch.cat(latents)}, temporary)
    temporary.replace(path)
