"""What `reelway ingest` has to make: from videos, captions and a recipe to planned shards, and a list of what is not.

A video gives any number of clips, and a shard must know its samples beforehand: that is what makes it whole or not
there, the same on any worker, and its quarantine complete. So the videos are surveyed first, by reading each file's
packets once (a few percent of what decoding costs), and the result is kept in the data set's folder as
`sources.parquet`. Then one planned item is one clip, with the key `<video>-<clip>`. Decoding has no say in the plan: a
clip that turns out to be damaged, black or gone is quarantined under its own key.
"""

import hashlib
import io
import json
import posixpath
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import pyarrow
import pyarrow.compute
import pyarrow.parquet
import torch

from ..actors.clips import ClipSettings
from ..actors.encoder import STORED, latents_shape, text_digest, text_dim, vae_digest, vae_folder
from ..actors.ingest import BATCHES_AHEAD, SAMPLE_FORMAT, IngestSettings, IngestWorker
from ..actors.sources import VideoFile, VideoFolder
from ..actors.survey import FOLDER, Chunk, Surveyor
from ..cluster.dataset import INFO, DatasetInfo, read_dataset
from ..cluster.manifest import ManifestRow, ShardPlan, pending, plan, read_sound_record, table_of
from ..cluster.storage import Storage
from .captions import CaptionProblem, Reading, read_beside, read_captions
from .making import check_same
from .recipe import Recipe, fingerprint

KIND: Final = "latents"
SOURCES: Final = "sources.parquet"
QUARANTINE: Final = "quarantine.parquet"
LISTING, CAPTION = "listing", "caption"  # stages, before those of `actors.survey` and `actors.ingest`
MOST_IN_CHUNK: Final = 64  # videos that one worker surveys at a time
READERS: Final = 16
WORKER_BYTES: Final = 3 << 29  # of a worker without a model: Python, torch, the libraries
LANE_BYTES: Final = 1 << 29  # of a process that decodes
SAMPLE_BYTES: Final = 4096  # of a sample besides its latents: headers, caption, meta

_SOURCES_SCHEMA = pyarrow.schema(
    [
        pyarrow.field("path", pyarrow.string(), nullable=False),
        pyarrow.field("bytes", pyarrow.int64(), nullable=False),
        pyarrow.field("seconds", pyarrow.float64()),
        pyarrow.field("width", pyarrow.int32()),
        pyarrow.field("height", pyarrow.int32()),
        pyarrow.field("frames_per_second", pyarrow.float64()),
        pyarrow.field("clips", pyarrow.int32(), nullable=False),
        pyarrow.field("stage", pyarrow.string()),
        pyarrow.field("reason", pyarrow.string()),
        pyarrow.field("detail", pyarrow.string()),
    ]
)
_QUARANTINE_SCHEMA = pyarrow.schema(
    [
        pyarrow.field("path", pyarrow.string(), nullable=False),
        pyarrow.field("clip", pyarrow.int32()),
        pyarrow.field("stage", pyarrow.string(), nullable=False),
        pyarrow.field("reason", pyarrow.string(), nullable=False),
        pyarrow.field("detail", pyarrow.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Order:
    """What a user asked for. model: a VAE's or a whole model's folder, as every worker sees it. captions: a table's
    address; None for text files beside the videos. threads: of torch; lanes: processes that decode, of one worker.
    """

    recipe: Recipe
    videos: VideoFolder
    captions: str | None
    model: Path
    out: Storage
    device: str = "cpu"
    threads: int = 1
    lanes: int = 1
    limit: int | None = None


@dataclass(frozen=True, order=True)
class Problem:
    """A row of the quarantine: a video, or one of its clips (-1: the video as a whole).

    stage: listing, caption, survey, filter, decode or encode. reason: a word. detail: the rule and the value.
    """

    path: str
    clip: int
    stage: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Material:
    """Videos that have a caption, and what is wrong with the others. ignored: files that are no videos."""

    videos: tuple[VideoFile, ...]
    captions: Mapping[str, str]
    problems: tuple[Problem, ...]
    ignored: int

    @property
    def identity(self) -> str:
        """Differs when a video comes, goes or has another size."""
        return fingerprint({"videos": [[video.path, video.size] for video in self.videos]})


# --- Videos and captions -------------------------------------------------------------------------------------------


def gather(order: Order) -> Material:
    """List the videos and give each its caption. FileNotFoundError or ValueError where there is nothing to do."""
    found = order.videos.listing()
    problems = [Problem(_text(path), -1, LISTING, reason, text) for path, reason, text in found.problems]
    if not found.videos and not problems:
        raise ValueError(f"{order.videos.address}: no video in it (of {found.others:,} files)")
    chosen = found.videos[: order.limit]
    if order.captions is None:
        captions, faults = read_beside([video.path for video in chosen], found.texts, order.videos.read)
    else:
        captions, faults = _from_table(order, order.captions, {video.path for video in found.videos})
    known = {fault.name for fault in faults}
    wanted = {video.path for video in chosen}
    problems += [
        Problem(_text(fault.name), -1, CAPTION, fault.code, _text(fault.text))
        for fault in faults
        if order.limit is None or fault.name in wanted
    ]
    problems += [
        Problem(video.path, -1, CAPTION, "missing", f"{video.path}: the captions do not name it")
        for video in chosen
        if video.path not in captions and video.path not in known
    ]
    usable = tuple(video for video in chosen if video.path in captions)
    return Material(usable, captions, tuple(sorted(problems)), found.others)


def _from_table(order: Order, address: str, videos: set[str]) -> Reading:
    """The table's captions under the videos' relative paths. One that belongs to no video is a problem."""
    with _table(address) as path:
        read, faults = read_captions(path)
    captions: dict[str, str] = {}
    problems: list[CaptionProblem] = []
    for fault in faults:
        problems.append(replace(fault, name=_relative(fault.name, order.videos)))
    for name, caption in read.items():
        relative = _relative(name, order.videos)
        if relative in captions:
            problems.append(CaptionProblem(relative, "duplicate", f"{name}: a second caption; the first holds"))
        elif relative in videos:
            captions[relative] = caption
        else:
            problems.append(CaptionProblem(relative, "no-video", f"{name}: has a caption, but there is no such video"))
    return captions, problems


@contextmanager
def _table(address: str) -> Iterator[Path]:
    """A table of captions as a file of this machine, under its own name."""
    if "://" not in address:
        yield Path(address)
        return
    place, mark, query = address.partition("?")
    folder, _, name = place.rpartition("/")
    with tempfile.TemporaryDirectory(prefix="reelway-captions-") as temporary:
        path = Path(temporary, name)
        path.write_bytes(Storage.open(f"{folder}{mark}{query}").read(name))
        yield path


def _relative(name: str, folder: VideoFolder) -> str:
    """A table's name of a video as a path below the folder; a full address or path is one, too."""
    root = folder.address.partition("?")[0].rstrip("/") + "/"
    return posixpath.normpath(name.removeprefix(root))


def _text(name: str) -> str:
    """What may hold a file's name as one line of text; bytes that are not UTF-8 are written out."""
    return " ".join(name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").split())


# --- The survey ----------------------------------------------------------------------------------------------------


def clip_settings(recipe: Recipe) -> ClipSettings:
    """How clips are cut. The recipe's thresholds of motion and brightness count from 0 to 255, these from 0 to 1."""
    clip, ingest = recipe.clip, recipe.ingest
    for name, value in (("least_motion", ingest.least_motion), ("least_brightness", ingest.least_brightness)):
        if value > 255:
            raise ValueError(f"ingest.{name}: must be at most 255, got {value:g}")
    return ClipSettings(
        frames_per_second=clip.frame_rate,
        width=clip.width,
        height=clip.height,
        frames=clip.frames,
        stride=ingest.stride or clip.frames,
        minimum_seconds=0.0,  # a clip's own length is the rule
        minimum_width=ingest.smallest_side,
        minimum_height=ingest.smallest_side,
        static_below=ingest.least_motion / 255,
        black_below=ingest.least_brightness / 255,
    )


def chunks(order: Order, material: Material) -> list[Chunk]:
    """The videos in the chunks that workers survey; so small, in a small set, that several workers have something."""
    size = max(1, min(MOST_IN_CHUNK, len(material.videos) // MOST_IN_CHUNK))
    settings, reader = clip_settings(order.recipe), f"av {version('av')}"
    starts = range(0, len(material.videos), size)
    return [Chunk.of(material.videos[start : start + size], settings, reader) for start in starts]


def surveyed(out: Storage) -> set[str]:
    """Names of the chunks that were surveyed by an interrupted run."""
    return {f"{FOLDER}/{entry.name}" for entry in out.entries(FOLDER)}


def surveyor(order: Order) -> "partial[Surveyor]":
    """Builds a worker in its own process."""
    return partial(Surveyor, order.videos, order.out, clip_settings(order.recipe))


def keep_sources(order: Order, material: Material) -> pyarrow.Table:
    """Publish `sources.parquet` of all chunks, which are removed; its table, a row per video, sorted by path."""
    parts = chunks(order, material)
    with ThreadPoolExecutor(READERS) as readers:
        found = list(readers.map(lambda chunk: json.loads(order.out.read(chunk.name)), parts))
    rows = [row for part in found for row in part]
    metadata = {"survey": _survey_identity(parts)}
    table = sources_table(rows).replace_schema_metadata(metadata)
    order.out.publish(SOURCES, _parquet(table), replace=True)
    for name in surveyed(order.out):
        order.out.delete(name)
    order.out.remove_stale(older_than=0.0, folder=FOLDER)
    return table


def sources_table(rows: Sequence[dict[str, Any]]) -> pyarrow.Table:
    """Rows of `Surveyor.survey` as a table."""
    return pyarrow.Table.from_pylist(rows, schema=_SOURCES_SCHEMA)


def known_sources(order: Order, material: Material) -> pyarrow.Table | None:
    """The survey of exactly these videos by these settings, if it is there."""
    if not order.out.exists(SOURCES):
        return None
    table = table_of(order.out.read(SOURCES))
    identity = (table.schema.metadata or {}).get(b"survey", b"").decode()
    return table if identity == _survey_identity(chunks(order, material)) else None


def _survey_identity(parts: Sequence[Chunk]) -> str:
    return hashlib.sha256("\n".join(chunk.name for chunk in parts).encode()).hexdigest()[:16]


# --- The plan ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """An order on a known kind of device, with its videos surveyed: exactly which bytes shall be made."""

    order: Order
    material: Material
    sources: pyarrow.Table
    settings: IngestSettings
    info: DatasetInfo
    shards: list[ShardPlan]

    @property
    def clips(self) -> int:
        return sum(shard.items.num_rows for shard in self.shards)

    def pending(self) -> list[ShardPlan]:
        """The shards still to be made. ValueError when the folder holds another data set."""
        return pending(self.order.out, self.shards)

    def worker(self) -> "partial[IngestWorker]":
        """Builds a worker in its own process."""
        return partial(IngestWorker, self.order.videos, self.order.model, self.order.out, self.settings)


def plan_job(order: Order, material: Material, sources: pyarrow.Table, kind: str) -> Job:
    """Plan every clip and shard."""
    settings = ingest_settings(order, kind)
    made_by = _made_by(order, material, settings)
    identity = fingerprint(made_by)
    info = DatasetInfo(kind=KIND, fields=settings.fields(), made_by=made_by, fingerprint=identity)
    shards = plan(_items(sources, material.captions), order.recipe.ingest.per_shard, identity)
    return Job(order, material, sources, settings, info, shards)


def check_order(order: Order, material: Material, kind: str | None) -> None:
    """Raises ValueError, naming the first setting that differs, when the folder holds another data set."""
    if order.out.exists(INFO):
        stored = str(read_dataset(order.out).made_by.get("device"))
        check_same(order.out, KIND, _made_by(order, material, ingest_settings(order, kind or stored)))


def ingest_settings(order: Order, kind: str) -> IngestSettings:
    """All that decides a sample. ValueError or FileNotFoundError names what is wrong with recipe or model."""
    recipe, clip = order.recipe, order.recipe.clip
    with_text = recipe.ingest.text_embeddings
    return IngestSettings(
        clip=clip_settings(recipe),
        batch=recipe.ingest.batch,
        shape=latents_shape(order.model, clip.height, clip.width, clip.frames),
        text_dim=text_dim(order.model) if with_text else None,
        device=order.device,
        threads=order.threads,
        device_kind=kind,
        torch=torch.__version__,
        vae=_digest_once(vae_digest, order.model),
        text=_digest_once(text_digest, order.model) if with_text else None,
        lanes=order.lanes,
    )


@cache
def _digest_once(digest: Callable[[Path], str], model: Path) -> str:
    return digest(model)


def worker_bytes(order: Order) -> int:
    """Host memory that a worker should have reserved: its model, the clips that wait, and a batch's activations."""
    clip, batch = order.recipe.clip, order.recipe.ingest.batch
    pixels = clip.height * clip.width * 3
    held = ((order.lanes + 1) * BATCHES_AHEAD + 2) * batch * clip.frames * pixels
    needed = WORKER_BYTES + order.lanes * LANE_BYTES + held + 2 * encoder_bytes(order)
    if order.device == "cpu":  # a few of the widest layer's outputs, 96 channels for 3 colours, for 17 frames
        needed += 4 * batch * 17 * pixels * 32 * 4
    return needed


def encoder_bytes(order: Order) -> int:
    """Of the files of the networks that a worker loads, which is what these take on its device."""
    parts = [order.model / "text_encoder"] if order.recipe.ingest.text_embeddings else []
    folders = [vae_folder(order.model), *parts]
    return sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors"))


def _made_by(order: Order, material: Material, settings: IngestSettings) -> dict[str, Any]:
    """Everything that decides the bytes, under the names that a user knows. No paths: a copy is the same data."""
    return {
        "command": "reelway ingest",
        "sample_format": SAMPLE_FORMAT,
        "vae": settings.vae,
        "text_encoder": settings.text,
        "videos": {"count": len(material.videos), "fingerprint": material.identity},
        "captions": fingerprint({"captions": [material.captions[video.path] for video in material.videos]}),
        "clip": asdict(settings.clip),
        "ingest": order.recipe.ingest.model_dump(mode="json"),
        "latents": {"shape": list(settings.shape), "dtype": str(STORED).removeprefix("torch.")},
        "device": settings.device_kind,
        "threads": settings.threads,
        "torch": settings.torch,
        "av": version("av"),
        "decord": version("decord"),
    }


def _items(sources: pyarrow.Table, captions: Mapping[str, str]) -> pyarrow.Table:
    """One row per clip, by the hash of the video's path: shards are mixed, and a video's clips stand together."""
    paths, counts = sources.column("path").to_pylist(), sources.column("clips").to_pylist()
    videos = sorted((video_id(path), path, count) for path, count in zip(paths, counts, strict=True))
    rows = [(f"{key}-{clip:06d}", path, clip) for key, path, count in videos for clip in range(count)]
    return pyarrow.table(
        {
            "key": pyarrow.array([key for key, _, _ in rows], pyarrow.string()),
            "path": pyarrow.array([path for _, path, _ in rows], pyarrow.string()),
            "clip": pyarrow.array([clip for _, _, clip in rows], pyarrow.int32()),
            "caption": pyarrow.array([captions[path] for _, path, _ in rows], pyarrow.string()),
        }
    )


def video_id(path: str) -> str:
    """A video's name in keys: sixteen hexadecimal digits of its relative path's hash."""
    return hashlib.sha256(path.encode()).hexdigest()[:16]


# --- The quarantine ------------------------------------------------------------------------------------------------


def quarantine(job: Job, rows: Sequence[ManifestRow]) -> list[Problem]:
    """All that gave no sample, and captions that were not used; sorted. From the survey and the shards' records."""
    refused = job.sources.filter(pyarrow.compute.is_valid(job.sources.column("stage"))).to_pylist()
    problems = [Problem(row["path"], -1, row["stage"], row["reason"], row["detail"]) for row in refused]
    shards = {shard.name: shard for shard in job.shards}
    torn = [shards[row.name] for row in rows if row.quarantined]
    with ThreadPoolExecutor(READERS) as readers:
        for found in readers.map(lambda shard: list(_recorded(job.order.out, shard)), torn):
            problems += found
    return sorted([*job.material.problems, *problems])


def write_quarantine(out: Storage, problems: Sequence[Problem]) -> None:
    """Publish `quarantine.parquet`; `clip` is null where the whole video is meant."""
    rows = [{**asdict(problem), "clip": None if problem.clip < 0 else problem.clip} for problem in problems]
    out.publish(QUARANTINE, _parquet(pyarrow.Table.from_pylist(rows, schema=_QUARANTINE_SCHEMA)), replace=True)


def counts(problems: Sequence[Problem]) -> Counter[tuple[str, str]]:
    """How many there are of each (stage, reason)."""
    return Counter((problem.stage, problem.reason) for problem in problems)


def _recorded(out: Storage, shard: ShardPlan) -> Iterator[Problem]:
    record = read_sound_record(out, shard.name)
    items = {item["key"]: item for item in shard.items.select(["key", "path", "clip"]).to_pylist()}
    for key, reason in (record.reasons if record else {}).items():
        yield Problem(items[key]["path"], items[key]["clip"], *reason.split(": ", 2))


def _parquet(table: pyarrow.Table) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink, compression="zstd")
    return sink.getvalue()
