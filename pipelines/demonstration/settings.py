"""What the demo is made of: its sizes, all in one place, the models it begins with, and its folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import yaml
from pydantic import Field, ValidationError

from ...actors.model_files import check_model
from ...actors.trajectories import device_kind
from ...kernels.causal.student import StudentSettings
from ..evaluation.plan import model_fingerprint
from ..places import check_folder
from ..recipe import TINY, Positive, Rate, Recipe, Share, Strict, load_recipe

ASSETS = Path(__file__).parents[2] / "assets"
TEACHER, STUDENT = ASSETS / "tiny", ASSETS / "tiny-student"
WORK, MEDIA, PAGE, LOG = "work", "media", "index.html", "log.txt"
DEVICE = "cpu"


class DemoRecipe(Strict):
    """Sizes of the demo; together they decide that it takes some minutes on two cores.

    train_prompts: one trajectory each. heldout_prompts: graded for every model. workers: Ray workers of a stage.
    noise: of the video that is redrawn. blocks: of the student's stream whose speed is measured. changes: what the
    demo sets in the tiny recipe, as `--set` of the other commands does.
    """

    seed: int = 0
    level: Annotated[int, Field(ge=0, le=3)] = 1
    train_prompts: Positive = 52
    heldout_prompts: Positive = 10
    workers: Positive = 2
    teacher_steps: Positive = 50
    guidance: Rate = 3.0
    minute: Rate = 60.0
    noise: Share = 0.6
    blocks: Positive = 20
    changes: tuple[str, ...] = (
        "trajectories.batch=4",
        "trajectories.per_shard=4",
        "initialize.steps=40",
        "initialize.batch=16",
        "initialize.lanes=2",
        "initialize.checkpoint_every=10",
        "initialize.keep=1",
        "initialize.optimizer.warmup_steps=5",
        "initialize.optimizer.ema_decay=0.9",
        "distill.causvid.steps=16",
        "distill.causvid.batch=8",
        "distill.causvid.lanes=2",
        "distill.causvid.checkpoint_every=5",
        "distill.causvid.keep=1",
        "distill.causvid.critic_updates=2",
        "distill.causvid.student.ema_decay=0.8",
    )


def read_demo_recipe(path: Path | None) -> DemoRecipe:
    """The demo's sizes, changed by a YAML file if there is one. ValueError or FileNotFoundError in one line."""
    if path is None:
        return DemoRecipe()
    if not path.is_file():
        raise FileNotFoundError(f"--recipe: no such file: {path}")
    try:
        return DemoRecipe.model_validate(yaml.safe_load(path.read_text()) or {})
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--recipe {path}: not valid YAML: {str(error).splitlines()[0]}") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ValueError(f"--recipe {path}: {field}: {first['msg']}, got {first['input']!r}") from None


@dataclass(frozen=True)
class Demo:
    """A demo to be made in the folder `out`. base: the tiny recipe with the demo's changes.

    prints: fingerprints of the two models, and the versions and the kind of device that decide the last bits.
    """

    out: Path
    teacher: Path
    student: Path
    recipe: DemoRecipe
    base: Recipe
    prints: dict[str, str]

    @classmethod
    def open(cls, out: Path, teacher: Path, student: Path, recipe: DemoRecipe) -> "Demo":
        """FileNotFoundError or ValueError, in one line, where a model is missing or the recipe will not do."""
        check_folder(out, "--out")
        _check(teacher, "--teacher", TEACHER)
        _check(student, "--student", STUDENT)
        StudentSettings.read(student)
        base = load_recipe(TINY, list(recipe.changes))
        if base.clip.height != base.clip.width:
            raise ValueError(f"clip: the sprites world is square, got {base.clip.width}x{base.clip.height}")
        prints = {
            "teacher": model_fingerprint(teacher),
            "student": model_fingerprint(student),
            "torch": torch.__version__,
            "device": device_kind(DEVICE),
        }
        return cls(out.absolute(), teacher.absolute(), student.absolute(), recipe, base, prints)

    def work(self, stage: str) -> Path:
        """The folder of a stage."""
        return self.out / WORK / stage

    @property
    def clip_seconds(self) -> float:
        return self.base.clip.frames / self.base.clip.frame_rate


def _check(folder: Path, option: str, shipped: Path) -> None:
    try:
        check_model(folder)
    except FileNotFoundError as error:
        whose = "the model that ships with the code is not whole" if folder == shipped else "not a model folder"
        raise FileNotFoundError(f"{option}: {whose}: {error}") from None
