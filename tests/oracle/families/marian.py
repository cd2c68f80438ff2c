"""Marian: positions that translation models' files do not hold, words shared or not, a bias for every word."""

from oracle import bart_line
from oracle.bart_line import PADDED, PAIR, SEEN, SIZES, WRITTEN, untied, with_sines, word_cases
from oracle.cases import change_input, ids, labels
from oracle.families import Bug, Case

APART = SIZES | {"share_encoder_decoder_embeddings": False}

CASES = (
    *(with_sines(case) if case.name == "inputs_embeds" else case for case in word_cases("Marian", "MTModel")),
    untied("Marian", "MTModel"),
    # Words of their own for either language; the head's are the decoder's again.
    Case("apart", "MarianMTModel", APART, PAIR, ("logits", "encoder_last_hidden_state")),
    # With a head of its own, it may have another number of words.
    Case(
        "apart_untied",
        "MarianMTModel",
        APART | {"tie_word_embeddings": False, "decoder_vocab_size": 47},
        PADDED | WRITTEN | {"labels": labels("apart_untied", 47, WRITTEN["decoder_attention_mask"])},
        ("loss", "logits"),
    ),
    Case("decoder_apart", "MarianForCausalLM", APART, PADDED, ("logits",)),
    # Positions are computed where a file has none, and read where it has some.
    Case(
        "base_of_a_head",
        "MarianModel",
        SIZES,
        {"input_ids": ids("base", 1, 40), "decoder_input_ids": ids("base.decoder", 1, 37)},
        SEEN,
        writer="MarianMTModel",
        missing=("encoder.embed_positions.weight", "decoder.embed_positions.weight"),
        unexpected=("final_logits_bias",),
    ),
)

BUGS = (
    *bart_line.BUGS,
    *bart_line.SCALED,
    bart_line.STARTS,
    Bug("positions offset by 2", ("model", "causal_lm"), bart_line.ROLLED),
    Bug(
        "given vectors of the decoder not scaled",
        ("inputs_embeds",),
        change_input("decoder_inputs_embeds", lambda x: x / 6),
        outputs=("last_hidden_state",),
    ),
)

INVISIBLE = bart_line.INVISIBLE
SILENT = bart_line.SILENT
