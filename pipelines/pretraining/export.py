"""Write a trained tiny teacher as a model folder that `diffusers.WanPipeline.from_pretrained` loads."""

import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ...actors.pretraining import TeacherLearner
from ...kernels.wan.weights import write_transformer
from ..recipe import PretrainRecipe

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


def export_model(recipe: PretrainRecipe, learner: TeacherLearner, folder: Path) -> None:
    """Write everything but the VAE, which its stage has written; averaged weights, bfloat16."""
    transformer, encoder = learner.averaged()
    state = {name: value.to(torch.bfloat16) for name, value in transformer.state_dict().items()}
    write_transformer(folder, transformer.config, state)
    encoder.save_pretrained(folder)
    FlowMatchEulerDiscreteScheduler(shift=recipe.teacher.shift).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")
