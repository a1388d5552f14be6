"""Stage 1: the tiny VAE, trained to reconstruct clips; then its latents are measured and normalised."""

import json
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

STATISTICS_BATCHES = 16


def train_vae(recipe: PretrainRecipe, run: Path, device: str) -> None:
    """Train in `run/vae` and write the normalised model to `run/model/vae`. Done already: nothing happens."""
    target = run / "model" / "vae"
    if target.exists():
        return
    torch.manual_seed(recipe.seed)
    vae = StreamingVAE.from_config(vae_config(recipe))
    learner = VAELearner(vae, settings(recipe.vae.optimizer, recipe.vae.steps), recipe.vae.loss.model_dump(), device)
    folder = run / "vae"

    def report(step: int) -> None:
        plot_curve(folder, "psnr")
        _sheet(recipe, learner, folder / f"sheet-{step:06d}.png")

    train("vae", folder, learner, lambda step: vae_batch(recipe, step), recipe.vae.steps, every=(500, report))
    _export(recipe, learner, target)


def vae_config(recipe: PretrainRecipe) -> dict[str, Any]:
    """diffusers' `vae/config.json` of the recipe's network, not yet normalised."""
    network = recipe.vae.network
    channels = int(network.get("z_dim", 16))
    return {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels, **network}


def settings(recipe: OptimizerRecipe, steps: int) -> OptimizerSettings:
    """The recipe's optimiser for a run of `steps` updates."""
    return OptimizerSettings(total_steps=steps, **recipe.model_dump())


@torch.no_grad()
def _sheet(recipe: PretrainRecipe, learner: VAELearner, path: Path) -> None:
    """Clips above their reconstructions."""
    video = vae_batch(recipe, recipe.vae.steps + 1)[:4]
    average: Any = learner.engine.average
    with learner.engine.autocast():
        mean, _ = average.encode_moments(to_pixels(video.to(learner.engine.device)))
        decoded = average.decode_raw(mean)
    pairs = zip(video.numpy(), to_video(decoded).cpu().numpy(), strict=True)
    rows = [row for original, copy in pairs for row in (("original", original), ("reconstruction", copy))]
    contact_sheet(rows, path)


@torch.no_grad()
def _export(recipe: PretrainRecipe, learner: VAELearner, target: Path) -> None:
    """Write the averaged weights, with the mean and deviation of the latents of training clips in the config."""
    average: Any = learner.engine.average
    values = []
    for batch in range(STATISTICS_BATCHES):
        video = vae_batch(recipe, recipe.vae.steps + 2 + batch).to(learner.engine.device)
        values.append(average.encode_moments(to_pixels(video))[0].float().transpose(1, 2).flatten(2))
    channels = torch.cat(values, dim=2).transpose(0, 1).flatten(1)
    config = {
        **vae_config(recipe),
        "latents_mean": channels.mean(1).tolist(),
        "latents_std": channels.std(1).tolist(),
    }
    final = StreamingVAE.from_config(config)
    final.load_state_dict(average.state_dict())
    temporary = target.with_name("vae.tmp")
    final.vae.to(dtype=torch.bfloat16).save_pretrained(temporary)
    _keep_float_config(temporary / "config.json", config)
    temporary.replace(target)


def _keep_float_config(path: Path, config: dict[str, Any]) -> None:
    content = json.loads(path.read_text())
    content.update({key: config[key] for key in ("latents_mean", "latents_std")})
    path.write_text(json.dumps(content, indent=2) + "\n")
