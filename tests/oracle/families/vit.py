"""ViT: three heads, rectangular images and patches, positions stretched to images of other sizes, found checkpoints.

Sizes are asymmetric on purpose: 4 heads of 9, an odd feed-forward width, grids that are higher or wider than square,
images that no whole number of patches covers. `layer_norm_eps` is large enough that a hard-coded one shows. What only
square sizes can do in the reference (masked image modelling, stretched positions) is asked of square ones.
"""

import math
from typing import Any

import numpy as np

from oracle.cases import (
    TRACES,
    Array,
    Tensors,
    change,
    change_input,
    configure,
    ending,
    floats,
    heads_last,
    ids,
    swap,
    zero,
)
from oracle.families import Bug, Case

# 5 x 8 patches of 4 x 3 pixels, two rows of pixels left over
RECTANGLE: dict[str, Any] = {
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 53,
    "layer_norm_eps": 0.05,
    "image_size": [22, 24],
    "patch_size": [4, 3],
    "num_channels": 2,
}
# 5 x 5 patches of 4 x 4 pixels
SQUARE = RECTANGLE | {"image_size": 20, "patch_size": 4, "encoder_stride": 4, "num_channels": 3}
LARGE = 31  # pixels of a larger image: 7 patches, and three pixels left over


def pixels(name: str, channels: int = 3, height: int = 20, width: int = 20, rows: int = 2) -> Tensors:
    """Returns images `[rows, channels, height, width]`."""
    return {"pixel_values": floats(f"{name}.pixel_values", rows, channels, height, width)}


def hidden_patches(name: str, patches: int = 25, rows: int = 2) -> Tensors:
    """Returns which patches are masked out, `[rows, patches]`, about a third of them."""
    return {"bool_masked_pos": ids(f"{name}.bool_masked_pos", rows, patches, low=0, high=3) == 0}


WIDE = pixels("wide", 2, 22, 24)
STRETCH = {"interpolate_pos_encoding": True}

# ---- the heads, each with its loss ----------------------------------------------------------------------------------

HEADS = (
    Case("model", "ViTModel", RECTANGLE, WIDE, ("last_hidden_state", "pooler_output")),
    Case(
        "image_classification",
        "ViTForImageClassification",
        RECTANGLE | {"num_labels": 3},
        WIDE | {"labels": np.array([2, 0])},
        ("loss", "logits"),
    ),
    # Losses of this head are those of sequence classification, by the number of labels and their dtype.
    Case(
        "multi_label",
        "ViTForImageClassification",
        SQUARE | {"num_labels": 3},
        pixels("multi_label") | {"labels": np.array([[1, 0, 1], [0, 0, 1]], np.float32)},
        ("loss", "logits"),
    ),
    # Without labels there is no classifier: the class token's state comes out.
    Case("no_labels", "ViTForImageClassification", SQUARE | {"num_labels": 0}, pixels("no_labels"), ("logits",)),
    Case(
        "masked_image_modeling",
        "ViTForMaskedImageModeling",
        SQUARE,
        pixels("masked") | hidden_patches("masked"),
        ("loss", "reconstruction"),
    ),
    # With nothing masked, the reconstruction may be of another size than the image: three pixels a patch here.
    Case(
        "nothing_masked",
        "ViTForMaskedImageModeling",
        SQUARE | {"encoder_stride": 3, "num_channels": 2},
        pixels("nothing_masked", 2),
        ("reconstruction",),
    ),
)

# ---- images of other sizes ------------------------------------------------------------------------------------------

SIZES = (
    Case("stretched", "ViTModel", SQUARE, pixels("stretched", 3, LARGE, LARGE, 1), ("last_hidden_state",), STRETCH),
    Case("shrunk", "ViTModel", SQUARE, pixels("shrunk", 3, 12, 12), ("last_hidden_state",), STRETCH),
    Case("stretched_wide", "ViTModel", SQUARE, pixels("stretched_wide", 3, 13, 41, 1), ("last_hidden_state",), STRETCH),
    # As many patches as positions, in another arrangement.
    Case(
        "rearranged",
        "ViTModel",
        SQUARE | {"image_size": 16},
        pixels("rearranged", 3, 8, 32),
        ("last_hidden_state",),
        STRETCH,
    ),
    Case(
        "stretched_classification",
        "ViTForImageClassification",
        SQUARE,
        pixels("stretched_classification", 3, 28, 12),
        ("logits",),
        STRETCH,
    ),
    Case(
        "stretched_masked",
        "ViTForMaskedImageModeling",
        SQUARE,
        pixels("stretched_masked", 3, 24, 24, 1),
        ("reconstruction",),
        STRETCH,
    ),
    # Asked for, but there is nothing to stretch.
    Case("not_stretched", "ViTModel", SQUARE, pixels("not_stretched"), ("last_hidden_state",), STRETCH),
)

# ---- what can be passed in, and what a configuration can ask for ----------------------------------------------------

OTHERS = (
    Case(
        "head_mask",
        "ViTModel",
        SQUARE,
        pixels("head_mask") | {"head_mask": np.array([[1, 0, 0.5, 1], [0, 1, 1, 0.25]], np.float32)},
        ("last_hidden_state",),
    ),
    # The last of the hidden states is not normalised yet.
    Case(
        "traces",
        "ViTModel",
        SQUARE,
        pixels("traces", rows=1),
        ("last_hidden_state", "pooler_output", "hidden_states", "attentions"),
        TRACES,
    ),
    Case(
        "traces_of_a_head",
        "ViTForMaskedImageModeling",
        SQUARE,
        pixels("traces_of_a_head", rows=1) | hidden_patches("traces_of_a_head", rows=1),
        ("reconstruction", "hidden_states", "attentions"),
        TRACES,
    ),
    Case("no_qkv_bias", "ViTModel", SQUARE | {"qkv_bias": False}, pixels("no_qkv_bias"), ("last_hidden_state",)),
    Case(
        "another_pooler",
        "ViTModel",
        SQUARE | {"pooler_act": "sigmoid", "pooler_output_size": 29, "hidden_act": "relu"},
        pixels("another_pooler"),
        ("last_hidden_state", "pooler_output"),
    ),
    Case(
        "pruned_heads",
        "ViTForImageClassification",
        SQUARE | {"num_hidden_layers": 3, "pruned_heads": {0: [1], 1: [0, 2]}},
        pixels("pruned_heads"),
        ("logits",),
    ),
)

# ---- checkpoints as they are found ----------------------------------------------------------------------------------

# The keys of google/vit-base-patch16-224 on the hub.
CONFIG_2021: dict[str, Any] = {
    "architectures": ["ViTForImageClassification"],
    "attention_probs_dropout_prob": 0.0,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 36,
    "id2label": {"0": "tench, Tinca tinca", "1": "goldfish", "2": "great white shark"},
    "image_size": 20,
    "initializer_range": 0.02,
    "intermediate_size": 53,
    "label2id": {"goldfish": 1, "great white shark": 2, "tench, Tinca tinca": 0},
    "layer_norm_eps": 1e-12,
    "model_type": "vit",
    "num_attention_heads": 3,
    "num_channels": 3,
    "num_hidden_layers": 2,
    "patch_size": 4,
    "qkv_bias": True,
    "transformers_version": "4.13.0.dev0",
}
POOLER_KEYS = ("pooler.dense.bias", "pooler.dense.weight")
CLASSIFIER_KEYS = ("classifier.bias", "classifier.weight")
DECODER_KEYS = ("decoder.0.bias", "decoder.0.weight")

CHECKPOINTS = (
    Case(
        "as_in_2021", "ViTForImageClassification", CONFIG_2021, pixels("as_in_2021"), ("logits",), literal_config=True
    ),
    # The base model out of a classifier: the prefix goes, the head stays behind, the pooler is new.
    Case(
        "base_of_a_classifier",
        "ViTModel",
        SQUARE,
        pixels("base_of_a_classifier", rows=1),
        ("last_hidden_state",),
        writer="ViTForImageClassification",
        missing=POOLER_KEYS,
        unexpected=CLASSIFIER_KEYS,
    ),
    Case(
        "base_of_masked_image_modeling",
        "ViTModel",
        SQUARE,
        pixels("base_of_masked_image_modeling", rows=1),
        ("last_hidden_state",),
        writer="ViTForMaskedImageModeling",
        missing=POOLER_KEYS,
        unexpected=("embeddings.mask_token", *DECODER_KEYS),
    ),
    # Fine-tuning after pre-training by masked patches, the usual order.
    Case(
        "classifier_on_masked_image_modeling",
        "ViTForImageClassification",
        SQUARE,
        pixels("classifier_on_masked_image_modeling", rows=1),
        ("hidden_states",),
        {"output_hidden_states": True},
        writer="ViTForMaskedImageModeling",
        missing=CLASSIFIER_KEYS,
        unexpected=("vit.embeddings.mask_token", *DECODER_KEYS),
    ),
    # The other way round: the mask token is new, too, though it belongs to the base model.
    Case(
        "masked_image_modeling_on_a_base",
        "ViTForMaskedImageModeling",
        SQUARE,
        pixels("masked_image_modeling_on_a_base", rows=1),
        ("hidden_states",),
        {"output_hidden_states": True},
        writer="ViTModel",
        missing=("vit.embeddings.mask_token", *DECODER_KEYS),
        unexpected=POOLER_KEYS,
    ),
)

CASES = HEADS + SIZES + OTHERS + CHECKPOINTS


# ---- mistakes that the cases above must show ------------------------------------------------------------------------


def _channels_last(kernel: Array) -> Array:
    """Reads a convolution `(out, channels, height, width)` as if its channels lay last."""
    out, channels, height, width = kernel.shape
    return kernel.reshape(out, height, width, channels).transpose(0, 3, 1, 2)


def _column_by_column(table: Array) -> Array:
    """Reads the positions of a 5 x 8 grid as if they ran down the columns."""
    grid = table[:, 1:].reshape(1, 8, 5, -1).swapaxes(1, 2)
    return np.concatenate([table[:, :1], grid.reshape(1, 40, -1)], axis=1)


def _class_token_last(table: Array) -> Array:
    return np.roll(table, -1, axis=1)


def _shuffle_wrong(kernel_or_bias: Array) -> Array:
    """Reads the decoder's rows `(channels, stride, stride)` as if the channels came last."""
    stride = 4
    order = np.arange(kernel_or_bias.shape[0]).reshape(stride, stride, -1).transpose(2, 0, 1).ravel()
    return kernel_or_bias[order]


def _kernel(size: int, new: int, a: float = -0.75, corners: bool = False, wide: bool = False) -> Array:
    """Returns the matrix `[new, size]` of cubic interpolation, with its details for others to get wrong."""
    step = (size - 1) / (new - 1) if corners else size / new
    reach = max(step, 1.0) if wide else 1.0
    out = np.zeros((new, size))
    for row in range(new):
        at = row * step if corners else (row + 0.5) * step - 0.5
        for column in range(math.floor(at - 3 * reach), math.ceil(at + 3 * reach) + 1):
            t = abs(at - column) / reach
            near, far = ((a + 2) * t - (a + 3)) * t * t + 1, ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
            out[row, min(max(column, 0), size - 1)] += near if t <= 1 else far if t < 2 else 0.0
    return out / out.sum(1, keepdims=True)


def _stretch(new: int, **details: Any) -> Any:
    """Stretches the position table beforehand, in a way of its own, so that the reference has nothing left to do."""

    def apply(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
        grid = config["image_size"] // config["patch_size"]
        matrix = _kernel(grid, new, **details)
        for key in ending(tensors, "embeddings.position_embeddings"):
            table = tensors[key][0, 1:].reshape(grid, grid, -1)
            made = np.einsum("yh,xw,hwe->yxe", matrix, matrix, table).reshape(1, new * new, -1)
            tensors[key] = np.concatenate([tensors[key][:, :1], made], axis=1).astype(np.float32)
        config["image_size"] = inputs["pixel_values"].shape[-1]

    return apply


def _down_the_columns(masked: Array) -> Array:
    """Reads a mask of 5 x 5 patches as if it ran down the columns."""
    return masked.reshape(-1, 5, 5).swapaxes(1, 2).reshape(masked.shape)


EVERYTHING = tuple(case.name for case in HEADS)
MASKED = ("masked_image_modeling", "traces_of_a_head")
QKV = tuple(f"attention.{part}.{leaf}" for part in ("query", "key", "value") for leaf in ("weight", "bias"))

BUGS = (
    Bug("positions forgotten", EVERYTHING, zero("position_embeddings")),
    Bug("class token forgotten", EVERYTHING, zero("cls_token")),
    Bug("class token put last", EVERYTHING, change(_class_token_last, "position_embeddings")),
    Bug(
        "positions down the columns",
        ("model", "image_classification"),
        change(_column_by_column, "position_embeddings"),
    ),
    Bug("channels of a patch last", EVERYTHING, change(_channels_last, "projection.weight")),
    Bug("channels of the image reversed", EVERYTHING, change_input("pixel_values", lambda x: x[:, ::-1])),
    Bug("pixels left over cut off at the top", ("model",), change_input("pixel_values", lambda x: np.roll(x, -2, 2))),
    Bug("query and key exchanged", EVERYTHING, swap("attention.query", "attention.key", "weight", "bias")),
    Bug("heads split the wrong way round", EVERYTHING, change(heads_last(RECTANGLE["num_attention_heads"]), *QKV)),
    Bug("square kernels not transposed", EVERYTHING, change(np.transpose, "attention.value.weight")),
    Bug("layer_norm_eps 1e-12 hard-coded", EVERYTHING, configure(layer_norm_eps=1e-12)),
    # The two curves are within 5e-4 of each other everywhere; the bound is still twice what the test suite allows.
    Bug("gelu by tanh instead of erf", EVERYTHING, configure(hidden_act="gelu_new"), least=2e-4),
    Bug("gelu whatever the configuration says", ("another_pooler",), configure(hidden_act="gelu")),
    Bug(
        "pooler by tanh whatever the configuration says",
        ("another_pooler",),
        configure(pooler_act="tanh"),
        outputs=("pooler_output",),
    ),
    Bug("mask inverted", MASKED, change_input("bool_masked_pos", np.logical_not)),
    Bug("mask ignored", MASKED, change_input("bool_masked_pos", np.zeros_like)),
    Bug("mask down the columns", MASKED, change_input("bool_masked_pos", _down_the_columns)),
    Bug(
        "channels last in the shuffled pixels",
        ("masked_image_modeling",),
        change(_shuffle_wrong, "decoder.0.weight", "decoder.0.bias"),
    ),
    Bug("head mask ignored", ("head_mask",), change_input("head_mask", np.ones_like)),
    Bug("head mask of layers exchanged", ("head_mask",), change_input("head_mask", lambda m: m[::-1])),
    # With none of these details, the table stretched beforehand moves the output by 2e-6.
    Bug("cubic with a = -0.5", ("stretched",), _stretch(7, a=-0.5)),
    Bug("corners aligned", ("stretched",), _stretch(7, corners=True)),
    Bug("corners aligned", ("shrunk",), _stretch(3, corners=True)),
    Bug("shrunk with a wider kernel, against aliasing", ("shrunk",), _stretch(3, wide=True)),
)

# Parameters without influence: a key's bias adds the same to all scores of a query, and the softmax takes it away.
INVISIBLE = (r"\.attention\.key\.bias$",)
# What the shapes of the outputs depend on.
KEPT = ("image_size", "patch_size", "num_channels", "encoder_stride")
