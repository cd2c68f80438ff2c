"""The documented extension point: a family in one file outside the package opens through the Auto classes."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import formax
from formax.core import registry
from formax.core.registry import UnknownModelTypeError

PAGE = Path(__file__).resolve().parent.parent / "docs" / "own-family.md"
IDS = np.arange(24).reshape(2, 12)


@pytest.fixture
def convtext(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The page's first block as the file that it says it is, imported."""
    block = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    (tmp_path / "convtext.py").write_text(block[1], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_registered", {})
    yield importlib.import_module("convtext")
    del sys.modules["convtext"]


def test_it_opens_through_every_auto_class_that_it_serves(convtext: Any, tmp_path: Path) -> None:
    config = formax.AutoConfig.for_model("convtext", num_labels=3, window=3)
    model = formax.AutoModelForSequenceClassification.from_config(config, key=jax.random.key(0))
    model.save_pretrained(tmp_path / "saved")
    assert formax.AutoConfig.from_pretrained(tmp_path / "saved") == config.replace(
        architectures=("ConvTextForSequenceClassification",), dtype="float32"
    )
    for again in (
        formax.from_pretrained(tmp_path / "saved"),
        formax.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved"),
    ):
        np.testing.assert_array_equal(again(IDS).logits, model(IDS).logits)
    bare = formax.AutoModel.from_pretrained(tmp_path / "saved")
    assert bare(IDS).last_hidden_state.shape == (2, 12, 32)
    with pytest.raises(ValueError, match="convtext has no head for AutoModelForMaskedLM; it has AutoModel, "):
        formax.AutoModelForMaskedLM.from_pretrained(tmp_path / "saved")


def test_without_its_file_it_is_unknown(convtext: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = formax.AutoConfig.for_model("convtext")
    formax.AutoModel.from_config(config, key=jax.random.key(0)).save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(registry, "_registered", {})
    with pytest.raises(UnknownModelTypeError, match="convtext"):
        formax.from_pretrained(tmp_path / "saved")


def test_any_auto_class_registers(convtext: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for door in (formax.register, formax.AutoModel.register, formax.AutoConfig.register, formax.AutoBackbone.register):
        monkeypatch.setattr(registry, "_registered", {})
        door(convtext.FAMILY)
        assert registry.family("convtext") is convtext.FAMILY
