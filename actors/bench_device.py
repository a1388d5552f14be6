"""What a benchmark asks of its device: a clock, the memory in use, the peak rates, and names and versions."""

import platform
import resource
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STATUS = Path("/proc/self/status")
PACKAGES = ("torch", "diffusers", "triton", "torchao")


def find_device(name: str) -> torch.device:
    """The device of that name; ValueError if it is of another kind than cpu and cuda, or not there."""
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ValueError(f"--device: must be cpu, cuda or cuda:N, got {name}")
    if kind == "cpu":
        return torch.device("cpu")
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= devices:
        raise ValueError(f"--device: torch {torch.__version__} sees {devices} CUDA devices here, got {name}")
    return torch.device("cuda", int(index or 0))


class Clock:
    """Seconds at which all work given to the device so far is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class MemoryMeter:
    """Peak memory in bytes. CUDA: allocated tensors. CPU: resident memory above that at construction."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._baseline = 0 if device.type == "cuda" else _resident("VmRSS")

    @property
    def meaning(self) -> str:
        if self._device.type == "cuda":
            return "CUDA max_memory_allocated, weights included"
        return "growth of the peak resident memory since before the networks were built"

    def start(self) -> None:
        """Forget the peak so far."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            _reset_resident_peak()

    def peak(self) -> int:
        """The highest use since `start`."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return max(0, _resident("VmHWM") - self._baseline)


def _resident(field: str) -> int:
    """Resident memory in bytes: VmRSS now, VmHWM its peak. Systems without /proc tell the peak alone."""
    if STATUS.is_file():
        values = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
        if field in values:
            return int(values[field].split()[0]) * 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset_resident_peak() -> None:
    """Linux: set VmHWM back to the memory in use. Where that is refused the peak is that of the process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


@dataclass(frozen=True)
class Peaks:
    """Rates that the device reached just now. matmul: FLOP/s in the benchmark's precision; fp8_matmul: FLOP/s
    of float8 products, where those are in use; copy: bytes/s, read and written ones together.
    """

    matmul: float
    fp8_matmul: float | None
    copy: float


def measure_peaks(device: torch.device, dtype: torch.dtype, *, fp8: bool = False) -> Peaks:
    """Best of several large square matmuls, and of several copies of a buffer that no cache holds."""
    on_cuda = device.type == "cuda"
    side, copied = (8192, 2**30) if on_cuda else (1024, 2**27)
    clock = Clock(device)
    flops = 2 * side**3
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    matmul = flops / _best_seconds(clock, lambda: torch.mm(left, right, out=out))
    fp8_matmul = flops / _best_seconds(clock, _fp8_product(left, right)) if fp8 else None
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * copied / _best_seconds(clock, lambda: target.copy_(source))
    return Peaks(matmul, fp8_matmul, copy)


def _fp8_product(left: Tensor, right: Tensor) -> Callable[[], Tensor]:
    first, second = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()  # the second by columns
    one = torch.ones((), device=left.device)
    return lambda: torch._scaled_mm(first, second, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def _best_seconds(clock: Clock, work: Callable[[], object], rounds: int = 5) -> float:
    """Seconds of one call of `work`: the best round, each of as many calls as hide the cost of the clock."""
    work()
    start = clock()
    work()
    calls = max(1, min(50, int(0.02 / max(clock() - start, 1e-6))))
    best = float("inf")
    for _ in range(rounds):
        start = clock()
        for _ in range(calls):
            work()
        best = min(best, (clock() - start) / calls)
    return best


def describe_device(device: torch.device) -> dict[str, Any]:
    """Kind and name of the device, and the threads that torch uses on the host."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"kind": device.type, "name": name, "cpu_threads": torch.get_num_threads()}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Versions of what was measured; None: not installed. `commit` ends in + if tracked files were changed."""
    found: dict[str, str | None] = {"reelway": __version__, "commit": _commit(), "cuda": torch.version.cuda}
    installed = {distribution.name.lower(): distribution.version for distribution in metadata.distributions()}
    return found | {name: installed.get(name) for name in PACKAGES}


def _commit() -> str | None:
    """The commit of the checkout that this package lies in, or None if it is none."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
