"""The teacher: a bidirectional transformer with its text encoder and VAE, sampled with guidance."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..kernels.diffusion.guidance import guided
from ..kernels.diffusion.noise import SampleKey, draw_noise
from ..kernels.diffusion.sampler import euler_sample
from ..kernels.diffusion.schedule import Velocity
from ..kernels.precision import autocast as fast_autocast
from ..kernels.wan.context import TextContext
from ..kernels.wan.text import TextEncoder
from ..kernels.wan.transformer import VideoTransformer
from ..kernels.wan.vae import StreamingVAE
from ..kernels.wan.weights import load_into, read_transformer
from .pretraining import to_pixels, to_video


class Teacher:
    """Makes whole clips: latents by Euler steps on the guided velocity, then pixels by the VAE.

    shift: of the sampling grid. negative_prompt: what guidance steers away from; encoded once. autocast: run the
    networks in bfloat16, where the device multiplies it fast.
    """

    def __init__(
        self,
        transformer: VideoTransformer,
        encoder: TextEncoder,
        vae: StreamingVAE,
        *,
        shift: float,
        negative_prompt: str = "",
        autocast: bool = True,
    ) -> None:
        self.transformer = transformer.requires_grad_(False).eval()
        self.encoder = encoder.requires_grad_(False).eval()
        self.vae = vae.requires_grad_(False).eval()
        self.device = transformer.proj_out.weight.device
        self.shift = shift
        self._autocast = autocast
        self._negative = encoder([negative_prompt])

    @classmethod
    def from_pretrained(cls, folder: Path, device: torch.device | str = "cpu", *, autocast: bool = True) -> "Teacher":
        """Load a model folder in the diffusers layout, weights in float32. FileNotFoundError names what is missing."""
        config, state = read_transformer(folder)
        transformer = VideoTransformer(config)
        load_into(transformer, {name: value.float() for name, value in state.items()})
        encoder = TextEncoder.from_pretrained(folder, dtype=torch.float32)
        vae = StreamingVAE.from_pretrained(folder / "vae")
        networks = (transformer.to(device), encoder.to(device), vae.to(device))
        return cls(*networks, shift=read_shift(folder / "scheduler" / "scheduler_config.json"), autocast=autocast)

    def velocity(self, prompts: Sequence[str], guidance: float) -> Velocity:
        """The guided velocity of a batch, one clip per prompt; both passes of guidance in one batch."""
        with self._precision(), torch.no_grad():
            conditional = self.encoder(prompts)
            if guidance == 1.0:
                keys = self.transformer.text_keys(conditional)
            else:
                unconditional = self._negative.expand(len(prompts))
                keys = self.transformer.text_keys(TextContext.concatenate((conditional, unconditional)))

        def velocity(latents: Tensor, levels: Tensor, /) -> Tensor:
            with self._precision(), torch.no_grad():
                if guidance == 1.0:
                    return self.transformer(latents, levels, keys)
                both = self.transformer(latents.repeat(2, 1, 1, 1, 1), levels.repeat(2, 1), keys)
            return guided(both.chunk(2), guidance)

        return velocity

    def sample(self, prompts: Sequence[str], noise: Tensor, grid: Sequence[float], guidance: float) -> Tensor:
        """Clean latents [B, F, C, H, W], float32, by Euler steps.

        noise: [B, F, C, H, W], one clip per prompt. grid: timesteps from 1000 down to 0 (`schedule.timesteps`).
        guidance: standard w, unconditional + w (conditional - unconditional).
        """
        return euler_sample(self.velocity(prompts, guidance), noise.to(self.device), grid)

    def noise(self, keys: Sequence[SampleKey], shape: tuple[int, int, int]) -> Tensor:
        """The samples' own noise [B, F, C, H, W]. shape: latent frames, height, width."""
        frames, height, width = shape
        return draw_noise(keys, range(frames), (self.transformer.config.in_channels, height, width))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to video: uint8 [B, T, H, W, 3] on the CPU."""
        with self._precision(), torch.no_grad():
            pixels, _ = self.vae.decode(latents)
        return to_video(pixels).cpu()

    def reconstruct(self, videos: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Videos, uint8 [T, H, W, 3], after the VAE's encoder and decoder."""
        copies = []
        for video in videos:
            pixels = to_pixels(torch.from_numpy(video)[None].to(self.device))
            with self._precision(), torch.no_grad():
                latents, _ = self.vae.encode(pixels)
            copies.append(self.decode(latents)[0].numpy())
        return copies

    def _precision(self) -> torch.autocast:
        return fast_autocast(self.device, enabled=self._autocast)


def read_shift(path: Path) -> float:
    """The timestep shift of a scheduler: `shift` of the Euler one, `flow_shift` of Wan's own UniPC."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a teacher needs its scheduler's shift")
    config = json.loads(path.read_text())
    for field in ("shift", "flow_shift"):
        if field in config:
            return float(config[field])
    raise ValueError(f"{path}: needs a shift or a flow_shift, has {', '.join(sorted(config))}")
