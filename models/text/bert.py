"""BERT: a bidirectional encoder with post-layer-norm blocks, pre-trained on masked words and sentence pairs.

Devlin et al. 2018, arXiv:1810.04805; original code google-research/bert. With `is_decoder` it reads left to right, with
`add_cross_attention` it looks at an encoder's states too. Relative positions: `relative_key` is Shaw et al. 2018
(arXiv:1803.02155), `relative_key_query` Huang et al. 2020 (arXiv:2009.13658). Most text encoders here descend from it.
"""

from functools import partial
from typing import Any, ClassVar

from formax.core.config import config
from formax.core.family import Architecture, Family, Port
from formax.core.outputs import LogitsOutput, PreTrainingOutput
from formax.core.spec import Spec
from formax.layers import heads, text_encoder
from formax.layers.linear import linear
from formax.layers.text_encoder import TextEncoderConfig, encoder_spec, pool


@config
class BertConfig(TextEncoderConfig):
    """`config.json` of model type "bert"."""

    model_type: ClassVar[str] = "bert"
    implemented: ClassVar = {"position_embedding_type": ("absolute", "relative_key", "relative_key_query")}

    position_embedding_type: str = "absolute"
    use_cache: bool = True
    classifier_dropout: float | None = None


def model_spec(c: BertConfig) -> dict[str, Spec]:
    """The encoder and the pooler."""
    return {**encoder_spec(c), **text_encoder.pooler_spec(c)}


encode = text_encoder.encoder(text_encoder.embeddings, text_encoder.block)
summary, model = text_encoder.summarised(encode), text_encoder.pooled(encode)
masked_lm, causal_lm = heads.masked_lm(encode), heads.causal_lm(encode, heads.words)


def next_sentence(p: Any, c: BertConfig, input_ids: Any = None, **inputs: Any) -> LogitsOutput:
    """Whether the second segment follows the first (0) or not (1): [B, 2]."""
    return LogitsOutput(logits=linear(p["pair"], summary(p, c, input_ids, **inputs)))


def pretraining(p: Any, c: BertConfig, input_ids: Any = None, **inputs: Any) -> PreTrainingOutput:
    """Masked words [B, T, V] and next sentence [B, 2]."""
    x, _ = encode(p, c, input_ids, **inputs)
    pair = linear(p["pair"], pool(p, x))
    return PreTrainingOutput(prediction_logits=heads.words(p, c, x), seq_relationship_logits=pair)


_plain, _pooled = partial(heads.with_heads, "bert", encoder_spec), partial(heads.with_heads, "bert", model_spec)
_names = ("transform.dense", "transform.LayerNorm", "decoder")
_words = partial(heads.words_spec, "cls.predictions", names=_names, tf="mlm___cls.predictions")
_pair = heads.linear_head("cls.seq_relationship", 2, key="pair", tf="nsp___cls.seq_relationship")

FAMILY = Family(
    "bert",
    BertConfig,
    base="bert",
    inputs=encode,
    init_cache=text_encoder.init_cache,
    old_names={"BertForCausalLM": "BertLMHeadModel"},
    architectures=(
        Architecture("BertModel", "", model_spec, model, also=("ForTextEncoding",)),
        Architecture("BertForPreTraining", "ForPreTraining", _pooled(_words, _pair), pretraining),
        Architecture("BertForMaskedLM", "ForMaskedLM", _plain(_words), masked_lm),
        Architecture("BertLMHeadModel", "ForCausalLM", _plain(_words), causal_lm),
        Architecture("BertForNextSentencePrediction", "ForNextSentencePrediction", _pooled(_pair), next_sentence),
        *heads.label_heads("Bert", _plain, _pooled, encode, summary),
    ),
    flax=Port(inputs=text_encoder.FLAX_INPUTS),
    tf=Port(repeats={"mlm___cls": "bert/embeddings/"}),
)
