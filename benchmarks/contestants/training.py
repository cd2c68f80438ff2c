"""Loss and optimiser of the training step, the same for both contestants that run on JAX.

Compiled into the step, those of an optimiser library come to the same operations; this way none has to be installed.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.task import BETAS, EPS, LEARNING_RATE, WEIGHT_DECAY


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over all positions of the targets' negative log-probability: [B, T, V] and [B, T] -> scalar."""
    scores = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(scores, targets[..., None], axis=-1).mean()


def adamw_state(params: Any) -> Any:
    """The state of AdamW (Loshchilov & Hutter 2019): both moments of every parameter, and the number of steps."""
    return jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.int32)


def adamw(params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
    """One step: the new parameters and the new state."""
    first, second, step = state
    step = step + 1
    a, b = BETAS
    first = jax.tree.map(lambda m, g: a * m + (1 - a) * g, first, grads)
    second = jax.tree.map(lambda v, g: b * v + (1 - b) * g * g, second, grads)
    unbias_first, unbias_second = 1 - a**step, 1 - b**step

    def moved(p: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
        direction = (m / unbias_first) / (jnp.sqrt(v / unbias_second) + EPS)
        return p - LEARNING_RATE * (direction + WEIGHT_DECAY * p)

    return jax.tree.map(moved, params, first, second), (first, second, step)
