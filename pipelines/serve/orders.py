"""From a client's first message to the stream that it asks for."""

import asyncio
import secrets
import time
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ...actors.modes import Redraw
from ...actors.orders import StreamOrder
from ...kernels.clips import Pixels
from .backend import ASK_AGAIN, Backend, PlacedStream
from .config import ServeConfig
from .keys import Keyring
from .limits import Limits
from .media import read_picture
from .metrics import Metrics
from .protocol import BadMessage, Reconnect, Start, read_base64
from .source import Camera, File, SourceFrames
from .state import SessionRecord, State

RECORD_CHUNKS: Final = 8  # between two records of how many frames were taken
REACH: Final = 480  # frames that a viewer may be ahead of the record, or that are made again from the beginning
MODEL_SECONDS: Final = 300.0  # that an order waits for the first worker of its model to say what size it makes


@dataclass
class Services:
    """What a gateway's sessions share. sizes: height and width of models whose worker has told them."""

    config: ServeConfig
    backend: Backend
    state: State
    limits: Limits
    keys: Keyring
    metrics: Metrics
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass
class Opened:
    """A stream that is to be placed. image, video: what it begins with, to be kept; video: the file's bytes.

    frames: how many it may show in all; None: without end. resumed: it ran before.
    """

    stream: PlacedStream
    record: SessionRecord
    image: Pixels | None
    video: bytes | None
    frames: int | None
    source: SourceFrames | None
    resumed: bool


def new_stream() -> str:
    """An id that nobody can guess: 128 random bits."""
    return secrets.token_urlsafe(16)


async def choose_model(services: Services, name: str | None) -> str:
    """BadMessage where there is no such model."""
    names = list(services.config.models)
    if name is None and len(names) == 1:
        return names[0]
    if name not in names:
        raise BadMessage("unknown_model", f"model: must be one of {', '.join(names)}, got {name!r:.80}")
    return name


async def model_size(services: Services, model: str) -> tuple[int, int]:
    """Height and width of a model's streams that name none; its first worker may have to be waited for."""
    known = services.config.models[model].size or services.sizes.get(model)
    if known is not None:
        return known
    until = time.monotonic() + MODEL_SECONDS
    while time.monotonic() < until:
        for row in await services.backend.models():
            if row["id"] == model and row["info"] is not None:
                services.sizes[model] = row["info"].size
                return services.sizes[model]
        await asyncio.sleep(ASK_AGAIN)
    raise BadMessage("failed", f"model {model}: no worker is ready")


async def open_start(services: Services, message: Start, owner: str) -> Opened:
    """A new stream. BadMessage says what is wrong with the order."""
    services.limits.check_prompt(message.prompt)
    model = await choose_model(services, message.model)
    if message.image is not None and message.source is not None:
        raise BadMessage("bad_order", "image, source: a stream begins with at most one of them")
    height, width = await _size(services, message, model)
    image = await _image(services, message.image, height, width) if message.image is not None else None
    order = _order(message, height, width, image)
    frames = None if message.seconds is None else max(1, round(message.seconds * message.frame_rate))
    fields = order.to_json() | {"frames": frames}
    record = SessionRecord(stream=order.stream, model=model, order=fields, owner=owner, begun=time.time())
    stream = PlacedStream(services.backend, model, order)
    video = _video(services, message)
    source = _source(order, video)
    return Opened(stream, record, image, video, frames, source, resumed=False)


def _order(message: Start, height: int, width: int, image: Pixels | None) -> StreamOrder:
    source = message.source
    return StreamOrder(
        stream=new_stream(),
        prompt=message.prompt,
        seed=message.seed,
        height=height,
        width=width,
        frame_rate=message.frame_rate,
        mode=message.mode,
        image=image,
        redraw=None if source is None else Redraw(source.noise, source.adaptive),
    )


async def _size(services: Services, message: Start, model: str) -> tuple[int, int]:
    if message.height is not None and message.width is not None:
        return message.height, message.width
    height, width = await model_size(services, model)
    return message.height or height, message.width or width


async def _image(services: Services, text: str, height: int, width: int) -> Pixels:
    content = read_base64("image", text)
    services.limits.check_size("image", len(content))
    return await asyncio.to_thread(read_picture, "image", content, height, width)


def _video(services: Services, message: Start) -> bytes | None:
    if message.source is None or message.source.video is None:
        return None
    content = read_base64("source.video", message.source.video)
    services.limits.check_size("source.video", len(content))
    return content


def _source(order: StreamOrder, video: bytes | None) -> SourceFrames | None:
    """Where the frames come from that a stream redraws. A camera's first index is known when the stream is placed."""
    if order.redraw is None:
        return None
    assert order.frame_rate is not None
    return Camera(0) if video is None else File(video, order.frame_rate)


async def find_record(services: Services, stream: str, owner: str) -> SessionRecord:
    """A stream that may go on. The same answer for one that never was and one that is another key's."""
    unknown = BadMessage("unknown_stream", f"stream: no stream {stream} to go on with")
    try:
        record = await asyncio.to_thread(services.state.read_session, stream)
    except (FileNotFoundError, ValueError):
        raise unknown from None
    if record.owner != owner or record.ended is not None or record.model not in services.config.models:
        raise unknown
    return record


async def open_reconnect(services: Services, message: Reconnect, owner: str) -> Opened:
    """A stream that ran before. BadMessage where it cannot go on from that frame, or is not the owner's."""
    record = await find_record(services, message.stream, owner)
    await asyncio.to_thread(check_frame, services, record, message.frame)
    image = await asyncio.to_thread(services.state.read_image, record.stream)
    order = StreamOrder.from_json(record.order, image)
    stream = PlacedStream(
        services.backend, record.model, replace(order, frames=None), turns=record.turns, frame=message.frame
    )
    video = await asyncio.to_thread(services.state.read_video, record.stream)
    return Opened(stream, record, None, None, order.frames, _source(order, video), resumed=True)


def check_frame(services: Services, record: SessionRecord, frame: int) -> None:
    """BadMessage unless the viewer can have come so far, and there is a way to go on: what lies between is made again.

    Blocking. A stream goes on from a snapshot, or from its beginning where that is not far back.
    """
    came = max([record.frames_taken, *(turn.frame for turn in record.turns)]) + REACH
    kept = min((kept.frames_out for kept in services.state.kept(record.stream)), default=0)
    first = 0 if frame <= REACH else kept
    if not first <= frame <= came:
        raise BadMessage("unknown_stream", f"frame: the stream can go on from {first} to {came}, got {frame}")


def describe(record: SessionRecord, stream: PlacedStream, **changes: Any) -> SessionRecord:
    """The record as the stream stands now."""
    fields = {"turns": tuple(stream.turns), "frames_taken": stream.next, **changes}
    return record.model_copy(update=fields)
