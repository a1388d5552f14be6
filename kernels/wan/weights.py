"""Checkpoints of Wan2.1 transformers: diffusers' folder layout, and files in Wan's original tensor names.

In memory a state dict always has diffusers' names. Every reader checks each name and shape against the
configuration, and every writer lets the result appear whole or not at all.
"""

import contextlib
import json
import os
import pickle
import re
import shutil
import uuid
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .config import TransformerConfig
from .tensors import (
    Naming,
    State,
    check_shapes,
    expected_shapes,
    from_original,
    infer_config,
    naming_of,
    refuse_image_tensors,
    to_original,
    unwrapped,
)

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
INDEX_FILE = WEIGHTS_FILE + ".index.json"
NETWORK_KEYS = ("generator_ema", "generator", "critic")
MAX_SHARD_BYTES = 10 * 10**9
_FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names


@dataclass(frozen=True)
class StoredNetwork:
    """One transformer of a file: the key it lies under, how its tensors are named there, config and state."""

    key: str
    naming: Naming
    config: TransformerConfig
    state: State


def load_into(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state` into `module`, every tensor or none; ValueError names the first that does not fit."""
    check_shapes({name: tensor.shape for name, tensor in module.state_dict().items()}, state)
    module.load_state_dict(state, strict=True)


def read_checkpoint(
    path: str | os.PathLike[str],
    prefer: Sequence[str] = ("generator_ema", "generator"),
    head_dim: int | None = None,
) -> tuple[TransformerConfig, State]:
    """Read a transformer from a file of CausVid, Self-Forcing, LongLive, Wan or diffusers.

    path: `.pt`/`.pth` (networks under keys, or one flat state dict, which counts as "generator"), or
        `.safetensors`; tensor names are Wan's or diffusers', with or without wrapper prefixes.
    prefer: keys in order of preference; the first that the file has is read. Self-Forcing publishes the
        figures of its moving average, "generator_ema" (arXiv 2506.08009).
    head_dim: see `infer_config`.

    Returns the configuration that the shapes imply, and the state in diffusers' names. The tensors may be
    mapped from the file. Raises FileNotFoundError, or ValueError in one line.
    """
    path = Path(path)
    contents = _contents(path)
    key = next((key for key in prefer if key in contents), None)
    if key is None:
        raise ValueError(f"{path}: no network under {' or '.join(prefer)}, found {', '.join(contents) or 'none'}")
    found = _network(path, key, contents[key], head_dim)
    return found.config, found.state


def list_networks(path: str | os.PathLike[str], head_dim: int | None = None) -> list[StoredNetwork]:
    """Every network of a file, or the one of a folder in diffusers' layout; errors as `read_checkpoint`."""
    path = Path(path)
    if path.is_dir():
        return [StoredNetwork("transformer", "diffusers", *read_transformer(path))]
    contents = _contents(path)
    if not contents:
        raise ValueError(f"{path}: no network under any of {', '.join(NETWORK_KEYS)}")
    return [_network(path, key, content, head_dim) for key, content in contents.items()]


def _network(path: Path, key: str, content: Mapping[str, Any], head_dim: int | None) -> StoredNetwork:
    with _about(path):
        for name, value in content.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"tensor {name}: not a tensor but {type(value).__name__}")
        plain = unwrapped(content)
        refuse_image_tensors(plain)
        naming = naming_of(plain)
        state = from_original(plain) if naming == "original" else plain
        config = infer_config(state, head_dim)
        check_shapes(expected_shapes(config), state)
    return StoredNetwork(key, naming, config, state)


def _contents(path: Path) -> dict[str, Mapping[str, Any]]:
    """The networks of a file by key, unchecked."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    if path.suffix == ".safetensors":
        return {"generator": _load_safetensors(path)}
    if path.suffix not in (".pt", ".pth"):
        raise ValueError(f"{path}: a checkpoint file ends in .pt, .pth or .safetensors")
    content = _load_pickle(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a state dict or networks under keys, found {type(content).__name__}")
    networks = {key: content[key] for key in NETWORK_KEYS if isinstance(content.get(key), Mapping)}
    if not networks and any(isinstance(value, Tensor) for value in content.values()):
        return {"generator": content}
    return networks


def _load_pickle(path: Path) -> Any:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: truncated, or not a PyTorch checkpoint")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it holds {code.group(1)}" if code else "its pickle is damaged or holds code"
        raise ValueError(f"{path}: refused, only tensors are read from a pickle and {what}") from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: damaged PyTorch checkpoint") from error


def _load_safetensors(path: Path) -> State:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or damaged safetensors file") from error


def write_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Tensor], naming: Naming = "original") -> None:
    """Write `state` (diffusers' names) for other code bases, as one file that appears whole or not at all.

    `.pt`/`.pth`: {"generator": {"model.<name>": tensor}}, which CausVid, Self-Forcing and LongLive load;
    `.safetensors`: a flat file, which Wan's code loads. An existing file is replaced.
    """
    path = Path(path)
    if path.suffix not in (".pt", ".pth", ".safetensors"):
        raise ValueError(f"{path}: a checkpoint file ends in .pt, .pth or .safetensors")
    named = to_original(state) if naming == "original" else dict(state)
    with _appearing(path) as staged:
        if path.suffix == ".safetensors":
            _save(named, staged)
            return
        # Through a file object: given a path, torch would write the temporary name into the archive.
        with staged.open("wb") as file:
            torch.save({"generator": {f"model.{name}": _owned(tensor) for name, tensor in named.items()}}, file)


def transformer_folder(folder: str | os.PathLike[str]) -> Path:
    """`folder` itself if it holds a config.json, else its `transformer/`; FileNotFoundError without one."""
    folder = Path(folder)
    for candidate in (folder, folder / "transformer"):
        if (candidate / "config.json").is_file():
            return candidate
    raise FileNotFoundError(f"{folder / 'transformer' / 'config.json'}: no such file; not a model in diffusers' layout")


def read_transformer(folder: str | os.PathLike[str]) -> tuple[TransformerConfig, State]:
    """Read the transformer of a model folder in diffusers' layout, in one safetensors file or in shards.

    folder: the model's folder, or its `transformer/`. The tensors may be mapped from the files.
    Raises FileNotFoundError, or ValueError that names the file, the tensor or the field.
    """
    folder = transformer_folder(folder)
    config = _read_config(folder / "config.json")
    state: State = {}
    for file in _weight_files(folder):
        state |= _load_safetensors(file)
    with _about(folder):
        refuse_image_tensors(state)
        check_shapes(expected_shapes(config), state)
    return config, state


class StoredTransformer:
    """The transformer of a model folder, its tensors read one at a time: what fills a network without a second copy.

    folder: as for `read_transformer`, with its errors; names, shapes and types are checked from the files' headers.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = transformer_folder(folder)
        self.config = _read_config(self._folder / "config.json")
        self._file_of: dict[str, Path] = {}
        known: State = {}
        for file in _weight_files(self._folder):
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 -- not a dict
                    stored = tensors.get_slice(name)
                    dtype = torch.float32 if stored.get_dtype() in _FLOATS else torch.int64
                    known[name] = torch.empty(stored.get_shape(), dtype=dtype, device="meta")
                    self._file_of[name] = file
        with _about(self._folder):
            refuse_image_tensors(known)
            check_shapes(expected_shapes(self.config), known)

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored, on the CPU; it may be mapped from the file."""
        with _opened(self._file_of[name]) as tensors:
            return cast(Tensor, tensors.get_tensor(name))


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file}: truncated or damaged safetensors file") from error


def _read_config(path: Path) -> TransformerConfig:
    content = read_json(path)
    with _about(path):
        kind = content.get("_class_name", "WanTransformer3DModel")
        if kind != "WanTransformer3DModel":
            raise ValueError(f"_class_name: must be WanTransformer3DModel, got {kind}")
        if content.get("image_dim") is not None:
            raise ValueError(f"image_dim: image-to-video variants are not supported, got {content['image_dim']}")
        for field in ("num_attention_heads", "attention_head_dim", "ffn_dim", "num_layers"):
            if not isinstance(content.get(field), int):
                raise ValueError(f"{field}: must be a whole number, got {content.get(field)!r}")
        return TransformerConfig.from_diffusers(content)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder; ValueError in one line."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object, found {type(content).__name__}")
    return content


def _weight_files(folder: Path) -> list[Path]:
    names = {WEIGHTS_FILE}
    if (folder / INDEX_FILE).is_file():
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or any(Path(str(name)).name != name for name in weight_map.values()):
            raise ValueError(f"{folder / INDEX_FILE}: weight_map must give file names of the same folder")
        names = set(weight_map.values())
    for name in sorted(names):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: no such file")
    return [folder / name for name in sorted(names)]


def write_transformer(
    folder: str | os.PathLike[str],
    config: TransformerConfig,
    state: Mapping[str, Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write `folder`/transformer in diffusers' layout, in shards where it is larger than `max_shard_bytes`.

    The folder appears whole or not at all; an existing `transformer/` is replaced as a whole. Tensors keep
    their precision. Returns the path of `transformer/`. Raises ValueError where the state does not fit.
    """
    expected = expected_shapes(config)
    check_shapes(expected, state)
    target = Path(folder) / "transformer"
    with _appearing(target) as staged:
        staged.mkdir()
        (staged / "config.json").write_text(json.dumps(config.to_diffusers(), indent=2) + "\n", encoding="utf-8")
        _write_shards(staged, {name: state[name] for name in expected}, max_shard_bytes)
    return target


def _write_shards(folder: Path, state: State, max_shard_bytes: int) -> None:
    shards: list[State] = [{}]
    for name, tensor in state.items():
        if shards[-1] and _bytes(shards[-1]) + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        _save(state, folder / WEIGHTS_FILE)
        return
    weight_map: dict[str, str] = {}
    stem, suffix = WEIGHTS_FILE.rsplit(".", 1)
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}"
        _save(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": _bytes(state)}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save(state: State, path: Path) -> None:
    path.touch()
    mode = path.stat().st_mode  # as the umask says; safetensors would leave a file that only its owner reads
    save_file({name: _owned(tensor) for name, tensor in state.items()}, path, metadata={"format": "pt"})
    path.chmod(mode)


def _bytes(state: State) -> int:
    return sum(tensor.nbytes for tensor in state.values())


def _owned(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and alone in its storage: a view would drag its whole storage into the file."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


@contextlib.contextmanager
def _about(path: Path) -> Iterator[None]:
    """Put the file's name before a ValueError of the body."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that takes its name if the body succeeds, and vanishes if it fails."""
    missing = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        yield staged
        for path in (staged, *staged.glob("*")):
            _sync(path)
        _take_name(staged, target)
    except BaseException:
        _remove(staged)
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _take_name(staged: Path, target: Path) -> None:
    if not staged.is_dir() or not target.exists():
        staged.replace(target)
        return
    old = staged.with_name(staged.name + ".old")  # a folder cannot be renamed onto one that is not empty
    target.rename(old)
    try:
        staged.rename(target)
    except OSError:
        old.rename(target)
        raise
    _remove(old)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
