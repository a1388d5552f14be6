"""`reelway serve`: live streams and videos from students, on this machine or on a cluster."""

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import typer
import yaml
from rich.console import Console

from .config import ModelConfig, ServeConfig, check_access, make_config, read_config
from .keys import Keyring, make_key, read_keys
from .protocol import document

START_SECONDS: Final = 300.0
STATE: Final = "runs/serve"

app = typer.Typer(
    add_completion=False, help="Serve live streams and videos, with a page to play with.", invoke_without_command=True
)

ConfigFile = Annotated[Path, typer.Argument(help="A server's YAML file; see docs/serving.md.")]
Address = Annotated[str | None, typer.Option(help="A Ray to join: host:port or auto. RAY_ADDRESS by default.")]


@app.callback()
def serve_here(
    context: typer.Context,
    model: Annotated[
        list[str] | None, typer.Option(help="A student's folder, or NAME=FOLDER; may be repeated.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A server's YAML file, as `serve deploy` has it, in place of all other options.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Of each model.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Of a worker; shared out by default.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    host: Annotated[str, typer.Option(help="To bind to. Others than loopback need keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of HTTP and WebSocket.")] = 8000,
    state: Annotated[str, typer.Option(help="Where streams and videos are kept: a folder, s3:// or gs://.")] = STATE,
    keys: Annotated[Path | None, typer.Option(help="A file of API keys' hashes, as `serve key` prints them.")] = None,
) -> None:
    """Serve students on this machine until Ctrl-C."""
    if context.invoked_subcommand is not None:
        return
    if config is not None:
        given = [name for name in context.params if _is_given(context, name) and name != "config"]
        if given:
            raise ValueError(f"--config: goes without other options, got --{given[0]}")
        _serve_until_interrupted(read_config(config))
    if not model:
        raise ValueError("--model: at least one student's folder is needed; or a command: deploy, check, key, protocol")
    settings = _model_settings(workers, threads, device, len(model))
    content = {
        "models": {name: {"path": path, **settings} for name, path in map(_named, model)},
        "host": host,
        "port": port,
        "state": state,
        "keys": None if keys is None else str(keys),
    }
    _serve_until_interrupted(make_config(content, "serve"))


@app.command()
def deploy(
    config: ConfigFile,
    address: Address = None,
    show: Annotated[bool, typer.Option("--print", help="Print a Serve config for KubeRay; change nothing.")] = False,
) -> None:
    """Run a server on a cluster, or bring the one that runs there to this configuration."""
    from . import app as application  # here only: Ray takes its time to import

    read = read_config(config)
    keyring = read_keys(read.keys)
    check_access(read, has_keys=len(keyring) > 0)
    for name, model in read.models.items():
        _check_model(name, model)
    if show:
        typer.echo(yaml.safe_dump(application.serve_config(read), sort_keys=False), nl=False)
        return
    with _joined(address):
        application.run(read, keyring)
    typer.echo(f"http://{read.host}:{read.port}: {', '.join(read.models)}, {_access(keyring)}")


@app.command()
def check(config: ConfigFile) -> None:
    """Say whether a server's configuration is right, and what it means."""
    read = read_config(config)
    keyring = read_keys(read.keys)
    check_access(read, has_keys=len(keyring) > 0)
    for name, model in read.models.items():
        _check_model(name, model)
        workers = f"{model.min_workers} to {model.max_workers} workers of {model.cpus:g} CPU and {model.gpus:g} GPU"
        typer.echo(f"model {name}: {model.path} on {model.device}, {workers}")
    typer.echo(f"http://{read.host}:{read.port}, {read.gateways} gateway(s), {_access(keyring)}, state at {read.state}")


@app.command()
def key(name: Annotated[str, typer.Option(help="A note for the reader of the file.")] = "") -> None:
    """Make an API key. It is shown once; the server keeps its hash."""
    made, hashed = make_key()
    note = f"  # {' '.join(name.split())}" if name.strip() else ""
    typer.echo(f"key, for the client:        {made}\nline, for the file of keys: {hashed}{note}")


@app.command()
def protocol() -> None:
    """Print the document of the WebSocket protocol, docs/protocol.md."""
    typer.echo(document(), nl=False)


@app.command()
def upgrade(
    model: Annotated[str, typer.Argument(help="Of the server that runs.")],
    path: Annotated[str | None, typer.Option(help="Another student's folder; else the same is loaded again.")] = None,
    config: Annotated[Path | None, typer.Option(help="The server's YAML file; needed with --path.")] = None,
    address: Address = None,
) -> None:
    """Replace a model's workers one by one. Streams move to the new ones."""
    from . import app as application
    from .config import fleets

    settings = None
    if path is not None:
        if config is None:
            raise ValueError("--path: goes with --config, where the model's other settings are")
        read = read_config(config)
        if model not in read.models:
            raise ValueError(f"model: must be one of {', '.join(read.models)}, got {model!r}")
        changed = read.models[model].model_copy(update={"path": path})
        settings = fleets(read.model_copy(update={"models": {model: changed}}))[model].worker
    with _joined(address):
        count = _answer(application.pool_handle().upgrade.remote(model, settings))
    typer.echo(f"model {model}: {count} worker(s) replaced")


# --- Serving on this machine -----------------------------------------------------------------------------------------


def _serve_until_interrupted(config: ServeConfig) -> None:
    from ...cluster.session import start_or_join
    from . import app as application

    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    keyring = read_keys(config.keys)
    check_access(config, has_keys=len(keyring) > 0)
    for name, model in config.models.items():
        _check_model(name, model, must_be_here=True)
    _check_port(config.host, config.port)
    os.environ.setdefault("RAY_worker_niceness", "0")  # the pictures are due
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    console.print(f"Starting {len(config.models)} model(s) ...")
    try:
        with start_or_join("local"):
            pool = application.run(config, keyring)
            _wait_until_ready(pool, config)
            typer.echo(f"http://{config.host}:{config.port}  ({_access(keyring)}; Ctrl-C ends it)")
            while True:
                time.sleep(3600)
    except KeyboardInterrupt:
        console.print(f"Stopped; streams and videos are kept in {config.state}. The same command goes on with them.")
        raise typer.Exit(130) from None


def _wait_until_ready(pool: Any, config: ServeConfig) -> None:
    """Until every model has a worker. ValueError where one cannot be started."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if all(row["ready"] for row in _answer(pool.models.remote())):
            return
        for name, fleet in _answer(pool.status.remote()).items():
            if fleet["counts"]["failed_starts"]:
                raise ValueError(f"model {name}: {fleet['error']}")
        time.sleep(0.1)
    raise ValueError(f"serve: no worker was ready after {START_SECONDS:g} s")


def _answer(response: Any) -> Any:
    """The result of a call to the pool; what a user did wrong as it was raised there."""
    from ray.exceptions import RayTaskError

    try:
        return response.result()
    except RayTaskError as error:
        raise error.cause from None


@contextmanager
def _joined(address: str | None) -> Iterator[None]:
    from ...cluster.session import start_or_join

    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        raise ValueError(
            "--address: a cluster's Ray is needed, host:port or auto; on this machine alone: serve --model"
        )
    with start_or_join(address):
        yield


def _model_settings(workers: int, threads: int | None, device: str, models: int) -> dict[str, Any]:
    """One core is left to the gateway, which encodes the media."""
    cores = max(1, (os.cpu_count() or 1) - 1)
    each = threads or max(1, cores // (workers * models))
    cpus = min(float(each), (os.cpu_count() or 1) / (workers * models))
    gpus = 1.0 if device.startswith("cuda") else 0.0
    return {
        "device": device,
        "min_workers": workers,
        "max_workers": workers,
        "threads": each,
        "cpus": cpus,
        "gpus": gpus,
    }


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option was written on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _named(text: str) -> tuple[str, str]:
    """Name and folder of NAME=FOLDER or FOLDER."""
    name, equals, path = text.partition("=")
    return (name, path) if equals else (Path(text).name, text)


def _check_model(name: str, model: ModelConfig, must_be_here: bool = False) -> None:
    """What can be seen from here: on a cluster the folder may be on other machines only."""
    folder = Path(model.path)
    if folder.is_dir() and not (folder / "student.json").is_file():
        raise ValueError(f"model {name}: {folder} has no student.json; only students can be served")
    if must_be_here and not folder.is_dir():
        raise FileNotFoundError(f"model {name}: {folder}: no such folder")


def _check_port(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            return
    except OSError as error:
        raise ValueError(f"--host, --port: {host}:{port} cannot be bound to ({error.strerror or error})") from None


def _access(keyring: Keyring) -> str:
    if len(keyring):
        return f"{len(keyring)} API key(s)"
    return "no API keys: this machine only"
