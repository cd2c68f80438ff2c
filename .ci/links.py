"""Makes `.types/formax`, a folder of links in which the tree looks the way Python imports it.

An install maps `lib/` onto `formax` and `layers/` onto `formax.layers`; tools that only read files (mypy, pyright,
import-linter, the API reference) know nothing of that map, so they are given this folder as their search path.
"""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUBPACKAGES = ("conversion", "layers", "models", "training")


def make(root: Path = ROOT) -> Path:
    """Makes the links afresh, so that none outlives its target, and returns the search path (`<root>/.types`)."""
    search_path = root / ".types"
    package = search_path / "formax"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    children = [path for path in (root / "lib").iterdir() if path.name != "__pycache__"]
    for target in (*children, *(root / name for name in SUBPACKAGES)):
        (package / target.name).symlink_to(Path("../..") / target.relative_to(root))
    return search_path


if __name__ == "__main__":
    make()
