"""A cluster with two types of GPU, by its own account: a job asks which, and then uses no other."""

import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import cloudpickle

from reelway.cluster.pool import PoolSettings, run_pool
from reelway.cluster.preflight import Requirements
from reelway.cluster.session import start_or_join
from reelway.pipelines.making import kind_of_workers

sys.path.insert(0, str(Path(__file__).parent))
from faults.rays import two_nodes

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import a test module

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.skipif(sys.platform != "linux", reason="needs a short path for Ray's sockets"),
]


class Where:
    def process(self, item: int) -> dict[str, Any]:
        return {"node": ray.get_runtime_context().get_node_id()}


def gpus(kind: str) -> dict[str, Any]:
    return {"num_gpus": 2, "resources": {f"accelerator_type:{kind}": 1}}


def test_workers_stand_on_the_chosen_type_only() -> None:
    assert not ray.is_initialized()
    with two_nodes(gpus("A100"), gpus("H100")) as cluster:
        need = Requirements(cpus=0.25, gpus=1, max_workers=4, one_kind=True)
        refused = r"^--accelerator-type: the cluster has several types of GPU \(2 A100, 2 H100\); .* choose one$"
        with pytest.raises(ValueError, match=refused), start_or_join(cluster.address, requirements=need):
            pass
        chosen = Requirements(cpus=0.25, gpus=1, max_workers=4, one_kind=True, accelerator="H100")
        with start_or_join(cluster.address, requirements=chosen) as session:
            assert session.preflight[-1] == "workers: up to 2 with 0.25 CPUs and 1 GPU of type H100"
            rows: list[str] = []
            report = run_pool(Where, range(12), PoolSettings(chosen), lambda _, row: rows.append(row["node"]))
            (node,) = (node["NodeID"] for node in ray.nodes() if "accelerator_type:H100" in node["Resources"])
            assert rows == [node] * 12
            assert 1 <= report.most_workers <= 2
            assert kind_of_workers("cpu", chosen).startswith("cpu ")
