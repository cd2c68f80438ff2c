"""ELECTRA: BERT that is trained to tell which words a small masked-word model, the generator, has put in.

Clark et al. 2020, arXiv:2003.10555; original code google-research/electra. Word vectors may be narrower than the
states, and are then projected; there is no pooler. Generator and discriminator are checkpoints of their own: the one
has a head for words, the other one for every token's being replaced.
"""

from functools import partial
from typing import Any, ClassVar

import jax

from formax.core.config import config
from formax.core.family import Architecture, Family, Port
from formax.core.outputs import LogitsOutput
from formax.core.spec import Spec, normal, under
from formax.layers import heads, text_encoder
from formax.layers.activations import activation, check_activation
from formax.layers.linear import linear, linear_spec
from formax.models.text.bert import BertConfig


@config
class ElectraConfig(BertConfig):
    """`config.json` of model type "electra"."""

    model_type: ClassVar[str] = "electra"
    implemented: ClassVar = {**BertConfig.implemented, "summary_type": ("first", "last", "mean", "cls_index")}

    embedding_size: int = 128
    hidden_size: int = 256
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    summary_type: str = "first"
    summary_use_proj: bool = True
    summary_activation: str | None = "gelu"
    summary_last_dropout: float = 0.1

    def check(self) -> None:
        super().check()
        check_activation(self.summary_activation or "linear", "summary_activation")

    @property
    def word_size(self) -> int:
        return self.embedding_size


def projected_spec(c: Any) -> dict[str, Spec]:
    """BERT's encoder, and the projection of word vectors if they are not as wide as the states."""
    spec = text_encoder.encoder_spec(c)
    if c.word_size != c.hidden_size:
        init = normal(c.initializer_range)
        spec["project"] = linear_spec("embeddings_project", c.word_size, c.hidden_size, (None, "embed"), init=init)
    return spec


def projected(p: Any, x: jax.Array) -> jax.Array:
    """Word vectors as wide as the states: [B, T, W] -> [B, T, E]."""
    return linear(p["project"], x) if "project" in p else x


def embeddings(p: Any, c: Any, *inputs: Any) -> jax.Array:
    """BERT's, projected: [B, T] -> [B, T, E]."""
    return projected(p, text_encoder.embeddings(p, c, *inputs))


encode = text_encoder.encoder(embeddings, text_encoder.block)


def words(p: Any, c: Any, x: jax.Array) -> jax.Array:
    """Scores of all words [B, T, V]; the transform's activation is GELU whatever the layers'."""
    return heads.words(p, c, x, "gelu")


def discriminate(p: Any, c: Any, input_ids: Any = None, **inputs: Any) -> LogitsOutput:
    """How likely every token is a replaced one, as logits [B, T]."""
    x, _ = encode(p, c, input_ids, **inputs)
    hidden = activation(c.hidden_act)(linear(p["head"]["dense"], x))
    return LogitsOutput(logits=linear(p["head"]["out"], hidden)[..., 0])


def _discriminator(c: Any) -> dict[str, Spec]:
    make = partial(linear_spec, d_in=c.hidden_size, axes=("embed", None), init=normal(c.initializer_range))
    parts = {"dense": make("dense", d_out=c.hidden_size), "out": make("dense_prediction", d_out=1)}
    return {"head": under("discriminator_predictions", parts)}


def _words(c: Any) -> dict[str, Spec]:
    names = ("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head")
    return heads.words_spec("", c, names=names, bias="generator_lm_head.bias", size=c.word_size)


_plain = partial(heads.with_heads, "electra", projected_spec)
_text = _plain(heads.deep_head()), heads.deep_classification(encode, lambda c: "gelu")
_choice = heads.summary_choice("electra", projected_spec, encode)
_labels = heads.label_heads("Electra", _plain, _plain, encode, encode, text=_text, choice=_choice)

FAMILY = Family(
    "electra",
    ElectraConfig,
    base="electra",
    inputs=encode,
    init_cache=text_encoder.init_cache,
    relative="bert",
    architectures=(
        Architecture("ElectraModel", "", projected_spec, heads.bare(encode), also=("ForTextEncoding",)),
        Architecture("ElectraForPreTraining", "ForPreTraining", _plain(_discriminator), discriminate),
        Architecture("ElectraForMaskedLM", "ForMaskedLM", _plain(_words), heads.masked_lm(encode, words)),
        Architecture("ElectraForCausalLM", "ForCausalLM", _plain(_words), heads.causal_lm(encode, words)),
        *_labels,
    ),
    # There the generator's transform has the layers' activation.
    flax=Port(inputs=text_encoder.FLAX_INPUTS, lacks=lambda c: {"hidden_act": c.hidden_act != "gelu"}),
    tf=Port(
        ("ElectraModel", "ElectraForPreTraining", "ElectraForMaskedLM", *(one.name for one in _labels)),
        repeats={"generator_lm_head": "electra/embeddings/"},
    ),
)
