"""Encoder-decoders from speech to texts: wav2vec 2.0 and GPT-2 with a map between them; with an adapter, and BERT."""

from typing import Any

import numpy as np

from oracle.cases import T, change, change_input, floats, labels, mask, written, zero
from oracle.families import Bug, Case
from oracle.families.encoder_decoder import GPT2, SAME, START
from oracle.families.wav2vec2 import SAMPLES
from oracle.families.wav2vec2 import STABLE as SOUND

WAV: dict[str, Any] = SOUND | {"model_type": "wav2vec2", "mask_time_prob": 0.0}
ADAPTED = WAV | {"add_adapter": True, "num_adapter_layers": 1, "output_hidden_size": 36}
TO_GPT2 = START | {"encoder": WAV, "decoder": GPT2}
TO_BERT = START | {"encoder": ADAPTED, "decoder": SAME}
SPOKEN = {"input_values": floats("spoken", 2, SAMPLES), "attention_mask": mask(SAMPLES, 203, width=SAMPLES)}

CASES = (
    Case("wav2vec2_gpt2", "SpeechEncoderDecoderModel", TO_GPT2, SPOKEN | written("wav2vec2_gpt2"), ("logits",)),
    Case(
        "labels",
        "SpeechEncoderDecoderModel",
        TO_BERT,
        SPOKEN | {"labels": labels("labels", 61, mask(T, 20))},
        ("loss", "logits"),
    ),
)

BUGS = (
    Bug("bridge without bias", ("wav2vec2_gpt2",), zero("enc_to_dec_proj.bias")),
    Bug("silence is heard", ("wav2vec2_gpt2", "labels"), change_input("attention_mask", np.ones_like)),
    Bug("the adapter forgets its bias", ("labels",), change(np.zeros_like, "adapter.layers.0.conv.bias")),
)
# A key's bias moves no softmax. What masks frames is read in training alone.
INVISIBLE = (r"\.key\.bias$", r"\.k_proj\.bias$", r"masked_spec_embed$")
# The parts have their published sizes in their own goldens.
KEPT = ("encoder", "decoder")
