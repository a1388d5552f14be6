"""Wan's causal video VAE with an explicit streaming state.

Weights and modules are diffusers' `AutoencoderKLWan` (Wan technical report, arXiv 2503.20314, section 4.1).
The traversal is ours: diffusers walks a clip latent by latent and hides what it remembers in a list; here a
chunk of any number of latents goes through every layer at once, and what the next chunk needs is returned.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AutoencoderKLWan,
    WanAttentionBlock,
    WanResample,
    WanResidualBlock,
    patchify,
    unpatchify,
)
from torch import Tensor, nn
from torch.nn import functional as F

LOGVAR_RANGE = (-30.0, 20.0)  # of the posterior, as in latent diffusion's VAE (arXiv 2112.10752)


@dataclass(frozen=True)
class VAEState:
    """What one stream (or a batch of streams in step) remembers between two chunks.

    contexts: for each causal layer, in traversal order, the last input frames [B, C, 1 or 2, H, W] of the
        chunks before; zeros where the stream is shorter than that.
    latents_seen: latent frames that went through so far, at least 1. Its size never changes along a stream.
    """

    contexts: tuple[Tensor, ...]
    latents_seen: int

    def bytes(self) -> int:
        """Memory of the contexts."""
        return sum(context.numel() * context.element_size() for context in self.contexts)

    def detach(self) -> "VAEState":
        """The same state, cut from the graph of the chunks before."""
        return VAEState(tuple(context.detach() for context in self.contexts), self.latents_seen)

    def to(self, device: torch.device | str) -> "VAEState":
        return VAEState(tuple(context.to(device) for context in self.contexts), self.latents_seen)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that safetensors can save: `latents_seen` and `context.0`, `context.1`, ..."""
        tensors = {f"context.{index}": context.contiguous() for index, context in enumerate(self.contexts)}
        return {"latents_seen": torch.tensor(self.latents_seen), **tensors}

    @classmethod
    def from_state_dict(cls, tensors: dict[str, Tensor]) -> "VAEState":
        """Inverse of `state_dict`; ValueError names a key that is missing."""
        names = ["latents_seen", *(f"context.{index}" for index in range(len(tensors) - 1))]
        missing = [name for name in names if name not in tensors]
        if missing:
            raise ValueError(f"VAE state: {missing[0]} is missing among {len(tensors)} tensors")
        return cls(tuple(tensors[name] for name in names[1:]), int(tensors["latents_seen"]))


class _Pass:
    """One chunk's way through the network: hands each layer its context and keeps the layer's next one."""

    def __init__(self, state: VAEState | None) -> None:
        self.first = state is None
        self.after: list[Tensor] = []
        self._before = iter(state.contexts if state else ())

    def extend(self, x: Tensor, frames: int) -> Tensor:
        """x [B, C, T, H, W] behind its `frames` frames of context: [B, C, frames + T, H, W]."""
        batch, channels, _, height, width = x.shape
        context = x.new_zeros(batch, channels, frames, height, width) if self.first else next(self._before)
        extended = torch.cat([context, x], dim=2)
        self.keep(extended, frames)
        return extended

    def keep(self, x: Tensor, frames: int) -> None:
        """Remember the last frames of x. A copy: a view would hold the whole chunk in memory."""
        self.after.append(x[:, :, -frames:].clone(memory_format=torch.contiguous_format))

    def state(self, latents_seen: int) -> VAEState:
        assert next(self._before, None) is None, "a layer did not take its context"
        return VAEState(tuple(self.after), latents_seen)


def _conv(conv: nn.Conv3d, x: Tensor, chunk: _Pass) -> Tensor:
    """[B, C, T, H, W] -> [B, C', T, H, W]: a kernel of k frames sees a frame and the k-1 before it."""
    frames, height, width = conv.kernel_size
    if frames > 1:
        x = chunk.extend(x, frames - 1)
    return F.conv3d(x, conv.weight, conv.bias, padding=(0, height // 2, width // 2))


def _norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    """SiLU of the RMS norm over channels; the sum of squares is taken in fp32 whatever x is."""
    gamma, scale = cast(Tensor, norm.gamma), cast(float, norm.scale)
    mean_square = x.float().square().sum(dim=1, keepdim=True) / scale**2
    return F.silu(x * mean_square.clamp_min(1e-24).rsqrt().to(x.dtype) * gamma.to(x.dtype))


def _residual(block: Any, x: Tensor, chunk: _Pass) -> Tensor:
    """Two convolutions beside a shortcut; the shortcut is a 1×1×1 convolution where the channels change."""
    hidden = _conv(block.conv1, _norm_silu(block.norm1, x), chunk)
    hidden = _conv(block.conv2, block.dropout(_norm_silu(block.norm2, hidden)), chunk)
    return cast(Tensor, block.conv_shortcut(x)) + hidden


def _per_frame(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a module of images to every frame of x [B, C, T, H, W]."""
    frames = cast(Tensor, module(x.transpose(1, 2).flatten(0, 1)))
    return frames.reshape(*x.shape[:1], -1, *frames.shape[1:]).transpose(1, 2)


def _double_frames(time_conv: nn.Conv3d, x: Tensor, chunk: _Pass) -> Tensor:
    """T frames -> 2T. The stream's first frame stays single, and later frames do not see it."""
    head, tail = (x[:, :, :1], x[:, :, 1:]) if chunk.first else (x[:, :, :0], x)
    extended = chunk.extend(tail, time_conv.kernel_size[0] - 1)
    if not tail.shape[2]:
        return head
    pairs = F.conv3d(extended, time_conv.weight, time_conv.bias)
    pairs = pairs.reshape(len(x), 2, -1, *pairs.shape[2:])
    doubled = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
    return torch.cat([head, doubled], dim=2) if chunk.first else doubled


def _halve_frames(time_conv: nn.Conv3d, x: Tensor, chunk: _Pass) -> Tensor:
    """2T frames -> T. The stream's first frame passes as it is, and is the context of the ones after it."""
    if not chunk.first:
        return F.conv3d(chunk.extend(x, 1), time_conv.weight, time_conv.bias, time_conv.stride)
    chunk.keep(x, 1)
    if x.shape[2] == 1:
        return x
    halved = F.conv3d(x, time_conv.weight, time_conv.bias, time_conv.stride)
    return torch.cat([x[:, :, :1], halved], dim=2)


def _resample(block: Any, x: Tensor, chunk: _Pass) -> Tensor:
    """Change the size by 2, in space and, for the 3d modes, in time."""
    if block.mode == "upsample3d":
        x = _double_frames(block.time_conv, x, chunk)
    x = _per_frame(block.resample, x)
    return _halve_frames(block.time_conv, x, chunk) if block.mode == "downsample3d" else x


def _layers(layers: Sequence[nn.Module], x: Tensor, chunk: _Pass) -> Tensor:
    for layer in layers:
        if isinstance(layer, WanResidualBlock):
            x = _residual(layer, x, chunk)
        elif isinstance(layer, WanResample):
            x = _resample(layer, x, chunk)
        else:
            assert isinstance(layer, WanAttentionBlock), type(layer)
            x = layer(x)  # attention inside each frame: nothing to remember
    return x


def _head(network: Any, x: Tensor, chunk: _Pass) -> Tensor:
    """The last layers of the encoder or the decoder."""
    return _conv(network.conv_out, _norm_silu(network.norm_out, x), chunk)


def _mid(block: Any, x: Tensor, chunk: _Pass) -> Tensor:
    layers = [block.resnets[0]]
    for attention, residual in zip(block.attentions, block.resnets[1:], strict=True):
        layers += [attention, residual]
    return _layers(layers, x, chunk)


def _down(block: Any, x: Tensor, chunk: _Pass) -> Tensor:
    """A stage of Wan2.2's encoder: Wan2.1's layers beside an average of the input."""
    resamplers = [] if block.downsampler is None else [block.downsampler]
    return _layers([*block.resnets, *resamplers], x, chunk) + cast(Tensor, block.avg_shortcut(x))


def _up(block: Any, x: Tensor, chunk: _Pass, is_residual: bool) -> Tensor:
    """A stage of the decoder; Wan2.2's repeats its input beside the layers."""
    if not is_residual:
        return _layers([*block.resnets, *(block.upsamplers or ())], x, chunk)
    if block.upsampler is None:
        return _layers(block.resnets, x, chunk)
    shortcut = cast(Tensor, block.avg_shortcut(x, first_chunk=chunk.first))
    return _layers([*block.resnets, block.upsampler], x, chunk) + shortcut


def _check_config(config: dict[str, Any]) -> None:
    """The fields of `vae/config.json` that must agree; those left out have diffusers' defaults."""
    parameters = inspect.signature(cast(Any, AutoencoderKLWan).__init__).parameters
    config = {name: parameter.default for name, parameter in parameters.items()} | config
    stages = len(config["dim_mult"]) - 1
    if len(config["temperal_downsample"]) != stages:
        raise ValueError(f"vae config: temperal_downsample must have {stages} entries (dim_mult less one)")
    patch_size = config["patch_size"] or 1
    expected = {
        "in_channels": 3 * patch_size**2,
        "out_channels": 3 * patch_size**2,
        "scale_factor_temporal": 2 ** sum(config["temperal_downsample"]),
        "scale_factor_spatial": 2**stages * patch_size,
    }
    for field, value in expected.items():
        if config[field] != value:
            raise ValueError(f"vae config: the other fields want {field} = {value}, got {config[field]}")
    for field in ("latents_mean", "latents_std"):
        if len(config[field]) != config["z_dim"]:
            raise ValueError(f"vae config: {field} must have z_dim = {config['z_dim']} entries")


class StreamingVAE(nn.Module):
    """`AutoencoderKLWan` for chunks of any length, differentiable, with [B, F, C, H, W] at the edges.

    The first latent frame stands for one pixel frame, every later one for `temporal_factor` frames. A chunk
    is computed at once, so its length sets the memory of activations; the state has a fixed size. Stream
    under `torch.no_grad()`: with gradients on, the state holds the graph of the chunks before.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        self.vae = vae
        self.config: dict[str, Any] = dict(vae.config)
        _check_config(self.config)
        self.patch_size: int = self.config["patch_size"] or 1
        self.temporal_factor: int = self.config["scale_factor_temporal"]
        self.spatial_factor: int = self.config["scale_factor_spatial"]

    @classmethod
    def from_pretrained(cls, folder: Path, dtype: torch.dtype = torch.float32) -> "StreamingVAE":
        """Load a `vae/` folder of the diffusers layout; FileNotFoundError where it has no config."""
        if not (Path(folder) / "config.json").is_file():
            raise FileNotFoundError(f"{folder}: a VAE folder of the diffusers layout must have a config.json")
        load = cast(Any, AutoencoderKLWan).from_pretrained
        return cls(load(str(folder), torch_dtype=dtype, use_safetensors=True, local_files_only=True))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "StreamingVAE":
        """Random weights; `config` as in diffusers' `vae/config.json`; ValueError where it is amiss."""
        _check_config(config)
        return cls(cast(Any, AutoencoderKLWan).from_config(config))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and of the pixels that `decode` returns."""
        return self.vae.post_quant_conv.weight.dtype

    def _statistic(self, field: str, like: Tensor) -> Tensor:
        """latents_mean or latents_std as fp32 [C, 1, 1]; no buffer: casting the module must not round it."""
        return torch.tensor(self.config[field], dtype=torch.float32, device=like.device).view(-1, 1, 1)

    def decode(self, latents: Tensor, state: VAEState | None = None) -> tuple[Tensor, VAEState]:
        """Latents to pixels, going on from `state`.

        latents: [B, n, C, h, w], normalised.
        returns: pixels [B, T, 3, H, W] in [-1, 1], with T = 1 + temporal_factor·(n-1) for the first chunk of
            a stream (`state` None) and temporal_factor·n after it; and the state for the next chunk.
        raises: ValueError where the latents do not fit the network or the state.
        """
        self._check_latents(latents)
        mean, std = self._statistic("latents_mean", latents), self._statistic("latents_std", latents)
        pixels, state = self._decode(latents.float() * std + mean, state)
        return pixels.clamp(-1.0, 1.0), state

    def decode_raw(self, latents: Tensor) -> Tensor:
        """A whole clip from un-normalised latents [B, n, C, h, w]; pixels [B, T, 3, H, W] are not clamped."""
        self._check_latents(latents)
        return self._decode(latents, None)[0]

    def encode(self, pixels: Tensor, state: VAEState | None = None) -> tuple[Tensor, VAEState]:
        """Pixels to the posterior's mean, going on from `state`.

        pixels: [B, T, 3, H, W] in [-1, 1], with T = 1 + temporal_factor·k for the first chunk of a stream
            and temporal_factor·k after it.
        returns: normalised latents [B, n, C, h, w] in fp32, never sampled, and the state for the next chunk.
        raises: ValueError where the number of frames or the size does not fit.
        """
        moments, state = self._encode(pixels, state)
        mean = moments.chunk(2, dim=2)[0].float()
        return (mean - self._statistic("latents_mean", mean)) / self._statistic("latents_std", mean), state

    def encode_moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of a whole clip's posterior, un-normalised, each [B, n, C, h, w]."""
        mean, logvar = self._encode(pixels, None)[0].chunk(2, dim=2)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def bytes_per_stream(self, height: int, width: int, batch: int = 1) -> int:
        """Memory of a decoding state at `height` × `width` pixels, known before any stream starts."""
        latents, _ = self._meta_clip(height, width, batch)
        return self._meta_twin()._decode(latents, None)[1].bytes()

    def encoder_bytes_per_stream(self, height: int, width: int, batch: int = 1) -> int:
        """Memory of an encoding state at `height` × `width` pixels."""
        _, pixels = self._meta_clip(height, width, batch)
        return self._meta_twin()._encode(pixels, None)[1].bytes()

    def _meta_twin(self) -> "StreamingVAE":
        """The same network without memory: shapes and types are computed, values are not."""
        with torch.device("meta"):
            return StreamingVAE.from_config(self.config).to(self.dtype)

    def _meta_clip(self, height: int, width: int, batch: int) -> tuple[Tensor, Tensor]:
        pixels = torch.empty(batch, 1, 3, height, width, dtype=self.dtype, device="meta")
        self._check_size(pixels)
        size = (height // self.spatial_factor, width // self.spatial_factor)
        return torch.empty(batch, 1, self.config["z_dim"], *size, dtype=self.dtype, device="meta"), pixels

    def _check_size(self, pixels: Tensor) -> None:
        if pixels.ndim != 5 or pixels.shape[2] != 3:
            raise ValueError(f"pixels: expected [B, T, 3, H, W], got {list(pixels.shape)}")
        if pixels.shape[-2] % self.spatial_factor or pixels.shape[-1] % self.spatial_factor:
            size = f"{pixels.shape[-2]}x{pixels.shape[-1]}"
            raise ValueError(f"pixels: sides must be multiples of {self.spatial_factor}, got {size}")

    def _check_latents(self, latents: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[2] != self.config["z_dim"] or not latents.shape[1]:
            size = f"[B, n, {self.config['z_dim']}, h, w]"
            raise ValueError(f"latents: expected {size}, got {list(latents.shape)}")

    def _check_state(self, state: VAEState | None, x: Tensor) -> None:
        """x: [B, C, T, h, w] as it enters the first convolution, whose context must be of the same kind."""
        if state is None:
            return
        found, expected = state.contexts[0].shape, (*x.shape[:2], 2, *x.shape[3:])
        if found != expected:
            raise ValueError(f"VAE state: expected a first context of {[*expected]}, got {[*found]}")

    def _decode(self, raw: Tensor, state: VAEState | None) -> tuple[Tensor, VAEState]:
        x = self.vae.post_quant_conv(raw.to(self.dtype).transpose(1, 2))
        self._check_state(state, x)
        chunk, network = _Pass(state), self.vae.decoder
        x = _mid(network.mid_block, _conv(network.conv_in, x, chunk), chunk)
        for block in network.up_blocks:
            x = _up(block, x, chunk, self.config["is_residual"])
        pixels = cast(Any, unpatchify)(_head(network, x, chunk), self.patch_size)
        return pixels.transpose(1, 2), chunk.state(raw.shape[1] + (state.latents_seen if state else 0))

    def _encode(self, pixels: Tensor, state: VAEState | None) -> tuple[Tensor, VAEState]:
        self._check_size(pixels)
        frames, factor = pixels.shape[1], self.temporal_factor
        new, rest = divmod(frames - 1, factor) if state is None else divmod(frames, factor)
        if rest or not frames:
            rule = f"1 + {factor}k in the first chunk" if state is None else f"{factor}k in a later chunk"
            raise ValueError(f"pixels: the number of frames must be {rule}, got {frames}")
        x = cast(Any, patchify)(pixels.to(self.dtype).transpose(1, 2).contiguous(), self.patch_size)
        self._check_state(state, x)
        chunk, network = _Pass(state), self.vae.encoder
        x = _conv(network.conv_in, x, chunk)
        for block in network.down_blocks:
            x = _down(block, x, chunk) if self.config["is_residual"] else _layers([block], x, chunk)
        x = self.vae.quant_conv(_head(network, _mid(network.mid_block, x, chunk), chunk))
        return x.transpose(1, 2), chunk.state(new + (state.latents_seen if state else 1))
