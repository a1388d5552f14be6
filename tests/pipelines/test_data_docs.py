"""What README.md and docs/ show of the data plane runs, as it is printed there, in a folder like a user's."""

import re
import shlex
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest

from reelway.kernels.sprites.render import render
from reelway.kernels.sprites.splits import clip_seed, prompts
from reelway.pipelines.video import VideoWriter

sys.path.insert(0, str(Path(__file__).parent))
from faults.steps import call, job_of, worker_here

ROOT = Path(__file__).parents[2]
SMALL = ("clip.frames=9", "student.window=6", "trajectories.minimum_steps=4")  # the recipe's clips take minutes
IMPORTED = (1, 4, 2, 16, 4, 4)  # of docs/datasets.md: four states


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped assets, a video with its caption, and an LMDB."""
    place = tmp_path_factory.mktemp("user")
    (place / "assets").symlink_to(ROOT / "assets")
    (place / "clips").mkdir()
    for index, (caption, scene) in enumerate(prompts("train", 1, 0, 1)):
        with VideoWriter(place / "clips" / f"{index}.mp4", 16) as writer:
            writer.write(render(scene, clip_seed("train", index, 0), 81, level=1, size=64))
        (place / "clips" / f"{index}.txt").write_text(caption)
    with lmdb.open(str(place / "ode_pairs"), map_size=1 << 20) as environment, environment.begin(write=True) as rows:
        rows.put(b"latents_shape", " ".join(map(str, IMPORTED)).encode())
        rows.put(b"latents_0_data", np.zeros(IMPORTED[1:], np.float16).tobytes())
        rows.put(b"prompts_0_data", b"a prompt")
    return place


def shown(page: str, command: str) -> list[list[str]]:
    """The lines of a page that show a command, as words after `reelway`; without their comments."""
    text = (ROOT / page).read_text()
    lines = re.findall(rf"^    reelway ({command} [^#\n\\]+?) *(?:#.*)?$", text, re.M)
    assert lines, f"{page} shows no reelway {command}"
    return [shlex.split(line) for line in lines]


def run(command: list[str], *changes: str) -> str:
    with worker_here(job=job_of(command)):
        outcome = call([*command, *(part for change in changes for part in ("--set", change))])
    assert outcome.code == 0, outcome.text
    return outcome.out


def test_the_readme_s_trajectories_and_what_datasets_md_does_with_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (command,) = shown("README.md", "trajectories")
    command[command.index("--sprites") + 1] = "4"
    assert "4 samples, 0 quarantined" in run(command, *SMALL)
    for line in shown("docs/datasets.md", "shards"):
        outcome = call(line)
        assert outcome.code == 0, outcome.text
    assert (folder / "sheet.png").stat().st_size > 1000
    assert (folder / "runs" / "imported" / "manifest.parquet").exists()
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/datasets.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert tuple(names["latents"].shape) == (5, 3, 16, 8, 8)  # type: ignore[attr-defined]
    assert names["cursor"]["delivered"] == [1]  # type: ignore[index]


@pytest.mark.parametrize("page", ["README.md", "docs/ingest.md"])
def test_ingest_of_a_user_s_folder(page: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (command,) = (line for line in shown(page, "ingest") if "clips/" in line)
    command[command.index("--out") + 1] = str(tmp_path / "latents")
    assert "1 shard, 1 clip of 1 video," in run(command)
