"""Preflight in plain words, and a Ray that is started, joined, and left as it should be."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from reelway.cluster.preflight import (
    Node,
    Requirements,
    check_output,
    check_placement,
    check_shared_memory,
    this_machine,
)
from reelway.cluster.session import RayNotStarted, Session, start_or_join

GIB = 1 << 30
SCRIPT = """
import dataclasses, json, sys, time
import ray
from reelway.cluster.pool import PoolSettings, run_pool
from reelway.cluster.session import start_or_join

class Sleeper:
    def process(self, item):
        time.sleep(0.5)
        return {"item": item}

with start_or_join("local", cpus=1, gpus=0, object_store_bytes=100 << 20) as session:
    folder = ray._private.worker._global_node.get_session_dir_path()
    report = run_pool(Sleeper, range(1000), PoolSettings(), lambda item, row: print("row", item, flush=True))
print(folder)
print(json.dumps(dataclasses.asdict(report)))
sys.exit(130 if report.interrupted else 0)
"""
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1 as /proc/net/tcp and tcp6 write it
LISTEN = "0A"  # the state of a socket in /proc/net/tcp


def node(
    cpus: float = 8,
    gpus: float = 0,
    memory: int = 64 * GIB,
    accelerators: tuple[str, ...] = (),
    gpu_memory: int = 0,
) -> Node:
    return Node("n", cpus, gpus, memory, accelerators, gpu_memory)


MIXED = [node(gpus=8, accelerators=("A100",)), node(gpus=4, accelerators=("H100",)), node(), node(gpus=1)]


# --- Placement ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "need", "line"),
    [
        (
            [node(gpus=1), node(gpus=1)],
            Requirements(gpus=1, min_workers=8, max_workers=8),
            "8 workers with 1 GPU each need 8 GPUs; the cluster has 2",
        ),
        (
            [node(cpus=2)],
            Requirements(cpus=1.5, min_workers=2, max_workers=2),
            "2 workers with 1.5 CPUs each need 3 CPUs; the cluster has 2",
        ),
        ([node()], Requirements(gpus=1), "1 worker with 1 GPU needs 1 GPU; the cluster has 0"),
        (
            [node(memory=3 * GIB)],
            Requirements(memory=2 * GIB, min_workers=2, max_workers=4),
            "2 workers with 2.0 GiB of memory each need 4.0 GiB; the cluster has 3.0 GiB free",
        ),
        (
            [node(gpus=2, gpu_memory=16 * GIB)],
            Requirements(gpus=0.25, gpu_memory=5 * GIB),
            "1 worker with 0.25 GPUs: the weights take 5.0 GiB of GPU memory, there are 4.0 GiB",
        ),
        (
            [node(gpus=2, gpu_memory=16 * GIB)],
            Requirements(gpus=2, gpu_memory=20 * GIB),
            "1 worker with 2 GPUs: the weights take 20.0 GiB of GPU memory, there are 16.0 GiB",
        ),
        (
            [node(gpus=3), node(gpus=1)],
            Requirements(gpus=2, min_workers=2, max_workers=2),
            "2 workers with 1 CPU and 2 GPUs do not fit: only 1 can be placed on n (8 CPUs, 3 GPUs, 64.0 GiB), "
            "n (8 CPUs, 1 GPU, 64.0 GiB)",
        ),
        (
            MIXED,
            Requirements(gpus=1, accelerator="L4"),
            "1 worker with 1 GPU of type L4: the cluster has A100, H100",
        ),
        ([node()], Requirements(gpus=1, accelerator="L4"), "1 worker with 1 GPU of type L4: the cluster has none"),
        (
            MIXED,
            Requirements(gpus=2, accelerator="H100", min_workers=3, max_workers=3),
            "3 workers with 2 GPUs of type H100 each need 6 GPUs; the cluster has 4",
        ),
        (
            MIXED,
            Requirements(gpus=1, one_kind=True),
            "--accelerator-type: the cluster has several types of GPU (8 A100, 4 H100, 1 of unknown type); results "
            "differ in the last bits from one to the other, so choose one",
        ),
        (
            MIXED,
            Requirements(gpus=1, one_kind=True, cluster_grows=True),
            "--accelerator-type: the cluster has several types of GPU (8 A100, 4 H100, 1 of unknown type); results "
            "differ in the last bits from one to the other, so choose one",
        ),
    ],
)
def test_a_placement_that_cannot_be_met_says_why(nodes: list[Node], need: Requirements, line: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        check_placement(nodes, need)


@pytest.mark.parametrize(
    ("have", "need", "fitting"),
    [
        (node(gpus=2), Requirements(gpus=0.6, max_workers=9), 2),  # 2 / 0.6 is 3, but a share does not span GPUs
        (node(gpus=2), Requirements(gpus=0.3, max_workers=9), 6),
        (node(cpus=0.9), Requirements(cpus=0.3, max_workers=9), 3),  # 0.9 / 0.3 is 2.9999999999999996
        (node(cpus=8, gpus=5), Requirements(gpus=2, max_workers=9), 2),
        (node(cpus=8, memory=5 * GIB), Requirements(memory=2 * GIB, max_workers=9), 2),
        (node(gpus=2, gpu_memory=16 * GIB), Requirements(gpus=0.25, gpu_memory=4 * GIB, max_workers=9), 8),
        (node(gpus=2), Requirements(gpus=1, gpu_memory=99 * GIB, max_workers=9), 2),  # nobody knows its size
        (node(cpus=8), Requirements(max_workers=5), 5),
        (node(cpus=0), Requirements(cpus=0, max_workers=3), 3),
    ],
)
def test_as_many_workers_as_fit_up_to_the_maximum(have: Node, need: Requirements, fitting: int) -> None:
    assert check_placement([have], need) == fitting


@pytest.mark.parametrize(
    ("need", "fitting"),
    [
        (Requirements(gpus=1, max_workers=99), 13),
        (Requirements(gpus=1, max_workers=99, accelerator="A100", one_kind=True), 8),
        (Requirements(gpus=0.5, cpus=0, max_workers=99, accelerator="H100"), 8),
        (Requirements(gpus=5, max_workers=99, one_kind=True), 1),  # only one kind of node holds such a worker
        (Requirements(max_workers=99, one_kind=True), 32),  # without GPUs there are no kinds
    ],
)
def test_a_pool_is_kept_to_one_type_of_gpu(need: Requirements, fitting: int) -> None:
    assert check_placement(MIXED, need) == fitting


def test_a_cluster_that_grows_is_not_judged_by_what_it_has_now() -> None:
    need = Requirements(gpus=1, min_workers=4, max_workers=8, cluster_grows=True)
    assert check_placement([node(gpus=0)], need) == 8


@pytest.mark.parametrize(
    ("field", "value"),
    [("cpus", -1), ("gpus", 1.5), ("memory", -1), ("min_workers", 0), ("max_workers", 0), ("gpus", float("nan"))],
)
def test_requirements_name_the_wrong_field(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{field}: must be .* got {value}"):
        Requirements(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^accelerator: A100 is a type of GPU, and the workers have none"):
        Requirements(accelerator="A100")


def test_this_machine_has_what_the_system_says() -> None:
    machine = this_machine(gpus=0)
    assert 1 <= machine.cpus <= (os.cpu_count() or 1)
    assert 0 < machine.memory <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    asked = this_machine(cpus=7, gpus=3)
    assert (asked.cpus, asked.gpus) == (7, 3)


# --- Disk, shared memory, addresses --------------------------------------------------------------------------


def test_a_disk_without_room_is_refused_before_the_folder_exists(tmp_path: Path) -> None:
    output = tmp_path / "not" / "there" / "yet"
    assert "free at" in check_output(output, 1)
    with pytest.raises(ValueError, match=rf"^output: the run writes {2**30}\.0 GiB; {output} has .* GiB free$"):
        check_output(output, 1 << 60)
    assert not output.parent.exists()


def test_an_object_store_has_no_known_end() -> None:
    assert check_output("s3://bucket/data", 1 << 60).startswith("output: s3://bucket/data")


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="this system has no /dev/shm")
def test_an_object_store_larger_than_the_shared_memory_is_refused() -> None:
    assert check_shared_memory(None).startswith("shared memory: ")
    with pytest.raises(
        ValueError, match=r"^shared memory: an object store of .* does not fit in the .* free at /dev/shm"
    ):
        check_shared_memory(1 << 60)


@pytest.mark.parametrize(
    ("address", "rule"),
    [
        ("nowhere", "must be host:port or auto, got nowhere"),
        ("127.0.0.1:1", r"no Ray answers at 127\.0\.0\.1:1 \("),
        ("127.0.0.1:99999", r"no Ray answers at 127\.0\.0\.1:99999 \("),
        ("ray://head:10001", "ray://head:10001 is a Ray Client address; submit the run with `ray job submit`"),
    ],
)
def test_an_address_that_cannot_be_joined_is_named(address: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=f"^address: {rule}"), start_or_join():
        pytest.fail("a Ray was started")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"requirements": Requirements(gpus=1, min_workers=2, max_workers=2)}, "2 workers with 1 GPU each need 2"),
        ({"output": "/", "output_bytes": 1 << 60}, "output: the run writes"),
        ({"object_store_bytes": 1 << 60}, "shared memory: an object store"),
    ],
)
def test_nothing_is_started_when_the_preflight_refuses(
    arguments: dict[str, object], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("a Ray was started"))
    with pytest.raises(ValueError, match=f"^{line}"), start_or_join("local", cpus=1, gpus=0, **arguments):  # type: ignore[arg-type]
        pytest.fail("a Ray was started")
    assert not ray.is_initialized()


def test_a_ray_that_does_not_come_up_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself raises a bare Exception, of several lines."""

    def late(**_: object) -> None:
        raise Exception("\nthe node timed out during startup\nmany lines of its log")

    monkeypatch.setattr(ray, "init", late)
    told = "^Ray could not be started: the node timed out during startup$"
    with pytest.raises(RayNotStarted, match=told), start_or_join("local", cpus=1, gpus=0):
        pytest.fail("a Ray was started")


# --- A real Ray ----------------------------------------------------------------------------------------------


def listeners(pids: set[int]) -> set[str]:
    """Local addresses, in hexadecimal, on which these processes accept TCP connections."""
    sockets = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(FileNotFoundError):  # closed while we looked
                sockets.add(os.readlink(descriptor))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == LISTEN and f"socket:[{columns[9]}]" in sockets:
                found.add(columns[1].split(":")[0])
    return found


def marked(mark: str) -> set[int]:
    """Processes that live and were started with this text in their environment."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.add(int(path.parent.name))
        except OSError:  # it ended while we looked, or belongs to somebody else
            continue
    return found


@contextlib.contextmanager
def ended_after(seconds: float, process: "subprocess.Popen[str]") -> Iterator[None]:
    """Kill the process where the block takes longer, so that nobody reads from it for ever."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@pytest.mark.ray
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_ray_of_our_own_is_private_and_ctrl_c_leaves_nothing_of_it(tmp_path: Path) -> None:
    """Without the shared Ray: a job starts its own, and takes it down again."""
    script, mark = tmp_path / "job.py", uuid.uuid4().hex
    script.write_text(SCRIPT)
    command, environment = [sys.executable, str(script)], os.environ | {"REELWAY_MARK": mark}
    for name in ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_USAGE_STATS_ENABLED", "RAY_ADDRESS"):
        environment.pop(name, None)  # the session has to see to these itself
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as job:
        try:
            assert job.stdout is not None
            with ended_after(180, job):
                assert job.stdout.readline() == "row 0\n"
            assert len(marked(mark)) > 3
            assert listeners(marked(mark)) == LOOPBACK
            os.killpg(job.pid, signal.SIGINT)  # as a terminal does: the whole group
            output, errors = job.communicate(timeout=90)
        finally:
            job.kill()
    report = json.loads(output.splitlines()[-1])
    rows = 1 + sum(line.startswith("row") for line in output.splitlines())
    assert job.returncode == 130, errors
    assert "Traceback" not in errors
    assert (report["interrupted"], report["done"], report["unfinished"]) == (True, rows, 1)
    assert report["left"] == 1000 - rows
    deadline = time.monotonic() + 60
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert marked(mark) == set()
    assert not Path(output.splitlines()[-2]).exists()


def test_a_connected_process_keeps_its_ray(ray_session: Session) -> None:
    with start_or_join(requirements=Requirements(min_workers=2, max_workers=64)) as inner:
        assert not inner.started
        assert inner.address == ray_session.address
        assert inner.preflight[-1] == "workers: up to 4 with 1 CPU"
    assert ray.is_initialized()
    with pytest.raises(ValueError, match=r"^address: this process is connected"), start_or_join("10.0.0.1:6379"):
        pytest.fail("joined two")


def test_a_joined_ray_is_left_as_it_was(ray_session: Session) -> None:
    code = """if True:
        import ray
        from reelway.cluster.session import start_or_join
        with start_or_join() as session:
            print(session.started, session.address, ray.get(ray.remote(lambda: 6 * 7).remote(), timeout=90))
        assert not ray.is_initialized()
    """
    environment = os.environ | {"RAY_ADDRESS": ray_session.address}
    joined = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert joined.stdout.split() == ["False", ray_session.address, "42"], joined.stderr
    assert ray.get(ray.remote(lambda: "still here").remote(), timeout=90) == "still here"
