"""What a server is made from: one YAML file, validated, with every default in exactly one place (here)."""

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .placement import FleetSettings
from .terms import WorkerSettings

Positive = Annotated[int, Field(gt=0)]
Amount = Annotated[float, Field(gt=0)]


class Strict(BaseModel):
    """A section: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Strict):
    """A student and its workers. path: its folder, the same on every node.

    cpus, gpus, memory_gb: what Ray sets aside for a worker. threads: of torch, in a worker; a whole number of `cpus` by
    default. stream_gb: memory for the streams of a worker. sessions: streams of a worker, at most; None leaves it to
    memory and measured speed. ahead: chunks that are made before they are due. keep_every: blocks between two snapshots
    of a stream; by default 4, or as many as keep what is written below 100 MB per second of a stream. size: height and
    width of streams that name none; the student's own by default. load: share of the measured speed that is given away.
    """

    path: str
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] | None = None
    min_workers: Annotated[int, Field(ge=0)] = 1
    max_workers: Positive = 1
    cpus: Amount = 1.0
    gpus: Annotated[float, Field(ge=0)] = 0.0
    memory_gb: Amount | None = None
    threads: Positive | None = None
    stream_gb: Amount | None = None
    sessions: Positive | None = None
    ahead: Positive = 2
    keep_every: Positive | None = None
    size: tuple[Positive, Positive] | None = None
    load: Annotated[float, Field(gt=0, le=1)] = 0.9

    @model_validator(mode="after")
    def _bounds(self) -> "ModelConfig":
        if self.min_workers > self.max_workers:
            raise ValueError(f"min_workers {self.min_workers} is over max_workers {self.max_workers}")
        if not self.min_workers and self.size is None:
            raise ValueError("min_workers 0 needs size: no worker is there to say what the student's own is")
        if self.device.startswith("cuda") and not self.gpus:
            raise ValueError("device cuda needs gpus, the share of one that a worker has")
        return self


class LimitsConfig(Strict):
    """What one client may ask for.

    upload_bytes: of a message or request. prompt_length: characters. sessions_per_key, requests_per_minute: without
    keys they count for all together; each gateway counts for itself. requests: streams and videos begun.
    prompts_per_second: new prompts of a stream. idle_seconds: a stream that is paused, or whose viewer takes nothing,
    ends after so long. session_seconds: the longest that a stream may run. unseen_seconds: frames sent ahead of what
    the viewer says that it has seen. queue: orders that may wait, of each model. video_seconds: the longest video that
    may be ordered. videos_per_key: unfinished ones. video_days: that a finished one is kept.
    """

    upload_bytes: Annotated[int, Field(ge=1 << 16, le=12 << 20)] = 8 << 20  # base64 of it must pass a 16 MiB socket
    prompt_length: Positive = 2000
    sessions_per_key: Positive = 16
    requests_per_minute: Positive = 120
    prompts_per_second: Amount = 4.0
    idle_seconds: Amount = 300.0
    session_seconds: Amount = 14400.0
    unseen_seconds: Amount = 3.0
    queue: Annotated[int, Field(ge=0)] = 32
    video_seconds: Positive = 60
    videos_per_key: Positive = 8
    video_days: Amount = 7.0


class ServeConfig(Strict):
    """A server. state: where streams and videos are kept, a folder that all nodes share, or s3://, gs://.

    keys: a file of API keys' hashes. cors: origins of other sites whose pages may use the server. gateways: replicas.
    idle_seconds: that a worker above the minimum stays without streams. resume_seconds: that a stream is kept after its
    viewer has left. lead_seconds: media goes out so long before it is to be shown.
    """

    models: Annotated[dict[str, ModelConfig], Field(min_length=1)]
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    state: str = "serve-state"
    keys: str | None = None
    limits: LimitsConfig = LimitsConfig()
    cors: tuple[str, ...] = ()
    gateways: Positive = 1
    idle_seconds: Amount = 60.0
    resume_seconds: Amount = 900.0
    lead_seconds: Annotated[float, Field(ge=0)] = 0.5

    @field_validator("cors")
    @classmethod
    def _origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin.count("/") != 2 or not origin.startswith(("http://", "https://")):
                raise ValueError(f"an origin is like https://example.org, got {origin!r}")
        return origins

    @field_validator("models")
    @classmethod
    def _names(cls, models: dict[str, ModelConfig]) -> dict[str, ModelConfig]:
        for name in models:
            if not name or len(name) > 64 or not all(letter.isalnum() or letter in "-_." for letter in name):
                raise ValueError(f"a model's name has up to 64 letters, digits, -, _ and ., got {name!r}")
        return models


def read_config(path: Path) -> ServeConfig:
    """FileNotFoundError, or ValueError in one line, with the key that is wrong."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a mapping of keys to values")
    return make_config(content, str(path))


def make_config(content: dict[str, Any], where: str) -> ServeConfig:
    """ValueError in one line that begins with `where`."""
    try:
        return ServeConfig.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(
            f"{where}: {place}: {first['msg'].removeprefix('Value error, ')}, got {_short(first)}"
        ) from None


def _short(complaint: Any) -> str:
    text = repr(complaint["input"])
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a server that binds to `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_access(config: ServeConfig, has_keys: bool) -> None:
    """ValueError where anybody could use the server."""
    if not has_keys and not is_loopback(config.host):
        raise ValueError(
            f"host: without API keys the server binds to loopback only, got {config.host}; "
            "make a key with `reelway serve key`, put its hash into a file, and name that file under `keys`"
        )


def fleets(config: ServeConfig) -> dict[str, FleetSettings]:
    """The pool's settings of each model."""
    return {name: _fleet(config, model) for name, model in config.models.items()}


def _fleet(config: ServeConfig, model: ModelConfig) -> FleetSettings:
    worker = WorkerSettings(
        path=model.path,
        state=config.state,
        device=model.device,
        dtype=model.dtype,
        threads=model.threads or max(1, int(model.cpus)),
        budget=_bytes(model.stream_gb),
        sessions=model.sessions,
        ahead=model.ahead,
        keep_every=model.keep_every,
        load=model.load,
        size=model.size,
    )
    return FleetSettings(
        worker,
        min_workers=model.min_workers,
        max_workers=model.max_workers,
        cpus=model.cpus,
        gpus=model.gpus,
        memory=_bytes(model.memory_gb),
        queue=config.limits.queue,
        idle_seconds=config.idle_seconds,
    )


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else int(gigabytes * 1e9)
