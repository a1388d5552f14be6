"""Learners on a transformer of one small block: by-hand losses, gradients over any split, what may not leak."""

import copy
import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reelway.actors.engine import OneRank, OptimizerSettings, Ranks, TorchEngine
from reelway.actors.learning import regression, sources
from reelway.actors.learning.batch import Batch, Draws, PromptContexts, Tally
from reelway.actors.learning.causality import CausalityError
from reelway.actors.learning.distillation import DmdLearner, DmdSettings
from reelway.actors.learning.long_rollouts import LongRollouts
from reelway.actors.learning.regression import CausalTeacherLearner, LearnerSettings, OdeLearner
from reelway.actors.learning.sources import NoisedClips, Rollouts, RolloutShape, StudentRollout
from reelway.kernels.causal.masks import bidirectional
from reelway.kernels.causal.student import StudentSettings
from reelway.kernels.wan.config import TransformerConfig
from reelway.kernels.wan.context import TextContext
from reelway.kernels.wan.transformer import VideoTransformer
from reelway.kernels.wan.vae import StreamingVAE

CONFIG = TransformerConfig(2, 16, 32, 1, in_channels=4, out_channels=4, text_dim=8, freq_dim=16)
STUDENT = StudentSettings(block=2, timesteps=(1000, 750, 400), shift=1.0, window=4, sink=0)
FRAMES, SIZE = 6, 4
SETTINGS = OptimizerSettings(1e-2, 100, clip_norm=1e9)
PROMPTS = ("a cat", "a dog", "two birds", "a fish")


def network(seed: int = 0, config: TransformerConfig = CONFIG) -> VideoTransformer:
    torch.manual_seed(seed)
    return VideoTransformer(config)


def encode(prompts: Sequence[str]) -> TextContext:
    """Rows that depend on the prompt's text alone, as many as it has words."""

    def rows(prompt: str) -> Tensor:
        generator = torch.Generator().manual_seed(int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16))
        return torch.randn(len(prompt.split()), CONFIG.text_dim, generator=generator)

    return TextContext.fold([rows(prompt) for prompt in prompts])


def contexts() -> PromptContexts:
    return PromptContexts(encode, "cpu")


class Recorder(TorchEngine):
    """A plain engine in full precision that shows the gradient of its last update."""

    def __init__(self, trained: nn.Module, settings: OptimizerSettings = SETTINGS) -> None:
        super().__init__(trained, settings, precision=torch.float32)
        self.gradients: list[Tensor] = []

    def step(self) -> dict[str, float]:
        self.gradients = [
            torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
            for weight in self.network.parameters()
        ]
        return super().step()


def batch(
    *shape: int, step: int = 7, count: int = 4, first: int = 0, total: int = 4, dtype: torch.dtype = torch.float32
) -> Batch:
    """Samples `first` to `first + count` of a batch of `total`, always the same."""
    latents = None
    if shape:
        generator = torch.Generator().manual_seed(5)
        latents = torch.randn(total, *shape, generator=generator, dtype=torch.float64)[first : first + count].to(dtype)
    places = range(first, first + count)
    return Batch(
        step, total, places, tuple(f"k{i}" for i in places), tuple(PROMPTS[i % len(PROMPTS)] for i in places), latents
    )


TRAJECTORY = (len(STUDENT.timesteps) + 1, FRAMES, 4, SIZE, SIZE)
CLIP = (FRAMES, 4, SIZE, SIZE)


# --- The plain losses, by hand ----------------------------------------------------------------------------------------


class DenseMask:
    """Attention under a mask of tokens: an implementation of its own, from the rule and not from the tables."""

    def __init__(self, frames: int, sees: Callable[[int, int], bool]) -> None:
        self._allowed = torch.tensor([[sees(row, column) for column in range(frames)] for row in range(frames)])

    def positions(self, frames: int) -> Tensor:
        return torch.arange(frames, dtype=torch.float64)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        each = query.shape[1] // len(self._allowed)
        mask = self._allowed.repeat_interleave(each, 0).repeat_interleave(each, 1)
        scores = torch.einsum("bqhk,bshk->bhqs", query, key) / query.shape[-1] ** 0.5
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return torch.einsum("bhqs,bshk->bqhk", weights, value)


def sees(row: int, column: int) -> bool:
    """Blocks of 2 in a window of 4: a block sees itself and the block before it."""
    return row // 2 - 1 <= column // 2 <= row // 2


def test_ode_loss_is_the_mean_error_of_x0_over_noisy_frames() -> None:
    engine = Recorder(network())
    data = batch(*TRAJECTORY)
    learner = OdeLearner(engine, contexts(), STUDENT, LearnerSettings(seed=5))
    levels = [1000.0, 750.0, 400.0, 0.0]
    errors, drawn = [], []
    for row in range(4):
        generator = Draws(5, data.step).generator(row, "states")
        states = torch.randint(4, (1, 3), generator=generator)[0].tolist()
        picked = [data.latents[row, states[frame // 2], frame] for frame in range(FRAMES)]
        times = torch.tensor([levels[states[frame // 2]] for frame in range(FRAMES)])
        noisy = torch.stack(picked)
        with torch.no_grad():
            velocity = engine.network(noisy[None], times[None], encode([data.prompts[row]]), DenseMask(FRAMES, sees))[0]
        clean = noisy - (times / 1000)[:, None, None, None] * velocity
        error = (clean - data.latents[row, -1]).square().flatten(1).mean(1)
        errors.append(error[times > 0])
        drawn.append(times)
    expected, times = torch.cat(errors).mean(), torch.cat(drawn)
    assert (times == 0).any()  # or the test does not see whether clean blocks count
    assert any(one[-1] > 0 for one in drawn)  # nor the window, which only the last block meets
    metrics = learner.step(data)
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-5)
    noisy = times[times > 0]
    by_level = sum(
        metrics[f"error_at_{level:.0f}"] * int((noisy == level).sum())
        for level in levels[:-1]
        if (noisy == level).any()
    )
    assert by_level / len(noisy) == pytest.approx(float(expected), rel=1e-5)


def test_ode_loss_under_teacher_forcing_is_that_of_each_block_behind_clean_ones() -> None:
    """Every block noisy, each in a pass of its own behind the clean ends of the blocks before it."""
    engine = Recorder(network())
    data = batch(*TRAJECTORY)
    learner = OdeLearner(engine, contexts(), STUDENT, LearnerSettings(seed=5), teacher_forcing=True)
    levels, errors = [1000.0, 750.0, 400.0], []
    for row in range(4):
        generator = Draws(5, data.step).generator(row, "states")
        states = torch.randint(3, (1, 3), generator=generator)[0].tolist()
        path, text = data.latents[row], encode([data.prompts[row]])
        noisy = torch.stack([path[states[frame // 2], frame] for frame in range(FRAMES)])[None]
        times = torch.tensor([levels[states[frame // 2]] for frame in range(FRAMES)])[None]
        with torch.no_grad():
            velocity = torch.cat(
                [_teacher_forced(engine.network, path[None, -1], noisy, times, text, block) for block in range(3)], 1
            )
        clean = noisy - (times / 1000)[..., None, None, None] * velocity
        errors.append((clean - path[None, -1]).square().mean())
    metrics = learner.step(data)
    assert metrics["loss"] == pytest.approx(float(torch.stack(errors).mean()), rel=1e-4)


def test_ode_regression_learns_two_samples() -> None:
    engine = Recorder(network(), replace(SETTINGS, learning_rate=3e-3))
    learner = OdeLearner(engine, contexts(), STUDENT)
    losses = [learner.step(batch(*TRAJECTORY, step=step, count=2, total=2))["loss"] for step in range(60)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert learner.updates == 60


@pytest.mark.parametrize("context", ["noisy", "clean"])
def test_flow_matching_of_a_causal_teacher_by_hand(context: str) -> None:
    engine = Recorder(network())
    data = batch(*CLIP)
    learner = CausalTeacherLearner(
        engine, contexts(), STUDENT, context, shift=2.0, prompt_drop=0.0, settings=LearnerSettings(3)
    )
    draws, clean = Draws(3, data.step), data.latents
    noise = draws.noise(range(4), range(FRAMES), clean.shape[2:], "noise")
    uniform = torch.stack(
        [torch.rand(3, generator=draws.generator(row, "timesteps"), dtype=torch.float64) for row in range(4)]
    )
    sigma = (2 * uniform / (1 + uniform)).repeat_interleave(2, dim=1).float()
    noisy = (1 - sigma)[..., None, None, None] * clean + sigma[..., None, None, None] * noise
    times, text = 1000 * sigma, encode(data.prompts)
    with torch.no_grad():
        if context == "noisy":
            velocity = engine.network(noisy, times, text, DenseMask(FRAMES, sees))
        else:
            velocity = torch.cat(
                [_teacher_forced(engine.network, clean, noisy, times, text, block) for block in range(3)], 1
            )
    expected = (velocity - (noise - clean)).square().mean()
    assert learner.step(data)["loss"] == pytest.approx(float(expected), rel=1e-4)


def _teacher_forced(
    model: nn.Module, clean: Tensor, noisy: Tensor, times: Tensor, text: TextContext, block: int
) -> Tensor:
    """One noisy block behind the clean blocks before it, as a pass of its own."""
    end = 2 * block + 2
    latents = torch.cat((clean[:, : end - 2], noisy[:, end - 2 : end]), dim=1)
    levels = torch.cat((torch.zeros_like(times[:, : end - 2]), times[:, end - 2 : end]), dim=1)
    return model(latents, levels, text, DenseMask(end, lambda row, column: column // 2 <= row // 2))[:, end - 2 :]


def test_prompts_are_dropped_by_sample() -> None:
    """All dropped is all empty; none dropped differs from it."""
    losses = {}
    for share in (0.0, 1.0):
        learner = CausalTeacherLearner(Recorder(network()), contexts(), STUDENT, "noisy", shift=1.0, prompt_drop=share)
        losses[share] = learner.step(batch(*CLIP))["loss"]
    empty = replace(batch(*CLIP), prompts=("",) * 4)
    learner = CausalTeacherLearner(Recorder(network()), contexts(), STUDENT, "noisy", shift=1.0, prompt_drop=0.0)
    assert learner.step(empty)["loss"] == pytest.approx(losses[1.0], rel=1e-6)
    assert losses[0.0] != losses[1.0]


# --- The same gradients over any split --------------------------------------------------------------------------------


class Together(OneRank):
    """One of two ranks in threads."""

    size = 2

    def __init__(self, rank: int, barrier: threading.Barrier, board: dict[int, Any]) -> None:
        self.rank, self._barrier, self._board = rank, barrier, board

    def _exchange(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._barrier.wait()
        found = [self._board[rank] for rank in range(2)]
        self._barrier.wait()
        return found

    def broadcast(self, value: Any) -> Any:
        return self._exchange(value)[0]

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        first, second = self._exchange(values)
        assert first.keys() == second.keys()
        return {name: (first[name] + second[name]) / 2 for name in first}

    def barrier(self) -> None:
        self._barrier.wait()


def dmd(
    kind: str, micro_batch: int | None = None, ranks: Ranks | None = None, critic_updates: int = 1, **settings: Any
) -> DmdLearner:
    """A learner with three different networks, whose critic has had its first update's worth of steps."""
    ranks = ranks or OneRank()
    student, critic = Recorder(network(0).double()), Recorder(network(1).double())
    known = contexts()
    if kind == "causvid":
        source: Any = NoisedClips(student, known, STUDENT, 3)
    else:
        shape = RolloutShape(CONFIG, FRAMES, SIZE, SIZE, torch.float64)
        source = Rollouts(StudentRollout(student, known, STUDENT, shape, ranks, 3))
    chosen = DmdSettings(
        **{"guidance": 3.0, "shift": 3.0, "critic_updates": critic_updates, "micro_batch": micro_batch} | settings
    )
    critic.updates = 1
    return DmdLearner(student, critic, network(2).double(), known, source, chosen, ranks)


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_causal_teachers_score_of_a_block_does_not_see_later_ones(is_causal: bool) -> None:
    torch.manual_seed(0)
    plain = dmd("causvid")
    mask = partial(regression.student_mask, STUDENT) if is_causal else None
    learner = DmdLearner(plain.student, plain.critic, network(2).double(), contexts(), plain.source, score_mask=mask)
    clips = torch.randn(1, FRAMES, 4, SIZE, SIZE, dtype=torch.float64)
    other = clips.clone()
    other[:, -STUDENT.block :] += 1
    noise = torch.randn_like(clips)
    for before, after in zip(
        *(learner.scores(each, PROMPTS[:1], 500.0, noise) for each in (clips, other)), strict=True
    ):
        same = torch.equal(before[:, : -STUDENT.block], after[:, : -STUDENT.block])
        assert same == is_causal
        assert not torch.equal(before[:, -STUDENT.block :], after[:, -STUDENT.block :])


def make(method: str, micro_batch: int | None = None, ranks: Ranks | None = None) -> Any:
    settings = LearnerSettings(3, micro_batch)
    if method in ("ode", "ode-forced"):
        engine, forced = Recorder(network().double()), method == "ode-forced"
        return OdeLearner(engine, contexts(), STUDENT, settings, ranks, teacher_forcing=forced)
    if method in ("noisy", "clean"):
        engine = Recorder(network().double())
        return CausalTeacherLearner(engine, contexts(), STUDENT, method, shift=2.0, settings=settings, ranks=ranks)
    return dmd(method, micro_batch, ranks)


def data_of(method: str, count: int = 4, first: int = 0) -> Batch:
    shape = {"ode": TRAJECTORY, "ode-forced": TRAJECTORY, "self-forcing": ()}.get(method, CLIP)
    return batch(*shape, count=count, first=first, dtype=torch.float64)


def gradients(learner: Any) -> list[Tensor]:
    engines = [learner.engine] if hasattr(learner, "engine") else [learner.student, learner.critic]
    return [gradient for engine in engines for gradient in engine.gradients]


METHODS = ["ode", "ode-forced", "noisy", "clean", "causvid", "self-forcing"]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    scale = max(float(gradient.abs().max()) for gradient in expected)
    assert scale > 0
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).abs().max()) <= tolerance * scale


def tolerance_of(method: str) -> float:
    return 1e-4 if method == "self-forcing" else 1e-9  # a rollout's noise and states are in single precision


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_give_the_whole_batchs_gradient(method: str) -> None:
    whole = make(method)
    metrics = whole.step(data_of(method))
    for size in (1, 3):
        split = make(method, size)
        again = split.step(data_of(method))
        assert_same(gradients(split), gradients(whole), tolerance_of(method))
        assert again == pytest.approx(metrics, rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_give_the_whole_batchs_gradient(method: str) -> None:
    whole = make(method)
    metrics = whole.step(data_of(method))
    barrier, board = threading.Barrier(2, timeout=60), {}
    halves = [make(method, 1, Together(rank, barrier, board)) for rank in range(2)]
    found: dict[int, dict[str, float]] = {}

    def run(rank: int) -> None:
        found[rank] = halves[rank].step(data_of(method, count=2, first=2 * rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    averaged = [(one + other) / 2 for one, other in zip(*map(gradients, halves), strict=True)]
    assert_same(averaged, gradients(whole), tolerance_of(method))
    for name in ("loss", *(["student_loss", "dmd_gradient", "dmd_normaliser"] if "dmd_gradient" in metrics else [])):
        assert found[0][name] == found[1][name] == pytest.approx(metrics[name], rel=1e-4)


# --- Distribution matching --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["causvid", "self-forcing"])
def test_a_critic_that_is_the_teacher_moves_nothing(kind: str) -> None:
    learner = dmd(kind, guidance=1.0)
    learner.critic.network.load_state_dict(network(2).double().state_dict())
    learner.step(data_of(kind))
    assert all(float(gradient.abs().max()) < 1e-6 for gradient in learner.student.gradients)
    other = dmd(kind, guidance=1.0)
    other.step(data_of(kind))
    assert max(float(gradient.abs().max()) for gradient in other.student.gradients) > 1e-4


class Point(nn.Module):
    """Knows one clip: predicts it as x0 from anything."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Any, attention: Any = None) -> Tensor:
        sigma = (timesteps / 1000).clamp(min=1e-3)[..., None, None, None]
        return (noisy - self.value) / sigma


def test_the_student_goes_where_the_teacher_is() -> None:
    """In closed form: all three know one clip each, the data are the teacher's; the critic follows the student."""
    student = Recorder(Point(-1.0), replace(SETTINGS, learning_rate=3e-2, weight_decay=0.0, betas=(0.0, 0.9)))
    critic = Recorder(Point(-1.0), replace(SETTINGS, learning_rate=6e-2, weight_decay=0.0, betas=(0.0, 0.9)))
    source = NoisedClips(student, contexts(), STUDENT, 0)
    settings = DmdSettings(guidance=1.0, critic_updates=2)
    learner = DmdLearner(student, critic, Point(1.0), contexts(), source, settings)
    path = []
    for step in range(260):
        data = batch(*CLIP, step=step, count=2, total=2)
        learner.step(replace(data, latents=torch.ones_like(data.latents)))
        path.append(float(student.network.value.detach()))
    assert path[0] == path[1] == -1.0  # its first turn comes when the critic has had its two updates
    assert path[2] > -1.0
    assert path[-1] == pytest.approx(1.0, abs=0.15)
    assert student.updates == 129
    assert float(critic.network.value.detach()) == pytest.approx(1.0, abs=0.25)


def test_the_critics_loss_is_told_by_timestep() -> None:
    """Each clip's error stands in the bin of its own timestep."""
    learner = dmd("causvid")
    data = data_of("causvid")
    draws, count = Draws(0, data.step), range(4)
    clip = learner.source.make(data, with_gradient=False)
    levels = learner._timesteps(draws, count, "critic timestep")
    noise = draws.noise_like(clip.latents, count, "critic score")
    sigma = (levels / 1000)[:, None, None, None, None]
    noisy, times = (1 - sigma) * clip.latents + sigma * noise, levels[:, None].expand(4, FRAMES)
    with torch.no_grad():
        velocity = learner.critic.network(noisy, times, encode(data.prompts))
    errors = (velocity - (noise - clip.latents)).square().flatten(1).mean(1)
    metrics = learner.step(data)
    told = {name: value for name, value in metrics.items() if name.startswith("critic_loss_")}
    assert len(told) > 1, "the test needs clips in two bins"
    for name, value in told.items():
        low, high = map(float, name.removeprefix("critic_loss_").split("_"))
        inside = (levels >= low) & (levels < high)
        assert value == pytest.approx(float(errors[inside].mean()), rel=1e-6)


def test_turns_are_counted_by_the_critics_updates() -> None:
    learner = dmd("causvid", critic_updates=3)
    learner.critic.updates = 0
    turns = []
    for step in range(8):
        turns.append(learner.trains_student)
        before = learner.student.updates
        metrics = learner.step(replace(data_of("causvid"), step=step))
        assert learner.student.updates - before == turns[-1] == ("student_gradient_norm" in metrics)
        assert any(name.startswith("critic_loss_") for name in metrics)
    assert turns == [False, False, False, True, False, False, True, False]


def test_data_blocks_that_were_not_noised_are_not_trained() -> None:
    """They come out as they are, are left out of the mean, and the whole batch's number of frames is known to all."""
    student = Recorder(network())
    data = batch(*CLIP)
    source = NoisedClips(student, contexts(), STUDENT, 3)
    clip = source.make(data, with_gradient=True)
    assert 0 < int(clip.trained.sum()) < clip.trained.numel()
    assert torch.equal(clip.latents[~clip.trained], data.latents[~clip.trained])
    halves = [source.make(batch(*CLIP, count=2, first=first), with_gradient=False) for first in (0, 2)]
    assert torch.equal(torch.cat([half.trained for half in halves]), clip.trained)
    assert {half.trained_in_all for half in halves} == {clip.trained_in_all} == {int(clip.trained.sum())}


def test_a_batch_without_a_noised_block_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = torch.full((4, 3), len(STUDENT.timesteps))
    monkeypatch.setattr(sources, "draw_block_indices", lambda batch, *arguments: clean[:batch])
    learner = dmd("causvid")
    metrics = learner.step(data_of("causvid"))
    assert metrics["student_gradient_norm"] == 0
    assert metrics["loss"] > 0


def test_a_student_that_is_not_finite_stops_and_changes_nothing() -> None:
    learner = dmd("causvid")
    with torch.no_grad():
        learner.critic.network.proj_out.bias[0] = float("nan")
    before = copy.deepcopy(learner.student.network.state_dict())
    with pytest.raises(FloatingPointError, match="update 1: loss nan"):
        learner.step(data_of("causvid"))
    assert all(torch.equal(value, before[name]) for name, value in learner.student.network.state_dict().items())


# --- Rollouts ---------------------------------------------------------------------------------------------------------


def rollout(student: Recorder, **changes: Any) -> StudentRollout:
    settings = replace(STUDENT, **changes)
    return StudentRollout(
        student, contexts(), settings, RolloutShape(CONFIG, FRAMES, SIZE, SIZE, torch.float32), OneRank(), 3
    )


def test_the_gradient_of_a_block_does_not_reach_the_blocks_before() -> None:
    """The last block's gradient is that of one pass on a context that was made without gradient."""
    student = Recorder(network())
    making = rollout(student)
    clip = Rollouts(making).make(batch(count=2, total=2), with_gradient=True)
    clip.latents[:, 4:].square().sum().backward()
    found = [weight.grad.clone() for weight in student.network.parameters()]
    student.network.zero_grad()

    data, text = batch(count=2, total=2), encode(PROMPTS[:2])
    noise, cache = making.noise(data, range(FRAMES)), making.new_cache(2)
    model = making.model(cache, text)
    made = making.run(model, noise[:, :, :4], [2, 2], with_gradient=False)
    last = making.run(model, noise[:, :, 4:], [2], with_gradient=True)
    last.square().sum().backward()
    assert torch.equal(torch.cat((made, last), 1), clip.latents)
    assert_same(found, [weight.grad for weight in student.network.parameters()], 1e-6)


def test_recomputed_activations_give_the_same_gradient_when_the_window_has_moved() -> None:
    """The window of 4 frames evicts the first block before the third is made; backward recomputes the second after."""
    found = []
    for checkpointing in (False, True):
        model = network()
        model.gradient_checkpointing = checkpointing
        student = Recorder(model)
        clip = Rollouts(rollout(student, sink=2)).make(batch(count=2, total=2), with_gradient=True)
        clip.latents.square().sum().backward()
        found.append([weight.grad for weight in student.network.parameters()])
    assert_same(found[1], found[0], 1e-6)


def test_a_step_has_one_exit_and_steps_have_different_ones() -> None:
    making = rollout(Recorder(network()))
    exits = [making.exit_step(step) for step in range(12)]
    assert set(exits) == {0, 1, 2}
    assert [rollout(Recorder(network())).exit_step(step) for step in range(12)] == exits
    assert making.noise(batch(step=3), range(2)).shape[0] == exits[3] + 1


# Two blocks: the keys of the first do not depend on the prompt.
VAE_CONFIG = replace(CONFIG, in_channels=16, out_channels=16, num_layers=2)


def long_rollouts(frames: int = 12, switch: bool = True) -> LongRollouts:
    """Streams of the tiny VAE's latents: clips of 6, so 4 new frames a step."""
    torch.manual_seed(1)
    vae = StreamingVAE.from_pretrained(Path(__file__).parents[2] / "assets/tiny/vae").requires_grad_(False)
    student = Recorder(network(0, VAE_CONFIG))
    settings = replace(STUDENT, window=6, sink=2)
    shape = RolloutShape(VAE_CONFIG, FRAMES, SIZE, SIZE, torch.float32)
    return LongRollouts(StudentRollout(student, contexts(), settings, shape, OneRank(), 3), vae, frames, switch=switch)


def test_windows_overlap_and_begin_with_a_picture() -> None:
    making = long_rollouts(frames=14, switch=False)
    clips = [making.make(batch(step=step, count=2, total=2), with_gradient=step == 1) for step in range(4)]
    assert [clip.latents.requires_grad for clip in clips] == [False, True, False, False]
    assert all(bool(clip.trained.all()) for clip in (clips[0], clips[3]))  # the fourth step begins a new stream
    for clip in clips[1:3]:
        assert clip.trained.tolist() == [[False] * 2 + [True] * 4] * 2
        assert clip.trained_in_all == 8
    stream = torch.cat((clips[0].latents, *(clip.latents[:, 2:].detach() for clip in clips[1:3])), dim=1)
    for clip, first in ((clips[1], 4), (clips[2], 8)):
        assert torch.equal(clip.latents[:, 1], stream[:, first + 1])
        with torch.no_grad():
            pixels, _ = making._vae.decode(stream[:, : first + 1])
            picture, _ = making._vae.encode(pixels[:, -1:])
        torch.testing.assert_close(clip.latents[:, :1].detach(), picture, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(clip.latents[:, 0], stream[:, first], atol=1e-2)
    assert not torch.equal(clips[3].latents, clips[0].latents)


def test_a_stream_is_the_rollout_that_it_would_be_without_stops() -> None:
    """The blocks of the second step are those of one rollout over both steps' noise, on the same window."""
    making = long_rollouts(frames=10, switch=False)
    making._rollout._exit = (0, 1)
    steps = [batch(step=step, count=2, total=2) for step in range(2)]
    first = making.make(steps[0], with_gradient=False).latents
    making._rollout._exit = (1, 1)
    second = making.make(steps[1], with_gradient=False).latents[:, 2:]
    inner = making._rollout
    inner._exit = (0, 1)
    begin = inner.noise(steps[0], range(6))
    inner._exit = (1, 1)
    noise = torch.cat((begin, inner.noise(steps[1], range(6, 10))), dim=2)
    model = inner.model(inner.new_cache(2), encode(PROMPTS[:2]))
    whole = inner.run(model, noise, [2] * 5, with_gradient=False)
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole)


def test_prompts_switch_once_in_a_rollout_and_the_cache_is_made_anew() -> None:
    making = long_rollouts(frames=18)
    known: list[Tensor] = []
    prompts = []
    for step in range(4):
        texts = (f"prompt {step}", f"other {step}")
        clip = making.make(replace(batch(step=step, count=2, total=2), prompts=texts), with_gradient=False)
        prompts.append(clip.prompts)
        known.append(clip.latents if step == 0 else clip.latents[:, 2:])
        stream = making._streams[0]
        frames = torch.cat(known, dim=1)
        last = list(range(frames.shape[1]))[-4:]
        assert torch.equal(torch.cat(stream.cached, dim=1), frames[:, [0, 1, *last]])
    changes = [step for step in range(1, 4) if prompts[step] != prompts[step - 1]]
    assert len(changes) == 1
    assert prompts[changes[0]] == (f"prompt {changes[0]}", f"other {changes[0]}")

    fresh = making._rollout.new_cache(2)
    stream = making._streams[0]
    stream.prompts = ("new", "newer")
    making._recache(stream)
    fresh.reset(stream.done - 6)
    model = making._rollout.model(fresh, encode(stream.prompts))
    for block in torch.cat(stream.cached, dim=1).split(2, dim=1):
        model.write_context(block)
    for name, value in fresh.state_dict().items():
        torch.testing.assert_close(stream.cache.state_dict()[name], value)


def test_the_blocks_after_a_switch_are_made_on_the_recomputed_window(tmp_path: Path) -> None:
    making, by_hand = long_rollouts(frames=18), long_rollouts(frames=18)
    switch = making._switch_at(0)
    assert switch is not None
    for step in range(switch):
        making.make(batch(step=step, count=2, total=2), with_gradient=False)
    making.save(tmp_path)
    by_hand.load(tmp_path)
    data = replace(batch(step=switch, count=2, total=2), prompts=("new", "newer"))
    clip = making.make(data, with_gradient=False)

    inner, stream = by_hand._rollout, by_hand._streams[0]
    kept = stream.cache.state_dict()
    noise = inner.noise(data, range(stream.done, stream.done + 4))
    made = {}
    for recomputes in (False, True):
        stream.cache.load_state_dict(kept)
        stream.prompts = data.prompts
        if recomputes:
            by_hand._recache(stream)
        made[recomputes] = inner.run(
            inner.model(stream.cache, encode(data.prompts)), noise, [2, 2], with_gradient=False
        )
    torch.testing.assert_close(clip.latents[:, 2:], made[True])
    assert not torch.allclose(made[False], made[True], rtol=1e-4, atol=1e-5)


class Two(OneRank):
    """The first of two processes."""

    size = 2


def test_restored_streams_go_on_bit_for_bit(tmp_path: Path) -> None:
    making = long_rollouts(frames=18)
    for step in range(2):
        making.make(batch(step=step, count=2, total=2), with_gradient=False)
    making.save(tmp_path)
    again = long_rollouts(frames=18)
    again.load(tmp_path)
    for step in (2, 3):
        data = batch(step=step, count=2, total=2)
        one, other = (source.make(data, with_gradient=False) for source in (making, again))
        assert torch.equal(one.latents, other.latents)
        assert one.prompts == other.prompts
    with pytest.raises(ValueError, match="as many processes as before"):
        again.load(tmp_path / "elsewhere")
    making._rollout.ranks = Two()  # the first of two processes knows half of the streams
    making.save(tmp_path / "of-two")
    with pytest.raises(ValueError, match="as many processes as before"):
        again.load(tmp_path / "of-two")


@pytest.mark.parametrize("frames", [5, 4])
def test_a_rollout_shorter_than_a_clip_is_refused(frames: int) -> None:
    with pytest.raises(ValueError, match="rollout_frames: a long rollout has at least a clip"):
        long_rollouts(frames=frames)


# --- Causality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_training_passes_are_causal(method: str) -> None:
    make(method).check_causality(data_of(method))


@pytest.mark.parametrize("method", ["ode", "noisy", "causvid"])
def test_bidirectional_attention_is_found(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (regression, sources):
        monkeypatch.setattr(module, "student_mask", lambda student, frames: bidirectional(frames))
    with pytest.raises(CausalityError, match="latent frames from 2 on change the ones before"):
        make(method).check_causality(data_of(method))


@pytest.mark.parametrize("method", ["clean", "ode-forced"])
def test_a_clean_half_that_is_seen_too_early_is_found(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both = replace(bidirectional(2 * FRAMES), frame_positions=torch.arange(FRAMES, dtype=torch.float64).repeat(2))
    monkeypatch.setattr(regression, "_teacher_forcing", lambda *arguments: both)
    with pytest.raises(CausalityError):
        make(method).check_causality(data_of(method))


def test_a_rollout_that_mixes_blocks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made = sources.rollout

    def mixed(*arguments: Any) -> Any:
        result = made(*arguments)
        return result._replace(clean=result.clean + result.clean.mean(dim=1, keepdim=True))

    monkeypatch.setattr(sources, "rollout", mixed)
    with pytest.raises(CausalityError):
        make("self-forcing").check_causality(data_of("self-forcing"))


# --- Small parts ------------------------------------------------------------------------------------------------------


def test_draws_belong_to_the_place_and_the_step() -> None:
    one, other = Draws(0, 4), Draws(0, 5)
    whole = one.noise(range(4), range(2), (3,), "noise")
    assert torch.equal(one.noise(range(2, 4), range(2), (3,), "noise"), whole[2:])
    assert not torch.equal(other.noise(range(4), range(2), (3,), "noise"), whole)
    assert not torch.equal(one.noise(range(4), range(2), (3,), "else"), whole)
    first, second = (float(torch.rand((), generator=one.generator(row, "timesteps"))) for row in (0, 1))
    assert first != second


def test_prompts_are_encoded_once_and_forgotten_in_turn() -> None:
    asked: list[str] = []

    def counting(prompts: Sequence[str]) -> TextContext:
        asked.extend(prompts)
        return encode(prompts)

    known = PromptContexts(counting, "cpu", capacity=2)
    first = known(["a b c", "a", "a b c"])
    assert asked == ["a b c", "a"]
    assert first.rows.shape[0] == 3
    assert torch.equal(first.rows[0], first.rows[2])
    known(["d", "a b c", "a"])
    assert asked == ["a b c", "a", "d", "a"]  # "d" came in the place of "a", which had waited longest


def test_a_tally_leaves_out_what_nobody_measured() -> None:
    tally = Tally(["a", "b"])
    tally.add("a", torch.tensor([1.0, 2.0]))
    tally.add("a", torch.tensor(6.0))
    assert tally.means(OneRank()) == {"a": 3.0}
