"""The HTTP side of a server: the live stream's socket, OpenAI's videos API, health, metrics, and the page."""

import json
import math
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from ... import __version__
from .door import Door, bearer, error_body, socket_key, status_of
from .orders import Services
from .protocol import PATH, SUBPROTOCOL, BadMessage, read_base64
from .reception import serve_socket
from .session import go_away
from .videos import SECONDS, NoVideo, Video, Videos
from .wire import Socket

PAGE: Final = Path(__file__).parent / "page"
POLL_HEADER: Final = {"openai-poll-after-ms": "500"}  # OpenAI's clients obey it
LONGEST_LIST: Final = 100
MULTIPART_BYTES: Final = 1 << 20  # of a part that is no file
IMAGE_FIELD: Final = "input_reference"

routes = APIRouter()


class VideoOrder(BaseModel):
    """What POST /v1/videos takes. input_reference: an image as {"image_url": "data:..."}, or a file of a form."""

    model_config = ConfigDict(extra="forbid")
    prompt: str
    model: str | None = None
    seconds: str | float = SECONDS
    size: str | None = None
    input_reference: dict[str, str] | None = None


class VideoList(BaseModel):
    """A page of a key's videos."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    """What DELETE /v1/videos/{id} answers."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class ModelRow(BaseModel):
    """A model in OpenAI's form."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "reelway"
    ready: int
    width: int | None
    height: int | None


class ModelList(BaseModel):
    """What GET /v1/models answers. ready: workers."""

    object: Literal["list"] = "list"
    data: list[ModelRow]


def services_of(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


def videos_of(request: Request) -> Videos:
    videos: Videos = request.app.state.videos
    return videos


Given = Annotated[Services, Depends(services_of)]
Jobs = Annotated[Videos, Depends(videos_of)]


def owner_of(request: Request, services: Given) -> str:
    """Whose key came with the request."""
    owner = services.keys.owner(bearer(request.headers))
    if owner is None:
        raise BadMessage("wrong_key", "key: send a key of this server as `Authorization: Bearer KEY`")
    return owner


Owner = Annotated[str, Depends(owner_of)]


# --- Streams ---------------------------------------------------------------------------------------------------------


@routes.websocket(PATH)
async def stream(websocket: WebSocket) -> None:
    """A live stream: see docs/protocol.md."""
    services: Services = websocket.app.state.services
    offered = websocket.scope["subprotocols"]
    await websocket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
    owner = services.keys.owner(socket_key(websocket.headers, offered))
    if owner is None:
        await _refuse_key(websocket, services)
    else:
        await serve_socket(services, websocket, owner)


async def _refuse_key(websocket: WebSocket, services: Services) -> None:
    error = BadMessage("wrong_key", "key: none, or not one of this server's")
    await Socket(websocket, services.limits, services.metrics).reject(error)


# --- Videos ----------------------------------------------------------------------------------------------------------

_ORDER_BODY: Final = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": VideoOrder.model_json_schema()},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["prompt"],
                    "properties": {
                        **{name: {"type": "string"} for name in ("prompt", "model", "seconds", "size")},
                        IMAGE_FIELD: {"type": "string", "format": "binary"},
                    },
                }
            },
        },
    }
}
_ERROR_CODES: Final = (400, 401, 403, 404, 409, 413, 415, 422, 429, 500, 503)
_ERROR_SCHEMA: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    code: {"description": "An error", "content": {"application/json": {"schema": _ERROR_SCHEMA}}}
    for code in _ERROR_CODES
}


@routes.post("/v1/videos", openapi_extra=_ORDER_BODY, responses=ERRORS)
async def create_video(request: Request, owner: Owner, videos: Jobs) -> Video:
    """Order a video. It is made in the background."""
    order, image = await _read_order(request)
    seconds = order.seconds if isinstance(order.seconds, str) else f"{order.seconds:g}"
    return await videos.create(owner, order.prompt, order.model, seconds, order.size, image)


@routes.get("/v1/videos", responses=ERRORS)
async def list_videos(
    owner: Owner,
    videos: Jobs,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=LONGEST_LIST)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> VideoList:
    """The key's own videos, newest first."""
    found, more = await videos.page(owner, after, limit, order == "desc")
    ends = (found[0].id, found[-1].id) if found else (None, None)
    return VideoList(data=found, first_id=ends[0], last_id=ends[1], has_more=more)


@routes.get("/v1/videos/{video}", responses=ERRORS)
async def retrieve_video(video: str, response: Response, owner: Owner, videos: Jobs) -> Video:
    """A video's status and progress."""
    response.headers.update(POLL_HEADER)
    return await videos.retrieve(owner, video)


@routes.get(
    "/v1/videos/{video}/content",
    response_class=Response,
    responses={**ERRORS, 200: {"description": "The file", "content": {"video/mp4": {}}}},
)
async def video_content(video: str, owner: Owner, videos: Jobs, variant: Literal["video"] = "video") -> Response:
    """The finished file, mp4 that begins to play before it is whole."""
    return Response(await videos.content(owner, video), media_type="video/mp4")


@routes.delete("/v1/videos/{video}", responses=ERRORS)
async def delete_video(video: str, owner: Owner, videos: Jobs) -> VideoDeleted:
    """Remove a video, or give up making it."""
    await videos.delete(owner, video)
    return VideoDeleted(id=video)


async def _read_order(request: Request) -> tuple[VideoOrder, bytes | None]:
    """The order and its image, from JSON or a form. BadMessage."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _read_form(request)
    if kind != "application/json":
        raise HTTPException(415, "content-type: must be application/json or multipart/form-data")
    try:
        content = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise BadMessage("bad_message", "body: not JSON") from None
    order = _checked(content)
    return order, None if order.input_reference is None else _read_reference(order.input_reference)


async def _read_form(request: Request) -> tuple[VideoOrder, bytes | None]:
    fields: dict[str, Any] = {}
    image = None
    async with request.form(max_files=1, max_fields=16, max_part_size=MULTIPART_BYTES) as form:
        for name, value in form.multi_items():
            if name == IMAGE_FIELD and isinstance(value, UploadFile):
                image = await value.read()
            elif isinstance(value, UploadFile):
                raise BadMessage("bad_message", f"{name:.40}: is no file")
            elif name.startswith(f"{IMAGE_FIELD}["):
                image = _read_reference({name.removeprefix(f"{IMAGE_FIELD}[").removesuffix("]"): value})
            else:
                fields[name] = value
    return _checked(fields), image


def _checked(content: Any) -> VideoOrder:
    try:
        return VideoOrder.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part)[:40] for part in first["loc"]) or "body"
        raise BadMessage("bad_message", f"{place}: {first['msg']}") from None


def _read_reference(reference: dict[str, str]) -> bytes:
    """Only what is in the message itself: the server fetches nothing from elsewhere for a client."""
    url = reference.get("image_url", "")
    if set(reference) != {"image_url"} or not url.startswith("data:"):
        raise BadMessage("bad_media", f"{IMAGE_FIELD}: must be an image file, or image_url with a data: URL")
    return read_base64(IMAGE_FIELD, url)


# --- What there is, and how it is ------------------------------------------------------------------------------------


@routes.get("/v1/models", responses=ERRORS)
async def models(owner: Owner, services: Given) -> ModelList:
    """The students that are served."""
    rows = []
    for row in await services.backend.models():
        height, width = row["info"].size if row["info"] is not None else (None, None)
        rows.append(ModelRow(id=row["id"], ready=row["ready"], height=height, width=width))
    return ModelList(data=rows)


@routes.get("/v1/status", responses=ERRORS)
async def status(owner: Owner, services: Given) -> JSONResponse:
    """The pool's figures, for the page and for people."""
    return JSONResponse(_finite(await services.backend.status()))


@routes.get("/healthz")
async def healthz() -> dict[str, str]:
    """Whether this gateway answers."""
    return {"status": "ok"}


@routes.get("/readyz", responses={503: {"description": "No worker is ready", "content": {"application/json": {}}}})
async def readyz(services: Given) -> JSONResponse:
    """Whether streams can be placed: a worker is ready, or none is kept ready on purpose."""
    rows = await services.backend.models()
    spare = any(model.min_workers == 0 for model in services.config.models.values())
    ready = spare or any(row["ready"] for row in rows)
    words = {row["id"]: row["ready"] for row in rows}
    return JSONResponse({"ready": ready, "workers": words}, 200 if ready else 503)


@routes.get("/metrics", responses=ERRORS, response_class=Response)
async def metrics(owner: Owner, services: Given) -> Response:
    """Figures for Prometheus."""
    text = services.metrics.text(await services.backend.status())
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _finite(value: Any) -> Any:
    """JSON has no infinities: None stands for them."""
    if isinstance(value, dict):
        return {str(name): _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- The whole -------------------------------------------------------------------------------------------------------


def create_app(services: Services) -> FastAPI:
    """The ASGI application of one gateway."""
    app = FastAPI(title="Reelway", version=__version__, docs_url=None, redoc_url=None, lifespan=_lifespan)
    app.state.services = services
    app.state.videos = Videos(services)
    app.include_router(routes)
    if PAGE.is_dir():
        app.mount("/", StaticFiles(directory=PAGE, html=True))
    for kind, handler in (
        (BadMessage, _bad_message),
        (NoVideo, _no_video),
        (RequestValidationError, _invalid),
        (HTTPException, _http_error),
        (Exception, _failed),
    ):
        app.add_exception_handler(kind, handler)
    config = services.config
    if config.cors:
        app.add_middleware(CORSMiddleware, allow_origins=config.cors, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(
        Door, origins=config.cors, has_keys=lambda: len(services.keys) > 0, upload_bytes=config.limits.upload_bytes
    )
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with app.state.videos.at_work():
        yield
        await go_away()


async def _bad_message(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, BadMessage)
    request.app.state.services.metrics.refused.inc(error.code)
    code, kind = status_of(error.code)
    headers = {"Retry-After": "5"} if code == 429 else None
    return JSONResponse(error_body(str(error), kind, error.code), code, headers)


async def _no_video(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse(error_body(str(error), "invalid_request_error", "not_found"), 404)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = str(first["loc"][-1])
    return JSONResponse(error_body(f"{param}: {first['msg']}", "invalid_request_error", "bad_message", param), 400)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    return JSONResponse(error_body(str(error.detail), kind, None), error.status_code, error.headers)


async def _failed(request: Request, error: Exception) -> JSONResponse:
    traceback.print_exception(error)
    return JSONResponse(error_body("the server failed", "server_error", "failed"), 500)
