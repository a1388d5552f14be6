"""One training step of the tiny VAE, of the teacher with its text encoder, and of a teacher that is tuned."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
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


@dataclass(frozen=True)
class TeacherBatch:
    """latents [B, F, C, H, W]; token ids and mask [B, M]; timesteps [B], one per clip; noise like the latents."""

    latents: Tensor
    token_ids: Tensor
    token_mask: Tensor
    timesteps: Tensor
    noise: Tensor


class TeacherLearner:
    """Trains the bidirectional transformer by flow matching, and the text encoder along with it."""

    def __init__(
        self,
        transformer: VideoTransformer,
        encoder: TextEncoder,
        settings: OptimizerSettings,
        device: str = "cpu",
    ) -> None:
        self._encoder = encoder
        networks = nn.ModuleDict({"transformer": transformer, "text_encoder": encoder.model})
        self.engine = TorchEngine(networks, settings, device)

    def step(self, batch: TeacherBatch) -> dict[str, float]:
        networks: Any = self.engine.network
        device = self.engine.device
        with self.engine.autocast():
            context = self._encoder.embed(batch.token_ids.to(device), batch.token_mask.to(device))
            loss = _velocity_loss(networks["transformer"], batch, context, device)
        return self.engine.update(loss)

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask [B, M]."""
        return self._encoder.tokenize(prompts)

    def averaged(self) -> tuple[VideoTransformer, TextEncoder]:
        """The averaged networks: what is exported, sampled and graded."""
        average: Any = self.engine.average
        return average["transformer"], TextEncoder(average["text_encoder"], self._encoder.tokenizer)

    def state_dict(self) -> dict[str, Any]:
        return self.engine.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.engine.load_state_dict(state)


class TeacherTuner:
    """Trains a given transformer further by flow matching; its text encoder stays as it is."""

    def __init__(
        self,
        transformer: VideoTransformer,
        encoder: TextEncoder,
        settings: OptimizerSettings,
        device: str = "cpu",
    ) -> None:
        self._encoder = encoder.requires_grad_(False).eval().to(device)
        self.engine = TorchEngine(transformer.requires_grad_(True), settings, device)

    def step(self, batch: TeacherBatch) -> dict[str, float]:
        device = self.engine.device
        with self.engine.autocast():
            with torch.no_grad():
                context = self._encoder.embed(batch.token_ids.to(device), batch.token_mask.to(device))
            loss = _velocity_loss(self.engine.network, batch, context, device)
        return self.engine.update(loss)

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask [B, M]."""
        return self._encoder.tokenize(prompts)

    def averaged(self) -> VideoTransformer:
        """The averaged network: what is exported."""
        average = self.engine.average
        assert isinstance(average, VideoTransformer)
        return average

    def state_dict(self) -> dict[str, Any]:
        return self.engine.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.engine.load_state_dict(state)


def _velocity_loss(transformer: nn.Module, batch: TeacherBatch, context: TextContext, device: torch.device) -> Tensor:
    """The flow-matching loss of a batch, every frame of a clip at the clip's one timestep."""
    clean, noise = batch.latents.to(device).float(), batch.noise.to(device)
    timesteps = batch.timesteps.to(device)[:, None].expand(-1, clean.shape[1])

    def velocity(noisy: Tensor, levels: Tensor) -> Tensor:
        predicted: Tensor = transformer(noisy, levels, context)
        return predicted.float()

    return flow_matching_loss(velocity, clean, noise, timesteps).loss
