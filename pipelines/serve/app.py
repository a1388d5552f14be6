"""The application of Ray Serve: gateways, which any number of viewers connect to, and one pool of workers.

`application` is what a Serve config names: `import_path: reelway.pipelines.serve.app:application`, with a server's
configuration as its `args`.
"""

import os
import secrets
from pathlib import Path
from typing import Any, Final

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from .backend import RayBackend
from .config import ServeConfig, check_access, fleets, make_config
from .gateway import create_app
from .keys import Keyring, read_keys
from .limits import Limits
from .metrics import Metrics
from .orders import Services
from .pool import pool_application, with_version
from .state import State

NAME: Final = "reelway"  # of the application
POOL: Final = "Pool"  # of its deployment
MOST_REQUESTS: Final = 100_000  # at once, of a gateway: each socket is one, and refusals are ours
NOBODY: Final = "0" * 64  # no key has this hash: the door is shut until the keys are known


class Gateway:
    """One replica. Keys come by `reconfigure`, so that they can change while streams run."""

    def __init__(self, config: ServeConfig, pool: DeploymentHandle) -> None:
        name = f"gateway-{secrets.token_hex(4)}"
        self.services = Services(
            config,
            RayBackend(pool),
            State(config.state),
            Limits(config.limits),
            Keyring([NOBODY]),
            Metrics(name),
        )

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """keys: hashes of the keys that are let in; none: everybody is."""
        self.services.keys = Keyring(user_config["keys"])

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.services)


def build(config: ServeConfig, keys: Keyring) -> serve.Application:
    """The application, to be run by `serve.run`. ValueError where anybody could use it."""
    check_access(config, has_keys=len(keys) > 0)
    config = _with_full_paths(config)
    deployment = serve.deployment(serve.ingress()(Gateway), name="Gateway").options(
        num_replicas=config.gateways,
        max_ongoing_requests=MOST_REQUESTS,
        ray_actor_options={"num_cpus": 0},
        user_config={"keys": list(keys.hashes)},
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    return with_version(deployment, config.model_dump_json()).bind(config, pool_application(fleets(config)))


def application(arguments: dict[str, Any]) -> serve.Application:
    """The application for a Serve config. arguments: a server's configuration, as in its YAML file."""
    config = make_config(dict(arguments), "args")
    return build(config, read_keys(config.keys))


def _with_full_paths(config: ServeConfig) -> ServeConfig:
    """Replicas and workers run in folders of their own."""
    models = {name: model.model_copy(update={"path": _full(model.path)}) for name, model in config.models.items()}
    return config.model_copy(update={"models": models, "state": _full(config.state)})


def _full(address: str) -> str:
    return address if "://" in address else str(Path(address).absolute())


def serve_config(config: ServeConfig) -> dict[str, Any]:
    """A config for `serve deploy` and for KubeRay's RayService."""
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.host, "port": config.port},
        "applications": [
            {
                "name": NAME,
                "route_prefix": "/",
                "import_path": "reelway.pipelines.serve.app:application",
                "args": config.model_dump(mode="json", exclude_defaults=True),
            }
        ],
    }


def run(config: ServeConfig, keys: Keyring) -> DeploymentHandle:
    """Run the application on the Ray that this process is connected to; returns the pool's handle."""
    serve.start(http_options={"host": config.host, "port": config.port}, logging_config=_quiet())
    serve.run(build(config, keys), name=NAME, route_prefix="/")
    return pool_handle()


def pool_handle() -> DeploymentHandle:
    """The pool of the server that runs on this Ray. ValueError where there is none."""
    try:
        return serve.get_deployment_handle(POOL, NAME)
    except (ray.exceptions.RayError, RuntimeError) as error:
        raise ValueError(f"serve: no server runs on this Ray ({str(error).splitlines()[0]})") from None


def _quiet() -> LoggingConfig:
    return LoggingConfig(log_level=os.environ.get("REELWAY_LOG_LEVEL", "WARNING"), enable_access_log=False)
