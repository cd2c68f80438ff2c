"""RoBERTa-PreLayerNorm: RoBERTa's cases; a layer with cross-attention, which has a norm of its own."""

from oracle.cases import zero
from oracle.families import Bug, Case, roberta

CASES = (
    *roberta.cases("RobertaPreLayerNorm"),
    Case(
        "cross",
        "RobertaPreLayerNormForCausalLM",
        roberta.CROSS,
        roberta.WRITTEN | roberta.MEMORY,
        ("logits",),
    ),
)
BUGS = (
    *roberta.bugs(),
    Bug("cross-attention left out", ("cross",), zero("crossattention.output.dense.weight")),
    Bug("last norm's bias left out", ("masked_lm",), zero("roberta_prelayernorm.LayerNorm.bias")),
)
NOT_STEPWISE, INVISIBLE = roberta.NOT_STEPWISE, roberta.INVISIBLE
