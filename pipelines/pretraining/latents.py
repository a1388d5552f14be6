"""Stage 3: render the training clips and encode them once, in parts that appear whole or not at all."""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
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
from .world import Clip, clip

PART = 8400  # latent frames in one file: 400 clips of 21
BATCH = {"cpu": 168, "cuda": 1680}  # latent frames encoded at once
RENDERERS = 12  # processes, at most, that render for a GPU

Clips = Callable[[int, range, tuple[int, int]], Iterable[Clip]]  # of so many latent frames; indices; the VAE's factors


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
    with _renderers(recipe, device) as clips, Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("latents", total=len(starts), completed=len(starts) - len(missing))
        for frames, start in missing:
            _write_part(clips, vae, _part(run, frames, start), frames, _indices(recipe, frames, start))
            progress.advance(task)


@contextmanager
def _renderers(recipe: PretrainRecipe, device: str) -> Iterator[Clips]:
    """Renders clips, in their order. Beside a GPU in processes of their own: one cannot render as fast as it encodes.

    On a CPU the VAE takes nearly all the time, and every core.
    """
    if torch.device(device).type == "cpu":
        yield lambda frames, indices, factors: (clip(recipe, frames, index, factors) for index in indices)
        return
    processes = max(1, min(RENDERERS, (os.cpu_count() or 1) - 1))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:  # CUDA outlives no fork
        yield lambda frames, indices, factors: pool.map(
            partial(clip, recipe, frames, factors=factors), indices, chunksize=4
        )


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
def _write_part(render: Clips, vae: StreamingVAE, path: Path, frames: int, indices: range) -> None:
    captions, latents, maps = [], [], []
    device, factors = next(vae.parameters()).device, (vae.temporal_factor, vae.spatial_factor)
    rendered = iter(render(frames, indices, factors))
    while clips := list(islice(rendered, max(1, BATCH[device.type] // frames))):
        captions.extend(clip.caption for clip in clips)
        pixels = to_pixels(torch.from_numpy(np.stack([clip.frames for clip in clips])).to(device))
        with autocast(device):
            encoded, _ = vae.encode(pixels)
        latents.append(encoded.cpu().bfloat16())
        maps.append(torch.from_numpy(np.stack([clip.maps for clip in clips])).bfloat16())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(captions))
    temporary = path.with_suffix(".tmp")
    save_file({"latents": torch.cat(latents), "maps": torch.cat(maps)}, temporary)
    temporary.replace(path)
