"""The numbers run where only torch, numpy and safetensors are installed."""

import subprocess
import sys

import pytest

LEAN = [
    "reelway.kernels.wan.transformer",
    "reelway.kernels.wan.weights",
    "reelway.kernels.causal.generator",
    "reelway.kernels.diffusion.sampler",
    "reelway.kernels.objectives.dmd",
    "reelway.kernels.objectives.self_forcing",
    "reelway.kernels.sprites.render",
    "reelway.kernels.sprites.oracle",
]
SCRIPT = """
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"diffusers", "transformers", "triton", "ray", "deepspeed", "pyarrow", "pydantic"}:
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Refuse())
importlib.import_module(sys.argv[1])
"""


@pytest.mark.parametrize("module", LEAN)
def test_import_needs_only_torch_numpy_safetensors(module: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, module], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
