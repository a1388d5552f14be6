"""Ray Train as the host of a training: one function on several processes, restarted from its last checkpoint.

A process that dies takes the others with it: all are started again, as often as the settings allow, and the function
goes on from the last checkpoint. The same happens when the same run is started again. What would go wrong again, such
as a wrong setting, ends the run at once. A rank that hangs is named, with its line of code.
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, get_checkpoint
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from ray.train.v2.api.report_config import CheckpointUploadMode
from torch import Tensor

from .pool_host import CAUSES, reason_of_death
from .preflight import Requirements, check_placement, cluster_nodes
from .telemetry import Board, Fatal, Heart, News, Pulse, Wish, in_words, stuck

Number = TypeVar("Number", int, float)
Metrics = dict[str, float]

LOOK_SECONDS = 0.5
FATAL_SECONDS = 5.0  # for the other ranks to end too
PARTING_SECONDS = 30.0
# Ray Train's own settings, by its names: do not move to another folder, notice ends soon, do not talk.
RAY_TRAIN = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}


class TrainingFailed(RuntimeError):
    """The run could not go on; the message names the rank and the reason in one line."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C ended the run; the same run goes on where it stopped. checkpoint: the last one reported, if any."""

    def __init__(self, checkpoint: str | None) -> None:
        super().__init__("interrupted")
        self.checkpoint = checkpoint


@dataclass(frozen=True)
class TrainingSettings:
    """How a training is hosted. Times are seconds.

    resources: of one worker. storage_path, name: the run's folder, which all workers see; a run of the same name
    goes on where it stopped. max_failures: restarts after lost workers. patience: where nothing moves for half of it,
    the rank that hangs is named, and after the whole all are started again; longer than any step or checkpoint.
    start_patience: the same until the first step. keep: reported checkpoints that stay, None for all; Ray Train
    will not start a run again whose reported checkpoints somebody else has deleted.
    """

    workers: int
    storage_path: str | Path
    name: str
    resources: Requirements = field(default_factory=Requirements)
    max_failures: int = 3
    patience: float = 1800.0
    start_patience: float = 3600.0
    keep: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("workers", self.workers, 1), ("max_failures", self.max_failures, 0)):
            if value < least:
                raise ValueError(f"{name}: must be at least {least}, got {value}")
        for name, seconds in (("patience", self.patience), ("start_patience", self.start_patience)):
            if not seconds > 0:
                raise ValueError(f"{name}: must be above 0, got {seconds}")
        if not self.name or "/" in self.name:
            raise ValueError(f"name: must be the name of a folder, got {self.name!r}")

    @property
    def storage(self) -> str:
        """The storage path as Ray wants it: absolute, or the address of an object store."""
        path = str(self.storage_path)
        return path if "://" in path else str(Path(path).absolute())

    @property
    def folder(self) -> str:
        """The run's own folder."""
        return f"{self.storage}/{self.name}"


@dataclass(frozen=True)
class TrainingReport:
    """How a run ended. value: what rank 0's function returned; Ray allows no tensors in it.

    checkpoint: the last one reported. restarts: after lost workers. notes: the lines that were told.
    """

    value: Any
    checkpoint: str | None
    restarts: int
    notes: tuple[str, ...]
    seconds: float


class TorchRanks:
    """The processes of a training over torch.distributed's default group. Every rank makes the same calls."""

    def __init__(self, device: torch.device | str = "cpu", beat: Callable[[], None] = lambda: None) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._device, self._beat = torch.device(device), beat

    def broadcast(self, value: Number) -> Number:
        """Rank 0's value, on every rank."""
        self._beat()
        kind = torch.int64 if isinstance(value, int) else torch.float64
        carrier = torch.tensor(value, dtype=kind, device=self._device)
        dist.broadcast(carrier, src=0)
        return type(value)(carrier.item())

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean over ranks of each value; every rank gives the same names."""
        self._beat()
        names = sorted(values)
        carrier = torch.tensor([values[name] for name in names], dtype=torch.float64, device=self._device)
        dist.all_reduce(carrier)
        means = dict(zip(names, (carrier / self.size).tolist(), strict=True))
        return {name: means[name] for name in values}

    def share(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, on every rank; every rank gives one of the same shape, dtype and kind of device."""
        self._beat()
        carrier = tensor.contiguous().clone()
        dist.broadcast(carrier, src=0)
        return carrier

    def gather(self, text: str) -> list[str]:
        """The texts of all ranks, in order, on every rank."""
        self._beat()
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, text)
        return [str(one) for one in found]

    def barrier(self) -> None:
        """Wait for all."""
        self._beat()
        dist.all_reduce(torch.zeros(1, device=self._device))


@dataclass
class TrainingHost:
    """What the function has of its host, on one rank."""

    ranks: TorchRanks
    device: torch.device
    _board: Any
    _heart: Heart
    _folder: str

    def beat(self) -> None:
        """Say that this rank came past here, as often on every rank; where ranks call it, a hang is found sooner."""
        self._heart.beat()

    def interrupted(self) -> bool:
        """Whether the user wants an end: finish the step, save, and raise KeyboardInterrupt. Ranks may differ."""
        return self._heart.asked_to_stop.is_set()

    def report(self, metrics: Metrics, folder: Path | None = None) -> None:
        """Send rank 0's metrics to the driver; with a folder, every rank calls, and it becomes the last checkpoint.

        A folder inside the run's own stays where it is. Any other is copied there, of several ranks into one.
        """
        self._heart.beat()
        if self.ranks.rank == 0:
            self._board.tell.remote(metrics)
        if folder is None:
            return
        inside = Path(self._folder) in folder.absolute().parents
        mode = CheckpointUploadMode.NO_UPLOAD if inside else CheckpointUploadMode.SYNC
        checkpoint = Checkpoint.from_directory(str(folder.absolute()))
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_upload_mode=mode)
        self._heart.beat()

    @contextmanager
    def checkpoint(self) -> Iterator[Path | None]:
        """The folder of the last checkpoint, None where there is none."""
        found = get_checkpoint()
        with found.as_directory() if found else nullcontext() as folder:
            yield Path(folder) if folder else None


def run_training(
    function: Callable[[dict[str, Any], TrainingHost], Any],
    config: dict[str, Any],
    settings: TrainingSettings,
    *,
    on_metrics: Callable[[Metrics], None] = lambda metrics: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> TrainingReport:
    """Run `function(config, host)` on all workers at once, until it returns on each.

    Both callbacks are called here, in a thread of their own: with the metrics of `host.report`, and with a line where
    workers hang or start again. Function and config travel by pickle. Needs a Ray session.

    Raises ValueError where the cluster has no room; ValueError, FileNotFoundError or FloatingPointError as the
    function raised it; TrainingFailed otherwise. The first Ctrl-C asks the function to end (`host.interrupted`), the
    second ends it; both raise TrainingInterrupted.
    """
    assert ray.is_initialized(), "run_training needs a session: see start_or_join"
    need = replace(settings.resources, min_workers=settings.workers, max_workers=settings.workers)
    check_placement(cluster_nodes(), need)
    board = ray.remote(Board).options(num_cpus=0).remote()
    run = _Run(settings, board, on_metrics, on_note)
    try:
        return run.run(_trainer(function, config, settings, board))
    finally:
        ray.kill(board)


def _trainer(function: Any, config: dict[str, Any], settings: TrainingSettings, board: Any) -> "_Trainer":
    need = settings.resources
    per_worker = {"CPU": need.cpus} | ({"GPU": need.gpus} if need.gpus else {})
    per_worker |= {"memory": need.memory} if need.memory else {}
    return _Trainer(
        _work,
        train_loop_config={"function": function, "config": config, "board": board, "folder": settings.folder},
        torch_config=TorchConfig(
            backend="nccl" if need.gpus else "gloo",
            timeout_s=max(1, int(max(settings.patience, settings.start_patience))),
        ),
        scaling_config=ScalingConfig(
            num_workers=settings.workers, use_gpu=need.gpus > 0, resources_per_worker=per_worker
        ),
        run_config=RunConfig(
            name=settings.name,
            storage_path=settings.storage,
            failure_config=FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=settings.keep),
            worker_runtime_env={"env_vars": _environment(need)},
        ),
    )


def _environment(need: Requirements) -> dict[str, str]:
    """Of the worker processes."""
    wanted = {"OMP_NUM_THREADS": str(max(1, int(need.cpus)))}
    if not need.gpus:
        wanted["DS_ACCELERATOR"] = "cpu"
    if ray.util.get_node_ip_address() == "127.0.0.1" and sys.platform == "linux":
        wanted["GLOO_SOCKET_IFNAME"] = "lo"  # gloo would take the address of the host's name
    return wanted


# --- On the workers -----------------------------------------------------------------------------------------------


def _work(given: dict[str, Any]) -> Any:
    """One rank's life. What would happen again is told to the driver and not to Ray, which would only repeat it."""
    board, rank = given["board"], dist.get_rank()
    device = get_device()
    attempt = TorchRanks(device).broadcast(time.time_ns() if rank == 0 else 0)

    def send(pulse: Pulse) -> Wish:
        with suppress(RayError):  # the driver is gone, and this process will follow
            wish: Wish = ray.get(board.pulse.remote(attempt, pulse), timeout=PARTING_SECONDS)
            return wish
        return Wish.WORK

    heart = Heart(rank, f"pid {os.getpid()} on {ray.util.get_node_ip_address()}", send)
    heart.start()
    host = TrainingHost(TorchRanks(device, heart.beat), device, board, heart, given["folder"])
    try:
        value = given["function"](given["config"], host)
    except KeyboardInterrupt:
        ray.get(board.stopped.remote())
        return None
    except Exception as error:
        if _may_pass(error):
            raise
        ray.get(board.fail.remote(_fatal(rank, error)))
        return None
    finally:
        heart.end()
        board.left.remote(rank)
    return value


def _may_pass(error: Exception) -> bool:
    """Whether the same may go well next time: another process died, a disk or the network failed, memory ran out."""
    if isinstance(error, (FileNotFoundError, PermissionError)):
        return False
    outside = (OSError, RayError, dist.DistError, torch.OutOfMemoryError, torch.AcceleratorError)
    return isinstance(error, outside) or type(error) is RuntimeError


def _fatal(rank: int, error: Exception) -> Fatal:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{frame.filename}:{frame.lineno} in {frame.name}"
    return Fatal(rank, type(error).__name__, " ".join(str(error).split()), place)


# --- In the driver ------------------------------------------------------------------------------------------------


class _Trainer(TorchTrainer):
    """A TorchTrainer that shows its controller, and leaves signals to `_Run`."""

    controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        self.controller = controller

    def abort(self) -> None:
        """End the workers and the controller now."""
        if self.controller is not None:
            with suppress(RayError):  # it ends while it answers
                ray.get(self.controller.abort.remote(), timeout=PARTING_SECONDS)


class _Run:
    """One call of `run_training`: the training in this thread, the news in another one."""

    def __init__(
        self,
        settings: TrainingSettings,
        board: Any,
        on_metrics: Callable[[Metrics], None],
        on_note: Callable[[str], None],
    ) -> None:
        self._settings, self._board = settings, board
        self._on_metrics, self._on_note = on_metrics, on_note
        self._notes: list[str] = []
        self._starts, self._signals = 0, 0
        self._hang: str | None = None  # what was noted of the present start
        self._fatal: Fatal | None = None
        self._fatal_since = 0.0
        self._stopped = False
        self._ended = threading.Event()
        self._broken: Exception | None = None  # a callback's, which ends the run

    def run(self, trainer: _Trainer) -> TrainingReport:
        began = time.monotonic()
        reader = threading.Thread(target=self._read, args=(trainer,), daemon=True, name="training news")
        reader.start()
        error: Exception | None = None
        result = None
        try:
            with self._variables(), self._signals_counted(trainer):
                result = trainer.fit()
        except (TrainingFailedError, RayError) as failure:
            error = failure
        finally:
            self._ended.set()
            reader.join(PARTING_SECONDS)
        self._judge(error)
        assert result is not None
        checkpoint = result.checkpoint.path if result.checkpoint else None
        seconds = time.monotonic() - began
        return TrainingReport(result.return_value, checkpoint, max(0, self._starts - 1), tuple(self._notes), seconds)

    def _judge(self, error: Exception | None) -> None:
        """Raise what ended the run, unless it ended well."""
        if self._broken is not None:
            raise self._broken
        if self._fatal is not None:
            raise _as_raised(self._fatal)
        if self._stopped or self._signals:
            raise TrainingInterrupted(self._last_checkpoint())
        if error is not None:
            hung = f" ({self._hang})" if self._hang else ""
            raise TrainingFailed(f"{self._settings.name}: {_reason(error)}{hung}") from None

    def _last_checkpoint(self) -> str | None:
        with suppress(RuntimeError):  # nothing was ever reported
            found = ray.train.Result.from_path(self._settings.folder).checkpoint
            return found.path if found else None
        return None

    def _read(self, trainer: _Trainer) -> None:
        """Until the run has ended: hand out the news and act on it."""
        last = False
        while not last:
            last = self._ended.wait(LOOK_SECONDS)
            try:
                self._take(ray.get(self._board.look.remote(), timeout=PARTING_SECONDS), trainer)
            except RayError:
                return  # the session is going down
            except Exception as error:  # noqa: BLE001 -- a callback's error is the caller's, in the caller's thread
                self._broken = error
                trainer.abort()
                return

    def _take(self, news: News, trainer: _Trainer) -> None:
        for row in news.rows:
            self._on_metrics(row)
        self._stopped = self._stopped or news.stopped
        if news.starts > max(1, self._starts):
            self._note(f"workers were lost: started again, {news.starts - 1} of {self._settings.max_failures} times")
        if news.starts > self._starts:
            self._starts, self._hang = news.starts, None
        patience, first = self._settings.patience, self._settings.start_patience
        culprits = stuck(news.ranks, patience / 2, first / 2)
        if culprits and not self._hang:
            self._hang = in_words(culprits, len(news.ranks))
            self._note(self._hang)
        # DeepSpeed's own process groups wait for half an hour whatever the default group's timeout is.
        if stuck(news.ranks, patience, first):
            self._board.condemn.remote()
        if news.fatal and self._fatal is None:
            self._fatal, self._fatal_since = news.fatal, time.monotonic()
        if self._fatal and news.ranks and time.monotonic() - self._fatal_since > FATAL_SECONDS:
            trainer.abort()

    def _note(self, line: str) -> None:
        self._notes.append(line)
        self._on_note(f"{self._settings.name}: {line}")

    @contextmanager
    def _variables(self) -> Iterator[None]:
        """Ray Train reads its settings from the driver's environment."""
        wanted = RAY_TRAIN | {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(self._settings.patience)}
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update({name: value for name, value in wanted.items() if before[name] is None})
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)

    @contextmanager
    def _signals_counted(self, trainer: _Trainer) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are the caller's affair then
            return

        def count(number: int, frame: FrameType | None) -> None:
            self._signals += 1
            if self._signals == 1:
                self._board.ask_to_stop.remote()
                self._note("stopping after this step; a second Ctrl-C stops at once")
            else:
                trainer.abort()

        before = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _as_raised(fatal: Fatal) -> Exception:
    """The user's own mistakes as they were raised; everything else with the place where it happened."""
    plain = {kind.__name__: kind for kind in (ValueError, FileNotFoundError, FloatingPointError)}
    if fatal.error in plain:
        return plain[fatal.error](fatal.message)
    return TrainingFailed(f"rank {fatal.rank}: {fatal.error}: {fatal.message} ({fatal.place})")


def _reason(error: Exception) -> str:
    """The ranks that failed and why, in one line."""
    if not isinstance(error, WorkerGroupError):
        return " ".join(str(error).split())
    parts = []
    for rank, failure in sorted(error.worker_failures.items()):
        died = isinstance(failure, RayError) or CAUSES in str(failure)
        text = reason_of_death(failure) if died else str(failure).strip().splitlines()[-1]
        parts.append(f"rank {rank}: {text}")
    return "; ".join(parts)
