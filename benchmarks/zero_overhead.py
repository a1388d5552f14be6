"""What DeepSpeed and Ray Train cost: `python benchmarks/zero_overhead.py`, run by hand. Prints tables, then JSON.

Time: in the same workers, one after the other, the same update by plain torch (gradients averaged by one reduction)
and by each ZeRO stage; and the time from the command to the first update's end. Memory: the peak of a process that
trains, less what it had before the network was built, beside the sum of what a stage must hold: weights, gradients,
fp32 masters, the optimiser's two moments and the average. Activations are kept small and come on top. Every
measurement of memory is a pair of fresh processes. On the CPU memory is the resident set, on a GPU torch's count.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

COMMAND = time.time()
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402

PLAIN = "plain torch"
RATE, DECAY = 1e-4, 0.99
Row = dict[str, Any]


def make_network(layers: int, heads: int) -> nn.Module:
    from reelway.kernels.wan.config import CONFIGS
    from reelway.kernels.wan.transformer import VideoTransformer

    torch.manual_seed(0)
    width = heads * CONFIGS["tiny"].attention_head_dim
    return VideoTransformer(replace(CONFIGS["tiny"], num_layers=layers, num_attention_heads=heads, ffn_dim=4 * width))


def flow_matching(network: Any, step: int, rank: int, device: torch.device) -> Tensor:
    from reelway.kernels.wan.context import TextContext

    generator = torch.Generator().manual_seed(1000 * rank + step)
    latents, noise = (torch.randn(1, 3, network.config.in_channels, 4, 4, generator=generator) for _ in range(2))
    text = TextContext.dense(torch.randn(1, 4, network.config.text_dim, generator=generator).to(device))
    noisy = (0.5 * latents + 0.5 * noise).to(device)
    predicted = network(noisy, torch.full((1, 3), 500.0, device=device), text)
    return (predicted - (noise - latents).to(device)).square().mean()


class PlainEngine:
    """The update of `ZeroEngine` in torch alone, everything on every rank."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.network = network.to(device)
        self.parameters = list(network.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, RATE, fused=True)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        pieces = (flat / dist.get_world_size()).split([gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))
        float(nn.utils.clip_grad_norm_(self.parameters, 1.0))
        self.optimizer.step()
        torch._foreach_lerp_(self.average, self.parameters, 1 - DECAY)
        self.optimizer.zero_grad()


def make_engine(stage: int | None, network: nn.Module, device: torch.device) -> Any:
    if stage is None:
        return PlainEngine(network, device)
    from reelway.cluster.zero import ZeroEngine, ZeroSettings

    return ZeroEngine(network, ZeroSettings(lambda step: RATE, stage=stage, ema_decay=DECAY))


def update(engine: Any, step: int, rank: int, device: torch.device) -> None:
    engine.backward(flow_matching(engine.network, step, rank, device))
    engine.step()


# --- Time, in Ray Train -------------------------------------------------------------------------------------------


def timed(config: dict[str, Any], host: Any) -> list[Row]:
    """Seconds of set-up, of the first update and of the median one after it, per way."""
    rows: list[Row] = []
    for stage in (None, *config["stages"]):
        began = time.perf_counter()
        engine = make_engine(stage, make_network(config["layers"], config["heads"]), host.device)
        seconds = [time.perf_counter() - began]
        for step in range(config["updates"] + 1):
            host.ranks.barrier()
            began = time.perf_counter()
            update(engine, step, host.ranks.rank, host.device)
            seconds.append(time.perf_counter() - began)
            if not rows and step == 0:
                host.report({"first": time.time()})
        way = PLAIN if stage is None else f"ZeRO {stage}"
        rows.append({"way": way, "set_up": seconds[0], "first": seconds[1], "update": statistics.median(seconds[2:])})
    return rows


def measure_time(options: argparse.Namespace) -> list[Row]:
    from ray import cloudpickle

    from reelway.cluster.preflight import Requirements
    from reelway.cluster.session import start_or_join
    from reelway.cluster.training import TrainingSettings, run_training

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers need not find this file
    firsts: list[float] = []
    resources = Requirements(cpus=1, gpus=1 if options.gpu else 0)
    with tempfile.TemporaryDirectory() as folder, start_or_join(dashboard=True):
        settings = TrainingSettings(options.workers, folder, "timed", resources)
        report = run_training(
            timed, vars(options), settings, on_metrics=lambda row: firsts.append(row["first"] - COMMAND)
        )
    rows: list[Row] = report.value
    for row in rows:
        row["overhead"] = row["update"] - rows[0]["update"]
    return [{"way": "command to first update", "first": firsts[0]}, *rows]


# --- Memory, in fresh processes -----------------------------------------------------------------------------------


def needed(parameters: int, stage: int | None, ranks: int) -> dict[str, float]:
    """Bytes that one process must hold, in fp32."""
    whole, part = 4.0 * parameters, 4.0 * parameters / ranks
    sharded = stage is not None and stage > 0
    return {
        "weights": part if stage == 3 else whole,
        "gradients": part if stage in (2, 3) else whole,
        "masters": part if stage in (1, 2) else 0.0,
        "moments": 2 * (part if sharded else whole),
        "average": part if sharded else whole,
    }


def measure_memory(options: argparse.Namespace) -> list[Row]:
    rows = []
    for stage in (None, *options.stages):
        with tempfile.TemporaryDirectory() as folder:
            peak, parameters = max(_processes(options, stage, folder))
        parts = needed(parameters, stage, options.workers)
        total = sum(parts.values())
        way = PLAIN if stage is None else f"ZeRO {stage}"
        rows.append({"way": way, **parts, "needed": total, "peak": peak, "ratio": peak / total})
    return rows


def _processes(options: argparse.Namespace, stage: int | None, folder: str) -> list[tuple[int, int]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed is gone from the resident set at once
    given = vars(options) | {"stage": stage, "folder": folder}
    script = str(Path(__file__).absolute())
    ranks = [
        subprocess.Popen(
            [sys.executable, script, "--rank", json.dumps(given | {"rank": rank})],
            env=environment | {"LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(options.workers)
    ]
    lines = [rank.communicate()[0].strip().splitlines()[-1] for rank in ranks]
    return [tuple(json.loads(line)) for line in lines]


def rank_of_memory(given: dict[str, Any]) -> None:
    """One process: build, train three updates, print [peak bytes, parameters]."""
    torch.set_num_threads(1)
    device = torch.device("cuda", given["rank"]) if given["gpu"] else torch.device("cpu")
    group = f"file://{given['folder']}/group"
    backend = "nccl" if given["gpu"] else "gloo"
    dist.init_process_group(backend, init_method=group, rank=given["rank"], world_size=given["workers"])
    small = make_engine(given["stage"], make_network(1, 1), device)  # imports, buffers, threads
    update(small, 0, given["rank"], device)
    del small
    before = _memory(given["gpu"], restart=True)
    network = make_network(given["layers"], given["heads"])
    parameters = sum(parameter.numel() for parameter in network.parameters())
    engine = make_engine(given["stage"], network, device)
    del network
    _memory(given["gpu"], restart=True)  # the network is built whole; what counts is the training
    for step in range(3):
        update(engine, step, given["rank"], device)
    print(json.dumps([_memory(given["gpu"], restart=False) - before, parameters]))
    dist.barrier()
    dist.destroy_process_group()


def _memory(gpu: bool, restart: bool) -> int:
    """Peak bytes since the last restart; after a restart, the bytes held now."""
    if gpu:
        if restart:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() if restart else torch.cuda.max_memory_allocated()
    if restart:
        Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines["VmRSS" if restart else "VmHWM"].split()[0])


# --- Tables -------------------------------------------------------------------------------------------------------


def show(title: str, rows: list[Row], unit: str, scale: float) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*columns, title=f"{title} ({unit})")
    for row in rows:
        cells = [row.get(name, "") for name in columns]
        scales = [1.0 if name == "ratio" else scale for name in columns]
        table.add_row(
            *(cell if isinstance(cell, str) else f"{cell * by:.3f}" for cell, by in zip(cells, scales, strict=True))
        )
    Console(width=120).print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="blocks of the transformer")
    parser.add_argument("--heads", type=int, default=8, help="64 channels each")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--updates", type=int, default=10, help="timed ones, after the first")
    parser.add_argument("--stages", type=int, nargs="*", default=[0, 1, 2, 3])
    parser.add_argument("--part", choices=["time", "memory"], nargs="*", default=["time", "memory"])
    parser.add_argument("--gpu", action="store_true", help="one GPU per worker")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.rank:
        rank_of_memory(json.loads(options.rank))
        return
    del options.rank
    result: dict[str, Any] = {"options": vars(options), "load": os.getloadavg(), "torch": torch.__version__}
    if "time" in options.part:
        result["time"] = measure_time(options)
        show("Time", result["time"], "s", 1.0)
    if "memory" in options.part:
        result["memory"] = measure_memory(options)
        show("Memory of one process", result["memory"], "MiB", 1 / 2**20)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
