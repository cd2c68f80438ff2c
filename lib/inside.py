"""Looking into a model and changing what happens inside: `capture`, `intervene`, `places`.

Places are dotted names that are the same in every family ("layers.3.attn.weights", "layers.*.mlp.out", "embed.out");
`places` lists those of a model. `*` stands for one part of a name, `**` for any number of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax

from formax.core.tap import Intervention
from formax.model import HEAD_MASKS, Model


def capture(model: Model, *patterns: str) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
    """A function that calls the model and also returns inner values.

        out, seen = formax.capture(model, "layers.*.attn.weights")(input_ids=ids)
        seen["layers.0.attn.weights"]                   # [B, H, T, S]

    The call is compiled as the model's own is, once for each set of patterns and shapes, and can be differentiated.

    Raises:
        ValueError: (on the call) a pattern matches nothing, naming what there is.
    """
    if not patterns:
        raise ValueError(
            'capture needs at least one pattern, such as "layers.*.out"; formax.places(model, ...) lists them'
        )

    def call(*args: Any, key: jax.Array | None = None, **inputs: Any) -> tuple[Any, dict[str, jax.Array]]:
        given = {**model.name_inputs(args, inputs), **inputs}
        return model.run(given, patterns=patterns, key=key, output_hidden_states=False, output_attentions=False)

    return call


def intervene(model: Model, changes: Mapping[str, Callable[[jax.Array], jax.Array]]) -> Model:
    """A model whose inner values are replaced while it runs: {pattern: function of the value}.

        formax.intervene(model, {"layers.5.mlp.out": lambda x: 0 * x})(input_ids=ids)

    The functions must keep the shape and be traceable by JAX; they may close over arrays, for activation patching. A
    function is compiled into the program, so use one function object for many calls rather than a new one for each.

    Raises:
        ValueError: (on the call) a pattern matches nothing, or a function changes a shape.
    """
    more = tuple(Intervention(pattern, change) for pattern, change in changes.items())
    return replace(model, interventions=(*model.interventions, *more))


def places(model: Model, *args: Any, key: jax.Array | None = None, **inputs: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """All places of a forward pass with these inputs (or their shapes) and the shapes found there; computes nothing.

    With a key they are those of training, where batch norms show their new statistics.
    """
    given = {**model.name_inputs(args, inputs), **inputs}
    factors = {name: given.pop(name) for name in HEAD_MASKS if given.get(name) is not None}
    arrays, static = model.sort_inputs(given)

    def look(m: Model, given: dict[str, Any], key: jax.Array | None) -> OrderedDict[str, Any]:
        return OrderedDict(m.run({**given, **static}, patterns=("**",), key=key)[1])

    return dict(jax.eval_shape(look, model, {**arrays, **factors}, key))
