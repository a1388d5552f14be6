"""The numbers run where only torch, numpy and safetensors are installed."""

import subprocess
import sys

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
import importlib, sys, traceback
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"diffusers", "transformers", "triton", "ray", "deepspeed", "pyarrow", "pydantic"}:
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Refuse())
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
    except ImportError:
        traceback.print_exc()
        print(module)
"""


def test_imports_need_only_torch_numpy_safetensors() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *LEAN], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
