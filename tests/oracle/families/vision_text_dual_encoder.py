"""Two towers of any families: ViT with BERT, and CLIP's vision tower with BERT."""

from typing import Any

import numpy as np

from oracle.cases import TRACES, change, text, zero
from oracle.families import Bug, Case
from oracle.families.encoder_decoder import BERT, SEGMENTS
from oracle.families.vision_encoder_decoder import IMAGES, VIT

BERT_TOWER: dict[str, Any] = BERT | {"vocab_size": 61}
CLIP_TOWER: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "layer_norm_eps": 0.05,
    "image_size": 20,
    "patch_size": 4,
}
SPACE = {"projection_dim": 22, "logit_scale_init_value": 1.3}
WITH_VIT = SPACE | {"text_config": BERT_TOWER, "vision_config": VIT}
WITH_CLIP = SPACE | {"text_config": BERT_TOWER, "vision_config": CLIP_TOWER}
EMBEDS = ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")
TWO = text("two", 25, 17)

CASES = (
    Case("vit_bert", "VisionTextDualEncoderModel", WITH_VIT, TWO | SEGMENTS | IMAGES, EMBEDS),
    Case("loss", "VisionTextDualEncoderModel", WITH_CLIP, TWO | IMAGES, ("loss", *EMBEDS), {"return_loss": True}),
    Case(
        "traces",
        "VisionTextDualEncoderModel",
        WITH_VIT,
        text("traces", 25) | {"pixel_values": IMAGES["pixel_values"][:1]},
        ("text_model_output.hidden_states", "vision_model_output.attentions"),
        TRACES,
    ),
)

BUGS = (
    Bug(
        "the scale is not exponential",
        ("vit_bert",),
        change(lambda x: np.full_like(x, 0.3), "logit_scale"),
        outputs=("logits_per_image", "logits_per_text"),
    ),
    Bug("the text's pooler has no bias", ("vit_bert",), zero("text_model.pooler.dense.bias"), outputs=("text_embeds",)),
)
INVISIBLE = (r"\.key\.bias$", r"\.k_proj\.bias$")
# The parts have their published sizes in their own goldens.
KEPT = ("text_config", "vision_config")
