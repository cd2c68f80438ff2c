"""Looking into BERT and reaching inside, checked against its forward pass written out in float64."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import formax
from formax.core import spec as specs
from formax.layers import text_encoder
from formax.model import Model, _compiled_forward
from formax.models.text import bert

Array = np.ndarray[Any, Any]
LAYERS, HEADS, SIZE, LENGTH = 2, 4, 24, 7
CONFIG = bert.BertConfig(
    vocab_size=50,
    hidden_size=SIZE,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    intermediate_size=40,
    max_position_embeddings=16,
)
IDS = np.arange(2 * LENGTH).reshape(2, LENGTH) * 3 % 50
MASK = np.ones((2, LENGTH), np.int32)
MASK[1, 5:] = 0
OTHER = (IDS + 11) % 50
close = partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)


def made() -> Model:
    """A model in which no parameter is zero or one."""
    rng = np.random.default_rng(0)

    def leaf(entry: specs.Entry) -> jax.Array:
        mean = 1.0 if entry.param.init is specs.ones else 0.0
        return jnp.asarray((mean + 0.3 * rng.normal(size=entry.param.shape)).astype(np.float32))

    (architecture,) = (found for found in bert.FAMILY.architectures if found.task == "")
    return Model(specs.build(architecture.spec(CONFIG), leaf), CONFIG, architecture, bert.FAMILY)


MODEL = made()
STACKED = MODEL.replace(params={**MODEL.params, "layers": specs.stack(MODEL.params["layers"])})
FORMS = pytest.mark.parametrize("model", [MODEL, STACKED], ids=["unrolled", "stacked"])


def by_hand(ids: Array, mask: Array, changes: Mapping[str, Callable[[Any], Any]] | None = None) -> dict[str, Array]:
    """All places of the forward pass; `changes` replace some on the way."""
    p: Any = jax.tree.map(lambda x: np.asarray(x, np.float64), MODEL.params)
    seen: dict[str, Array] = {}

    def tap(name: str, value: Array) -> Array:
        seen[name] = np.asarray((changes or {}).get(name, lambda x: x)(value), np.float64)
        return seen[name]

    def affine(q: Any, x: Array) -> Array:
        return x @ q["kernel"] + q["bias"]

    def normalised(q: Any, x: Array) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12) * q["scale"] + q["bias"]

    gelu = np.vectorize(lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))))
    batch, length = ids.shape
    e = p["embed"]
    x = e["word"]["embedding"][ids] + e["position"]["embedding"][:length] + e["token_type"]["embedding"][0]
    x = tap("embed.out", normalised(e["norm"], x))
    for i, layer in enumerate(p["layers"]):
        at = f"layers.{i}"
        q, k, v = (
            tap(f"{at}.attn.{name}", affine(layer["attn"][name], x).reshape(batch, length, HEADS, -1)) for name in "qkv"
        )
        scores = tap(f"{at}.attn.scores", np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(SIZE // HEADS))
        unmasked = np.exp(scores) * mask[:, None, None, :]
        weights = tap(f"{at}.attn.weights", unmasked / unmasked.sum(-1, keepdims=True))
        out = np.einsum("bhts,bshd->bthd", weights, v).reshape(batch, length, SIZE)
        x = normalised(layer["attn_norm"], x + tap(f"{at}.attn.out", affine(layer["attn"]["o"], out)))
        hidden = tap(f"{at}.mlp.hidden", gelu(affine(layer["mlp"]["up"], x)))
        x = normalised(layer["mlp_norm"], x + tap(f"{at}.mlp.out", affine(layer["mlp"]["down"], hidden)))
        x = tap(f"{at}.out", x)
    tap("pooler", np.tanh(affine(p["pooler"], x[:, 0])))
    return seen


EXPECTED = by_hand(IDS, MASK)


@FORMS
def test_every_place_holds_what_the_formulas_say(model: Model) -> None:
    out, seen = formax.capture(model, "**")(IDS, MASK)
    assert seen.keys() == EXPECTED.keys()
    for name, value in EXPECTED.items():
        close(seen[name], value, err_msg=name)
    np.testing.assert_array_equal(out.last_hidden_state, seen["layers.1.out"])
    np.testing.assert_array_equal(out.pooler_output, seen["pooler"])


@FORMS
def test_places_are_known_without_computing(model: Model) -> None:
    for ids in (IDS, IDS.tolist(), jax.ShapeDtypeStruct(IDS.shape, jnp.int32)):
        found = formax.places(model, input_ids=ids)
        assert {name: value.shape for name, value in found.items()} == {
            name: value.shape for name, value in EXPECTED.items()
        }
    assert not any(isinstance(value, jax.Array) for value in found.values())
    with pytest.raises(TypeError, match="takes no input 'inputs'"):
        formax.places(model, inputs=IDS)


@FORMS
def test_hugging_face_switches_are_captures(model: Model) -> None:
    out = model(IDS, MASK, output_hidden_states=True, output_attentions=True)
    states = ["embed.out", *(f"layers.{i}.out" for i in range(LAYERS))]
    for value, name in zip(out.hidden_states, states, strict=True):
        close(value, EXPECTED[name])
    for i, value in enumerate(out.attentions):
        close(value, EXPECTED[f"layers.{i}.attn.weights"])
    assert len(out.attentions) == LAYERS
    assert out.cross_attentions is None
    assert out.keys() == ["last_hidden_state", "pooler_output", "hidden_states", "attentions"]
    assert jax.eval_shape(lambda model: model(IDS, MASK), model).keys() == ["last_hidden_state", "pooler_output"]


def test_a_configuration_can_ask_for_them() -> None:
    asking = MODEL.replace(config=CONFIG.replace(output_hidden_states=True))
    assert len(jax.eval_shape(lambda model: model(IDS), asking).hidden_states) == LAYERS + 1
    assert jax.eval_shape(lambda model: model(IDS, output_hidden_states=False), asking).hidden_states is None


CHANGES: dict[str, Callable[[Any], Any]] = {
    "embed.out": lambda x: x[:, ::-1],
    "layers.0.attn.scores": lambda x: 2 * x,
    "layers.1.attn.weights": lambda x: x**2,
    "layers.1.mlp.hidden": lambda x: -x,
    "layers.1.attn.v": lambda x: x + 1,
}


@FORMS
def test_changes_do_what_the_formulas_say(model: Model) -> None:
    changed = formax.intervene(model, CHANGES)
    _, seen = formax.capture(changed, "**")(IDS, MASK)
    expected = by_hand(IDS, MASK, CHANGES)
    for name, value in expected.items():
        close(seen[name], value, err_msg=name)
    assert np.abs(expected["pooler"] - EXPECTED["pooler"]).max() > 0.1
    # changes made one after the other are one set of changes
    twice = model
    for pattern, change in CHANGES.items():
        twice = formax.intervene(twice, {pattern: change})
    assert twice.interventions == changed.interventions


def test_activation_patching() -> None:
    _, source = formax.capture(MODEL, "layers.0.mlp.out")(OTHER)
    value = source["layers.0.mlp.out"]
    patched = formax.intervene(MODEL, {"layers.0.mlp.out": lambda x: x.at[:, 2].set(value[:, 2])})(IDS, MASK)

    theirs = by_hand(OTHER, np.ones_like(MASK))["layers.0.mlp.out"]
    expected = by_hand(IDS, MASK, {"layers.0.mlp.out": lambda x: np.where(np.arange(LENGTH)[:, None] == 2, theirs, x)})
    close(patched.pooler_output, expected["pooler"])


@pytest.mark.parametrize(("model", "remat"), [(MODEL, True), (STACKED, False)], ids=["unrolled-remat", "stacked"])
def test_gradients_of_inner_values(model: Model, remat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_encoder, "fold", partial(specs.fold, remat=remat))
    changed = formax.intervene(model, {"layers.1.mlp.out": jnp.sin})

    @jax.jit
    @jax.grad
    def gradient(params: Any) -> jax.Array:
        _, seen = formax.capture(changed.replace(params=params), "layers.1.attn.weights", "layers.*.mlp.out")(IDS, MASK)
        return jnp.square(seen["layers.1.attn.weights"]).sum() + jnp.cos(seen["layers.1.mlp.out"]).sum()

    found = gradient(model.params)
    layers = found["layers"] if isinstance(found["layers"], tuple) else specs.unstack(found["layers"])
    # what comes later has no part in it
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((layers[1]["mlp_norm"], found["pooler"])))

    def loss(bias: float) -> Any:
        shift: dict[str, Callable[[Any], Any]] = {
            "layers.0.attn.out": lambda x: x + bias * (np.arange(SIZE) == 5),
            "layers.1.mlp.out": np.sin,
        }
        seen = by_hand(IDS, MASK, shift)
        return np.square(seen["layers.1.attn.weights"]).sum() + np.cos(seen["layers.1.mlp.out"]).sum()

    # the bias of the output projection is what is added to `attn.out`
    np.testing.assert_allclose(layers[0]["attn"]["o"]["bias"][5], (loss(1e-5) - loss(-1e-5)) / 2e-5, rtol=1e-3)


def test_gradients_with_respect_to_what_is_put_in() -> None:
    def loss(steering: jax.Array) -> jax.Array:
        changed = formax.intervene(MODEL, {"layers.0.out": lambda x: x + steering})
        return changed(IDS, MASK).pooler_output.sum()

    def reference(size: float) -> Any:
        changes = {"layers.0.out": lambda x: x + size * (np.arange(SIZE) == 3)}
        return by_hand(IDS, MASK, changes)["pooler"].sum()

    expected = (reference(1e-5) - reference(-1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(loss)(jnp.zeros(SIZE))[3], expected, rtol=1e-3)
    batched = jax.jit(jax.vmap(loss))(jnp.eye(SIZE)[:4])
    np.testing.assert_allclose(batched[3], reference(1.0), rtol=1e-3)


@FORMS
def test_head_masks_are_factors_on_the_weights(model: Model) -> None:
    factors = np.array([[1, 0, 1, 0.5], [0, 1, 0.25, 1]], np.float32)

    def times(layer: int) -> Callable[[Any], Any]:
        return lambda x: x * factors[layer][None, :, None, None]

    expected = by_hand(IDS, MASK, {f"layers.{i}.attn.weights": times(i) for i in range(LAYERS)})
    out, seen = formax.capture(model, "layers.*.attn.weights")(IDS, MASK, head_mask=factors)
    close(out.pooler_output, expected["pooler"])
    close(seen["layers.1.attn.weights"], expected["layers.1.attn.weights"])
    every = model(IDS, MASK, head_mask=factors[0])
    same = model(IDS, MASK, head_mask=np.tile(factors[0], (LAYERS, 1)))
    np.testing.assert_allclose(every.pooler_output, same.pooler_output, rtol=1e-6)


def test_head_masks_that_do_not_fit_are_refused() -> None:
    for shape, message in (
        ((3,), r"head_mask \(3,\) is for 3 heads, there are 4"),
        ((1, 4), r"head_mask must be \[heads\] or \[2 layers, heads\], got shape \(1, 4\)"),
        ((1, 2, 4), r"head_mask must be .* got shape \(1, 2, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            MODEL(IDS, head_mask=np.ones(shape))


def test_what_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="capture needs at least one pattern"):
        formax.capture(MODEL)
    with pytest.raises(
        ValueError, match=r"'layers\.2\.out' matches nothing in this forward pass; there are: embed\.out"
    ):
        formax.capture(MODEL, "layers.*.out", "layers.2.out")(IDS)
    with pytest.raises(ValueError, match=r"'layers\.0\.mpl\.out' matches nothing"):
        formax.intervene(MODEL, {"layers.0.mpl.out": jnp.sin})(IDS)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.out of shape \(2, 7, 24\) into \(\); keep the shape"):
        formax.intervene(MODEL, {"layers.0.mlp.out": jnp.sum})(IDS)


@FORMS
def test_nobody_watching_runs_the_plain_program(model: Model) -> None:
    ids, mask = jnp.asarray(IDS), jnp.asarray(MASK)

    def plain(params: Any) -> Any:
        return bert.model(params, CONFIG, ids, attention_mask=mask)

    def called(params: Any) -> Any:
        return model.replace(params=params)(ids, mask)

    def watched(params: Any) -> Any:
        return model.replace(params=params)(ids, mask, output_attentions=True)

    programs = [str(jax.make_jaxpr(run)(model.params)) for run in (plain, called, watched)]
    assert programs[0] == programs[1]
    assert programs[0] != programs[2]


def test_one_function_object_compiles_once() -> None:
    def change(x: jax.Array) -> jax.Array:
        return 3 * x

    compiled: Any = _compiled_forward
    before = compiled._cache_size()
    for _ in range(3):
        formax.intervene(MODEL, {"layers.0.mlp.out": change})(IDS[:, :3])
    assert compiled._cache_size() == before + 1


def test_interventions_belong_to_the_model(tmp_path: Path) -> None:
    changed = formax.intervene(MODEL, {"embed.out": lambda x: 0 * x})
    assert MODEL.interventions == ()
    again = jax.tree.map(lambda x: x, changed).astype("float32")
    np.testing.assert_array_equal(again(IDS).pooler_output, changed(IDS).pooler_output)
    with pytest.raises(ValueError, match="carries interventions"):
        changed.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_dropout_is_seen_too() -> None:
    key = jax.random.key(1)
    (_, once), (_, twice) = (
        formax.capture(MODEL, "layers.0.attn.weights", "layers.1.out")(IDS, key=key) for _ in range(2)
    )
    np.testing.assert_array_equal(once["layers.1.out"], twice["layers.1.out"])
    assert 0 < (np.asarray(once["layers.0.attn.weights"]) == 0).mean() < 0.3
