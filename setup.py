"""Maps the top-level folders onto the `formax` package.

`lib/` is the package root and every other folder here is a sub-package of the same name. The list of packages is
computed from the tree: one missing from an explicit list would vanish from the wheel without a word.
"""

from setuptools import find_packages, setup

FOLDERS = {
    "formax": "lib",
    "formax.layers": "layers",
    "formax.models": "models",
    "formax.conversion": "conversion",
    "formax.training": "training",
}


def packages() -> list[str]:
    return [name for root, folder in FOLDERS.items() for name in (root, *(f"{root}.{sub}" for sub in find_packages(folder)))]


setup(packages=packages(), package_dir=FOLDERS)
