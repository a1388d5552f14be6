"""What a process of ZeRO holds at its peak, beside the sum of what it must: `python benchmarks/zero_memory.py`.

The same updates by plain torch and by each ZeRO stage, every one in a pair of fresh processes. The peak is that of the
training, less what the process had before the network was built; beside it stands what `reelway ... --dry-run` counts:
weights, gradients, fp32 masters, AdamW's two moments, the average. DeepSpeed's buffers are counted apart; activations
are kept small and come on top. On the CPU memory is the resident set, on a GPU torch's count. `build` is the peak while
the network is built from a model folder, as a training does it. Prints a table, then JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from zero_parts import PLAIN, Row, make_engine, make_network, show, update


def measure(options: argparse.Namespace) -> list[Row]:
    from reelway.cluster.zero_settings import Division

    with tempfile.TemporaryDirectory() as folder:
        sizes = _write_model(options, Path(folder) / "model")
        rows = []
        for stage in (None, *options.stages):
            division = Division(stage, 1 if stage is None else options.workers)
            parts = division.trained(sum(sizes), averages=True)
            build, peak = map(max, zip(*_processes(options, stage, folder), strict=True))
            needed = sum(parts.values())
            way = PLAIN if stage is None else f"ZeRO {stage}"
            buffers = {"buffers": division.working(sizes)}
            rows.append({"way": way, **parts, "needed": needed, **buffers, "peak": peak, "ratio": peak / needed})
            rows[-1]["build"] = build
    return rows


def _write_model(options: argparse.Namespace, folder: Path) -> list[int]:
    """The network's folder; the sizes of its parameters."""
    from reelway.kernels.wan.weights import write_transformer

    network: Any = make_network(options.layers, options.heads)
    write_transformer(folder, network.config, network.state_dict())
    return [parameter.numel() for parameter in network.parameters()]


def _processes(options: argparse.Namespace, stage: int | None, folder: str) -> list[tuple[int, int]]:
    """Of each rank: peak bytes of building, and of training."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed is gone from the resident set at once
    given = vars(options) | {"stage": stage, "folder": folder, "group": f"{folder}/group-{stage}"}
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
    told = [rank.communicate()[0].strip().splitlines() for rank in ranks]
    codes = [rank.returncode for rank in ranks]
    if any(codes):
        raise SystemExit(f"stage {stage}: the processes ended with {codes}")
    return [tuple(json.loads(lines[-1])) for lines in told]


def rank_of(given: dict[str, Any]) -> None:
    """One process: build, train three updates, print [peak bytes of building, of training]."""
    torch.set_num_threads(1)
    device = torch.device("cuda", given["rank"]) if given["gpu"] else torch.device("cpu")
    backend = "nccl" if given["gpu"] else "gloo"
    where = f"file://{given['group']}"
    dist.init_process_group(backend, init_method=where, rank=given["rank"], world_size=given["workers"])
    stage = given["stage"]
    small = make_engine(stage, make_network(1, 1), device)  # imports, buffers, threads
    update(small, 0, given["rank"], device)
    del small
    before = _memory(given["gpu"], restart=True)
    network = _load(stage, Path(given["folder"]) / "model", device)
    build = _memory(given["gpu"], restart=False) - before
    engine = make_engine(stage, network, device)
    del network
    _memory(given["gpu"], restart=True)
    for step in range(3):
        update(engine, step, given["rank"], device)
    print(json.dumps([build, _memory(given["gpu"], restart=False) - before]))
    dist.barrier()
    dist.destroy_process_group()


def _load(stage: int | None, model: Path, device: torch.device) -> Any:
    from reelway.kernels.wan.weights import StoredTransformer
    from reelway.pipelines.students import empty_network, load_network

    if stage != 3:
        return load_network(model, device)
    from reelway.cluster.zero import divided

    stored = StoredTransformer(model)
    return divided(empty_network(stored.config), stored.read)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="blocks of the transformer")
    parser.add_argument("--heads", type=int, default=8, help="64 channels each")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--stages", type=int, nargs="*", default=[0, 1, 2, 3])
    parser.add_argument("--gpu", action="store_true", help="one GPU per worker")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank_of(json.loads(options.rank))
        return
    del options.rank
    rows = measure(options)
    show("Memory of one process", rows, "MiB", 1 / 2**20)
    print(json.dumps({"options": vars(options), "torch": torch.__version__, "memory": rows}))


if __name__ == "__main__":
    main()
