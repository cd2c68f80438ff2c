"""What an import costs beyond the import of the array library it stands on, in fresh processes.

The clock runs inside the process, from its first statement to the end of the imports: the start of the interpreter does
not count.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from functools import partial

from benchmarks.harness import BenchmarkError, Lab, environment, run, tell
from benchmarks.tables import Section, Spread, target

# Asked for: seconds of `import formax` beyond `import jax`.
LONGEST = 0.3
PROGRAM = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


@dataclass(frozen=True)
class Import:
    """Statements to time, in a framework's environment, beside those of `base` in the same environment."""

    name: str
    framework: str
    statements: str
    base: str | None = None


IMPORTS = (
    Import("jax", "formax", "import jax"),
    Import("jax, formax", "formax", "import jax, formax", "jax"),
    Import("jax, formax.from_pretrained", "formax", "import jax, formax; formax.from_pretrained", "jax"),
    Import("torch", "torch", "import torch"),
    Import("torch, transformers.BertModel", "torch", "import torch; from transformers import BertModel", "torch"),
    Import("jax (HF Flax)", "flax", "import jax"),
    Import(
        "jax, transformers.FlaxBertModel (HF Flax)",
        "flax",
        "import jax; from transformers.models.bert.modeling_flax_bert import FlaxBertModel",
        "jax (HF Flax)",
    ),
)


def seconds_of(lab: Lab, one: Import) -> float:
    """Runs the statements in a fresh process.

    Raises:
        BenchmarkError: they fail; the message is the error's last line.
    """
    finished = subprocess.run(
        [lab.pythons[one.framework], "-c", PROGRAM.format(one.statements)],
        cwd=lab.folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise BenchmarkError(f"{one.name}: {finished.stderr.strip().splitlines()[-1]}")
    return float(finished.stdout.split()[-1])


def able(lab: Lab, one: Import) -> bool:
    """Tries the statements, which also compiles their bytecode; keeps the reason if they fail."""
    try:
        seconds_of(lab, one)
    except BenchmarkError as error:
        if one.framework == "formax":
            raise
        lab.unavailable[f"import of {one.name}"] = str(error)
        return False
    return True


def measure(lab: Lab) -> Section:
    """Times all imports that are possible here."""
    tell("import time")
    possible = [one for one in IMPORTS if able(lab, one)]
    seconds = lab.rounds_of({one.name: partial(seconds_of, lab, one) for one in possible})
    rows, targets = [], []
    for one in possible:
        beyond = ""
        if one.base is not None:
            spread = Spread.of([a - b for a, b in zip(seconds[one.name], seconds[one.base], strict=True)])
            beyond = spread.seconds()
            if one.framework == "formax":
                targets.append(target(f"seconds of {one.name} beyond jax", spread.median, LONGEST, at_least=False))
        rows.append((one.name, Spread.of(seconds[one.name]).seconds(), beyond))
    return Section("Import", ("import", "time", "beyond the first"), rows, {"seconds": seconds}, ["\n".join(targets)])


if __name__ == "__main__":
    run({"import_time": measure})
