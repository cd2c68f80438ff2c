"""CLIP's text tower alone, with and without projection: padding on both sides, ends of a text, old checkpoints.

Sizes and bugs are those of `clip`. The end of a text is the first token of that number; where the configuration gives
the number 2, it is the largest token, as it was before the configuration was right.
"""

import numpy as np

from oracle.cases import T, change, change_input, configure, ids, zero
from oracle.families import Bug, Case
from oracle.families.clip import (
    END,
    INVISIBLE,
    OLD_TEXT,
    POSITIONS,
    QKV,
    TEXT,
    THREE,
    TRACES,
    heads_last,
    swap_query_key,
    texts,
)

__all__ = ["BUGS", "CASES", "INVISIBLE"]

STATES = ("last_hidden_state", "pooler_output")
PROJECTED = ("text_embeds", "last_hidden_state")
PROJECTION = ("text_projection.weight",)
# Long after its end, two texts have larger tokens, and one has its end token twice; the last has none at all, which
# makes its first token count.
ENDS = {
    "input_ids": np.where(np.arange(T) == np.array([[7], [11], [3], [30]]), 33, ids("ends", 4, T, low=34, high=END))
}
ENDS["input_ids"][1, 20] = 33
# The largest token, the first of two in the second row.
LARGEST = {"input_ids": ids("largest", 3, T, high=50)}
LARGEST["input_ids"][[0, 1, 1], [24, 6, 19]] = 57

CASES = (
    Case("model", "CLIPTextModel", TEXT, THREE, STATES),
    Case("projection", "CLIPTextModelWithProjection", TEXT, THREE, PROJECTED),
    # Positions are not shifted for padding.
    Case("left_padded", "CLIPTextModelWithProjection", TEXT, texts("left", 25, 18, left=True), PROJECTED),
    Case("ends", "CLIPTextModel", TEXT | {"eos_token_id": 33}, ENDS, STATES),
    Case("ends_of_old", "CLIPTextModel", TEXT | {"eos_token_id": 2}, LARGEST, STATES),
    Case("all_positions", "CLIPTextModel", TEXT, {"input_ids": ids("all_positions", 1, 40)}, STATES),
    Case(
        "position_ids",
        "CLIPTextModelWithProjection",
        TEXT,
        THREE | {"position_ids": ids("position_ids", 3, T, low=0, high=40)},
        PROJECTED,
    ),
    Case("traces", "CLIPTextModel", TEXT, texts("traces", 17), (*STATES, "hidden_states", "attentions"), TRACES),
    Case(
        "traces_of_projection",
        "CLIPTextModelWithProjection",
        TEXT | {"hidden_act": "gelu", "output_hidden_states": True},
        texts("traces_of_projection", 21),
        (*PROJECTED, "hidden_states"),
    ),
    # As text encoders of image generators are on the hub.
    Case(
        "as_in_2022",
        "CLIPTextModel",
        OLD_TEXT | {"architectures": ["CLIPTextModel"], "torch_dtype": "float32"},
        texts("as_in_2022", 25, 11, pad=END),
        STATES,
        literal_config=True,
        buffers={key: value for key, value in POSITIONS.items() if key.startswith("text_model")},
    ),
    Case(
        "without_its_projection",
        "CLIPTextModel",
        TEXT,
        texts("without_its_projection", 19),
        STATES,
        writer="CLIPTextModelWithProjection",
        unexpected=PROJECTION,
    ),
    Case(
        "new_projection",
        "CLIPTextModelWithProjection",
        TEXT,
        texts("new_projection", 19),
        ("last_hidden_state",),
        writer="CLIPTextModel",
        missing=PROJECTION,
    ),
)

SIMPLE = ("model", "projection", "left_padded")

BUGS = (
    Bug("positions forgotten", SIMPLE, zero("position_embedding.weight")),
    Bug("query and key exchanged", SIMPLE, swap_query_key),
    Bug("square kernels not transposed", SIMPLE, change(np.transpose, "self_attn.v_proj.weight")),
    Bug("heads split the wrong way round", SIMPLE, change(heads_last(3), *QKV)),
    Bug("layer_norm_eps 1e-5 hard-coded", SIMPLE, configure(layer_norm_eps=1e-5)),
    Bug("gelu instead of its quick form", SIMPLE, configure(hidden_act="gelu")),
    Bug(
        "quick gelu whatever the configuration says",
        ("traces_of_projection",),
        configure(hidden_act="quick_gelu"),
        outputs=PROJECTED,
    ),
    Bug("padding on the left attended to", ("left_padded",), change_input("attention_mask", np.ones_like)),
    Bug(
        "largest token taken for the end",
        ("ends",),
        configure(eos_token_id=2),
        outputs=("pooler_output",),
    ),
    Bug("2 taken for the end", ("ends_of_old",), configure(eos_token_id=3), outputs=("pooler_output",)),
    Bug("position_ids ignored", ("position_ids",), change_input("position_ids", lambda p: np.arange(T)[None] + 0 * p)),
)
