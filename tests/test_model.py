"""`Model`: one object that is a pytree, compiled when called, changed without loss, and hard to misuse."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import formax
from formax.core import spec as specs
from formax.core.config import Config, ConfigError, config
from formax.core.family import Architecture, Family
from formax.core.outputs import BaseModelOutput
from formax.core.spec import Param
from formax.model import Model, _compiled_forward
from formax.models.text.bert import FAMILY, BertConfig

Array = np.ndarray[Any, Any]
VOCAB = 50
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
}
IDS = np.arange(14).reshape(2, 7) * 3 % VOCAB


def make(task: str = "", **changes: Any) -> Model:
    """A model in which no parameter is zero or one."""
    c = BertConfig(**{**SIZES, **changes})
    rng = np.random.default_rng(0)

    def leaf(entry: specs.Entry) -> jax.Array:
        mean = 1.0 if entry.param.init is specs.ones else 0.0
        return jnp.asarray((mean + 0.3 * rng.normal(size=entry.param.shape)).astype(np.float32))

    (architecture,) = (found for found in FAMILY.architectures if found.task == task)
    return Model(specs.build(architecture.spec(c), leaf), c, architecture, FAMILY)


MODEL = make("ForMaskedLM")


def logits(model: Model, ids: Any = IDS, **inputs: Any) -> Array:
    return np.asarray(model(ids, **inputs).logits)


def structure(tree: Any) -> Any:
    return jax.tree.structure(tree)


def programs() -> int:
    """How many programs of models have been compiled so far."""
    compiled: Any = _compiled_forward
    return int(compiled._cache_size())


def same(a: Model, b: Model) -> None:
    assert structure(a) == structure(b)
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


# --- calling


def test_a_set_of_shapes_compiles_once() -> None:
    model = make("ForMaskedLM", num_hidden_layers=1)  # a configuration that no other test has called

    def compiled(call: Callable[[], Any]) -> int:
        before = programs()
        call()
        return programs() - before

    assert compiled(lambda: model(IDS)) == 1
    assert compiled(lambda: model(IDS + 1)) == 0
    assert compiled(lambda: model(input_ids=IDS.tolist())) == 0
    assert compiled(lambda: model(IDS.astype(np.int32))) == 0
    assert compiled(lambda: model(jnp.asarray(IDS))) == 0
    # other parameters, and an equal configuration made anew
    assert compiled(lambda: make("ForMaskedLM", num_hidden_layers=1)(IDS)) == 0
    assert compiled(lambda: model(IDS[:, :5])) == 1
    assert compiled(lambda: model(IDS, np.ones_like(IDS))) == 1
    assert compiled(lambda: model(IDS, np.zeros_like(IDS))) == 0
    assert compiled(lambda: model(IDS, key=jax.random.key(0))) == 1
    assert compiled(lambda: model(IDS, key=jax.random.key(1))) == 0


def test_inside_a_trace_it_is_the_plain_function() -> None:
    def calls(run: Callable[..., Any], *args: Any) -> list[str]:
        jaxpr: Any = jax.make_jaxpr(run)(*args).jaxpr
        return [eqn.params["name"] for eqn in jaxpr.eqns if "name" in eqn.params]

    ids = jnp.asarray(IDS)
    assert "_forward" not in calls(lambda model, ids: model(ids).logits, MODEL, ids)
    assert "_forward" not in calls(lambda ids: MODEL(ids).logits, ids)  # the model is a constant here
    before = programs()
    out = jax.jit(lambda model, ids: model(ids).logits)(MODEL, ids)
    jax.jit(jax.vmap(lambda ids: MODEL(ids[None]).logits))(ids)
    assert programs() == before
    np.testing.assert_allclose(out, logits(MODEL), rtol=1e-4, atol=1e-5)


def test_inputs_come_in_every_form() -> None:
    expected = logits(MODEL)

    class Tensor:
        """An array of another library."""

        def __array__(self, dtype: Any = None, copy: Any = None) -> Array:
            return IDS

    rows = [np.asarray(row) for row in IDS]
    for form in (IDS.astype(np.uint8), IDS.tolist(), tuple(map(tuple, IDS.tolist())), rows, Tensor(), jnp.asarray(IDS)):
        np.testing.assert_array_equal(logits(MODEL, form), expected)
    vectors = MODEL.params["embed"]["word"]["embedding"][IDS]
    np.testing.assert_allclose(logits(MODEL, None, inputs_embeds=vectors), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(logits(MODEL, attention_mask=None, token_type_ids=np.zeros_like(IDS)), expected)
    assert logits(MODEL, np.zeros((0, 7), np.int32)).shape == (0, 7, VOCAB)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"input_id": IDS}, TypeError, r"BertForMaskedLM takes no input 'input_id'; did you mean input_ids"),
        ({"labels": IDS}, TypeError, r"takes no input 'labels'; it takes input_ids, attention_mask, token_type_ids"),
        ({}, ValueError, "give either input_ids or inputs_embeds"),
        ({"input_ids": IDS, "inputs_embeds": np.ones((2, 7, 24))}, ValueError, "input_ids or inputs_embeds, not both"),
        ({"input_ids": [[1, 50]]}, ValueError, "input_ids holds 1 to 50, outside the table of 50 rows"),
        ({"input_ids": [[-1, 5]]}, ValueError, "input_ids holds -1 to 5, outside the table of 50 rows"),
        ({"input_ids": IDS, "token_type_ids": IDS}, ValueError, "token_type_ids holds 0 to 39, outside the table of 2"),
        ({"input_ids": IDS, "position_ids": IDS}, ValueError, "position_ids holds 0 to 39, outside the table of 16"),
        ({"input_ids": [[1, 2], [3]]}, ValueError, "input_ids is not a rectangular array of numbers; pad the rows"),
        ({"input_ids": [np.arange(2), np.arange(3)]}, ValueError, "input_ids is not a rectangular array of numbers"),
        ({"input_ids": IDS, "attention_mask": [[1], [1, 1]]}, ValueError, "attention_mask is not a rectangular array"),
        ({"input_ids": [1, 2, 3]}, ValueError, r"input_ids must be \[batch, length\], got shape \(3,\)"),
        ({"input_ids": jnp.arange(3)}, ValueError, r"input_ids must be \[batch, length\], got shape \(3,\)"),
        ({"input_ids": [[]]}, ValueError, r"input_ids of shape \(1, 0\) has no positions"),
        ({"input_ids": np.zeros((1, 17), int)}, ValueError, "input_ids has 17 positions, the model has 16"),
        ({"input_ids": IDS / 2}, ValueError, "input_ids must hold whole numbers, it holds float64"),
        (
            {"input_ids": "some text"},
            ValueError,
            "input_ids must hold numbers, it holds 'some text'; a tokenizer makes",
        ),
        ({"input_ids": ["some text"]}, ValueError, r"input_ids must hold numbers, it holds \['some text'\]"),
        ({"input_ids": IDS, "attention_mask": np.ones((2, 6))}, ValueError, r"mask\.keys has shape \(2, 6\), but"),
        (
            {"input_ids": IDS, "key": 0},
            TypeError,
            r"key must be a jax.random.key, got int; write key=jax.random.key\(0\)",
        ),
    ],
)
def test_inputs_that_cannot_be_meant(inputs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MODEL(**inputs)


def test_multiple_choice_wants_choices() -> None:
    model = make("ForMultipleChoice", num_hidden_layers=1)
    choices = np.stack([IDS, IDS + 1, IDS + 2], axis=1)
    out = logits(model, choices)
    assert out.shape == (2, 3)
    for i in range(3):
        np.testing.assert_allclose(logits(model, choices[:, i : i + 1])[:, 0], out[:, i], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"multiple choice takes \[batch, choices, length\], got input_ids \(2, 7\)"):
        model(IDS)
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model()


def test_dropout_is_on_exactly_when_a_key_is_given() -> None:
    model = make("ForSequenceClassification", num_hidden_layers=1)
    without = model.replace(
        config=model.config.replace(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0)
    )
    first, second = jax.random.key(1), jax.random.key(2)
    np.testing.assert_array_equal(logits(model), logits(without))
    np.testing.assert_allclose(logits(without, key=first), logits(without), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(logits(model, key=first), logits(model, key=first))
    assert np.abs(logits(model, key=first) - logits(model)).max() > 1e-2
    assert np.abs(logits(model, key=first) - logits(model, key=second)).max() > 1e-2
    # each place alone: in the layers, in the attention, before the head
    rates = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    for rate in rates:
        only = without.replace(config=without.config.replace(**{rate: 0.5}))
        assert np.abs(logits(only, key=first) - logits(without)).max() > 1e-2, rate


def test_a_cache_is_for_models_that_read_from_left_to_right() -> None:
    decoder = make("ForCausalLM", is_decoder=True)
    cache = decoder.init_cache(2, 9)
    out = decoder(IDS[:, :4], cache=cache)
    again = decoder(IDS[:, 4:], cache=out.cache)
    np.testing.assert_allclose(again.logits, decoder(IDS).logits[:, 4:], rtol=1e-4, atol=1e-4)
    assert [int(layer["attn"].length) for layer in again.cache] == [7, 7]
    with pytest.raises(ValueError, match="7 positions do not fit into a cache of 5"):
        decoder(IDS, cache=decoder.init_cache(2, 5))
    with pytest.raises(ValueError, match="2 layers need as many caches, got 1"):
        decoder(IDS, cache=cache[:1])
    with pytest.raises(ValueError, match="a cache needs is_decoder=True"):
        MODEL(IDS, cache=cache)
    with pytest.raises(TypeError, match="BertForMaskedLM does not decode step by step"):
        MODEL.init_cache(2, 9)


# --- a pytree


def test_the_leaves_of_a_model_are_its_parameters() -> None:
    leaves, tree = jax.tree.flatten(MODEL)
    assert [id(leaf) for leaf in leaves] == [id(leaf) for leaf in jax.tree.leaves(MODEL.params)]
    same(jax.tree.unflatten(tree, leaves), MODEL)
    doubled = jax.tree.map(lambda x: 2 * np.asarray(x), MODEL)
    np.testing.assert_array_equal(doubled.params["head"]["bias"], 2 * MODEL.params["head"]["bias"])
    assert doubled.config is MODEL.config
    assert structure(MODEL.replace(config=MODEL.config.replace(hidden_act="relu"))) != tree


def test_gradients_of_a_model_are_a_model() -> None:
    def loss(model: Model) -> jax.Array:
        return jnp.square(model(IDS).logits).mean()

    gradient = jax.jit(jax.grad(loss))(MODEL)
    assert isinstance(gradient, Model)
    assert structure(gradient) == structure(MODEL)
    # along a random direction, the slope that finite differences have
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), MODEL)
    slope = sum(
        float(jnp.vdot(a, b)) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    )

    def along(step: float) -> float:
        return float(loss(jax.tree.map(lambda x, d: x + step * d, MODEL, direction)))

    np.testing.assert_allclose(slope, (along(1e-3) - along(-1e-3)) / 2e-3, rtol=2e-2)


def test_stacked_layers_are_the_same_model() -> None:
    stacked = MODEL.replace(params={**MODEL.params, "layers": specs.stack(MODEL.params["layers"])})
    out = stacked(IDS, output_hidden_states=True)
    np.testing.assert_allclose(out.logits, logits(MODEL), rtol=1e-4, atol=1e-5)
    assert out.keys() == ["logits", "hidden_states"]
    assert len(out.hidden_states) == 3
    assert stacked.num_parameters() == MODEL.num_parameters()
    assert repr(stacked) == repr(MODEL)
    with pytest.raises(ValueError, match="unstack the layers before pruning"):
        stacked.prune_heads({0: [1]})


def test_a_model_without_layers_runs() -> None:
    model = make("ForMaskedLM", num_hidden_layers=0)
    out = model(IDS, output_hidden_states=True)
    assert out.logits.shape == (2, 7, VOCAB)
    assert len(out.hidden_states) == 1


# --- changing


def test_astype() -> None:
    half = MODEL.astype("bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    assert half.config.dtype == "bfloat16"
    assert half(IDS).logits.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(MODEL)} == {jnp.dtype(jnp.float32)}
    counted = MODEL.replace(params={**MODEL.params, "steps": jnp.arange(3)})
    assert counted.astype(jnp.float16).params["steps"].dtype == jnp.int32
    for wrong, message in (("int8", "is not floating-point"), ("floot", "is no dtype"), ("float64", "jax_enable_x64")):
        with pytest.raises(ValueError, match=message):
            MODEL.astype(wrong)


def test_initial_dtypes() -> None:
    c = MODEL.config.replace(num_hidden_layers=0)

    def dtype(c: Config, given: Any = None) -> str:
        model = formax.AutoModelForMaskedLM.from_config(c, key=jax.random.key(0), dtype=given)
        (found,) = {leaf.dtype.name for leaf in jax.tree.leaves(model)}
        return str(found)

    assert dtype(c) == "float32"
    assert dtype(c.replace(dtype="float16")) == "float16"
    assert dtype(c.replace(dtype="float16"), jnp.bfloat16) == "bfloat16"
    with pytest.raises(ValueError, match="dtype='floot' is no dtype"):
        dtype(c.replace(dtype="floot"))


@config
class CounterConfig(Config):
    """A toy with a buffer."""

    model_type: ClassVar[str] = "counter"
    size: int = 3
    vocab_size: int = 5


def counter(p: Any, c: CounterConfig, x: Any = None, key: Any = None) -> BaseModelOutput:
    return BaseModelOutput(last_hidden_state=x * p["scale"] + p["mean"])


COUNTER = Architecture(
    "Counter",
    "",
    lambda c: {
        "scale": Param((c.size,), ("embed",), "weight", specs.ones),
        "mean": Param((c.size,), ("embed",), "running_mean", buffer=True),
    },
    counter,
)
TOYS = Family("counter", CounterConfig, base="", inputs=counter, architectures=(COUNTER,))


def test_parameters_are_counted_with_and_without_buffers() -> None:
    toy = Model.initialise(CounterConfig(size=6), COUNTER, TOYS, jax.random.key(0))
    assert toy.num_parameters() == 12
    assert toy.num_parameters(only_trainable=True) == 6
    assert MODEL.num_parameters() == MODEL.num_parameters(only_trainable=True) == specs.count(MODEL.spec)
    assert MODEL.num_parameters() == sum(leaf.size for leaf in jax.tree.leaves(MODEL.params))
    assert repr(MODEL) == f"BertForMaskedLM({MODEL.num_parameters():,} parameters)"
    assert repr(jax.tree.map(lambda x: x.shape == (), MODEL))  # of whatever leaves
    np.testing.assert_array_equal(toy(x=jnp.ones((2, 6))).last_hidden_state, np.ones((2, 6)))
    with pytest.raises(TypeError, match="Counter does not decode step by step, so it has no cache"):
        toy.init_cache(1, 2)


def test_describe_prints_the_models_own_table() -> None:
    text = MODEL.astype("bfloat16").describe()
    (row,) = [line.split() for line in text.splitlines() if line.startswith("embed.word.embedding")]
    assert " ".join(row[1:]) == "50 x 24 bfloat16 vocab, embed bert.embeddings.word_embeddings.weight"
    assert text.endswith(f"{MODEL.num_parameters():,} parameters in {len(jax.tree.leaves(MODEL))} arrays")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("size", [53, 41, VOCAB])
def test_resizing_the_vocabulary(tied: bool, size: int, tmp_path: Path) -> None:
    model = MODEL if tied else make("ForMaskedLM", tie_word_embeddings=False)
    resized = model.resize_token_embeddings(size, key=jax.random.key(3))
    kept = min(size, VOCAB)
    assert resized.config.vocab_size == size
    for path, leaf in specs.flatten(resized.params).items():
        old = specs.flatten(model.params)[path]
        rows = tuple(slice(kept) if a != b else slice(None) for a, b in zip(leaf.shape, old.shape, strict=True))
        np.testing.assert_array_equal(leaf[rows], old[rows], err_msg=str(path))
    # the words that stay mean what they meant
    ids = IDS % kept
    out = logits(resized, ids)
    assert out.shape == (2, 7, size)
    np.testing.assert_allclose(out[..., :kept], logits(model, ids)[..., :kept], rtol=1e-4, atol=1e-4)
    resized.save_pretrained(tmp_path)
    same(formax.from_pretrained(tmp_path), resized.replace(config=formax.AutoConfig.from_pretrained(tmp_path)))
    np.testing.assert_array_equal(logits(formax.from_pretrained(tmp_path), ids), out)


def test_new_words_start_around_the_mean_of_the_old() -> None:
    old = MODEL.params["embed"]["word"]["embedding"]
    new = MODEL.resize_token_embeddings(2000).params["embed"]["word"]["embedding"][VOCAB:]
    np.testing.assert_allclose(new.mean(0), old.mean(0), atol=2e-3)
    np.testing.assert_allclose(new.std(0), 0.01 * old.std(0), rtol=0.15)
    bias = MODEL.resize_token_embeddings(60).params["head"]["bias"]
    np.testing.assert_allclose(bias[VOCAB:], MODEL.params["head"]["bias"].mean(), rtol=1e-5)
    draws = [MODEL.resize_token_embeddings(60, key=jax.random.key(i)).params for i in (0, 0, 1)]
    jax.tree.map(np.testing.assert_array_equal, draws[0], draws[1])
    assert np.any(draws[0]["embed"]["word"]["embedding"] != draws[2]["embed"]["word"]["embedding"])
    half = MODEL.astype("bfloat16").resize_token_embeddings(60).params["embed"]["word"]["embedding"]
    assert half.dtype == jnp.bfloat16


def test_vocabularies_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="a vocabulary needs at least one token, got 0"):
        MODEL.resize_token_embeddings(0)
    with pytest.raises(ConfigError, match="vocab_size=3000000000 is larger than any array"):
        MODEL.resize_token_embeddings(3_000_000_000)
    wrong = MODEL.replace(config=MODEL.config.replace(vocab_size=49))
    with pytest.raises(ValueError, match=r"embed\.word\.embedding has 50 tokens along axis 0, the configuration 49"):
        wrong.resize_token_embeddings(60)


@pytest.mark.parametrize("positions", ["absolute", "relative_key_query"])
def test_pruned_heads_are_masked_heads(positions: str, tmp_path: Path) -> None:
    model = make("ForMaskedLM", position_embedding_type=positions)
    heads = {0: [1, 2], 1: [0]}
    mask = np.ones((2, 4), np.float32)
    for layer, some in heads.items():
        mask[layer, some] = 0
    pruned = model.prune_heads(heads)
    np.testing.assert_allclose(logits(pruned), logits(model, head_mask=mask), rtol=1e-4, atol=1e-5)
    assert pruned.params["layers"][0]["attn"]["q"]["kernel"].shape == (24, 12)
    assert pruned.params["layers"][1]["attn"]["o"]["kernel"].shape == (18, 24)
    assert pruned.num_parameters() == model.num_parameters() - 3 * (4 * 24 * 6 + 3 * 6) == specs.count(pruned.spec)
    # one head after the other, by the numbers of the whole model, and again without effect
    stepwise = model.prune_heads({0: [2]}).prune_heads({1: [0], 0: [1]}).prune_heads({0: [1, 2], 1: []})
    same(stepwise, pruned)
    pruned.save_pretrained(tmp_path)
    opened = formax.from_pretrained(tmp_path)
    assert opened.config.pruned_heads == {0: (1, 2), 1: (0,)}
    np.testing.assert_array_equal(logits(opened), logits(pruned))


def test_heads_that_cannot_be_pruned() -> None:
    for heads, message in (
        ({2: [0]}, "cannot prune layer 2: there are 2 layers"),
        ({-1: [0]}, "cannot prune layer -1: there are 2 layers"),
        ({0: [1, 4]}, "cannot prune head 4 of layer 0: there are 4 heads"),
        ({0: [-1]}, "cannot prune head -1 of layer 0"),
        ({0: [0, 1, 2, 3]}, "cannot prune all heads of layer 0"),
    ):
        with pytest.raises(ValueError, match=message):
            MODEL.prune_heads(heads)
    with pytest.raises(ValueError, match="cannot prune all heads of layer 1"):
        MODEL.prune_heads({1: [0, 3]}).prune_heads({1: [1, 2]})
    assert MODEL.prune_heads({0: []}).config == MODEL.config
