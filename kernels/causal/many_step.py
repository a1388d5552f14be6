"""Clips of a causal many-step model: block by block, many guided Euler steps for each, with a KV cache.

What a student has to be measured against among causal models: the same attention and the same network, without
distillation (the many-step causal rows of CausVid, arXiv 2412.07772, table 4).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..diffusion.guidance import guided
from ..diffusion.noise import SampleKey, draw_noise
from ..diffusion.sampler import euler_trajectory
from ..diffusion.schedule import uniform_timesteps
from ..wan.context import TextContext
from ..wan.transformer import VideoTransformer
from .cache import CacheShape, KVCache, OpenBlock
from .student import StudentSettings

CLEAN = 0.0


class ManyStepGenerator:
    """One batch of streams that advance together, without gradient.

    text: of the streams. negative: what guidance steers away from, one prompt or one per stream. grid: the Euler
    steps' timesteps, from 1000 down to 0. guidance: standard w; 1 makes one pass instead of two. keys: one per
    stream; they own its noise. size: height and width of a latent frame.
    """

    def __init__(
        self,
        model: VideoTransformer,
        settings: StudentSettings,
        text: TextContext,
        negative: TextContext,
        keys: Sequence[SampleKey],
        size: tuple[int, int],
        grid: Sequence[float],
        guidance: float,
    ) -> None:
        self._model = model
        self._settings = settings
        self._keys = list(keys)
        self._grid = list(grid)
        self._guidance = guidance
        self._frame = (model.config.in_channels, *size)
        self._copies = 1 if guidance == 1.0 else 2
        rows, device = len(self._keys), model.proj_out.weight.device
        shape = CacheShape(
            model.config, rows * self._copies, *size, settings.window, settings.sink, model.proj_out.weight.dtype
        )
        self._cache = KVCache(shape, device)
        both = (text.expand(rows), negative.expand(rows))[: self._copies]
        with torch.no_grad():
            self._text = model.text_keys(TextContext.concatenate(both))

    def next_block(self) -> Tensor:
        """The next block of clean latents [B, f, C, H, W], float32; its clean keys and values are kept."""
        return self.next_path((CLEAN,))[-1]

    @torch.no_grad()
    def next_path(self, record: Sequence[float]) -> Tensor:
        """The next block's states at the timesteps `record`, which fall to 0: [K, B, f, C, H, W], float32.

        A path of a block's own noise and of the clean blocks before it alone. ValueError as `euler_trajectory`.
        """
        first = self._cache.next_position
        frames = self._settings.size_of(first)
        block = self._cache.open(frames)

        def velocity(latents: Tensor, timesteps: Tensor, /) -> Tensor:
            predicted = self._pass(latents, timesteps, block)
            if self._copies == 1:
                return predicted
            conditional, unconditional = predicted.chunk(2)
            return guided((conditional, unconditional), self._guidance)

        noise = draw_noise(self._keys, range(first, first + frames), self._frame)
        states = euler_trajectory(velocity, noise.to(self._cache.keys.device), self._grid, record)
        clean = states[-1]
        self._pass(clean, uniform_timesteps(clean, CLEAN), block)
        block.commit()
        return states

    def _pass(self, latents: Tensor, timesteps: Tensor, block: OpenBlock) -> Tensor:
        """The velocity of each copy: [copies·B, f, C, H, W]."""
        batch, levels = (tensor.repeat(self._copies, *[1] * (tensor.ndim - 1)) for tensor in (latents, timesteps))
        predicted: Tensor = self._model(batch, levels, self._text, block)
        return predicted
