"""The small Blenderbot: BART's layers, and a decoder that normalises words before it adds their positions."""

from oracle import bart_line
from oracle.bart_line import untied, word_cases
from oracle.cases import configure, swap
from oracle.families import Bug

CASES = (*word_cases("BlenderbotSmall"), untied("BlenderbotSmall"))

BUGS = (
    *bart_line.BUGS,
    # The decoder has no scale, which its norm would take away.
    Bug("words not scaled", ("model",), configure(scale_embedding=False)),
    bart_line.STARTS,
    bart_line.POSITIONS,
    Bug("positions offset by 2", bart_line.EVERY, bart_line.ROLLED),
    Bug(
        "first norms exchanged",
        bart_line.WHOLE,
        swap("encoder.layernorm_embedding", "decoder.layernorm_embedding", "weight", "bias"),
    ),
)

INVISIBLE = bart_line.INVISIBLE
SILENT = bart_line.SILENT
