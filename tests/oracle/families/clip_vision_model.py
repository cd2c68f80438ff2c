"""CLIP's vision tower alone, with and without projection: images of other sizes, traces, old checkpoints.

Sizes and bugs are those of `clip`.
"""

from typing import Any

import numpy as np

from oracle.cases import change, change_input, configure, zero
from oracle.families import Bug, Case
from oracle.families.clip import (
    INVISIBLE,
    POSITIONS,
    QKV,
    STRETCH,
    TRACES,
    TWO,
    VISION,
    heads_last,
    pixels,
    rows_as_columns,
    swap_query_key,
)

__all__ = ["BUGS", "CASES", "INVISIBLE"]

STATES = ("last_hidden_state", "pooler_output")
PROJECTED = ("image_embeds", "last_hidden_state")
PROJECTION = ("visual_projection.weight",)
OLD: dict[str, Any] = VISION | {
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

CASES = (
    Case("model", "CLIPVisionModel", VISION, TWO, STATES),
    Case("projection", "CLIPVisionModelWithProjection", VISION, TWO, PROJECTED),
    Case(
        "two_channels",
        "CLIPVisionModel",
        VISION | {"num_channels": 2, "image_size": 20},
        {"pixel_values": TWO["pixel_values"][:, 1:, 1:21, :20]},
        STATES,
    ),
    Case("stretched", "CLIPVisionModel", VISION, pixels("stretched", 1, 31, 31), STATES, STRETCH),
    Case(
        "stretched_wide",
        "CLIPVisionModelWithProjection",
        VISION,
        pixels("stretched_wide", 1, 12, 43),
        PROJECTED,
        STRETCH,
    ),
    Case("not_stretched", "CLIPVisionModel", VISION, pixels("not_stretched", 1), STATES, STRETCH),
    # What the layers start from is normalised already; what comes out of them is not.
    Case("traces", "CLIPVisionModel", VISION, pixels("traces", 1), (*STATES, "hidden_states", "attentions"), TRACES),
    Case(
        "traces_of_projection",
        "CLIPVisionModelWithProjection",
        VISION | {"output_attentions": True},
        pixels("traces_of_projection", 1),
        (*PROJECTED, "attentions"),
    ),
    Case(
        "as_in_2022",
        "CLIPVisionModel",
        OLD,
        pixels("as_in_2022", 1),
        STATES,
        literal_config=True,
        buffers={key: value for key, value in POSITIONS.items() if key.startswith("vision_model")},
    ),
    Case(
        "without_its_projection",
        "CLIPVisionModel",
        VISION,
        pixels("without_its_projection", 1),
        STATES,
        writer="CLIPVisionModelWithProjection",
        unexpected=PROJECTION,
    ),
    Case(
        "new_projection",
        "CLIPVisionModelWithProjection",
        VISION,
        pixels("new_projection", 1),
        ("last_hidden_state",),
        writer="CLIPVisionModel",
        missing=PROJECTION,
    ),
)

SIMPLE = ("model", "projection", "stretched_wide")

BUGS = (
    Bug("positions forgotten", SIMPLE, zero("position_embedding.weight")),
    Bug("class token forgotten", SIMPLE, zero("class_embedding")),
    Bug("query and key exchanged", SIMPLE, swap_query_key),
    Bug("square kernels not transposed", SIMPLE, change(np.transpose, "self_attn.v_proj.weight")),
    Bug("heads split the wrong way round", SIMPLE, change(heads_last(4), *QKV)),
    Bug("layer_norm_eps 1e-5 hard-coded", SIMPLE, configure(layer_norm_eps=1e-5)),
    Bug("quick gelu whatever the configuration says", SIMPLE, configure(hidden_act="quick_gelu")),
    Bug("rows of a patch read as its columns", SIMPLE, change(rows_as_columns, "patch_embedding.weight")),
    Bug("channels of the image reversed", SIMPLE, change_input("pixel_values", lambda x: x[:, ::-1])),
)
