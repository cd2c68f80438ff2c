"""DoLa: scores by what the last layer says beyond an earlier one (Chuang et al. 2023, arXiv:2309.03883).

Of the candidates the layer whose distribution is farthest from the last one's is taken, one for the whole batch, as in
the reference.

B rows, E channels, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from formax.core.config import ConfigError
from formax.core.tap import Intervention
from formax.generation.decoding import Feed
from formax.model import Model

# Tokens less likely than this share of the likeliest are ruled out.
RELATIVE = 0.1
# Where states that scores are made of may be.
LAST = ("layers.*.out", "last", "norm.out")


def layers_of(asked: str | Sequence[int], depth: int, tied: bool) -> tuple[int, ...]:
    """Which states are candidates: 0 are the embeddings, `depth` the last layer's.

    Args:
        asked: "low" or "high", every other layer of one half (of twenty, in models of more than forty), or numbers.
        depth: layers of the model.
        tied: whether the word table is the head, which makes words again of the embeddings: they tell nothing.

    Raises:
        ConfigError: another word, or no layer below the last.
    """
    first = 0 if not tied or depth < 2 else min(2, depth - 1)
    half = depth // 2 if depth <= 40 else 20
    match asked:
        case "low":
            found: Sequence[int] = range(first, half, 2) if first != depth // 2 else (first,)
        case "high":
            found = range(depth // 2 if depth <= 40 else depth - 20, depth, 2)
        case str():
            raise ConfigError(f"dola_layers must be 'low', 'high' or a list of layers, got {asked!r}")
        case _:
            found = [one for one in asked if one < depth]
    if not len(found):
        raise ConfigError(f"dola_layers={asked!r} names no layer below the last of {depth}")
    return tuple(found)


def contrast(model: Model, feed: Feed, layers: tuple[int, ...], logits: Array, states: Sequence[Array]) -> Array:
    """Scores [B, V] of the last layer beyond those of an earlier one.

    Args:
        model: the model, whose head is applied to earlier states as they are.
        feed: how it is given tokens.
        layers: candidates.
        logits: float32 [B, V] of the last layer.
        states: of all layers [B, E].
    """
    earlier = jnp.stack([head(model, feed, states[one]) for one in layers]).astype(jnp.float32)
    last, earlier = jax.nn.log_softmax(logits, axis=-1), jax.nn.log_softmax(earlier, axis=-1)
    if len(layers) > 1:
        mean = (jnp.exp(last) + jnp.exp(earlier)) / 2
        # The divergences as the reference sums them: of the mean from each, over tokens and rows.
        far = (mean * (2 * jnp.log(mean) - last - earlier)).mean((1, 2))
        earlier = earlier[jnp.argmax(far)]
    else:
        earlier = earlier[0]
    kept = last >= last.max(-1, keepdims=True) + math.log(RELATIVE)
    return jnp.where(kept, last - earlier, -jnp.inf)


def head(model: Model, feed: Feed, x: Array) -> Array:
    """The model's scores [B, V], if its last state were `x` [B, E].

    Everything below that state is not computed: nothing depends on it.
    """
    ids, places = jnp.zeros((len(x), 1), jnp.int32), list[str]()

    def look() -> Any:
        out, seen = model.run({feed.ids: ids}, optional=LAST)
        places.extend(seen)
        return out

    jax.eval_shape(look)
    taken = Intervention(places[-1], lambda value: x[:, None].astype(value.dtype))
    return replace(model, interventions=(*model.interventions, taken)).run({feed.ids: ids})[0].logits[:, 0]
