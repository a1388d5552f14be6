"""What the README shows runs."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_library_example_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for code in blocks:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr


def test_every_command_is_in_the_readme() -> None:
    from reelway.pipelines.cli import COMMANDS

    missing = [name for name in COMMANDS if f"`reelway {name}`" not in (ROOT / "README.md").read_text()]
    assert missing == []
