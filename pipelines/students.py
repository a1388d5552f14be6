"""What a training stage begins with, what its student makes on the way, and the model folder at its end."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..actors.engine import Engine, Ranks, computed_dtype
from ..actors.model_files import check_model, digest
from ..actors.pretraining import to_video
from ..actors.teacher import read_shift
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
from ..kernels.wan.weights import StoredTransformer
from .models import write_model
from .recipe import Recipe
from .sheet import contact_sheet

TEXT = ("text_encoder", "tokenizer")
COPIED = ("vae", *TEXT)  # what training a transformer leaves as it is
SAMPLES = 8
SCORED = 2  # clips that a sheet shows as the score networks see them, too

# x0 of clips as the two score networks see it: latents [B, F, C, H, W] and their prompts to (real, fake).
Scores = Callable[[Tensor, Sequence[str]], tuple[Tensor, Tensor]]
Load = Callable[[Path], VideoTransformer]  # a model folder's transformer, with its weights


@dataclass(frozen=True)
class Parts:
    """What a stage takes from model folders besides weights of the transformer; frozen, the VAE in float32.

    shift: of the sampling grid. copied: the folders of the parts that a student's model gets copies of, by name.
    """

    encoder: TextEncoder
    vae: StreamingVAE
    shift: float
    copied: Mapping[str, Path]

    @classmethod
    def load(cls, folder: Path, text: torch.dtype = torch.float32) -> "Parts":
        """text: of the text encoder's weights. FileNotFoundError or ValueError names what is missing."""
        check_model(folder)
        vae = StreamingVAE.from_pretrained(folder / "vae").requires_grad_(False).eval()
        shift = read_shift(folder / "scheduler" / "scheduler_config.json")
        return cls(_encoder(folder, text), vae, shift, {name: folder / name for name in COPIED})

    def of_student(self, model: Path) -> "Parts":
        """The same for a student's model: with its own text encoder, if it has another one than the teacher.

        ValueError where it has another VAE: latents of the one mean nothing to the other.
        """
        if (model / "vae").is_dir() and _differs(model, self.copied, ("vae",)):
            raise ValueError(f"{model / 'vae'}: is not the teacher's ({self.copied['vae']}); both must have one VAE")
        if not has_own_encoder(model, self.copied["text_encoder"].parent):
            return self
        copied = {**self.copied, **{name: model / name for name in TEXT}}
        dtype = next(self.encoder.parameters()).dtype
        return replace(self, encoder=_encoder(model, dtype), copied=copied)

    def to(self, device: torch.device) -> "Parts":
        """Text encoder and VAE moved to a device."""
        return replace(self, encoder=self.encoder.to(device), vae=self.vae.to(device))


def has_own_encoder(model: Path, teacher: Path) -> bool:
    """Whether a model has a text encoder or a tokenizer of its own that is not the teacher's, byte by byte."""
    folders = {name: teacher / name for name in TEXT}
    return (model / "text_encoder").is_dir() and _differs(model, folders, TEXT)


def _differs(model: Path, folders: Mapping[str, Path], names: Sequence[str]) -> bool:
    def of(folder: Path) -> str:
        return digest(folder, (file for file in folder.rglob("*") if file.is_file()))

    return any(of(model / name) != of(folders[name]) for name in names)


def _encoder(folder: Path, dtype: torch.dtype) -> TextEncoder:
    return TextEncoder.from_pretrained(folder, dtype=dtype).requires_grad_(False).eval()


def load_network(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> VideoTransformer:
    """A model folder's transformer, read tensor by tensor to where it is needed: there is never a second copy."""
    stored = StoredTransformer(folder)
    network = empty_network(stored.config)
    for name in [name for name, _ in network.named_parameters()]:
        module, _, leaf = name.rpartition(".")
        value = stored.read(name).to(device, dtype, copy=True)
        setattr(network.get_submodule(module), leaf, torch.nn.Parameter(value))
    return network


def empty_network(config: TransformerConfig) -> VideoTransformer:
    """A transformer without memory, on torch's meta device."""
    with torch.device("meta"):
        network = VideoTransformer(config)
    assert not list(network.buffers()), "a buffer would stay without memory"
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

    shape: latent frames, height, width. at_once: clips that are made together, by memory. scores: with it, the first
    clips stand there as the score networks see them, too.
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
        at_once: int | None = None,
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
        self._at_once = at_once or len(prompts.texts)

    def __call__(self, done: int) -> dict[str, float]:
        """The sheet after `done` steps; mean scores by name, if there are any. Every rank calls, rank 0 draws."""
        weights = self._engine.averaged_weights()
        draws = self._ranks.rank == 0
        latents = self._roll_out(weights) if draws else None
        views = self._views(latents)
        if latents is None:
            return {}
        rows = self._rows({"student": latents} | views)
        contact_sheet([(label, video) for label, video, _ in rows], self.path(done))
        return self._means(rows)

    def path(self, done: int) -> Path:
        """The sheet's file."""
        return self._folder / f"step-{done:06d}.png"

    @torch.no_grad()
    def _roll_out(self, weights: dict[str, Tensor]) -> Tensor:
        """Clips of the student with these weights: latents [B, F, C, H, W]."""
        network = empty_network(self._config)
        network.load_state_dict(weights, assign=True)
        network.to_precision(computed_dtype(self._engine)).to(self._engine.device).eval()
        return torch.cat([self._roll_out_some(network, texts) for texts in batched(self._prompts.texts, self._at_once)])

    def _roll_out_some(self, network: VideoTransformer, texts: Sequence[str]) -> Tensor:
        frames, height, width = self._shape
        keys = [SampleKey(0, prompt, 0) for prompt in texts]
        text = self._parts.encoder(texts)
        with self._engine.autocast():
            generator = ChunkGenerator(network, self._student, text, keys, (height, width))
            return torch.cat([generator.next_block() for _ in self._student.blocks(frames)], dim=1)

    @torch.no_grad()
    def _views(self, latents: Tensor | None) -> dict[str, Tensor]:
        """The first clips as both score networks see them. Every rank calls: the networks may be divided."""
        if self._scores is None:
            return {}
        texts = self._prompts.texts[:SCORED]
        frames, height, width = self._shape
        own = torch.zeros(len(texts), frames, self._config.in_channels, height, width, device=self._engine.device)
        shown = self._ranks.share(own if latents is None else latents[: len(texts)].to(own))
        return dict(zip(("real score", "fake score"), self._scores(shown, texts), strict=True))

    def _rows(self, shown: Mapping[str, Tensor]) -> list["SheetRow"]:
        """Clip by clip the student's, and below it what the score networks make of it."""
        videos = {name: self._decode(latents) for name, latents in shown.items()}
        return [
            self._row(name, index, of_name[index])
            for index in range(len(self._prompts.texts))
            for name, of_name in videos.items()
            if index < len(of_name)
        ]

    def _row(self, name: str, index: int, video: Any) -> "SheetRow":
        prompts = self._prompts
        score = grade(video, prompts.scenes[index], level=prompts.level).total if prompts.scenes else None
        words = [name] if self._scores else []
        words += [] if score is None else [f"{score:.2f}"]
        return SheetRow(": ".join([*words, prompts.texts[index]]), video, {} if score is None else {name: score})

    def _means(self, rows: Sequence["SheetRow"]) -> dict[str, float]:
        """The student's mean score is called `score`; those of the score networks' views have their names."""
        found: dict[str, list[float]] = {}
        for row in rows:
            for name, score in row.scores.items():
                found.setdefault("score" if name == "student" else name.replace(" ", "_"), []).append(score)
        return {name: sum(scores) / len(scores) for name, scores in found.items()}

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> list[Any]:
        """Videos, uint8 [T, H, W, 3] each."""
        videos = []
        for some in latents.split(self._at_once):
            with self._engine.autocast():
                pixels, _ = self._parts.vae.decode(some)
            videos.extend(to_video(pixels).cpu().numpy())
        return videos


class SheetRow(NamedTuple):
    """A row of a sheet. scores: its grade, under the name of what it shows; empty where nothing grades it."""

    label: str
    video: Any
    scores: dict[str, float]


def batched(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Stretches of at most `size`, in order."""
    return (texts[start : start + size] for start in range(0, len(texts), size))


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
    network = empty_network(config)
    network.load_state_dict(weights, assign=True)
    height, width = (side * parts.vae.spatial_factor for side in size)
    written = replace(student, origin=origin, height=height, width=width)
    write_model(temporary, network, parts.encoder, shift=parts.shift, student=written)
    for name, folder in parts.copied.items():
        shutil.rmtree(temporary / name, ignore_errors=True)
        shutil.copytree(folder, temporary / name)
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
