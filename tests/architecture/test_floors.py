"""The house rules: imports point down, third parties enter by their doors, the package list is the tree."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = {"kernels": {"kernels"}, "cluster": {"cluster"}, "actors": {"kernels", "cluster", "actors"}}
FLOORS["pipelines"] = {*FLOORS["actors"], "pipelines"}

NUMERIC = {"torch", "numpy", "safetensors"}
STORAGE = {"pyarrow", "pydantic", "yaml"}
# Third-party packages that a floor may import anywhere, and those that only some files may import.
ALLOWED = {
    "kernels": NUMERIC,
    "cluster": NUMERIC | STORAGE | {"ray", "rich"},
    "actors": NUMERIC | {"pyarrow"},
    "pipelines": NUMERIC | STORAGE | {"ray", "rich", "typer", "PIL", "matplotlib", "av"},
}
DOORS = {
    "deepspeed": {"cluster/zero.py"},
    "webdataset": {"cluster/shards.py"},
    "decord": {"actors/decoder.py"},
    "av": {"actors/decoder.py"},
    "diffusers": {"kernels/wan/vae.py", "pipelines/models.py"},
    "transformers": {"kernels/wan/text.py"},
    "tokenizers": {"kernels/wan/text.py"},
    "ftfy": {"kernels/wan/text.py"},
    "triton": {"kernels/ops/"},
    "lmdb": {"pipelines/lmdb_import.py"},
    "fastapi": {"pipelines/serve/"},
    "starlette": {"pipelines/serve/"},
    "websockets": {"pipelines/serve/viewers.py", "pipelines/serve/load.py"},
    "prometheus_client": {"pipelines/serve/metrics.py"},
    "torchao": {"actors/bench.py"},
}


def sources(floor: str) -> list[Path]:
    return sorted((ROOT / floor).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import in a file, wherever in the file it stands."""
    package = ["reelway", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield node.lineno, ".".join([*base, *filter(None, [node.module])])


def upward_arrows(floor: str) -> list[str]:
    found = []
    for path in sources(floor):
        for line, name in imports(path):
            parts = name.split(".")
            if parts[0] == "reelway" and len(parts) > 1 and parts[1] not in FLOORS[floor]:
                found.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return found


def foreign_imports(floor: str) -> list[str]:
    found = []
    for path in sources(floor):
        place = path.relative_to(ROOT).as_posix()
        for line, name in imports(path):
            top = name.split(".")[0]
            known = top == "reelway" or top in sys.stdlib_module_names or top in ALLOWED[floor]
            if not known and not any(place.startswith(door) for door in DOORS.get(top, ())):
                found.append(f"{place}:{line} imports {top}")
    return found


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_point_down(floor: str) -> None:
    assert upward_arrows(floor) == []


@pytest.mark.parametrize("floor", FLOORS)
def test_third_parties_enter_by_their_doors(floor: str) -> None:
    assert foreign_imports(floor) == []


def test_an_arrow_that_points_up_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels/wan").mkdir(parents=True)
    (tmp_path / "kernels/wan/bad.py").write_text("from ...cluster import shards\nimport ray\nfrom . import fine\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert upward_arrows("kernels") == ["kernels/wan/bad.py:1 imports reelway.cluster"]
    assert foreign_imports("kernels") == ["kernels/wan/bad.py:2 imports ray"]


def test_packages_of_pyproject_are_the_tree() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for floor in FLOORS for path in sources(floor)}
    folders |= {Path(floor) for floor in FLOORS}
    assert set(listed) == {"reelway", *(".".join(["reelway", *folder.parts]) for folder in folders)}


def test_the_four_folders_are_namespaces() -> None:
    """With an `__init__.py` in it, `kernels/` would hide the `kernels` package that transformers looks for."""
    assert [floor for floor in FLOORS if (ROOT / floor / "__init__.py").exists()] == []


def test_sub_packages_hold_a_docstring_only() -> None:
    for floor in FLOORS:
        for path in (ROOT / floor).rglob("__init__.py"):
            body = ast.parse(path.read_text()).body
            assert len(body) == 1, path
            assert isinstance(body[0], ast.Expr), path
