"""Auto classes: the family and head that a config.json asks for, families of one's own, and wrong configurations."""

import json
import time
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import formax
from formax.conversion.checkpoint import Checkpoint, CheckpointError
from formax.conversion.load import LoadReport
from formax.core import registry
from formax.core import spec as specs
from formax.core.config import Config, ConfigError, config
from formax.core.family import Architecture, Family
from formax.core.outputs import BaseModelOutput, LogitsOutput
from formax.core.registry import UnknownModelTypeError
from formax.core.spec import Param
from formax.sharding import make_mesh

IDS = np.arange(24, dtype=np.int32).reshape(2, 12)
CHOICES = IDS.reshape(1, 2, 12)

# Auto class, architecture, input, {output field: shape}.
HEADS: list[tuple[str, str, Any, dict[str, tuple[int, ...]]]] = [
    ("AutoModel", "BertModel", IDS, {"last_hidden_state": (2, 12, 32), "pooler_output": (2, 32)}),
    (
        "AutoModelForPreTraining",
        "BertForPreTraining",
        IDS,
        {"prediction_logits": (2, 12, 64), "seq_relationship_logits": (2, 2)},
    ),
    ("AutoModelForMaskedLM", "BertForMaskedLM", IDS, {"logits": (2, 12, 64)}),
    ("AutoModelForCausalLM", "BertLMHeadModel", IDS, {"logits": (2, 12, 64)}),
    ("AutoModelForNextSentencePrediction", "BertForNextSentencePrediction", IDS, {"logits": (2, 2)}),
    ("AutoModelForSequenceClassification", "BertForSequenceClassification", IDS, {"logits": (2, 3)}),
    ("AutoModelForMultipleChoice", "BertForMultipleChoice", CHOICES, {"logits": (1, 2)}),
    ("AutoModelForTokenClassification", "BertForTokenClassification", IDS, {"logits": (2, 12, 3)}),
    (
        "AutoModelForQuestionAnswering",
        "BertForQuestionAnswering",
        IDS,
        {"start_logits": (2, 12), "end_logits": (2, 12)},
    ),
]
by_head = pytest.mark.parametrize(("auto", "architecture", "ids", "outputs"), HEADS, ids=[head[0] for head in HEADS])


def small(**changes: Any) -> Config:
    return formax.AutoConfig.for_model("bert", **{**tiny.SIZES, **changes})


def written(folder: Path, **changes: Any) -> Path:
    """A checkpoint of the base model whose config.json says something else."""
    return tiny.write(folder, {**tiny.config(), **changes}, tiny.tensors())


# Every Auto class.


@by_head
def test_opening(tmp_path: Path, auto: str, architecture: str, ids: Any, outputs: dict[str, tuple[int, ...]]) -> None:
    tiny.checkpoint(tmp_path, architecture, num_labels=3, is_decoder=architecture == "BertLMHeadModel")
    model, report = getattr(formax, auto).from_pretrained(tmp_path, output_loading_info=True)
    assert report == LoadReport()
    assert (type(model), model.architecture.name) == (formax.Model, architecture)
    out = model(input_ids=ids)
    assert {name: value.shape for name, value in out.items() if name != "cache"} == outputs
    # the architecture that config.json names is the one that is opened without saying which
    again = formax.from_pretrained(tmp_path)
    assert again.architecture is model.architecture
    for name in outputs:
        np.testing.assert_array_equal(getattr(again(input_ids=ids), name), getattr(out, name))


@by_head
def test_making(auto: str, architecture: str, ids: Any, outputs: dict[str, tuple[int, ...]]) -> None:
    given = small(num_labels=3)
    # shapes alone: nine programs that draw numbers would take their time to compile
    model = jax.eval_shape(lambda key: getattr(formax, auto).from_config(given, key=key), jax.random.key(1))
    assert (type(model), model.architecture.name, model.config) == (formax.Model, architecture, given)
    out = jax.eval_shape(lambda m: m(input_ids=jnp.asarray(ids)), model)
    assert {name: value.shape for name, value in out.items() if name != "cache"} == outputs
    names = {name: entries[0].stored_shape for name, entries in specs.table(model.spec).stored().items()}
    assert names == tiny.shapes(architecture, num_labels=3)


def auto_classes() -> dict[str, Any]:
    return {name: getattr(formax, name) for name in formax.__all__ if name.startswith(("AutoModel", "AutoBackbone"))}


def test_an_auto_class_opens_what_its_name_says() -> None:
    tasks = {name: f"AutoModel{cls.task}" for name, cls in auto_classes().items()}
    assert tasks.pop("AutoBackbone") == "AutoModelBackbone"
    assert all(name == task for name, task in tasks.items())


def test_an_auto_class_for_a_head_that_the_family_lacks(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path, "BertModel")
    opened = {head[0] for head in HEADS} | {"AutoModelForTextEncoding"}
    for name in auto_classes().keys() - opened:
        with pytest.raises(
            ConfigError, match=r"bert has no head for AutoModel\w+; it has AutoModel, AutoModelForPreTr"
        ):
            getattr(formax, name).from_pretrained(tmp_path)


def test_an_architecture_by_its_name(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path, "BertForMaskedLM")
    model = formax.from_pretrained(tmp_path, architecture="BertForTokenClassification")
    assert model.architecture.task == "ForTokenClassification"
    with pytest.raises(ConfigError, match="architecture = 'BertForSinging', which is none of bert's: BertModel, "):
        formax.from_pretrained(tmp_path, architecture="BertForSinging")


def test_making_is_repeatable() -> None:
    given = small(num_hidden_layers=1)
    first, again, other = (formax.AutoModel.from_config(given, key=jax.random.key(seed)) for seed in (1, 1, 2))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first, again))
    a, b = (np.asarray(model.params["layers"][0]["mlp"]["up"]["kernel"]) for model in (first, other))
    assert (a != b).all()
    assert 0.015 < a.std() < 0.025
    # one parameter's numbers are the same in every architecture
    head = formax.AutoModelForMaskedLM.from_config(given, key=jax.random.key(1))
    np.testing.assert_array_equal(head.params["layers"][0]["mlp"]["up"]["kernel"], a)


def test_making_in_a_dtype() -> None:
    def kinds(dtype: Any = None, **changes: Any) -> set[str]:
        made = jax.eval_shape(lambda key: formax.AutoModel.from_config(small(**changes), key=key, dtype=dtype), key)
        return {leaf.dtype.name for leaf in jax.tree.leaves(made)}

    key = jax.random.key(0)
    assert kinds() == {"float32"}
    assert kinds(dtype="bfloat16") == {"bfloat16"}
    assert kinds(dtype="float16", torch_dtype="bfloat16") == {"float16"}
    with pytest.raises(ValueError, match="dtype='int8' is not floating-point"):
        kinds(dtype="int8")
    made = formax.AutoModel.from_config(small(num_hidden_layers=0, dtype="bfloat16"), key=key)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(made)} == {"bfloat16"}


def test_making_on_a_mesh() -> None:
    mesh, given = make_mesh(fsdp=4, tensor=2), small(num_hidden_layers=1)
    rules = (("heads", ("fsdp", "tensor")),)
    made = [
        formax.AutoModel.from_config(given, key=jax.random.key(1), **options).params["layers"][0]["attn"]["q"]["kernel"]
        for options in ({}, {"mesh": mesh}, {"mesh": mesh, "rules": rules})
    ]
    assert [kernel.addressable_shards[0].data.shape for kernel in made] == [(32, 32), (8, 16), (32, 4)]
    for kernel in made[1:]:
        # But for the last bit: test_spec.py, test_sharded_initial_values_are_the_same.
        np.testing.assert_allclose(kernel, made[0], rtol=1e-6, atol=0)


def test_keys() -> None:
    with pytest.raises(TypeError, match=r"write key=jax\.random\.key\(0\)"):
        formax.AutoModel.from_config(small(), key=0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="key"):
        formax.AutoModel.from_config(small())  # type: ignore[call-arg]


# Which architecture.


@pytest.mark.parametrize("prefix", ["TF", "Flax"])
def test_names_of_other_frameworks(tmp_path: Path, prefix: str) -> None:
    arrays = tiny.tensors("BertForTokenClassification")
    tiny.write(tmp_path, tiny.config(f"{prefix}BertForTokenClassification"), arrays)
    model = formax.from_pretrained(tmp_path)
    assert model.architecture.name == "BertForTokenClassification"
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"] == [
        "BertForTokenClassification"
    ]


@pytest.mark.parametrize(
    ("named", "found"),
    [
        (None, "BertModel"),
        ([], "BertModel"),
        (["BertModel"], "BertModel"),
        (["MyOwnBert", "BertForPreTraining"], "BertForPreTraining"),
    ],
)
def test_what_config_json_names(tmp_path: Path, named: Any, found: str) -> None:
    model = formax.from_pretrained(written(tmp_path, architectures=named))
    assert model.architecture.name == found


def test_an_architecture_that_nobody_knows(tmp_path: Path) -> None:
    written(tmp_path, architectures=["BertForPoetry"])
    with pytest.raises(ConfigError) as caught:
        formax.from_pretrained(tmp_path)
    for part in ("architectures", "'BertForPoetry'", "BertModel, BertForPreTraining", "AutoModel"):
        assert part in str(caught.value)
    assert formax.AutoModel.from_pretrained(tmp_path).architecture.name == "BertModel"


# Families of one's own.


@config
class BagConfig(Config):
    model_type: ClassVar[str] = "bag-of-words"
    attribute_map: ClassVar = {"n_words": "vocab_size"}

    vocab_size: int = 11
    width: int = 4


def bag_spec(c: BagConfig) -> dict[str, Any]:
    return {"words": Param((c.vocab_size, c.width), ("vocab", "embed"), "bag.words")}


def labels_spec(c: BagConfig) -> dict[str, Any]:
    return {**bag_spec(c), "head": Param((c.width, c.num_labels), ("embed", None), "labels", init=specs.ones)}


def bag(p: Any, c: BagConfig, input_ids: Any = None, attention_mask: Any = None, key: Any = None) -> BaseModelOutput:
    return BaseModelOutput(last_hidden_state=p["words"][input_ids].sum(1))


def labelled(p: Any, c: BagConfig, **inputs: Any) -> LogitsOutput:
    return LogitsOutput(logits=bag(p, c, **inputs).last_hidden_state @ p["head"])


BAG = Family(
    "bag-of-words",
    BagConfig,
    base="bag",
    inputs=bag,
    architectures=(
        Architecture("BagModel", "", bag_spec, bag),
        Architecture("BagForSequenceClassification", "ForSequenceClassification", labels_spec, labelled),
    ),
)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Family:
    monkeypatch.setattr(registry, "_registered", {})
    registry.register(BAG)
    return BAG


def test_a_family_of_ones_own(tmp_path: Path, own: Family) -> None:
    words = np.arange(44, dtype=np.float32).reshape(11, 4)
    given = {"model_type": "bag_of_words", "architectures": ["BagModel"], "n_words": 11}
    tiny.write(tmp_path / "source", given, {"bag.words": words})
    model = formax.from_pretrained(tmp_path / "source")
    assert (model.architecture.name, model.config.vocab_size) == ("BagModel", 11)
    np.testing.assert_array_equal(model(input_ids=[[1, 2], [3, 3]]).last_hidden_state, words[[1, 3]] + words[[2, 3]])

    head, report = formax.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "source", num_labels=3, output_loading_info=True
    )
    assert report == LoadReport(initialised=("head",))
    assert head(input_ids=[[1, 2]]).logits.shape == (1, 3)
    head.save_pretrained(tmp_path / "target")
    assert tiny.bits(tiny.read_tensors(tmp_path / "target" / "model.safetensors")) == tiny.bits(
        {"bag.words": words, "labels": np.ones((4, 3), np.float32)}
    )
    again = formax.from_pretrained(tmp_path / "target")
    assert (again.family, again.config.num_labels) == (own, 3)

    made = formax.AutoConfig.for_model("Bag-Of-Words", n_words=7)
    assert isinstance(made, BagConfig)
    assert formax.AutoModel.from_config(made, key=jax.random.key(0)).params["words"].shape == (7, 4)


def test_a_head_that_a_family_does_not_have(tmp_path: Path, own: Family) -> None:
    tiny.write(tmp_path, {"model_type": "bag-of-words"}, {"bag.words": np.ones((11, 4), np.float32)})
    message = "bag-of-words has no head for AutoModelForMaskedLM; it has AutoModel, AutoModelForSequenceClassification"
    with pytest.raises(ConfigError) as caught:
        formax.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert str(caught.value) == message
    with pytest.raises(ConfigError) as caught:
        formax.AutoModelForMaskedLM.from_config(BagConfig(), key=jax.random.key(0))
    assert str(caught.value) == message


def test_a_registered_family_is_told_to_who_misspells_it(own: Family) -> None:
    with pytest.raises(UnknownModelTypeError, match="the nearest are bag-of-words"):
        formax.AutoConfig.for_model("bags-of-words")
    assert "bag-of-words" in registry.model_types()


# Model types.


@pytest.mark.parametrize("name", ["bert", "BERT", "herbert", "bert-japanese", "bert_japanese"])
def test_aliases(tmp_path: Path, name: str) -> None:
    model = formax.from_pretrained(written(tmp_path, model_type=name))
    assert model.family.model_type == "bert"
    assert formax.AutoConfig.for_model(name, hidden_size=24).to_dict()["model_type"] == "bert"
    model.save_pretrained(tmp_path / "saved")
    assert formax.from_pretrained(tmp_path / "saved").architecture.name == "BertModel"


@pytest.mark.parametrize("name", registry.ALIASES)
def test_every_alias_is_a_family(name: str) -> None:
    for spelled in (name, name.replace("_", "-"), name.replace("-", "_")):
        assert registry.family(spelled).model_type == registry.ALIASES[name]


@pytest.mark.parametrize(("name", "hint"), [("brt", "nearest are bort, bert"), ("zzzzzz", "; there are ")])
def test_a_model_type_that_nobody_knows(tmp_path: Path, name: str, hint: str) -> None:
    written(tmp_path, model_type=name)
    for opens in (
        formax.from_pretrained,
        formax.AutoModelForMaskedLM.from_pretrained,
        formax.AutoConfig.from_pretrained,
    ):
        with pytest.raises(UnknownModelTypeError) as caught:
            opens(tmp_path)
        assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: formax has no model_type {name!r}")
        assert hint in str(caught.value)
    with pytest.raises(UnknownModelTypeError, match=f"formax has no model_type '{name}'"):
        formax.AutoConfig.for_model(name)


# Configurations and what replaces them.


def test_for_model() -> None:
    made = formax.AutoConfig.for_model(
        "bert", hidden_size=24, num_attention_heads=3, num_labels=4, torch_dtype="float16"
    )
    assert (made.hidden_size, made.num_attention_heads, made.num_labels, made.dtype) == (24, 3, 4, "float16")
    assert made.num_hidden_layers == 12
    assert formax.AutoConfig.for_model("bert") == formax.AutoConfig.for_model("bert", hidden_size=768)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 24}, "BertConfig has no field 'hiden_size'; the nearest are hidden_size"),
        ({"num_label": 3}, "BertConfig has no field 'num_label'; the nearest are num_labels"),
        ({"device_map": "auto"}, "BertConfig has no field 'device_map'"),
        ({"hidden_size": 7}, r"hidden_size=7 is no multiple of num_attention_heads"),
        ({"hidden_size": "32"}, "hidden_size must be int, got '32'"),
        ({"num_labels": -1}, "num_labels"),
        ({"hidden_size": 2**40}, "hidden_size=1099511627776 is larger than any array can be"),
    ],
)
def test_overrides_that_are_wrong(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    written(tmp_path)
    with pytest.raises(ConfigError, match=message):
        formax.AutoConfig.for_model("bert", **changes)
    for opens in (formax.from_pretrained, formax.AutoModel.from_pretrained, formax.AutoConfig.from_pretrained):
        with pytest.raises(ConfigError, match=message):
            opens(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        formax.from_pretrained(tmp_path, config=tiny.config(), **changes)
    with pytest.raises(ConfigError, match=message.split(";")[0]):
        formax.from_pretrained(tmp_path, config=small(), **changes)


def test_overrides(tmp_path: Path) -> None:
    written(tmp_path, custom={"x": 1})
    model = formax.from_pretrained(tmp_path, hidden_dropout_prob=0.5, output_attentions=True, custom=3)
    assert (model.config.hidden_dropout_prob, model.config.vocab_size, model.config.custom) == (0.5, 64, 3)
    assert len(model(input_ids=IDS).attentions) == 2
    assert formax.AutoConfig.from_pretrained(tmp_path, hidden_dropout_prob=0.5).hidden_dropout_prob == 0.5
    # the weights are what they were
    np.testing.assert_array_equal(model.params["pooler"]["bias"], tiny.tensors()["pooler.dense.bias"])


def test_a_configuration_in_the_place_of_the_files(tmp_path: Path) -> None:
    written(tmp_path, layer_norm_eps=0.5)
    for given in (small(layer_norm_eps=0.25), tiny.config(layer_norm_eps=0.25)):
        model = formax.AutoModel.from_pretrained(tmp_path, config=given, hidden_act="relu")
        assert (model.config.layer_norm_eps, model.config.hidden_act) == (0.25, "relu")
    with pytest.raises(CheckpointError, match=r"asks for \(65, 32\)"):
        formax.AutoModel.from_pretrained(tmp_path, config=small(), vocab_size=65)
    with pytest.raises(ConfigError, match="config has no model_type"):
        formax.AutoModel.from_pretrained(tmp_path, config={"vocab_size": 64})
    # it need not be there at all then
    (tmp_path / "config.json").unlink()
    assert formax.AutoModel.from_pretrained(tmp_path, config=small()).config.vocab_size == 64


# Files that are no configuration.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON: Expecting property name"),
        ("", "is not JSON: Expecting value"),
        ("[" * 100_000, "is not JSON: maximum recursion depth"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "is not JSON: Exceeds the limit"),
        ("[1, 2]", "must hold a JSON object, it holds a list"),
        ("null", "must hold a JSON object, it holds a NoneType"),
        ("{}", "has no model_type; it must say which family this is"),
        ('{"model_type": 7}', "has no model_type; it must say which family this is"),
    ],
    ids=range(8),
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    written(tmp_path)
    (tmp_path / "config.json").write_text(text)
    for opens in (formax.from_pretrained, formax.AutoModel.from_pretrained, formax.AutoConfig.from_pretrained):
        with pytest.raises(ConfigError) as caught:
            opens(tmp_path)
        assert str(caught.value).startswith(f"{tmp_path / 'config.json'} {message}")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "config.json").write_bytes(b'{"model_type": "b\xffrt"}')
    with pytest.raises(ConfigError, match=r"config\.json is not JSON: 'utf-8' codec can't decode byte 0xff"):
        formax.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError) as caught:
        formax.from_pretrained(tmp_path)
    assert str(caught.value) == f"{tmp_path} holds no config.json"
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json cannot be read: Is a directory"):
        formax.from_pretrained(tmp_path)


WRONG: list[tuple[str, Any]] = [
    ("vocab_size", 10**12),
    ("vocab_size", -1),
    ("vocab_size", 64.0),
    ("vocab_size", "64"),
    ("vocab_size", None),
    ("vocab_size", True),
    ("hidden_size", 2**31),
    ("num_hidden_layers", 10**9),
    ("num_hidden_layers", [2]),
    ("num_attention_heads", 0),
    ("num_attention_heads", 10**9),
    ("intermediate_size", 2**63),
    ("max_position_embeddings", 10**30),
    ("type_vocab_size", 2**31),
    ("layer_norm_eps", "1e-12"),
    ("hidden_act", ["gelu"]),
    ("position_embedding_type", "rotary"),
    ("problem_type", "halting"),
    ("architectures", "BertModel"),
    ("architectures", [7]),
    ("num_labels", 10**9),
    ("num_labels", "two"),
    ("id2label", ["bad", "good"]),
    ("id2label", 7),
    ("id2label", {"first": "bad"}),
    ("pruned_heads", [1]),
    ("pruned_heads", {"first": [1]}),
    ("pruned_heads", {"0": 1}),
    ("pruned_heads", {"0": ["first"]}),
    ("pruned_heads", {"0": [4]}),
    ("pruned_heads", {"0": [0, 1, 2, 3]}),
    ("add_cross_attention", True),
]


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that reads or makes a tensor."""

    def read(*_: Any, **__: Any) -> Any:
        pytest.fail("a tensor was made for a configuration that cannot be")

    monkeypatch.setattr(Checkpoint, "read", read)
    monkeypatch.setattr(specs, "init_entries", read)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda value: str(value)[:24])
def test_values_that_cannot_be_right(tmp_path: Path, name: str, value: Any) -> None:
    """Each is refused at once, by the name of the file and of the key."""
    written(tmp_path, **{name: value})
    start = time.process_time()  # of this process: others may be running tests
    with pytest.raises(ConfigError) as caught:
        formax.from_pretrained(tmp_path)
    assert time.process_time() - start < 2
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert name in str(caught.value)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("name", "value"), [("intermediate_size", 2**31 - 1), ("vocab_size", 2**31 - 1), ("num_hidden_layers", 1000)]
)
def test_values_that_do_not_fit_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: int
) -> None:
    """These could be right, and are not: nothing of that size is made before the file is looked at."""
    tiny.checkpoint(tmp_path, "BertForPreTraining")
    (tmp_path / "config.json").write_text(json.dumps(tiny.config("BertForPreTraining", **{name: value})))
    if name == "num_hidden_layers":  # all other heads of a thousand layers would take their time
        monkeypatch.setattr(Family, "known_names", lambda *_: pytest.fail("other heads were made"))
    for opens in (formax.from_pretrained, formax.AutoModel.from_pretrained):
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            opens(tmp_path)


@pytest.mark.usefixtures("unread")
def test_sizes_that_are_absurd_together(tmp_path: Path) -> None:
    """Each dimension is possible, their product is not; XLA would end the process."""
    absurd = {"hidden_size": 2**30, "num_attention_heads": 2, "intermediate_size": 2**30}
    message = r"BertModel .* is larger than any memory: layers\.0\.attn\.q\.kernel .*\(1073741824, 1073741824\)"
    with pytest.raises(ConfigError, match=message):
        formax.AutoModel.from_config(small(**absurd), key=jax.random.key(0))
    with pytest.raises(ConfigError, match=message):
        formax.from_pretrained(written(tmp_path, **absurd), ignore_mismatched_sizes=True)
