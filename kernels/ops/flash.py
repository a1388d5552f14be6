# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""Triton attention with an online softmax: scores never reach memory. Forward only.

Scores, softmax and sums are float32; probabilities are rounded to the values' dtype for the second product.
Source: FlashAttention-2, arXiv 2307.08691, algorithm 1.

Shape suffixes: B batch, L queries, M keys, H heads, K head channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) is exp2(x · log2 e), one instruction


@triton.jit
def _attention_kernel(
    query, key, value, score_bias, out, heads, queries, keys, channels, scale,
    query_b, query_l, query_h, key_b, key_l, key_h, value_b, value_l, value_h, bias_b,
    BIASED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64) // heads
    head = tl.program_id(1).to(tl.int64) % heads
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    row_inside = (row[:, None] < queries) & (channel[None, :] < channels)
    rows = tl.load(
        query + batch * query_b + head * query_h + row[:, None] * query_l + channel[None, :],
        mask=row_inside, other=0.0,
    )  # fmt: skip
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    attended = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(0, keys, COLUMNS):
        column = start + tl.arange(0, COLUMNS).to(tl.int64)
        column_inside = (column[:, None] < keys) & (channel[None, :] < channels)
        seen = tl.load(
            key + batch * key_b + head * key_h + column[:, None] * key_l + channel[None, :],
            mask=column_inside, other=0.0,
        )  # fmt: skip
        scores = tl.dot(rows, tl.trans(seen), input_precision="ieee") * scale
        if BIASED:
            bias = tl.load(score_bias + batch * bias_b + column, mask=column < keys, other=0.0)
            scores += bias.to(tl.float32)[None, :] * LOG2_E
        scores = tl.where(column[None, :] < keys, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        # Until a row has seen a key that counts, its maximum is −inf and −inf − (−inf) would be NaN.
        anchor = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        shares = tl.exp2(scores - anchor[:, None])
        kept = tl.exp2(highest - anchor)
        values = tl.load(
            value + batch * value_b + head * value_h + column[:, None] * value_l + channel[None, :],
            mask=column_inside, other=0.0,
        )  # fmt: skip
        attended = attended * kept[:, None] + tl.dot(shares.to(values.dtype), values, input_precision="ieee")
        total = total * kept + tl.sum(shares, axis=1)
        highest = new_highest
    attended = attended / tl.where(total == 0.0, 1.0, total)[:, None]
    place = ((batch * queries + row[:, None]) * heads + head) * channels + channel[None, :]
    tl.store(out + place, attended.to(out.dtype.element_ty), mask=row_inside)


def attention(query: Tensor, key: Tensor, value: Tensor, *, score_bias: Tensor | None = None) -> Tensor:
    """`reference.attention` without a mask: query [B, L, H, K]; key, value [B, M, H, K]; score_bias [B, M].

    K is a multiple of 16, at most 256. A row whose every score is −inf attends to nothing and becomes zero.
    """
    batch, queries, heads, channels = query.shape
    query, key, value = _dense_rows(query), _dense_rows(key), _dense_rows(value)
    bias = query if score_bias is None else _dense_rows(score_bias)  # without a bias the pointer is not read
    out = query.new_empty(batch, queries, heads, channels)
    tile = _tile(query, key.shape[1])
    scale = channels**-0.5 * LOG2_E.value
    with torch.cuda.device_of(query):
        _attention_kernel[(triton.cdiv(queries, tile["ROWS"]), batch * heads)](
            query, key, value, bias, out, heads, queries, key.shape[1], channels, scale,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], bias.stride(0),
            BIASED=score_bias is not None, **tile,
        )  # fmt: skip
    return out


def _dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _tile(query: Tensor, keys: int) -> dict[str, int]:
    """Rows and columns of a tile: fewer for wide heads and for float32, which take twice the memory."""
    channels = triton.next_power_of_2(query.shape[-1])
    large = channels <= 128 and query.dtype != torch.float32
    rows = min(128 if large else 32, max(16, triton.next_power_of_2(query.shape[1])))
    columns = min(64 if large else 32, max(16, triton.next_power_of_2(keys)))
    warps = 8 if rows == 128 and channels == 128 else 4
    stages = 2 if channels <= 128 else 1
    return {"ROWS": rows, "COLUMNS": columns, "CHANNELS": channels, "num_warps": warps, "num_stages": stages}
