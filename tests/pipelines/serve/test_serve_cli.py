"""`reelway serve`: its commands, and one line for every mistake."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from reelway.pipelines.serve import app as application
from reelway.pipelines.serve.commands import app
from reelway.pipelines.serve.config import ServeConfig, check_access, fleets, make_config, read_config
from reelway.pipelines.serve.keys import Keyring, hash_of, make_key
from reelway.pipelines.serve.protocol import document


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def write(folder: Path, **content: Any) -> Path:
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_key_is_made_with_its_hash() -> None:
    lines = run("key", "--name", "Ada").stdout.splitlines()
    key = lines[0].split()[-1]
    assert hash_of(key) in lines[1]
    assert lines[1].endswith("# Ada")
    assert run("key").stdout != run("key").stdout


def test_the_protocol_is_printed() -> None:
    assert run("protocol").stdout == document()


def test_a_configuration_is_checked(tmp_path: Path, small_student: Path) -> None:
    done = run("check", str(write(tmp_path, models={"one": {"path": str(small_student), "max_workers": 3}})))
    assert done.exit_code == 0, done.output
    assert "model one" in done.stdout
    assert "1 to 3 workers" in done.stdout
    assert "no API keys: this machine only" in done.stdout


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "models: "),
        ({"models": {"one": {"path": "x"}}, "prot": 1}, "prot: "),
        ({"models": {"one": {"path": "x", "workers": 1}}}, "models.one.workers: "),
        ({"models": {"one": {"path": "x", "min_workers": 3}}}, "min_workers 3 is over max_workers 1"),
        ({"models": {"one": {"path": "x", "min_workers": 0}}}, "min_workers 0 needs size"),
        ({"models": {"one": {"path": "x", "device": "cuda"}}}, "device cuda needs gpus"),
        ({"models": {"a b": {"path": "x"}}}, "a model's name"),
        ({"models": {"one": {"path": "x"}}, "limits": {"queue": -1}}, "limits.queue: "),
        ({"models": {"one": {"path": "x"}}, "cors": ["*"]}, "an origin is like"),
        ({"models": {"one": {"path": "x"}}, "host": "0.0.0.0"}, "without API keys"),
        ({"models": {"one": {"path": "x"}}, "keys": "nowhere"}, "nowhere: no such file"),
    ],
)
def test_a_wrong_configuration_is_one_line(tmp_path: Path, content: dict[str, Any], words: str) -> None:
    done = run("check", str(write(tmp_path, **content)))
    assert isinstance(done.exception, ValueError | OSError)
    assert words in str(done.exception)
    assert len(str(done.exception).splitlines()) == 1


def test_no_file_and_no_yaml_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="not YAML"):
        read_config(tmp_path / "bad.yaml")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    check_access(make_config({"models": {"one": {"path": "x"}}, "host": host}, "test"), has_keys=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_any_other_host_does(host: str) -> None:
    config = make_config({"models": {"one": {"path": "x"}}, "host": host}, "test")
    check_access(config, has_keys=True)
    with pytest.raises(ValueError, match="host: without API keys"):
        check_access(config, has_keys=False)
    with pytest.raises(ValueError, match="host: without API keys"):
        application.build(config, Keyring())


def test_the_pool_is_made_from_the_configuration() -> None:
    model = {"path": "x", "max_workers": 4, "cpus": 2.5, "stream_gb": 1.5, "memory_gb": 4, "sessions": 7}
    config = make_config({"models": {"one": model}, "limits": {"queue": 9}, "idle_seconds": 5}, "test")
    fleet = fleets(config)["one"]
    assert (fleet.min_workers, fleet.max_workers, fleet.cpus, fleet.memory, fleet.queue) == (1, 4, 2.5, 4 * 10**9, 9)
    assert (fleet.worker.threads, fleet.worker.budget, fleet.worker.sessions) == (2, 1_500_000_000, 7)
    assert fleet.idle_seconds == 5


def test_a_serve_config_says_the_same(tmp_path: Path) -> None:
    _, hashed = make_key()
    (tmp_path / "keys").write_text(hashed)
    content = {"models": {"one": {"path": "/models/one"}}, "host": "0.0.0.0", "keys": str(tmp_path / "keys")}
    done = run("deploy", str(write(tmp_path, **content)), "--print")
    printed = yaml.safe_load(done.stdout)
    (row,) = printed["applications"]
    assert printed["http_options"] == {"host": "0.0.0.0", "port": 8000}
    assert row["import_path"] == "reelway.pipelines.serve.app:application"
    assert ServeConfig.model_validate(row["args"]) == ServeConfig.model_validate(content)
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(printed)  # what `serve deploy` and KubeRay check


def test_mistakes_of_the_command_line(tmp_path: Path, small_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = write(tmp_path, models={"one": {"path": "x"}})
    (teacher := tmp_path / "teacher").mkdir()
    for arguments, words in (
        ([], "--model: at least one"),
        (["--model", "/nowhere"], "no such folder"),
        (["--config", str(tmp_path / "none.yaml")], "no such file"),
        (["--config", str(config)], "model one: x: no such folder"),
        (["--config", str(config), "--port", "9000"], "--config: goes without other options, got --port"),
        (["deploy", str(write(teacher, models={"one": {"path": str(small_teacher)}}))], "no student.json"),
        (["--model", str(small_teacher)], "no student.json"),
        (["--model", "x", "--host", "0.0.0.0"], "without API keys"),
        (["deploy", str(config)], "--address"),
        (["upgrade", "one", "--path", "x"], "goes with --config"),
    ):
        done = run(*arguments)
        assert words in str(done.exception), arguments


def test_a_port_that_is_taken_is_told_before_anything_starts(small_student: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("--model", str(small_student), "--port", str(taken.getsockname()[1]))
    assert "cannot be bound to" in str(done.exception)
