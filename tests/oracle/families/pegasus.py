"""Pegasus: sines and cosines for positions, given vectors that the decoder scales, norms as mBART's."""

from oracle import bart_line
from oracle.bart_line import SEEN, SIZES, untied, with_sines, word_cases
from oracle.cases import change_input, ids, swap
from oracle.families import Bug, Case

# Those that Flax's classes are tried with.
WITH_SINES = ("inputs_embeds", "untied")

CASES = (
    *(with_sines(case) if case.name in WITH_SINES else case for case in (*word_cases("Pegasus"), untied("Pegasus"))),
    # Activations and switches as in published files.
    Case(
        "published",
        "PegasusModel",
        SIZES | {"activation_function": "relu", "static_position_embeddings": True, "extra_pos_embeddings": 1},
        {"input_ids": ids("published", 1, 40), "decoder_input_ids": ids("published.decoder", 1, 37)},
        SEEN,
    ),
    # A file without positions, which are then what they always are.
    Case(
        "computed_positions",
        "PegasusModel",
        SIZES,
        {"input_ids": ids("computed", 1, 40), "decoder_input_ids": ids("computed.decoder", 1, 37)},
        SEEN,
        drop=("encoder.embed_positions.weight", "decoder.embed_positions.weight"),
        missing=("encoder.embed_positions.weight", "decoder.embed_positions.weight"),
    ),
)

BUGS = (
    *bart_line.BUGS,
    *bart_line.SCALED,
    bart_line.STARTS,
    bart_line.POSITIONS,
    Bug("positions offset by 2", bart_line.EVERY, bart_line.ROLLED),
    Bug("last norms exchanged", bart_line.WHOLE, swap("encoder.layer_norm", "decoder.layer_norm", "weight", "bias")),
    Bug(
        "given vectors of the decoder not scaled",
        ("inputs_embeds",),
        change_input("decoder_inputs_embeds", lambda x: x / 6),
        outputs=("last_hidden_state",),
    ),
)

INVISIBLE = bart_line.INVISIBLE
SILENT = bart_line.SILENT
