"""Masks frame by frame, and the proof that no later frame reaches an earlier one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reelway.kernels.causal.masks import FrameMask, bidirectional, block_causal, block_sizes, teacher_forcing
from reelway.kernels.ops.reference import attention
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
MASKS = {
    "block_causal": block_causal(9, 3),
    "first_block": block_causal(9, 4, first_block=1),
    "window": block_causal(12, 3, window=6),
    "sink": block_causal(12, 3, window=7, sink=1),
}


def network() -> VideoTransformer:
    torch.manual_seed(0)
    return VideoTransformer(CONFIG).requires_grad_(False)


def test_block_causal_table() -> None:
    expected = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert block_causal(4, 2).allowed.int().tolist() == expected


def test_window_counts_the_block_and_the_sink() -> None:
    row = block_causal(12, 3, window=7, sink=1).allowed[-1].int().tolist()
    assert row == [1] + [0] * 5 + [1] * 6


def test_teacher_forcing_table() -> None:
    mask = teacher_forcing(4, 2)
    assert mask.allowed[:4, 4:].sum() == 0
    assert mask.allowed[6].int().tolist() == [1, 1, 0, 0, 0, 0, 1, 1]
    assert mask.frame_positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


@given(block=st.integers(1, 4), first=st.integers(1, 4), blocks=st.integers(0, 5), tokens=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_grouped_attention_equals_masked_attention(block: int, first: int, blocks: int, tokens: int) -> None:
    frames = first + block * blocks
    window = max(block, first) + 2
    for mask in (
        block_causal(frames, block, first_block=first, window=window, sink=1),
        bidirectional(frames),
    ):
        generator = torch.Generator().manual_seed(frames)
        query, key, value = torch.randn(3, 2, frames * tokens, 2, 4, dtype=torch.float64, generator=generator)
        expected = attention(query, key, value, mask=mask.tokens(tokens))
        torch.testing.assert_close(mask.attend(0, query, key, value), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MASKS)
def test_changing_a_later_frame_changes_no_earlier_bit(name: str) -> None:
    mask, model = MASKS[name], network()
    frames = len(mask.allowed)
    latents = torch.randn(1, frames, 4, 4, 4)
    timesteps = torch.rand(1, frames) * 1000
    text = TextContext.fold([torch.randn(3, 16)])
    before = model(latents, timesteps, text, mask)
    for changed in range(1, frames):
        latents_2, timesteps_2 = latents.clone(), timesteps.clone()
        latents_2[:, changed] += 1
        timesteps_2[:, changed] = 3.0
        after = model(latents_2, timesteps_2, text, mask)
        blind = ~mask.allowed[:, changed]
        for _ in range(CONFIG.num_layers - 1):  # what a frame sees, sees further
            blind &= ~(mask.allowed[:, ~blind].any(dim=1))
        assert blind[0] or mask.allowed[0, changed]
        assert torch.equal(before[:, blind], after[:, blind])
        assert not torch.equal(before[:, changed], after[:, changed])


def test_teacher_forcing_noisy_frames_reach_no_other_block_and_no_clean_frame() -> None:
    mask, model = teacher_forcing(6, 2), network()
    latents = torch.randn(1, 12, 4, 4, 4)
    timesteps = torch.cat((torch.zeros(1, 6), torch.full((1, 6), 700.0)), dim=1)
    text = TextContext.fold([torch.randn(3, 16)])
    before = model(latents, timesteps, text, mask)
    latents[:, 8] += 1  # the first frame of the second noisy block
    after = model(latents, timesteps, text, mask)
    same = [index for index in range(12) if index not in (8, 9)]
    assert torch.equal(before[:, same], after[:, same])
    assert not torch.equal(before[:, 9], after[:, 9])


def test_window_as_long_as_the_clip_equals_full() -> None:
    model = network()
    latents, timesteps = torch.randn(1, 9, 4, 4, 4), torch.rand(1, 9) * 1000
    text = TextContext.fold([torch.randn(3, 16)])
    full = model(latents, timesteps, text, block_causal(9, 3))
    assert torch.equal(model(latents, timesteps, text, block_causal(9, 3, window=9, sink=3)), full)
    assert not torch.equal(model(latents, timesteps, text, block_causal(9, 3, window=6, sink=3)), full)


def test_one_block_as_long_as_the_clip_is_bidirectional() -> None:
    model = network()
    latents, timesteps = torch.randn(1, 4, 4, 4, 4), torch.rand(1, 4) * 1000
    text = TextContext.fold([torch.randn(3, 16)])
    torch.testing.assert_close(
        model(latents, timesteps, text),
        model(latents, timesteps, text, block_causal(4, 4)),
        rtol=1e-5,
        atol=1e-6,
    )


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"frames: 8 latent frames are not 3 and then whole blocks of 3"):
        block_causal(8, 3)
    with pytest.raises(ValueError, match=r"window: must hold the sink \(3\) and a block \(3\), got 5"):
        block_causal(9, 3, window=5, sink=3)
    with pytest.raises(ValueError, match=r"mask: made for 9 latent frames, got 6"):
        block_causal(9, 3).positions(6)
    assert block_sizes(21, 4, 1) == [1, 4, 4, 4, 4, 4]


def test_rows_with_gaps_are_gathered() -> None:
    allowed = torch.tensor([[True, False, True], [False, True, False], [True, True, True]])
    mask = FrameMask(allowed, torch.arange(3, dtype=torch.float64))
    query, key, value = torch.randn(3, 1, 6, 1, 4, dtype=torch.float64)
    expected = attention(query, key, value, mask=mask.tokens(2))
    torch.testing.assert_close(mask.attend(0, query, key, value), expected, rtol=1e-12, atol=1e-12)
