"""Code of a checkpoint is never run; classes of one's own are made known by `register`."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest

import formax
from formax.compat import flax, tf
from formax.core.config import Config
from formax.core.registry import UnknownModelTypeError
from formax.hub import RemoteCodeError
from formax.text.own_classes import OwnClasses

TOKENIZER = Path(__file__).resolve().parent / "data" / "text"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = formax.AutoConfig.for_model(
        "bert", vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=2
    )
    formax.AutoModel.from_config(config, key=jax.random.key(0)).save_pretrained(tmp_path)
    # Imported or run, it would say so.
    (tmp_path / "modeling.py").write_text("raise SystemExit('the code of a checkpoint was run')")
    values = json.loads((tmp_path / "config.json").read_text())
    values["auto_map"] = {"AutoModel": "modeling.Model", "AutoConfig": "modeling.Config"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


def test_trust_remote_code_is_refused(checkpoint: Path) -> None:
    openers: list[Any] = [
        formax.from_pretrained,
        formax.AutoModel.from_pretrained,
        formax.AutoConfig.from_pretrained,
        formax.AutoTokenizer.from_pretrained,
        formax.AutoImageProcessor.from_pretrained,
        formax.AutoFeatureExtractor.from_pretrained,
        formax.AutoProcessor.from_pretrained,
        flax.FlaxAutoModel.from_pretrained,
        tf.TFBertModel.from_pretrained,
    ]
    for opener in openers:
        with pytest.raises(RemoteCodeError, match="trust_remote_code=True: formax never runs code out of a checkpoint"):
            opener(checkpoint, trust_remote_code=True)
    for trust in (None, False):
        assert formax.from_pretrained(checkpoint, trust_remote_code=trust).config.model_type == "bert"
        assert formax.AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust).model_type == "bert"
        assert flax.FlaxAutoModel.from_pretrained(checkpoint, trust_remote_code=trust).config.model_type == "bert"


def test_a_model_that_is_its_own_code(checkpoint: Path) -> None:
    values = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**values, "model_type": "strange_model"}))
    with pytest.raises(UnknownModelTypeError, match=r"'strange_model'.*auto_map names code, which formax never runs"):
        formax.from_pretrained(checkpoint)


def test_register_wants_a_family() -> None:
    for register in (formax.register, formax.AutoModel.register, formax.AutoConfig.register):
        with pytest.raises(TypeError, match=r"register takes a Family, .*'A family of your own'.* Got 'mine'"):
            register("mine", Config)  # type: ignore[arg-type]
    for kind in (flax.FlaxBertModel, tf.TFBertModel):
        with pytest.raises(NotImplementedError, match=r"formax\.register makes a family known"):
            kind.register_for_auto_class()


class Own:
    """A class of a user's own; what it makes is where it was opened, and how."""

    @classmethod
    def from_pretrained(cls, folder: Path, **settings: Any) -> Any:
        return cls.__name__, folder, settings


class OwnFast(Own):
    """Another."""


class OwnConfig(Config):
    """A configuration of a user's own."""

    model_type = "own-model"


AUTOS: tuple[type[OwnClasses], ...] = (
    formax.AutoTokenizer,
    formax.AutoImageProcessor,
    formax.AutoFeatureExtractor,
    formax.AutoProcessor,
)


@pytest.mark.parametrize("auto", AUTOS)
def test_classes_by_configuration(auto: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "_classes", {})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own-model"}))
    (tmp_path / "preprocessor_config.json").write_text("{}")
    auto.register(OwnConfig, Own)
    assert auto.from_pretrained(tmp_path, size=3) == ("Own", tmp_path, {"size": 3})
    with pytest.raises(ValueError, match="has a class for 'own-model'"):
        auto.register(OwnConfig, OwnFast, exist_ok=False)
    auto.register(OwnConfig, Own, OwnFast)
    assert auto.from_pretrained(tmp_path, trust_remote_code=False)[0] == "OwnFast"
    with pytest.raises(RemoteCodeError):
        auto.from_pretrained(tmp_path, trust_remote_code=True)
    for wrong in (Config, object, 3):
        with pytest.raises(ValueError, match="needs a name or a configuration class"):
            auto.register(wrong, Own)
    with pytest.raises(ValueError, match="has no from_pretrained"):
        auto.register("x", object)


def test_a_tokenizer_class_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formax.AutoTokenizer, "_classes", {})
    formax.AutoTokenizer.register("OwnTokenizer", Own)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "OwnTokenizer"}))
    assert formax.AutoTokenizer.from_pretrained(tmp_path)[0] == "Own"
    folder = next(path.parent for path in sorted(TOKENIZER.rglob("tokenizer.json")))
    assert type(formax.AutoTokenizer.from_pretrained(folder, use_fast=True)).__name__ == "Tokenizer"
    with pytest.raises(ValueError, match="fast tokenizers alone"):
        formax.AutoTokenizer.from_pretrained(folder, use_fast=False)
