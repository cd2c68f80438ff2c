"""A real checkpoint, all-MiniLM-L6-v2: its tokens, hidden states and sentence embeddings are the reference's."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import text_models

import formax
from battery.goldens import ROOT

ABSOLUTE = 1e-5


@pytest.fixture(scope="module")
def folder() -> Path:
    return text_models.minilm()


@pytest.fixture(scope="module")
def golden(folder: Path) -> dict[str, Any]:
    meta = json.loads((ROOT / "real" / "minilm.json").read_text(encoding="utf-8"))
    for name, digest in meta["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, f"{name} is not the golden's"
    with np.load(ROOT / "real" / "minilm.npz") as file:
        return {**meta, **file}


def test_hidden_states(folder: Path, golden: dict[str, Any]) -> None:
    model = formax.from_pretrained(folder)
    inputs = {name: golden[f"in.{name}"] for name in ("input_ids", "attention_mask", "token_type_ids")}
    out = model(**inputs, output_hidden_states=True)
    rows, places = np.arange(len(golden["sentences"]))[:, None], golden["at.positions"]
    assert len(out.hidden_states) == 7
    for i, states in enumerate(out.hidden_states):
        np.testing.assert_allclose(
            np.asarray(states)[rows, places],
            golden[f"out.hidden_states.{i}"],
            rtol=0,
            atol=ABSOLUTE,
            err_msg=f"layer {i}",
        )
    np.testing.assert_allclose(out.pooler_output, golden["out.pooler_output"], rtol=0, atol=ABSOLUTE)

    mask = inputs["attention_mask"][..., None]
    mean = (np.asarray(out.last_hidden_state) * mask).sum(1) / mask.sum(1)
    embeddings = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(embeddings, golden["out.embeddings"], rtol=0, atol=ABSOLUTE)


def test_token_ids(folder: Path, golden: dict[str, Any]) -> None:
    batch = formax.AutoTokenizer.from_pretrained(folder)(golden["sentences"], padding=True)
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        np.testing.assert_array_equal(batch[name], golden[f"in.{name}"], err_msg=name)
