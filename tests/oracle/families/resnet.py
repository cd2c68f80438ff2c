"""ResNet: three heads, both kinds of layers, every place to downsample, feature maps, and checkpoints as found.

Sizes are asymmetric on purpose: channels that differ from stage to stage, images whose sides are halved once as an even
and once as an odd number. Pixels are one of seven values, so that they pack well. The epsilon of batch normalisation
cannot be configured; one case has variances so small that another one would show.
"""

from typing import Any

import numpy as np

from oracle.cases import Array, Tensors, change, configure, ids, zero
from oracle.families import Bug, Case

SIZES: dict[str, Any] = {
    "num_channels": 3,
    "embedding_size": 10,
    "hidden_sizes": [12, 20, 28],
    "depths": [2, 1, 2],
}
# As in ResNet-18, the first stage neither shrinks the map nor widens it, so its first layer has no shortcut.
BASIC = SIZES | {"layer_type": "basic", "hidden_sizes": [10, 14, 22]}


def pixels(name: str, channels: int = 3, height: int = 42, width: int = 59, rows: int = 2) -> Tensors:
    """Returns images `[rows, channels, height, width]`."""
    return {"pixel_values": ids(name, rows, channels, height, width, low=-3, high=4).astype(np.float32) / 2}


TRACES = {"output_hidden_states": True}

# ---- the heads, each with its loss ----------------------------------------------------------------------------------

HEADS = (
    Case("model", "ResNetModel", SIZES, pixels("model"), ("last_hidden_state", "pooler_output")),
    Case(
        "image_classification",
        "ResNetForImageClassification",
        SIZES | {"num_labels": 5},
        pixels("image_classification") | {"labels": np.array([4, 1])},
        ("loss", "logits"),
    ),
    # The kind of loss comes from the number of labels, and then from their dtype.
    Case(
        "regression",
        "ResNetForImageClassification",
        BASIC | {"num_labels": 1},
        pixels("regression") | {"labels": np.array([0.7, -1.3], np.float32)},
        ("loss", "logits"),
    ),
    Case(
        "multi_label",
        "ResNetForImageClassification",
        BASIC | {"num_labels": 3, "problem_type": "multi_label_classification"},
        pixels("multi_label") | {"labels": np.array([[1, 0, 1], [0, 0, 1]], np.float32)},
        ("loss", "logits"),
    ),
    # Without labels there is no classifier: the pooled maps come out.
    Case("no_labels", "ResNetForImageClassification", BASIC | {"num_labels": 0}, pixels("no_labels"), ("logits",)),
    Case("backbone", "ResNetBackbone", SIZES, pixels("backbone"), ("feature_maps",)),
)

# ---- what can be asked for ------------------------------------------------------------------------------------------

TRACED = (
    Case(
        "traces",
        "ResNetModel",
        SIZES,
        pixels("traces", rows=1),
        ("last_hidden_state", "hidden_states"),
        TRACES,
    ),
    Case(
        "traces_of_a_head",
        "ResNetForImageClassification",
        BASIC | {"output_hidden_states": True},
        pixels("traces_of_a_head", rows=1),
        ("logits", "hidden_states"),
    ),
    Case(
        "backbone_features",
        "ResNetBackbone",
        SIZES | {"out_features": ["stem", "stage2", "stage3"]},
        pixels("backbone_features", rows=1),
        ("feature_maps", "hidden_states"),
        TRACES,
    ),
    Case(
        "backbone_indices",
        "ResNetBackbone",
        BASIC | {"out_indices": [1, -2]},
        pixels("backbone_indices", rows=1),
        ("feature_maps",),
    ),
)

# ---- what a configuration can ask for -------------------------------------------------------------------------------

CONFIGS = (
    Case("basic", "ResNetModel", BASIC, pixels("basic", rows=1), ("last_hidden_state", "pooler_output")),
    Case(
        "basic_first_stage",
        "ResNetModel",
        BASIC | {"downsample_in_first_stage": True, "num_channels": 1},
        pixels("basic_first_stage", channels=1),
        ("last_hidden_state",),
    ),
    Case(
        "first_stage",
        "ResNetModel",
        SIZES | {"downsample_in_first_stage": True},
        pixels("first_stage"),
        ("last_hidden_state",),
    ),
    Case(
        "in_bottleneck",
        "ResNetModel",
        SIZES | {"downsample_in_bottleneck": True},
        pixels("in_bottleneck"),
        ("last_hidden_state",),
    ),
    # Negative values reach the pooling of the stem, where padding must not count.
    Case("act_gelu", "ResNetModel", SIZES | {"hidden_act": "gelu"}, pixels("act_gelu", rows=1), ("last_hidden_state",)),
    Case("act_tanh", "ResNetModel", BASIC | {"hidden_act": "tanh"}, pixels("act_tanh", rows=1), ("last_hidden_state",)),
)

# ---- checkpoints as they are found ----------------------------------------------------------------------------------

# As microsoft/resnet-50 has it, written in 2022.
CONFIG_2022: dict[str, Any] = {
    "architectures": ["ResNetForImageClassification"],
    "depths": [1, 2],
    "downsample_in_first_stage": False,
    "embedding_size": 10,
    "hidden_act": "relu",
    "hidden_sizes": [12, 20],
    "id2label": {"0": "tench", "1": "goldfish", "2": "shark"},
    "label2id": {"goldfish": 1, "shark": 2, "tench": 0},
    "layer_type": "bottleneck",
    "model_type": "resnet",
    "num_channels": 3,
    "torch_dtype": "float32",
    "transformers_version": "4.18.0.dev0",
}
CLASSIFIER = ("classifier.1.bias", "classifier.1.weight")
VARIANCES = ("embedder.embedder", "encoder.stages.0.layers.0.shortcut", "encoder.stages.1.layers.0.layer.2")


def small(name: str, size: int) -> Array:
    """Returns variances about as large as the epsilon."""
    return (ids(name, size, low=2, high=40) * 1e-6).astype(np.float32)


CHECKPOINTS = (
    Case(
        "old_config",
        "ResNetForImageClassification",
        CONFIG_2022,
        pixels("old_config", rows=1),
        ("logits",),
        literal_config=True,
    ),
    # The usual way to a backbone: a classifier's checkpoint, whose head stays behind.
    Case(
        "backbone_of_a_classifier",
        "ResNetBackbone",
        BASIC | {"out_features": ["stage1", "stage3"]},
        pixels("backbone_of_a_classifier", rows=1),
        ("feature_maps",),
        writer="ResNetForImageClassification",
        unexpected=CLASSIFIER,
    ),
    Case(
        "head_on_base_model",
        "ResNetForImageClassification",
        BASIC,
        pixels("head_on_base_model", rows=1),
        ("hidden_states",),
        TRACES,
        writer="ResNetModel",
        missing=CLASSIFIER,
    ),
    Case(
        "small_variances",
        "ResNetModel",
        SIZES,
        pixels("small_variances", rows=1),
        ("last_hidden_state",),
        buffers={
            f"{name}.normalization.running_var": small(name, size)
            for name, size in zip(VARIANCES, (10, 12, 20), strict=True)
        },
    ),
)

CASES = HEADS + TRACED + CONFIGS + CHECKPOINTS

# ---- mistakes that the cases above must show ------------------------------------------------------------------------

BOTTLENECKS = ("model", "image_classification", "backbone", "traces", "act_gelu")
BASICS = ("basic", "regression", "multi_label", "no_labels", "backbone_indices", "traces_of_a_head")
BOTH = BOTTLENECKS + BASICS


def _epsilon(larger: float) -> Any:
    """Plants another epsilon (the reference's is 1e-5)."""
    return change(lambda var: (var + (larger - 1e-5)).astype(np.float32), "running_var")


BUGS = (
    Bug("running means forgotten", BOTH, zero("running_mean")),
    Bug("running variances taken for deviations", BOTH, change(np.square, "running_var")),
    Bug("running variances forgotten", BOTH, change(np.ones_like, "running_var")),
    Bug("epsilon 1e-3", ("small_variances",), _epsilon(1e-3)),
    Bug("epsilon 1e-6", ("small_variances",), _epsilon(1e-6)),
    Bug("kernels' height and width exchanged", BOTH, change(lambda w: w.swapaxes(2, 3), "convolution.weight")),
    Bug("kernels flipped", BOTH, change(lambda w: w[:, :, ::-1, ::-1], "convolution.weight")),
    Bug("channels of the image reversed", BOTH, change(lambda w: w[:, ::-1], "embedder.convolution.weight")),
    Bug(
        "shortcuts forgotten",
        ("model", "image_classification", "backbone", "act_gelu", "basic", "regression", "multi_label", "no_labels"),
        zero("shortcut.normalization.weight", "shortcut.normalization.bias"),
    ),
    Bug(
        "stride in the other convolution of a bottleneck",
        ("model", "image_classification", "backbone", "first_stage"),
        configure(downsample_in_bottleneck=True),
    ),
    Bug("stride in the middle of a bottleneck", ("in_bottleneck",), configure(downsample_in_bottleneck=False)),
    Bug("another activation", BOTH, configure(hidden_act="silu")),
    Bug("gelu taken for relu", ("act_gelu",), configure(hidden_act="relu")),
    # What lies beyond the image counts as 0, on both sides: a picture moved by a pixel is another one.
    Bug("padding at the end alone", BOTH, change(lambda w: np.roll(w, 1, 3), "embedder.convolution.weight")),
)

# What the shapes of maps depend on.
KEPT = ("hidden_sizes", "depths", "downsample_in_first_stage", "out_features", "out_indices", "num_channels")

# Nothing that is computed depends on how many batches were seen.
INVISIBLE = (r"num_batches_tracked$",)
