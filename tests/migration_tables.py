"""The tables of classes in `docs/migrating-from-*.md`, as the table of families has them.

    python tests/migration_tables.py

writes them; `tests/test_compat_flax.py` checks that they are as they would be written.
"""

import json
from pathlib import Path

from formax.compat import names
from formax.core.family import Architecture, Family

# What `oracle/make_class_names.py` found in the reference: {framework: {model type: names}}.
RECORD = json.loads((Path(__file__).resolve().parent / "data" / "transformers_classes.json").read_text())
DOCS = Path(__file__).resolve().parent.parent / "docs"
# Page -> (before the names of its classes, the field of a family that says what there was).
PAGES = {"migrating-from-flax.md": ("Flax", "flax"), "migrating-from-tensorflow.md": ("TF", "tf")}
BEGIN, END = "<!-- table: written by `python tests/migration_tables.py` -->\n", "<!-- end of the table -->\n"


def cells(family: Family, prefix: str, framework: str) -> tuple[str, str]:
    """Names of the classes that transformers had, and of those that are new; after the first in short."""
    short = family.architectures[0].name.removesuffix("Model")
    recorded = {name for found in RECORD[framework].values() for name in found}
    both = {architecture.name: class_names(family, architecture, prefix) for architecture in family.architectures}
    had = [next(filter(recorded.__contains__, found)) for found in both.values() if recorded & {*found}]
    new = [found[0] for found in both.values() if not recorded & {*found}]

    def listed(found: list[str]) -> str:
        rest = (f"`{name.removeprefix(prefix + short)}`" for name in found[1:])
        return ", ".join([*(f"`{name}`" for name in found[:1]), *rest]) or "-"

    return listed(had), listed(new)


def class_names(family: Family, architecture: Architecture, prefix: str) -> list[str]:
    """The names of an architecture's class, the proper one first."""
    older = [old for old, name in family.old_names.items() if name == architecture.name]
    return [f"{prefix}{name}" for name in (architecture.name, *older)]


def table(prefix: str, framework: str) -> str:
    """The table of a page."""
    lines = ["| model type | in transformers 4.57 | in formax besides |", "|---|---|---|"]
    lines += [f"| `{one.model_type}` | {' | '.join(cells(one, prefix, framework))} |" for one in names.families()]
    autos = ", ".join(f"`{prefix}{name}`" for name in sorted(names.tasks()))
    return "\n".join(lines) + f"\n\nAuto classes: {autos}.\n\n"


def written(page: str) -> str:
    """The text of a page with its table as it is now."""
    text = (DOCS / page).read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(*PAGES[page])}{END}{after}"


if __name__ == "__main__":
    for one in PAGES:
        (DOCS / one).write_text(written(one), encoding="utf-8")
