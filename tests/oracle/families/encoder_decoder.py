"""Encoder-decoders of texts: BERT with BERT of one size, with GPT-2 behind a map between them, with BART's decoder.

What the parts do is shown by their own goldens; here is what is between them: sizes, masks, prefixes of names, which
vocabulary is whose. A text that begins with labels is read as the labels one step later.
"""

from typing import Any

import numpy as np

from oracle.cases import TRACES, VOCAB, T, change, change_input, labels, mask, text, written, zero
from oracle.families import Bug, Case

BERT: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 53,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 43,
    "max_position_embeddings": 40,
    "layer_norm_eps": 0.05,
}
WRITES = {"is_decoder": True, "add_cross_attention": True}
SAME = BERT | WRITES | {"vocab_size": VOCAB, "num_attention_heads": 3, "intermediate_size": 41}
GPT2: dict[str, Any] = WRITES | {
    "model_type": "gpt2",
    "vocab_size": VOCAB,
    "n_positions": 40,
    "n_embd": 30,
    "n_layer": 2,
    "n_head": 3,
    "layer_norm_epsilon": 0.05,
    "bos_token_id": 60,
    "eos_token_id": 60,
}
BART: dict[str, Any] = WRITES | {
    "model_type": "bart",
    "vocab_size": VOCAB,
    "d_model": 28,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 37,
    "max_position_embeddings": 40,
    "is_encoder_decoder": False,
}
START = {"pad_token_id": 0, "decoder_start_token_id": 2}
TWO_BERTS = START | {"encoder": BERT, "decoder": SAME}
TIED = START | {"encoder": BERT | {"vocab_size": VOCAB}, "decoder": BERT | WRITES | {"vocab_size": VOCAB}}
TO_GPT2 = START | {"encoder": BERT, "decoder": GPT2}
TO_BART = START | {"encoder": BERT, "decoder": BART}


def read(name: str, *lengths: int) -> dict[str, Any]:
    """Returns a text in the words of the encoder."""
    found = text(name, *lengths)
    return found | {"input_ids": found["input_ids"] % BERT["vocab_size"]}


BOTH = read("both", T, 17) | written("both")
SEGMENTS = {"token_type_ids": (np.arange(T) >= np.array([[9], [5]])).astype(np.int64)}

CASES = (
    Case("bert_bert", "EncoderDecoderModel", TWO_BERTS, BOTH | SEGMENTS, ("logits", "encoder_last_hidden_state")),
    # The labels are not shifted in the loss: the decoder reads them one step late.
    Case(
        "labels",
        "EncoderDecoderModel",
        TWO_BERTS,
        read("labels", T, 17) | {"labels": labels("labels", VOCAB, mask(T, 20))},
        ("loss", "logits"),
    ),
    # One BERT that reads and writes: the file has it once, with the decoder; the pooler is the encoder's alone.
    Case(
        "tied",
        "EncoderDecoderModel",
        TIED | {"tie_encoder_decoder": True},
        text("tied", T, 17) | written("tied"),
        ("logits",),
    ),
    Case("bert_gpt2", "EncoderDecoderModel", TO_GPT2, BOTH, ("logits",)),
    # The reference makes a cache of as many layers as BART's encoder would have.
    Case("bert_bart", "EncoderDecoderModel", TO_BART, BOTH, ("logits",), {"use_cache": False}),
    Case(
        "traces",
        "EncoderDecoderModel",
        TO_GPT2,
        read("traces", T) | {"decoder_input_ids": written("traces", 1)["decoder_input_ids"]},
        (
            "logits",
            "encoder_hidden_states",
            "encoder_attentions",
            "decoder_hidden_states",
            "decoder_attentions",
            "cross_attentions",
        ),
        TRACES,
    ),
)

ALL = ("bert_bert", "bert_gpt2", "bert_bart")
BUGS = (
    Bug("bridge without bias", ("bert_gpt2", "bert_bart"), zero("enc_to_dec_proj.bias")),
    Bug("the decoder sees padding of the text", ALL, change_input("attention_mask", np.ones_like)),
    Bug(
        "the decoder sees what it should not of its own",
        ALL,
        change_input("decoder_attention_mask", np.ones_like),
        outputs=("logits",),
    ),
    Bug("segments forgotten", ("bert_bert",), change_input("token_type_ids", np.zeros_like)),
    Bug("bridge transposed", ("bert_gpt2",), change(lambda w: w.T.reshape(w.shape), "enc_to_dec_proj.weight")),
)
# A key's bias moves no softmax. The poolers of encoders are not read.
INVISIBLE = (
    r"\.key\.bias$",
    r"\.k_proj\.bias$",
    r"^encoder\.pooler\.",
)
DEAD = {"EncoderDecoderModel": r"^encoder\.pooler\."}
# The parts have their published sizes in their own goldens.
KEPT = ("encoder", "decoder")
