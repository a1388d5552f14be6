"""Stage 1: the tiny VAE, trained to reconstruct clips; then its latents are measured and normalised."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...actors.engine import OptimizerSettings
from ...actors.pretraining import VAELearner, to_pixels, to_video
from ...kernels.wan.vae import StreamingVAE
from ..recipe import OptimizerRecipe, PretrainRecipe
from ..sheet import contact_sheet
from .curves import plot_curve
from .loop import train
from .world import vae_batch

REPORT_EVERY = 500
STATISTICS_BATCHES = 64


def train_vae(recipe: PretrainRecipe, run: Path, device: str) -> None:
    """Train in `run/vae-<phase>` and write the normalised model to `run/model/vae`. Done already: nothing happens."""
    target = run / "model" / "vae"
    if target.exists():
        return
    torch.manual_seed(recipe.seed)
    vae = StreamingVAE.from_config(vae_config(recipe))
    for phase in range(len(recipe.vae.phases)):
        vae = _train_phase(recipe, run / f"vae-{phase + 1}", vae, phase, device)
    _export(recipe, vae, target)


def _train_phase(recipe: PretrainRecipe, folder: Path, vae: StreamingVAE, phase: int, device: str) -> StreamingVAE:
    """Train on the phase's clips; returns the averaged weights."""
    chosen = recipe.vae.phases[phase]
    optimizer = settings(chosen.optimizer, chosen.steps)
    learner = VAELearner(vae, optimizer, recipe.vae.loss.model_dump(), device)

    def report(step: int) -> None:
        plot_curve(folder, "psnr")
        _sheet(recipe, learner, phase, folder / f"sheet-{step:06d}.png")

    batches = partial(vae_batch, recipe, phase)
    train(folder.name, folder, learner, batches, chosen.steps, every=(REPORT_EVERY, report), ahead=True)
    average: Any = learner.engine.average
    return StreamingVAE(average.vae.requires_grad_(True))


def vae_config(recipe: PretrainRecipe) -> dict[str, Any]:
    """diffusers' `vae/config.json` of the recipe's network, not yet normalised."""
    network = recipe.vae.network
    channels = int(network.get("z_dim", 16))
    return {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels, **network}


def settings(recipe: OptimizerRecipe, steps: int) -> OptimizerSettings:
    """The recipe's optimiser for a run of `steps` updates."""
    return OptimizerSettings(total_steps=steps, **recipe.model_dump())


@torch.no_grad()
def _sheet(recipe: PretrainRecipe, learner: VAELearner, phase: int, path: Path) -> None:
    """Clips above their reconstructions."""
    after = recipe.vae.phases[phase].steps + 1
    video = torch.cat([vae_batch(recipe, phase, after + index) for index in range(4)])[:4]
    average: Any = learner.engine.average
    with learner.engine.autocast():
        mean, _ = average.encode_moments(to_pixels(video.to(learner.engine.device)))
        decoded = average.decode_raw(mean)
    pairs = zip(video.numpy(), to_video(decoded).cpu().numpy(), strict=True)
    rows = [row for original, copy in pairs for row in (("original", original), ("reconstruction", copy))]
    contact_sheet(rows, path)


@torch.no_grad()
def _export(recipe: PretrainRecipe, vae: StreamingVAE, target: Path) -> None:
    """Write the weights, with the mean and deviation of the latents of training clips in the config."""
    phase = len(recipe.vae.phases) - 1
    device, values = next(vae.parameters()).device, []
    for batch in range(STATISTICS_BATCHES):
        video = vae_batch(recipe, phase, recipe.vae.phases[phase].steps + 8 + batch).to(device)
        values.append(vae.encode_moments(to_pixels(video))[0].float().transpose(1, 2).flatten(2))
    channels = torch.cat([value.transpose(0, 1).flatten(1) for value in values], dim=1)
    config = {
        **vae_config(recipe),
        "latents_mean": channels.mean(1).tolist(),
        "latents_std": channels.std(1).tolist(),
    }
    final = StreamingVAE.from_config(config)
    final.load_state_dict(vae.state_dict())
    temporary = target.with_name("vae.tmp")
    final.to(torch.bfloat16)
    final.vae.save_pretrained(temporary)
    _finish_config(temporary / "config.json", config)
    temporary.replace(target)


def _finish_config(path: Path, config: dict[str, Any]) -> None:
    for file in path.parent.glob("*.safetensors"):  # safetensors writes files that only their owner reads
        shutil.copymode(path, file)
    content = json.loads(path.read_text())
    content.update({key: config[key] for key in ("latents_mean", "latents_std")})
    path.write_text(json.dumps(content, indent=2) + "\n")
