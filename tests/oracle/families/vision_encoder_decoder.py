"""Encoder-decoders from images to texts: ViT and GPT-2 with a map between them, ViT and BERT of one size."""

from typing import Any

import numpy as np

from oracle.cases import T, U, change_input, floats, ids, labels, mask, written, zero
from oracle.families import Bug, Case
from oracle.families.encoder_decoder import GPT2, SAME, START

VIT: dict[str, Any] = {
    "model_type": "vit",
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 43,
    "layer_norm_eps": 0.05,
    "image_size": 20,
    "patch_size": 4,
}
TO_GPT2 = START | {"encoder": VIT, "decoder": GPT2}
TO_BERT = START | {"encoder": VIT, "decoder": SAME}
IMAGES = {"pixel_values": floats("images", 2, 3, 20, 20)}

CASES = (
    Case("vit_gpt2", "VisionEncoderDecoderModel", TO_GPT2, IMAGES | written("vit_gpt2"), ("logits",)),
    # No loss: this release shifts the labels twice (transformers pull request 40863 mends it).
    Case(
        "labels",
        "VisionEncoderDecoderModel",
        TO_BERT,
        IMAGES | {"labels": labels("labels", 61, mask(T, 20))},
        ("logits", "encoder_last_hidden_state"),
    ),
)

BUGS = (
    Bug("bridge without bias", ("vit_gpt2",), zero("enc_to_dec_proj.bias")),
    Bug("mask of the decoder forgotten", ("vit_gpt2",), change_input("decoder_attention_mask", np.ones_like)),
    Bug(
        "other words are read",
        ("vit_gpt2",),
        change_input("decoder_input_ids", lambda x: ids("other", 2, U)),
    ),
)
# A key's bias moves no softmax. The pooler of the encoder is not read.
INVISIBLE = (r"\.key\.bias$", r"^encoder\.pooler\.")
DEAD = {"VisionEncoderDecoderModel": r"^encoder\.pooler\."}
# The parts have their published sizes in their own goldens.
KEPT = ("encoder", "decoder")
