"""What a training stage begins with, what its student makes on the way, and the model folder at its end."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..actors.engine import Engine, Ranks
from ..actors.model_files import check_model
from ..actors.pretraining import to_video
from ..actors.teacher import Teacher
from ..kernels.causal.generator import ChunkGenerator
from ..kernels.causal.student import StudentSettings
from ..kernels.diffusion.noise import SampleKey
from ..kernels.sprites.oracle import grade
from ..kernels.sprites.scene import Scene
from ..kernels.sprites.splits import prompts as sprites_prompts
from ..kernels.wan.config import TransformerConfig
from ..kernels.wan.text import TextEncoder
from ..kernels.wan.transformer import VideoTransformer
from ..kernels.wan.vae import StreamingVAE
from ..kernels.wan.weights import load_into, read_transformer
from .models import write_model
from .recipe import Recipe
from .sheet import contact_sheet

COPIED = ("vae", "text_encoder", "tokenizer")  # what training a transformer leaves as it is
SAMPLES = 8

# x0 of clips as the two score networks see it: latents [B, F, C, H, W] and their prompts to (real, fake).
Scores = Callable[[Tensor, Sequence[str]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Parts:
    """What a stage takes from its teacher's folder besides weights of the transformer; frozen, float32.

    config: of the transformer. shift: of the teacher's sampling grid.
    """

    folder: Path
    config: TransformerConfig
    encoder: TextEncoder
    vae: StreamingVAE
    shift: float

    @classmethod
    def load(cls, folder: Path) -> "Parts":
        """FileNotFoundError or ValueError names what is missing."""
        check_model(folder)
        teacher = Teacher.from_pretrained(folder)
        return cls(folder, teacher.transformer.config, teacher.encoder, teacher.vae, teacher.shift)

    def to(self, device: torch.device) -> "Parts":
        """Text encoder and VAE moved to a device."""
        return replace(self, encoder=self.encoder.to(device), vae=self.vae.to(device))


def load_network(folder: Path, *, checkpointing: bool = False) -> VideoTransformer:
    """A model folder's transformer in float32."""
    config, state = read_transformer(folder)
    network = VideoTransformer(config)
    load_into(network, {name: value.float() for name, value in state.items()})
    network.gradient_checkpointing = checkpointing
    return network


@dataclass(frozen=True)
class SheetPrompts:
    """What sheets are made of. scenes: of the embedded world, by which clips are graded; empty for other prompts."""

    texts: tuple[str, ...]
    scenes: tuple[Scene, ...] = ()
    level: int = 0

    @classmethod
    def choose(cls, recipe: Recipe, prompts: Callable[[], Sequence[str]]) -> "SheetPrompts":
        """Held-out prompts of the embedded world for a model that was trained in it, else the first of `prompts`."""
        if recipe.pretrain is None:
            return cls(tuple(dict.fromkeys(prompts()))[:SAMPLES])
        level = recipe.pretrain.world.level
        texts, scenes = zip(*sprites_prompts("heldout", SAMPLES, recipe.pretrain.seed, level), strict=True)
        return cls(texts, scenes, level)


class StudentSheets:
    """Draws `sheets/step-<N>.png`: clips of the averaged student, by its own chunk generator, graded where possible.

    frames, height, width: latent. scores: with it, the first clips stand there as the score networks see them, too.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        parts: Parts,
        config: TransformerConfig,
        student: StudentSettings,
        prompts: SheetPrompts,
        shape: tuple[int, int, int],
        ranks: Ranks,
        scores: Scores | None = None,
    ) -> None:
        self._folder = folder
        self._engine = engine
        self._parts = parts
        self._config = config
        self._student = student
        self._prompts = prompts
        self._shape = shape
        self._ranks = ranks
        self._scores = scores

    def __call__(self, done: int) -> dict[str, float]:
        """The sheet after `done` steps; the mean score, if there is one. Every rank calls, rank 0 draws."""
        weights = self._engine.averaged_weights()
        if self._ranks.rank:
            return {}
        latents = self._roll_out(weights)
        videos = self._decode(latents)
        rows, scores = [], []
        for index, (text, video) in enumerate(zip(self._prompts.texts, videos, strict=True)):
            label = text
            if self._prompts.scenes:
                scores.append(grade(video, self._prompts.scenes[index], level=self._prompts.level).total)
                label = f"{scores[-1]:.2f}: {text}"
            rows.append((label, video))
        if self._scores:
            rows += self._score_rows(latents[:2], self._prompts.texts[:2])
        contact_sheet(rows, self._folder / f"step-{done:06d}.png")
        return {"score": sum(scores) / len(scores)} if scores else {}

    @torch.no_grad()
    def _roll_out(self, weights: dict[str, Tensor]) -> Tensor:
        """Clips of the student with these weights: latents [B, F, C, H, W]."""
        with torch.device("meta"):
            network = VideoTransformer(self._config)
        network.load_state_dict(weights, assign=True)
        network.to(self._engine.device).eval()
        frames, height, width = self._shape
        text = self._parts.encoder(self._prompts.texts)
        keys = [SampleKey(0, prompt, 0) for prompt in self._prompts.texts]
        with self._engine.autocast():
            generator = ChunkGenerator(network, self._student, text, keys, (height, width))
            return torch.cat([generator.next_block() for _ in self._student.blocks(frames)], dim=1)

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Any:
        """uint8 [B, T, H, W, 3]."""
        with self._engine.autocast():
            pixels, _ = self._parts.vae.decode(latents)
        return to_video(pixels).cpu().numpy()

    def _score_rows(self, latents: Tensor, prompts: Sequence[str]) -> list[tuple[str, Any]]:
        assert self._scores is not None
        views = zip(("real score", "fake score"), self._scores(latents, prompts), strict=True)
        return [(f"{name}: {prompts[row]}", video) for name, x0 in views for row, video in enumerate(self._decode(x0))]


def export_student(
    run: Path,
    parts: Parts,
    config: TransformerConfig,
    weights: dict[str, Tensor],
    student: StudentSettings,
    origin: dict[str, Any],
    size: tuple[int, int],
) -> Path:
    """Write `run/model`: the student's folder, whole or not at all; text encoder, tokenizer and VAE are copies.

    size: height and width of the clips' latents.
    """
    target, temporary = run / "model", run / "model.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    network = VideoTransformer(config)
    network.load_state_dict(weights)
    height, width = (side * parts.vae.spatial_factor for side in size)
    written = replace(student, origin=origin, height=height, width=width)
    write_model(temporary, network, parts.encoder, shift=parts.shift, student=written)
    for name in COPIED:
        shutil.rmtree(temporary / name, ignore_errors=True)
        shutil.copytree(parts.folder / name, temporary / name)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    return target


def origin_of(folder: Path) -> dict[str, Any]:
    """The record of the stages before, from a student's student.json; empty for a teacher."""
    path = folder / "student.json"
    if not path.is_file():
        return {}
    origin: dict[str, Any] = json.loads(path.read_text())["origin"]
    return origin
