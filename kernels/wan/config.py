"""Sizes of the Wan2.1 transformer. Field names are those of diffusers' `transformer/config.json`."""

from dataclasses import asdict, dataclass, fields
from typing import Any

TEXT_LENGTH = 512  # rows of the text context that Wan's cross-attention sees, zero padding included


@dataclass(frozen=True)
class TransformerConfig:
    """Hyper-parameters of one transformer (Wan2.1 technical report, arXiv 2503.20314, Table 2)."""

    num_attention_heads: int
    attention_head_dim: int
    ffn_dim: int
    num_layers: int
    patch_size: tuple[int, int, int] = (1, 2, 2)
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    eps: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        if self.patch_size[0] != 1:
            raise ValueError(
                f"patch_size: the temporal patch must be 1 (causality is per frame), got {self.patch_size}"
            )
        if self.attention_head_dim % 2 or self.attention_head_dim < 6:
            raise ValueError(f"attention_head_dim: must be even and at least 6, got {self.attention_head_dim}")

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def rotary_dims(self) -> tuple[int, int, int]:
        """Channels of a head that rotate with time, height and width: 44, 42, 42 of Wan's 128."""
        spatial = 2 * (self.attention_head_dim // 6)
        return self.attention_head_dim - 2 * spatial, spatial, spatial

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Tokens of one latent frame of `height` × `width`; raises ValueError where the patch does not divide it."""
        _, patch_height, patch_width = self.patch_size
        if height % patch_height or width % patch_width:
            raise ValueError(
                f"latent size {height}x{width} is not a multiple of the patch {patch_height}x{patch_width}"
            )
        return (height // patch_height) * (width // patch_width)

    def to_diffusers(self) -> dict[str, Any]:
        """The content of diffusers' `transformer/config.json`."""
        return {
            "_class_name": "WanTransformer3DModel",
            **asdict(self),
            "patch_size": list(self.patch_size),
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 1024,
            "image_dim": None,
            "added_kv_proj_dim": None,
            "pos_embed_seq_len": None,
        }

    @classmethod
    def from_diffusers(cls, config: dict[str, Any]) -> "TransformerConfig":
        """Read `transformer/config.json`; ValueError names the field that this network cannot honour."""
        required = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "added_kv_proj_dim": None}
        for key, value in required.items():
            if config.get(key, value) != value:
                raise ValueError(f"transformer config: {key} must be {value!r}, got {config[key]!r}")
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in config.items() if key in known}
        values["out_channels"] = values.get("out_channels") or values.get("in_channels", 16)
        return cls(**values)


CONFIGS = {
    "tiny": TransformerConfig(
        num_attention_heads=3, attention_head_dim=64, ffn_dim=768, num_layers=6, text_dim=128, freq_dim=64
    ),
    "wan2.1-1.3b": TransformerConfig(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30),
    "wan2.1-14b": TransformerConfig(num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=40),
}
