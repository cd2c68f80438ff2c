"""Attention in blocks of queries is attention at once: values, gradients, what is looked at."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from formax.core import tap
from formax.layers.attention import Mask, attention, xla

B, T, S, H, K, D = 2, 23, 29, 4, 2, 6
draw = np.random.RandomState(0)


def random(*shape: int) -> jax.Array:
    return jnp.asarray(draw.standard_normal(shape), jnp.float32)


Q, KEYS, V = random(B, T, H, D), random(B, S, K, D), random(B, S, K, 5)
EXIST = jnp.asarray(draw.rand(B, S) < 0.7)
IDS = jnp.asarray(draw.randint(0, 3, (B, T))), jnp.asarray(draw.randint(0, 3, (B, S)))
MASKS = {
    "all": Mask(),
    "causal": Mask(causal=True, q_offset=S - T),
    "traced offset": Mask(causal=True, q_offset=jnp.asarray(4)),
    "window": Mask(window=(5, 2), q_offset=3),
    "keys": Mask(keys=EXIST),
    "lengths": Mask(kv_length=jnp.asarray([11, 29])),
    "segments": Mask(segments=IDS),
    "prefix": Mask(causal=True, prefix=jnp.asarray([7, 12])),
    "dense": Mask(dense=jnp.asarray(draw.rand(B, H, T, S) < 0.5)),
    "dense of keys": Mask(dense=jnp.asarray(draw.rand(1, 1, 1, S) < 0.5)),
    "two": replace(Mask(causal=True, keys=EXIST), q_offset=6),
}
BIASES = {"none": None, "pairs": random(1, H, T, S), "rows": random(T, S), "keys": random(B, 1, 1, S)}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of four queries, the last of three."""
    monkeypatch.setattr(xla, "WHOLE", 0)
    monkeypatch.setattr(xla, "BLOCK", 0)
    monkeypatch.setattr(xla, "LEAST", 4)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("name", MASKS)
def test_blocks_give_what_all_at_once_gives(name: str, bias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mask, weights = MASKS[name], random(B, T, H, 5)

    def both(q: Any, k: Any, v: Any, b: Any) -> Any:
        out = attention(q, k, v, mask=mask, bias=b)
        return jnp.vdot(out, weights), out

    def run() -> Any:
        jax.clear_caches()
        return jax.jit(jax.value_and_grad(both, argnums=(0, 1, 2), has_aux=True))(Q, KEYS, V, BIASES[bias])

    (_, expected), slopes = run()
    monkeypatch.setattr(xla, "WHOLE", 0)
    monkeypatch.setattr(xla, "BLOCK", 0)
    monkeypatch.setattr(xla, "LEAST", 4)
    (_, found), own = run()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), own, slopes)


@pytest.mark.usefixtures("small_blocks")
def test_weights_that_are_looked_at_are_all_there() -> None:
    with tap.watch(["weights"]) as seen:
        attention(Q, KEYS, V)
    assert seen.seen["weights"].shape == (B, H, T, S)
    none = tap.Intervention("weights", lambda weights: 0 * weights)
    with tap.watch(interventions=[none]):
        assert not attention(Q, KEYS, V).any()
    # They are places, also of a pass in which nobody looks at them.
    with pytest.raises(ValueError, match=r"'elsewhere' matches nothing .* there are: scores, weights"):  # noqa: SIM117
        with tap.watch(["elsewhere"]):
            attention(Q, KEYS, V)


@pytest.mark.usefixtures("small_blocks")
def test_dropout_draws_for_all_pairs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = attention(Q, KEYS, V, dropout=0.5, key=jax.random.key(0))
    monkeypatch.setattr(xla, "WHOLE", 2**30)
    np.testing.assert_array_equal(found, attention(Q, KEYS, V, dropout=0.5, key=jax.random.key(0)))


def test_memory_grows_with_the_length_and_not_its_square() -> None:
    def peak(length: int) -> int:
        x = jax.ShapeDtypeStruct((1, length, 4, 32), jnp.float32)
        loss = jax.grad(lambda q: attention(q, q, q, mask=Mask(causal=True)).sum())
        told = jax.jit(loss).lower(x).compile().memory_analysis()
        assert told is not None
        return told.temp_size_in_bytes

    assert peak(8192) < 4 * peak(4096)
    assert peak(8192) < 4 * 8192 * 8192  # a quarter of one table of all pairs
