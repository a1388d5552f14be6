"""Write a model folder in the diffusers layout, as `diffusers.WanPipeline.from_pretrained` loads it."""

import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ..kernels.causal.student import StudentSettings
from ..kernels.wan.text import TextEncoder
from ..kernels.wan.transformer import VideoTransformer
from ..kernels.wan.weights import write_transformer

MODEL_INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": "0.35.0",
    "expand_timesteps": False,
    "boundary_ratio": None,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def write_model(
    folder: Path,
    transformer: VideoTransformer,
    encoder: TextEncoder,
    *,
    shift: float,
    student: StudentSettings | None = None,
) -> None:
    """Write everything but `vae/`, in bfloat16. shift: of the sampling grid. student: makes the folder a student's."""
    state = {name: value.to(torch.bfloat16) for name, value in transformer.state_dict().items()}
    write_transformer(folder, transformer.config, state)
    encoder.save_pretrained(folder)
    FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(folder / "scheduler")
    if student is not None:
        student.write(folder)
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")
