"""Runs an example script of transformers with the imports of its Flax models exchanged for those of formax.

The scripts are read where they lie (`examples/flax` of transformers 4, or a copy), and are no part of this repository.
It needs an environment with transformers 4.57.6, Flax, datasets and what else the script imports.

    python tests/oracle/run_examples.py run_clm_flax.py --model_type gpt2 --config_name FOLDER --train_file ...

What is exchanged is printed. `jax.tree_map`, which JAX no longer has, is given back to scripts of its time.
"""

import re
import sys
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parents[2]
# What says which model there is; tokenizers, arguments and the like stay transformers'.
OURS = re.compile(r"(Flax\w+|FLAX_MODEL\w*_MAPPING|CONFIG_MAPPING)$")
IMPORT = re.compile(r"^from transformers import \(\n(.*?)^\)\n", re.MULTILINE | re.DOTALL)


def exchanged(source: str) -> str:
    """The script with other imports, and otherwise as it is."""
    match = IMPORT.search(source)
    if match is None:
        raise SystemExit("the script has no `from transformers import (...)`")
    names = [name.strip() for name in match[1].split(",") if name.strip()]
    ours = [name for name in names if OURS.match(name)]
    rest = [name for name in names if name not in ours and name != "AutoConfig"]
    lines = [
        f"from transformers import {', '.join(rest)}",
        f"from formax.compat.flax import {', '.join(ours)}",
        "from formax import AutoConfig",
    ]
    print("\n".join(lines[1:]), file=sys.stderr)
    return source.replace(match[0], "\n".join(lines) + "\n")


def main() -> None:
    """See above."""
    script = Path(sys.argv[1])
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(ROOT / ".types"))
    if not hasattr(jax, "tree_map"):
        jax.tree_map = jax.tree.map  # type: ignore[attr-defined]
    code = compile(exchanged(script.read_text(encoding="utf-8")), str(script), "exec")
    exec(code, {"__name__": "__main__", "__file__": str(script)})


if __name__ == "__main__":
    main()
