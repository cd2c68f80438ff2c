"""DETR: objects found by a transformer, one per query, without anchors and without suppression of doubles.

Carion et al. 2020, arXiv:2005.12872; original code facebookresearch/detr. A ResNet with frozen batch norms, BART's
post-norm encoder over the places of its last map, and a decoder whose inputs are learned queries. Unlike in BART,
positions are added to what queries and keys of every attention are made from, never to values; queries see all others.
"""

from functools import lru_cache, partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from formax.core import tap
from formax.core.config import ConfigError, check_multiple, config
from formax.core.family import Architecture, Family
from formax.core.outputs import Array, Output, output
from formax.core.rng import fold_path, split
from formax.core.spec import At, Spec, fold, normal, stack_of, under
from formax.layers import embed, mlp, norm
from formax.layers.activations import check_activation
from formax.layers.attention import attention, attention_spec, from_attention_mask
from formax.layers.attention.api import merge_heads, split_heads
from formax.layers.conv import channels_first, conv, conv_spec
from formax.layers.dropout import dropout
from formax.layers.linear import linear, linear_spec
from formax.layers.maps import learned_positions, learned_spec, resize, seen_places, sine_positions
from formax.layers.seq2seq import states_of
from formax.models.vision.timm_resnet import ResNetInsideConfig, backbone, backbone_spec, maps_of

GRID = 50  # rows and columns that learned positions know
EPS = 1e-5
xavier = lru_cache(lambda gain: jax.nn.initializers.variance_scaling(gain**2, "fan_avg", "uniform"))


@config
class DetrConfig(ResNetInsideConfig):
    """`config.json` of model type "detr"."""

    model_type: ClassVar[str] = "detr"
    attribute_map: ClassVar = {"hidden_size": "d_model", "num_attention_heads": "encoder_attention_heads"}
    implemented: ClassVar = {"position_embedding_type": ("sine", "learned"), "scale_embedding": (False,)}

    num_queries: int = 100
    encoder_layers: int = 6
    encoder_ffn_dim: int = 2048
    encoder_attention_heads: int = 8
    decoder_layers: int = 6
    decoder_ffn_dim: int = 2048
    decoder_attention_heads: int = 8
    encoder_layerdrop: float = 0.0
    decoder_layerdrop: float = 0.0
    is_encoder_decoder: bool = True
    activation_function: str = "relu"
    d_model: int = 256
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    init_std: float = 0.02
    init_xavier_std: float = 1.0
    auxiliary_loss: bool = False
    position_embedding_type: str = "sine"
    class_cost: float = 1
    bbox_cost: float = 5
    giou_cost: float = 2
    mask_loss_coefficient: float = 1
    dice_loss_coefficient: float = 1
    bbox_loss_coefficient: float = 5
    giou_loss_coefficient: float = 2
    eos_coefficient: float = 0.1
    num_hidden_layers: int = 6  # the encoder's once more, which nothing reads

    def check(self) -> None:
        super().check()
        check_activation(self.activation_function, "activation_function")
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            check_multiple(self, "d_model", name)
        if self.position_embedding_type == "sine" and self.d_model % 4:
            raise ConfigError(f"d_model={self.d_model} is no multiple of 4: sine and cosine of rows and of columns")


@output
class DetrModelOutput(Output):
    """States of the queries [B, Q, E] and of the map's places [B, S, E]; of all layers [L, B, Q, E] if auxiliary."""

    last_hidden_state: Array
    decoder_hidden_states: tuple[Array, ...] | None = None
    decoder_attentions: tuple[Array, ...] | None = None
    cross_attentions: tuple[Array, ...] | None = None
    encoder_last_hidden_state: Array | None = None
    encoder_hidden_states: tuple[Array, ...] | None = None
    encoder_attentions: tuple[Array, ...] | None = None
    intermediate_hidden_states: Array | None = None


@output
class Found(Output):
    """Classes and boxes that one layer's states give; see `DetrOutput`."""

    logits: Array
    pred_boxes: Array


@output
class DetrOutput(Output):
    """`logits` [B, Q, labels + 1] (the last: no object), `pred_boxes` [B, Q, 4]: centre, width, height in 0 to 1.

    `pred_masks` [B, Q, H / 4, W / 4] of a segmentation; `auxiliary_outputs` of all decoder layers but the last.
    """

    logits: Array
    pred_boxes: Array
    pred_masks: Array | None = None
    auxiliary_outputs: tuple[Found, ...] | None = None
    last_hidden_state: Array | None = None
    decoder_hidden_states: tuple[Array, ...] | None = None
    decoder_attentions: tuple[Array, ...] | None = None
    cross_attentions: tuple[Array, ...] | None = None
    encoder_last_hidden_state: Array | None = None
    encoder_hidden_states: tuple[Array, ...] | None = None
    encoder_attentions: tuple[Array, ...] | None = None


# ---- encoder and decoder --------------------------------------------------------------------------------------------


def block_spec(c: DetrConfig, part: str) -> dict[str, Spec]:
    """One layer of the encoder or the decoder."""
    init, heads = normal(c.init_std), getattr(c, f"{part}_attention_heads")
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    attn = partial(attention_spec, c.d_model, heads, c.d_model // heads, names=names, init=init)
    spec: dict[str, Spec] = {
        "attn": At("self_attn", attn()),
        "attn_norm": norm.layer_spec("self_attn_layer_norm", c.d_model),
        "mlp": mlp.dense_spec(c.d_model, getattr(c, f"{part}_ffn_dim"), ("fc1", "fc2"), init=init),
        "mlp_norm": norm.layer_spec("final_layer_norm", c.d_model),
    }
    if part == "decoder":
        spec["cross"] = At("encoder_attn", attn())
        spec["cross_norm"] = norm.layer_spec("encoder_attn_layer_norm", c.d_model)
    return spec


def attend(p: Any, x: Any, place: Any, memory: Any, memory_place: Any, heads: int, name: str, **how: Any) -> jax.Array:
    """Attention by content and place to content: [B, T, E] and [B, S, E], each with its places -> [B, T, E]."""
    with tap.scope(name):
        size = x.shape[-1] // heads
        given = {"q": x + place, "k": memory + memory_place, "v": memory}
        q, k, v = (tap.tap(part, split_heads(linear(p[part], y), size)) for part, y in given.items())
        return tap.tap("out", linear(p["o"], merge_heads(attention(q, k, v, **how))))


def layers(
    p: Any,
    c: DetrConfig,
    part: str,
    x: Any,
    place: Any,
    mask: Any,
    memory: Any = None,
    around: Any = None,
    key: Any = None,
) -> Any:
    """All layers of the encoder (`memory` is None) or the decoder: [B, T, E] -> ([B, T, E], those after every layer).

    `place` is of x, `around` of the memory; `mask` is about the map's places. With `auxiliary_loss` the decoder's last
    norm comes after every layer, before the next one reads it.
    """
    heads, rate = getattr(c, f"{part}_attention_heads"), getattr(c, f"{part}_layerdrop")

    def run(q: Any, x: jax.Array, _: Any, key: Any) -> Any:
        keys, before = split(key, 6), x

        def add(name: str, h: jax.Array, key: Any) -> jax.Array:
            return norm.layer(q[name], x + dropout(h, c.dropout, key), EPS)

        how = {"mask": from_attention_mask(None if "cross" in q else mask), "dropout": c.attention_dropout}
        x = add("attn_norm", attend(q["attn"], x, place, x, place, heads, "attn", key=keys[0], **how), keys[1])
        if "cross" in q:
            how["mask"] = from_attention_mask(mask)
            h = attend(q["cross"], x, place, memory, around, heads, "cross", key=keys[2], **how)
            x = add("cross_norm", h, keys[3])
        h = mlp.dense(q["mlp"], x, c.activation_function, rate=c.activation_dropout, key=keys[4])
        x = add("mlp_norm", h, keys[5])
        if "cross" in q and c.auxiliary_loss:
            x = norm.layer(p["norm"], x, EPS)
        if key is not None and rate > 0:  # LayerDrop, Fan et al. 2019, arXiv:1909.11556
            x = jnp.where(jax.random.bernoulli(fold_path(key, "layerdrop"), rate), before, x)
        return x, x

    with tap.scope(part):
        x = tap.tap("embed.out", x)
        x, states = fold(run, p.get("layers", ()), x, key=key)
        return (tap.tap("last", norm.layer(p["norm"], x, EPS)) if "norm" in p else x), states


# ---- the models -----------------------------------------------------------------------------------------------------


def model_spec(c: DetrConfig) -> dict[str, Spec]:
    """Backbone, projection and queries, encoder and decoder."""
    init, size = normal(c.init_std), c.hidden_size
    table = partial(embed.embedding_spec, axes=(None, "embed"))
    inner: dict[str, Spec] = {
        "project": conv_spec("input_projection", maps_of(c)[-1], size, (1, 1), init=init, axes=("conv_in", "embed")),
        "queries": table("query_position_embeddings", c.num_queries, size, init=init),
    }
    if c.position_embedding_type == "learned":
        inner |= under("backbone.position_embedding", learned_spec(size, GRID))
    parts = {
        part: stack_of("layers", [block_spec(c, part)] * getattr(c, f"{part}_layers"))
        for part in ("encoder", "decoder")
    }
    return {
        "backbone": At("backbone.conv_encoder.model", backbone_spec(c)),
        "embed": inner,
        "encoder": At("encoder", {"layers": parts["encoder"]}),
        "decoder": At("decoder", {"layers": parts["decoder"], "norm": norm.layer_spec("layernorm", size)}),
    }


def run(p: Any, c: DetrConfig, pixel_values: Any, pixel_mask: Any, encoder_outputs: Any, key: Any) -> Any:
    """Everything below the heads -> (output, maps of the backbone, the last one projected, its mask)."""
    k_embed, k_encoder, k_decoder = split(key, 3)
    found = backbone(p["backbone"], c, pixel_values)
    projected = conv(p["embed"]["project"], found[-1])
    b, h, w, size = projected.shape
    seen = seen_places(pixel_mask, (b, *pixel_values.shape[2:]), (h, w))
    if c.position_embedding_type == "learned":
        place = learned_positions(p["embed"], seen)
    else:
        place = sine_positions(seen, size)
    place, mask = place.astype(projected.dtype).reshape(b, h * w, size), seen.reshape(b, h * w)
    if encoder_outputs is None:
        flat = dropout(projected.reshape(b, h * w, size), c.dropout, k_embed)
        memory, _ = layers(p["encoder"], c, "encoder", flat, place, mask, key=k_encoder)
    else:
        memory = states_of(encoder_outputs)
    queries = jnp.broadcast_to(
        p["embed"]["queries"]["embedding"].astype(projected.dtype)[None], (b, c.num_queries, size)
    )
    start = jnp.zeros_like(queries)
    states, every = layers(p["decoder"], c, "decoder", start, queries, mask, memory, place, k_decoder)
    out = DetrModelOutput(
        last_hidden_state=states,
        encoder_last_hidden_state=memory,
        intermediate_hidden_states=jnp.stack(every) if c.auxiliary_loss else None,
    )
    return out, found, projected, seen


def model(
    p: Any,
    c: DetrConfig,
    pixel_values: Any = None,
    pixel_mask: Any = None,
    encoder_outputs: Any = None,
    key: Any = None,
) -> DetrModelOutput:
    """Images [B, C, H, W], with 1 in `pixel_mask` [B, H, W] where they are no padding -> states [B, Q, E]."""
    return run(p, c, pixel_values, pixel_mask, encoder_outputs, key)[0]


def detection_spec(c: DetrConfig) -> dict[str, Spec]:
    """The model, a linear head for classes and three layers for boxes."""
    init, size = normal(c.init_std), c.d_model
    box = tuple(
        linear_spec(f"bbox_predictor.layers.{i}", size, width, ("embed", None), init=init)
        for i, width in enumerate((size, size, 4))
    )
    classes = linear_spec("class_labels_classifier", size, c.num_labels + 1, ("embed", None), init=init)
    return under("model", model_spec(c)) | {"head": {"classes": classes, "box": box}}


def find(p: Any, x: jax.Array) -> Found:
    """Classes and boxes of states [..., E]: [..., labels + 1] and [..., 4]."""
    h = x
    for q in p["head"]["box"][:-1]:
        h = jax.nn.relu(linear(q, h))
    return Found(logits=linear(p["head"]["classes"], x), pred_boxes=jax.nn.sigmoid(linear(p["head"]["box"][-1], h)))


def _found(p: Any, out: DetrModelOutput, masks: Any = None) -> DetrOutput:
    every, last = out.intermediate_hidden_states, find(p, out.last_hidden_state)
    return DetrOutput(
        logits=last.logits,
        pred_boxes=last.pred_boxes,
        pred_masks=masks,
        auxiliary_outputs=None if every is None else tuple(find(p, x) for x in every[:-1]),
        last_hidden_state=out.last_hidden_state,
        encoder_last_hidden_state=out.encoder_last_hidden_state,
    )


def object_detection(p: Any, c: DetrConfig, pixel_values: Any = None, **inputs: Any) -> DetrOutput:
    """Classes and boxes of the objects in images [B, C, H, W]."""
    return _found(p, model(p, c, pixel_values, **inputs))


def segmentation_spec(c: DetrConfig) -> dict[str, Spec]:
    """The detector, attention from objects to the map, and convolutions from there up to the largest map."""
    size, heads = c.d_model, c.encoder_attention_heads
    widths = [size + heads, size // 2, size // 4, size // 8, size // 16]
    kernel, init = partial(conv_spec, init=normal(c.init_std)), xavier(c.init_xavier_std)
    steps = zip([widths[0], *widths[:-1]], widths, strict=True)
    masks: dict[str, Spec] = {
        "convs": tuple(kernel(f"lay{i + 1}", d_in, d_out, (3, 3)) for i, (d_in, d_out) in enumerate(steps)),
        "norms": tuple(norm.layer_spec(f"gn{i + 1}", width) for i, width in enumerate(widths)),
        "maps": tuple(
            kernel(f"adapter{i + 1}", d_in, width, (1, 1))
            for i, (d_in, width) in enumerate(zip(maps_of(c)[2::-1], widths[1:4], strict=False))
        ),
        "out": kernel("out_lay", widths[-1], 1, (3, 3)),
    }
    attn = {part: linear_spec(f"{part}_linear", size, size, ("embed", "heads"), init=init) for part in ("q", "k")}
    return under("detr", detection_spec(c)) | {"attn": At("bbox_attention", attn), "masks": At("mask_head", masks)}


def groups_of(width: int) -> int:
    """Into how many groups the mask head's norms divide so many channels."""
    return min(8, width)


def object_attention(p: Any, x: jax.Array, memory: jax.Array, seen: jax.Array, heads: int) -> jax.Array:
    """Where objects [B, Q, E] look on the map [B, h, w, E]: [B, Q, h, w, heads], one softmax over places and heads."""
    b, h, w, size = memory.shape
    q = split_heads(linear(p["q"], x) * (size // heads) ** -0.5, size // heads)
    k = split_heads(linear(p["k"], memory.reshape(b, h * w, size)), size // heads)
    scores = jnp.einsum("bqnd,bsnd->bqsn", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(seen.reshape(b, 1, h * w, 1), scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores.reshape(b, -1, h * w * heads)).astype(x.dtype)
    return tap.tap("attn.weights", weights.reshape(b, -1, h, w, heads))


def masks(p: Any, projected: jax.Array, where: jax.Array, maps: list[jax.Array]) -> jax.Array:
    """Masks of objects from where they look [B, Q, h, w, heads], and maps ever larger: [B, Q, H / 4, W / 4]."""
    b, q, h, w, _ = where.shape
    x = jnp.concatenate([jnp.broadcast_to(projected[:, None], (b, q, *projected.shape[1:])), where], axis=-1)
    x = x.reshape(b * q, h, w, -1)
    for i, (kernel, scale) in enumerate(zip(p["convs"], p["norms"], strict=True)):
        if i > 1:
            skip = conv(p["maps"][i - 2], maps[i - 2])
            x = resize(x, *skip.shape[1:3]).reshape(b, q, *skip.shape[1:])
            x = (x + skip[:, None]).reshape(b * q, *skip.shape[1:])
        x = conv(kernel, x, padding=1)
        x = jax.nn.relu(norm.group(scale, x, groups_of(x.shape[-1]), EPS))
    y = channels_first(conv(p["out"], x, padding=1))
    return y.reshape(b, q, *y.shape[2:])


def segmentation(
    p: Any,
    c: DetrConfig,
    pixel_values: Any = None,
    pixel_mask: Any = None,
    encoder_outputs: Any = None,
    key: Any = None,
) -> DetrOutput:
    """Classes, boxes and masks of the objects in images [B, C, H, W].

    Raises:
        ValueError: sizes that a mask head cannot have.
    """
    widths = [kernel["bias"].shape[0] for kernel in p["masks"]["convs"]]
    if any(width % groups_of(width) for width in widths) or len(maps_of(c)) < 3:
        raise ValueError(
            f"a mask head needs three maps of the backbone, it has {len(maps_of(c))}; and 8 must divide the channels "
            f"of its own maps, {widths}, made of d_model and encoder_attention_heads, where they are more than 8"
        )
    out, maps, projected, seen = run(p, c, pixel_values, pixel_mask, encoder_outputs, key)
    assert out.encoder_last_hidden_state is not None
    memory = out.encoder_last_hidden_state.reshape(projected.shape)
    where = object_attention(p["attn"], out.last_hidden_state, memory, seen, c.encoder_attention_heads)
    return _found(p, out, masks(p["masks"], projected, where, maps[2::-1]))


FAMILY = Family(
    "detr",
    DetrConfig,
    base="model",
    inputs=model,
    relative="resnet",
    architectures=(
        Architecture("DetrModel", "", model_spec, model),
        Architecture("DetrForObjectDetection", "ForObjectDetection", detection_spec, object_detection),
        Architecture("DetrForSegmentation", "ForImageSegmentation", segmentation_spec, segmentation),
    ),
)
