"""DETR: the bare model, detection and segmentation over ResNet backbones, their losses, and checkpoints as found.

Sizes are asymmetric on purpose: heads and feed-forward widths that differ between encoder and decoder, three decoder
layers to two of the encoder, maps of 5 x 6 and 3 x 3 places from images whose sides their own do not divide, the second
image padded. Epsilons are fixed in the reference. Where it is odd, the case says so.

Objects of a call are `labels.class_labels` [B, N], `labels.boxes` [B, N, 4] (centre, width and height, as parts of the
image) and `labels.masks` [B, N, H, W], of which the first `labels.count` [B] of each row are real.
"""

from typing import Any

import numpy as np

from oracle.cases import TRACES, Array, Tensors, change, change_input, configure, floats, ids, swap, zero
from oracle.families import Bug, Case

BACKBONE: dict[str, Any] = {
    "model_type": "resnet",
    "num_channels": 3,
    "embedding_size": 6,
    "hidden_sizes": [8, 10],
    "depths": [1, 2],
    "layer_type": "basic",
    "out_features": ["stage1", "stage2"],
}
SIZES: dict[str, Any] = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": BACKBONE,
    "num_queries": 7,
    "d_model": 24,
    "encoder_layers": 2,
    "encoder_ffn_dim": 37,
    "encoder_attention_heads": 3,
    "decoder_layers": 3,
    "decoder_ffn_dim": 41,
    "decoder_attention_heads": 4,
    "num_labels": 4,
}
FOUR = BACKBONE | {
    "hidden_sizes": [8, 10, 12, 14],
    "depths": [1, 1, 1, 2],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
# The norms of the mask head divide d_model + heads, and d_model / 2, / 4, ..., into 8 groups or as many as there are.
MASKS = SIZES | {"backbone_config": FOUR, "d_model": 64, "encoder_attention_heads": 8, "num_queries": 5}


def image(name: str, height: int = 34, width: int = 42, real: tuple[int, int] = (22, 31), rows: int = 2) -> Tensors:
    """Returns images `[rows, 3, height, width]` of few values, and their mask: the last is `real` high and wide."""
    seen = np.ones((rows, height, width), np.int64)
    seen[-1, real[0] :] = 0
    seen[-1, :, real[1] :] = 0
    pixels = ids(f"{name}.pixel_values", rows, 3, height, width, low=-3, high=4).astype(np.float32) / 2
    return {"pixel_values": pixels, "pixel_mask": seen}


def wide(name: str, rows: int = 2) -> Tensors:
    """Returns images for four stages; of the 3 x 3 places of the last map, 2 x 2 are real."""
    return image(name, 66, 74, (40, 47), rows)


def sharp(name: str, rows: int, columns: int) -> dict[str, Array]:
    """Returns larger values than a parameter would have, so that queries look at different places."""
    return {name: ids(name, rows, columns, low=-8, high=9).astype(np.float32) / 2}


def objects(name: str, *counts: int, classes: int = 4) -> Tensors:
    """Returns `counts[i]` objects for row i."""
    rows, most = len(counts), max(*counts, 1)
    places = ids(f"{name}.places", rows, most, 2, low=20, high=80) / 100
    sizes = ids(f"{name}.sizes", rows, most, 2, low=10, high=40) / 100
    return {
        "labels.class_labels": ids(f"{name}.classes", rows, most, low=0, high=classes),
        "labels.boxes": np.concatenate([places, sizes], axis=-1).astype(np.float32),
        "labels.count": np.array(counts),
    }


def outlines(targets: Tensors, height: int, width: int) -> Tensors:
    """Returns the objects with masks: ellipses in their boxes."""
    boxes = targets["labels.boxes"][..., None, None]
    x, y = (np.arange(width) + 0.5)[None, :] / width, (np.arange(height) + 0.5)[:, None] / height
    inside = ((x - boxes[:, :, 0]) / boxes[:, :, 2]) ** 2 + ((y - boxes[:, :, 1]) / boxes[:, :, 3]) ** 2 < 0.25
    return targets | {"labels.masks": inside}


PADDED = image("padded")
QUERIES = sharp("model.query_position_embeddings.weight", 7, 24)
MAPS = sharp("bbox_attention.q_linear.weight", 64, 64)
BARE = ("last_hidden_state", "encoder_last_hidden_state")
FOUND = ("logits", "pred_boxes")
LOSSES = ("loss", "loss_dict")
# The decoder starts from zeros, which show nothing.
TRACED = (
    "encoder_hidden_states",
    "encoder_attentions",
    *(f"decoder_hidden_states.{i}" for i in (1, 2, 3)),
    "decoder_attentions",
    "cross_attentions",
)

# ---- the heads, each with its loss ----------------------------------------------------------------------------------

HEADS = (
    Case("model", "DetrModel", SIZES, PADDED, BARE),
    Case(
        "object_detection",
        "DetrForObjectDetection",
        SIZES,
        PADDED | objects("object_detection", 3, 2),
        (*LOSSES, *FOUND, *BARE),
        buffers=QUERIES,
    ),
    Case(
        "segmentation",
        "DetrForSegmentation",
        MASKS,
        wide("segmentation") | outlines(objects("segmentation", 2, 3), 66, 74),
        (*LOSSES, *FOUND, "pred_masks", *BARE),
        buffers=MAPS,
    ),
)

# ---- losses ---------------------------------------------------------------------------------------------------------

# With `auxiliary_loss` the reference puts the decoder's last norm after every layer, before the next one reads it, and
# once more at the end: it is a switch of the forward pass and not of the loss alone.
LOSS = (
    Case(
        "auxiliary",
        "DetrForObjectDetection",
        SIZES | {"auxiliary_loss": True},
        PADDED | objects("auxiliary", 2, 4),
        (*LOSSES, *FOUND, "auxiliary_outputs"),
        buffers=QUERIES,
    ),
    Case(
        "auxiliary_model",
        "DetrModel",
        SIZES | {"auxiliary_loss": True},
        PADDED,
        (*BARE, "intermediate_hidden_states"),
    ),
    Case(
        "auxiliary_segmentation",
        "DetrForSegmentation",
        MASKS | {"auxiliary_loss": True, "mask_loss_coefficient": 3, "dice_loss_coefficient": 0.5},
        wide("auxiliary_segmentation") | outlines(objects("auxiliary_segmentation", 3, 1), 31, 45),
        (*LOSSES, *FOUND),
        buffers=MAPS,
    ),
    Case(
        "coefficients",
        "DetrForObjectDetection",
        SIZES
        | {
            "class_cost": 4,
            "bbox_cost": 0.5,
            "giou_cost": 3,
            "bbox_loss_coefficient": 1.5,
            "giou_loss_coefficient": 7,
            "eos_coefficient": 0.4,
        },
        PADDED | objects("coefficients", 5, 4),
        (*LOSSES, *FOUND),
        buffers=QUERIES,
    ),
    # More objects than queries: those that fit worst are left out of the loss.
    Case(
        "crowded",
        "DetrForObjectDetection",
        SIZES | {"num_queries": 3},
        PADDED | objects("crowded", 6, 2),
        (*LOSSES, *FOUND),
        buffers=sharp("model.query_position_embeddings.weight", 3, 24),
    ),
    Case(
        "an_empty_image",
        "DetrForObjectDetection",
        SIZES,
        PADDED | objects("an_empty_image", 0, 3),
        (*LOSSES, *FOUND),
        buffers=QUERIES,
    ),
)

# ---- what can be asked for ------------------------------------------------------------------------------------------

INPUTS = (
    Case(
        "no_mask",
        "DetrForObjectDetection",
        SIZES,
        {"pixel_values": image("no_mask")["pixel_values"]},
        FOUND,
    ),
    # The encoder has run already; what it read still says where padding is and how large the map is.
    Case(
        "encoder_outputs",
        "DetrModel",
        SIZES,
        PADDED | {"encoder_outputs": floats("encoder_outputs", 1, 2, 30, 24)},
        ("last_hidden_state",),
    ),
    Case("traces", "DetrModel", SIZES, image("traces", rows=1), (*BARE, *TRACED), TRACES),
    Case(
        "auxiliary_traces",
        "DetrForObjectDetection",
        SIZES | {"auxiliary_loss": True},
        image("auxiliary_traces", rows=1),
        (*FOUND, *TRACED),
        TRACES,
    ),
    Case(
        "segmentation_traces",
        "DetrForSegmentation",
        MASKS,
        wide("segmentation_traces", 1),
        ("pred_masks", *TRACED),
        TRACES,
    ),
)

# ---- what a configuration can ask for -------------------------------------------------------------------------------

CONFIGS = (
    Case(
        "learned_positions",
        "DetrForObjectDetection",
        SIZES | {"position_embedding_type": "learned"},
        PADDED,
        FOUND,
    ),
    Case("act_gelu", "DetrModel", SIZES | {"activation_function": "gelu"}, PADDED, BARE),
    # The last stage is what a backbone gives that is not asked for any.
    Case(
        "bottleneck",
        "DetrModel",
        SIZES
        | {
            "backbone_config": {k: v for k, v in BACKBONE.items() if k != "out_features"}
            | {
                "layer_type": "bottleneck",
                "hidden_sizes": [8, 12],
                "downsample_in_bottleneck": True,
                "hidden_act": "silu",
            }
        },
        PADDED,
        BARE,
    ),
    # As timm's ResNets are, under other names: 64 channels in the stem, each stage four times as wide as its windows.
    Case(
        "segmentation_bottleneck",
        "DetrForSegmentation",
        MASKS
        | {
            "backbone_config": FOUR
            | {
                "layer_type": "bottleneck",
                "embedding_size": 64,
                "hidden_sizes": [16, 24, 32, 40],
                "depths": [1, 2, 1, 1],
            }
        },
        {"pixel_values": wide("segmentation_bottleneck", 1)["pixel_values"]},
        (*FOUND, "pred_masks"),
        buffers=MAPS,
    ),
)

# ---- checkpoints as they are found ----------------------------------------------------------------------------------

HEAD_KEYS = tuple(
    f"{name}.{leaf}"
    for name in (
        "bbox_predictor.layers.0",
        "bbox_predictor.layers.1",
        "bbox_predictor.layers.2",
        "class_labels_classifier",
    )
    for leaf in ("bias", "weight")
)

CHECKPOINTS = (
    Case(
        "base_model_of_a_detector",
        "DetrModel",
        SIZES,
        image("base_model_of_a_detector", rows=1),
        BARE,
        writer="DetrForObjectDetection",
        unexpected=HEAD_KEYS,
    ),
    Case(
        "head_on_base_model",
        "DetrForObjectDetection",
        SIZES,
        image("head_on_base_model", rows=1),
        BARE,
        writer="DetrModel",
        missing=HEAD_KEYS,
    ),
)

CASES = HEADS + LOSS + INPUTS + CONFIGS + CHECKPOINTS

# ---- mistakes that the cases above must show ------------------------------------------------------------------------

DETECTORS = ("model", "object_detection", "auxiliary", "crowded", "no_mask", "act_gelu", "bottleneck")
ALL = (*DETECTORS, "segmentation", "learned_positions")
MASKED = tuple(name for name in ALL if name != "no_mask")


def _halves(table: Array) -> Array:
    """Takes the positions of columns for those of rows: in what reads them, the halves of the input exchange."""
    return np.roll(table, table.shape[1] // 2, 1)


def _frequencies(kernel: Array) -> Array:
    """Takes all sines, then all cosines, for sines and cosines in turn."""
    size = kernel.shape[1]
    order = np.concatenate([np.arange(h, h + size // 2).reshape(2, -1).T.ravel() for h in (0, size // 2)])
    return kernel[:, order]


def _shift(seen: Array) -> Array:
    """Reads the mask in the middle of what a place sees, and not at its corner."""
    return np.roll(seen, (-4, -4), (1, 2))


def _decoder(name: str, apply: Any) -> tuple[Bug, ...]:
    """A mistake that what comes out of the decoder must show."""
    return (
        Bug(name, ("model", "auxiliary_model", "act_gelu"), apply, outputs=("last_hidden_state",)),
        Bug(name, ("object_detection", "auxiliary", "crowded", "no_mask", "learned_positions"), apply, outputs=FOUND),
        # masks depend on what is in the picture more than on who asks
        Bug(name, ("segmentation",), apply, 5e-3, (*FOUND, "pred_masks")),
    )


BUGS = (
    Bug("padding attended to", MASKED, change_input("pixel_mask", np.ones_like)),
    Bug(
        "mask read at the wrong pixels",
        tuple(name for name in MASKED if name != "segmentation"),
        change_input("pixel_mask", _shift),
    ),
    Bug("query and key exchanged", ALL, swap("q_proj", "k_proj", "weight", "bias")),
    Bug("projections not transposed", ALL, change(np.transpose, "self_attn.v_proj.weight")),
    *_decoder("query positions forgotten", zero("query_position_embeddings.weight")),
    *_decoder("positions of rows and columns exchanged", change(_halves, "encoder_attn.k_proj.weight")),
    *_decoder("sines and cosines in another order", change(_frequencies, "encoder_attn.k_proj.weight")),
    *_decoder("cross-attention left out", zero("encoder_attn.out_proj.weight")),
    *_decoder("the decoder's last norm left out", change(np.ones_like, "decoder.layernorm.weight")),
    Bug("rows and columns exchanged", ("learned_positions",), swap("row_embeddings", "column_embeddings", "weight")),
    Bug(
        "the decoder's layers normed",
        ("model", "object_detection"),
        configure(auxiliary_loss=True),
        outputs=("last_hidden_state",),
    ),
    Bug("the decoder's layers not normed", ("auxiliary_traces",), configure(auxiliary_loss=False), outputs=FOUND),
    Bug("frozen statistics forgotten", ALL, zero("running_mean")),
    Bug("frozen variances forgotten", ALL, change(np.ones_like, "running_var")),
    Bug("relu for gelu", ("act_gelu",), configure(activation_function="relu")),
    Bug("boxes' attention forgotten", ("segmentation",), zero("bbox_attention.q_linear.weight"), 1e-2, ("pred_masks",)),
    Bug("maps of a stage forgotten", ("segmentation",), zero("adapter2.weight"), 1e-2, ("pred_masks",)),
    Bug(
        "boxes as corners",
        ("object_detection", "coefficients", "auxiliary", "crowded", "an_empty_image"),
        change_input("labels.boxes", lambda b: np.concatenate([b[..., :2] + b[..., 2:] / 2, b[..., 2:]], -1)),
        outputs=("loss", "loss_dict.loss_bbox", "loss_dict.loss_giou"),
    ),
    Bug(
        "classes off by one",
        ("object_detection", "coefficients", "auxiliary", "segmentation", "an_empty_image"),
        change_input("labels.class_labels", lambda c: (c + 1) % 4),
        outputs=("loss_dict.loss_ce",),
    ),
    Bug(
        "no-object weighs as much",
        ("object_detection", "coefficients", "auxiliary", "segmentation", "an_empty_image"),
        configure(eos_coefficient=1.0),
        outputs=("loss_dict.loss_ce",),
    ),
    Bug(
        "costs at their defaults",
        ("coefficients",),
        configure(class_cost=1, bbox_cost=5, giou_cost=2),
        5e-3,
        ("loss_dict.loss_bbox",),
    ),
    Bug(
        "coefficients at their defaults",
        ("coefficients",),
        configure(bbox_loss_coefficient=5, giou_loss_coefficient=2),
        outputs=("loss",),
    ),
    Bug(
        "objects matched by class alone",
        ("object_detection", "coefficients", "auxiliary", "an_empty_image"),
        configure(bbox_cost=0, giou_cost=0),
        outputs=("loss_dict.loss_bbox",),
    ),
    Bug(
        "masks upside down",
        ("segmentation", "auxiliary_segmentation"),
        change_input("labels.masks", lambda m: m[:, :, ::-1]),
        1e-3,
        ("loss_dict.loss_mask", "loss_dict.loss_dice"),
    ),
)

# What the shapes of maps depend on.
KEPT = (
    "backbone_config",
    "num_queries",
    "use_timm_backbone",
    "use_pretrained_backbone",
    "backbone",
    "d_model",
    "encoder_attention_heads",
    "decoder_attention_heads",
)

# A key's bias adds the same to all scores of a query, and the softmax takes it away. The queries of the decoder start
# from zeros: in the first self-attention all values are the bias, whoever looks at whom.
# Two of the mask head's norms have a group for every channel here, which takes the bias before it away.
INVISIBLE = (
    r"(self_attn|encoder_attn)\.k_proj\.bias$",
    r"decoder\.layers\.0\.self_attn\.([qk]_proj|v_proj\.weight)",
    r"mask_head\.lay[45]\.bias$",
)
