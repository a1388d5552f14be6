"""`reelway pretrain`: the VAE, the latents, the teacher, one after the other; what is done is skipped."""

import enum
import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from .models import write_model
from .pretraining.latents import make_latents
from .pretraining.teacher import train_teacher
from .pretraining.vae import train_vae
from .recipe import TINY, PretrainRecipe, fingerprint, load_recipe

app = typer.Typer(add_completion=False, help="Train a tiny VAE, text encoder and teacher on the sprites world.")


class Stage(enum.StrEnum):
    vae = "vae"
    latents = "latents"
    teacher = "teacher"


@app.command()
def pretrain_command(
    recipe: Annotated[Path, typer.Option(help="Recipe file; the tiny one ships with the package.")] = TINY,
    run: Annotated[Path, typer.Option(help="Folder of the run; an interrupted run goes on there.")] = Path("runs/tiny"),
    stage: Annotated[list[Stage] | None, typer.Option(help="Only these stages (may be repeated).")] = None,
    vae: Annotated[Path | None, typer.Option(help="Use this trained VAE folder instead of training one.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    override: Annotated[list[str] | None, typer.Option("--set", help="a.b=value: change the recipe.")] = None,
) -> None:
    """Train in RUN; the finished model is RUN/model, in the diffusers layout."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: no CUDA device here")
    section = load_recipe(recipe, override).pretrain
    if section is None:
        raise ValueError(f"recipe {recipe}: has no section 'pretrain'")
    if vae is not None:
        _adopt_vae(vae, run)
    console = Console(stderr=True)
    try:
        pretrain(section, run, stages=set(stage or Stage), device=device)
    except KeyboardInterrupt:
        console.print(f"Stopped; what was done is kept in {run}. The same command goes on from there.")
        raise typer.Exit(130) from None


def pretrain(recipe: PretrainRecipe, run: Path, *, stages: set[Stage], device: str = "cpu") -> None:
    """Run the stages in `run`, going on where an earlier call stopped."""
    _claim(recipe, run)
    if Stage.vae in stages:
        train_vae(recipe, run, device)
    if Stage.latents in stages:
        make_latents(recipe, run, device)
    if Stage.teacher in stages:
        learner = train_teacher(recipe, run, device)
        write_model(run / "model", *learner.averaged(), shift=recipe.teacher.shift)


def _adopt_vae(source: Path, run: Path) -> None:
    """Copy a VAE folder to where the VAE's stage would have put its own; one that is there already stays."""
    target, temporary = run / "model" / "vae", run / "model" / "vae.tmp"
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"--vae {source}: no config.json, expected a VAE folder in the diffusers layout")
    if not target.exists():
        shutil.copytree(source, temporary, dirs_exist_ok=True)
        temporary.replace(target)


def _claim(recipe: PretrainRecipe, run: Path) -> None:
    """Write the resolved recipe beside the results; ValueError if the folder holds another recipe's results."""
    run.mkdir(parents=True, exist_ok=True)
    path = run / "recipe.json"
    content = recipe.model_dump(mode="json")
    if path.exists():
        before = json.loads(path.read_text())["pretrain"]
        if before != content:
            raise ValueError(f"{run}: made with another recipe; {_differences(before, content)}")
    path.write_text(json.dumps({"fingerprint": fingerprint(recipe), "pretrain": content}, indent=2) + "\n")


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> str:
    parts = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            parts.append(_differences(old, new, f"{prefix}{key}."))
        elif old != new:
            parts.append(f"{prefix}{key} is {old} there and {new} now")
    return "; ".join(part for part in parts if part)
