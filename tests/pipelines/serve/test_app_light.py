"""What starts with the server, and is to start at once."""

import subprocess
import sys


def test_gateways_and_the_pool_do_without_torch() -> None:
    """Each of them is a process; only the workers need the libraries of networks, which take seconds to import."""
    script = "import sys, reelway.pipelines.serve.app; print(*sys.modules)"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "diffusers"} & set(printed.split())
