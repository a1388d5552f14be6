"""The `reelway` command as a whole: exit codes, and one line for every mistake."""

import subprocess
import sys

import pytest


def reelway(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "reelway.pipelines.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "No such command 'nope'."),
        (["--nope"], "No such option: --nope"),
        (["sprites", "nope"], "No such command 'nope'."),
        (["demo", "--recipe", "nope.yaml"], "--recipe: no such file"),
        (["sprites", "grade"], "Missing argument"),
        (["bench", "--config", "nope"], "--config: must be one of tiny"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    done = reelway(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("reelway: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["demo", "--help"], ["sprites", "sheet", "--help"]])
def test_asking_for_help_is_no_mistake(arguments: list[str]) -> None:
    done = reelway(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_a_group_without_a_command_shows_its_help() -> None:
    done = reelway("sprites")
    assert done.returncode == 2
    assert "sheet" in done.stdout + done.stderr
