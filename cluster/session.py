"""The Ray that a run works on: one of its own on this machine, or a cluster that stands already.

A Ray of our own listens on the loopback address only, asks for a token, reports nothing to anybody, and ends with
the block that started it. A cluster that was joined is left as it was found.
"""

import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import ray_constants, services
from ray.exceptions import AuthenticationError

from .preflight import (
    Node,
    Requirements,
    check_output,
    check_placement,
    check_shared_memory,
    cluster_nodes,
    counted,
    in_words,
    this_machine,
)

CONNECT_SECONDS = 10.0
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
# Ray remembers the first token that a process used, so every Ray that this process starts has the same one.
_OWN_TOKEN = secrets.token_hex(32)


class RayNotStarted(OSError):
    """A Ray of our own did not come up; the message says why in one line."""


@dataclass(frozen=True)
class Session:
    """A connection to Ray: where it is, whether this block started it, and what the preflight found, in words."""

    address: str
    started: bool
    preflight: tuple[str, ...]


@contextmanager
def start_or_join(
    address: str | None = None,
    *,
    requirements: Requirements | None = None,
    output: str | None = None,
    output_bytes: int = 0,
    cpus: int | None = None,
    gpus: int | None = None,
    object_store_bytes: int | None = None,
    dashboard: bool = False,
    temp_dir: str | None = None,
) -> Iterator[Session]:
    """Join the Ray at `address` (else at RAY_ADDRESS), or start one on this machine; leave or end it after the block.

    A process that is connected already keeps its connection. `cpus`, `gpus`, `object_store_bytes`, `dashboard` and
    `temp_dir` (its path short: Ray puts sockets there) describe a local Ray; None stands for what the machine has,
    and for a temporary folder that goes with the block. ValueError in one line, before anything is started, when
    `requirements` do not fit, `output_bytes` have no room at `output`, or no Ray answers at the address.
    """
    lines = [check_output(output, output_bytes)] if output is not None else []
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if ray.is_initialized():
        yield _checked(_keep(address), requirements, lines)
    elif address != "local":
        with _joined(address):
            yield _checked(address, requirements, lines)
    else:
        machine = this_machine(cpus, gpus)
        lines += [check_shared_memory(object_store_bytes), *_placement([machine], requirements)]
        with _started(machine, object_store_bytes, dashboard, temp_dir) as own:
            yield Session(own, True, tuple(lines))


def _checked(address: str, requirements: Requirements | None, lines: list[str]) -> Session:
    return Session(address, False, (*lines, *_placement(cluster_nodes(), requirements)))


def _placement(nodes: list[Node], requirements: Requirements | None) -> list[str]:
    lines = [f"{counted(len(nodes), 'node')}: {in_words(nodes)}"]
    if requirements is not None:
        workers = check_placement(nodes, requirements)
        lines.append(f"workers: up to {workers} with {requirements}")
    return lines


def _keep(address: str) -> str:
    connected: str = ray.get_runtime_context().gcs_address
    if address not in ("local", "auto", connected):
        raise ValueError(f"address: this process is connected to the Ray at {connected}, not to {address}")
    return connected


@contextmanager
def _joined(address: str) -> Iterator[None]:
    found = _found(address)
    try:
        ray.init(address=found, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, AuthenticationError) as error:
        raise ValueError(
            f"address: the Ray at {found} cannot be joined: {str(error).splitlines()[0]} (if one runs there: is its "
            "token in RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, and its version the one installed here?)"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _found(address: str) -> str:
    """The address that Ray itself would go to, once something answers there: Ray would try for minutes, and loudly.

    Ray takes a loopback host to mean this machine's own address, unless it was told to stay on loopback.
    """
    if "://" in address:
        raise ValueError(f"address: {address} is a Ray Client address; submit the run with `ray job submit` instead")
    host, colon, port = address.rpartition(":")
    if address != "auto" and not (host and colon and port.isdigit()):
        raise ValueError(f"address: must be host:port or auto, got {address}")
    try:
        found = services.canonicalize_bootstrap_address(address)
    except ConnectionError:
        found = None
    if found is None:
        raise ValueError("address: auto finds no Ray on this machine")
    host, _, port = found.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"address: no Ray answers at {found} ({error})") from None
    return found


@contextmanager
def _started(machine: Node, object_store: int | None, dashboard: bool, temp_dir: str | None) -> Iterator[str]:
    folder = nullcontext(temp_dir) if temp_dir else _short_folder()
    with folder as place, _private_environment():
        try:
            _init(
                address="local",
                num_cpus=int(machine.cpus),
                num_gpus=int(machine.gpus),
                _memory=machine.memory,
                object_store_memory=object_store,
                include_dashboard=dashboard,
                dashboard_host="127.0.0.1",
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=place,
            )
            yield ray.get_runtime_context().gcs_address
        finally:
            ray.shutdown()  # ends the processes that this process started, also those of a start cut short


def _init(**options: Any) -> None:
    try:
        ray.init(**options)
    except (ValueError, OSError):
        raise  # a line for the user already
    except Exception as error:  # Ray raises nothing narrower where a process of its own is late
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RayNotStarted(f"Ray could not be started: {reason}") from error


@contextmanager
def _short_folder() -> Iterator[str]:
    base = "/tmp" if os.path.isdir("/tmp") else None  # TMPDIR is often too long for the path of a socket
    folder = tempfile.mkdtemp(prefix="reelway-", dir=base)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # a dying process may still write its last log line


@contextmanager
def _private_environment() -> Iterator[None]:
    """Loopback only, no usage statistics, and a token; inherited by Ray's processes, undone after the block."""
    wanted = {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0", "RAY_USAGE_STATS_ENABLED": "0"}
    if not any(name in os.environ for name in TOKEN_VARIABLES):
        wanted["RAY_AUTH_TOKEN"] = _OWN_TOKEN
    changed = (*wanted, "RAY_AUTH_MODE", "RAY_ADDRESS")  # Ray sets its mode itself; a local Ray is not at RAY_ADDRESS
    before, cluster_before = {name: os.environ.get(name) for name in changed}, ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(wanted)
    os.environ.pop("RAY_ADDRESS", None)
    ray_constants.ENABLE_RAY_CLUSTER = False  # was read from the environment when ray was imported
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = cluster_before
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
