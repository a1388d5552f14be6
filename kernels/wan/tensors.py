"""The tensors of a Wan2.1 transformer: their names in Wan's code and in diffusers, and their shapes."""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from .config import CONFIGS, TransformerConfig

Naming = Literal["original", "diffusers"]
State = dict[str, Tensor]

WAN_HEAD_DIM = 128

# Modules and free parameters outside the blocks: Wan's name, then diffusers' name.
_ROOT_NAMES = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_PROJECTIONS = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
# Wan numbers a block's norms by age, diffusers by order of execution: the affine norm before cross-attention
# is norm3 there and norm2 here.
_BLOCK_NAMES = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{f"self_attn.{wan}": f"attn1.{name}" for wan, name in _PROJECTIONS.items()},
    **{f"cross_attn.{wan}": f"attn2.{name}" for wan, name in _PROJECTIONS.items()},
}
_PREFIXES = frozenset({"model", "module", "diffusion_model"})
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})
_IMAGE_TENSOR = re.compile(r"(^|\.)(img_emb|image_embedder|k_img|v_img|norm_k_img|add_[kv]_proj|norm_added_[kq])\.")


def from_original(state: Mapping[str, Tensor]) -> State:
    """Wan's tensor names to diffusers'; ValueError names a tensor that Wan2.1 text-to-video does not have."""
    return _renamed(state, _ROOT_NAMES, _BLOCK_NAMES)


def to_original(state: Mapping[str, Tensor]) -> State:
    """The inverse of `from_original`."""
    return _renamed(state, _inverse(_ROOT_NAMES), _inverse(_BLOCK_NAMES))


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}


def _renamed(state: Mapping[str, Tensor], root: Mapping[str, str], block: Mapping[str, str]) -> State:
    refuse_image_tensors(state)
    return {_new_name(name, root, block): tensor for name, tensor in state.items()}


def _new_name(name: str, root: Mapping[str, str], block: Mapping[str, str]) -> str:
    found = re.match(r"blocks\.\d+\.", name)
    prefix, names = (found.group(), block) if found else ("", root)
    rest = name[len(prefix) :]
    if rest in names:
        return prefix + names[rest]
    module, _, leaf = rest.rpartition(".")
    if module not in names or leaf not in ("weight", "bias"):
        raise ValueError(f"tensor {name}: a Wan2.1 text-to-video transformer has no tensor of this name")
    return f"{prefix}{names[module]}.{leaf}"


def refuse_image_tensors(state: Mapping[str, Tensor]) -> None:
    found = next(filter(_IMAGE_TENSOR.search, state), None)
    if found is not None:
        raise ValueError(f"tensor {found}: an image-to-video variant; only text-to-video transformers are supported")


def unwrapped(state: Mapping[str, Tensor]) -> State:
    """Without what FSDP, DDP, torch.compile, activation checkpointing and a holder module put into names."""
    plain: State = {}
    for name, tensor in state.items():
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        while parts and parts[0] in _PREFIXES:
            parts = parts[1:]
        short = ".".join(parts)
        if short in plain:
            raise ValueError(f"tensor {short}: occurs twice, under different wrapper prefixes")
        plain[short] = tensor
    return plain


def naming_of(state: Mapping[str, Tensor]) -> Naming:
    diffusers = any(name.startswith(("condition_embedder.", "proj_out.")) for name in state)
    return "diffusers" if diffusers else "original"


def expected_shapes(config: TransformerConfig) -> dict[str, torch.Size]:
    """Every tensor of the transformer, by diffusers' name, in the order of its state dict."""
    dim = config.dim
    patch = math.prod(config.patch_size)
    shapes: dict[str, tuple[int, ...]] = {
        "scale_shift_table": (1, 2, dim),
        "patch_embedding.weight": (dim, config.in_channels, *config.patch_size),
        "patch_embedding.bias": (dim,),
        **_linear("condition_embedder.time_embedder.linear_1", dim, config.freq_dim),
        **_linear("condition_embedder.time_embedder.linear_2", dim, dim),
        **_linear("condition_embedder.time_proj", 6 * dim, dim),
        **_linear("condition_embedder.text_embedder.linear_1", dim, config.text_dim),
        **_linear("condition_embedder.text_embedder.linear_2", dim, dim),
    }
    block = _block_shapes(dim, config.ffn_dim)
    for index in range(config.num_layers):
        shapes |= {f"blocks.{index}.{name}": shape for name, shape in block.items()}
    shapes |= _linear("proj_out", config.out_channels * patch, dim)
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def _linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _block_shapes(dim: int, ffn_dim: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"scale_shift_table": (1, 6, dim)}
    for attention in ("attn1", "attn2"):
        for projection in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= _linear(f"{attention}.{projection}", dim, dim)
        shapes |= {f"{attention}.norm_q.weight": (dim,), f"{attention}.norm_k.weight": (dim,)}
    shapes |= {"norm2.weight": (dim,), "norm2.bias": (dim,)}
    return shapes | _linear("ffn.net.0.proj", ffn_dim, dim) | _linear("ffn.net.2", dim, ffn_dim)


def check_shapes(expected: Mapping[str, torch.Size], state: Mapping[str, Tensor]) -> None:
    """ValueError for the first tensor that is missing, of another shape, not real-valued, or unknown."""
    for name, shape in expected.items():
        if name not in state:
            raise ValueError(f"tensor {name}: missing, expected shape {list(shape)}")
        if state[name].shape != shape:
            found = list(state[name].shape)
            raise ValueError(f"tensor {name}: expected shape {list(shape)}, found {found}")
        if not state[name].is_floating_point():
            raise ValueError(f"tensor {name}: expected floating-point numbers, found {state[name].dtype}")
    unknown = next((name for name in state if name not in expected), None)
    if unknown is not None:
        raise ValueError(
            f"tensor {unknown}: unknown, found shape {list(state[unknown].shape)}, expected no such tensor"
        )


def infer_config(state: Mapping[str, Tensor], head_dim: int | None = None) -> TransformerConfig:
    """The configuration that the shapes of `state` (diffusers' names) imply.

    The size of a head leaves no trace in the shapes. Without `head_dim` it is that of the known
    configuration with the same shapes, and 128 (all of Wan2.1) otherwise. Raises ValueError.
    """
    dim, in_channels, *patch = _shape(state, "patch_embedding.weight", 5)
    proj_out, _ = _shape(state, "proj_out.weight", 2)
    if proj_out != in_channels * math.prod(patch):
        raise ValueError(
            f"tensor proj_out.weight: expected {in_channels * math.prod(patch)} rows, one per value of a "
            f"patch, found {proj_out}"
        )
    sizes = {
        "ffn_dim": _shape(state, "blocks.0.ffn.net.0.proj.weight", 2)[0],
        "num_layers": 1 + max(int(name.split(".")[1]) for name in state if re.match(r"blocks\.\d+\.", name)),
        "patch_size": tuple(patch),
        "in_channels": in_channels,
        "out_channels": in_channels,
        "text_dim": _shape(state, "condition_embedder.text_embedder.linear_1.weight", 2)[1],
        "freq_dim": _shape(state, "condition_embedder.time_embedder.linear_1.weight", 2)[1],
    }
    return _with_heads(dim, head_dim, sizes)


def _with_heads(dim: int, head_dim: int | None, sizes: Mapping[str, Any]) -> TransformerConfig:
    if head_dim is None:
        for known in CONFIGS.values():
            twin = TransformerConfig(known.num_attention_heads, known.attention_head_dim, **sizes)
            if twin == known and known.dim == dim:
                return known
        head_dim = WAN_HEAD_DIM
    if head_dim < 1 or dim % head_dim:
        raise ValueError(f"head_dim: must divide the transformer's {dim} channels, got {head_dim}")
    return TransformerConfig(dim // head_dim, head_dim, **sizes)


def _shape(state: Mapping[str, Tensor], name: str, rank: int) -> torch.Size:
    if name not in state:
        raise ValueError(f"tensor {name}: missing, expected {rank} dimensions")
    if state[name].ndim != rank:
        raise ValueError(f"tensor {name}: expected {rank} dimensions, found shape {list(state[name].shape)}")
    return state[name].shape


def config_name(config: TransformerConfig) -> str | None:
    """The name under which `config` is known, for example "wan2.1-1.3b"."""
    return next((name for name, known in CONFIGS.items() if known == config), None)
