"""BEiT: its heads, tables of distances in each layer or shared, stretched or not, pyramids, and old checkpoints.

What ViT's cases show is not asked again. Sizes are asymmetric on purpose: 4 heads of 9, grids of 5 x 5 and of 5 x 3,
images of other grids. `layer_norm_eps` is large enough that a hard-coded one shows. Maps of 5 x 5 and of 7 x 7 are
pooled into parts that overlap, and those of 2 x 2 into more parts than they have.
"""

from typing import Any

import numpy as np

from oracle.cases import TRACES, Array, Tensors, change, change_input, configure, floats, heads_last, ids, swap, zero
from oracle.families import Bug, Case

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 53,
    "layer_norm_eps": 0.05,
    "image_size": 20,
    "patch_size": 4,
    "num_channels": 3,
}
OWN = SIZES | {"use_relative_position_bias": True}
SHARED = SIZES | {"use_shared_relative_position_bias": True, "use_mean_pooling": False}
# Both tables, of a grid of 5 x 3, which the reference stretches even where it fits: it takes rows for columns.
RECTANGLE = SHARED | OWN | {"image_size": [20, 12], "layer_scale_init_value": 0}
SEGMENTATION = OWN | {
    "num_hidden_layers": 5,
    "out_indices": [1, 2, 4, 5],
    "num_labels": 6,
    "pool_scales": [1, 2, 3],
    "auxiliary_channels": 7,
    "auxiliary_num_convs": 2,
    "auxiliary_concat_input": True,
    "semantic_loss_ignore_index": 4,
}


def pixels(name: str, height: int = 20, width: int = 20, rows: int = 2) -> Tensors:
    """Returns images `[rows, 3, height, width]`."""
    return {"pixel_values": floats(f"{name}.pixel_values", rows, 3, height, width)}


HIDDEN = {"bool_masked_pos": ids("masked.bool_masked_pos", 2, 25, low=0, high=3) == 0}
COUNT = int(HIDDEN["bool_masked_pos"].sum())

CASES = (
    Case(
        "model",
        "BeitModel",
        OWN | {"use_absolute_position_embeddings": True},
        pixels("model"),
        ("last_hidden_state", "pooler_output"),
    ),
    Case("rectangle", "BeitModel", RECTANGLE, pixels("rectangle", 20, 12), ("last_hidden_state", "pooler_output")),
    # 6 x 8 patches, and pixels left over: positions of both kinds are stretched.
    Case(
        "image_classification",
        "BeitForImageClassification",
        OWN | {"use_absolute_position_embeddings": True, "num_labels": 3},
        pixels("image_classification", 27, 33) | {"labels": np.array([2, 0])},
        ("loss", "logits"),
    ),
    # Labels are those of the hidden patches alone.
    Case(
        "masked_image_modeling",
        "BeitForMaskedImageModeling",
        SHARED | {"use_mask_token": True},
        pixels("masked") | HIDDEN | {"labels": ids("masked.labels", COUNT, low=0)},
        ("loss", "logits"),
    ),
    Case(
        "semantic_segmentation",
        "BeitForSemanticSegmentation",
        SEGMENTATION,
        pixels("semantic_segmentation") | {"labels": ids("semantic_segmentation.labels", 2, 23, 17, low=0, high=6)},
        ("loss", "logits"),
    ),
    # As in 2021: the layers' other name, the pairs' rows as a buffer of every layer; with a table that shrinks.
    Case(
        "old_segmentation",
        "BeitForSemanticSegmentation",
        {
            "architectures": ["BeitForSemanticSegmentation"],
            "auxiliary_channels": 7,
            "auxiliary_concat_input": False,
            "auxiliary_loss_weight": 0.4,
            "auxiliary_num_convs": 1,
            "hidden_size": 36,
            "image_size": 28,
            "intermediate_size": 53,
            "layer_norm_eps": 1e-12,
            "layer_scale_init_value": 0.1,
            "model_type": "beit",
            "num_attention_heads": 4,
            "num_channels": 3,
            "num_hidden_layers": 4,
            "patch_size": 4,
            "pool_scales": [1, 2, 3, 6],
            "segmentation_indices": [1, 2, 3, 4],
            "semantic_loss_ignore_index": 255,
            "transformers_version": "4.11.0.dev0",
            "use_absolute_position_embeddings": False,
            "use_auxiliary_head": False,
            "use_mask_token": False,
            "use_mean_pooling": True,
            "use_relative_position_bias": True,
            "use_shared_relative_position_bias": False,
            "vocab_size": 61,
        },
        pixels("old_segmentation", 28, 28, 1),
        ("logits",),
        literal_config=True,
        buffers={
            "beit.encoder.layer.0.attention.attention.relative_position_bias.relative_position_index": np.arange(
                9
            ).reshape(3, 3)
        },
    ),
    # The last of the hidden states is not normalised yet.
    Case(
        "traces",
        "BeitModel",
        SHARED,
        pixels("traces", 12, 16, 1) | {"head_mask": np.array([[1, 0, 0.5, 1], [0, 1, 1, 0.25]], np.float32)},
        ("last_hidden_state", "pooler_output", "hidden_states", "attentions"),
        TRACES,
    ),
    Case(
        "backbone",
        "BeitBackbone",
        OWN | {"out_features": ["stem", "stage2"]},
        pixels("backbone", 24, 16, 1),
        ("feature_maps",),
    ),
    # The epsilon of the pyramid's norm has no default in the reference: without it there is no such backbone.
    Case(
        "backbone_pyramid",
        "BeitBackbone",
        SHARED | {"num_hidden_layers": 3, "out_indices": [0, 1, 2, 3], "add_fpn": True, "batch_norm_eps": 0.03},
        pixels("backbone_pyramid", 12, 12, 1),
        ("feature_maps",),
    ),
    Case(
        "backbone_states",
        "BeitBackbone",
        SIZES | {"out_indices": [1, -1], "reshape_hidden_states": False},
        pixels("backbone_states", rows=1),
        ("feature_maps",),
        writer="BeitForImageClassification",
        unexpected=("classifier.bias", "classifier.weight", "pooler.layernorm.bias", "pooler.layernorm.weight"),
    ),
)

# ---- mistakes that the cases above must show ------------------------------------------------------------------------

HEADS = ("model", "rectangle", "image_classification", "masked_image_modeling", "semantic_segmentation")
OWN_TABLES = ("model", "rectangle", "image_classification", "semantic_segmentation", "old_segmentation")
SHARED_TABLES = ("rectangle", "masked_image_modeling")
QV = tuple(f"attention.{part}" for part in ("query.weight", "query.bias", "key.weight", "value.weight", "value.bias"))


def _mirrored(table: Array) -> Array:
    """Reads distances from key to query as those from query to key; the class token's stay."""
    return np.concatenate([table[-4::-1], table[-3:]])


def _class_rows(table: Array) -> Array:
    """Takes patch to class token for class token to patch."""
    return np.concatenate([table[:-3], table[[-2, -3, -1]]])


def _down_the_columns(table: Array) -> Array:
    """Reads the distances of a square grid as if they ran down the columns."""
    side = round((len(table) - 3) ** 0.5)
    return np.concatenate([table[:-3].reshape(side, side, -1).swapaxes(0, 1).reshape(side**2, -1), table[-3:]])


TABLE = "relative_position_bias_table"

BUGS = (
    Bug("distances forgotten", HEADS, zero(TABLE)),
    Bug("distances the other way round", HEADS, change(_mirrored, TABLE)),
    Bug("distances down the columns", ("model", "masked_image_modeling"), change(_down_the_columns, TABLE)),
    Bug("rows of the class token exchanged", ("model", *SHARED_TABLES), change(_class_rows, TABLE)),
    Bug(
        "tables of layers exchanged",
        ("model", "rectangle"),
        swap(
            f"0.attention.attention.relative_position_bias.{TABLE}",
            f"1.attention.attention.relative_position_bias.{TABLE}",
        ),
    ),
    Bug("shared table forgotten", SHARED_TABLES, zero(f"encoder.relative_position_bias.{TABLE}")),
    Bug("positions forgotten", ("model", "image_classification"), zero("position_embeddings")),
    Bug(
        "query and key exchanged",
        ("model", "image_classification"),
        swap("attention.query.weight", "attention.key.weight"),
    ),
    Bug("heads split the wrong way round", HEADS, change(heads_last(4), *QV)),
    Bug("layer_norm_eps 1e-12 hard-coded", HEADS, configure(layer_norm_eps=1e-12)),
    Bug("LayerScale forgotten", ("model", "masked_image_modeling"), change(np.ones_like, "lambda_1", "lambda_2")),
    Bug("LayerScales exchanged", ("model", "masked_image_modeling"), swap("lambda_1", "lambda_2")),
    Bug(
        "mask the other way round",
        ("masked_image_modeling",),
        change_input("bool_masked_pos", lambda m: m[:, ::-1]),
        outputs=("logits",),
    ),
    Bug("only one of two norms", ("masked_image_modeling",), change(np.ones_like, "layernorm.weight")),
    Bug(
        "labels of the images exchanged",
        ("masked_image_modeling",),
        change_input("labels", lambda y: np.roll(y, 9)),
        outputs=("loss",),
    ),
    Bug(
        "layers counted from zero",
        ("semantic_segmentation",),
        configure(out_indices=[2, 3, 4, 5], out_features=["stage2", "stage3", "stage4", "stage5"]),
    ),
    Bug("running means forgotten", ("semantic_segmentation", "old_segmentation"), zero("running_mean")),
    Bug(
        "kernels of the pyramid flipped",
        ("semantic_segmentation", "old_segmentation"),
        change(lambda w: w[:, :, ::-1, ::-1], "fpn1.0.weight", "fpn1.3.weight", "fpn2.0.weight"),
    ),
    Bug(
        "kernels of the pyramid transposed",
        ("semantic_segmentation", "old_segmentation"),
        change(lambda w: w.swapaxes(0, 1), "fpn1.0.weight", "fpn1.3.weight", "fpn2.0.weight"),
    ),
    Bug(
        "pooled maps in another order",
        ("semantic_segmentation", "old_segmentation"),
        swap("psp_modules.0.1.conv.weight", "psp_modules.2.1.conv.weight"),
    ),
    Bug("255 is ignored", ("semantic_segmentation",), configure(semantic_loss_ignore_index=255), outputs=("loss",)),
    Bug(
        "auxiliary head not counted",
        ("semantic_segmentation",),
        configure(auxiliary_loss_weight=0.0),
        outputs=("loss",),
    ),
    Bug(
        "epsilon 1e-5 in the pyramid",
        ("backbone_pyramid",),
        configure(batch_norm_eps=1e-5),
        outputs=("feature_maps.0",),
    ),
)

# Nothing that is computed depends on how many batches were seen. Only the loss depends on the auxiliary head. For
# segmentation the reference counts the states from one, so that what the last layer makes is never looked at.
INVISIBLE = (r"num_batches_tracked$", r"^auxiliary_head\.", r"^beit\.encoder\.layer\.4\.")
DEAD = {"BeitForSemanticSegmentation": r"^layers\.4\."}
# What the shapes of the outputs depend on, or whether there are any.
KEPT = (
    "image_size",
    "patch_size",
    "num_channels",
    "num_hidden_layers",
    "out_features",
    "out_indices",
    "segmentation_indices",
    "use_mask_token",
    "reshape_hidden_states",
    "add_fpn",
    "id2label",
)
