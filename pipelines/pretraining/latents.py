"""Stage 3: render the training clips and encode them once, in parts that appear whole or not at all."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...actors.pretraining import to_pixels
from ...kernels.precision import autocast
from ...kernels.wan.vae import StreamingVAE
from ..recipe import PretrainRecipe
from .world import clip

PART = 8400  # latent frames in one file: 400 clips of 21
BATCH = 168  # latent frames encoded at once


@dataclass(frozen=True)
class LatentSet:
    """latents: bfloat16 [N, F, C, H, W], normalised; captions: N texts; maps: bfloat16 [N, F, tokens, M] or None."""

    latents: Tensor
    captions: list[str]
    maps: Tensor | None = None


def make_latents(recipe: PretrainRecipe, run: Path, device: str) -> None:
    """Write `run/latents/<frames>/part-*.safetensors`, leaving out the parts that are there with all their clips."""
    starts = [(frames, start) for frames in recipe.teacher.clips for start in _starts(recipe, frames)]
    missing = [(frames, start) for frames, start in starts if not _is_whole(recipe, run, frames, start)]
    if not missing:
        return
    vae = StreamingVAE.from_pretrained(run / "model" / "vae").to(device)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("latents", total=len(starts), completed=len(starts) - len(missing))
        for frames, start in missing:
            _write_part(recipe, vae, _part(run, frames, start), frames, _indices(recipe, frames, start))
            progress.advance(task)


def load_latents(recipe: PretrainRecipe, run: Path, lengths: Iterable[int]) -> dict[int, LatentSet]:
    """The sets of clips of these lengths, whole in memory: 2.9 kB a latent frame."""
    return {frames: _load(recipe, run, frames) for frames in lengths}


def _load(recipe: PretrainRecipe, run: Path, frames: int) -> LatentSet:
    paths = [_part(run, frames, start) for start in _starts(recipe, frames)]
    parts = [load_file(path) for path in paths]
    latents, maps = (torch.cat([part[name] for part in parts]) for name in ("latents", "maps"))
    return LatentSet(
        latents, [text for path in paths for text in json.loads(path.with_suffix(".json").read_text())], maps
    )


def _per_part(frames: int) -> int:
    return max(1, PART // frames)


def _starts(recipe: PretrainRecipe, frames: int) -> range:
    return range(0, recipe.teacher.clips[frames], _per_part(frames))


def _indices(recipe: PretrainRecipe, frames: int, start: int) -> range:
    """The clips of the part that begins with clip `start`; the last part may be a short one."""
    return range(start, min(start + _per_part(frames), recipe.teacher.clips[frames]))


def _is_whole(recipe: PretrainRecipe, run: Path, frames: int, start: int) -> bool:
    """False too for a part that was the last and short, where the recipe has more clips since."""
    path = _part(run, frames, start)
    if not path.exists():
        return False
    with safe_open(path, framework="pt") as part:
        clips: int = part.get_slice("latents").get_shape()[0]
    return clips >= len(_indices(recipe, frames, start))


def _part(run: Path, frames: int, start: int) -> Path:
    return run / "latents" / str(frames) / f"part-{start // _per_part(frames):04d}.safetensors"


@torch.no_grad()
def _write_part(recipe: PretrainRecipe, vae: StreamingVAE, path: Path, frames: int, indices: range) -> None:
    captions, latents, maps = [], [], []
    device, factors = next(vae.parameters()).device, (vae.temporal_factor, vae.spatial_factor)
    batch = max(1, BATCH // frames)
    for first in range(indices.start, indices.stop, batch):
        chosen = range(first, min(first + batch, indices.stop))
        clips = [clip(recipe, frames, index, factors) for index in chosen]
        captions.extend(clip.caption for clip in clips)
        with autocast(device):
            encoded, _ = vae.encode(to_pixels(torch.from_numpy(np.stack([clip.frames for clip in clips])).to(device)))
        latents.append(encoded.cpu().bfloat16())
        maps.append(torch.from_numpy(np.stack([clip.maps for clip in clips])).bfloat16())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(captions))
    temporary = path.with_suffix(".tmp")
    save_file({"latents": torch.cat(latents), "maps": torch.cat(maps)}, temporary)
    temporary.replace(path)
