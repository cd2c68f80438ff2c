"""Attention against its formula in float64, with every kind of mask, and with caches."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formax.core import spec as specs
from formax.core.tap import Intervention, watch
from formax.layers.attention import (
    ALiBi,
    Bucketed,
    Indexed,
    KVCache,
    Mask,
    alibi_slopes,
    attention,
    attention_spec,
    cross_attention,
    from_attention_mask,
    self_attention,
)
from formax.layers.attention.bias import relative_key_bias

Array = np.ndarray[Any, Any]
B, T, S, H, K, D, DV = 2, 5, 7, 6, 2, 4, 3


def reference(
    q: Any, k: Any, v: Any, allowed: Any = True, bias: Any = 0.0, scale: float | None = None, factors: Any = 1.0
) -> Array:
    """Loops over batch, heads and queries, in float64; `factors` are for the weights."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    b, t, h, d = q.shape
    s, groups = k.shape[1], k.shape[2]
    allowed, bias, factors = (np.broadcast_to(np.asarray(x), (b, h, t, s)) for x in (allowed, bias, factors))
    out = np.zeros((b, t, h, v.shape[-1]))
    for i, head, row in itertools.product(range(b), range(h), range(t)):
        group = head // (h // groups)
        where = np.flatnonzero(allowed[i, head, row])
        if len(where):
            scores = k[i, where, group] @ q[i, row, head] * (d**-0.5 if scale is None else scale)
            scores = scores + bias[i, head, row, where].astype(np.float64)
            weights = np.exp(scores - scores.max())
            weights = weights / weights.sum() * factors[i, head, row, where]
            out[i, row, head] = weights @ v[i, where, group]
    return out


def qkv(heads: int = H, kv_heads: int = K, dtype: Any = jnp.float32, t: int = T, s: int = S) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(heads + kv_heads)
    shapes = ((B, t, heads, D), (B, s, kv_heads, D), (B, s, kv_heads, DV))
    return tuple(jnp.asarray(2 * rng.normal(size=shape), dtype) for shape in shapes)  # type: ignore[return-value]


def random(*shape: int) -> Array:
    return np.random.default_rng(7).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 2), (6, 1), (1, 1)])
def test_grouped_heads(heads: int, kv_heads: int) -> None:
    q, k, v = qkv(heads, kv_heads)
    out = attention(q, k, v)
    assert out.shape == (B, T, heads, DV)
    np.testing.assert_allclose(out, reference(q, k, v), rtol=1e-5, atol=1e-6)


def test_scale_and_bias() -> None:
    q, k, v = qkv()
    np.testing.assert_allclose(attention(q, k, v, scale=0.3), reference(q, k, v, scale=0.3), rtol=1e-5, atol=1e-6)
    for shape in ((H, T, S), (B, 1, 1, S), (1, H, T, S), (B, H, T, S)):
        bias = random(*shape)
        np.testing.assert_allclose(
            attention(q, k, v, bias=jnp.asarray(bias)), reference(q, k, v, bias=bias), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 3e-2), (jnp.float16, 4e-3)])
def test_half_precision(dtype: Any, tolerance: float) -> None:
    q, k, v = qkv(dtype=dtype)
    mask, bias = Mask(causal=True, q_offset=2), jnp.asarray(random(1, H, T, S), dtype)
    out = attention(q, k, v, mask=mask, bias=bias)
    assert out.dtype == dtype
    expected = reference(q, k, v, mask.materialise(T, S), bias)
    np.testing.assert_allclose(out.astype(np.float32), expected, rtol=tolerance, atol=tolerance)
    # scores of a few hundred overflow nothing: the softmax runs in float32
    assert np.isfinite(attention(200 * q, 200 * k, v, mask=mask).astype(np.float32)).all()


# --- masks


Q, J = np.arange(T)[:, None], np.arange(S)[None, :]
SEGMENTS = (np.array([[0, 0, 1, 1, 2], [3, 3, 3, 4, 4]]), np.array([[0, 0, 1, 1, 1, 2, 2], [3, 4, 4, 4, 5, 5, 3]]))
KEYS = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0, 1]], bool)
DENSE = np.random.default_rng(3).random((B, H, T, S)) < 0.6
PREFIX = np.array([2, 4])

MASKS: dict[str, tuple[Mask, Array]] = {
    "none": (Mask(), np.ones((1, 1, T, S), bool)),
    "causal": (Mask(causal=True), (J <= Q)[None, None]),
    "causal-offset": (Mask(causal=True, q_offset=2), (J <= Q + 2)[None, None]),
    "window": (Mask(window=(2, 1)), ((J >= Q - 2) & (J <= Q + 1))[None, None]),
    "window-left": (Mask(window=(1, None)), (J >= Q - 1)[None, None]),
    "window-right": (Mask(window=(None, 0)), (J <= Q)[None, None]),
    "window-offset": (Mask(window=(1, 0), q_offset=2), ((J >= Q + 1) & (J <= Q + 2))[None, None]),
    "kv_length": (Mask(kv_length=jnp.array([4, 6])), np.array([J < 4, J < 6])[:, None]),
    "keys": (Mask(keys=jnp.asarray(KEYS)), KEYS[:, None, None, :]),
    "segments": (
        Mask(segments=(jnp.asarray(SEGMENTS[0]), jnp.asarray(SEGMENTS[1]))),
        (SEGMENTS[0][:, :, None] == SEGMENTS[1][:, None, :])[:, None],
    ),
    "prefix": (
        Mask(causal=True, prefix=jnp.asarray(PREFIX)),
        ((J <= Q)[None] | (J[None] < PREFIX[:, None, None]))[:, None],
    ),
    "dense": (Mask(dense=jnp.asarray(DENSE)), DENSE),
    "dense-2d": (Mask(dense=jnp.asarray(DENSE[0, 0])), DENSE[:1, :1]),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    mask, allowed = MASKS[name]
    made = mask.materialise(T, S)
    np.testing.assert_array_equal(
        np.broadcast_to(True if made is None else made, (B, H, T, S)), np.broadcast_to(allowed, (B, H, T, S))
    )
    q, k, v = qkv()
    out = jax.jit(attention)(q, k, v, mask=mask)
    np.testing.assert_allclose(out, reference(q, k, v, allowed), rtol=1e-5, atol=1e-6)


# Masks that speak of different things; `q_offset` and `prefix` say how others are meant.
INDEPENDENT = ("none", "causal", "window", "kv_length", "keys", "segments", "dense")


@settings(max_examples=40)
@given(st.lists(st.sampled_from(INDEPENDENT), unique=True, max_size=len(INDEPENDENT)))
def test_masks_combine_by_and(names: list[str]) -> None:
    mask, allowed = Mask(), np.ones((B, H, T, S), bool)
    for name in names:
        mask, allowed = mask & MASKS[name][0], allowed & MASKS[name][1]
    made = mask.materialise(T, S)
    np.testing.assert_array_equal(np.broadcast_to(True if made is None else made, allowed.shape), allowed)


def test_paddings_combine_and_structure_must_agree() -> None:
    other = np.roll(KEYS, 1, axis=1)
    both = Mask(keys=jnp.asarray(KEYS)) & Mask(keys=jnp.asarray(other))
    np.testing.assert_array_equal(both.keys, KEYS & other)
    both = Mask(dense=jnp.asarray(DENSE)) & Mask(dense=jnp.asarray(~DENSE))
    assert both.dense is not None
    assert not both.dense.any()
    # equal is not different, whichever object it is
    big = Mask(window=(1000, 1000), q_offset=100_000)
    assert (big & Mask(window=(1000, 500 + 500), q_offset=50_000 * 2)) == big
    assert (big & Mask(causal=True)).causal
    for a, b in (
        (Mask(window=(1, 0)), Mask(window=(2, 0))),
        (Mask(q_offset=1), Mask(q_offset=2)),
        (Mask(q_offset=1), Mask(q_offset=jnp.asarray(1))),
        (Mask(kv_length=jnp.array([1])), Mask(kv_length=jnp.array([1]))),
    ):
        with pytest.raises(ValueError, match=r"both masks set (window|q_offset|kv_length); merge it"):
            _ = a & b


def test_a_query_that_may_look_nowhere_gets_zeros() -> None:
    q, k, v = qkv()
    keys = jnp.asarray(np.array([np.ones(S), np.zeros(S)], bool))
    out = jax.jit(attention)(q, k, v, mask=Mask(keys=keys))
    assert not np.any(out[1])
    np.testing.assert_allclose(out[0], reference(q, k, v)[0], rtol=1e-5, atol=1e-6)
    # and so does the gradient
    grads = jax.jit(jax.grad(lambda *x: attention(*x, mask=Mask(keys=keys)).sum(), argnums=(0, 1, 2)))(q, k, v)
    assert all(np.isfinite(grad).all() and not np.any(grad[1]) for grad in grads)


def test_no_bias_lets_a_query_see_what_is_masked() -> None:
    # all that is left to look at has the lowest score there is: nothing may leak from the masked keys
    q, k, v = qkv()
    lowest = jnp.where(jnp.asarray(KEYS), jnp.finfo(jnp.float32).min, 0.0)[:, None, None, :]
    mask = Mask(keys=jnp.asarray(KEYS))
    masked = ~KEYS[:, :, None, None]
    np.testing.assert_array_equal(
        attention(q, k, v, mask=mask, bias=lowest),
        attention(q, k, jnp.where(masked, 1e6, v), mask=mask, bias=lowest),
    )


def test_dropout_on_the_weights() -> None:
    q, k, v = qkv(t=40, s=200)
    q, v = 0 * q, jnp.ones_like(v)  # each of 200 keys has weight 1 / 200
    key = jax.random.key(0)
    run = jax.jit(partial(attention, dropout=0.3))
    np.testing.assert_allclose(run(q, k, v), 1.0, rtol=1e-5)  # no key, no dropout
    dropped = run(q, k, v, key=key)
    # five standard deviations of the mean of 480 rows
    assert abs(float(dropped.mean()) - 1) < 5 * np.sqrt(0.3 / 0.7 / 200 / (B * 40 * H))
    np.testing.assert_allclose(dropped.std(), np.sqrt(0.3 / 0.7 / 200), rtol=0.2)
    assert np.any(dropped != run(q, k, v, key=jax.random.key(1)))


def test_weights_and_scores_are_tapped() -> None:
    q, k, v = qkv()
    mask, bias = Mask(causal=True), random(H, T, S)
    allowed = mask.materialise(T, S)
    with watch(("scores", "weights")) as state:
        out = attention(q, k, v, mask=mask, bias=jnp.asarray(bias))
    scores = np.einsum("bthd,bshd->bhts", q, np.repeat(k, H // K, axis=2)) / np.sqrt(D) + bias
    np.testing.assert_allclose(state.seen["scores"], scores, rtol=1e-5, atol=1e-5)
    weights = state.seen["weights"]
    assert weights.shape == (B, H, T, S)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    assert not np.any(np.where(np.asarray(allowed), 0, weights))
    np.testing.assert_allclose(np.einsum("bhts,bshd->bthd", weights, np.repeat(v, H // K, axis=2)), out, rtol=1e-5)
    factors = random(B, H, T, S)
    with watch(interventions=(Intervention("weights", lambda w: w * factors),)):
        out = attention(q, k, v, mask=mask, bias=jnp.asarray(bias))
    np.testing.assert_allclose(out, reference(q, k, v, allowed, bias, factors=factors), rtol=1e-4, atol=1e-5)


def test_shapes_that_do_not_fit_are_named() -> None:
    q, k, v = qkv()

    def refused(message: str, q: Any = q, k: Any = k, v: Any = v, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            attention(q, k, v, **options)

    refused(r"q must be \[batch, length, heads, head_dim\], got shape \(2, 5, 6\)", q=q[..., 0])
    refused(r"k \(2, 7, 2, 4\) and v \(2, 6, 2, 3\) must agree in batch, length and heads", v=v[:, 1:])
    refused(r"q \(1, 5, 6, 4\) and k \(2, 7, 2, 4\) must agree in batch and head_dim", q=q[:1])
    refused(r"q \(2, 5, 6, 3\) and k \(2, 7, 2, 4\) must agree in batch and head_dim", q=q[..., 1:])
    refused(r"5 query heads of q \(2, 5, 5, 4\) cannot share 2 key heads", q=q[:, :, 1:])
    for mask, message in (
        (Mask(keys=jnp.ones((2, 6), bool)), r"mask\.keys has shape \(2, 6\), but \[batch, key\] is \(2, 7\) here"),
        (Mask(keys=jnp.ones((3, 7), bool)), r"mask\.keys has shape \(3, 7\), but \[batch, key\] is \(2, 7\) here"),
        (Mask(kv_length=jnp.ones(3)), r"mask\.kv_length has shape \(3,\), but \[batch\] is \(2,\) here"),
        (Mask(prefix=jnp.ones(2)), "mask.prefix says what is seen though causal: set mask.causal, too"),
        (Mask(causal=True, prefix=jnp.ones(3)), r"mask\.prefix has shape \(3,\), but \[batch\] is \(2,\) here"),
        (
            Mask(segments=(jnp.ones((2, 5)), jnp.ones((2, 5)))),
            r"mask\.segments\[1\] has shape \(2, 5\), but .* \(2, 7\)",
        ),
        (
            Mask(segments=(jnp.ones((2, 7)), jnp.ones((2, 7)))),
            r"mask\.segments\[0\] has shape \(2, 7\), but .* \(2, 5\)",
        ),
        (Mask(q_offset=jnp.ones(3)), r"mask\.q_offset has shape \(3,\); it is one number, or \[batch\] 2"),
        (Mask(window=(-1, 0)), r"mask\.window=\(-1, 0\) must be \(left, right\), each not negative"),
        (Mask(dilation=2), "mask.dilation=2 thins out a window: give mask.window, too"),
        (Mask(window=(1, 1), dilation=0), "mask.dilation=0 must be 1 or more"),
        (Mask(dense=jnp.ones((6, 5, 6), bool)), r"mask\.dense has shape \(6, 5, 6\), which does not broadcast"),
        (Mask(dense=jnp.ones((5, 7))), "mask.dense has dtype float32; it is booleans"),
    ):
        refused(message, mask=mask)
    for bias, message in (
        (ALiBi(jnp.ones(2)), r"bias\.slopes has shape \(2,\), but there are 6 heads: \[H\]"),
        (Bucketed(jnp.ones((8, 2)), 20, True), r"bias\.table has shape \(8, 2\), but there are 6 heads"),
        (
            Indexed(jnp.ones((8, 6)), jnp.ones((5, 6), int)),
            r"bias\.index has shape \(5, 6\), but .* 5 queries and 7 keys",
        ),
        (jnp.ones((2, 5, 7)), r"bias has shape \(2, 5, 7\), which does not broadcast to .* \(2, 6, 5, 7\)"),
    ):
        refused(message, bias=bias)
    refused("softcap=0.0 must be a number above 0", softcap=0.0)
    refused("dropout=1.5 is no probability", dropout=1.5)
    refused(r"sinks has shape \(2,\), but there are 6 heads of queries", sinks=jnp.ones(2))
    with pytest.raises(TypeError, match="q, k and v must be of one dtype, got float32, bfloat16 and float32"):
        attention(q, k.astype(jnp.bfloat16), v)
    with pytest.raises(TypeError, match="v must hold floating-point numbers, got int32"):
        attention(q, k, v.astype(jnp.int32))


def test_slopes_of_alibi_are_the_papers() -> None:
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(alibi_slopes(3), [2.0**-4, 2.0**-8, 2.0**-2])
    assert alibi_slopes(12).shape == (12,)


# --- Hugging Face's attention_mask


def test_attention_masks_of_every_rank() -> None:
    def allowed(mask: Mask, t: int = T, s: int = S) -> Array:
        made = mask.materialise(t, s)
        assert made is not None
        return np.asarray(jnp.broadcast_to(made, (B, H, t, s)))

    padding = KEYS.astype(np.int32)
    causal = (J <= Q)[None, None]
    expected = np.broadcast_to(KEYS[:, None, None], (B, H, T, S))
    for form in (padding, KEYS, padding.astype(np.float32)):
        np.testing.assert_array_equal(allowed(from_attention_mask(jnp.asarray(form))), expected)
    np.testing.assert_array_equal(allowed(from_attention_mask(jnp.asarray(padding), causal=True)), expected & causal)
    # pairs say everything: nothing is added to them
    np.testing.assert_array_equal(allowed(from_attention_mask(jnp.asarray(DENSE), causal=True)), DENSE)
    one = np.broadcast_to(DENSE[:, :1], DENSE.shape)
    np.testing.assert_array_equal(allowed(from_attention_mask(jnp.asarray(DENSE[:, 0]), causal=True)), one)
    assert from_attention_mask(None).materialise(T, S) is None
    assert from_attention_mask(None, causal=True, q_offset=3) == Mask(causal=True, q_offset=3)
    # a longer buffer of keys: padding goes on with ones, pairs with zeros
    longer = allowed(from_attention_mask(jnp.asarray(padding), keys=S + 2), s=S + 2)
    np.testing.assert_array_equal(longer, np.pad(expected, [(0, 0)] * 3 + [(0, 2)], constant_values=True))
    longer = allowed(from_attention_mask(jnp.asarray(DENSE), keys=S + 2), s=S + 2)
    np.testing.assert_array_equal(longer, np.pad(DENSE, [(0, 0)] * 3 + [(0, 2)]))
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, key\], .* got \(7,\)"):
        from_attention_mask(jnp.ones(7))


# --- the layer


def layer(size: int = 12, kv_size: int | None = None) -> Any:
    spec = attention_spec(size, H, D, names=("q", "k", "v", "o"), init=specs.normal(0.5), kv_heads=K, kv_size=kv_size)
    params = specs.init(spec, jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.1 * random(*x.shape), params)


def projected(p: Any, x: Any) -> Array:
    y = np.asarray(x) @ np.asarray(p["kernel"]) + np.asarray(p["bias"])
    return y.reshape(*y.shape[:-1], -1, D)


def test_self_attention_projects_attends_and_projects_back() -> None:
    p, x = layer(), random(B, T, 12)
    run = jax.jit(partial(self_attention, head_dim=D, mask=Mask(causal=True), bias=random(H, T, T)))
    out, cache = run(p, jnp.asarray(x))
    assert cache is None
    q, k, v = (projected(p[name], x) for name in "qkv")
    heads = reference(q, k, v, np.tril(np.ones((T, T), bool)), random(H, T, T))
    expected = heads.reshape(B, T, H * D) @ np.asarray(p["o"]["kernel"]) + np.asarray(p["o"]["bias"])
    np.testing.assert_allclose(out, expected, rtol=2e-4, atol=2e-5)


def steps(cuts: tuple[int, ...], total: int) -> list[slice]:
    return [slice(a, b) for a, b in itertools.pairwise((0, *cuts, total))]


@pytest.mark.parametrize("cuts", [(), (1, 2, 3, 4, 5, 6, 7, 8), (4,), (3, 7)], ids=str)
def test_appending_to_a_cache_equals_the_whole(cuts: tuple[int, ...]) -> None:
    length, room = 9, 12
    p, x = layer(), jnp.asarray(random(B, length, 12))
    padding = np.ones((B, length), np.int32)
    padding[1, :2] = 0
    mask = from_attention_mask(jnp.asarray(padding), causal=True)
    whole, _ = jax.jit(partial(self_attention, head_dim=D))(p, x, mask=mask)

    @jax.jit
    def step(cache: KVCache, x: jax.Array) -> Any:
        mask = from_attention_mask(jnp.asarray(padding), causal=True, q_offset=cache.length, keys=room)
        return self_attention(p, x, D, mask=mask, cache=cache)

    cache = KVCache.empty(B, room, K, D)
    parts = []
    for piece in steps(cuts, length):
        out, cache = step(cache, x[:, piece])
        parts.append(out)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-5, atol=1e-6)
    assert int(cache.length) == length
    assert not np.any(cache.k[:, length:])


def test_caches_keep_their_dtype_and_their_size() -> None:
    cache = KVCache.empty(B, 4, K, D, jnp.bfloat16).append(*(jnp.ones((B, 3, K, D)),) * 2)
    assert (cache.k.dtype, cache.v.dtype, int(cache.length)) == (jnp.bfloat16, jnp.bfloat16, 3)
    assert (cache.k.shape, np.asarray(cache.k[:, :, 0, 0], np.float32).tolist()) == ((B, 4, K, D), [[1, 1, 1, 0]] * B)
    with pytest.raises(ValueError, match="5 positions do not fit into a cache of 4"):
        cache.append(*(jnp.ones((B, 5, K, D)),) * 2)


def test_cross_attention_keeps_what_it_made_of_the_memory() -> None:
    p, x, memory = layer(kv_size=10), jnp.asarray(random(B, T, 12)), jnp.asarray(random(B, S, 10))
    mask = Mask(keys=jnp.asarray(KEYS))
    run = jax.jit(partial(cross_attention, head_dim=D, mask=mask))
    out, none = run(p, x, memory)
    assert none is None
    heads = reference(projected(p["q"], x), projected(p["k"], memory), projected(p["v"], memory), KEYS[:, None, None])
    expected = heads.reshape(B, T, H * D) @ np.asarray(p["o"]["kernel"]) + np.asarray(p["o"]["bias"])
    np.testing.assert_allclose(out, expected, rtol=2e-4, atol=2e-5)

    first, cache = run(p, x, memory, cache=KVCache.empty(B, S, K, D))
    assert int(cache.length) == S
    second, _ = run(p, x, None, cache=cache)
    np.testing.assert_allclose(first, out, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(second, out, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="cross-attention needs encoder_hidden_states, or a cache"):
        cross_attention(p, x, None, D, mask=mask)


@pytest.mark.parametrize("offset", [0, 2])
@pytest.mark.parametrize("key_too", [False, True], ids=["queries", "queries-and-keys"])
def test_relative_keys_by_the_book(key_too: bool, offset: int) -> None:
    positions = 9
    q, k, _ = qkv(H, H)
    table = random(2 * positions - 1, D)
    found = relative_key_bias({"embedding": jnp.asarray(table)}, q, k, key_too=key_too, q_offset=offset)
    expected = np.zeros((B, H, T, S))
    for t, s in itertools.product(range(T), range(S)):
        vector = table[t + offset - s + positions - 1]
        score = q[:, t] @ vector + (k[:, s] @ vector if key_too else 0)
        expected[:, :, t, s] = score / np.sqrt(D)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_mask_is_a_pytree_with_static_structure() -> None:
    mask = Mask(causal=True, window=(3, 0), keys=jnp.asarray(KEYS), q_offset=2)
    leaves, tree = jax.tree.flatten(mask)
    assert len(leaves) == 2
    assert jax.tree.unflatten(tree, leaves).window == (3, 0)
    made: Callable[[Mask], Any] = jax.jit(partial(Mask.materialise, t=T, s=S))
    np.testing.assert_array_equal(made(mask), mask.materialise(T, S))
