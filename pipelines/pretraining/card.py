"""The model card of a pretrained teacher: how it was made, its curve, scores and samples."""

import json
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...actors.bench_device import describe_device
from ...actors.teacher import Teacher
from ...kernels.sprites.oracle import grade
from ...kernels.sprites.splits import prompts
from ..recipe import PretrainRecipe, TeacherPhaseRecipe, TurnRecipe, fingerprint
from ..sheet import contact_sheet
from ..sprites import Grading, as_json, grade_teacher, sample
from .curves import draw_curve
from .loop import read_curve


def write_card(run: Path, *, count: int, pictures: int, steps: int, guidance: float, device: str = "cpu") -> None:
    """Write `run/model/README.md` and its `card/`: scores.json, samples.png, loss.png.

    run: a finished `reelway pretrain`. count, pictures: held-out prompts that are graded, and those of the sheet.
    FileNotFoundError where the run is not finished.
    """
    recipe = _recipe(run)
    teacher = Teacher.from_pretrained(run / "model", device)
    folder = run / "model" / "card"
    folder.mkdir(exist_ok=True)
    grading = Grading("heldout", count, recipe.world.level, steps, guidance, recipe.seed)
    scores = as_json(
        grade_teacher(teacher, prompts("heldout", count, recipe.seed, recipe.world.level), grading), grading
    )
    (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    _draw_samples(recipe, teacher, grading, pictures, folder / "samples.png")
    draw_curve([row for curve in _curves(recipe, run) for row in curve], "loss", folder / "loss.png")
    (run / "model" / "README.md").write_text(_text(recipe, run, scores, device))


def _recipe(run: Path) -> PretrainRecipe:
    if not (run / "recipe.json").is_file() or not (run / "model" / "model_index.json").is_file():
        raise FileNotFoundError(f"{run}: not a finished run of `reelway pretrain`")
    return PretrainRecipe.model_validate({name: value for name, value in _written(run).items() if name != "init"})


def _written(run: Path) -> dict[str, Any]:
    section: dict[str, Any] = json.loads((run / "recipe.json").read_text())["pretrain"]
    return section


def _begun(run: Path) -> str:
    digest = _written(run).get("init")
    return "" if digest is None else f"begun with the weights of another teacher (`{digest[:16]}`); "


def _draw_samples(recipe: PretrainRecipe, teacher: Teacher, grading: Grading, pictures: int, path: Path) -> None:
    level = recipe.world.level
    chosen = prompts("heldout", pictures, recipe.seed, level)
    videos = sample(teacher, chosen, steps=grading.steps, guidance=grading.guidance, seed=recipe.seed)
    totals = [grade(video, scene, level=level).total for video, (_, scene) in zip(videos, chosen, strict=True)]
    titles = [f"{total:.2f}: {text}" for total, (text, _) in zip(totals, chosen, strict=True)]
    contact_sheet(list(zip(titles, videos, strict=True)), path)


def _text(recipe: PretrainRecipe, run: Path, graded: dict[str, Any], device: str) -> str:
    scores, settings = graded["scores"], graded["settings"]
    rows = "\n".join(
        f"| {name} | " + " | ".join(f"{column[name]:.3f}" for column in scores.values()) + " |"
        for name in next(iter(scores.values()))
    )
    curves = _curves(recipe, run)
    last = [row["loss"] for row in curves[-1][-100:]]
    return _CARD.format(
        columns=" | ".join(scores),
        bars="---|" * len(scores),
        rows=rows,
        clips=", ".join(f"{count:,} of {frames}" for frames, count in recipe.teacher.clips.items()),
        text_steps=recipe.text.steps,
        text_batch=recipe.text.batch,
        map_weight=recipe.teacher.map_weight,
        level=recipe.world.level,
        size=recipe.world.size,
        frames=recipe.world.frames,
        begun=_begun(run),
        phases="; ".join(_phase(phase) for phase in recipe.teacher.phases),
        seed=recipe.seed,
        fingerprint=fingerprint(recipe),
        hours=sum(curve[-1]["seconds"] for curve in curves) / 3600,
        loss=sum(last) / len(last),
        hardware=_in_words(describe_device(torch.device(device))),
        version=__version__,
        torch=torch.__version__.partition("+")[0],
        count=settings["count"],
        sampling_steps=settings["steps"],
        guidance=settings["guidance"],
    )


def _curves(recipe: PretrainRecipe, run: Path) -> list[list[dict[str, float]]]:
    """The rows of each phase."""
    return [read_curve(run / f"teacher-{phase + 1}" / "curve.jsonl") for phase in range(len(recipe.teacher.phases))]


def _phase(phase: TeacherPhaseRecipe) -> str:
    turns = ", ".join(f"{turn.clips} of {turn.frames}{_shift(turn)}" for turn in phase.turns)
    return f"{phase.steps:,} updates on clips of so many latent frames: {turns}" + " in turn" * (len(phase.turns) > 1)


def _shift(turn: TurnRecipe) -> str:
    law = "" if turn.law == "uniform" else f"{turn.law} "
    shift = "" if turn.shift is None else f" of shift {turn.shift:g}"
    return f" ({law}timesteps{shift})" if law or shift else ""


def _in_words(device: dict[str, Any]) -> str:
    return str(device["name"]) if device["kind"] != "cpu" else f"the CPU ({device['name']})"


_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
tags: [reelway, wan, sprites]
---

# The tiny teacher of the sprites world

A bidirectional video diffusion transformer of the Wan2.1 family at tiny size, with its VAE and text encoder, in the
diffusers layout. It makes {frames} frames of {size}x{size} pixels at 16 frames per second: one or two sprites on a
ground, as a caption says. It exists so that every stage of Reelway can be run, tested and graded on two CPU cores.

```python
from diffusers import WanPipeline

pipeline = WanPipeline.from_pretrained("assets/tiny")
prompt = "a small red star drifts left over a navy background"
video = pipeline(prompt, height={size}, width={size}, num_frames={frames}, guidance_scale={guidance}).frames[0]
```

## How it was made

    reelway pretrain --vae assets/tiny/vae --run runs/tiny

| | |
|---|---|
| data | rendered clips of level {level}, train split, encoded once; by length in latent frames: {clips} |
| text encoder | {text_steps:,} updates of {text_batch} captions, whose attributes it learns to tell; then frozen |
| objective | flow matching, 10 % prompt drop; the middle block also tells what each token shows (weight {map_weight}) |
| training | {begun}{phases}; Muon and AdamW, mixed precision, averaged weights exported |
| seed, recipe | {seed}, `configs/tiny.yaml`, fingerprint `{fingerprint}` |
| loss at the end | {loss:.3f} (mean of the last 100 steps) |
| time | {hours:.1f} h of training; graded on {hardware} |
| versions | Reelway {version}, torch {torch} |

![loss](card/loss.png)

## Scores

By the oracle of the sprites world on {count} held-out prompts (combinations of attributes that the training never
showed), {sampling_steps} steps, guidance {guidance}. Names and weights as in VBench. Videos for random prompts reach
0.85 in Total and 0.30 in Semantic, so read Total with care.

| dimension | {columns} |
|---|{bars}
{rows}

![samples](card/samples.png)

Its limits: it knows the words of the sprites world and nothing else, and fine texture is blurred by its VAE.
"""
