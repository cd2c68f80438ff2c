"""Two towers, of texts and of images, trained so that what belongs together ends up close: CLIP and its line.

Radford et al. 2021, arXiv:2103.00020; SigLIP, AltCLIP, Chinese-CLIP and others differ in the towers, not in the frame.
A tower is `tower(p, c, ..., key) -> BaseModelOutput` with a `pooler_output`; in the tree of the whole its parameters
are `params["text"]` or `params["vision"]`, with its map into the common space under `head`. Many towers are encoders of
pre-norm layers, whose stack (`layers_spec`, `layers`) is here, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import Signature, signature
from typing import Any

import jax
import jax.numpy as jnp

from formax.core import tap
from formax.core.config import Config, check_multiple, config
from formax.core.outputs import BaseModelOutput, TwoTowersOutput
from formax.core.rng import split
from formax.core.spec import At, Initializer, Spec, fold, stack_of
from formax.layers import mlp, norm
from formax.layers.activations import check_activation
from formax.layers.attention import Mask, attention_spec, self_attention
from formax.layers.linear import linear

Tower = Callable[..., BaseModelOutput]

# Where the states of the towers are, for an output that has the towers' own inside.
TRACES = {
    f"{tower}_model_output.{name}": (f"output_{name}", tuple(f"{tower}.{place}" for place in places))
    for tower in ("text", "vision")
    for name, places in (("hidden_states", ("embed.out", "layers.*.out")), ("attentions", ("layers.*.attn.weights",)))
}


# --- a tower of pre-norm layers


@config
class TowerConfig(Config):
    """The fields that a tower of pre-norm layers has."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0

    def check(self) -> None:
        check_multiple(self, "hidden_size", "num_attention_heads")
        check_activation(self.hidden_act)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def layers_spec(c: Any, attn: Mapping[str, Initializer], up: Initializer, down: Initializer) -> tuple[Spec, ...]:
    """All layers of a tower; the initialisers are those of `q`, `k`, `v`, `o`, and of the network's two maps."""
    size, names = c.hidden_size, ("q_proj", "k_proj", "v_proj", "out_proj")
    layer: dict[str, Spec] = {
        "attn_norm": norm.layer_spec("layer_norm1", size),
        "attn": At("self_attn", attention_spec(size, c.num_attention_heads, c.head_dim, names=names, init=attn)),
        "mlp_norm": norm.layer_spec("layer_norm2", size),
        "mlp": At("mlp", mlp.dense_spec(size, c.intermediate_size, ("fc1", "fc2"), init=up, out_init=down)),
    }
    return stack_of("encoder.layers", [layer] * c.num_hidden_layers)


def layers(p: Any, c: Any, x: jax.Array, mask: Mask, key: Any) -> jax.Array:
    """All layers of a tower, pre-norm, [B, T, E] -> [B, T, E]; the only dropout is on attention weights."""

    def run(p: Any, x: jax.Array, cache: Any, key: Any) -> Any:
        h = norm.layer(p["attn_norm"], x, c.layer_norm_eps)
        x = x + self_attention(p["attn"], h, c.head_dim, mask=mask, dropout=c.attention_dropout, key=key)[0]
        return x + mlp.dense(p["mlp"], norm.layer(p["mlp_norm"], x, c.layer_norm_eps), c.hidden_act), cache

    return fold(run, p.get("layers", ()), x, key=key)[0]


# --- both


@config
class TwoTowersConfig(Config):
    """What a configuration of two towers, its `text_config` and its `vision_config`, can be asked."""

    @classmethod
    def _named(cls, values: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
        """As everywhere; and what old files say of a tower under `text_config_dict` goes before its `text_config`."""
        new = dict(values)
        for key, tower in cls.sub_configs.items():
            said = new.pop(f"{key}_dict", None)
            if said is not None:
                new[key] = (new.get(key) or {}) | tower.from_dict(said, source=f"{key}_dict").to_dict()
            elif key in new and new[key] is None:
                del new[key]
        return super()._named(new, before)

    @property
    def vocab_size(self) -> int:
        return self.text_config.vocab_size

    @property
    def max_position_embeddings(self) -> int:
        return self.text_config.max_position_embeddings


def embedded(p: Any, out: BaseModelOutput) -> jax.Array:
    """What a tower returned as vectors in the common space, not normalised: [B, D]; pooled, if it has no map there."""
    assert out.pooler_output is not None
    return linear(p["head"], out.pooler_output) if "head" in p else out.pooler_output


def unit(x: jax.Array) -> jax.Array:
    """Vectors of length 1, [..., D]."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.square(y).sum(-1, keepdims=True))).astype(x.dtype)


def similarities(p: Any, texts: jax.Array, images: jax.Array) -> jax.Array:
    """Cosines of each text with each image, times a trained scale: [T, D] and [I, D], of length 1 -> [T, I]."""
    return texts @ images.T * jnp.exp(p["logit_scale"]).astype(texts.dtype)


def projected(tower: Tower, output: Callable[..., Any], field: str) -> Callable[..., Any]:
    """A tower with its map into the common space: an `output` with the vectors [B, D] in a field, and the states."""

    @wraps(tower)
    def apply(p: Any, *args: Any, **inputs: Any) -> Any:
        out = tower(p, *args, **inputs)
        return output(**{field: embedded(p, out)}, last_hidden_state=out.last_hidden_state)

    return apply


def features(tower: Tower, name: str) -> Callable[..., jax.Array]:
    """Vectors [B, D] in the common space, not normalised, made by one tower ("text" or "vision") of a whole model."""

    @wraps(tower)
    def apply(p: Any, c: Any, *args: Any, **inputs: Any) -> jax.Array:
        with tap.scope(name):
            return embedded(p[name], tower(p[name], getattr(c, f"{name}_config"), *args, **inputs))

    return apply


def both(
    text: Tower, vision: Tower, logits: Callable[[Any, jax.Array, jax.Array], jax.Array] = similarities
) -> Callable[..., TwoTowersOutput]:
    """Texts and images -> how near each is to each, `logits(p, texts [T, D], images [I, D]) -> [T, I]`.

    It takes what the towers take: the first input of each, then the others of the text tower, then of the vision tower.
    """
    params, config, first, *texts, key = signature(text).parameters.values()
    _, _, second, *images, _ = signature(vision).parameters.values()
    takes = Signature([params, config, first, second, *texts, *images, key])
    inputs = {"text": (first, *texts), "vision": (second, *images)}

    def model(*args: Any, **named: Any) -> TwoTowersOutput:
        given = takes.bind(*args, **named).arguments
        p, c, keys = given[params.name], given[config.name], split(given.get(key.name), 2)
        out, vectors = {}, {}
        for name, tower, k_tower in zip(inputs, (text, vision), keys, strict=True):
            own = {one.name: given[one.name] for one in inputs[name] if one.name in given}
            with tap.scope(name):
                out[name] = tower(p[name], getattr(c, f"{name}_config"), **own, key=k_tower)
                vectors[name] = unit(embedded(p[name], out[name]))
        scores = logits(p, vectors["text"], vectors["vision"])
        return TwoTowersOutput(
            logits_per_image=scores.T,
            logits_per_text=scores,
            text_embeds=vectors["text"],
            image_embeds=vectors["vision"],
            text_model_output=out["text"],
            vision_model_output=out["vision"],
        )

    model.__signature__ = takes  # type: ignore[attr-defined]
    return model
