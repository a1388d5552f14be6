"""A training on Ray: ZeRO in its workers, lost and hanging workers, Ctrl-C, and what is told meanwhile."""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray import cloudpickle
from torch import Tensor

from reelway.cluster import telemetry
from reelway.cluster.preflight import Requirements
from reelway.cluster.session import Session
from reelway.cluster.telemetry import Board, Fatal, Pulse, RankState, Wish, in_words, stuck, whereabouts
from reelway.cluster.training import (
    TrainingHost,
    TrainingInterrupted,
    TrainingSettings,
    run_training,
)

sys.path.insert(0, str(Path(__file__).parent))
import zero_recipe
from zero_recipe import DECAY, RATE, Plain, error, make_network, share

for module in (sys.modules[__name__], zero_recipe):
    cloudpickle.register_pickle_by_value(module)  # Ray's workers cannot import a test module

UPDATES = 6


def hosted(folder: Path, name: str, **changes: Any) -> TrainingSettings:
    return TrainingSettings(2, folder, name, Requirements(cpus=0.5), **changes)


def plain_weights(updates: int) -> dict[str, Tensor]:
    reference = Plain(clip_norm=1e9)
    list(reference.run(updates))
    return {name: value.detach() for name, value in reference.network.state_dict().items()}


def train(config: dict[str, Any], host: TrainingHost) -> dict[str, Any]:
    """The recipe on ZeRO `stage`; a checkpoint every second update. `trouble` is called before every update."""
    from reelway.cluster.zero import ZeroEngine, ZeroSettings

    settings = ZeroSettings(lambda step: RATE, stage=config["stage"], ema_decay=DECAY, clip_norm=1e9)
    engine = ZeroEngine(make_network(seed=0), settings)
    with host.checkpoint() as folder:
        if folder:
            engine.load(folder)
    while engine.updates < UPDATES:
        config["trouble"](engine.updates, host)
        loss = error(engine.network, *share(engine.updates, host.ranks.rank, host.ranks.size))
        engine.backward(loss)
        engine.step()
        row = {"update": engine.updates, "pid": os.getpid(), **host.ranks.mean({"loss": loss.item()})}
        stops = host.ranks.mean({"stops": float(host.interrupted())})["stops"] > 0
        if stops or engine.updates % 2 == 0:
            with tempfile.TemporaryDirectory() as scratch:
                engine.save(Path(scratch))
                host.report(row, Path(scratch))
        else:
            host.report(row)
        if stops:
            raise KeyboardInterrupt
    return {name: value.numpy() for name, value in engine.weights().items()}  # Ray returns no tensors


def no_trouble(update: int, host: TrainingHost) -> None:
    pass


def assert_equal(found: dict[str, Any]) -> None:
    weights = {name: torch.tensor(value) for name, value in found.items()}
    torch.testing.assert_close(weights, plain_weights(UPDATES), rtol=0, atol=0)


# --- On Ray -------------------------------------------------------------------------------------------------------


def train_stages(config: dict[str, Any], host: TrainingHost) -> dict[str, Any]:
    """Every stage in the same workers, and what a worker's surroundings are."""
    weights = {stage: train(config | {"stage": stage}, _Fresh(host)) for stage in (1, 2, 3)}
    surroundings = {name: os.environ.get(name) for name in ("DS_ACCELERATOR", "OMP_NUM_THREADS")}
    number, share_of = host.ranks.broadcast(host.ranks.rank + 7), host.ranks.broadcast(0.25 + host.ranks.rank)
    host.ranks.barrier()
    return {"weights": weights, "folder": os.getcwd(), "agreed": (number, share_of), **surroundings}


class _Fresh:
    """A host without checkpoints: for several trainings in one run."""

    def __init__(self, host: TrainingHost) -> None:
        self.ranks, self.interrupted = host.ranks, host.interrupted
        self.report = lambda metrics, folder=None: host.report(metrics)

    def checkpoint(self) -> Any:
        from contextlib import nullcontext

        return nullcontext()


@pytest.mark.slow
def test_zero_trains_in_ray_what_plain_torch_trains(ray_session: Session, tmp_path: Path) -> None:
    rows: list[dict[str, float]] = []
    report = run_training(train_stages, {"trouble": no_trouble}, hosted(tmp_path, "stages"), on_metrics=rows.append)
    for stage in (1, 2, 3):
        assert_equal(report.value["weights"][stage])
    assert report.value["agreed"] == (7, 0.25)
    assert report.value["DS_ACCELERATOR"] == "cpu"
    assert report.value["OMP_NUM_THREADS"] == "1"
    assert not report.value["folder"].startswith(str(tmp_path)), "relative paths must mean what they mean in the driver"
    losses = [row["loss"] for row in rows]
    expected = [loss for loss, _ in Plain(clip_norm=1e9).run(UPDATES)]
    assert losses == pytest.approx(expected * 3, rel=1e-6), "rank 0's metrics, each once and in order"
    assert report.restarts == 0


class HangsOnce:
    """Before update 3, the first time, rank 1 sleeps for longer than anybody waits."""

    def __init__(self, folder: Path) -> None:
        self.mark = folder / "hung"

    def __call__(self, update: int, host: TrainingHost) -> None:
        if update == 3 and host.ranks.rank == 1 and not self.mark.exists():
            self.mark.touch()
            time.sleep(1000)


@pytest.mark.slow
def test_hanging_and_killed_workers_do_not_change_the_result(ray_session: Session, tmp_path: Path) -> None:
    """One run: rank 1 hangs and is named, all start again; then rank 0 is killed, all start again."""
    pids: list[float] = []

    def kill_once(row: dict[str, float]) -> None:
        pids.append(row["pid"])
        if row["update"] == 5 and pids.count(0) == 0:
            pids.append(0)
            os.kill(int(row["pid"]), signal.SIGKILL)

    notes: list[str] = []
    config = {"stage": 2, "trouble": HangsOnce(tmp_path)}
    settings = hosted(tmp_path, "troubled", patience=10.0, max_failures=4)
    report = run_training(train, config, settings, on_metrics=kill_once, on_note=notes.append)
    assert_equal(report.value)
    assert report.restarts >= 2
    [named] = [note for note in notes if "nothing has moved" in note]
    assert "rank 1 (pid" in named
    assert "in __call__; 1 other waits" in named
    assert len({pid for pid in pids if pid}) == report.restarts + 1, "the workers of every start are new"


@pytest.mark.slow
def test_ctrl_c_keeps_the_step_and_the_same_run_goes_on(ray_session: Session, tmp_path: Path) -> None:
    def slow(update: int, host: TrainingHost) -> None:
        """In update 3, work until the interruption is known."""
        deadline = time.monotonic() + 60
        while update == 2 and not host.interrupted() and time.monotonic() < deadline:
            time.sleep(0.05)

    config = {"stage": 1, "trouble": slow}
    rows: list[dict[str, float]] = []

    def interrupt_at_first(row: dict[str, float]) -> None:
        rows.append(row)
        if len(rows) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted) as ending:
        run_training(train, config, hosted(tmp_path, "run"), on_metrics=interrupt_at_first)
    assert signal.getsignal(signal.SIGINT) is before
    assert ending.value.checkpoint is not None
    kept = rows[-1]["update"]
    assert kept == 3, "the step that ran was finished and kept"

    rows.clear()
    report = run_training(train, config | {"trouble": no_trouble}, hosted(tmp_path, "run"), on_metrics=rows.append)
    assert [row["update"] for row in rows] == list(range(int(kept) + 1, UPDATES + 1))
    assert_equal(report.value)


@pytest.mark.slow
def test_a_users_mistake_on_one_rank_ends_the_run_at_once(ray_session: Session, tmp_path: Path) -> None:
    def mistaken(update: int, host: TrainingHost) -> None:
        if host.ranks.rank == 1:
            raise ValueError("batch: must be a multiple of 3, got 8")

    began = time.monotonic()
    with pytest.raises(ValueError, match=r"^batch: must be a multiple of 3, got 8$"):
        run_training(train, {"stage": 1, "trouble": mistaken}, hosted(tmp_path, "wrong", patience=600.0))
    assert time.monotonic() - began < 300, "rank 0 would have waited for rank 1 for ten minutes"


def test_a_cluster_without_room_is_a_clear_line(ray_session: Session, tmp_path: Path) -> None:
    settings = TrainingSettings(3, tmp_path, "large", Requirements(cpus=2))
    with pytest.raises(ValueError, match="3 workers with 2 CPUs each need 6 CPUs; the cluster has 4"):
        run_training(train, {}, settings)


# --- Who is stuck, without Ray ------------------------------------------------------------------------------------


def state(rank: int, beats: int, *, waits: bool = False, silent: float = 0.0, still: float = 60.0) -> RankState:
    return RankState(Pulse(rank, f"pid {rank}", beats, f"loop.py:{rank} in step", waits), silent, still)


def ranks_of(states: list[RankState]) -> list[int]:
    return [found.pulse.rank for found in states]


def test_the_stuck_rank_is_the_one_the_others_wait_for() -> None:
    assert ranks_of(stuck([state(0, 5, waits=True), state(1, 5)], 30, 600)) == [1]
    assert ranks_of(stuck([state(0, 5, waits=True), state(1, 4, waits=True)], 30, 600)) == [1]
    assert ranks_of(stuck([state(0, 5, waits=True), state(1, 9, silent=20.0)], 30, 600)) == [1]
    assert ranks_of(stuck([state(0, 5, waits=True), state(1, 5, waits=True)], 30, 600)) == [0, 1]
    assert stuck([state(0, 5, waits=True), state(1, 5, still=29.0)], 30, 600) == []
    assert stuck([state(0, 5, silent=6.0), state(1, 5, silent=60.0)], 30, 600) == [], "nobody is left to wait"
    assert stuck([state(0, 0), state(1, 0)], 30, 600) == [], "both still read their weights"
    assert ranks_of(stuck([state(0, 0, still=601.0), state(1, 0, waits=True, still=601.0)], 30, 600)) == [0]
    assert stuck([], 30, 600) == []


def test_a_stuck_rank_is_named_with_its_place() -> None:
    assert in_words([state(1, 5)], 4) == (
        "nothing has moved for 60 s: rank 1 (pid 1) stands at loop.py:1 in step; 3 others wait"
    )
    assert "silent for 20 s, last at loop.py:0" in in_words([state(0, 5, silent=20.0)], 1)


def test_a_place_is_the_innermost_line_that_is_no_librarys() -> None:
    import threading

    started, ended = threading.Event(), threading.Event()

    def wait_in_a_library() -> None:
        started.set()
        ended.wait(60)

    thread = threading.Thread(target=wait_in_a_library)
    thread.start()
    assert started.wait(60)
    place, waits = whereabouts(thread.ident or 0)
    ended.set()
    thread.join(60)
    assert place.startswith("test_training.py:")
    assert place.endswith("in wait_in_a_library")
    assert not waits
    assert whereabouts(thread.ident or 0) == ("(the thread has ended)", False)


def test_a_board_forgets_an_earlier_start_and_hands_rows_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(telemetry, "time", SimpleNamespace(monotonic=lambda: clock[0]))  # this module's clock alone
    board = Board()
    board.pulse(1, Pulse(0, "old", 3, "a", False))
    clock[0] = 5.0
    board.pulse(2, Pulse(0, "new", 1, "a", False))
    board.pulse(1, Pulse(1, "old", 4, "a", True))  # a dying worker's last word
    clock[0] = 7.0
    assert board.pulse(2, Pulse(0, "new", 1, "b", False)) is Wish.WORK
    board.tell({"loss": 1.0})
    board.fail(Fatal(1, "ValueError", "first", "p"))
    board.fail(Fatal(0, "ValueError", "second", "p"))
    board.ask_to_stop()
    news = board.look()
    assert [(found.pulse.process, found.silent, found.still) for found in news.ranks] == [("new", 0.0, 2.0)]
    assert (news.starts, news.rows, news.fatal and news.fatal.message) == (2, ({"loss": 1.0},), "first")
    assert board.pulse(2, Pulse(0, "new", 2, "b", False)) is Wish.STOP
    assert board.look().rows == ()
    board.condemn()
    assert board.pulse(2, Pulse(0, "new", 2, "b", False)) is Wish.DIE
    assert board.pulse(3, Pulse(0, "newer", 0, "b", False)) is Wish.STOP, "the next start lives"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"workers": 0}, "workers: must be at least 1, got 0"),
        ({"max_failures": -1}, "max_failures: must be at least 0, got -1"),
        ({"patience": 0.0}, "patience: must be above 0, got 0.0"),
        ({"name": "a/b"}, "name: must be the name of a folder, got 'a/b'"),
    ],
)
def test_settings_name_the_field_that_does_not_fit(change: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=f"^{line}$"):
        TrainingSettings(**{"workers": 2, "storage_path": "here", "name": "run"} | change)
