"""One training step of the tiny VAE, of its text encoder, and of a teacher, from nothing or tuned."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from ..kernels.objectives.flow_matching import flow_matching_loss
from ..kernels.objectives.reconstruction import psnr, reconstruction_loss
from ..kernels.wan.context import TextContext
from ..kernels.wan.text import TextEncoder
from ..kernels.wan.transformer import VideoTransformer
from ..kernels.wan.vae import StreamingVAE
from .engine import OptimizerSettings, TorchEngine


def to_pixels(video: Tensor) -> Tensor:
    """uint8 frames [B, T, H, W, 3] to pixels [B, T, 3, H, W] in [-1, 1]."""
    return video.permute(0, 1, 4, 2, 3).float() / 127.5 - 1


def to_video(pixels: Tensor) -> Tensor:
    """Pixels [..., 3, H, W] in [-1, 1] to uint8 frames [..., H, W, 3]."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1)


class VAELearner:
    """Trains a `StreamingVAE` to reconstruct clips. weights: of `reconstruction_loss`, by name."""

    def __init__(
        self, vae: StreamingVAE, settings: OptimizerSettings, weights: Mapping[str, float], device: str = "cpu"
    ) -> None:
        self.engine = TorchEngine(vae, settings, device)
        self._weights = dict(weights)

    def step(self, video: Tensor) -> dict[str, float]:
        """video: uint8 [B, T, H, W, 3], T = 1 + 4k frames."""
        vae: Any = self.engine.network
        pixels = to_pixels(video.to(self.engine.device))
        with self.engine.autocast():
            mean, logvar = vae.encode_moments(pixels)
            decoded = vae.decode_raw(mean)
        terms = reconstruction_loss(pixels, decoded.float(), mean.float(), logvar.float(), **self._weights)
        decibels = psnr((pixels + 1) / 2, (decoded.detach().float().clamp(-1, 1) + 1) / 2).mean()
        return {**self.engine.update(terms.loss), "psnr": decibels.item()}

    def state_dict(self) -> dict[str, Any]:
        return self.engine.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.engine.load_state_dict(state)


class CaptionReader(nn.Module):
    """Answers questions about a caption from its embeddings: for each, one look at the rows and one linear map."""

    def __init__(self, width: int, questions: Sequence[int]) -> None:
        """questions: how many answers each has."""
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(questions), width) / width**0.5)
        self.answers = nn.ModuleList([nn.Linear(width, answers) for answers in questions])

    def forward(self, rows: Tensor, mask: Tensor) -> list[Tensor]:
        """rows [B, M, D], mask [B, M] of 1 and 0: logits [B, answers] of each question."""
        scores = torch.einsum("qd,bmd->bqm", self.queries, rows).masked_fill(mask[:, None] == 0, -torch.inf)
        seen = torch.einsum("bqm,bmd->bqd", scores.softmax(dim=-1), rows)
        return [answer(seen[:, index]) for index, answer in enumerate(self.answers)]


class TextLearner:
    """Trains a text encoder to tell what captions say: that the star is red and the square drifts left.

    A teacher learns in minutes what its text encoder already tells apart, and in hours what it does not.
    """

    def __init__(
        self, encoder: TextEncoder, questions: Sequence[int], settings: OptimizerSettings, device: str = "cpu"
    ) -> None:
        self._encoder = encoder
        width = encoder.model.config.d_model
        networks = nn.ModuleDict({"text_encoder": encoder.model, "reader": CaptionReader(width, questions)})
        self.engine = TorchEngine(networks, settings, device)

    def step(self, batch: tuple[list[str], Tensor]) -> dict[str, float]:
        """captions, and their answers int64 [B, questions]."""
        logits = self._read(self.engine.network, batch[0])
        losses = [functional.cross_entropy(found, right) for found, right in self._pairs(logits, batch[1])]
        right = [(found.argmax(1) == right).float().mean() for found, right in self._pairs(logits, batch[1])]
        accuracy = torch.stack(right).mean().item()
        return {**self.engine.update(torch.stack(losses).mean()), "accuracy": accuracy}

    @torch.no_grad()
    def accuracy(self, captions: list[str], answers: Tensor) -> float:
        """Share of the answers that the averaged encoder gives right."""
        logits = self._read(self.engine.average, captions)
        return torch.stack([(a.argmax(1) == b).float().mean() for a, b in self._pairs(logits, answers)]).mean().item()

    def averaged(self) -> TextEncoder:
        """The averaged encoder: what is exported."""
        average: Any = self.engine.average
        return TextEncoder(average["text_encoder"], self._encoder.tokenizer)

    def state_dict(self) -> dict[str, Any]:
        return self.engine.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.engine.load_state_dict(state)

    def _read(self, networks: Any, captions: list[str]) -> list[Tensor]:
        ids, mask = self._encoder.tokenize(captions)
        rows = networks["text_encoder"](input_ids=ids, attention_mask=mask).last_hidden_state
        logits: list[Tensor] = networks["reader"](rows, mask)
        return logits

    def _pairs(self, logits: list[Tensor], answers: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(logits, answers.to(self.engine.device).unbind(1), strict=True)


@dataclass(frozen=True)
class TeacherBatch:
    """latents [B, F, C, H, W]; token ids and mask [B, M]; timesteps [B], one per clip; noise like the latents.

    maps: [B, F, N, M] what each token shows, if the learner is to ask for it.
    """

    latents: Tensor
    token_ids: Tensor
    token_mask: Tensor
    timesteps: Tensor
    noise: Tensor
    maps: Tensor | None = None


@dataclass(frozen=True)
class MapSettings:
    """What a middle block is asked for beside the velocity. scale: [M], the typical size of each channel."""

    weight: float
    scale: Tensor


class TeacherLearner:
    """Trains a bidirectional transformer by flow matching; its text encoder stays as it is.

    maps: also ask the middle block what each token shows, with a reader that is dropped afterwards. Features that
    know it are what the last blocks draw from, and such a demand shortens training (REPA, arXiv 2410.06940, which
    asks for the features of a pretrained encoder; here the truth is known). compiled: torch.compile the blocks, all
    but the middle one, which is looked into.
    """

    def __init__(
        self,
        transformer: VideoTransformer,
        encoder: TextEncoder,
        settings: OptimizerSettings,
        device: str = "cpu",
        maps: MapSettings | None = None,
        compiled: bool = False,
    ) -> None:
        self._encoder = encoder.requires_grad_(False).eval().to(device)
        self._maps = maps
        networks = nn.ModuleDict({"transformer": transformer.requires_grad_(True)})
        if maps is not None:
            width = transformer.config.dim
            reader = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, len(maps.scale)))
            networks["map_reader"] = reader
        self.engine = TorchEngine(networks, settings, device)
        if compiled:
            for block in set(transformer.blocks) - {_middle(transformer)}:
                block.compile()

    def step(self, batch: TeacherBatch) -> dict[str, float]:
        device = self.engine.device
        networks: Any = self.engine.network
        with self.engine.autocast(), _middle_of(networks["transformer"]) as features:
            with torch.no_grad():
                context = self._encoder.embed(batch.token_ids.to(device), batch.token_mask.to(device))
            velocity = _velocity_loss(networks["transformer"], batch, context, device)
            if self._maps is None or batch.maps is None:
                return self.engine.update(velocity)
            read = networks["map_reader"](features[0]).float()
        wanted = batch.maps.to(device).float() / self._maps.scale.to(device)
        shown = (read - wanted).square().mean()
        metrics = self.engine.update(velocity + self._maps.weight * shown)
        return {**metrics, "loss": velocity.item(), "map_loss": shown.item()}

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask [B, M]."""
        return self._encoder.tokenize(prompts)

    def averaged(self) -> VideoTransformer:
        """The averaged network: what is exported, sampled and graded."""
        average: Any = self.engine.average
        transformer: VideoTransformer = average["transformer"]
        return transformer

    def state_dict(self) -> dict[str, Any]:
        return self.engine.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.engine.load_state_dict(state)


def _middle(transformer: Any) -> nn.Module:
    block: nn.Module = transformer.blocks[(len(transformer.blocks) - 1) // 2]
    return block


@contextmanager
def _middle_of(transformer: Any) -> Iterator[list[Tensor]]:
    """A list that a forward pass inside fills with the output [B, F, N, D] of the transformer's middle block."""
    seen: list[Tensor] = []
    handle = _middle(transformer).register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


def _velocity_loss(transformer: nn.Module, batch: TeacherBatch, context: TextContext, device: torch.device) -> Tensor:
    """The flow-matching loss of a batch, every frame of a clip at the clip's one timestep."""
    clean, noise = batch.latents.to(device).float(), batch.noise.to(device)
    timesteps = batch.timesteps.to(device)[:, None].expand(-1, clean.shape[1])

    def velocity(noisy: Tensor, levels: Tensor) -> Tensor:
        predicted: Tensor = transformer(noisy, levels, context)
        return predicted.float()

    return flow_matching_loss(velocity, clean, noise, timesteps).loss
