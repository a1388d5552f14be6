"""The demo's last stage: `index.html` and the media beside it, which need nothing else."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from ...actors.bench_report import FRAME_RATE
from ..recipe import TINY, load_recipe
from ..video import VideoFile
from . import sections
from .figures import Figures, headlines
from .rollouts import CLIP, IMAGE, MINUTE, SWITCH, TEACHER, VIDEO
from .runner import Done, Record, Screen, Stage, read_record
from .settings import MEDIA, PAGE, Demo
from .stages import EVALUATE, PROMPTS, ROLLOUTS, SOURCE, STAGES
from .stages import IMAGE as GIVEN_IMAGE

TEMPLATE = Path(__file__).with_name("page.html")
CODE = (TEMPLATE, Path(__file__), Path(sections.__file__))


def write_page(demo: Demo, folder: Path, screen: Screen) -> Done:
    """Gather what the stages made into the page."""
    records = {stage.name: read_record(demo.work(stage.name)) for stage in STAGES}
    figures = Figures.gather(demo, records)
    media = _media(demo, figures)
    page = demo.out / PAGE
    page.write_text(render(demo, figures), encoding="utf-8")
    return Done(f"{demo.out / PAGE}, {len(media)} files beside it in {MEDIA}/", [page, *media])


def render(demo: Demo, figures: Figures) -> str:
    """The page as text. Every word that is not the code's own is escaped in `sections`."""
    full = load_recipe(TINY)
    fields = {
        "intro": sections.intro(figures),
        "tiles": sections.tiles(headlines(figures)),
        **sections.twice(figures),
        **sections.long_stream(figures),
        "ways": sections.ways(figures),
        **sections.heldout(figures),
        **sections.speed(figures),
        **sections.quality(figures),
        **sections.training(figures, demo.base, full),
        **sections.where(figures.records),
        **sections.recipe(demo, figures),
        "footer": sections.footer(figures),
    }
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(fields)


def _media(demo: Demo, figures: Figures) -> list[Path]:
    """Copies of the videos under names that say what they are, each with its first frame as a poster."""
    target = demo.out / MEDIA
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    shown = {f"{sections.NAMES[name]}.mp4": demo.work(ROLLOUTS) / f"{name}.mp4" for name in _TAKES}
    shown["video-given.mp4"] = demo.work(PROMPTS) / SOURCE
    prompts = sections.prompts_of(figures)
    for cell in figures.cells:
        name = sections.cell_name(prompts.index(cell["prompt"]), cell["model"])
        shown[f"{name}.mp4"] = demo.work(EVALUATE) / "videos" / f"{cell['key']}.mp4"
    made = [Path(shutil.copyfile(demo.work(PROMPTS) / GIVEN_IMAGE, target / "image-given.png"))]
    for name, source in shown.items():
        video = Path(shutil.copyfile(source, target / name))
        made += [video, _poster(video, demo.base.clip.height)]
    return made


_TAKES = (CLIP, TEACHER, MINUTE, IMAGE, VIDEO, SWITCH)


def _poster(video: Path, side: int) -> Path:
    path = video.with_suffix(".webp")
    first = next(iter(VideoFile(video, FRAME_RATE).read(side, side, 0, 1)))
    Image.fromarray(first).save(path, "WEBP", lossless=True)
    return path


def _inputs(demo: Demo) -> dict[str, Any]:
    """What the page shows: all that the stages have noted, and the page's own code."""
    records: Mapping[str, Record] = {stage.name: read_record(demo.work(stage.name)) for stage in STAGES}
    text = json.dumps([records, demo.recipe.model_dump(mode="json"), [path.read_text() for path in CODE]])
    return {"shown": hashlib.sha256(text.encode()).hexdigest()}


PAGE_STAGE = Stage("page", "a page to look at", write_page, _inputs)
