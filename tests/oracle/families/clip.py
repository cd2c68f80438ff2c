"""CLIP, both towers at once: similarities and their loss, traces of two towers, the image classifier, old checkpoints.

The towers alone are other model types, `clip_text_model` and `clip_vision_model`, which share what is here. Sizes are
asymmetric on purpose: towers of 36 and 32, 3 heads of 12 and 4 of 8, three texts for two images, images that no whole
number of patches covers, another activation and epsilon in each tower.
"""

from typing import Any

import numpy as np

from oracle.cases import VOCAB, Array, T, Tensors, change, ending, floats, ids, mask, zero
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
TRACES = {"output_hidden_states": True, "output_attentions": True}


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

CASES = (
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


# ---- mistakes that the cases must show, here and in the towers' own families ----------------------------------------


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
EVERYTHING = (*BOTH_TOWERS, "image_classification")


def tower(name: str, how: Any) -> Any:
    """Misreads the queries, keys and values of one tower."""
    return change(how, *(f"{name}_model.encoder.layers.{i}.{key}" for i in (0, 1) for key in QKV))


def rows_as_columns(kernel: Array) -> Array:
    """Reads the rows of a patch `(out, channels, height, width)` as its columns."""
    return kernel.swapaxes(2, 3)


ROWS_AS_COLUMNS = change(rows_as_columns, "patch_embedding.weight")
OF_TEXT, OF_IMAGE = ("logits_per_text", "text_embeds"), ("logits_per_text", "image_embeds")

BUGS = (
    Bug("query and key exchanged", EVERYTHING[1:], swap_query_key),
    Bug("square kernels not transposed", EVERYTHING[1:], change(np.transpose, "self_attn.v_proj.weight")),
    Bug("layer_norm_eps 1e-5 hard-coded", EVERYTHING[1:], both(layer_norm_eps=1e-5)),
    Bug("heads of the text split the wrong way round", BOTH_TOWERS, tower("text", heads_last(3)), outputs=OF_TEXT),
    Bug("heads of the image split the wrong way round", BOTH_TOWERS, tower("vision", heads_last(4)), outputs=OF_IMAGE),
    Bug("the vision tower's activation in both", BOTH_TOWERS, both(hidden_act="gelu"), outputs=OF_TEXT[1:]),
    Bug("the text tower's activation in both", BOTH_TOWERS, both(hidden_act="quick_gelu"), outputs=OF_IMAGE[1:]),
    Bug("rows of a patch read as its columns", BOTH_TOWERS, ROWS_AS_COLUMNS, outputs=OF_IMAGE),
    Bug("rows of a patch read as its columns", EVERYTHING[-1:], ROWS_AS_COLUMNS),
    Bug("logit scale forgotten", BOTH_TOWERS, zero("logit_scale"), outputs=OF_TEXT[:1]),
    Bug("end of a text is what the configuration says", ("as_in_2022",), both(eos_token_id=3), outputs=OF_TEXT),
)

# Parameters without influence: a key's bias adds the same to all scores of a query, and the softmax takes it away.
INVISIBLE = (r"\.k_proj\.bias$",)
