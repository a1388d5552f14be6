"""The chunk generator: a causal student makes a video block by block, for as long as it is asked to.

Per block: few denoising steps with fresh noise between them, then a pass on the clean block, at timestep 0, that
writes its keys and values (CausVid, arXiv 2412.07772, Algorithm 2). A prompt switch recomputes the window under the
new prompt (KV-recache: LongLive, arXiv 2509.22622, section 3.2).

Generators that hold a cache each may share the network's passes (`next_blocks`, `append_blocks`): what is done token
by token runs in one batch, attention runs cache by cache, so nothing is copied when a stream joins or leaves.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..diffusion.noise import SampleKey, draw_noise
from ..diffusion.sampler import few_step_sample
from ..diffusion.schedule import add_noise, uniform_timesteps
from ..ops import dispatch as ops
from ..wan.context import TextContext
from ..wan.rotary import time_shift_table
from ..wan.transformer import SelfAttentionPattern, TextKeys, VideoTransformer
from .cache import CacheShape, KVCache, OpenBlock
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
        self.history: list[Tensor] = []  # clean latents [B, 1, C, H, W] of the frames that the cache holds
        self._origin = 0  # the frame of the stream that stands at position 0 of the cache

    @property
    def frames_done(self) -> int:
        """Latent frames that the streams have, given ones included."""
        return self._origin + self.cache.next_position

    @property
    def next_size(self) -> int:
        """Latent frames of the next block."""
        return self.settings.size_of(self.cache.next_position)

    @torch.no_grad()
    def next_block(
        self, source: Tensor | None = None, timesteps: Sequence[float] | None = None, *, keep: bool = True
    ) -> Tensor:
        """Make the next block: clean latents [B, f, C, H, W], float32.

        source: latents of a video to redraw (video-to-video): they are noised to timesteps[0] instead of starting
            from pure noise (SDEdit, arXiv 2108.01073). timesteps: falling; the student's own by default.
        keep: write the block into the cache; without it the next call makes the same block again.
        """
        levels = list(self.settings.timesteps if timesteps is None else timesteps)
        if source is None and levels[0] != 1000.0:
            raise ValueError(f"timesteps: without a source they must begin at 1000, got {levels[0]}")
        noisy = self._noise(self.next_size, 0)
        if source is not None:
            self._check_block(source, self.next_size)
            noisy = add_noise(source.to(noisy), noisy, uniform_timesteps(noisy, levels[0]))
        clean = _sample([self], noisy, levels)
        if keep:
            _write([self], [clean])
        return clean

    @torch.no_grad()
    def append(self, latents: Tensor) -> None:
        """Let the streams go on from given clean latents [B, F, C, H, W], whole blocks: an image, or a clip's end."""
        for block in self._split(latents):
            _write([self], [block.to(self.cache.keys.device, torch.float32)])

    @torch.no_grad()
    def restart(self, latents: Tensor) -> None:
        """Forget the past and go on from given latents [B, F, C, H, W], whole blocks, at positions 0 to F-1.

        They are the stream's next F frames, in the place of a block that was made without `keep`; noise goes on as if
        nothing had been forgotten (CausVid's long videos, arXiv 2412.07772).
        """
        self._origin = self.frames_done
        self.cache.reset()
        self.history = []
        self.append(latents)

    @torch.no_grad()
    def switch_prompt(self, text: TextContext) -> None:
        """From the next block on, follow `text`: the window is recomputed under it, block by block."""
        self._text = self._text_keys(text)
        history, self.history = self.history, []
        if history:
            position = self.cache.next_position - len(history)
            self.cache.reset(position)
            for block in torch.cat(history, dim=1).split(self._recache_sizes(len(history)), dim=1):
                _write([self], [block])

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """All that the streams need to go on, except prompt and settings; ready for safetensors."""
        empty = torch.zeros(len(self.keys), 0, *self.frame_shape)
        history = torch.cat(self.history, dim=1) if self.history else empty
        return {
            "history": history,
            "origin": torch.tensor([self._origin]),
            **{f"cache.{name}": value for name, value in self.cache.state_dict().items()},
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a `state_dict` of streams of the same shape; ValueError names what differs."""
        cached = {name.removeprefix("cache."): value for name, value in state.items() if name.startswith("cache.")}
        self.cache.load_state_dict(cached)
        self._origin = int(state["origin"])
        history = state["history"].to(self.cache.keys.device)
        self.history = list(history.split(1, dim=1)) if history.shape[1] else []

    def _remember(self, clean: Tensor, opened: OpenBlock) -> None:
        """Make what the last pass, on the clean block, wrote part of the past."""
        opened.commit()
        self.history.extend(clean.split(1, dim=1))
        surplus = len(self.history) - len(self.cache)
        del self.history[self.settings.sink : self.settings.sink + surplus]

    def _text_keys(self, text: TextContext) -> TextKeys:
        with torch.no_grad():
            return self.model.text_keys(text.expand(len(self.keys)))

    def _noise(self, frames: int, step: int) -> Tensor:
        """Of the next `frames` frames."""
        due = range(self.frames_done, self.frames_done + frames)
        noise = draw_noise(self.keys, due, self.frame_shape, step)
        return noise.to(self.cache.keys.device)

    def _split(self, latents: Tensor) -> list[Tensor]:
        blocks, first = [], 0
        while first < latents.shape[1]:
            size = self.settings.size_of(self.cache.next_position + first)
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


@torch.no_grad()
def next_blocks(generators: Sequence[ChunkGenerator], *, keep: bool = True) -> list[Tensor]:
    """The next block of each generator, made in one batch: what `next_block` of each gives, but for the last bits.

    Their positions, prompts and windows may differ; network, timesteps, latent size and the number of latent frames
    of the next block must not (ValueError).
    """
    if len({(id(g.model), g.settings.timesteps, g.frame_shape, g.next_size) for g in generators}) != 1:
        raise ValueError("next_blocks: network, timesteps, latent size and block must be the same for all generators")
    noisy = torch.cat([generator._noise(generator.next_size, 0) for generator in generators])
    clean = _sample(generators, noisy, generators[0].settings.timesteps)
    # Copies: a view would hold the whole batch in memory for as long as one of its streams lives.
    blocks = [block.clone() for block in clean.split([len(generator.keys) for generator in generators])]
    if keep:
        _write(generators, blocks)
    return blocks


@torch.no_grad()
def append_blocks(generators: Sequence[ChunkGenerator], blocks: Sequence[Tensor]) -> None:
    """Append a given clean block [B, f, C, H, W] to each generator, in one batch."""
    for generator, block in zip(generators, blocks, strict=True):
        generator._check_block(block, generator.next_size)
    _write(generators, [block.to(generators[0].cache.keys.device, torch.float32) for block in blocks])


def _sample(generators: Sequence[ChunkGenerator], noisy: Tensor, levels: Sequence[float]) -> Tensor:
    """Few-step denoising of the generators' next blocks [B, f, C, H, W]; the cache stays as it is."""
    frames = noisy.shape[1]
    pattern = _join_blocks(generators, [generator.cache.open(frames) for generator in generators])
    text = _join_text([generator._text for generator in generators])

    def velocity(latents: Tensor, timesteps: Tensor) -> Tensor:
        predicted: Tensor = generators[0].model(latents, timesteps, text, pattern)
        return predicted

    def fresh_noise(step: int, like: Tensor) -> Tensor:
        return torch.cat([generator._noise(frames, step) for generator in generators])

    return few_step_sample(velocity, noisy, levels, fresh_noise)


def _write(generators: Sequence[ChunkGenerator], blocks: Sequence[Tensor]) -> None:
    """The pass on the generators' clean blocks, each [B, f, C, H, W], that writes their caches."""
    opened = [generator.cache.open(block.shape[1]) for generator, block in zip(generators, blocks, strict=True)]
    text = _join_text([generator._text for generator in generators])
    clean = torch.cat(list(blocks))
    generators[0].model(clean, uniform_timesteps(clean, CLEAN), text, _join_blocks(generators, opened))
    for generator, block, slots in zip(generators, blocks, opened, strict=True):
        generator._remember(block, slots)


def _join_blocks(generators: Sequence[ChunkGenerator], blocks: list[OpenBlock]) -> SelfAttentionPattern:
    return blocks[0] if len(blocks) == 1 else JointBlock(generators, blocks)


def _join_text(parts: Sequence[TextKeys]) -> TextKeys:
    """Text keys of a batch, padded with rows that nothing attends to."""
    if len(parts) == 1:
        return parts[0]
    length = max(part.score_bias.shape[1] for part in parts)
    short = [length - part.score_bias.shape[1] for part in parts]

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        padded = [functional.pad(tensor, (0, 0, 0, 0, 0, rows)) for tensor, rows in zip(tensors, short, strict=True)]
        return torch.cat(padded)

    layers = zip(*(part.layers for part in parts), strict=True)
    biases = zip(parts, short, strict=True)
    return TextKeys(
        tuple((joined([keys for keys, _ in layer]), joined([values for _, values in layer])) for layer in layers),
        torch.cat([functional.pad(part.score_bias, (0, rows), value=-torch.inf) for part, rows in biases]),
    )


class JointBlock:
    """The open blocks of several caches as one attention pattern.

    The pass is rotated at the positions of the first block; the queries and keys of a block that stands elsewhere in
    its stream are turned on by the difference, so each cache holds keys at its own positions.
    """

    def __init__(self, generators: Sequence[ChunkGenerator], blocks: Sequence[OpenBlock]) -> None:
        first = generators[0].cache
        self._blocks = blocks
        self._batches = [len(generator.keys) for generator in generators]
        self._turns = [
            time_shift_table(gap, first.shape.config.rotary_dims, first.keys.device) if gap else None
            for gap in (generator.cache.next_position - first.next_position for generator in generators)
        ]

    def positions(self, frames: int) -> Tensor:
        return self._blocks[0].positions(frames)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        outputs = []
        parts = zip(*(tensor.split(self._batches) for tensor in (query, key, value)), strict=True)
        for block, turn, (q, k, v) in zip(self._blocks, self._turns, parts, strict=True):
            if turn is not None:
                q, k = ops.rotate(q, *turn), ops.rotate(k, *turn)
            outputs.append(block.attend(layer, q, k, v))
        return torch.cat(outputs)


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
