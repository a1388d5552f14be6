"""What this machine, or the container that it is, has to give. Without Ray, which takes seconds to import."""

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes of host memory that a process may still take."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = cgroup("memory.max"), cgroup("memory.current")
    if limit and used and limit[0] != "max":
        free = min(free, int(limit[0]) - int(used[0]))
    return free


def cgroup(name: str) -> list[str]:
    """The words of a control file of the container; none where there is no such file."""
    path = CGROUP / name
    return path.read_text().split() if path.exists() else []
