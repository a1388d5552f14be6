"""The `reelway` command as a whole: exit codes, and one line for every mistake."""

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from reelway.pipelines.cli import main


def reelway(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "reelway.pipelines.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def reelway_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in this process, which has imported the libraries for other tests already."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["reelway", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
    return subprocess.CompletedProcess(arguments, int(end.value.code or 0), out.getvalue(), err.getvalue())


MISTAKES = [
    (["nope"], "No such command 'nope'."),
    (["--nope"], "No such option: --nope"),
    (["sprites", "nope"], "No such command 'nope'."),
    (["demo", "--recipe", "nope.yaml"], "--recipe: no such file"),
    (["sprites", "grade"], "Missing argument"),
    (["bench", "--config", "nope"], "--config: must be one of tiny"),
]


def check_mistake(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("reelway: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    check_mistake(reelway_here(*arguments), message)


@pytest.mark.parametrize(("arguments", "message"), [MISTAKES[0], MISTAKES[3]])
def test_a_mistake_is_one_line_to_the_shell_too(arguments: list[str], message: str) -> None:
    """Nothing that is imported on the way has a word to say: the demo's command imports nearly everything."""
    check_mistake(reelway(*arguments), message)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["demo", "--help"], ["sprites", "sheet", "--help"]])
def test_asking_for_help_is_no_mistake(arguments: list[str]) -> None:
    done = reelway_here(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_help_in_the_shell() -> None:
    done = reelway("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "rollout" in done.stdout


def test_a_group_without_a_command_shows_its_help() -> None:
    done = reelway_here("sprites")
    assert done.returncode == 2
    assert "sheet" in done.stdout + done.stderr
