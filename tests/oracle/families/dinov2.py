"""DINOv2: its heads, hidden patches, both feed-forward networks, positions stretched unasked, maps of a backbone.

What ViT's cases show is not asked again. Sizes are asymmetric on purpose: 4 heads of 9, 5 x 5 positions, images of
other grids that no whole number of patches covers. `layer_norm_eps` is large enough that a hard-coded one shows.
"""

from typing import Any

import numpy as np

from oracle.cases import TRACES, Array, change, change_input, configure, floats, heads_last, ids, swap, zero
from oracle.families import Bug, Case

SIZES: dict[str, Any] = {
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "mlp_ratio": 2,
    "layer_norm_eps": 0.05,
    "image_size": 20,
    "patch_size": 4,
    "num_channels": 3,
}
# 36 * 2.5 * 2 / 3 = 60, and 64 is the next multiple of 8
SWIGLU = SIZES | {"mlp_ratio": 2.5, "use_swiglu_ffn": True, "qkv_bias": False, "use_mask_token": False}


def pixels(name: str, height: int = 20, width: int = 20, rows: int = 2) -> dict[str, Array]:
    """Returns images `[rows, 3, height, width]`."""
    return {"pixel_values": floats(f"{name}.pixel_values", rows, 3, height, width)}


HIDDEN = {"bool_masked_pos": ids("masked.bool_masked_pos", 2, 25, low=0, high=3) == 0}

CASES = (
    Case("model", "Dinov2Model", SIZES, pixels("model") | HIDDEN, ("last_hidden_state", "pooler_output")),
    # 3 x 10 patches, and pixels left over on both sides.
    Case(
        "image_classification",
        "Dinov2ForImageClassification",
        SIZES | {"num_labels": 3},
        pixels("image_classification", 13, 41) | {"labels": np.array([2, 0])},
        ("loss", "logits"),
    ),
    # Without labels there is no classifier: both states come out.
    Case(
        "no_labels",
        "Dinov2ForImageClassification",
        SIZES | {"num_labels": 0, "output_hidden_states": True},
        pixels("no_labels", rows=1),
        ("logits", "hidden_states"),
    ),
    Case("swiglu", "Dinov2Model", SWIGLU, pixels("swiglu", rows=1), ("last_hidden_state",)),
    # Of the hidden states none is normalised.
    Case(
        "traces",
        "Dinov2Model",
        SWIGLU | {"layerscale_value": 0.3, "drop_path_rate": 0.2},
        pixels("traces", rows=1) | {"head_mask": np.array([[1, 0, 0.5, 1], [0, 1, 1, 0.25]], np.float32)},
        ("last_hidden_state", "hidden_states", "attentions"),
        TRACES,
    ),
    Case(
        "backbone",
        "Dinov2Backbone",
        SIZES | {"out_features": ["stem", "stage2"]},
        pixels("backbone", 24, 16),
        ("feature_maps",),
    ),
    # Opened from a classifier; states as they are, the class token's among them.
    Case(
        "backbone_states",
        "Dinov2Backbone",
        SIZES | {"out_indices": [1, -1], "apply_layernorm": False, "reshape_hidden_states": False},
        pixels("backbone_states", rows=1),
        ("feature_maps", "hidden_states"),
        {"output_hidden_states": True},
        writer="Dinov2ForImageClassification",
        unexpected=("classifier.bias", "classifier.weight"),
    ),
)

# ---- mistakes that the cases above must show ------------------------------------------------------------------------

# Those that record nothing from before the first layer.
EVERYTHING = ("model", "image_classification", "swiglu")
BIASED = EVERYTHING[:2]
QKV = tuple(f"attention.{part}.{leaf}" for part in ("query", "key", "value") for leaf in ("weight", "bias"))


def _halves_swapped(both: Array) -> Array:
    """Reads the gate's half of a kernel as the other one."""
    return np.concatenate(np.split(both, 2)[::-1])


BUGS = (
    Bug("positions forgotten", EVERYTHING, zero("position_embeddings")),
    Bug("class token put last", EVERYTHING, change(lambda table: np.roll(table, -1, 1), "position_embeddings")),
    Bug(
        "query and key exchanged",
        ("model", "image_classification"),
        swap("attention.query", "attention.key", "weight", "bias"),
    ),
    Bug("heads split the wrong way round", BIASED, change(heads_last(4), *QKV)),
    Bug("layer_norm_eps 1e-6 hard-coded", EVERYTHING, configure(layer_norm_eps=1e-6)),
    Bug("LayerScale forgotten", EVERYTHING, change(np.ones_like, "lambda1")),
    Bug("LayerScales exchanged", EVERYTHING, swap("layer_scale1.lambda1", "layer_scale2.lambda1")),
    Bug("gate and input exchanged", ("swiglu",), change(_halves_swapped, "weights_in.weight")),
    Bug("mask inverted", ("model",), change_input("bool_masked_pos", np.logical_not)),
    Bug("mask ignored", ("model",), change_input("bool_masked_pos", np.zeros_like)),
    Bug(
        "head mask of layers exchanged",
        ("traces",),
        change_input("head_mask", lambda m: m[::-1]),
        outputs=("last_hidden_state", "attentions.0"),
    ),
    Bug("states not normalised", ("backbone",), configure(apply_layernorm=False)),
    Bug("states normalised", ("backbone_states",), configure(apply_layernorm=True), outputs=("feature_maps.0",)),
    Bug(
        "class token and patches exchanged in the classifier",
        ("image_classification",),
        change(lambda kernel: np.roll(kernel, 36, 1), "classifier.weight"),
    ),
)

# A key's bias adds the same to all scores of a query, and the softmax takes it away. Classifiers hide no patches.
INVISIBLE = (r"\.attention\.key\.bias$", r"^dinov2\.embeddings\.mask_token$")
# What the shapes of the outputs depend on.
KEPT = ("image_size", "patch_size", "num_channels", "num_hidden_layers", "out_features", "out_indices")
# Stored in every checkpoint, for the pre-training.
DEAD = {"Dinov2ForImageClassification": r"^embed\.mask", "Dinov2Backbone": r"^embed\.mask"}
