"""Configurations: what a config.json says comes in, means the same under old and new names, and goes back out."""

import json
import logging
import pickle
import subprocess
import sys
from typing import Any, ClassVar

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from formax.auto import AutoConfig
from formax.core import config as configs
from formax.core.config import Config, ConfigError, config
from formax.core.frozen import FrozenDict, freeze, thaw
from formax.models.text.bert import BertConfig

THETA = 10_000.0


@config
class ToyConfig(Config):
    """A family with other names, a switch without a field, and rotary embeddings."""

    model_type: ClassVar[str] = "toy"
    attribute_map: ClassVar = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers"}
    implemented: ClassVar = {"norm_type": ("layer", "rms"), "shape": ("plain",)}

    hidden_size: int = 8
    num_hidden_layers: int = 2
    dropout: float = 0.0
    norm_type: str = "layer"
    sizes: tuple[int, ...] = (1, 2)
    window: int | None = None
    pad_token_id: int | None = 1
    rope_parameters: FrozenDict = FrozenDict(rope_type="default", rope_theta=THETA)


@config
class PairConfig(Config):
    """A family made of two."""

    model_type: ClassVar[str] = "pair"
    sub_configs: ClassVar = {"text_config": ToyConfig, "vision_config": BertConfig}

    text_config: ToyConfig = ToyConfig()
    vision_config: BertConfig | None = None
    projection_dim: int = 4


def read(**values: Any) -> ToyConfig:
    return ToyConfig.from_dict(values, source="dir/config.json")


# --- there and back


@pytest.mark.parametrize(
    "made",
    [
        BertConfig(),
        BertConfig(hidden_act="relu", num_hidden_layers=1, is_decoder=True, add_cross_attention=True, bos_token_id=5),
        BertConfig(pruned_heads=FrozenDict({1: (0, 3), 11: (7,)}), architectures=("BertModel",), dtype="bfloat16"),
        BertConfig(id2label=FrozenDict({0: "NEG", 1: "POS", 2: "MEH"}), problem_type="regression"),
        BertConfig(eos_token_id=(1, 2), tie_word_embeddings=False, classifier_dropout=0.3),
        ToyConfig(sizes=(), window=3, rope_parameters=FrozenDict(rope_type="yarn", factor=4.0, rope_theta=5.0)),
        ToyConfig(rope_parameters=FrozenDict(rope_type="default", rope_theta=5.0, partial_rotary_factor=0.5)),
        ToyConfig(rope_parameters=FrozenDict(full=FrozenDict(rope_theta=1.0), local=FrozenDict(rope_theta=2.0))),
        PairConfig(text_config=ToyConfig(hidden_size=16), vision_config=BertConfig(hidden_size=24)),
        PairConfig(),
    ],
    ids=lambda made: made.model_type,
)
def test_what_is_written_reads_the_same(made: Config) -> None:
    text = json.dumps(made.to_dict())
    again = type(made).from_dict(json.loads(text))
    assert again == made
    assert hash(again) == hash(made)
    assert again.to_dict() == json.loads(text)


def test_own_fields_are_always_written_and_shared_ones_when_they_differ() -> None:
    written = BertConfig().to_dict()
    assert written["vocab_size"] == 30522
    assert written["pad_token_id"] == 0  # shared, but BERT declares it again
    assert written["model_type"] == "bert"
    assert written.keys().isdisjoint({"bos_token_id", "id2label", "label2id", "architectures", "extra", "dtype"})
    assert BertConfig(bos_token_id=7).to_dict()["bos_token_id"] == 7
    assert list(written) == sorted(written)


def test_an_alias_keeps_its_model_type() -> None:
    read = BertConfig.from_dict({"model_type": "herbert"})
    assert read.to_dict()["model_type"] == "herbert"
    assert read.model_type == "bert"


def test_a_config_never_changes_and_hashes_by_content() -> None:
    a, b = (read(n_embd=16, nested={"list": [1, {"a": [2]}]}) for _ in range(2))
    assert a == b
    assert a is not b
    assert len({a, b}) == 1
    assert hash(a) != hash(a.replace(n_embd=17))
    assert a != a.replace(n_embd=17)
    with pytest.raises(AttributeError):
        a.hidden_size = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        a.rope_parameters["rope_theta"] = 1.0  # type: ignore[index]
    assert thaw(a.extra) == {"nested": {"list": [1, {"a": [2]}]}}


def test_a_copy_from_another_process_is_equal() -> None:
    # text hashes differently there: a hash that was cached before the copy would be wrong here
    made = BertConfig(hidden_act="relu", id2label=FrozenDict({0: "a", 1: "b"}))
    program = (
        "import pickle, sys; from formax.models.text.bert import BertConfig; "
        "made = BertConfig(hidden_act='relu').replace(id2label={0: 'a', 1: 'b'}); hash(made); "
        "sys.stdout.buffer.write(pickle.dumps(made))"
    )
    copy = pickle.loads(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout)
    assert copy == made
    assert hash(copy) == hash(made)
    assert {made: "found"}[copy] == "found"


def test_frozen_values() -> None:
    value = {"a": [1, {"b": (2, 3)}], 4: None}
    frozen = freeze(value)
    assert frozen == FrozenDict({"a": (1, FrozenDict(b=(2, 3))), 4: None})
    assert hash(frozen) == hash(freeze(dict(reversed(value.items()))))
    assert thaw(frozen) == {"a": [1, {"b": [2, 3]}], "4": None}
    assert frozen != freeze({**value, 4: 5})


# --- labels


def test_labels_come_in_pairs() -> None:
    named = read(id2label={"0": "NEG", "1": "POS", "2": "MEH"})
    assert dict(named.id2label) == {0: "NEG", 1: "POS", 2: "MEH"}
    assert dict(named.label2id) == {"NEG": 0, "POS": 1, "MEH": 2}
    assert named.num_labels == 3
    assert named.to_dict()["id2label"] == {"0": "NEG", "1": "POS", "2": "MEH"}
    assert read().num_labels == 2
    assert dict(read().label2id) == {"LABEL_0": 0, "LABEL_1": 1}
    assert read(num_labels=3).id2label[2] == "LABEL_2"
    assert read(id2label=None, label2id=None, pruned_heads=None) == read()
    # in a file both stand, and they need not be inverse
    both = read(id2label={"0": "A", "1": "B"}, label2id={"a": 0, "b": 1})
    assert dict(both.label2id) == {"a": 0, "b": 1}


def test_another_number_of_labels_replaces_them_and_the_same_keeps_them() -> None:
    file = {"id2label": {"0": "NEG", "1": "POS"}, "label2id": {"NEG": 0, "POS": 1}}
    kept = ToyConfig.from_dict(file, num_labels=2)
    assert dict(kept.id2label) == {0: "NEG", 1: "POS"}
    assert kept.replace(num_labels=2) == kept
    for more in (ToyConfig.from_dict(file, num_labels=3), kept.replace(num_labels=3)):
        assert dict(more.id2label) == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
        assert more.label2id["LABEL_2"] == 2
        assert "NEG" not in more.label2id
    for named in (ToyConfig.from_dict(file, id2label={0: "A"}), kept.replace(id2label={"0": "A"})):
        assert (dict(named.id2label), dict(named.label2id)) == ({0: "A"}, {"A": 0})
    assert dict(ToyConfig(id2label=FrozenDict({0: "A"})).label2id) == {"A": 0}


# --- names


def test_names_of_relatives_are_understood() -> None:
    made = read(n_embd=16, n_layer=3)
    assert (made.hidden_size, made.num_hidden_layers) == (16, 3)
    assert (made.n_embd, made.n_layer) == (16, 3)
    assert made.to_dict()["hidden_size"] == 16
    assert "n_embd" not in made.to_dict()
    assert made.replace(n_embd=4).hidden_size == 4
    assert ToyConfig.from_dict({"hidden_size": 16}, n_embd=4).hidden_size == 4
    with pytest.raises(AttributeError, match=r"ToyConfig has no field 'hiden_size'; the nearest are hidden_size"):
        _ = made.hiden_size
    with pytest.raises(ConfigError, match=r"ToyConfig has no field 'n_embed'"):
        made.replace(n_embed=4)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("float16", "float16"),
        ("torch.bfloat16", "bfloat16"),
        (jnp.bfloat16, "bfloat16"),
        (np.float32, "float32"),
        (np.dtype(ml_dtypes.float8_e4m3fn), "float8_e4m3fn"),
        (None, None),
    ],
    ids=str,
)
def test_dtypes_have_one_spelling(given: Any, name: str | None) -> None:
    assert read(dtype=given).dtype == name
    assert read(torch_dtype=given).dtype == name
    assert read(torch_dtype="float64", dtype=given).dtype == (name or "float64")
    assert read().replace(torch_dtype=given).dtype == name
    assert "torch_dtype" not in read(torch_dtype=given).to_dict()


def test_what_a_file_holds_beyond_the_fields_is_kept() -> None:
    values = {"hidden_size": 16, "transformers_version": "4.57.6", "top_k": 5, "extra": 7}
    made = read(**values)
    assert made.to_dict().items() >= values.items()
    assert made.top_k == 5
    assert made.replace(hidden_size=8).top_k == 5


def test_an_unknown_key_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    configs._report_unknown.cache_clear()
    caplog.set_level(logging.WARNING, "formax")
    for _ in range(2):
        read(quantum_size=3, top_k=2, _private=1, shape="plain")
    told = "dir/config.json: ToyConfig does not know quantum_size; kept as given and written back"
    assert [record.getMessage() for record in caplog.records] == [told]
    assert read(quantum_size=3).to_dict()["quantum_size"] == 3


# --- configurations inside


def test_configurations_inside() -> None:
    file = {"text_config": {"n_embd": 16, "model_type": "toy"}, "projection_dim": 8}
    made = PairConfig.from_dict(file, source="dir/config.json")
    assert made.text_config == ToyConfig(hidden_size=16)
    assert made.vision_config is None
    assert made.to_dict()["text_config"]["hidden_size"] == 16
    # an override or a replacement changes what it names
    for changed in (
        PairConfig.from_dict(file, text_config={"dropout": 0.5}),
        made.replace(text_config={"dropout": 0.5}),
    ):
        assert changed.text_config == ToyConfig(hidden_size=16, dropout=0.5)
    assert made.replace(text_config=ToyConfig()).text_config == ToyConfig()
    with pytest.raises(ConfigError, match=r"dir/config.json: text_config: hidden_size must be int, got 'big'"):
        PairConfig.from_dict({"text_config": {"hidden_size": "big"}}, source="dir/config.json")


# --- rotary settings


def rope(**values: Any) -> dict[str, Any]:
    return thaw(read(**values).rope_parameters)


def test_rotary_settings_of_all_versions_are_one() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5}
    assert rope() == {"rope_type": "default", "rope_theta": THETA}
    assert rope(rope_theta=5e5) == {"rope_type": "default", "rope_theta": 5e5}
    assert rope(rope_theta=5e5, rope_scaling=None) == {"rope_type": "default", "rope_theta": 5e5}
    assert rope(rope_theta=5e5, rope_scaling={"type": "yarn", "factor": 4.0}) == yarn
    assert rope(rope_theta=5e5, rope_scaling={"rope_type": "yarn", "factor": 4.0}) == yarn
    assert rope(rope_parameters=yarn) == yarn
    assert rope(rope_parameters=yarn, rope_theta=1.0) == yarn
    # what a file does not say is the family's
    assert rope(rope_scaling={"type": "yarn", "factor": 4.0}) == {**yarn, "rope_theta": THETA}
    assert rope(rope_parameters={"rope_type": "yarn", "factor": 4.0}) == {**yarn, "rope_theta": THETA}


def test_rotary_settings_are_written_so_that_both_versions_read_them() -> None:
    assert read().to_dict().items() >= {"rope_theta": THETA, "rope_scaling": None}.items()
    assert "rope_parameters" not in read().to_dict()
    partial = {"rope_type": "default", "rope_theta": 2.0, "partial_rotary_factor": 0.5}
    assert read(rope_parameters=partial).to_dict()["rope_scaling"] == {
        "rope_type": "default",
        "partial_rotary_factor": 0.5,
    }
    by_layer = {"full": {"rope_type": "default", "rope_theta": 1e6}, "local": {"rope_type": "default"}}
    assert rope(rope_parameters=by_layer) == by_layer
    assert read(rope_parameters=by_layer).to_dict()["rope_parameters"] == by_layer


def test_a_changed_rotary_setting_leaves_the_others() -> None:
    file = {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    made = read(**file)
    for changed in (ToyConfig.from_dict(file, rope_theta=1e6), made.replace(rope_theta=1e6)):
        assert thaw(changed.rope_parameters) == {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
    for plain in (ToyConfig.from_dict(file, rope_scaling=None), made.replace(rope_scaling=None)):
        assert thaw(plain.rope_parameters) == {"rope_type": "default", "rope_theta": 5e5}
    assert made.replace(hidden_size=16).rope_parameters == made.rope_parameters
    by_layer = made.replace(rope_parameters={"full": {"rope_theta": 1.0}, "local": {"rope_theta": 2.0}})
    assert by_layer.replace(hidden_size=16).rope_parameters == by_layer.rope_parameters
    with pytest.raises(ConfigError, match="rope_theta is for all layers; give rope_parameters, one object for each"):
        by_layer.replace(rope_theta=3.0)


# --- what cannot be


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": -1}, r"hidden_size=-1 is out of range, 0 to"),
        ({"hidden_size": 2**31}, r"hidden_size=2147483648 is larger than any array can be"),
        ({"num_hidden_layers": 1_001}, r"num_hidden_layers=1001 is out of range, 0 to 1000"),
        ({"hidden_size": "768"}, r"hidden_size must be int, got '768'"),
        ({"hidden_size": 768.0}, r"hidden_size must be int, got 768.0"),
        ({"hidden_size": True}, r"hidden_size must be int, got True"),
        ({"hidden_size": None}, r"hidden_size must be int, got None"),
        ({"dropout": "much"}, r"dropout must be float, got 'much'"),
        ({"window": [1]}, r"window must be int \| None, got \(1,\)"),
        ({"sizes": [1, "2"]}, r"sizes must be tuple\[int, \.\.\.\], got \(1, '2'\)"),
        ({"is_decoder": 1}, r"is_decoder must be bool, got 1"),
        ({"eos_token_id": "</s>"}, r"eos_token_id must be int \| tuple\[int, \.\.\.\] \| None"),
        ({"num_labels": "three"}, r"num_labels must be a number of classes, got 'three'"),
        ({"num_labels": 10**12}, r"num_labels must be a number of classes"),
        ({"id2label": ["NEG", "POS"]}, r"id2label must be an object with numbers as keys, got \['NEG', 'POS'\]"),
        ({"id2label": {"NEG": "0"}}, r"id2label must have numbers as keys, got 'NEG'"),
        ({"pruned_heads": {"first": [1]}}, r"pruned_heads must have numbers as keys, got 'first'"),
        ({"pruned_heads": {"0": 3}}, r"pruned_heads must have different head numbers for layer 0, got 3"),
        ({"pruned_heads": {"0": [3, 3]}}, r"pruned_heads must have different head numbers for layer 0, got \(3, 3\)"),
        ({"problem_type": "guess"}, r"problem_type='guess' is none of regression"),
        (
            {"norm_type": "batch"},
            r"norm_type='batch' is a switch that formax does not implement; it has 'layer', 'rms'",
        ),
        ({"shape": "round"}, r"shape='round' is a switch that formax does not implement; it has 'plain'"),
        ({"rope_scaling": "yarn"}, r"rope_scaling must be an object, got 'yarn'"),
        ({"rope_parameters": 5}, r"rope_parameters must be an object, got 5"),
        ({"dtype": 32}, r"dtype must be the name of a dtype, got 32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_values_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^dir/config.json: {message}"):
        read(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 30}, "hidden_size=30 is no multiple of num_attention_heads=12"),
        ({"num_attention_heads": 0}, "hidden_size=768 is no multiple of num_attention_heads=0"),
        ({"position_embedding_type": "rotary"}, "position_embedding_type='rotary' is a switch that formax does not"),
        ({"add_cross_attention": True}, "add_cross_attention=True needs is_decoder=True"),
        ({"hidden_act": "gleu"}, "hidden_act='gleu' is none of gelu, "),
        ({"pruned_heads": {"1": [12]}}, r"pruned_heads has \(12,\) for layer 1, which has 12 heads and must keep one"),
        ({"pruned_heads": {"1": list(range(12))}}, r"pruned_heads has \(0, 1, .*which has 12 heads and must keep one"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bert_refuses_what_it_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^dir/config.json: {message}"):
        BertConfig.from_dict(values, source="dir/config.json")


def test_for_model_names_the_nearest_field() -> None:
    assert AutoConfig.for_model("bert", hidden_size=24, num_labels=5).num_labels == 5
    with pytest.raises(ConfigError, match="BertConfig has no field 'hiden_size'; the nearest are hidden_size"):
        AutoConfig.for_model("bert", hiden_size=24)
