"""The encoder: clips of pixels to the VAE's latents, and captions to text embeddings, in batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ..kernels.clips import Pixels
from ..kernels.wan.text import TextEncoder
from ..kernels.wan.vae import StreamingVAE, VAEState
from ..kernels.wan.weights import read_json
from .model_files import digest
from .pretraining import to_pixels

STORED: Final = torch.float16  # of latents: normalised, they lie within a few units, where it is finer than bfloat16
PRECISIONS: Final = {"cpu": "float32", "cuda": "bfloat16"}  # of the arithmetic, by kind of device
LATENTS_AT_ONCE: Final = 4  # latent frames that go through the VAE together: memory does not grow with the clip
TEXT_PARTS: Final = ("text_encoder", "tokenizer")


class Encoder:
    """A VAE and, where asked for, a text encoder, on one device.

    precision: "float32", or "bfloat16" for autocast over float32 weights. The result for a clip depends in the last
    bits on which others are in its batch.
    """

    def __init__(self, vae: StreamingVAE, text: TextEncoder | None = None, *, precision: str = "float32") -> None:
        self.vae = vae.requires_grad_(False).eval()
        self.text = text.requires_grad_(False).eval() if text else None
        self.device = next(vae.parameters()).device
        self._precision = precision

    @classmethod
    def from_pretrained(cls, model: Path, device: str = "cpu", *, with_text: bool = False) -> "Encoder":
        """model: a VAE's folder in the diffusers layout, or a whole model's; text needs a whole model's.

        The arithmetic is that of `PRECISIONS`. FileNotFoundError or ValueError names what is missing.
        """
        kind = torch.device(device).type
        vae = StreamingVAE.from_pretrained(vae_folder(model)).to(device)
        text = None
        if with_text:
            text = TextEncoder.from_pretrained(model, dtype=torch.float32 if kind == "cpu" else None).to(device)
        return cls(vae, text, precision=PRECISIONS[kind])

    @torch.no_grad()
    def encode(self, clips: Sequence[Pixels]) -> Tensor:
        """Latents [B, F, C, h, w], normalised by the VAE's mean and deviation, float16, on the CPU.

        clips: uint8 [T, H, W, 3] each, T = 1 + 4k. The posterior's mean is kept, nothing is sampled.
        """
        video = torch.from_numpy(np.stack(clips)).to(self.device)
        step = LATENTS_AT_ONCE * self.vae.temporal_factor
        parts: list[Tensor] = []
        state: VAEState | None = None
        for stop in range(1 + step, video.shape[1] + step, step):
            start = 0 if state is None else stop - step
            with self._autocast():
                latents, state = self.vae.encode(to_pixels(video[:, start:stop]), state)
            parts.append(latents)
        return torch.cat(parts, dim=1).to(STORED).cpu()

    @torch.no_grad()
    def embed(self, captions: Sequence[str]) -> list[Tensor]:
        """Each caption's own rows of text embeddings [n, D], without padding, float16, on the CPU."""
        assert self.text is not None, "the encoder was made without a text encoder"
        ids, mask = self.text.tokenize(captions)
        with self._autocast():
            rows = self.text.embed(ids, mask).rows.to(STORED).cpu()
        return [row[:length] for row, length in zip(rows, mask.sum(dim=1).tolist(), strict=True)]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._precision == "bfloat16")


def vae_folder(model: Path) -> Path:
    """The VAE's folder of a model, or the folder itself where it is a VAE's. FileNotFoundError where it is neither."""
    for folder in (model / "vae", model):
        config = folder / "config.json"
        if config.is_file() and "z_dim" in read_json(config):
            if not any(folder.glob("*.safetensors")):
                raise FileNotFoundError(f"{folder}: no .safetensors file; weights are read from nothing else")
            return folder
    raise FileNotFoundError(f"{model}: neither a VAE's folder nor a model's: no config.json of a VAE in it or in vae/")


def latents_shape(model: Path, height: int, width: int, frames: int) -> tuple[int, int, int, int]:
    """[F, C, h, w] of the latents of a clip of `frames` pixel frames. ValueError names the rule for other sizes."""
    config = read_json(vae_folder(model) / "config.json")
    # Wan2.1's VAE, whose config does not name its factors, has diffusers' defaults.
    temporal, spatial = config.get("scale_factor_temporal", 4), config.get("scale_factor_spatial", 8)
    for name, size in (("height", height), ("width", width)):
        if size % spatial:
            raise ValueError(f"clip.{name}: must be a multiple of the VAE's {spatial}, got {size}")
    if (frames - 1) % temporal:
        raise ValueError(f"clip.frames: must be 1 + a multiple of {temporal}, got {frames}")
    return 1 + (frames - 1) // temporal, config["z_dim"], height // spatial, width // spatial


def text_dim(model: Path) -> int:
    """Width of a model's text embeddings. FileNotFoundError where it has no text encoder."""
    for part in TEXT_PARTS:
        if not (model / part).is_dir():
            raise FileNotFoundError(
                f"{model / part}: no such folder; text embeddings need a whole model, not a VAE alone"
            )
    width: int = read_json(model / "text_encoder" / "config.json")["d_model"]
    return width


def vae_digest(model: Path) -> str:
    """sha256 over the VAE's config and weights."""
    folder = vae_folder(model)
    return digest(folder, [folder / "config.json", *folder.glob("*.safetensors")])


def text_digest(model: Path) -> str:
    """sha256 over every file of the text encoder and the tokenizer."""
    return digest(model, [file for part in TEXT_PARTS for file in (model / part).rglob("*") if file.is_file()])
