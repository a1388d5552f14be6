"""KV-cached generation against the parallel forward, and the stream's invariants."""

import resource
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reelway.kernels.causal.cache import CacheShape, KVCache
from reelway.kernels.causal.generator import CachedStudent, ChunkGenerator
from reelway.kernels.causal.many_step import ManyStepGenerator
from reelway.kernels.causal.masks import FrameMask, block_causal
from reelway.kernels.causal.student import StudentSettings
from reelway.kernels.diffusion.noise import SampleKey, draw_noise, fresh_noise_of
from reelway.kernels.diffusion.sampler import few_step_sample
from reelway.kernels.objectives.self_forcing import rollout
from reelway.kernels.wan.config import TransformerConfig
from reelway.kernels.wan.context import TextContext
from reelway.kernels.wan.transformer import VideoTransformer

CONFIG = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=24,
    ffn_dim=64,
    num_layers=2,
    in_channels=4,
    out_channels=4,
    text_dim=16,
)
SIZE = (4, 4)


def network(dtype: torch.dtype = torch.float32) -> VideoTransformer:
    torch.manual_seed(0)
    return VideoTransformer(CONFIG).requires_grad_(False).to(dtype)


def prompt(seed: int = 0) -> TextContext:
    return TextContext.fold([torch.randn(5, 16, generator=torch.Generator().manual_seed(seed))])


def stream(settings: StudentSettings, model: VideoTransformer | None = None, streams: int = 1) -> ChunkGenerator:
    keys = [SampleKey(0, "a prompt", index) for index in range(streams)]
    return ChunkGenerator(model or network(), settings, prompt(), keys, SIZE)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_many_guided_steps_with_a_cache_are_those_of_a_masked_pass(guidance: float) -> None:
    """Against whole passes under a block-causal mask: clean blocks at 0 before the one at its level, no cache."""
    model, grid = network(torch.float64), [1000.0, 700.0, 300.0, 0.0]
    settings, frames = StudentSettings(block=2, first_block=1, window=9, sink=0), 5
    keys = [SampleKey(4, "a prompt", index) for index in range(2)]
    negative = prompt(1)
    generator = ManyStepGenerator(
        model, settings, prompt().to(dtype=torch.float64), negative, keys, SIZE, grid, guidance
    )
    made = torch.cat([generator.next_block() for _ in settings.blocks(frames)], dim=1)

    mask = block_causal(frames, 2, first_block=1)
    clean = draw_noise(keys, range(frames), (4, *SIZE)).double()
    first = 0
    for size in settings.blocks(frames):
        block = slice(first, first + size)
        for here, there in pairwise(grid):
            levels = torch.zeros(2, frames, dtype=torch.float64)
            levels[:, first:] = here
            both = [model(clean, levels, text.expand(2).to(dtype=torch.float64), mask) for text in (prompt(), negative)]
            velocity = both[1] + guidance * (both[0] - both[1])
            clean[:, block] += (there - here) / 1000 * velocity[:, block]
        first += size
    torch.testing.assert_close(made.double(), clean, rtol=1e-4, atol=1e-4)


def cached_forward(model: VideoTransformer, latents: Tensor, sizes: list[int], window: int, sink: int) -> Tensor:
    shape = CacheShape(CONFIG, len(latents), *SIZE, window, sink, latents.dtype)
    cache, outputs = KVCache(shape), []
    for block in latents.split(sizes, dim=1):
        opened = cache.open(block.shape[1])
        outputs.append(model(block, torch.zeros(block.shape[:2]), prompt().expand(len(latents)), opened))
        opened.commit()
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize(("block", "first", "frames"), [(3, None, 12), (4, 1, 13), (1, None, 5)])
def test_parallel_block_causal_forward_on_clean_context_equals_the_cached_forward(
    block: int, first: int | None, frames: int
) -> None:
    model, latents = network(), torch.randn(2, frames, 4, *SIZE)
    mask = block_causal(frames, block, first_block=first)
    parallel = model(latents, torch.zeros(2, frames), prompt().expand(2), mask)
    sizes = StudentSettings(block=block, first_block=first).blocks(frames)
    cached = cached_forward(model, latents, sizes, window=frames, sink=0)
    assert (cached - parallel).abs().max() <= 1e-5


@pytest.mark.parametrize(("block", "first"), [(3, None), (4, 1)])
def test_sliding_window_equals_the_windowed_mask(block: int, first: int | None) -> None:
    """Without a sink the cache's moving positions are the mask's, for rotary attention sees differences only."""
    frames = 24 if first is None else 25
    model, latents = network(), torch.randn(1, frames, 4, *SIZE)
    mask = block_causal(frames, block, first_block=first, window=7)
    parallel = model(latents, torch.zeros(1, frames), prompt(), mask)
    sizes = StudentSettings(block=block, first_block=first).blocks(frames)
    assert (cached_forward(model, latents, sizes, window=7, sink=0) - parallel).abs().max() <= 1e-5


def test_sink_stands_next_to_the_window() -> None:
    """One layer: a late block must see the sink as if no frame had ever stood between it and the window."""
    config = TransformerConfig(**{**CONFIG.__dict__, "num_layers": 1})
    torch.manual_seed(0)
    model, latents = VideoTransformer(config).requires_grad_(False), torch.randn(1, 30, 4, *SIZE)
    cache = KVCache(CacheShape(config, 1, *SIZE, 9, 3, torch.float32))
    for block in latents.split(3, dim=1):
        opened = cache.open(3)
        found = model(block, torch.zeros(1, 3), prompt(), opened)
        opened.commit()
    kept = torch.cat((latents[:, :3], latents[:, 24:]), dim=1)
    expected = model(kept, torch.zeros(1, 9), prompt(), block_causal(9, 3))[:, 6:]
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("redrawn", [False, True])
def test_stream_equals_the_sampler_on_the_parallel_network(redrawn: bool) -> None:
    """No cache: each block is sampled with a masked pass over [all clean frames, the noisy block]."""
    model, settings = network(), StudentSettings(window=9, sink=0)
    generator, source = stream(settings, model), torch.randn(1, 9, 4, *SIZE)
    levels = (800.0, 300.0) if redrawn else settings.timesteps
    clean = torch.zeros(1, 0, 4, *SIZE)
    for start in (0, 3, 6):
        mask, frames = block_causal(start + 3, 3), range(start, start + 3)

        def velocity(noisy: Tensor, timesteps: Tensor, clean: Tensor = clean, mask: FrameMask = mask) -> Tensor:
            levels = torch.cat((torch.zeros(1, clean.shape[1]), timesteps), dim=1)
            return model(torch.cat((clean, noisy), dim=1), levels, prompt(), mask)[:, -3:]

        given = source[:, start : start + 3] if redrawn else None
        noisy = draw_noise(generator.keys, frames, generator.frame_shape)
        if given is not None:
            noisy = (1 - 0.8) * given + 0.8 * noisy
        expected = few_step_sample(velocity, noisy, levels, fresh_noise_of(generator.keys, start))
        found = generator.next_block(given, levels)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        clean = torch.cat((clean, found), dim=1)


def test_history_is_the_frames_that_the_cache_holds() -> None:
    generator = stream(StudentSettings(window=9, sink=3))
    made = torch.cat([generator.next_block() for _ in range(6)], dim=1)
    assert len(generator.cache) == 9
    assert torch.equal(generator.state_dict()["history"], torch.cat((made[:, :3], made[:, -6:]), dim=1))


def test_bytes_are_known_beforehand() -> None:
    shape = CacheShape(CONFIG, 2, *SIZE, 9, 3, torch.bfloat16)
    cache = KVCache(shape)
    held = (cache.keys, cache.values, cache.sink_keys)
    assert shape.bytes() == sum(tensor.numel() * tensor.element_size() for tensor in held)
    wan = TransformerConfig(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30)
    published = CacheShape(wan, 1, 60, 104, 21, 0, torch.bfloat16).bytes() / 1e9
    assert published == pytest.approx(6.04, abs=0.005)  # 21 frames of 832x480 at 1.3B


def test_window_as_long_as_the_stream_equals_no_window() -> None:
    long = stream(StudentSettings(window=40, sink=0))
    windowed = stream(StudentSettings(window=12, sink=3))
    for _ in range(4):
        assert torch.equal(long.next_block(), windowed.next_block())
    assert not torch.equal(long.next_block(), windowed.next_block())


def test_a_stream_does_not_depend_on_its_batch() -> None:
    settings = StudentSettings(window=9)
    alone, together = stream(settings), stream(settings, streams=3)
    for _ in range(5):
        torch.testing.assert_close(together.next_block()[:1], alone.next_block(), rtol=1e-5, atol=1e-5)


def test_no_kept_block_means_the_same_block_again() -> None:
    generator = stream(StudentSettings(window=6, sink=0))
    for _ in range(4):
        preview = generator.next_block(keep=False)
        assert torch.equal(generator.next_block(), preview)


def test_snapshot_restores_bit_for_bit_in_a_new_process(tmp_path: Path) -> None:
    settings = StudentSettings(window=9)
    generator = stream(settings)
    for _ in range(5):
        generator.next_block()
    save_file(generator.state_dict(), tmp_path / "state.safetensors")
    script = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from test_generator import *\n"
        "generator = stream(StudentSettings(window=9))\n"
        "generator.load_state_dict(load_file(sys.argv[1] + '/state.safetensors'))\n"
        "latents = torch.cat([generator.next_block() for _ in range(4)], dim=1)\n"
        "save_file({'latents': latents}, sys.argv[1] + '/went_on.safetensors')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)], check=True, timeout=240)
    expected = torch.cat([generator.next_block() for _ in range(4)], dim=1)
    assert torch.equal(load_file(tmp_path / "went_on.safetensors")["latents"], expected)


def test_snapshot_of_another_shape_is_refused() -> None:
    state = stream(StudentSettings(window=9), streams=2).state_dict()
    with pytest.raises(ValueError, match="KV cache: expected keys"):
        stream(StudentSettings(window=9)).load_state_dict(state)


def test_ten_thousand_frames_in_flat_memory_with_finite_values() -> None:
    config = TransformerConfig(
        num_attention_heads=1,
        attention_head_dim=12,
        ffn_dim=16,
        num_layers=1,
        in_channels=2,
        out_channels=2,
        text_dim=8,
    )
    torch.manual_seed(0)
    model = VideoTransformer(config).requires_grad_(False)
    settings = StudentSettings(block=50, timesteps=(1000.0,), window=150, sink=50)
    generator = ChunkGenerator(model, settings, TextContext.fold([torch.randn(2, 8)]), [SampleKey(0, "", 0)], (2, 2))
    for _ in range(20):
        generator.next_block()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while generator.frames_done < 10_000:
        latents = generator.next_block()
        assert torch.isfinite(latents).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2048  # kilobytes
    assert sum(tensor.numel() for tensor in generator.state_dict().values()) < 8_000  # all latents: 80,000


def test_positions_far_into_a_stream_change_nothing() -> None:
    """A stream that begins at frame ten million makes what one at frame 0 makes: only differences matter."""
    model, latents = network(), torch.randn(1, 15, 4, *SIZE)

    def last(position: int) -> Tensor:
        cache = KVCache(CacheShape(CONFIG, 1, *SIZE, 9, 3, torch.float32))
        cache.reset(position)
        for block in latents.split(3, dim=1):
            opened = cache.open(3)
            output = model(block, torch.zeros(1, 3), prompt(), opened)
            opened.commit()
        return output

    torch.testing.assert_close(last(10_000_000), last(0), rtol=1e-4, atol=1e-4)


def test_prompt_switch_recomputes_the_window() -> None:
    """After the switch the cache is what a stream of the new prompt would hold of the same clean latents."""
    settings = StudentSettings(window=12, sink=3)
    switched, model = stream(settings), network()
    made = [switched.next_block() for _ in range(3)]
    switched.switch_prompt(prompt(1))
    fresh = ChunkGenerator(model, settings, prompt(1), [SampleKey(0, "a prompt", 0)], SIZE)
    fresh.append(torch.cat(made, dim=1))
    torch.testing.assert_close(switched.next_block(), fresh.next_block(), rtol=1e-5, atol=1e-5)


def test_prompt_switch_after_eviction_keeps_the_stream_going() -> None:
    settings = StudentSettings(window=9, sink=3)
    generator, kept = stream(settings), stream(settings)
    for _ in range(6):
        generator.next_block()
        kept.next_block()
    generator.switch_prompt(prompt(1))
    assert generator.frames_done == 18
    assert len(generator.cache) == len(kept.cache)
    assert not torch.allclose(generator.next_block(), kept.next_block())


def test_given_context_is_continued() -> None:
    settings = StudentSettings(window=21)
    generator = stream(settings)
    clip = torch.cat([generator.next_block() for _ in range(2)], dim=1)
    continued = stream(settings)
    continued.append(clip)
    assert torch.equal(continued.next_block(), generator.next_block())


def test_video_to_video_starts_from_the_noised_source() -> None:
    generator = stream(StudentSettings(window=21))
    source = torch.randn(1, 3, 4, *SIZE)
    faint = generator.next_block(source, timesteps=(1e-3,), keep=False)
    torch.testing.assert_close(faint, source, rtol=0, atol=1e-4)
    strong = generator.next_block(source, timesteps=(800.0, 400.0), keep=False)
    assert (strong - source).abs().mean() > 0.1
    with pytest.raises(ValueError, match="without a source they must begin at 1000"):
        generator.next_block(timesteps=(800.0,))
    with pytest.raises(ValueError, match=r"a block of shape \(1, 3, 4, 4, 4\) is expected, got \(1, 2, 4, 4, 4\)"):
        generator.next_block(source[:, :2], timesteps=(800.0,))


def cached_rollout(checkpointing: bool, window: int) -> list[Tensor]:
    """Gradients of a Self-Forcing rollout with the real cache."""
    model = network().requires_grad_(True)
    model.gradient_checkpointing = checkpointing
    cache = KVCache(CacheShape(CONFIG, 1, *SIZE, window, 3, torch.float32))
    noise = torch.randn(3, 1, 12, 4, *SIZE, generator=torch.Generator().manual_seed(5))
    clean = rollout(CachedStudent(model, cache, prompt()), noise, [1000.0, 800.0, 500.0], 2, [3] * 4).clean
    clean.square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("window", [12, 6])
def test_gradient_checkpointing_survives_cache_writes_and_eviction(window: int) -> None:
    plain, recomputed = cached_rollout(False, window), cached_rollout(True, window)
    assert len(plain) == len(list(network().parameters()))
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_no_gradient_flows_into_earlier_blocks_through_the_cache() -> None:
    """The loss of the last block alone must not see the noise, and so the forward, of any earlier block."""
    model = network().requires_grad_(True)
    cache = KVCache(CacheShape(CONFIG, 1, *SIZE, 12, 0, torch.float32))
    noise = torch.randn(1, 1, 9, 4, *SIZE, requires_grad=True)
    clean = rollout(CachedStudent(model, cache, prompt()), noise, [1000.0], 0, [3] * 3).clean
    clean[:, 6:].sum().backward()
    assert noise.grad is not None
    assert noise.grad[:, :, :6].abs().max() == 0
    assert noise.grad[:, :, 6:].abs().max() > 0


def test_student_settings_round_trip_and_refuse(tmp_path: Path) -> None:
    settings = StudentSettings(block=4, first_block=1, origin={"teacher": "x"})
    settings.write(tmp_path)
    assert StudentSettings.read(tmp_path) == settings
    assert StudentSettings().timesteps == pytest.approx((1000, 937.5, 833.333333, 625))
    with pytest.raises(ValueError, match="timesteps must fall"):
        StudentSettings(timesteps=(500.0, 500.0))
    with pytest.raises(
        ValueError, match=r"height and width must both be pixels, or neither be there, got \(64, None\)"
    ):
        StudentSettings(height=64)
    with pytest.raises(ValueError, match="sampling must be few-step or many-step, got 'euler'"):
        StudentSettings(sampling="euler")
    (tmp_path / "student.json").write_text('{"blocks": 3}')
    with pytest.raises(ValueError, match=r"student\.json"):
        StudentSettings.read(tmp_path)
