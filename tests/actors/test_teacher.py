"""Our teacher against `diffusers.WanPipeline`, from the same folder and the same noise."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from reelway.actors.teacher import Teacher
from reelway.kernels.diffusion.noise import SampleKey
from reelway.kernels.diffusion.schedule import timesteps
from reelway.kernels.sprites.captions import VOCABULARY
from reelway.kernels.wan.config import CONFIGS
from reelway.kernels.wan.text import tiny_text_encoder
from reelway.kernels.wan.transformer import VideoTransformer
from reelway.kernels.wan.vae import StreamingVAE
from reelway.pipelines.models import write_model
from reelway.pipelines.pretraining.vae import vae_config
from reelway.pipelines.recipe import load_recipe

RECIPE = load_recipe(Path(__file__).parents[2] / "configs" / "tiny.yaml").pretrain
PROMPT = "a small red star drifts left over a navy background"
SHAPE = (3, 4, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights, written as the shipped one is."""
    torch.manual_seed(0)
    target = tmp_path_factory.mktemp("teacher") / "model"
    StreamingVAE.from_config(vae_config(RECIPE)).vae.save_pretrained(target / "vae")
    encoder = tiny_text_encoder(VOCABULARY, CONFIGS["tiny"].text_dim)
    write_model(target, VideoTransformer(CONFIGS["tiny"]), encoder, shift=RECIPE.teacher.shift)
    return target


def test_same_latents_as_diffusers_from_the_same_noise(folder: Path) -> None:
    pipeline = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    teacher = Teacher.from_pretrained(folder, autocast=False)
    noise = teacher.noise([SampleKey(0, PROMPT, 0)], SHAPE)
    expected = pipeline(
        PROMPT,
        height=32,
        width=32,
        num_frames=9,
        num_inference_steps=8,
        guidance_scale=5.0,
        latents=noise.transpose(1, 2),
        output_type="latent",
    ).frames.transpose(1, 2)
    grid = [1000 * sigma for sigma in pipeline.scheduler.sigmas.tolist()]
    found = teacher.sample([PROMPT], noise, grid, guidance=5.0)
    assert float((found - expected).norm() / expected.norm()) <= 1e-4
    assert float((noise - expected).norm() / expected.norm()) > 1e-2


def test_a_clip_does_not_depend_on_its_batch(folder: Path) -> None:
    teacher = Teacher.from_pretrained(folder, autocast=False)
    prompts = [PROMPT, "two shapes on white", "a large blue circle"]
    noise = teacher.noise([SampleKey(0, prompt, 0) for prompt in prompts], SHAPE)
    together = teacher.sample(prompts, noise, timesteps(4, 3.0), guidance=4.0)
    alone = teacher.sample(prompts[:1], noise[:1], timesteps(4, 3.0), guidance=4.0)
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-4)


def test_guidance_of_one_needs_no_unconditional_pass(folder: Path) -> None:
    teacher = Teacher.from_pretrained(folder, autocast=False)
    noise = teacher.noise([SampleKey(0, PROMPT, 0)], SHAPE)
    plain = teacher.sample([PROMPT], noise, timesteps(2, 3.0), guidance=1.0)
    nearly = teacher.sample([PROMPT], noise, timesteps(2, 3.0), guidance=1.0 + 1e-6)
    torch.testing.assert_close(plain, nearly, rtol=1e-4, atol=1e-4)


def test_pixels_come_and_go_as_uint8(folder: Path) -> None:
    teacher = Teacher.from_pretrained(folder)
    assert teacher.decode(torch.randn(2, *SHAPE[:1], 16, 4, 4)).shape == (2, 9, 32, 32, 3)
    copies = teacher.reconstruct([np.zeros((9, 32, 32, 3), np.uint8)])
    assert copies[0].shape == (9, 32, 32, 3)
    assert copies[0].dtype == np.uint8


def test_shift_is_the_schedulers(folder: Path, tmp_path: Path) -> None:
    assert Teacher.from_pretrained(folder).shift == RECIPE.teacher.shift
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model/scheduler/scheduler_config.json").write_text('{"flow_shift": 8.0}')
    assert Teacher.from_pretrained(tmp_path / "model").shift == 8.0
    (tmp_path / "model/scheduler/scheduler_config.json").write_text('{"steps": 8}')
    with pytest.raises(ValueError, match="needs a shift or a flow_shift, has steps"):
        Teacher.from_pretrained(tmp_path / "model")


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        Teacher.from_pretrained(tmp_path / "none")
