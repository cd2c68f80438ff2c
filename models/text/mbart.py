"""mBART: BART with its norms inside the residual connections, trained to restore damaged text in many languages.

Liu et al. 2020, arXiv:2001.08210; original code facebookresearch/fairseq (examples/mbart). Each part of a layer sees
its input normalised, and both stacks end in a norm. A text ends with the token of its language, and the decoder starts
with that of the language that it is to write: `generate` needs it as `decoder_start_token_id`, or mBART-50 (Tang et al.
2020, arXiv:2008.00401) as `forced_bos_token_id`.
"""

from functools import partial
from typing import ClassVar

from formax.core.config import config
from formax.core.family import Family, Port
from formax.core.frozen import FrozenDict
from formax.core.spec import Spec
from formax.layers import norm, seq2seq, seq2seq_heads, transformer
from formax.layers.transformer import FLAX_INPUTS, pre_norm
from formax.models.text import bart


@config
class MBartConfig(bart.BartConfig):
    """`config.json` of model type "mbart"."""

    model_type: ClassVar[str] = "mbart"
    # Files of the first code say of both families how they differ.
    implemented: ClassVar = bart.BartConfig.implemented | {"add_final_layer_norm": (True,), "normalize_before": (True,)}

    id2label: FrozenDict = FrozenDict({0: "LABEL_0", 1: "LABEL_1"})
    decoder_start_token_id: int | None = None


def part_spec(c: MBartConfig, part: str) -> dict[str, Spec]:
    """Positions, first norm, layers and last norm of the encoder or the decoder."""
    return {**bart.part_spec(c, part), "norm": norm.layer_spec("layer_norm", c.d_model)}


model_spec = partial(transformer.text_spec, part_spec)
decoder_spec = partial(transformer.lone_decoder_spec, part_spec)
encode = transformer.text_encoder(bart.embeddings, pre_norm)
decode = transformer.text_decoder(bart.embeddings, pre_norm)
run_both = seq2seq.both(encode, decode, shifted=seq2seq.after_language)

_methods = {"encode": encode}

FAMILY = Family(
    "mbart",
    MBartConfig,
    base="model",
    inputs=run_both,
    init_cache=transformer.init_cache,
    relative="bart",
    architectures=(
        *seq2seq_heads.word_heads("MBart", model_spec, run_both, also=("ForMaskedLM",), methods=_methods),
        *seq2seq_heads.label_heads("MBart", "model", model_spec, run_both, methods=_methods),
        seq2seq_heads.lone_decoder("MBart", "model", decoder_spec, decode),
    ),
    flax=Port(
        ("MBartModel", "MBartForConditionalGeneration", "MBartForSequenceClassification", "MBartForQuestionAnswering"),
        inputs=FLAX_INPUTS,
    ),
    tf=Port(("MBartModel", "MBartForConditionalGeneration"), numbered="."),
)
