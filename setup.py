"""Maps the top-level folders onto the `formax` package.

`lib/` is the package root and every other folder here is a sub-package of the same name. The list of packages is
computed from the tree: one missing from an explicit list would vanish from the wheel without a word.
"""

from setuptools import find_packages, setup

FOLDERS = {
    "formax": "lib",
    "formax.conversion": "conversion",
    "formax.layers": "layers",
    "formax.models": "models",
    "formax.training": "training",
}


def packages() -> list[str]:
    """Names every package under the mapped folders, the mapped ones included."""
    below = [f"{root}.{package}" for root, folder in FOLDERS.items() for package in find_packages(folder)]
    return [*FOLDERS, *below]


setup(packages=packages(), package_dir=FOLDERS)
