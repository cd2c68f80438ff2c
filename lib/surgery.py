"""Operations on parameter trees that change their shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from formax.core.config import Config
from formax.core.frozen import FrozenDict
from formax.core.spec import Tree, flatten, unflatten

HEAD_AXIS = {"q": -1, "k": -1, "v": -1, "o": 0}  # where the heads lie in the leaves of an attention layer


def prune_heads(params: Tree, config: Config, heads: Mapping[int, Sequence[int]]) -> dict[str, Any]:
    """Takes attention heads out of `layers.<i>.attn`: the new `params` and `config`.

    Args:
        params: a parameter tree with a tuple of layers.
        config: its configuration; `pruned_heads` says what is gone already.
        heads: {layer: head numbers}, numbered as in the unpruned model.

    Raises:
        ValueError: a layer or head that does not exist, all heads of a layer, or stacked layers, which stay equal.
    """
    if "layers" not in params:
        raise ValueError(
            f"heads are pruned from `layers`, a single stack; {config.model_type} has {', '.join(sorted(params))}"
        )
    if not isinstance(params["layers"], tuple | list):
        raise ValueError("stacked layers have equally many heads; unstack the layers before pruning")
    total, head_dim, depth = config.num_attention_heads, config.head_dim, len(params["layers"])
    leaves = flatten(params)
    gone = {int(layer): set(old) for layer, old in config.pruned_heads.items()}
    for layer, some in heads.items():
        if not 0 <= layer < depth:
            raise ValueError(f"cannot prune layer {layer}: there are {depth} layers")
        wrong = [head for head in some if not 0 <= head < total]
        if wrong:
            raise ValueError(f"cannot prune head {wrong[0]} of layer {layer}: there are {total} heads")
        before = gone.get(layer, set())
        left = [head for head in range(total) if head not in before]
        keep = [i for i, head in enumerate(left) if head not in set(some)]
        if not keep:
            raise ValueError(f"cannot prune all heads of layer {layer}")
        columns = (jnp.asarray(keep)[:, None] * head_dim + jnp.arange(head_dim)).ravel()
        for path, leaf in leaves.items():
            if (
                path[:3] == ("layers", layer, "attn")
                and path[3] in HEAD_AXIS
                and not (path[3] == "o" and path[4] == "bias")
            ):
                leaves[path] = jnp.take(leaf, columns, axis=HEAD_AXIS[str(path[3])])
        gone[layer] = before | set(some)
    pruned = FrozenDict({layer: tuple(sorted(some)) for layer, some in sorted(gone.items()) if some})
    return {"params": unflatten(leaves), "config": config.replace(pruned_heads=pruned)}
