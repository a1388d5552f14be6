"""What the files of a teacher say without its weights being loaded: its identity, its latents, its memory."""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open

from ..kernels.wan.config import TransformerConfig
from ..kernels.wan.weights import read_json

NEEDED: Final = (
    "transformer/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
)
DECISIVE: Final = ("transformer", "text_encoder", "tokenizer")  # the parts that decide a velocity
NETWORKS: Final = ("transformer", "text_encoder", "vae")
BYTES_PER_PARAMETER: Final = 4  # weights are loaded in float32
WORTH_CACHING: Final = 16 << 20  # bytes of a file: a smaller one is hashed in a few hundredths of a second
SETTLED_SECONDS: Final = 5.0  # a file younger than this may still change within its time stamp


def check_model(folder: Path) -> None:
    """Raises FileNotFoundError, naming the file, unless this is a whole model in the diffusers layout."""
    for name in NEEDED:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: no such file; a teacher is a model in the diffusers layout")
    for network in NETWORKS:
        if not any((folder / network).glob("*.safetensors")):
            raise FileNotFoundError(f"{folder / network}: no .safetensors file; weights are read from nothing else")


def transformer_config(folder: Path) -> TransformerConfig:
    """The transformer's sizes. ValueError names the file."""
    path = folder / "transformer" / "config.json"
    try:
        return TransformerConfig.from_diffusers(read_json(path))
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: {error}") from None


def latents_shape(folder: Path, height: int, width: int, frames: int) -> tuple[int, int, int, int]:
    """[F, C, H, W] of the latents of a clip of `frames` pixel frames of `height` × `width`.

    Raises ValueError, naming the rule, for a size that the VAE or the transformer's patch does not divide.
    """
    vae, config = read_json(folder / "vae" / "config.json"), transformer_config(folder)
    # Wan2.1's VAE, whose config does not name its factors, has diffusers' defaults.
    temporal, spatial = vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)
    _, *patch = config.patch_size
    for name, size, side in (("height", height, patch[0]), ("width", width, patch[1])):
        if size % (spatial * side):
            rule = f"{spatial * side} (the VAE's {spatial} times the patch's {side})"
            raise ValueError(f"clip.{name}: must be a multiple of {rule}, got {size}")
    if (frames - 1) % temporal:
        raise ValueError(f"clip.frames: must be 1 + a multiple of {temporal}, got {frames}")
    return 1 + (frames - 1) // temporal, config.in_channels, height // spatial, width // spatial


def loading_bytes(folder: Path) -> int:
    """Host memory, in bytes, that loading the model takes at its peak: the transformer stands there twice then."""
    return max(2 * BYTES_PER_PARAMETER * parameters(folder / "transformer"), weights_bytes(folder))


def weights_bytes(folder: Path) -> int:
    """What the model takes on its device before it does anything."""
    return sum(BYTES_PER_PARAMETER * parameters(folder / network) for network in NETWORKS)


def velocity_digest(folder: Path) -> str:
    """sha256 over every file that decides the model's velocity: transformer, text encoder, tokenizer."""
    return digest(folder, [file for part in DECISIVE for file in (folder / part).rglob("*") if file.is_file()])


def digest(folder: Path, files: Iterable[Path]) -> str:
    """sha256 over these files of a folder and their names in it.

    Hashes of large files are remembered in the user's cache folder, by path, size and times.
    """
    content = [[file.relative_to(folder).as_posix(), _sha256(file)] for file in sorted(files)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def parameters(folder: Path) -> int:
    """Elements of all tensors in the safetensors files of a network's folder, from their headers."""
    return sum(_tensor_sizes(file) for file in folder.glob("*.safetensors"))


def _tensor_sizes(file: Path) -> int:
    count = 0
    try:
        with safe_open(file, "numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 -- not a dict
                size = 1
                for side in tensors.get_slice(name).get_shape():
                    size *= side
                count += size
    except SafetensorError as error:
        raise ValueError(f"{file}: truncated or damaged safetensors file ({error})") from None
    return count


def _sha256(file: Path) -> str:
    stat = file.stat()
    if stat.st_size < WORTH_CACHING:
        return _hash(file)
    identity = [str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    remembered = _cache_folder() / hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    if remembered.is_file():
        return remembered.read_text()
    digest = _hash(file)
    if time.time() - stat.st_mtime > SETTLED_SECONDS:
        _remember(remembered, digest)
    return digest


def _hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "reelway" / "sha256"


def _remember(path: Path, digest: str) -> None:
    # Where nothing may be written, the next run hashes again.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(digest)
        os.replace(file.name, path)
