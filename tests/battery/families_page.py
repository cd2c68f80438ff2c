"""`docs/families.md`: what the battery measured, as a page.

    pytest tests/battery --families-page

writes it, once every golden's outputs, files and steps were tried; of FORMAX_FAMILIES alone, if that is set, whose
lines then come to those of the others. Without the option the suite checks that the page names the families and heads
that there are (`test_families_page.py`); the figures are those of the last writing.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from battery.goldens import goldens
from formax.core import registry
from formax.core.family import Family

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
INTRODUCTION = """# Families

Every family of formax, as the test battery found it; the code of each is `models/<kind>/<family>.py`. Heads are classes
of transformers; *relative* is the family that it is a small step from. Goldens are checkpoints, small and with every
switch of the configuration set somewhere, of which transformers 4.57.6 on PyTorch computed the outputs. *Parity* is the
largest difference from those outputs, over the output's standard deviation, in float32, of all goldens; *steps* is the
same for decoding token by token with a cache. *Export* says whether what formax saves is the file that transformers
saves: names, shapes, dtypes and bits.

"""
CLOSING = """
This page is written by the battery: `pytest tests/battery --families-page`. [Testing](testing.md) says what the battery
does. A family of your own can be [registered](own-family.md) and opens through the same Auto classes.
"""


@dataclass
class Measures:
    """What was measured of one family: {golden: error}, and the goldens whose files were right."""

    parity: dict[str, float] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)
    export: set[str] = field(default_factory=set)


MEASURES: dict[str, Measures] = defaultdict(Measures)


def families() -> dict[str, list[Family]]:
    """The families by the name of their module, which is also that of their goldens' folder."""
    out: dict[str, list[Family]] = defaultdict(list)
    for model_type, place in registry.MODULES.items():
        out[place.partition(":")[0].rpartition(".")[2]].append(registry.family(model_type))
    return dict(sorted(out.items()))


def heads(group: Iterable[Family]) -> list[str]:
    """Class names of all architectures; after the first, without what they have in common."""
    names = [arch.name for family in group for arch in family.architectures]
    shared = names[0]
    while not all(name.startswith(shared) for name in names):
        shared = shared[:-1]
    return [names[0], *(name.removeprefix(shared) or name for name in names[1:])]


def row(name: str, group: list[Family], measures: Measures | None) -> str:
    """A family's line of the table; without figures when there are no `measures`."""
    place = next(p for p in registry.MODULES.values() if p.partition(":")[0].endswith(f".{name}"))
    kind = place.split(".")[2]
    types = ", ".join(f"`{family.model_type}`" for family in group)
    relative = ", ".join(sorted({family.relative for family in group if family.relative})) or "-"
    cells = [name, kind, types, ", ".join(heads(group)), relative]
    if measures is not None:
        mine = [str(golden) for golden in goldens() if golden.family_name == name]
        exported = "bit for bit" if measures.export == set(mine) else f"{len(measures.export)} of {len(mine)}"
        steps = f"{max(measures.steps.values()):.0e}" if measures.steps else "-"
        cells += [str(len(mine)), f"{max(measures.parity.values()):.0e}", steps, exported]
    return "| " + " | ".join(cells) + " |"


def unmeasured() -> list[str]:
    """Goldens whose outputs or files this run did not find right."""
    right = {name for found in MEASURES.values() for name in found.parity.keys() & found.export}
    return [str(golden) for golden in goldens() if str(golden) not in right]


def page() -> str:
    """The page with what was measured in this run, and of other families what it has.

    Raises:
        ValueError: a family that was not measured, and is not on the page.
    """
    written = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.is_file() else []
    held = {line.split(" | ")[0].removeprefix("| "): line for line in written if line.startswith("| ")}
    if new := families().keys() - MEASURES.keys() - held.keys():
        raise ValueError(f"docs/families.md has no line of {', '.join(sorted(new))}, which this run did not measure")
    columns = ("family", "kind", "model types", "heads", "relative", "goldens", "parity", "steps", "export")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for name, group in families().items():
        lines.append(row(name, group, MEASURES[name]) if name in MEASURES else held[name])
    return INTRODUCTION + "\n".join(lines) + "\n" + CLOSING
