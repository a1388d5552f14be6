"""The messages of a live stream's WebSocket, version 1. `docs/protocol.md` is made from these models."""

import base64
import binascii
import json
import struct
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from ...actors.modes import Mode

VERSION: Final = 1
SUBPROTOCOL: Final = "reelway.v1"
KEY_PREFIX: Final = "reelway.key."  # of the subprotocol by which a browser hands over its key
PATH: Final = "/v1/stream"

# Kinds of a binary message from the server: its first byte.
INIT: Final = 0
FRAGMENT: Final = 1
JPEG: Final = 2
HEADER: Final = struct.Struct(">BQ")

# Close codes (RFC 6455 and its registry).
NORMAL: Final = 1000
GOING_AWAY: Final = 1001
REFUSED: Final = 1008
BROKEN: Final = 1011
TRY_AGAIN: Final = 1013

Media = Literal["mp4", "jpeg"]
StreamId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Index = Annotated[int, Field(ge=0)]


class Message(BaseModel):
    """Unknown fields are refused, numbers are numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


# --- From the client ---------------------------------------------------------------------------------------------


class Source(Message):
    """Live video-to-video: the client's frames are redrawn under the prompt."""

    noise: Annotated[float, Field(gt=0, le=1, description="0 keeps the source, 1 ignores it.")] = 0.6
    adaptive: Annotated[bool, Field(description="Less noise where the source moves fast.")] = False
    video: Annotated[str | None, Field(description="Base64 of a video file. Else the client sends frames.")] = None


class Start(Message):
    """Begin a stream. The first message of a socket is this one or `reconnect`."""

    type: Literal["start"]
    version: Literal[1]
    prompt: Text
    model: Annotated[str | None, Field(description="One of /v1/models; may be left out where there is one.")] = None
    seed: Annotated[int, Field(ge=0, lt=2**53)] = 0
    width: Annotated[int | None, Field(ge=16, le=4096, description="Pixels; the model's own by default.")] = None
    height: Annotated[int | None, Field(ge=16, le=4096, description="Pixels; the model's own by default.")] = None
    frame_rate: Annotated[float, Field(ge=0.1, le=60, description="Frames per second of the playback.")] = 16.0
    media: Annotated[Media, Field(description="mp4: fragmented H.264. jpeg: one message per frame.")] = "mp4"
    quality: Annotated[int, Field(ge=1, le=100, description="Of the media; 100 is the best.")] = 80
    mode: Mode = "rolling"
    image: Annotated[str | None, Field(description="Base64 of a PNG, JPEG or WebP to begin with.")] = None
    source: Source | None = None
    seconds: Annotated[float | None, Field(gt=0, le=86400, description="Ends after so long; else it goes on.")] = None


class Reconnect(Message):
    """Go on with a stream after its socket was lost."""

    type: Literal["reconnect"]
    version: Literal[1]
    stream: StreamId
    frame: Annotated[Count, Field(description="Index of the first frame that was not received.")]
    media: Media = "mp4"
    quality: Annotated[int, Field(ge=1, le=100)] = 80


class Prompt(Message):
    """Another prompt, from the next block on. What waits of the old one is dropped."""

    type: Literal["prompt"]
    text: Text


class Pause(Message):
    """Stop making frames; the stream keeps its place."""

    type: Literal["pause"]


class Resume(Message):
    """End a pause."""

    type: Literal["resume"]


class Seen(Message):
    """Flow control: the client has every frame before this one. The server sends only so far ahead of it."""

    type: Literal["seen"]
    frame: Annotated[Count, Field(description="Index of the first frame that was not received.")]


class Stop(Message):
    """End the stream for good."""

    type: Literal["stop"]


FirstMessage = Annotated[Start | Reconnect, Field(discriminator="type")]
LaterMessage = Annotated[Prompt | Pause | Resume | Seen | Stop, Field(discriminator="type")]
_FIRST: Final = TypeAdapter[Start | Reconnect](FirstMessage)
_LATER: Final = TypeAdapter[Prompt | Pause | Resume | Seen | Stop](LaterMessage)


# --- From the server ---------------------------------------------------------------------------------------------


class Ready(Message):
    """The stream has a worker. Comes once per socket, before any media."""

    type: Literal["ready"] = "ready"
    version: Literal[1] = 1
    stream: Annotated[StreamId, Field(description="Its id: who knows it, and has the same key, may reconnect.")]
    model: str
    width: int
    height: int
    frame_rate: float
    media: Media
    mime: Annotated[str, Field(description="With codecs, as Media Source Extensions want it.")]
    frames_per_chunk: Annotated[int, Field(description="Frames of a chunk; a stream's first one is shorter.")]
    first: Annotated[Index, Field(description="Index of the first frame to come: 0, or where it goes on.")]
    seen_within: Annotated[float, Field(description="Seconds of frames that are sent ahead of `seen`.")]


class Queued(Message):
    """No worker has room now. Comes again when the position changes."""

    type: Literal["queued"] = "queued"
    position: Annotated[int, Field(ge=1, description="1: the next one to get a place.")]


class Busy(Message):
    """There is no room, and no place in the queue. The socket closes with 1013."""

    type: Literal["busy"] = "busy"
    reason: str


class Chunk(Message):
    """A chunk was sent; comes after its media."""

    type: Literal["chunk"] = "chunk"
    index: Index
    first: Annotated[Index, Field(description="Index of its first frame.")]
    frames: int
    prompt: Annotated[Index, Field(description="Which prompt made it: 0 is the one of `start`.")]
    seconds: Annotated[float, Field(description="Time spent on making it: its share of the batch.")]
    late: Annotated[float, Field(description="Seconds past its deadline; negative: before it.")]
    media_bytes: int


class PromptShown(Message):
    """A new prompt can be seen from a frame on; comes before that frame's media."""

    type: Literal["prompt"] = "prompt"
    index: Annotated[int, Field(ge=1, description="1 for the first prompt after the one of `start`.")]
    text: str
    block: Annotated[Index, Field(description="The first chunk that was made under it.")]
    frame: Annotated[Index, Field(description="The first frame that was made under it.")]
    flushed: Annotated[int, Field(ge=0, description="Frames of the old prompt that were made and not sent.")]
    replaced: Annotated[int, Field(ge=0, description="Prompts that came before it and were never seen.")]
    seconds: Annotated[float, Field(description="From the message's arrival to this frame being sent.")]


class Paused(Message):
    """Answers `pause`."""

    type: Literal["paused"] = "paused"


class Resumed(Message):
    """Answers `resume`."""

    type: Literal["resumed"] = "resumed"


class Moved(Message):
    """The stream went on on another worker; no frame is lost."""

    type: Literal["moved"] = "moved"
    reason: str
    seconds: Annotated[float, Field(description="How long it stood still.")]


class Due(Message):
    """Live video-to-video: the server waits for so many source frames."""

    type: Literal["due"] = "due"
    frames: Annotated[int, Field(ge=1)]
    first: Annotated[Index, Field(description="Index of the first of them.")]


class Error(Message):
    """A message could not be obeyed. Where the fault is not `recoverable`, the socket closes with 1008."""

    type: Literal["error"] = "error"
    code: str
    message: str
    recoverable: bool = False


class End(Message):
    """The stream ended; nothing comes after it. The socket closes with 1000."""

    type: Literal["end"] = "end"
    reason: str
    frames: Annotated[Index, Field(description="Index after the last frame that was sent.")]


ServerMessage = (
    Ready | Queued | Busy | Chunk | PromptShown | Paused | Resumed | Moved | Due | Error | End
)  # the order of the document

ERRORS: Final = {
    "bad_message": "The message is not JSON, or not one of those above. The socket closes.",
    "wrong_key": "No key, or not one that is known. The socket closes.",
    "wrong_origin": "A page of another site opened the socket. The socket closes.",
    "unknown_model": "There is no such model. The socket closes.",
    "unknown_stream": "There is no such stream, or it is not this key's, or it has ended. The socket closes.",
    "bad_order": "The model cannot make such a stream: size, mode. The socket closes.",
    "bad_media": "An image or video that cannot be read. The socket closes.",
    "too_large": "A message over the upload limit. The socket closes.",
    "too_many_sessions": "The key has as many streams open as it may. The socket closes.",
    "too_many_requests": "The key opened too many streams in the last minute. The socket closes.",
    "prompt_too_long": "The prompt is over the limit. A running stream goes on as it was.",
    "too_many_prompts": "Prompts came too fast; this one is not obeyed. The stream goes on.",
    "too_many_frames": "Source frames came faster than they are due; this one is dropped. The stream goes on.",
    "not_now": "The message makes no sense at this point, as a `resume` without a pause. The stream goes on.",
    "failed": "The server failed. The socket closes; `reconnect` may help.",
}


class BadMessage(ValueError):
    """A client's message that cannot be obeyed. code: one of `ERRORS`."""

    def __init__(self, code: str, message: str) -> None:
        assert code in ERRORS, code
        super().__init__(message)
        self.code = code


def read_first(text: str) -> Start | Reconnect:
    """The message that opens a session. BadMessage names the field and the rule."""
    return _read(_FIRST, text)


def read_later(text: str) -> Prompt | Pause | Resume | Seen | Stop:
    """A message inside a session. BadMessage names the field and the rule."""
    return _read(_LATER, text)


def _read(adapter: TypeAdapter[Any], text: str) -> Any:
    try:
        return adapter.validate_json(text)
    except ValidationError as error:
        raise BadMessage("bad_message", _one_line(error)) from None


def _one_line(error: ValidationError) -> str:
    """The first complaint, without the value: it may be a whole image."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"][1:]) or "message"
    return f"{place}: {first['msg']}"


def read_base64(field: str, text: str) -> bytes:
    """The bytes of a field; a data URL is taken too."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise BadMessage("bad_media", f"{field}: not base64") from None


def pack(kind: int, first: int, payload: bytes) -> bytes:
    """A binary message: kind, index of its first frame, media."""
    return HEADER.pack(kind, first) + payload


def unpack(message: bytes) -> tuple[int, int, bytes]:
    """Kind, index of the first frame, media."""
    kind, first = HEADER.unpack_from(message)
    return kind, first, message[HEADER.size :]


# --- The document ------------------------------------------------------------------------------------------------

_INTRODUCTION: Final = f"""# The protocol of a live stream, version {VERSION}

Made by `reelway serve protocol` from the models in `pipelines/serve/protocol.py`; do not edit it by hand.

    client                                     server
    WS {PATH}  ---------------------->
    start | reconnect ---------------------->  [queued ...]
                       <---------------------  ready, then media and one chunk record per chunk
    seen, prompt, pause, resume, stop ------>  prompt, paused, resumed, [moved]
                       <---------------------  end

**Opening.** `GET {PATH}` with the WebSocket subprotocol `{SUBPROTOCOL}`. Where the server has API keys, the key
comes as `Authorization: Bearer KEY`, or, from a browser, as a second subprotocol `{KEY_PREFIX}KEY`. Text messages
are JSON objects with a `type`. Unknown fields are refused.

**Frames have indices**, from 0, that mean the same picture for the whole life of a stream, on whichever worker it is.
After a new prompt indices may jump: the frames between were made under the old prompt and dropped.

**Flow control.** The client says `seen` now and then (once per chunk is right). The server sends no more than
`seen_within` seconds of frames ahead of it; then the stream stands still until the client has caught up. A client that
never says `seen` gets that much and no more, and after the idle limit its stream ends, "idle".

**Pace.** Media comes at the pace of the playback, a moment ahead of it, so that a new prompt shows soon.

**After a lost socket** the client opens another one and sends `reconnect` with the stream's id and the first frame
that it did not receive. The frames are those that the first socket would have brought, and a `prompt` that was not
seen over it is told over the second. A stream that no socket is connected to is kept for some minutes.

**Binary messages** from the server: byte 0 is the kind, bytes 1 to 8 the index of the first frame (unsigned,
big-endian), the rest is the media.

| kind | media |
|---|---|
| {INIT} | mp4: the initialisation segment (`ftyp`, `moov`); first on every socket |
| {FRAGMENT} | mp4: one `moof` and `mdat`: the pictures of one latent frame |
| {JPEG} | jpeg: one frame |

A chunk's first fragment begins with a key frame, and so does the first one under a new prompt. A socket's first frame
has the time 0, and times go on without a gap whatever the indices do: a player needs no seeking. To join a second
socket's media to a first one's, set `SourceBuffer.timestampOffset`.

**Live video-to-video.** After `start` with a `source` the client sends its frames as binary messages, each one a JPEG,
PNG or WebP file, scaled and cropped to the stream's size. `due` says how many the next chunk waits for.

**Close codes.** {NORMAL}: ended. {GOING_AWAY}: the server goes away; reconnect. {REFUSED}: refused, after an `error`.
{TRY_AGAIN}: busy, after a `busy`. {BROKEN}: the server failed, after an `error`.
"""


def document() -> str:
    """The protocol's page, Markdown."""
    parts = [_INTRODUCTION, "## From the client\n", _section(Start), _section(Source, "field"), _section(Reconnect)]
    parts += [_section(model) for model in (Prompt, Pause, Resume, Seen, Stop)]
    parts += ["## From the server\n", *(_section(model) for model in get_args(ServerMessage))]
    rows = "\n".join(f"| `{code}` | {meaning} |" for code, meaning in ERRORS.items())
    parts.append(f"## Codes of `error`\n\n| code | meaning |\n|---|---|\n{rows}")
    return "\n".join(parts).rstrip() + "\n"


def _section(model: type[Message], kind: str = "message") -> str:
    fields = {name: field for name, field in model.model_fields.items() if name != "type"}
    name = "source" if kind == "field" else get_args(model.model_fields["type"].annotation)[0]
    head = f"### `{name}`{' (field of `start`)' if kind == 'field' else ''}\n\n{model.__doc__}\n"
    if not fields:
        return head
    properties = model.model_json_schema()["properties"]
    rows = (_row(name, field.is_required(), properties[name]) for name, field in fields.items())
    return head + "\n| field | type | default | rule |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def _row(name: str, required: bool, schema: dict[str, Any]) -> str:
    default = "required" if required else f"`{json.dumps(schema.get('default'))}`"
    return f"| `{name}` | {_type(schema)} | {default} | {_rule(schema)} |"


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return "`source`"
    if "anyOf" in schema:
        return " or ".join(_type(part) for part in schema["anyOf"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    return str(schema["type"])


_RULES: Final = {
    "minimum": "at least {}",
    "maximum": "at most {}",
    "exclusiveMinimum": "above {}",
    "exclusiveMaximum": "below {}",
    "minLength": "not empty",
    "pattern": "`{}`",
}


def _rule(schema: dict[str, Any]) -> str:
    parts = [schema, *schema.get("anyOf", [])]
    limits = [words.format(part[key]) for part in parts for key, words in _RULES.items() if key in part]
    described = [schema["description"]] if "description" in schema else []
    return " ".join([*described, *([", ".join(limits) + "."] if limits else [])])
