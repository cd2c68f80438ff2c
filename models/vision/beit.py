"""BEiT: a ViT pre-trained to guess the visual words of hidden patches, as BERT guesses words.

Bao et al. 2021, arXiv:2106.08254; original code microsoft/unilm. Nearest relative: ViT, with a factor for every
channel on what a layer's parts add, no bias on keys, and positions that are numbers added to the scores: a table of how
many rows and columns a patch is away, with three more for the class token, in each layer or shared by all. For images
of other sizes the table is stretched. DiT (Li et al. 2022, arXiv:2203.02378) is the same model, trained on scanned
documents. Segmentation turns four layers' states into a pyramid of maps for UPerNet.
"""

from functools import partial
from typing import Any, ClassVar

import jax
import numpy as np

from formax.core import tap
from formax.core.config import ConfigError, config
from formax.core.family import Architecture, Family, Port
from formax.core.outputs import BackboneOutput, BaseModelOutput, LogitsOutput, SemanticSegmentationOutput
from formax.core.rng import split
from formax.core.spec import At, Spec, normal, stack_of, zeros
from formax.layers import heads, image_heads, mlp, norm, patch_distance, upernet
from formax.layers.attention import Mask, attention_spec, self_attention
from formax.layers.backbone import PatchBackboneConfig, all_states, as_map
from formax.layers.conv import channels_first, channels_last
from formax.layers.dropout import drop_path, dropout
from formax.layers.linear import linear
from formax.layers.patches import embed_image, image_spec
from formax.layers.resize import grid_of


@config
class BeitConfig(PatchBackboneConfig):
    """`config.json` of model type "beit"."""

    model_type: ClassVar[str] = "beit"
    attribute_map: ClassVar = {"segmentation_indices": "out_indices"}  # as checkpoints of 2021 call them

    vocab_size: int = 8192
    intermediate_size: int = 3072
    patch_size: int = 16
    use_mask_token: bool = False
    use_absolute_position_embeddings: bool = False
    use_relative_position_bias: bool = False
    use_shared_relative_position_bias: bool = False
    layer_scale_init_value: float = 0.1
    drop_path_rate: float = 0.1
    use_mean_pooling: bool = True
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    use_auxiliary_head: bool = True
    auxiliary_loss_weight: float = 0.4
    auxiliary_channels: int = 256
    auxiliary_num_convs: int = 1
    auxiliary_concat_input: bool = False
    semantic_loss_ignore_index: int = 255
    add_fpn: bool = False
    reshape_hidden_states: bool = True

    def check(self) -> None:
        super().check()
        if self.add_fpn and len(self.features) != 4:
            raise ConfigError(f"add_fpn=True needs four out_indices, got {self.out_indices}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in the images of the pre-training."""
        return grid_of(self.image_size, self.patch_size)


# --- layers


def block_spec(c: BeitConfig, layer: int) -> dict[str, Spec]:
    """One layer."""
    init, size = normal(c.initializer_range), c.hidden_size
    names = ("attention.query", "attention.key", "attention.value", "output.dense")
    attn = attention_spec(size, c.heads_of(layer), c.head_dim, names=names, init=init, bias="qvo")
    if c.use_relative_position_bias:
        attn["distance"] = patch_distance.spec("attention.relative_position_bias", c.grid, c.num_attention_heads)
    spec: dict[str, Spec] = {
        "attn_norm": norm.layer_spec("layernorm_before", size),
        "attn": At("attention", attn),
        "mlp_norm": norm.layer_spec("layernorm_after", size),
        "mlp": mlp.dense_spec(size, c.intermediate_size, ("intermediate.dense", "output.dense"), init=init),
    }
    if c.layer_scale_init_value > 0:
        scale = partial(norm.layer_scale_spec, size=size, value=c.layer_scale_init_value)
        spec |= {"attn_scale": scale("lambda_1"), "mlp_scale": scale("lambda_2")}
    return spec


def block(p: Any, c: BeitConfig, x: jax.Array, shared: Any, grid: tuple[int, int], rate: Any, key: Any) -> jax.Array:
    """Pre-norm; what each part adds is scaled by channel, if at all. [B, 1 + N, E] -> [B, 1 + N, E].

    `shared` is a table of distances for this `grid`, or None; `rate` that of parts that are left out.
    """
    keys = split(key, 5)
    table = shared
    if "distance" in p["attn"]:
        own = patch_distance.stretched(p["attn"]["distance"], c.grid, grid)
        table = own if shared is None else own + shared
    bias = None if table is None else patch_distance.bias(table, grid)

    def add(x: jax.Array, h: jax.Array, name: str, key: Any, other: Any) -> jax.Array:
        h = dropout(h, c.hidden_dropout_prob, key)
        return x + drop_path(norm.layer_scale(p[name], h) if name in p else h, rate, other)

    how: dict[str, Any] = {"bias": bias, "dropout": c.attention_probs_dropout_prob, "key": keys[0]}
    h, _ = self_attention(p["attn"], norm.layer(p["attn_norm"], x, c.layer_norm_eps), c.head_dim, mask=Mask(), **how)
    x = add(x, h, "attn_scale", keys[1], keys[2])
    h = mlp.dense(p["mlp"], norm.layer(p["mlp_norm"], x, c.layer_norm_eps), c.hidden_act)
    return add(x, h, "mlp_scale", keys[3], keys[4])


def layers_spec(c: BeitConfig) -> dict[str, Spec]:
    """Embeddings and layers."""
    mask = (1, 1, c.hidden_size) if c.use_mask_token else ()
    spec: dict[str, Spec] = {
        "embed": At("embeddings", image_spec(c, init=zeros, positions=c.use_absolute_position_embeddings, mask=mask)),
        "layers": stack_of("encoder.layer", [block_spec(c, i) for i in range(c.num_hidden_layers)]),
    }
    if c.use_shared_relative_position_bias:
        spec["distance"] = patch_distance.spec("encoder.relative_position_bias", c.grid, c.num_attention_heads)
    return spec


def encoder_spec(c: BeitConfig) -> dict[str, Spec]:
    """What the heads have: layers, and a norm if the class token stands for the image."""
    last = {} if c.use_mean_pooling else {"norm": norm.layer_spec("layernorm", c.hidden_size)}
    return layers_spec(c) | last


def model_spec(c: BeitConfig) -> dict[str, Spec]:
    """The same, and the norm of the patches' mean if that stands for the image."""
    pooler = {"pooler": norm.layer_spec("pooler.layernorm", c.hidden_size)} if c.use_mean_pooling else {}
    return encoder_spec(c) | pooler


def states(p: Any, c: BeitConfig, pixel_values: Any, hidden: Any, key: Any) -> list[jax.Array]:
    """What goes into each layer and what comes out of the last, not normalised: [B, 1 + N, E] times L + 1."""
    k_embed, k_layers = split(key, 2)
    with tap.scope("embed"):
        x = embed_image(p["embed"], c, pixel_values, stretch=True, hidden=hidden)
        x = tap.tap("out", dropout(x, c.hidden_dropout_prob, k_embed))
    grid = grid_of(pixel_values.shape[2:], c.patch_size)
    shared = patch_distance.stretched(p["distance"], c.grid, grid) if "distance" in p else None
    rates = tuple(np.linspace(0, c.drop_path_rate, c.num_hidden_layers).tolist())

    def run(p: Any, x: jax.Array, key: Any, rate: Any) -> jax.Array:
        return block(p, c, x, shared, grid, rate, key)

    return all_states(run, p.get("layers", ()), x, key=k_layers, data=rates)


def normalised(p: Any, c: BeitConfig, x: jax.Array) -> jax.Array:
    """The last states as the model gives them: through its norm, if it has one."""
    return norm.layer(p["norm"], x, c.layer_norm_eps) if "norm" in p else x


def encode(
    p: Any,
    c: BeitConfig,
    pixel_values: Any = None,
    bool_masked_pos: Any = None,
    interpolate_pos_encoding: bool = False,
    key: Any = None,
) -> jax.Array:
    """States of the class token and of the patches, row by row: [B, C, height, width] -> [B, 1 + N, E].

    `interpolate_pos_encoding` says nothing: positions are always stretched to the image.
    """
    return normalised(p, c, states(p, c, pixel_values, bool_masked_pos, key)[-1])


def pool(p: Any, c: BeitConfig, x: jax.Array) -> jax.Array:
    """What stands for the image, the normalised mean of the patches or the class token: [B, 1 + N, E] -> [B, E]."""
    mean = norm.layer(p["pooler"], x[:, 1:].mean(1), c.layer_norm_eps) if "pooler" in p else x[:, 0]
    return tap.tap("pooler", mean)


def model(p: Any, c: BeitConfig, pixel_values: Any = None, **inputs: Any) -> BaseModelOutput:
    """States [B, 1 + N, E] and pooled [B, E]."""
    x = encode(p, c, pixel_values, **inputs)
    return BaseModelOutput(last_hidden_state=x, pooler_output=pool(p, c, x))


# --- heads


def image_classification(
    p: Any, c: BeitConfig, pixel_values: Any = None, interpolate_pos_encoding: bool = False, key: Any = None
) -> LogitsOutput:
    """A label for every image: logits [B, labels] (without labels, what is pooled [B, E])."""
    x = pool(p, c, encode(p, c, pixel_values, key=key))
    return LogitsOutput(logits=linear(p["head"], x) if "head" in p else x)


def words_spec(c: BeitConfig) -> dict[str, Spec]:
    """A norm and a linear map to the visual words."""
    words = heads.linear_head("lm_head", c.vocab_size)(c)
    return {"head_norm": norm.layer_spec("layernorm", c.hidden_size), **words}


def masked_image_modeling(p: Any, c: BeitConfig, pixel_values: Any = None, **inputs: Any) -> LogitsOutput:
    """Scores of the visual words at every patch: logits [B, N, V]."""
    x = norm.layer(p["head_norm"], encode(p, c, pixel_values, **inputs), c.layer_norm_eps)
    return LogitsOutput(logits=linear(p["head"], x[:, 1:]))


def segmentation_spec(c: BeitConfig) -> dict[str, Spec]:
    """The encoder, the pyramid and the heads, of which the auxiliary one is for training."""
    spec = heads.with_heads("beit", encoder_spec)(c) | {"pyramid": upernet.pyramid_spec(c)}
    spec["decode"] = At("decode_head", upernet.upernet_spec(c))
    return spec | ({"auxiliary": At("auxiliary_head", upernet.fcn_spec(c))} if c.use_auxiliary_head else {})


def semantic_segmentation(
    p: Any, c: BeitConfig, pixel_values: Any = None, interpolate_pos_encoding: bool = False, key: Any = None
) -> SemanticSegmentationOutput:
    """Scores of labels for squares of patch_size / 4 pixels: [B, C, height, width] -> logits [B, labels, H', W'].

    What `out_indices` say are the states that go into these layers, for the reference counts from one here.

    Raises:
        ValueError: they are not four.
    """
    if len(c.features) != 4 or 0 in c.features:
        raise ValueError(f"segmentation needs four layers for its pyramid, 1 or more each; out_indices={c.out_indices}")
    found, grid = states(p, c, pixel_values, None, key), grid_of(pixel_values.shape[2:], c.patch_size)
    maps = [channels_last(as_map(found[i - 1], grid)) for i in c.features]
    maps = upernet.pyramid(p["pyramid"], maps, key=key)
    with tap.scope("decode"):
        logits = channels_first(upernet.upernet(p["decode"], c, maps, key))
    other = None
    if "auxiliary" in p:
        with tap.scope("auxiliary"):
            other = channels_first(upernet.fcn(p["auxiliary"], maps[2], key))
    return SemanticSegmentationOutput(logits=logits, auxiliary_logits=other)


def backbone_spec(c: BeitConfig) -> dict[str, Spec]:
    """Embeddings and layers, and the pyramid if there is one."""
    return layers_spec(c) | ({"pyramid": upernet.pyramid_spec(c)} if c.add_fpn else {})


def backbone(p: Any, c: BeitConfig, pixel_values: Any = None, key: Any = None) -> BackboneOutput:
    """The states that `out_features` or `out_indices` ask for, as maps [B, E, H, W] (or as they are: [B, 1 + N, E])."""
    found, grid = states(p, c, pixel_values, None, key), grid_of(pixel_values.shape[2:], c.patch_size)
    maps = [found[i] for i in c.features]
    if c.reshape_hidden_states or c.add_fpn:
        maps = [as_map(x, grid) for x in maps]
    if c.add_fpn:
        eps = c.extra.get("batch_norm_eps", 1e-5)  # the reference has no default, and fails without
        maps = list(map(channels_first, upernet.pyramid(p["pyramid"], list(map(channels_last, maps)), eps, key=key)))
    return BackboneOutput(feature_maps=tuple(maps))


FAMILY = Family(
    "beit",
    BeitConfig,
    base="beit",
    inputs=encode,
    relative="vit",
    architectures=(
        Architecture("BeitModel", "", model_spec, model),
        Architecture(
            "BeitForImageClassification",
            "ForImageClassification",
            heads.with_heads("beit", model_spec, image_heads.labels_spec),
            image_classification,
            inputs=image_classification,
        ),
        # No Auto class of the reference finds this one: AutoModelForMaskedImageModeling is for pixels.
        Architecture(
            "BeitForMaskedImageModeling",
            "ForMaskedPatches",
            heads.with_heads("beit", encoder_spec, words_spec),
            masked_image_modeling,
        ),
        Architecture(
            "BeitForSemanticSegmentation",
            "ForSemanticSegmentation",
            segmentation_spec,
            semantic_segmentation,
            inputs=semantic_segmentation,
        ),
        Architecture("BeitBackbone", "Backbone", backbone_spec, backbone, inputs=backbone),
    ),
    flax=Port(
        ("BeitModel", "BeitForImageClassification", "BeitForMaskedImageModeling"),
        inputs=("pixel_values", "bool_masked_pos"),
    ),
)
