"""Stage 4: grade the finished model and write its model card: how it was made, curves, scores, samples."""

import json
import os
import platform
import shutil
from pathlib import Path

import torch

from ... import __version__
from ...actors.teacher import Teacher
from ...kernels.sprites.oracle import grade
from ...kernels.sprites.splits import prompts
from ..recipe import PretrainRecipe, fingerprint
from ..sheet import contact_sheet
from ..sprites import grade_teacher, sample
from .curves import plot_curve
from .loop import read_curve

PROMPTS, SHEET_PROMPTS = 64, 6
SPLIT, STEPS, GUIDANCE = "heldout", 50, 5.0


def write_card(recipe: PretrainRecipe, run: Path, device: str) -> None:
    """Write `run/model/README.md` and its `card/`: scores.json, samples.png, loss.png. Done before: nothing to do."""
    model = run / "model"
    folder = model / "card"
    folder.mkdir(parents=True, exist_ok=True)
    teacher = Teacher.from_pretrained(model, device)
    if not (folder / "scores.json").is_file():
        (folder / "scores.json").write_text(json.dumps(_scores(recipe, teacher), indent=2) + "\n")
    if not (folder / "samples.png").is_file():
        _draw_samples(recipe, teacher, folder / "samples.png")
    shutil.copyfile(plot_curve(run / "teacher"), folder / "loss.png")
    scores = json.loads((folder / "scores.json").read_text())["scores"]
    (model / "README.md").write_text(_text(recipe, run, scores, device))


def _scores(recipe: PretrainRecipe, teacher: Teacher) -> dict[str, object]:
    level, seed = recipe.world.level, recipe.seed
    chosen = prompts(SPLIT, PROMPTS, seed, level)
    settings = {"split": SPLIT, "level": level, "steps": STEPS, "guidance": GUIDANCE, "seed": seed}
    columns = grade_teacher(teacher, chosen, split=SPLIT, level=level, steps=STEPS, guidance=GUIDANCE, seed=seed)
    tables = {name: verdict.table for name, verdict in columns.items()}
    return {"settings": {**settings, "count": PROMPTS}, "scores": tables}


def _draw_samples(recipe: PretrainRecipe, teacher: Teacher, path: Path) -> None:
    chosen = prompts(SPLIT, SHEET_PROMPTS, recipe.seed, recipe.world.level)
    videos = sample(teacher, chosen, steps=STEPS, guidance=GUIDANCE, seed=recipe.seed)
    graded = [grade(video, scene, level=recipe.world.level) for video, (_, scene) in zip(videos, chosen, strict=True)]
    titles = [f"{result.total:.2f}: {text}" for result, (text, _) in zip(graded, chosen, strict=True)]
    contact_sheet(list(zip(titles, videos, strict=True)), path)


def _text(recipe: PretrainRecipe, run: Path, scores: dict[str, dict[str, float]], device: str) -> str:
    rows = "\n".join(
        f"| {name} | " + " | ".join(f"{column[name]:.3f}" for column in scores.values()) + " |"
        for name in next(iter(scores.values()))
    )
    curve = read_curve(run / "teacher" / "curve.jsonl")
    last = [row["loss"] for row in curve[-100:]]
    return _CARD.format(
        columns=" | ".join(scores),
        bars="---|" * len(scores),
        rows=rows,
        clips=recipe.teacher.clips,
        level=recipe.world.level,
        size=recipe.world.size,
        frames=recipe.world.frames,
        steps=recipe.teacher.steps,
        batch=recipe.teacher.batch,
        seed=recipe.seed,
        fingerprint=fingerprint(recipe),
        hours=curve[-1]["seconds"] / 3600,
        loss=sum(last) / len(last),
        hardware=hardware(device),
        version=__version__,
        torch=torch.__version__.partition("+")[0],
        count=PROMPTS,
        sampling_steps=STEPS,
        guidance=GUIDANCE,
    )


def hardware(device: str) -> str:
    """The device in words, for cards and tables of figures."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores ({_processor()})"


def _processor() -> str:
    names = (line.partition(":")[2].strip() for line in _cpu_info() if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


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
video = pipeline("a small red star drifts left over a navy background",
                 height={size}, width={size}, num_frames={frames}, guidance_scale={guidance}).frames[0]
```

## How it was made

    reelway pretrain --vae assets/tiny/vae --run runs/tiny

| | |
|---|---|
| data | {clips} rendered clips of level {level}, train split, encoded once |
| objective | flow matching with 10 % prompt drop; text encoder trained along |
| steps, batch | {steps}, {batch}, Muon and AdamW, bfloat16 autocast, averaged weights exported |
| seed, recipe | {seed}, `configs/tiny.yaml`, fingerprint `{fingerprint}` |
| loss at the end | {loss:.3f} (mean of the last 100 steps) |
| time | {hours:.1f} h of training on {hardware}, shared with other work |
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
