"""Mixed precision only where the device is fast in it."""

import pytest
import torch

from reelway.kernels.precision import autocast, fast_dtype


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [("DEFAULT", torch.float32), ("AVX2", torch.float32), ("AVX512", torch.bfloat16)],
)
def test_a_cpu_computes_in_bfloat16_only_where_it_has_the_instructions(
    capability: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert fast_dtype("cpu") == dtype
    weights = torch.eye(8)
    with autocast("cpu"):
        assert (weights @ weights).dtype == dtype
    with autocast("cpu", enabled=False):
        assert (weights @ weights).dtype == torch.float32


def test_a_gpu_computes_in_bfloat16() -> None:
    assert fast_dtype(torch.device("cuda", 0)) == torch.bfloat16
