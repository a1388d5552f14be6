"""What DeepSpeed and Ray Train cost in time: `python benchmarks/zero_overhead.py`, run by hand on an idle machine.

In the same workers, one after the other and `rounds` times over, the same update by plain torch (gradients averaged by
one reduction) and by each ZeRO stage; and the time from the command to the first update's end. Prints a table, then
JSON.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from typing import Any

COMMAND = time.time()
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import torch  # noqa: E402
import zero_parts  # noqa: E402
from zero_parts import PLAIN, Row, make_engine, make_network, show, update  # noqa: E402


def timed(config: dict[str, Any], host: Any) -> list[Row]:
    """Seconds of set-up, of the first update and of the median one after it, per way."""
    ways = (None, *config["stages"])
    engines, rows = {}, {}
    for stage in ways:
        began = time.perf_counter()
        engines[stage] = make_engine(stage, make_network(config["layers"], config["heads"]), host.device)
        set_up = time.perf_counter() - began
        rows[stage] = {"way": PLAIN if stage is None else f"ZeRO {stage}", "set_up": set_up}
        rows[stage]["first"] = _seconds(engines[stage], 0, host)
        if stage is None:
            host.report({"first": time.time()})
    seconds: dict[Any, list[float]] = {stage: [] for stage in ways}
    for turn in range(config["rounds"]):
        for stage in ways:
            first = 1 + turn * config["updates"]
            seconds[stage] += [_seconds(engines[stage], first + step, host) for step in range(config["updates"])]
    return [rows[stage] | {"update": statistics.median(seconds[stage])} for stage in ways]


def _seconds(engine: Any, step: int, host: Any) -> float:
    host.ranks.barrier()
    began = time.perf_counter()
    update(engine, step, host.ranks.rank, host.device)
    if host.device.type == "cuda":
        torch.cuda.synchronize(host.device)
    return time.perf_counter() - began


def measure(options: argparse.Namespace) -> list[Row]:
    from ray import cloudpickle

    from reelway.cluster.preflight import Requirements
    from reelway.cluster.session import start_or_join
    from reelway.cluster.training import TrainingSettings, run_training

    for module in (sys.modules[__name__], zero_parts):
        cloudpickle.register_pickle_by_value(module)  # workers need not find these files
    firsts: list[float] = []
    resources = Requirements(cpus=1, gpus=1 if options.gpu else 0)
    with tempfile.TemporaryDirectory() as folder, start_or_join(dashboard=True):
        settings = TrainingSettings(options.workers, folder, "timed", resources)
        report = run_training(
            timed, vars(options), settings, on_metrics=lambda row: firsts.append(row["first"] - COMMAND)
        )
    rows: list[Row] = report.value
    for row in rows:
        row["ratio"] = row["update"] / rows[0]["update"]
    return [{"way": "command to first update", "first": firsts[0]}, *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6, help="blocks of the transformer")
    parser.add_argument("--heads", type=int, default=3, help="64 channels each")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--updates", type=int, default=10, help="timed ones of a round")
    parser.add_argument("--rounds", type=int, default=3, help="of all ways, in turn")
    parser.add_argument("--stages", type=int, nargs="*", default=[0, 1, 2, 3])
    parser.add_argument("--gpu", action="store_true", help="one GPU per worker")
    options = parser.parse_args()
    rows = measure(options)
    show("Time", rows, "s", 1.0)
    print(json.dumps({"options": vars(options), "load": os.getloadavg(), "torch": torch.__version__, "time": rows}))


if __name__ == "__main__":
    main()
