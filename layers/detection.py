"""What detectors of DETR's line have in common: attention that knows places, and what the states of queries tell.

Carion et al. 2020, arXiv:2005.12872. An image becomes a map, whose places an encoder relates to each other; a decoder
whose inputs are learned queries makes a state for every object, and heads make its class and its box of that state. B
batch, Q queries, S places of a map, E width of the states. `layers/maps.py` has the positions, `layers/mask_head.py`
the masks of objects.
"""

from __future__ import annotations

from typing import Any

import jax

from formax.core import tap
from formax.core.config import Config, config
from formax.core.outputs import DetectionModelOutput, DetectionOutput, FoundOutput
from formax.core.spec import Spec, normal
from formax.layers import mlp
from formax.layers.attention import attention
from formax.layers.attention.api import merge_heads, split_heads
from formax.layers.linear import linear, linear_spec


@config
class DetectionConfig(Config):
    """The weights with which queries are matched with objects, and the parts of the loss added."""

    class_cost: float = 1
    bbox_cost: float = 5
    giou_cost: float = 2
    bbox_loss_coefficient: float = 5
    giou_loss_coefficient: float = 2


def attend(p: Any, x: Any, place: Any, memory: Any, memory_place: Any, heads: int, name: str, **how: Any) -> jax.Array:
    """Attention by content and place to content: [B, T, E] and [B, S, E], each with its places -> [B, T, E].

    `how` is as for `attention`: mask, dropout and key.
    """
    with tap.scope(name):
        size = x.shape[-1] // heads
        given = {"q": x + place, "k": memory + memory_place, "v": memory}
        q, k, v = (tap.tap(part, split_heads(linear(p[part], y), size)) for part, y in given.items())
        return tap.tap("out", linear(p["o"], merge_heads(attention(q, k, v, **how))))


def heads_spec(c: Any, classes: int) -> dict[str, Spec]:
    """A linear head for so many `classes`, and three layers for boxes."""
    init, size = normal(c.init_std), c.d_model
    box = mlp.perceptron_spec("bbox_predictor", (size, size, size, 4), init=init)
    scores = linear_spec("class_labels_classifier", size, classes, ("embed", None), init=init)
    return {"head": {"classes": scores, "box": box}}


def find(p: Any, x: jax.Array) -> FoundOutput:
    """Classes and boxes of states [..., E]: [..., classes] and [..., 4]."""
    boxes = jax.nn.sigmoid(mlp.perceptron(p["box"], x))
    return FoundOutput(logits=linear(p["classes"], x), pred_boxes=boxes)


def found(p: Any, out: DetectionModelOutput, masks: jax.Array | None = None) -> DetectionOutput:
    """What the heads `p` find in the last states and in those of the layers before, if there are any."""
    every, last = out.intermediate_hidden_states, find(p, out.last_hidden_state)
    return DetectionOutput(
        logits=last.logits,
        pred_boxes=last.pred_boxes,
        pred_masks=masks,
        auxiliary_outputs=None if every is None else tuple(find(p, x) for x in every[:-1]),
        last_hidden_state=out.last_hidden_state,
        encoder_last_hidden_state=out.encoder_last_hidden_state,
    )
