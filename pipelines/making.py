"""What the jobs that make data sets have in common: the pool asked for, the kind of device, one set in one folder."""

import math
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError

from ..actors.trajectories import device_kind
from ..cluster.dataset import INFO, read_dataset
from ..cluster.preflight import Requirements
from ..cluster.storage import Storage


@dataclass(frozen=True)
class PoolOptions:
    """The pool that was asked for on the command line. most: None for as many workers as there is work for."""

    least: int
    most: int | None
    cpus: float
    gpus: float
    autoscaling: bool
    accelerator: str = ""

    @classmethod
    def parse(
        cls,
        workers: str | None,
        device: str,
        gpus: float | None,
        cpus: float,
        autoscaling: bool,
        accelerator: str | None = None,
    ) -> "PoolOptions":
        """workers: "N" or "MIN:MAX". gpus: of a worker; 1 on cuda and 0 on cpu where it is not said. accelerator: the
        only type of GPU that will do.
        """
        if gpus is None:
            gpus = 1.0 if device == "cuda" else 0.0
        for option, value in (("--gpus-per-worker", gpus), ("--cpus-per-worker", cpus)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{option}: must be a number of at least 0, got {value:g}")
        if accelerator is not None and not (accelerator and gpus):
            raise ValueError(f"--accelerator-type: must be a type of GPU for --device cuda, got {accelerator!r}")
        least, most = (1, None) if workers is None else _bounds(workers)
        return cls(least, most, cpus, gpus, autoscaling, accelerator or "")

    def requirements(self, memory: int, work: int, gpu_memory: int = 0) -> Requirements:
        """memory, gpu_memory: bytes of a worker, on the host and of its weights. work: items there are at most."""
        return Requirements(
            cpus=self.cpus,
            gpus=self.gpus,
            memory=memory,
            min_workers=self.least,
            max_workers=max(self.least, work) if self.most is None else self.most,
            cluster_grows=self.autoscaling,
            accelerator=self.accelerator,
            one_kind=True,
            gpu_memory=gpu_memory,
        )


def _bounds(workers: str) -> tuple[int, int]:
    least, colon, most = workers.partition(":")
    bounds = [least, most] if colon else [least, least]
    if not all(bound.isdecimal() for bound in bounds):
        raise ValueError(f"--workers: must be N or MIN:MAX, got {workers!r}")
    fewest, most_of_all = map(int, bounds)
    if not 1 <= fewest <= most_of_all:
        raise ValueError(f"--workers: must be at least 1, and MAX at least MIN, got {workers!r}")
    return fewest, most_of_all


def known_kind(out: Storage, device: str, accelerator: str = "") -> str | None:
    """The kind of device that a job runs on, if that is known here: the one that the data set was begun on, else this
    machine's; None when only the workers have such a device, or a type of it was asked for.
    """
    if out.exists(INFO):
        stored = read_dataset(out).made_by.get("device")
        if isinstance(stored, str):
            return stored
    if torch.device(device).type == "cuda" and (accelerator or not torch.cuda.is_available()):
        return None
    return device_kind(device)


def kind_of_workers(device: str, need: Requirements) -> str:
    """What the workers will run on, asked of a process with one worker's resources."""
    resources = {"num_cpus": need.cpus, "num_gpus": need.gpus, "accelerator_type": need.accelerator or None}
    try:
        kind: str = ray.get(ray.remote(device_kind).options(**resources).remote(device))
    except RayTaskError as error:
        raise ValueError(str(error.cause)) from None
    return kind


def check_same(out: Storage, kind: str, made_by: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the first setting that differs, when the folder holds another data set."""
    if not out.exists(INFO):
        return
    stored = read_dataset(out)
    if stored.kind != kind:
        raise ValueError(f"{out.uri}: holds a data set of {stored.kind}, not of {kind}; choose another --out")
    before, now = dict(_flat(stored.made_by)), dict(_flat(made_by))
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            difference = f"{name} is {_short(before.get(name))} there and {_short(now.get(name))} here"
            raise ValueError(f"{out.uri}: was made otherwise: {difference}; choose another --out")


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _short(value: Any) -> str:
    return textwrap.shorten(repr(value), 60, placeholder=" ...")
