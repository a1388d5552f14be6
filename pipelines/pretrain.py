"""`reelway pretrain`: the VAE, the text encoder, the latents, the teacher, in this order; what is done is skipped.

With `--init` the teacher begins with given weights; with `--latents` as well it is trained further on latent shards.
"""

import enum
import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..actors.model_files import transformer_config, velocity_digest
from ..cluster.storage import Storage
from ..kernels.wan.config import CONFIGS
from .commands import check_device
from .models import write_model
from .pretraining.finetune import check_inputs, check_teacher, fine_tune, origin
from .pretraining.latents import make_latents
from .pretraining.teacher import train_teacher
from .pretraining.text import train_text
from .pretraining.vae import train_vae
from .recipe import TINY, FineTuneRecipe, PretrainRecipe, fingerprint, load_recipe
from .training import differences

RUN, TUNED = Path("runs/tiny"), Path("runs/tuned")

app = typer.Typer(add_completion=False, help="Train a tiny VAE, text encoder and teacher on the sprites world.")


class Stage(enum.StrEnum):
    vae = "vae"
    text = "text"
    latents = "latents"
    teacher = "teacher"


@app.command()
def pretrain_command(
    recipe: Annotated[Path, typer.Option(help="Recipe file; the tiny one ships with the package.")] = TINY,
    run: Annotated[
        Path | None,
        typer.Option(help=f"Folder of the run, where an interrupted one goes on; {RUN}, {TUNED} if tuning."),
    ] = None,
    stage: Annotated[list[Stage] | None, typer.Option(help="Only these stages (may be repeated).")] = None,
    vae: Annotated[Path | None, typer.Option(help="Use this trained VAE folder instead of training one.")] = None,
    latents: Annotated[
        str | None, typer.Option(metavar="DATASET", help="Fine-tune: train on this set of latent shards.")
    ] = None,
    init: Annotated[Path | None, typer.Option(help="Begin with the transformer of this teacher's folder.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    compiled: Annotated[
        bool, typer.Option("--compile", help="torch.compile the teacher's blocks: pays on a GPU, not on a CPU.")
    ] = False,
    override: Annotated[list[str] | None, typer.Option("--set", help="a.b=value: change the recipe.")] = None,
) -> None:
    """Train in RUN; the finished model is RUN/model, in the diffusers layout."""
    check_device(device)
    content = load_recipe(recipe, override)
    folder = run or (RUN if latents is None else TUNED)
    try:
        if latents is not None:
            inputs = _tuning_inputs(latents, init, stage, vae)
            tune(content.finetune, folder, *inputs, device=device, compiled=compiled)
        else:
            if content.pretrain is None:
                raise ValueError(f"recipe {recipe}: has no section 'pretrain'")
            stages = set(stage or Stage)
            pretrain(content.pretrain, folder, stages=stages, device=device, init=init, vae=vae, compiled=compiled)
    except KeyboardInterrupt:
        console = Console(stderr=True)
        console.print(f"Stopped; what was done is kept in {folder}. The same command goes on from there.")
        raise typer.Exit(130) from None


def _tuning_inputs(
    latents: str, init: Path | None, stage: list[Stage] | None, vae: Path | None
) -> tuple[Storage, Path]:
    """The data set and the model of a fine-tuning; ValueError for options that do not go together."""
    if init is None:
        raise ValueError("--latents: fine-tuning needs --init too, the model to begin with")
    if set(stage or ()) - {Stage.teacher}:
        raise ValueError(f"--stage {', '.join(stage or ())}: fine-tuning has one stage, the teacher's")
    if vae is not None:
        raise ValueError(f"--vae {vae}: fine-tuning takes the VAE of --init, which must be the one of the latents")
    return Storage.open(latents), init


def pretrain(
    recipe: PretrainRecipe,
    run: Path,
    *,
    stages: set[Stage],
    device: str = "cpu",
    init: Path | None = None,
    vae: Path | None = None,
    compiled: bool = False,
) -> None:
    """Run the stages in `run`, going on where an earlier call stopped.

    init: a teacher's folder, with whose transformer the teacher's stage begins. vae: a trained VAE's, to be copied.
    compiled: torch.compile the teacher's blocks.
    """
    began_with = {} if init is None else _begin_with(init, recipe)
    if vae is not None:
        _adopt_vae(vae, run)
    _claim(run, "pretrain", {**recipe.model_dump(mode="json"), **began_with})
    if Stage.vae in stages:
        train_vae(recipe, run, device)
    encoder = train_text(recipe, run, device) if stages & {Stage.text, Stage.teacher} else None
    if Stage.latents in stages:
        make_latents(recipe, run, device)
    if Stage.teacher in stages:
        assert encoder is not None
        transformer = train_teacher(recipe, run, encoder, device, init, compiled=compiled)
        write_model(run / "model", transformer, encoder, shift=recipe.teacher.shift)


def _begin_with(init: Path, recipe: PretrainRecipe) -> dict[str, str]:
    """What a run keeps of the teacher that it begins with; ValueError where that is not of the recipe's size."""
    check_teacher(init)
    if transformer_config(init) != CONFIGS[recipe.model]:
        raise ValueError(f"--init {init}: transformer/config.json: differs from the recipe's model, {recipe.model}")
    return {"init": velocity_digest(init)}


def tune(
    recipe: FineTuneRecipe, run: Path, latents: Storage, init: Path, *, device: str = "cpu", compiled: bool = False
) -> None:
    """Train the teacher `init` further on the data set `latents`, going on where an earlier call stopped.

    compiled: torch.compile its blocks.
    """
    check_inputs(latents, init)
    _claim(run, "finetune", {**recipe.model_dump(mode="json"), **origin(latents, init)})
    fine_tune(recipe, run, latents, init, device, compiled=compiled)


def _adopt_vae(source: Path, run: Path) -> None:
    """Copy a VAE folder to where the VAE's stage would have put its own; one that is there already stays."""
    target, temporary = run / "model" / "vae", run / "model" / "vae.tmp"
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"--vae {source}: no config.json, expected a VAE folder in the diffusers layout")
    if not target.exists():
        shutil.copytree(source, temporary, dirs_exist_ok=True)
        temporary.replace(target)


def _claim(run: Path, section: str, content: dict[str, Any]) -> None:
    """Write the resolved section beside the results; ValueError if the folder holds another one's results."""
    run.mkdir(parents=True, exist_ok=True)
    path = run / "recipe.json"
    if path.exists():
        before = json.loads(path.read_text())
        if section not in before:
            raise ValueError(f"{run}: holds the results of {', '.join(before.keys() - {'fingerprint'})}, not {section}")
        if before[section] != content:
            raise ValueError(f"{run}: made with another recipe; {differences(before[section], content)}")
    path.write_text(json.dumps({"fingerprint": fingerprint(content), section: content}, indent=2) + "\n")
