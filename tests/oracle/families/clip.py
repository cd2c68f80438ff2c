"""CLIP: two towers and their similarities, each tower alone with and without projection, the image classifier.

The towers alone are model types of their own. Sizes are asymmetric on purpose: towers of 36 and 32, 3 heads of 12 and 4
of 8, three texts for two images, images that no whole number of patches covers, another activation and epsilon in each
tower. The end of a text is the first token of `eos_token_id`; where the configuration gives the number 2, it is the
largest token, as it was before the configuration was right.
"""

from typing import Any

import numpy as np

from oracle.cases import (
    TRACES,
    VOCAB,
    Array,
    T,
    Tensors,
    change,
    change_input,
    configure,
    ending,
    floats,
    ids,
    mask,
    zero,
)
from oracle.families import Bug, Case

END = VOCAB - 1  # ends every text; the reference takes that token's state for the whole text's
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "intermediate_size": 53,
    "projection_dim": 21,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 40,
    "layer_norm_eps": 0.05,
    "bos_token_id": 0,
    "eos_token_id": END,
}
# 4 x 4 patches of 5 x 5 pixels, three rows and columns of pixels left over
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 47,
    "projection_dim": 21,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 23,
    "patch_size": 5,
    "num_channels": 3,
    "layer_norm_eps": 0.03,
    "hidden_act": "gelu",
}
BOTH: dict[str, Any] = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 19}
STRETCH = {"interpolate_pos_encoding": True}


def texts(name: str, *lengths: int, pad: int = 1, left: bool = False) -> Tensors:
    """Returns token ids and padding mask `[rows, T]`: each row ends with `END`, which stands nowhere before."""
    seen = mask(*lengths, left=left)
    tokens = np.where(seen, ids(f"{name}.input_ids", *seen.shape, low=3, high=END), pad)
    for row, length in enumerate(lengths):
        tokens[row, T - 1 if left else length - 1] = END
    return {"input_ids": tokens, "attention_mask": seen}


def pixels(name: str, rows: int, height: int = 23, width: int = 23) -> Tensors:
    """Returns images `[rows, 3, height, width]`."""
    return {"pixel_values": floats(f"{name}.pixel_values", rows, 3, height, width)}


THREE = texts("three", 25, 17, 8)
TWO = pixels("two", 2)
EMBEDS = ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")
TOWERS = ("text_model_output", "vision_model_output")
STATES = tuple(f"{tower}.{name}" for tower in TOWERS for name in ("last_hidden_state", "pooler_output"))

ALONE = ("last_hidden_state", "pooler_output")
TEXT_PROJECTED, VISION_PROJECTED = ("text_embeds", "last_hidden_state"), ("image_embeds", "last_hidden_state")

LAYER_KEYS = tuple(
    f"{name}.{leaf}"
    for name in (
        *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
        *(f"{part}{i}" for part in ("layer_norm", "mlp.fc") for i in (1, 2)),
    )
    for leaf in ("weight", "bias")
)
TEXT_KEYS = (
    *(f"text_model.embeddings.{name}_embedding.weight" for name in ("token", "position")),
    *(f"text_model.encoder.layers.{i}.{key}" for i in (0, 1) for key in LAYER_KEYS),
    *(f"text_model.final_layer_norm.{leaf}" for leaf in ("weight", "bias")),
)

# As the first checkpoints are on the hub: a tower's configuration repeats every default of its time, or stands under
# another name; and the end of a text has a number that was never right. Since it was noticed, that number says: the
# state to take is that of the largest token.
OLD_TEXT: dict[str, Any] = TEXT | {
    "_name_or_path": "",
    "add_cross_attention": False,
    "architectures": None,
    "attention_dropout": 0.0,
    "bad_words_ids": None,
    "chunk_size_feed_forward": 0,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "dropout": 0.0,
    "eos_token_id": 2,
    "finetuning_task": None,
    "hidden_act": "quick_gelu",
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "max_length": 20,
    "model_type": "clip_text_model",
    "num_beams": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "pad_token_id": 1,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "return_dict": True,
    "tie_word_embeddings": True,
    "torchscript": False,
    "transformers_version": "4.16.0.dev0",
    "use_bfloat16": False,
}
CONFIG_2022: dict[str, Any] = {
    "architectures": ["CLIPModel"],
    "initializer_factor": 1.0,
    "logit_scale_init_value": 2.6592,
    "model_type": "clip",
    "projection_dim": 21,
    "text_config": OLD_TEXT,
    "text_config_dict": None,
    "torch_dtype": "float32",
    "transformers_version": None,
    "vision_config_dict": VISION,
}
POSITIONS = {
    "text_model.embeddings.position_ids": np.arange(40)[None],
    "vision_model.embeddings.position_ids": np.arange(17)[None],
}

OLD_VISION: dict[str, Any] = VISION | {
    "architectures": ["CLIPVisionModel"],
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "hidden_act": "quick_gelu",
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-05,
    "model_type": "clip_vision_model",
    "torch_dtype": "float32",
    "transformers_version": "4.24.0",
}

# ---- both towers -----------------------------------------------------------------------------------------------------

TOGETHER = (
    Case("model", "CLIPModel", BOTH, THREE | TWO, EMBEDS + STATES),
    # As many texts as images, each the other's label.
    Case(
        "loss",
        "CLIPModel",
        BOTH,
        texts("loss", 25, 12, 20) | pixels("loss", 3),
        ("loss", *EMBEDS),
        {"return_loss": True},
    ),
    Case(
        "traces",
        "CLIPModel",
        BOTH,
        texts("traces", 25) | pixels("traces", 1),
        tuple(f"{tower}.{name}" for tower in TOWERS for name in ("hidden_states", "attentions")),
        TRACES,
    ),
    Case("stretched", "CLIPModel", BOTH, THREE | pixels("stretched", 2, 31, 17), EMBEDS, STRETCH),
    # The classifier takes the mean of the patches' states: neither the class token nor the tower's last norm.
    Case(
        "image_classification",
        "CLIPForImageClassification",
        BOTH | {"num_labels": 3},
        TWO | {"labels": np.array([2, 0])},
        ("loss", "logits"),
    ),
    Case(
        "traces_of_the_classifier",
        "CLIPForImageClassification",
        BOTH,
        pixels("traces_of_the_classifier", 1),
        ("logits", "hidden_states", "attentions"),
        TRACES,
    ),
    # A new classifier on the vision tower of both.
    Case(
        "classifier_on_both",
        "CLIPForImageClassification",
        BOTH,
        pixels("classifier_on_both", 1),
        ("hidden_states",),
        {"output_hidden_states": True},
        writer="CLIPModel",
        missing=("classifier.bias", "classifier.weight"),
        unexpected=("logit_scale", "text_projection.weight", "visual_projection.weight", *TEXT_KEYS),
    ),
    Case(
        "as_in_2022",
        "CLIPModel",
        CONFIG_2022,
        texts("as_in_2022", 25, 11, pad=END) | pixels("as_in_2022", 2),
        EMBEDS,
        literal_config=True,
        buffers=POSITIONS,
    ),
)

# ---- the text tower alone --------------------------------------------------------------------------------------------

# Long after its end, two texts have larger tokens, and one has its end token twice; the last has none at all, which
# makes its first token count.
ENDS = {
    "input_ids": np.where(np.arange(T) == np.array([[7], [11], [3], [30]]), 33, ids("ends", 4, T, low=34, high=END))
}
ENDS["input_ids"][1, 20] = 33
# The largest token, the first of two in the second row.
LARGEST = {"input_ids": ids("largest", 3, T, high=50)}
LARGEST["input_ids"][[0, 1, 1], [24, 6, 19]] = 57

TEXTS = (
    Case("text_model", "CLIPTextModel", TEXT, THREE, ALONE),
    Case("text_projection", "CLIPTextModelWithProjection", TEXT, THREE, TEXT_PROJECTED),
    # Positions are not shifted for padding.
    Case(
        "text_left_padded", "CLIPTextModelWithProjection", TEXT, texts("text_left", 25, 18, left=True), TEXT_PROJECTED
    ),
    Case("text_ends", "CLIPTextModel", TEXT | {"eos_token_id": 33}, ENDS, ALONE),
    Case("text_ends_of_old", "CLIPTextModel", TEXT | {"eos_token_id": 2}, LARGEST, ALONE),
    Case("text_all_positions", "CLIPTextModel", TEXT, {"input_ids": ids("text_all_positions", 1, 40)}, ALONE),
    Case(
        "text_position_ids",
        "CLIPTextModelWithProjection",
        TEXT,
        THREE | {"position_ids": ids("text_position_ids", 3, T, low=0, high=40)},
        TEXT_PROJECTED,
    ),
    Case(
        "text_traces", "CLIPTextModel", TEXT, texts("text_traces", 17), (*ALONE, "hidden_states", "attentions"), TRACES
    ),
    Case(
        "text_traces_of_projection",
        "CLIPTextModelWithProjection",
        TEXT | {"hidden_act": "gelu", "output_hidden_states": True},
        texts("text_traces_of_projection", 21),
        (*TEXT_PROJECTED, "hidden_states"),
    ),
    # As text encoders of image generators are on the hub.
    Case(
        "text_as_in_2022",
        "CLIPTextModel",
        OLD_TEXT | {"architectures": ["CLIPTextModel"], "torch_dtype": "float32"},
        texts("text_as_in_2022", 25, 11, pad=END),
        ALONE,
        literal_config=True,
        buffers={key: value for key, value in POSITIONS.items() if key.startswith("text_model")},
    ),
    Case(
        "text_without_its_projection",
        "CLIPTextModel",
        TEXT,
        texts("text_without_its_projection", 19),
        ALONE,
        writer="CLIPTextModelWithProjection",
        unexpected=("text_projection.weight",),
    ),
    Case(
        "text_new_projection",
        "CLIPTextModelWithProjection",
        TEXT,
        texts("text_new_projection", 19),
        ("last_hidden_state",),
        writer="CLIPTextModel",
        missing=("text_projection.weight",),
    ),
)

# ---- the vision tower alone ------------------------------------------------------------------------------------------

IMAGES = (
    Case("vision_model", "CLIPVisionModel", VISION, TWO, ALONE),
    Case("vision_projection", "CLIPVisionModelWithProjection", VISION, TWO, VISION_PROJECTED),
    Case(
        "vision_two_channels",
        "CLIPVisionModel",
        VISION | {"num_channels": 2, "image_size": 20},
        {"pixel_values": TWO["pixel_values"][:, 1:, 1:21, :20]},
        ALONE,
    ),
    Case("vision_stretched", "CLIPVisionModel", VISION, pixels("vision_stretched", 1, 31, 31), ALONE, STRETCH),
    Case(
        "vision_stretched_wide",
        "CLIPVisionModelWithProjection",
        VISION,
        pixels("vision_stretched_wide", 1, 12, 43),
        VISION_PROJECTED,
        STRETCH,
    ),
    # What the layers start from is normalised already; what comes out of them is not.
    Case(
        "vision_traces",
        "CLIPVisionModel",
        VISION,
        pixels("vision_traces", 1),
        (*ALONE, "hidden_states", "attentions"),
        TRACES,
    ),
    Case(
        "vision_as_in_2022",
        "CLIPVisionModel",
        OLD_VISION,
        pixels("vision_as_in_2022", 1),
        ALONE,
        literal_config=True,
        buffers={key: value for key, value in POSITIONS.items() if key.startswith("vision_model")},
    ),
    Case(
        "vision_new_projection",
        "CLIPVisionModelWithProjection",
        VISION,
        pixels("vision_new_projection", 1),
        ("last_hidden_state",),
        writer="CLIPVisionModel",
        missing=("visual_projection.weight",),
    ),
)

CASES = TOGETHER + TEXTS + IMAGES


# ---- mistakes that the cases above must show -------------------------------------------------------------------------


def swap_query_key(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
    """Exchanges queries and keys."""
    for key in ending(tensors, "self_attn.q_proj.weight", "self_attn.q_proj.bias"):
        other = key.replace("q_proj", "k_proj")
        tensors[key], tensors[other] = tensors[other], tensors[key]


def heads_last(heads: int) -> Any:
    """Returns a function that reads rows `(heads, size)` as if they were `(size, heads)`."""

    def read(kernel_or_bias: Array) -> Array:
        rows = kernel_or_bias.shape[0]
        return kernel_or_bias[np.arange(rows).reshape(rows // heads, heads).T.ravel()]

    return read


def both(**changes: Any) -> Any:
    """Misreads the configuration of the towers: of both, or of the only one."""

    def apply(config: dict[str, Any], tensors: Tensors, inputs: Tensors) -> None:
        for part in [config[key] for key in ("text_config", "vision_config") if key in config] or [config]:
            part.update(changes)

    return apply


QKV = tuple(f"self_attn.{part}_proj.{leaf}" for part in "qkv" for leaf in ("weight", "bias"))
BOTH_TOWERS = ("model", "loss", "stretched")


def tower(name: str, how: Any) -> Any:
    """Misreads the queries, keys and values of one tower."""
    return change(how, *(f"{name}_model.encoder.layers.{i}.{key}" for i in (0, 1) for key in QKV))


def rows_as_columns(kernel: Array) -> Array:
    """Reads the rows of a patch `(out, channels, height, width)` as its columns."""
    return kernel.swapaxes(2, 3)


OF_TEXT, OF_IMAGE = ("logits_per_text", "text_embeds"), ("logits_per_text", "image_embeds")
SIMPLE_TEXTS = ("text_model", "text_projection", "text_left_padded")
SIMPLE_IMAGES = ("vision_model", "vision_projection", "vision_stretched_wide", "image_classification")
SIMPLE = ("loss", *SIMPLE_TEXTS, *SIMPLE_IMAGES)

BUGS = (
    Bug("query and key exchanged", SIMPLE, swap_query_key),
    Bug("square kernels not transposed", SIMPLE, change(np.transpose, "self_attn.v_proj.weight")),
    Bug("layer_norm_eps 1e-5 hard-coded", SIMPLE, both(layer_norm_eps=1e-5)),
    Bug("positions forgotten", SIMPLE, zero("position_embedding.weight")),
    Bug("heads of the text split the wrong way round", BOTH_TOWERS, tower("text", heads_last(3)), outputs=OF_TEXT),
    Bug("heads of the text split the wrong way round", SIMPLE_TEXTS, change(heads_last(3), *QKV)),
    Bug("heads of the image split the wrong way round", BOTH_TOWERS, tower("vision", heads_last(4)), outputs=OF_IMAGE),
    Bug("heads of the image split the wrong way round", SIMPLE_IMAGES[:-1], change(heads_last(4), *QKV)),
    Bug("the vision tower's activation in both", BOTH_TOWERS, both(hidden_act="gelu"), outputs=OF_TEXT[1:]),
    Bug("the text tower's activation in both", BOTH_TOWERS, both(hidden_act="quick_gelu"), outputs=OF_IMAGE[1:]),
    Bug("gelu instead of its quick form", SIMPLE_TEXTS, configure(hidden_act="gelu")),
    Bug("quick gelu whatever the configuration says", SIMPLE_IMAGES[:2], both(hidden_act="quick_gelu")),
    Bug("class token forgotten", SIMPLE_IMAGES, zero("class_embedding")),
    Bug("rows of a patch read as its columns", SIMPLE_IMAGES, change(rows_as_columns, "patch_embedding.weight")),
    Bug("channels of the image reversed", SIMPLE_IMAGES, change_input("pixel_values", lambda x: x[:, ::-1])),
    Bug("logit scale forgotten", BOTH_TOWERS, zero("logit_scale"), outputs=OF_TEXT[:1]),
    Bug("padding on the left attended to", ("text_left_padded",), change_input("attention_mask", np.ones_like)),
    Bug("position_ids ignored", ("text_position_ids",), change_input("position_ids", lambda p: np.arange(T) + 0 * p)),
    Bug("end is the largest token", ("text_ends",), configure(eos_token_id=2), outputs=("pooler_output",)),
    Bug("end is token 2", ("text_ends_of_old",), configure(eos_token_id=3), outputs=("pooler_output",)),
    Bug("end is token 2", ("as_in_2022",), both(eos_token_id=3), outputs=OF_TEXT),
)

# Parameters without influence: a key's bias adds the same to all scores of a query, and the softmax takes it away.
INVISIBLE = (r"\.k_proj\.bias$",)
# The classifier averages the patches' states before the tower's last norm, which it stores all the same.
DEAD = {"CLIPForImageClassification": r"^norm\."}
# What the shapes of the outputs depend on, in a tower alone and wherever the configuration of both holds it.
KEPT = tuple(
    part + name
    for part in ("", "vision_config.", "vision_config_dict.")
    for name in ("image_size", "patch_size", "num_channels")
)
