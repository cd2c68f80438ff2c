"""Block-sparse attention (BigBird, Zaheer et al. 2020, arXiv:2007.14062): work and memory grow as the text does.

The text is cut into blocks. The first and the last one look at everything and are looked at by all; every other block
looks at itself, at its two neighbours, at these two, and at some more that were drawn. B rows, T tokens in n blocks,
H heads of D numbers.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from formax.core import tap
from formax.layers.attention import Mask, attention
from formax.layers.attention.api import merge_heads, split_heads
from formax.layers.linear import linear

OLD_LENGTHS = (1024, 3072, 4096)  # those of the paper, for which the reference kept how blocks were drawn then


@lru_cache(maxsize=64)
def drawn_blocks(length: int, block: int, count: int, heads: int, seed: int, limit: int) -> np.ndarray:
    """For every block but the first and the last the `count` that it looks at besides, as training draws them.

    They are drawn by NumPy from `seed`, in the reference's order, so that both train on the same pattern.

    Args:
        length: tokens, a multiple of `block`.
        block: tokens of a block.
        count: see above.
        heads: for each there are others.
        seed: the number of the layer.
        limit: tokens that the model has positions for.

    Returns:
        Numbers of blocks [heads, n - 2, count].

    Raises:
        ValueError: there are not so many to draw of.
    """
    random = np.random.RandomState(seed)
    draw = _drawn_of_old if length in OLD_LENGTHS else _drawn_early
    return draw(random, length // block, block, count, heads, limit // block)


def _drawn_early(random: np.random.RandomState, n: int, block: int, count: int, heads: int, total: int) -> np.ndarray:
    """Only of the first 2 count + 5 blocks, and none of those that a block sees anyway: [heads, n - 2, count]."""
    end = 2 * count + 5
    drawn = np.zeros((heads, n, count), np.int32)
    for i in range(1, n):
        seen = {i - 1, i, i + 1, 0, end - 1}
        seen |= {end - 2} if i == 1 else set()
        seen |= {1} if i == end - 2 else set()
        for h in range(heads):
            drawn[h, i] = [j for j in random.permutation(end) if j not in seen][:count]
    return drawn[:, 1:-1]


def _drawn_of_old(random: np.random.RandomState, n: int, block: int, count: int, heads: int, total: int) -> np.ndarray:
    """Of the first 1024 tokens' blocks, for a text of all positions of which the first n blocks are kept."""
    middle = np.arange(1, total - 1)
    last = 1024 // block - 1 if block * 2 < 1024 else total - 1
    drawn = np.zeros((heads, total - 2, count), np.int32)
    for h in range(heads):
        for i in range(1, total - 1):
            if i <= 2:
                free = middle[i + 1 : last]
            elif i >= total - 3:
                free = middle[:last]
            elif i - 2 > last or i + 1 == last:
                free = middle[: min(i - 2, last)]
            else:
                free = np.concatenate([middle[: i - 2], middle[i + 1 : last]])
            if len(free) < count:
                raise ValueError(f"{count} blocks of {block} tokens cannot be drawn of {len(free)}; make them smaller")
            drawn[h, i - 1] = random.permutation(free)[:count]
    return drawn[:, : n - 2]


def sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    block: int,
    keys: jax.Array | None = None,
    drawn: jax.Array | None = None,
    repeats: int = 0,
) -> jax.Array:
    """Attention of blocks to few others.

    Args:
        q: queries [B, T, H, D].
        k: keys [B, T, H, D].
        v: values [B, T, H, Dv].
        block: tokens of a block; there must be more than four blocks.
        keys: [B, T] booleans, which tokens are no padding.
        drawn: [H, n - 2, count] numbers of blocks that those between the first and the last look at besides.
        repeats: how many times more the first block counts for those; the reference does not draw blocks when it does
            not train, and takes the first one instead.

    Returns:
        [B, T, H, Dv]; 0 for padding.
    """
    b, t, h, _ = q.shape
    pad = -t % block
    keys = jnp.ones((b, t), bool) if keys is None else keys
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
    keys = jnp.pad(keys, ((0, 0), (0, pad)))
    n = (t + pad) // block

    def blocks(x: jax.Array) -> jax.Array:
        return x.reshape(b, n, block, *x.shape[2:])

    def near(x: jax.Array) -> jax.Array:
        """[B, n, block, ...] -> [B, n - 2, 5 block, ...]: of each block in between the five that it always sees."""
        first, last = (jnp.broadcast_to(x[:, i], (n - 2, *x[:, i].shape)).swapaxes(0, 1) for i in (0, -1))
        return jnp.concatenate([first, x[:, :-2], x[:, 1:-1], x[:, 2:], last], axis=2)

    def far(x: jax.Array) -> jax.Array:
        """[B, n, block, H, ...] -> [B, n - 2, count block, H, ...]: those that were drawn."""
        found = jnp.moveaxis(x, 3, 1)[:, jnp.arange(h)[:, None, None], drawn]  # [B, H, n - 2, count, block, ...]
        return jnp.moveaxis(found.reshape(b, h, n - 2, -1, *x.shape[4:]), 1, 3)

    def rows(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[2:])

    once = np.ones((n - 2, 5), bool)  # the first block and the last one are neighbours, too, of those beside them
    once[0, 1] = once[-1, 3] = False
    cut_q, cut_k, cut_v, real = map(blocks, (q, k, v, keys))
    near_k, near_v, seen = near(cut_k), near(cut_v), near(real) & np.repeat(once, block, 1)
    mask, bias = Mask(keys=rows(seen)), None
    if drawn is not None:
        near_k, near_v = (jnp.concatenate([x, far(y)], axis=2) for x, y in ((near_k, cut_k), (near_v, cut_v)))
        every = (*real.shape, h)
        seen = jnp.concatenate(
            [jnp.broadcast_to(seen[..., None], (*seen.shape, h)), far(jnp.broadcast_to(real[..., None], every))], axis=2
        )
        mask = Mask(dense=rows(seen).swapaxes(1, 2)[:, :, None])
    elif repeats:
        bias = jnp.where(np.arange(5 * block) < block, math.log(1 + repeats), 0.0).astype(q.dtype)[None, None, None]
    with tap.scope("ends"):
        ends = jnp.concatenate([cut_q[:, 0], cut_q[:, -1]], axis=1)
        ends = attention(ends, k, v, mask=Mask(keys=keys))
    with tap.scope("middle"):
        middle = attention(rows(cut_q[:, 1:-1]), rows(near_k), rows(near_v), mask=mask, bias=bias)
    middle = middle.reshape(b, -1, *middle.shape[2:])
    out = jnp.concatenate([ends[:, :block], middle, ends[:, block:]], axis=1)
    return (out * keys[..., None, None].astype(out.dtype))[:, :t]


def sparse_self_attention(
    p: dict[str, Any], x: jax.Array, head_dim: int, *, block: int, name: str = "attn", **how: Any
) -> jax.Array:
    """Multi-head self-attention of blocks, [B, T, E] -> [B, T, E]; `how` is as for `sparse_attention`.

    Taps, under `name`: `q`, `k`, `v`, `out`, and `table` [B, H, T, T], all weights, which is made only if asked for.
    """
    with tap.scope(name):
        q, k, v = (tap.tap(part, split_heads(linear(p[part], x), head_dim)) for part in ("q", "k", "v"))
        out = sparse_attention(q, k, v, block=block, **how)
        if tap.watched("table"):
            tap.tap("table", weights(q, k, block=block, **how))
        return tap.tap("out", linear(p["o"], merge_heads(out)))


def weights(q: jax.Array, k: jax.Array, *, block: int, repeats: int = 0, **how: Any) -> jax.Array:
    """The weights of all pairs [B, H, T, T]: what attention makes of values that say which token they are of.

    A block that counts several times is shown as if it did not, as the reference shows it.
    """
    b, t, h, _ = q.shape
    one = jnp.broadcast_to(jnp.eye(t, dtype=q.dtype)[None, :, None], (b, t, h, t))
    found = jnp.moveaxis(sparse_attention(q, k, one, block=block, repeats=repeats, **how), 2, 1)
    end = t - (-(-t // block) - 1) * block  # tokens of the last block
    return found.at[:, :, block : t - end, :block].divide(1 + repeats)
