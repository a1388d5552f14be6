"""Before a run: what a pool needs, what the machine or the cluster has, and in plain words what is missing."""

import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray._private.accelerators import get_accelerator_manager_for_resource

from .machine import cgroup, free_memory

SHARED_MEMORY = Path("/dev/shm")
OF_TYPE = "accelerator_type:"  # begins the name of the resource that says it of a node
NODES_NAMED = 4  # in a line that lists them
COMFORTABLE_SHARED_MEMORY = 1 << 30  # bytes; a container's 64 MiB makes Ray keep its objects on disk


@dataclass(frozen=True)
class Requirements:
    """What a pool asks for: how many workers, and what each of them holds while it lives.

    `gpus` is a share of one GPU (0.25) or a whole number, `accelerator` the only type that will do, by Ray's name of it
    ("A100"); `one_kind` says that without a name all must be of the same type. `memory` is bytes of host memory, 0 when
    it is not reserved; `gpu_memory` what its weights take on its GPU. `cluster_grows` says that nodes are added on
    demand, so that what does not fit now may fit later. Raises ValueError naming the field.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    memory: int = 0
    min_workers: int = 1
    max_workers: int = 1
    cluster_grows: bool = False
    accelerator: str = ""
    one_kind: bool = False
    gpu_memory: int = 0

    def __post_init__(self) -> None:
        for name in ("cpus", "gpus", "memory", "gpu_memory"):
            value = vars(self)[name]
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: must be a number of at least 0, got {value}")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus: must be a whole number or a share of one GPU, got {self.gpus}")
        if self.accelerator and not self.gpus:
            raise ValueError(f"accelerator: {self.accelerator} is a type of GPU, and the workers have none (gpus is 0)")
        if self.min_workers < 1:
            raise ValueError(f"min_workers: must be at least 1, got {self.min_workers}")
        if self.max_workers < self.min_workers:
            raise ValueError(f"max_workers: must be at least min_workers = {self.min_workers}, got {self.max_workers}")

    def __str__(self) -> str:
        parts = [counted(self.cpus, "CPU")] if self.cpus else []
        parts += [self.gpus_in_words] if self.gpus else []
        parts += [f"{in_gib(self.memory)} of memory"] if self.memory else []
        return " and ".join(parts) or "nothing reserved"

    @property
    def gpus_in_words(self) -> str:
        """`2 GPUs`, `1 GPU of type A100`."""
        return counted(self.gpus, "GPU") + (f" of type {self.accelerator}" if self.accelerator else "")


@dataclass(frozen=True)
class Node:
    """A machine's resources as Ray counts them; memory in bytes of host memory. accelerators: types of its GPUs.

    gpu_memory: bytes of its smallest GPU; 0 where nobody knows, as Ray does not of the nodes of a cluster.
    """

    name: str
    cpus: float
    gpus: float
    memory: int
    accelerators: tuple[str, ...] = ()
    gpu_memory: int = 0

    def suits(self, need: Requirements) -> bool:
        """Whether its GPUs are of the type that is asked for, if one is."""
        return not need.accelerator or need.accelerator in self.accelerators

    def is_too_small(self, need: Requirements) -> bool:
        """Whether a worker's weights do not fit into its share of a GPU here. They stand on one GPU."""
        return bool(need.gpus and self.gpu_memory) and need.gpu_memory > self.gpu_share(need)

    def gpu_share(self, need: Requirements) -> int:
        """Bytes of GPU memory that are a worker's."""
        return int(min(need.gpus, 1) * self.gpu_memory)

    def holds(self, need: Requirements) -> int:
        """How many such workers fit here. A share of a GPU never spans two GPUs."""
        if not self.suits(need) or self.is_too_small(need):
            return 0
        counts = [need.max_workers]
        if need.cpus:
            counts.append(_times(self.cpus, need.cpus))
        if need.gpus:
            counts.append(int(self.gpus) * _times(1, need.gpus) if need.gpus < 1 else _times(self.gpus, need.gpus))
        if need.memory:
            counts.append(self.memory // need.memory)
        return min(counts)

    def __str__(self) -> str:
        gpus = " ".join([counted(self.gpus, "GPU"), *self.accelerators])
        return f"{self.name} ({counted(self.cpus, 'CPU')}, {gpus}, {in_gib(self.memory)})"


def in_gib(size: float) -> str:
    """Bytes as people read them: `1.5 GiB`."""
    return f"{size / 2**30:.1f} GiB"


def counted(count: float, unit: str) -> str:
    """`1 GPU`, `0.5 GPUs`, `20,000 shards`."""
    figure = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{figure} {unit}{'' if count == 1 else 's'}"


def in_words(nodes: Sequence[Node]) -> str:
    """The first nodes with what they have, and how many more there are."""
    more = [f"{len(nodes) - NODES_NAMED} more"] if len(nodes) > NODES_NAMED else []
    return ", ".join([*map(str, nodes[:NODES_NAMED]), *more])


def this_machine(cpus: float | None = None, gpus: float | None = None) -> Node:
    """What a local Ray would get here: usable CPUs, CUDA devices and free memory, within the container's limits."""
    devices = _cuda_devices() if gpus is None else gpus
    return Node(
        name="this machine",
        cpus=_usable_cpus() if cpus is None else cpus,
        gpus=devices,
        memory=free_memory(),
        accelerators=_accelerators_here() if devices else (),
        gpu_memory=_gpu_memory() if devices else 0,
    )


def cluster_nodes() -> list[Node]:
    """The nodes of the cluster that this process is connected to, alive ones only."""
    return [
        Node(
            name=node["NodeManagerAddress"],
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
            memory=int(node["Resources"].get("memory", 0)),
            accelerators=_types_among(node["Resources"]),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def check_placement(nodes: Sequence[Node], need: Requirements) -> int:
    """How many of the pool's workers fit on these nodes, at most `max_workers`.

    A cluster that grows is not judged by what it has now: it is given `max_workers`. Raises ValueError saying
    which resource is missing when not even `min_workers` fit, or that a type of GPU must be chosen.
    """
    if need.gpus and need.one_kind:
        _check_one_kind(nodes, need)
    if need.cluster_grows:
        return need.max_workers
    fitting = sum(node.holds(need) for node in nodes)
    if fitting < need.min_workers:
        raise ValueError(_what_is_missing(nodes, need, fitting))
    return min(need.max_workers, fitting)


def check_shared_memory(object_store: int | None) -> str:
    """A line on the shared memory that Ray's object store lives in; `object_store` in bytes, None for Ray's choice.

    Raises ValueError when an object store of the asked size has no room.
    """
    if not SHARED_MEMORY.is_dir():
        return "shared memory: this system has none; objects are kept on disk"
    free = shutil.disk_usage(SHARED_MEMORY).free
    advice = "give the container more (docker: --shm-size; Kubernetes: an emptyDir with medium Memory)"
    if object_store is not None and object_store > free:
        raise ValueError(
            f"shared memory: an object store of {in_gib(object_store)} does not fit in the {in_gib(free)} free "
            f"at {SHARED_MEMORY}; {advice}"
        )
    low = f": too little, objects will be kept on disk; {advice}" if free < COMFORTABLE_SHARED_MEMORY else ""
    return f"shared memory: {in_gib(free)} free{low}"


def check_output(output: str | os.PathLike[str], size: int) -> str:
    """A line on the room at `output`, a folder that need not exist yet; `size` is what the run will write, in bytes.

    An object store has no end that could be asked for. Raises ValueError when a local disk has not the room.
    """
    if "://" in os.fspath(output):
        return f"output: {output} (an object store: free space is not known)"
    path = Path(output).absolute()
    standing = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(standing).free
    if size > free:
        raise ValueError(f"output: the run writes {in_gib(size)}; {output} has {in_gib(free)} free")
    return f"output: {in_gib(free)} free at {output}, {in_gib(size)} needed"


def _times(have: float, need: float) -> int:
    return math.floor(have / need + 1e-6)  # 0.9 / 0.3 is 2.9999999999999996


def _check_one_kind(nodes: Sequence[Node], need: Requirements) -> None:
    counts: Counter[str] = Counter()
    for node in nodes:
        if node.holds(need):
            counts[" and ".join(node.accelerators) or "of unknown type"] += int(node.gpus)
    if len(counts) > 1:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        rule = "results differ in the last bits from one to the other, so choose one"
        raise ValueError(f"--accelerator-type: the cluster has several types of GPU ({kinds}); {rule}")


def _what_is_missing(nodes: Sequence[Node], need: Requirements, fitting: int) -> str:
    count = need.min_workers
    workers, verb = counted(count, "worker"), "needs" if count == 1 else "each need"
    if not any(node.suits(need) for node in nodes):
        types = ", ".join(sorted({name for node in nodes for name in node.accelerators})) or "none"
        return f"{workers} with {need.gpus_in_words}: the cluster has {types}"
    nodes = [node for node in nodes if node.suits(need)]
    gpus, cpus = sum(node.gpus for node in nodes), sum(node.cpus for node in nodes)
    memory = sum(node.memory for node in nodes)
    for unit, each, have, asked in (
        ("GPU", need.gpus, gpus, need.gpus_in_words),
        ("CPU", need.cpus, cpus, counted(need.cpus, "CPU")),
    ):
        if count * each > have:
            return f"{workers} with {asked} {verb} {counted(count * each, unit)}; the cluster has {have:g}"
    small = [node for node in nodes if node.is_too_small(need)]
    if small:
        weights, share = in_gib(need.gpu_memory), in_gib(max(node.gpu_share(need) for node in small))
        return f"{workers} with {need.gpus_in_words}: the weights take {weights} of GPU memory, there are {share}"
    if count * need.memory > memory:
        asked, total = in_gib(need.memory), in_gib(count * need.memory)
        return f"{workers} with {asked} of memory {verb} {total}; the cluster has {in_gib(memory)} free"
    return f"{workers} with {need} do not fit: only {fitting} can be placed on {in_words(nodes)}"


def _usable_cpus() -> float:
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota = cgroup("cpu.max")
    if len(quota) == 2 and quota[0] != "max":
        return max(1, min(count, int(quota[0]) // int(quota[1])))
    return count


def _cuda_devices() -> int:
    import torch  # seconds to import, and every worker of a pool imports this module

    return torch.cuda.device_count()


def _gpu_memory() -> int:
    """Bytes of the smallest device that this process sees."""
    import torch

    devices = range(torch.cuda.device_count())
    return min((int(torch.cuda.get_device_properties(device).total_memory) for device in devices), default=0)


def _types_among(resources: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(name.removeprefix(OF_TYPE) for name in resources if name.startswith(OF_TYPE)))


def _accelerators_here() -> tuple[str, ...]:
    """The type that Ray will give a node here."""
    found = get_accelerator_manager_for_resource("GPU").get_current_node_accelerator_type()
    return (found,) if found else ()
