"""The chunk generator: a causal student makes a video block by block, for as long as it is asked to.

Per block: few denoising steps with fresh noise between them, then a pass on the clean block, at timestep 0, that
writes its keys and values (CausVid, arXiv 2412.07772, Algorithm 2). A prompt switch recomputes the window under the
new prompt (KV-recache: LongLive, arXiv 2509.22622, section 3.2).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..diffusion.noise import SampleKey, draw_noise
from ..diffusion.sampler import few_step_sample
from ..diffusion.schedule import add_noise, uniform_timesteps
from ..wan.context import TextContext
from ..wan.transformer import TextKeys, VideoTransformer
from .cache import CacheShape, KVCache
from .student import StudentSettings

CLEAN = 0.0


class ChunkGenerator:
    """One batch of streams that advance together. All methods run without gradient.

    keys: one per stream; they own its noise, whatever batch it is in.
    size: height and width of a latent frame. dtype: of the cache, and of the network's matrix products.
    """

    def __init__(
        self,
        model: VideoTransformer,
        settings: StudentSettings,
        text: TextContext,
        keys: Sequence[SampleKey],
        size: tuple[int, int],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        device = model.proj_out.weight.device
        self.model = model
        self.settings = settings
        self.keys = list(keys)
        self.frame_shape = (model.config.in_channels, *size)
        shape = CacheShape(model.config, len(self.keys), *size, settings.window, settings.sink, dtype)
        self.cache = KVCache(shape, device)
        self._text = self._text_keys(text)
        self._history: list[Tensor] = []  # clean latents [B, 1, C, H, W] of the frames that the cache holds

    @property
    def frames_done(self) -> int:
        """Latent frames that the streams have, given ones included."""
        return self.cache.next_position

    @torch.no_grad()
    def next_block(
        self, source: Tensor | None = None, timesteps: Sequence[float] | None = None, *, keep: bool = True
    ) -> Tensor:
        """Make the next block: clean latents [B, f, C, H, W], float32.

        source: latents of a video to redraw (video-to-video): they are noised to timesteps[0] instead of starting
            from pure noise (SDEdit, arXiv 2108.01073). timesteps: falling; the student's own by default.
        keep: write the block into the cache; without it the next call makes the same block again.
        """
        start = self.frames_done
        frames = self.settings.size_of(start)
        levels = list(self.settings.timesteps if timesteps is None else timesteps)
        if source is None and levels[0] != 1000.0:
            raise ValueError(f"timesteps: without a source they must begin at 1000, got {levels[0]}")
        noisy = self._noise(start, frames, 0)
        if source is not None:
            self._check_block(source, frames)
            noisy = add_noise(source.to(noisy), noisy, uniform_timesteps(noisy, levels[0]))
        block = self.cache.open(frames)

        def velocity(latents: Tensor, timesteps: Tensor) -> Tensor:
            predicted: Tensor = self.model(latents, timesteps, self._text, block)
            return predicted

        def fresh_noise(step: int, like: Tensor) -> Tensor:
            return self._noise(start, frames, step)

        clean = few_step_sample(velocity, noisy, levels, fresh_noise)
        if keep:
            self._remember(clean)
        return clean

    @torch.no_grad()
    def append(self, latents: Tensor) -> None:
        """Let the streams go on from given clean latents [B, F, C, H, W], whole blocks: an image, or a clip's end."""
        for block in self._split(latents):
            self._remember(block.to(self.cache.keys.device, torch.float32))

    @torch.no_grad()
    def switch_prompt(self, text: TextContext) -> None:
        """From the next block on, follow `text`: the window is recomputed under it, block by block."""
        self._text = self._text_keys(text)
        history, self._history = self._history, []
        if history:
            position = self.cache.next_position - len(history)
            self.cache.reset(position)
            for block in torch.cat(history, dim=1).split(self._recache_sizes(len(history)), dim=1):
                self._remember(block)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """All that the streams need to go on, except prompt and settings; ready for safetensors."""
        empty = torch.zeros(len(self.keys), 0, *self.frame_shape)
        history = torch.cat(self._history, dim=1) if self._history else empty
        return {
            "history": history,
            **{f"cache.{name}": value for name, value in self.cache.state_dict().items()},
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a `state_dict` of streams of the same shape; ValueError names what differs."""
        cached = {name.removeprefix("cache."): value for name, value in state.items() if name != "history"}
        self.cache.load_state_dict(cached)
        history = state["history"].to(self.cache.keys.device)
        self._history = list(history.split(1, dim=1)) if history.shape[1] else []

    def _remember(self, clean: Tensor) -> None:
        """The pass on the clean block that writes the cache."""
        block = self.cache.open(clean.shape[1])
        self.model(clean, uniform_timesteps(clean, CLEAN), self._text, block)
        block.commit()
        self._history.extend(clean.split(1, dim=1))
        surplus = len(self._history) - len(self.cache)
        del self._history[self.settings.sink : self.settings.sink + surplus]

    def _text_keys(self, text: TextContext) -> TextKeys:
        with torch.no_grad():
            return self.model.text_keys(text.expand(len(self.keys)))

    def _noise(self, start: int, frames: int, step: int) -> Tensor:
        noise = draw_noise(self.keys, range(start, start + frames), self.frame_shape, step)
        return noise.to(self.cache.keys.device)

    def _split(self, latents: Tensor) -> list[Tensor]:
        blocks, first = [], 0
        while first < latents.shape[1]:
            size = self.settings.size_of(self.frames_done + first)
            self._check_block(latents[:, first : first + size], size)
            blocks.append(latents[:, first : first + size])
            first += size
        return blocks

    def _check_block(self, latents: Tensor, frames: int) -> None:
        expected = (len(self.keys), frames, *self.frame_shape)
        if tuple(latents.shape) != expected:
            raise ValueError(f"latents: a block of shape {expected} is expected, got {tuple(latents.shape)}")

    def _recache_sizes(self, frames: int) -> list[int]:
        """Whole blocks, the remainder (of an evicted block) first."""
        rest = frames % self.settings.block
        return ([rest] if rest else []) + [self.settings.block] * (frames // self.settings.block)


class CachedStudent:
    """The student behind Self-Forcing's rollout (`reelway.kernels.objectives.self_forcing.BlockModel`).

    `denoise` may carry gradient: it reads a frozen view of the cache, so that backward, and the recomputation of
    gradient checkpointing, see what the forward saw. Nothing flows into what earlier blocks wrote.
    text: the prompts, as a context and not as keys, so that the text projections get gradient too.
    """

    def __init__(self, model: Callable[..., Tensor], cache: KVCache, text: TextContext) -> None:
        self._model = model
        self._cache = cache
        self._text = text

    def denoise(self, noisy: Tensor, timesteps: Tensor, /) -> Tensor:
        block = self._cache.open(noisy.shape[1])
        return self._model(noisy, timesteps, self._text, block.frozen() if torch.is_grad_enabled() else block)

    def write_context(self, clean: Tensor, /) -> None:
        with torch.no_grad():
            block = self._cache.open(clean.shape[1])
            self._model(clean, uniform_timesteps(clean, CLEAN), self._text, block)
            block.commit()
