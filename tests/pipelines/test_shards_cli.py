"""`reelway shards sample` and `reelway shards import-lmdb`, against an LMDB that the lmdb package wrote."""

import sys
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from reelway.cluster.dataset import read_dataset
from reelway.cluster.manifest import read_manifest
from reelway.cluster.shards import ShardReader, verify
from reelway.cluster.storage import Storage
from reelway.kernels.wan.vae import StreamingVAE
from reelway.pipelines import lmdb_import
from reelway.pipelines.cli import main
from reelway.pipelines.lmdb_import import LmdbSet, import_lmdb
from reelway.pipelines.sheet import COLUMNS, GAP, LINE_HEIGHT, contact_sheet

VAE = Path(__file__).parents[2] / "assets" / "tiny" / "vae"
ROWS, STATES, CLIP = 5, 3, (2, 16, 4, 4)
LEVELS = [1000.0, 757.0, 0.0]
PIXELS, FRAMES = 8 * CLIP[-1], 1 + 4 * (CLIP[0] - 1)
TEXT_HEIGHT = LINE_HEIGHT + GAP

Run = Callable[..., tuple[int, str, str]]


def _values(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float16)


def _write_lmdb(folder: Path, values: np.ndarray, changes: dict[str, bytes | None] | None = None) -> Path:
    """CausVid's layout by its own recipe: `tobytes` of each row. changes: of keys; None takes one away."""
    content = {"latents_shape": " ".join(map(str, values.shape)).encode(), "prompts_shape": b"%d" % len(values)}
    for index, row in enumerate(values):
        content[f"latents_{index}_data"] = row.tobytes()
        content[f"prompts_{index}_data"] = f"ein Käfer, Nummer {index}".encode()
    with lmdb.open(str(folder), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for key, value in (content | (changes or {})).items():
            if value is not None:
                transaction.put(key.encode(), value)
    return folder


@pytest.fixture
def trajectories(tmp_path: Path) -> Path:
    return _write_lmdb(tmp_path / "lmdb", _values(ROWS, STATES, *CLIP))


@pytest.fixture
def reelway(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["reelway", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def _import(reelway: Run, source: Path, out: Path, *more: object) -> tuple[int, str, str]:
    return reelway("shards", "import-lmdb", source, "--out", out, "--per-shard", 2, *more)


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# --- Import ------------------------------------------------------------------------------------------------


def test_trajectories_arrive_as_they_were(tmp_path: Path, trajectories: Path, reelway: Run) -> None:
    out = tmp_path / "set"
    code, said, _ = _import(reelway, trajectories, out, "--timesteps", "1000,757,0")
    assert (code, said) == (0, f"{out}: sound: 3 shards, 5 samples, 0 quarantined\n")
    storage = Storage.open(out)
    info = read_dataset(storage)
    assert (info.kind, info.made_by["timesteps"]) == ("trajectories", LEVELS)
    assert verify(storage) == []
    found = {sample["__key__"]: sample for sample in ShardReader(storage)}
    for index, row in enumerate(_values(ROWS, STATES, *CLIP)):
        sample = found[f"{index:08d}"]
        assert torch.equal(sample["trajectory.safetensors"]["latents"], torch.from_numpy(row))
        assert sample["prompt.txt"] == f"ein Käfer, Nummer {index}"


def test_latents_arrive_as_they_were(tmp_path: Path, reelway: Run) -> None:
    source = _write_lmdb(tmp_path / "lmdb", _values(ROWS, *CLIP))
    assert _import(reelway, source, tmp_path / "set")[0] == 0
    storage = Storage.open(tmp_path / "set")
    assert read_dataset(storage).kind == "latents"
    found = {sample["__key__"]: sample for sample in ShardReader(storage)}
    for index, row in enumerate(_values(ROWS, *CLIP)):
        sample = found[f"{index:08d}"]
        assert torch.equal(sample["latents.safetensors"]["latents"], torch.from_numpy(row))
        assert sample["caption.txt"] == f"ein Käfer, Nummer {index}"


def test_an_interrupted_import_goes_on_to_the_same_bytes(
    tmp_path: Path, trajectories: Path, reelway: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = lmdb_import.write_shard, []

    def interrupted(storage: Storage, shard: object, samples: object) -> object:
        if len(written) == 1:
            written.append("interrupted")
            raise KeyboardInterrupt
        written.append(shard)
        return write(storage, shard, samples)

    whole, out = tmp_path / "whole", tmp_path / "set"
    assert _import(reelway, trajectories, whole, "--timesteps", "1000,757,0")[0] == 0
    monkeypatch.setattr(lmdb_import, "write_shard", interrupted)
    code, _, err = _import(reelway, trajectories, out, "--timesteps", "1000,757,0")
    assert code == 130
    assert "The same command goes on from there" in err
    assert sorted(path.name for path in out.glob("*.tar")) == ["shard-000000.tar"]
    assert _import(reelway, trajectories, out, "--timesteps", "1000,757,0")[0] == 0
    assert [shard.name for shard in written[2:]] == ["shard-000001.tar", "shard-000002.tar"]
    assert _content(out) == _content(whole)


BROKEN: dict[str, tuple[dict[str, bytes | None], str]] = {
    "no shape": ({"latents_shape": None}, "latents_shape: no such key"),
    "shape of words": ({"latents_shape": b"5 three 2 16 4 4"}, "must be 'N K F C H W' or 'N F C H W', got '5 three"),
    "short shape": ({"latents_shape": b"5 3 2"}, "must be 'N K F C H W' or 'N F C H W', got '5 3 2'"),
    "empty shape": ({"latents_shape": b"5 0 2 16 4 4"}, "must be 'N K F C H W'"),
    "no latents": ({"latents_3_data": None}, r"latents_3_data: no such key \(1 of 5 rows damaged\)"),
    "no prompt": ({"prompts_0_data": None}, "prompts_0_data: no such key"),
    "too few bytes": ({"latents_2_data": bytes(10)}, "latents_2_data: must be 3072 bytes, .* of float16, got 10"),
    "float32": ({"latents_2_data": bytes(6144)}, "latents_2_data: must be 3072 bytes, .* of float16, got 6144"),
    "not a text": ({"prompts_4_data": b"\xff\xfe"}, "prompts_4_data: is not UTF-8"),
    "not a number": ({"latents_1_data": b"\x00\x7e" * 1536}, "latents_1_data: holds values that are not finite"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_a_broken_lmdb_is_named_in_one_line(tmp_path: Path, case: str, reelway: Run) -> None:
    changes, words = BROKEN[case]
    source = _write_lmdb(tmp_path / "lmdb", _values(ROWS, STATES, *CLIP), changes)
    with pytest.raises(ValueError, match=words), LmdbSet(source) as rows:
        import_lmdb(rows, Storage.open(tmp_path / "set"), LEVELS)
    code, _, err = _import(reelway, source, tmp_path / "set", "--timesteps", "1000,757,0")
    assert code == 2
    assert err.splitlines()[-1].startswith(f"reelway: {source}: ")
    assert not list((tmp_path / "set").glob("*.tar")) or case == "not a number"


def test_damaged_rows_are_left_out_and_counted(tmp_path: Path, reelway: Run) -> None:
    changes = {"latents_2_data": bytes(10), "latents_1_data": b"\x00\x7e" * 1536, "prompts_4_data": None}
    source = _write_lmdb(tmp_path / "lmdb", _values(ROWS, STATES, *CLIP), changes)
    out = tmp_path / "set"
    code, said, _ = _import(reelway, source, out, "--timesteps", "1000,757,0", "--damaged", "skip")
    assert (code, said) == (0, f"{out}: sound: 3 shards, 2 samples, 3 quarantined\n")
    assert [row.quarantined for row in read_manifest(Storage.open(out))] == [1, 1, 1]
    assert b"latents_2_data: must be 3072 bytes" in (out / "shard-000001.json").read_bytes()


def test_a_file_that_was_cut_short_is_refused(tmp_path: Path, trajectories: Path) -> None:
    data = trajectories / "data.mdb"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"data\.mdb: is cut short: \d+ bytes, its own index speaks of \d+"):
        LmdbSet(trajectories)
    data.write_bytes(bytes(100))
    with pytest.raises(ValueError, match="not an LMDB"):
        LmdbSet(trajectories)
    with pytest.raises(FileNotFoundError, match="no such LMDB"):
        LmdbSet(tmp_path / "none")


@pytest.mark.parametrize(
    ("timesteps", "words"),
    [
        ("", "holds 3 states, so it takes 3, got 0"),
        ("1000,757,522,0", "holds 3 states, so it takes 3, got 4"),
        ("0,757,1000", "must fall from at most 1000 to 0"),
        ("1000,757,1", "must fall from at most 1000 to 0"),
        ("1001,757,0", "must fall from at most 1000 to 0"),
        ("1000,x,0", "must be numbers with commas between them, got '1000,x,0'"),
    ],
)
def test_timesteps_must_be_those_of_the_states(
    tmp_path: Path, trajectories: Path, reelway: Run, timesteps: str, words: str
) -> None:
    code, _, err = _import(reelway, trajectories, tmp_path / "set", "--timesteps", timesteps)
    assert code == 2
    (line,) = err.splitlines()
    assert f"--timesteps: {words}" in line.replace(f"{trajectories} ", "")
    assert not (tmp_path / "set").exists()


def test_clean_latents_take_no_timesteps(tmp_path: Path, reelway: Run) -> None:
    source = _write_lmdb(tmp_path / "lmdb", _values(ROWS, *CLIP))
    code, _, err = _import(reelway, source, tmp_path / "set", "--timesteps", "1000,757,0")
    assert code == 2
    assert "holds clean latents [2, 16, 4, 4], which have none" in err


def test_without_the_package_one_line_says_so(
    tmp_path: Path, trajectories: Path, reelway: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lmdb", None)
    code, _, err = _import(reelway, trajectories, tmp_path / "set", "--timesteps", "1000,757,0")
    assert code == 2
    assert err.endswith("reelway: import-lmdb needs the package lmdb, which is not here: pip install 'reelway[lmdb]'\n")


# --- Sample ------------------------------------------------------------------------------------------------


def _strips(path: Path) -> np.ndarray:
    """The first frame of every row of a sheet, uint8 [rows, H, W, 3]."""
    image = np.asarray(Image.open(path))
    height = 2 * PIXELS + TEXT_HEIGHT + GAP
    return np.stack(
        [image[top + TEXT_HEIGHT :][: 2 * PIXELS : 2, : 2 * PIXELS : 2] for top in range(0, len(image), height)]
    )


def test_a_label_that_is_wider_than_its_frames_goes_on_in_the_next_line(tmp_path: Path) -> None:
    words, frames = "a large purple star that moves slowly in circles over brown", np.zeros((2, 64, 64, 3), np.uint8)
    contact_sheet([(words, frames)], tmp_path / "long.png", columns=2, scale=1)
    contact_sheet([("a star", frames)], tmp_path / "short.png", columns=2, scale=1)
    long, short = (np.asarray(Image.open(tmp_path / name)) for name in ("long.png", "short.png"))
    lines = (len(long) - len(short)) // LINE_HEIGHT + 1
    assert lines in (3, 4)
    assert long.shape[1] == short.shape[1] == 2 * (64 + GAP)
    assert (long[: lines * LINE_HEIGHT, -2:] == 255).all()  # no word is cut at the edge
    for line in range(lines):
        assert (long[line * LINE_HEIGHT : (line + 1) * LINE_HEIGHT, :64] < 128).any()


def _decoded(latents: torch.Tensor) -> np.ndarray:
    """The first frame by the VAE itself."""
    with torch.no_grad():
        pixels, _ = StreamingVAE.from_pretrained(VAE).decode(latents[None].float())
    return ((pixels[0, 0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()


def test_a_sheet_shows_clean_ends_and_states(tmp_path: Path, trajectories: Path, reelway: Run) -> None:
    out, sheet = tmp_path / "set", tmp_path / "sheet.png"
    assert _import(reelway, trajectories, out, "--timesteps", "1000,757,0")[0] == 0
    code, said, _ = reelway("shards", "sample", out, 2, "--vae", VAE, "--out", sheet, "--seed", 3)
    assert code == 0
    lines = [line.split() for line in said.splitlines()]
    assert [f"shard-{int(key) // 2:06d}.tar" for key, _ in lines] == [shard for _, shard in lines]
    rows = 2 * STATES
    width = min(COLUMNS, FRAMES) * (2 * PIXELS + GAP)
    assert Image.open(sheet).size == (width, rows * (2 * PIXELS + TEXT_HEIGHT + GAP))
    values = torch.from_numpy(_values(ROWS, STATES, *CLIP))
    shown = _strips(sheet)
    for place, (key, _) in enumerate(lines):
        *noisy, clean = values[int(key)]
        for strip, state in zip(shown[place * STATES :], [clean, *noisy], strict=False):
            assert np.abs(strip.astype(int) - _decoded(state)).max() <= 1
    again = reelway("shards", "sample", out, 2, "--vae", VAE, "--out", sheet, "--seed", 3)[1]
    other = {reelway("shards", "sample", out, 2, "--vae", VAE, "--out", sheet, "--seed", seed)[1] for seed in (4, 5, 6)}
    assert again == said
    assert len({said, *other}) > 1


def test_a_sheet_of_latents_has_one_row_a_clip_and_no_clip_twice(tmp_path: Path, reelway: Run) -> None:
    source = _write_lmdb(tmp_path / "lmdb", _values(ROWS, *CLIP))
    out, sheet = tmp_path / "set", tmp_path / "sheet.png"
    assert _import(reelway, source, out)[0] == 0
    code, said, _ = reelway("shards", "sample", out, 9, "--vae", VAE, "--out", sheet)
    assert code == 0
    assert [line.split()[0] for line in said.splitlines()] == [f"{index:08d}" for index in range(ROWS)]
    assert len(_strips(sheet)) == ROWS


def test_a_sheet_of_what_cannot_be_shown_is_refused(tmp_path: Path, reelway: Run) -> None:
    source = _write_lmdb(tmp_path / "lmdb", _values(ROWS, 2, 8, 4, 4))
    out = tmp_path / "set"
    assert _import(reelway, source, out)[0] == 0
    code, _, err = reelway("shards", "sample", out, 1, "--vae", VAE)
    assert (code, "expected [B, n, 16, h, w], got [1, 2, 8, 4, 4]" in err) == (2, True)
    assert reelway("shards", "sample", out, 1, "--vae", tmp_path)[0] == 2
    info = (out / "dataset.json").read_text().replace("caption.txt", "title.txt")
    (out / "dataset.json").write_text(info)
    code, _, err = reelway("shards", "sample", out, 1, "--vae", VAE)
    assert (code, "dataset.json: fields: need latents.safetensors with caption.txt" in err) == (2, True)


@pytest.mark.parametrize("name", ["sheet.jpg", "sheet", "."])
def test_a_sheet_is_a_png(tmp_path: Path, trajectories: Path, reelway: Run, name: str) -> None:
    assert _import(reelway, trajectories, tmp_path / "set", "--timesteps", "1000,757,0")[0] == 0
    out = tmp_path / name
    refused = (2, "", f"reelway: --out: must be a .png file, got {out}\n")
    assert reelway("shards", "sample", tmp_path / "set", 1, "--vae", VAE, "--out", out) == refused


@pytest.mark.parametrize("command", ["inspect", "verify", "repair"])
def test_a_file_is_no_data_set(tmp_path: Path, reelway: Run, command: str) -> None:
    file = tmp_path / "file"
    file.write_text("")
    refused = (2, "", f"reelway: {file}: is a file; a data set's folder is needed\n")
    assert reelway("shards", command, file) == refused
