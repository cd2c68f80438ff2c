"""Records the reference's classes of models in Flax and TensorFlow in `tests/data/transformers_classes.json`.

    python tests/oracle/make_class_names.py

The files are read and not imported: neither framework is needed.
"""

import ast
import json
from pathlib import Path

import transformers

DATA = Path(__file__).resolve().parent.parent / "data"
# Ends of names that are no models with a head, or none.
OTHERS = ("PreTrainedModel", "PretrainedModel", "MainLayer", "Layer", "Module", "Embeddings", "MAPPING", "WithLMHead")


def exported(path: Path) -> list[str]:
    """The names in a file's `__all__`."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def main() -> None:
    """Writes the record."""
    models = Path(transformers.__file__).parent / "models"
    record = {}
    for title, prefix in {"flax": "Flax", "tf": "TF"}.items():
        record[title] = {
            path.parent.name: sorted(
                name for name in exported(path) if name.startswith(prefix) and not name.endswith(OTHERS)
            )
            for path in sorted(models.glob(f"*/modeling_{title}_*.py"))
        }
    (DATA / "transformers_classes.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
