"""The measures against closed forms, and the statistics against Student's t and simulation."""

import numpy as np
import pytest

from reelway.kernels.metrics import frames, motion
from reelway.kernels.metrics.measures import frozen, is_moving, longest_run, per_second, slope_per_second, summary
from reelway.kernels.metrics.seams import seam
from reelway.kernels.metrics.series import Meter, measure
from reelway.kernels.metrics.statistics import (
    FEWEST,
    Interval,
    bootstrap,
    bootstrap_columns,
    paired_difference,
    t_quantile,
)

FPS = 16.0


def gray(values: np.ndarray) -> np.ndarray:
    """A gray video [T, H, W, 3] of grey levels [T, H, W]."""
    return np.repeat(np.round(values).astype(np.uint8)[..., None], 3, axis=3)


def texture(shift: tuple[float, float], side: int = 64, seed: int = 0) -> np.ndarray:
    """A smooth random pattern [side, side], known between pixels, moved by (down, right)."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side].astype(float)
    picture = np.zeros((side, side))
    for _ in range(24):
        frequency, phase = generator.uniform(-0.7, 0.7, 2), generator.uniform(0, 2 * np.pi)
        picture += np.sin(frequency[0] * (rows - shift[0]) + frequency[1] * (columns - shift[1]) + phase)
    return np.clip(128 + 8 * picture, 10, 240)


# --- single frames ------------------------------------------------------------------------------------


def test_a_constant_video_has_nothing_to_report() -> None:
    video = np.full((20, 32, 48, 3), (200, 100, 50), np.uint8)
    found = summary(measure(video), FPS, edges=[9], inside=[5, 13])
    brightness = (0.2126 * 200 + 0.7152 * 100 + 0.0722 * 50) / 255
    assert found["exposure"] == pytest.approx(brightness, rel=1e-5)
    assert found["saturation"] == pytest.approx(150 / 255, rel=1e-5)
    assert found["temporal_flickering"] == 1
    assert found["freeze"] == 1
    assert found["longest_freeze"] == 19 / FPS
    for name in ("flicker", "motion", "moving", "sharpness", "clipped", "sharpness_drift", "exposure_drift"):
        assert found[name] == pytest.approx(0, abs=1e-6), name
    assert "seam" not in found  # nothing over nothing


def test_sharpness_of_a_single_dot() -> None:
    picture = np.full((1, 20, 30), 50.0, np.float32)
    picture[0, 8, 9] += 40
    # The Laplacian is -4·40 at the dot and 40 at its four neighbours; its mean is 0.
    assert frames.sharpness(picture)[0] == pytest.approx(20 * 40**2 / (18 * 28), rel=1e-5)


def test_blur_lowers_sharpness_by_its_gain() -> None:
    frequency = 2 * np.pi / 8
    wave = np.tile(100 + 50 * np.sin(frequency * np.arange(66)), (66, 1)).astype(np.float32)
    blurred = (wave[:, :-2] + wave[:, 1:-1] + wave[:, 2:]) / 3
    gain = (1 + 2 * np.cos(frequency)) / 3
    ratio = frames.sharpness(blurred[None])[0] / frames.sharpness(wave[None, :, 1:-1])[0]
    assert ratio == pytest.approx(gain**2, rel=1e-3)


def test_clipped_counts_black_and_white() -> None:
    video = np.full((1, 16, 20, 3), 128, np.uint8)
    video[0, :4] = 255
    video[0, 4:6] = 0
    assert measure(video).clipped[0] == pytest.approx(6 / 16)


# --- steps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("step", "tolerance"), [((0, 2), 0.1), ((1, 0), 0.1), ((-2, 3), 0.2), ((-1.5, 2.0), 0.4)])
def test_motion_of_a_moving_texture(step: tuple[float, float], tolerance: float, seed: int) -> None:
    video = gray(np.stack([texture((step[0] * t, step[1] * t), seed=seed) for t in range(3)]))
    pairs = frames.luma(video)
    speeds = motion.block_speeds(pairs[:-1], pairs[1:])
    assert np.median(speeds) == pytest.approx(np.hypot(*step), rel=0.1)
    assert (speeds > 0).mean() > 0.7
    assert measure(video).motion[1:] * 64 == pytest.approx([np.hypot(*step)] * 2, rel=tolerance)


def test_motion_is_in_short_sides_whatever_the_resolution() -> None:
    small = gray(np.stack([texture((0, t)) for t in range(2)]))
    large = np.repeat(np.repeat(small, 4, axis=1), 4, axis=2)
    assert measure(large).motion[1] == pytest.approx(measure(small).motion[1], rel=1e-4)


def test_a_cut_and_noise_are_no_motion() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    assert measure(noise).motion[1:].max() < 0.2 / 64
    assert measure(noise).flicker[1:].min() > 20


def test_a_change_of_brightness_on_a_slope_is_no_motion() -> None:
    slope = np.broadcast_to(3.0 * np.arange(64), (2, 64, 64)).copy()
    slope[1] += 6  # as if the slope had moved by two pixels
    found = measure(gray(slope))
    assert found.motion[1] == 0
    assert found.flicker[1] == pytest.approx(6)


def test_flicker_is_seen_where_nothing_moves_only() -> None:
    still = np.stack([texture((0, 0))] * 9)
    still[1::2] += 6
    moving = still.copy()
    for t in range(9):
        moving[t, 20:36, 2 + 3 * t : 18 + 3 * t] = 250
    for values in (still, moving):
        found = measure(gray(values))
        assert found.flicker[1:] == pytest.approx([6] * 8, abs=0.3)
    assert measure(gray(still)).motion[1:].max() == 0
    assert measure(gray(moving)).motion[1:].min() * 64 > 1.5


def test_vbench_flickering_is_the_mean_change() -> None:
    video = np.full((5, 16, 16, 3), 100, np.uint8)
    video[1::2, :, :, 0] += 30
    assert summary(measure(video), FPS)["temporal_flickering"] == pytest.approx(1 - 10 / 255)


def test_a_video_moves_by_vbenchs_rule() -> None:
    speed = 6 / 256 * 8 / FPS  # short sides per frame
    motion_of = np.full(17, 0.9 * speed, np.float32)
    assert not is_moving(motion_of, FPS)
    motion_of[1:5] = 1.1 * speed
    assert is_moving(np.r_[np.nan, motion_of[1:]].astype(np.float32), FPS)
    motion_of[4] = 0
    assert not is_moving(np.r_[np.nan, motion_of[1:]].astype(np.float32), FPS)


def test_frozen_stretches() -> None:
    video = gray(np.stack([texture((0, 1.5 * t)) for t in range(24)]))
    video[5:9] = video[4]
    video[15:17] = video[14]
    found = summary(measure(video), FPS)
    assert found["freeze"] == pytest.approx(6 / 23)
    assert found["longest_freeze"] == 4 / FPS
    assert frozen(np.array([np.nan, 0.0, 0.5], np.float32)).tolist() == [False, True, False]
    assert longest_run(np.zeros(3, bool)) == 0


def test_feeding_in_pieces_changes_nothing() -> None:
    video = gray(np.stack([texture((0.5 * t, t)) for t in range(41)]))
    meter = Meter()
    for first, last in ((0, 1), (1, 18), (18, 19), (19, 41)):
        meter.add(video[first:last])
    whole, pieces = measure(video), meter.series()
    for name in vars(whole):
        np.testing.assert_allclose(vars(pieces)[name], vars(whole)[name], rtol=1e-5, atol=1e-5)
    assert np.isnan(whole.change[0])
    assert np.isfinite(whole.change[1:]).all()


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.zeros((4, 32, 32, 3), np.float32), "must be uint8"),
        (np.zeros((4, 8, 32, 3), np.uint8), "at least 16 pixels a side"),
        (np.zeros((0, 32, 32, 3), np.uint8), "at least 1 frames"),
    ],
)
def test_what_is_no_video_is_refused(video: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(video)


def test_frames_of_another_size_are_refused() -> None:
    meter = Meter()
    meter.add(np.zeros((2, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match=r"frames of \(32, 32\) before, now of \(32, 48\)"):
        meter.add(np.zeros((2, 32, 48, 3), np.uint8))


def test_blocks_of_a_wide_picture() -> None:
    assert motion.reduction(480, 832) == 8
    assert motion.block_side(64, 64) == 8
    means = motion.block_means(np.arange(24, dtype=np.float32).reshape(1, 4, 6), 2)
    assert means[0].tolist() == [[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]]


# --- over time ----------------------------------------------------------------------------------------


def test_drift_is_the_slope_per_second() -> None:
    levels = 100 + 2 * np.arange(33)
    video = gray(np.broadcast_to(levels[:, None, None], (33, 16, 16)))
    assert summary(measure(video), FPS)["exposure_drift"] == pytest.approx(2 * FPS / 255, rel=1e-4)
    values = np.array([np.nan, 1.0, 3.0, np.nan, 7.0], np.float32)
    assert slope_per_second(values, 4.0) == pytest.approx(8)
    assert np.isnan(slope_per_second(values[:2], 4.0))


def test_seconds_are_whole_and_their_means_are_right() -> None:
    values = np.r_[np.nan, np.arange(1.0, 40.0)].astype(np.float32)
    assert per_second(values, 16.0) == pytest.approx([8.0, 23.5])
    assert per_second(values, 12.5) == pytest.approx([6.0, 18.0, 31.0])  # frames 0-11, 12-24, 25-37


def test_an_injected_seam_is_found_with_its_size() -> None:
    generator = np.random.default_rng(0)
    change = np.r_[np.nan, generator.uniform(0.9, 1.1, 128)].astype(np.float32)
    edges = list(range(9, 129, 12))
    none = seam(change, edges)
    assert none.low < 1 < none.high
    change[edges] *= 1.5
    found = seam(change, edges)
    assert found.ratio == pytest.approx(1.5, rel=0.05)
    assert found.low > 1.3
    assert found.high < 1.7
    assert found.edges == len(edges)


def test_growing_motion_is_no_seam_and_the_rhythm_of_latents_cancels() -> None:
    change = np.linspace(1, 9, 129, dtype=np.float32)
    edges, latents = list(range(9, 129, 12)), list(range(1, 129, 4))
    assert seam(change, edges).ratio == pytest.approx(1, abs=0.02)
    change[latents] *= 2
    assert seam(change, edges).ratio > 1.5
    assert seam(change, edges, latents).ratio == pytest.approx(1, abs=0.03)


def test_a_seam_needs_edges() -> None:
    change = np.ones(9, np.float32)
    assert np.isnan(seam(change, []).ratio)
    assert np.isnan(seam(change, [0, 9]).ratio)
    one = seam(change, [4])
    assert one.ratio == 1
    assert np.isnan(one.low)


# --- statistics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("degrees", "expected"), [(1, 12.7062), (2, 4.3027), (5, 2.5706), (30, 2.0423), (945, 1.9625)])
def test_quantiles_of_students_t(degrees: int, expected: float) -> None:
    assert t_quantile(0.975, degrees) == pytest.approx(expected, abs=1e-4)


def bootstrap_mean(values: np.ndarray) -> Interval:
    return bootstrap_columns(values[:, None])[0]


def test_the_bootstrap_agrees_with_students_t_on_normal_data() -> None:
    values = np.random.default_rng(3).normal(5, 2, 40)
    found = bootstrap_mean(values)
    half = t_quantile(0.975, 39) * values.std(ddof=1) / np.sqrt(40)
    assert found.mean == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.06)
    assert found.count == 40


def test_intervals_of_few_prompts_hold_the_truth_often_enough() -> None:
    data = np.random.default_rng(1).normal(size=(200, 8))
    held = [found.low <= 0 <= found.high for found in map(bootstrap_mean, data)]
    assert 0.92 <= np.mean(held) <= 0.985


def test_columns_leave_out_what_a_prompt_has_not() -> None:
    values = np.array([[1.0, np.nan, np.nan], [2.0, 4.0, np.nan], [6.0, 8.0, np.nan]])
    first, second, third = bootstrap_columns(values)
    assert (first.mean, second.mean, second.count, third.count) == (3.0, 6.0, 2, 0)
    assert np.isnan(third.mean)
    assert np.isnan(bootstrap_columns(values[:1])[0].low)


def test_a_statistic_of_means_is_resampled_as_one() -> None:
    values = np.random.default_rng(0).normal(size=(30, 2))
    product = bootstrap(values, lambda means: means[:, 0] * means[:, 1])
    assert product.mean == pytest.approx(values[:, 0].mean() * values[:, 1].mean())
    assert product.low < product.mean < product.high


def test_pairing_sees_what_lies_below_the_spread_of_prompts() -> None:
    generator = np.random.default_rng(2)
    first = generator.normal(0, 10, (24, 1))
    second = first + 0.5 + generator.normal(0, 0.2, (24, 1))
    found = paired_difference(first, second)
    assert found.mean == pytest.approx(0.5, abs=0.15)
    assert found.seen
    assert not paired_difference(first, generator.permutation(first)).seen


def test_too_few_prompts_show_no_difference() -> None:
    first = np.zeros((FEWEST, 1))
    second = np.linspace(1, 2, FEWEST)[:, None]
    assert paired_difference(first, second).seen
    assert not paired_difference(first[1:], second[1:]).seen


def test_unpaired_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="second: must be paired with the first"):
        paired_difference(np.zeros((3, 1)), np.zeros((4, 1)))
