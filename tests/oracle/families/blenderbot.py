"""Blenderbot: norms before every part and after the last layer, positions as learned, none to spare."""

from oracle import bart_line
from oracle.bart_line import PAIR, SIZES, untied, word_cases
from oracle.cases import swap
from oracle.families import Bug, Case

CASES = (
    *word_cases("Blenderbot"),
    # The head alone has a table of its own.
    untied("Blenderbot"),
    # As in files of 2020: the table under every name that uses it, no bias for words.
    Case(
        "old_names",
        "BlenderbotForConditionalGeneration",
        SIZES | {"scale_embedding": True, "layernorm_variant": "prelayernorm", "do_blenderbot_90_layernorm": True},
        PAIR,
        ("logits",),
        copies=dict.fromkeys(
            ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"),
            "model.shared.weight",
        ),
        drop=("final_logits_bias",),
    ),
)

BUGS = (
    *bart_line.BUGS,
    *bart_line.SCALED,
    bart_line.STARTS,
    bart_line.POSITIONS,
    Bug("positions offset by 2", bart_line.EVERY, bart_line.ROLLED),
    Bug("last norms exchanged", bart_line.WHOLE, swap("encoder.layer_norm", "decoder.layer_norm", "weight", "bias")),
)

INVISIBLE = bart_line.INVISIBLE
SILENT = bart_line.SILENT
