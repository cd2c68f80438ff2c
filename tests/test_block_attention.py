"""Attention in blocks: the same as over all pairs with a window, sums as said one by one, and memory that is linear."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from formax.core import spec as specs
from formax.core.registry import family
from formax.layers.attention import Bucketed, Mask, attention
from formax.layers.block_attention import block_attention, block_sums, summed_blocks

BIAS = Bucketed(jax.random.normal(jax.random.key(3), (12, 3)), max_distance=11, both_ways=True)


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("length", [3, 14, 25])
def test_blocks_are_a_window_over_all_pairs(length: int) -> None:
    q, k, v = (draw(seed, 2, length, 3, 5) for seed in range(3))
    keys = jnp.arange(length) < jnp.array([[length], [length - 2]])
    found = block_attention(q, k, v, 7, keys=keys, bias=BIAS.of_distance)
    expected = attention(q, k, v, mask=Mask(window=(6, 6), keys=keys), bias=BIAS, scale=1.0, backend="xla")
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_all_see_besides() -> None:
    q, k, v = (draw(seed, 2, 25, 3, 5) for seed in range(3))
    side_k, side_v, terms = draw(4, 2, 6, 3, 5), draw(5, 2, 6, 3, 5), draw(6, 2, 3, 25, 6)
    there = jnp.arange(6) < jnp.array([[6], [4]])
    found = block_attention(q, k, v, 7, keys=None, bias=BIAS.of_distance, side=(side_k, side_v, terms, there))
    ahead = jnp.arange(25) - jnp.arange(25)[:, None]
    near = jnp.broadcast_to(BIAS.of_distance(ahead), (2, 3, 25, 25))
    allowed = [jnp.broadcast_to(abs(ahead) < 7, (2, 1, 25, 25)), jnp.broadcast_to(there[:, None, None], (2, 1, 25, 6))]
    expected = attention(
        q,
        jnp.concatenate([k, side_k], 1),
        jnp.concatenate([v, side_v], 1),
        mask=Mask(dense=jnp.concatenate(allowed, -1)),
        bias=jnp.concatenate([near, terms], -1),
        scale=1.0,
        backend="xla",
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_sums() -> None:
    keys = jnp.arange(10) < jnp.array([[10], [9], [3]])
    which, there = summed_blocks(keys, 10, 4)
    # The rest falls to the last whole block; of a text without one there is no sum.
    assert which.tolist() == [[0] * 4 + [1] * 6, [0] * 4 + [1] * 5 + [-1], [-1] * 10]
    assert there.tolist() == [[True, True], [True, True], [False, False]]
    x = draw(0, 3, 10, 2)
    sums = block_sums(x, which, 2)
    np.testing.assert_allclose(sums[1], jnp.stack([x[1, :4].sum(0), x[1, 4:9].sum(0)]), rtol=1e-5)
    assert not sums[2].any()


@pytest.mark.parametrize("kind", ["local", "transient-global"])
def test_memory_grows_with_the_text_and_not_with_its_square(kind: str) -> None:
    longt5 = family("longt5")
    sizes: dict[str, Any] = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 16, "num_layers": 1}
    sizes |= {"encoder_attention_type": kind, "local_radius": 15, "global_block_size": 256}
    config = longt5.config(**sizes)
    encoder = next(one for one in longt5.architectures if one.name == "LongT5EncoderModel")
    params = specs.abstract(encoder.spec(config))

    def memory(length: int) -> int:
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        run = jax.jit(partial(encoder.apply, c=config))
        found = run.lower(params, input_ids=ids).compile().memory_analysis()
        assert found is not None
        return found.temp_size_in_bytes

    # Eight times the text; all pairs of it are 64 times as many.
    assert memory(4096) < 16 * memory(512)
    assert memory(4096) < 4096 * 4096
