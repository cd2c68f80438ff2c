"""Records the defaults of the reference's configurations, `tests/data/config_defaults.json`.

    python tests/oracle/make_config_defaults.py [--check]

{model type: {field: value}} of every family that formax has; composite ones have none, for they are made of others.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parents[1] / "data" / "config_defaults.json"
# What says where a configuration came from.
ASIDE = ("_name_or_path", "architectures", "model_type", "transformers_version")


def defaults(model_type: str) -> dict[str, Any] | None:
    """The fields of a configuration without arguments; None if there can be none."""
    from transformers import AutoConfig

    try:
        made = AutoConfig.for_model(model_type)
    except ValueError:  # made of others, which must be given
        return None
    found = json.loads(json.dumps(made.to_dict(), default=str))
    return {name: value for name, value in found.items() if name not in ASIDE}


def main() -> int:
    """Writes the file, or with `--check` says whether it is as it would be written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_types", nargs="*", help="of formax's registry; those in the file by default")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    held = json.loads(TARGET.read_text()) if TARGET.is_file() else {}
    found = {name: defaults(name) for name in sorted({*held, *given.model_types})}
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found.items() if value is not None]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    if given.check:
        same = TARGET.read_text() == text
        print("as it would be written" if same else "would be written otherwise")
        return 0 if same else 1
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
