"""Named places: what is seen, what is changed, and that nobody pays when nobody looks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from formax.core import tap
from formax.core.spec import fold, stack
from formax.core.tap import Intervention, watch

DEPTH = 4
X = jnp.arange(3.0)
LAYERS = tuple({"w": jnp.asarray(0.5 + i)} for i in range(DEPTH))


def block(p: Any, x: jax.Array, cache: Any, key: Any) -> tuple[jax.Array, Any]:
    with tap.scope("mlp"):
        hidden = tap.tap("hidden", jnp.sin(x) * p["w"])
        return tap.tap("out", x + hidden), cache


def network(layers: Any, x: jax.Array, remat: bool = False) -> jax.Array:
    x = tap.tap("in", x)
    x, _ = fold(block, layers, x, remat=remat)
    with tap.scope("head"):
        return tap.tap("out", 2 * x)


def by_hand(x: jax.Array, changes: dict[int, Any] | None = None) -> list[jax.Array]:
    """States after every layer; `changes` replace the hidden value of some."""
    states = []
    for i, p in enumerate(LAYERS):
        hidden = jnp.sin(x) * p["w"]
        x = x + (changes or {}).get(i, lambda h: h)(hidden)
        states.append(x)
    return states


FORMS = pytest.mark.parametrize(
    ("layers", "remat"),
    [(LAYERS, False), (LAYERS, True), (stack(LAYERS), False), (stack(LAYERS), True)],
    ids=["unrolled", "unrolled-remat", "scanned", "scanned-remat"],
)


@FORMS
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_values_are_seen_in_the_order_of_the_layers(layers: Any, remat: bool, jit: bool) -> None:
    def seen(layers: Any, x: jax.Array) -> dict[str, jax.Array]:
        with watch(("layers.*.out", "**.hidden", "head.out")) as state:
            network(layers, x, remat)
        return state.find(("layers.*.out", "layers.2.mlp.hidden", "head.out"))

    found = (jax.jit(seen) if jit else seen)(layers, X)
    names = [*(f"layers.{i}.out" for i in range(DEPTH)), "layers.2.mlp.hidden", "head.out"]
    assert sorted(found) == sorted(names)
    if not jit:
        assert list(found) == names
    for i, state in enumerate(by_hand(X)):
        np.testing.assert_allclose(found[f"layers.{i}.out"], state, rtol=1e-6)
    np.testing.assert_allclose(found["layers.2.mlp.hidden"], jnp.sin(by_hand(X)[1]) * 2.5, rtol=1e-6)
    np.testing.assert_allclose(found["head.out"], 2 * by_hand(X)[-1], rtol=1e-6)


@FORMS
def test_changes_reach_their_layers_only(layers: Any, remat: bool) -> None:
    def run(layers: Any, x: jax.Array, *changes: Intervention) -> jax.Array:
        with watch(interventions=changes):
            return network(layers, x, remat)

    one = Intervention("layers.1.mlp.hidden", lambda h: -h)
    np.testing.assert_allclose(run(layers, X, one), 2 * by_hand(X, {1: lambda h: -h})[-1], rtol=1e-6)
    every = Intervention("**.hidden", lambda h: 0 * h)
    np.testing.assert_allclose(run(layers, X, every), 2 * X, rtol=1e-6)
    # several change a value one after the other
    both = run(layers, X, Intervention("in", lambda x: x + 1), Intervention("in", lambda x: 3 * x))
    np.testing.assert_allclose(both, 2 * by_hand(3 * (X + 1))[-1], rtol=1e-6)
    scaled = Intervention("layers.*.mlp.hidden", lambda h, layer: h * jnp.arange(10.0)[layer], indexed=True)
    expected = by_hand(X, {i: lambda h, i=i: h * i for i in range(DEPTH)})[-1]
    np.testing.assert_allclose(jax.jit(run, static_argnums=2)(layers, X, scaled), 2 * expected, rtol=1e-6)


@FORMS
def test_gradients_pass_through_what_is_seen_and_changed(layers: Any, remat: bool) -> None:
    def loss(layers: Any, x: jax.Array) -> jax.Array:
        with watch(("layers.*.mlp.hidden",), (Intervention("layers.2.mlp.hidden", lambda h: h**2),)) as state:
            network(layers, x, remat)
        return sum(jnp.sum(value) for value in state.seen.values())  # type: ignore[return-value]

    def expected(x: jax.Array) -> jax.Array:
        before = [x, *by_hand(x, {2: lambda h: h**2})]
        hidden = [jnp.sin(state) * p["w"] for state, p in zip(before, LAYERS, strict=False)]
        hidden[2] = hidden[2] ** 2
        return jnp.sum(jnp.stack(hidden))

    found = jax.jit(jax.grad(loss, argnums=1))(layers, X)
    np.testing.assert_allclose(found, jax.grad(expected)(X), rtol=1e-5)


@FORMS
def test_a_changed_value_keeps_shape_and_dtype(layers: Any, remat: bool) -> None:
    def run(change: Any) -> jax.Array:
        halves = jax.tree.map(lambda w: w.astype(jnp.bfloat16), layers)
        with watch(interventions=(Intervention("layers.1.mlp.hidden", change),)):
            return network(halves, X.astype(jnp.bfloat16), remat)

    assert run(lambda h: np.zeros(3)).dtype == jnp.bfloat16
    with pytest.raises(
        ValueError, match=r"turned layers\.1\.mlp\.hidden of shape \(3,\) into \(1, 3\); keep the shape"
    ):
        run(lambda h: h[None])


@FORMS
def test_nobody_watching_costs_nothing(layers: Any, remat: bool) -> None:
    def plain(layers: Any, x: jax.Array) -> jax.Array:
        return network(layers, x, remat)

    def watched(layers: Any, x: jax.Array) -> jax.Array:
        with watch():
            return network(layers, x, remat)

    def collected(layers: Any, x: jax.Array) -> Any:
        with watch(("**.hidden",)) as state:
            return network(layers, x, remat), state.seen

    programs = [str(jax.make_jaxpr(run)(layers, X)) for run in (plain, watched, collected)]
    assert programs[0] == programs[1]
    assert programs[0] != programs[2]
    assert tap.tap("anything", X) is X


def matches(pattern: str) -> set[str]:
    places = ("out", "embed.out", "layers.0.out", "layers.0.attn.out", "layers.10.attn.weights", "layers")
    return {place for place in places if tap._regex(pattern).fullmatch(place)}


def test_patterns() -> None:
    assert matches("out") == {"out"}
    assert matches("*") == {"out", "layers"}
    assert matches("*.out") == {"embed.out"}
    assert matches("**.out") == {"out", "embed.out", "layers.0.out", "layers.0.attn.out"}
    assert matches("layers.*.out") == {"layers.0.out"}
    assert matches("layers.**.out") == {"layers.0.out", "layers.0.attn.out"}
    assert matches("layers.1*.attn.*") == {"layers.10.attn.weights"}
    assert matches("layers.0.**") == {"layers.0.out", "layers.0.attn.out"}
    assert matches("layers.**") == {"layers", "layers.0.out", "layers.0.attn.out", "layers.10.attn.weights"}
    assert len(matches("**")) == 6
    assert matches("layers.0-out") == matches("layers.0") == matches("layer..0.out") == set()


@FORMS
def test_a_pattern_that_matches_nothing_names_what_there_is(layers: Any, remat: bool) -> None:
    there = "there are: head.out, in, layers.*.mlp.hidden, layers.*.mlp.out, layers.*.out"
    with pytest.raises(ValueError, match=rf"'layers.9.out' matches nothing in this forward pass; {there}"):  # noqa: SIM117
        with watch(("layers.9.out",)):
            network(layers, X, remat)
    with pytest.raises(ValueError, match=r"'\*\*.attn' matches nothing"):  # noqa: SIM117
        with watch(interventions=(Intervention("**.attn", lambda x: x),)):
            network(layers, X, remat)
    with watch(interventions=(Intervention("**.attn", lambda x: x, required=False),), optional=("nothing",)):
        network(layers, X, remat)


def test_an_error_ends_the_watch() -> None:
    with pytest.raises(KeyError), watch(("nothing",)), tap.scope("a"):
        raise KeyError
    assert tap.tap("out", X) is X
    with watch(("out",)) as state:
        tap.tap("out", X)
    assert list(state.seen) == ["out"]


def test_an_inner_watch_sees_for_itself() -> None:
    with watch(("out",)) as outer:
        tap.tap("out", X)
        with watch(("out",)) as inner:
            tap.tap("out", X + 1)
    np.testing.assert_array_equal(outer.seen["out"], X)
    np.testing.assert_array_equal(inner.seen["out"], X + 1)


def test_a_numbered_change_needs_a_numbered_place() -> None:
    change = Intervention("head.out", lambda x, layer: x, indexed=True)
    with pytest.raises(ValueError, match=r"head\.out is in no numbered layer"), watch(interventions=(change,)):
        network(LAYERS, X)


def test_scans_do_not_nest() -> None:
    def outer(p: Any, x: jax.Array, cache: Any, key: Any) -> tuple[jax.Array, Any]:
        return fold(block, p, x)

    twice = jax.tree.map(lambda w: jnp.stack([w, w]), stack(LAYERS))
    assert fold(outer, twice, X)[0].shape == X.shape  # as long as nobody looks
    with pytest.raises(NotImplementedError, match="a scan over layers inside a scan over layers"), watch():
        fold(outer, twice, X)
    # unrolled inside, or outside, is fine
    pairs = tuple({"pair": LAYERS[2 * i : 2 * i + 2]} for i in range(2))

    def inner(p: Any, x: jax.Array, cache: Any, key: Any) -> tuple[jax.Array, Any]:
        return fold(block, p["pair"], x, name="half")

    for layers in (pairs, stack(pairs)):
        with watch(("layers.*.half.*.out",)) as state:
            fold(inner, layers, X)
        found = [state.seen[f"layers.{i}.half.{j}.out"] for i in range(2) for j in range(2)]
        np.testing.assert_allclose(np.stack(found), np.stack(by_hand(X)), rtol=1e-6)
