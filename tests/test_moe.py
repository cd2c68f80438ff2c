"""Mixtures of experts against their formulas; that idle experts are not run; routers that can be seen and changed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from formax.core import spec as specs
from formax.core.tap import Intervention, watch
from formax.layers import moe
from formax.models.text import mixtral

Rows = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def rows(sizes: list[int], d_in: int = 5, d_out: int = 7) -> Rows:
    """Rows in groups of these sizes, the matrices, the sizes, and each row's group."""
    x = jax.random.normal(jax.random.key(0), (sum(sizes), d_in))
    w = jax.random.normal(jax.random.key(1), (len(sizes), d_in, d_out))
    return x, w, jnp.array(sizes), jnp.repeat(jnp.arange(len(sizes)), jnp.array(sizes))


def each_its_own(x: jax.Array, w: jax.Array, group: jax.Array) -> jax.Array:
    """The same product with a matrix copied for every row."""
    return jnp.einsum("mi,mio->mo", x, w[group])


SIZES = [[1], [3, 0, 2], [0, 0, 4], [1, 1, 1, 1, 1, 1, 1], [40, 0, 9, 1, 70], [200, 3], [0, 129]]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_row_is_multiplied_by_the_matrix_of_its_group(sizes: list[int]) -> None:
    x, w, counts, group = rows(sizes)
    np.testing.assert_allclose(jax.jit(moe.grouped)(x, w, counts), each_its_own(x, w, group), atol=1e-5)


@pytest.mark.parametrize("sizes", [[1, 0, 2], [40, 0, 9, 1, 70]], ids=str)
def test_derivatives_of_first_and_second_order(sizes: list[int]) -> None:
    x, w, counts, group = rows(sizes)

    def curved(product: Callable[..., jax.Array], x: jax.Array, w: jax.Array) -> jax.Array:
        slopes = jax.grad(lambda x, w: jnp.sin(product(x, w)).sum(), (0, 1))(x, w)
        return sum((jnp.vdot(jnp.cos(slope), slope) for slope in slopes), start=jnp.zeros(()))

    found, expected = (
        jax.jit(jax.value_and_grad(partial(curved, product), (0, 1)))(x, w)
        for product in (lambda x, w: moe.grouped(x, w, counts), lambda x, w: each_its_own(x, w, group))
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), found, expected)


def test_vmap() -> None:
    x, w, counts, group = rows([3, 0, 20])
    batch = jnp.stack([x, 2 * x])
    found = jax.vmap(lambda x: moe.grouped(x, w, counts))(batch)
    np.testing.assert_allclose(found, jax.vmap(lambda x: each_its_own(x, w, group))(batch), atol=1e-5)
    other = jnp.array([[3, 0, 20], [10, 10, 3]])  # the groups differ, too
    found = jax.vmap(lambda x, counts: moe.grouped(x, w, counts))(batch, other)
    for one, x, counts in zip(found, batch, other, strict=True):
        np.testing.assert_allclose(one, moe.grouped(x, w, counts), atol=1e-5)


def test_idle_experts_are_not_run() -> None:
    # a product with a matrix that was not asked for would make everything NaN, even times zero
    x, w, counts, _ = rows([3, 0, 20, 0])
    poisoned = w.at[jnp.array([1, 3])].set(jnp.nan)

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sin(moe.grouped(x, w, counts)).sum()

    value, (dx, dw) = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, poisoned)
    assert np.isfinite([value, jnp.abs(dx).max(), jnp.abs(dw).max()]).all()
    assert not dw[jnp.array([1, 3])].any()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_work_grows_with_the_rows_and_not_with_the_experts(sizes: list[int]) -> None:
    size, (first, group, total), _ = moe._blocks(jnp.array(sizes), sum(sizes))
    assert total <= len(first)
    assert int(total) * size <= sum(sizes) + size * np.count_nonzero(sizes)
    assert sorted(set(group[: int(total)].tolist())) == np.flatnonzero(sizes).tolist()


@pytest.mark.parametrize(("platform", "at_once"), [("tpu", True), ("cpu", False), ("cuda", False)])
def test_only_a_tpu_has_an_instruction(platform: str, at_once: bool) -> None:
    x, w, counts, _ = rows([3, 5])
    loss = jax.grad(lambda x, w: moe.grouped(x, w, counts).sum(), (0, 1))
    text = jax.export.export(jax.jit(loss), platforms=[platform])(x, w).mlir_module()
    assert ("ragged_dot" in text) == at_once


# ---- layer ----------------------------------------------------------------------------------------------------------

E, INNER, X, K = 6, 10, 5, 2


@pytest.fixture
def layer() -> dict[str, Any]:
    names = ("gate", "experts.{}.w1", "experts.{}.w3", "experts.{}.w2")
    return specs.init(moe.gated_spec(E, INNER, X, names, init=specs.normal(0.5)), jax.random.key(0))


def by_hand(p: dict[str, Any], x: np.ndarray) -> np.ndarray:
    """The layer, token by token and expert by expert."""
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape[:2]):
        scores = x[place] @ np.asarray(p["router"]["kernel"])
        best = np.argsort(-scores)[:K]
        shares = np.exp(scores[best]) / np.exp(scores[best]).sum()
        for share, expert in zip(shares, best, strict=True):
            gate, up, down = (np.asarray(p["experts"][part]["kernel"][expert]) for part in ("gate", "up", "down"))
            hidden = x[place] @ gate
            out[place] += share * (hidden / (1 + np.exp(-hidden)) * (x[place] @ up)) @ down
    return out


def test_the_layer_is_its_formula(layer: dict[str, Any]) -> None:
    x = np.random.RandomState(0).standard_normal((2, 9, E)).astype(np.float32)
    found, logits = jax.jit(lambda x: moe.gated(layer, x, "silu", K))(x)
    np.testing.assert_allclose(found, by_hand(layer, x), atol=1e-5)
    np.testing.assert_allclose(logits, x @ layer["router"]["kernel"], atol=1e-5)


def test_every_expert_on_every_token_is_the_mean_weighed_by_the_router(layer: dict[str, Any]) -> None:
    x = jax.random.normal(jax.random.key(2), (1, 4, E))
    everyone, logits = moe.gated(layer, x, "silu", X)
    shares = jax.nn.softmax(logits)
    parts = [moe.run_experts(layer["experts"], x[0], jnp.ones((4, 1)), jnp.full((4, 1), i), "silu") for i in range(X)]
    np.testing.assert_allclose(
        everyone[0], sum(shares[0, :, i, None] * part for i, part in enumerate(parts)), atol=1e-5
    )


def test_what_routers_choose_can_be_seen_and_changed(layer: dict[str, Any]) -> None:
    x = jax.random.normal(jax.random.key(2), (2, 4, E))
    with watch(("mlp.router", "mlp.experts", "mlp.shares", "mlp.out")) as seen:
        out, logits = moe.gated(layer, x, "silu", K)
    chosen, shares = seen.seen["mlp.experts"], seen.seen["mlp.shares"]
    np.testing.assert_array_equal(seen.seen["mlp.router"], logits)
    np.testing.assert_array_equal(seen.seen["mlp.out"], out)
    np.testing.assert_array_equal(chosen, jax.lax.top_k(logits, K)[1])
    np.testing.assert_allclose(shares.sum(-1), 1, rtol=1e-6)

    everywhere = Intervention("mlp.experts", lambda chosen: jnp.broadcast_to(jnp.array([3, 1]), chosen.shape))
    with watch(("mlp.shares",), (everywhere,)) as seen:
        changed, _ = moe.gated(layer, x, "silu", K)
    # the shares are those of the experts that are run
    expected = jax.nn.softmax(logits[..., jnp.array([3, 1])])
    np.testing.assert_allclose(seen.seen["mlp.shares"], expected, rtol=1e-5)
    flat = moe.run_experts(
        layer["experts"], x.reshape(-1, E), expected.reshape(-1, K), jnp.tile(jnp.array([3, 1]), (8, 1)), "silu"
    )
    np.testing.assert_allclose(changed.reshape(-1, E), flat, atol=1e-5)


def test_noise_comes_with_a_key(layer: dict[str, Any]) -> None:
    x = jax.random.normal(jax.random.key(2), (2, 4, E))
    quiet = moe.gated(layer, x, "silu", K)[1]
    np.testing.assert_array_equal(moe.gated(layer, x, "silu", K, noise=0.1)[1], quiet)
    np.testing.assert_array_equal(moe.gated(layer, x, "silu", K, key=jax.random.key(3))[1], quiet)
    noisy = moe.gated(layer, x, "silu", K, noise=0.1, key=jax.random.key(3))[1]
    assert 0 < np.abs(noisy - quiet).max() < 0.1 * E * np.abs(x).max() * np.abs(layer["router"]["kernel"]).max()


def test_experts_in_bfloat16(layer: dict[str, Any]) -> None:
    x = jax.random.normal(jax.random.key(2), (2, 30, E))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), layer)
    found, logits = moe.gated(half, x.astype(jnp.bfloat16), "silu", K)
    assert (found.dtype, logits.dtype) == (jnp.bfloat16, jnp.bfloat16)


# ---- loss -----------------------------------------------------------------------------------------------------------


def test_the_balancing_loss_is_least_when_all_experts_are_used_alike() -> None:
    even = jnp.tile(jnp.eye(X), (3, 1))[None] * 1e-3
    one = jnp.zeros((1, 15, X)).at[..., 2].set(50.0)
    assert moe.load_balancing_loss([even], 1) == pytest.approx(1, abs=1e-3)
    assert moe.load_balancing_loss([even, even], 1) == pytest.approx(1, abs=1e-3)
    assert moe.load_balancing_loss([one], 1) == pytest.approx(X, abs=1e-3)
    # layers count together: each uses a single expert, all of them use two
    other = jnp.roll(one, 1, -1)
    assert moe.load_balancing_loss([one, other], 1) == pytest.approx(X / 2, abs=1e-3)


def test_padding_does_not_count_for_the_balancing_loss() -> None:
    logits = jax.random.normal(jax.random.key(0), (2, 8, X))
    mask = jnp.array([[1] * 8, [1] * 3 + [0] * 5])
    tokens = jnp.concatenate([logits[0], logits[1, :3]])[None]
    expected = float(moe.load_balancing_loss([tokens], K))
    assert moe.load_balancing_loss([logits], K, mask) == pytest.approx(expected, rel=1e-5)
    assert moe.load_balancing_loss([logits], K, 0 * mask) == 0


# ---- model ----------------------------------------------------------------------------------------------------------

CONFIG = mixtral.MixtralConfig(
    vocab_size=31,
    hidden_size=12,
    intermediate_size=10,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_local_experts=X,
    output_router_logits=True,
    initializer_range=0.3,
)
IDS = jax.random.randint(jax.random.key(5), (2, 9), 0, 31)


def test_scanned_layers_and_their_routers() -> None:
    params = specs.init(mixtral.FAMILY.architectures[1].spec(CONFIG), jax.random.key(0))
    one_by_one = mixtral.causal_lm(params, CONFIG, IDS)
    scanned = jax.jit(lambda p: mixtral.causal_lm(p, CONFIG, IDS))(params | {"layers": specs.stack(params["layers"])})
    assert [logits.shape for logits in scanned.router_logits or ()] == [(18, X)] * 3
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), scanned, one_by_one)


def test_the_balancing_loss_trains_the_routers() -> None:
    params = specs.init(mixtral.FAMILY.architectures[1].spec(CONFIG), jax.random.key(0))

    def loss(params: Any) -> jax.Array:
        aux = mixtral.causal_lm(params, CONFIG, IDS).aux_loss
        assert aux is not None
        return aux

    slopes = jax.jit(jax.grad(loss))(params)
    assert all(np.abs(layer["mlp"]["router"]["kernel"]).max() > 1e-4 for layer in slopes["layers"])


def test_without_layers() -> None:
    config = CONFIG.replace(num_hidden_layers=0, output_router_logits=False)
    params = specs.init(mixtral.model_spec(config), jax.random.key(0))
    assert mixtral.model(params, config, IDS).last_hidden_state.shape == (2, 9, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 6}, "num_experts_per_tok=6 must be from 1 to num_local_experts=5"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0"),
        ({"sliding_window": 0}, "sliding_window=0 must be null, or at least 1"),
        ({"num_key_value_heads": 3}, "num_attention_heads=2 is no multiple of num_key_value_heads=3"),
        ({"hidden_act": "gleu"}, "hidden_act='gleu' is none of"),
    ],
)
def test_impossible_configurations(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CONFIG.replace(**change)
