"""Laws of the house: imports run one way, planning is light, files stay small, nothing names the machine it was written on."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import find_data

ROOMS = {"grid": 3, "trainers": 2, "datasets_ray": 1}
FORBIDDEN = {"trainers": {"mlflow", "yaml"}, "datasets_ray": {"torch", "mlflow", "yaml", "deepspeed"}}
"""`datasets_ray` may not import torch even inside functions; `ray.tune` is checked apart."""
READS_YAML = "datasets_ray/yamlfile.py"
"""The one reader of YAML, for studies and profiles and, in the lowest room, for benchmark files."""


def _files(repository: Path) -> list[Path]:
    return [p for room in ROOMS for p in sorted((repository / room).rglob("*.py"))]


def _imports(tree: ast.AST) -> list[str]:
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def test_imports_run_one_way(repository: Path) -> None:
    wrong = []
    for path in _files(repository):
        room = path.relative_to(repository).parts[0]
        for name in _imports(ast.parse(path.read_text())):
            top = name.split(".")[0]
            allowed = top == "yaml" and path == repository / READS_YAML
            forbidden = top in FORBIDDEN.get(room, set()) and not allowed
            if ROOMS.get(top, 0) > ROOMS[room] or forbidden or (room != "grid" and name.startswith("ray.tune")):
                wrong.append(f"{path.relative_to(repository)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_files_have_one_purpose_and_say_it(repository: Path) -> None:
    for path in _files(repository):
        text = path.read_text()
        assert ast.get_docstring(ast.parse(text)), f"{path} has no first docstring"
        assert text.count("\n") <= 330, f"{path} has {text.count(chr(10))} lines"


def test_every_cross_room_import_exists(repository: Path) -> None:
    """A name imported from our own rooms is a module or is defined there."""
    wrong = []
    for path in _files(repository):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ROOMS and node.level == 0:
                base = repository.joinpath(*node.module.split("."))
                source = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
                if not source.is_file():
                    wrong.append(f"{path.name}: no module {node.module}")
                    continue
                text = source.read_text()
                wrong += [
                    f"{path.name}: {node.module} has no {a.name}"
                    for a in node.names
                    if a.name not in text and not (base / f"{a.name}.py").is_file() and not (base / a.name).is_dir()
                ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", ["grid", "grid.cli", "grid.plan", "grid.run", "grid.report", "grid.status", "trainers", "datasets_ray"])
def test_importing_is_light(module: str, repository: Path) -> None:
    heavy = ("torch", "ray", "transformers", "deepspeed", "mlflow", "matplotlib")
    code = f"import {module}, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_no_paths_of_this_machine(repository: Path) -> None:
    kinds, skipped = {".py", ".md", ".yaml", ".toml", ".csv", ".json"}, {".venv", ".git", "runs", ".cache"}
    ours = [p for p in repository.rglob("*") if p.suffix in kinds and p.is_file() and not skipped & set(p.parts)]
    names = [str(place.resolve()) for place in (repository, Path.home() / ".cache", find_data()) if place is not None]
    assert not [str(p) for p in ours if any(name in p.read_text(errors="ignore") for name in names)]
