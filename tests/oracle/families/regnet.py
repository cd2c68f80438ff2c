"""RegNet: both heads, layers with and without squeeze-and-excitation, groups of several widths.

What ResNet's cases show is not asked again. Channels differ from stage to stage, and of 18, 20 and 28 of them a quarter
is none, or an odd one; the sides of images are even and odd where they are halved. Squeezes have several units, for
those that their ReLU shuts say nothing.
"""

from typing import Any

import numpy as np

from oracle.cases import Array, Tensors, change, configure, ids, zero
from oracle.families import Bug, Case

SIZES: dict[str, Any] = {
    "num_channels": 3,
    "embedding_size": 18,
    "hidden_sizes": [20, 28, 36],
    "depths": [2, 1, 2],
    "groups_width": 4,
}
PLAIN = SIZES | {"layer_type": "x"}


def pixels(name: str, height: int = 42, width: int = 59, rows: int = 2) -> Tensors:
    """Returns images `[rows, 3, height, width]` of few values, which pack well."""
    return {"pixel_values": ids(name, rows, 3, height, width, low=-3, high=4).astype(np.float32) / 2}


CASES = (
    Case("model", "RegNetModel", SIZES, pixels("model"), ("last_hidden_state", "pooler_output")),
    Case(
        "image_classification",
        "RegNetForImageClassification",
        SIZES | {"num_labels": 5},
        pixels("image_classification") | {"labels": np.array([4, 1])},
        ("loss", "logits"),
    ),
    Case("plain", "RegNetModel", PLAIN, pixels("plain"), ("last_hidden_state", "pooler_output")),
    # Fewer channels than a group has, so that there is one group; without labels the pooled maps come out.
    Case(
        "one_group",
        "RegNetForImageClassification",
        PLAIN | {"groups_width": 64, "num_labels": 0},
        pixels("one_group", rows=1),
        ("logits",),
    ),
    # Negative values go through every activation but the squeeze's own, which is a ReLU whatever the others are.
    Case(
        "act_gelu",
        "RegNetModel",
        SIZES | {"hidden_act": "gelu", "depths": [1, 1, 1]},
        pixels("act_gelu", 21, 30, rows=1),
        ("last_hidden_state", "hidden_states"),
        {"output_hidden_states": True},
    ),
    # Groups of another width, in a checkpoint whose head stays behind.
    Case(
        "base_of_a_classifier",
        "RegNetModel",
        SIZES | {"hidden_sizes": [14, 21], "depths": [1, 2], "groups_width": 7},
        pixels("base_of_a_classifier", rows=1),
        ("last_hidden_state",),
        writer="RegNetForImageClassification",
        unexpected=("classifier.1.bias", "classifier.1.weight"),
    ),
)

# ---- mistakes that the cases above must show ------------------------------------------------------------------------

Y = ("model", "image_classification", "base_of_a_classifier")
ALL = (*Y, "plain")


def _of_the_other_group(kernel: Array) -> Array:
    """Reads a grouped convolution's outputs group by group in the other order."""
    return np.roll(kernel, kernel.shape[1], 0)


def _interleaved(kernel: Array) -> Array:
    """Reads a grouped convolution's outputs as if those of a group lay apart."""
    width = kernel.shape[1]
    return kernel.reshape(width, -1, *kernel.shape[1:]).swapaxes(0, 1).reshape(kernel.shape)


BUGS = (
    Bug("running means forgotten", ALL, zero("running_mean")),
    Bug("running variances forgotten", ALL, change(np.ones_like, "running_var")),
    Bug("groups exchanged", ALL, change(_of_the_other_group, "layer.1.convolution.weight")),
    Bug("groups interleaved", ALL, change(_interleaved, "layer.1.convolution.weight")),
    Bug("squeeze taken for a factor of a half", Y, zero("attention.2.weight", "attention.2.bias")),
    Bug("squeeze's biases forgotten", Y, zero("attention.0.bias", "attention.2.bias")),
    Bug("shortcuts forgotten", ALL, zero("shortcut.normalization.weight", "shortcut.normalization.bias")),
    Bug("no activation between the parts but ReLU", ("act_gelu",), configure(hidden_act="relu")),
)

# What the shapes of maps depend on.
KEPT = ("hidden_sizes", "depths", "num_channels", "groups_width")
# Nothing that is computed depends on how many batches were seen.
INVISIBLE = (r"num_batches_tracked$",)
