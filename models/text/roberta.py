"""RoBERTa: BERT trained longer, on more text and without sentence pairs; its positions are counted over real tokens.

Liu et al. 2019, arXiv:1907.11692; original code facebookresearch/fairseq, from which the oddities come: positions begin
after the number of the padding token, padding itself stays at that number, and `max_position_embeddings` counts these
rows, too. The word head has one name for its parts whatever its use, and texts are classified from the first token's
state by a head of two layers, without the pooler.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from formax.core.config import ConfigError, config
from formax.core.family import Architecture, Family, Port
from formax.core.spec import Spec
from formax.layers import embed, heads, text_encoder
from formax.models.text.bert import BertConfig


@config
class RobertaConfig(BertConfig):
    """`config.json` of model type "roberta"."""

    model_type: ClassVar[str] = "roberta"

    vocab_size: int = 50265
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 2

    def check(self) -> None:
        super().check()
        if self.pad_token_id is None or self.pad_token_id < 0:
            raise ConfigError(f"positions are counted from pad_token_id={self.pad_token_id} on: give a token")


def positions(c: Any, ids: Any, vectors: Any, offset: Any) -> jax.Array:
    """Positions after `offset` others, the first being pad_token_id + 1: int [B or 1, T].

    Padding among the ids has none and stays at pad_token_id; vectors count as words.

    Raises:
        ValueError: more positions than the table has, of which as many rows as pad_token_id + 1 are no positions.
    """
    pad = c.pad_token_id
    embed.check_inputs(ids, vectors, c.max_position_embeddings - pad - 1)
    if ids is None:  # (the reference forgets the offset here)
        return embed.positions(offset, vectors) + pad + 1
    real = (ids != pad).astype(jnp.int32)
    return (jnp.cumsum(real, axis=1) + jnp.reshape(offset, (-1, 1))) * real + pad


def embeddings(p: Any, c: Any, ids: Any, types: Any, places: Any, vectors: Any, offset: Any, key: Any) -> Any:
    """BERT's, with RoBERTa's positions: [B, T] -> [B, T, E]."""
    if places is None and c.position_embedding_type == "absolute":
        places = positions(c, ids, vectors, offset)
    return text_encoder.embeddings(p, c, ids, types, places, vectors, offset, key)


def words(p: Any, c: Any, x: jax.Array) -> jax.Array:
    """Scores of all words [B, T, V]; the transform's activation is GELU whatever the layers'."""
    return heads.words(p, c, x, "gelu")


def architectures(
    name: str,
    base: str,
    encode: Callable[..., Any],
    encoder_spec: Callable[[Any], dict[str, Spec]] = text_encoder.encoder_spec,
) -> tuple[Architecture, ...]:
    """The models of RoBERTa's line, whose classes begin with `name` and whose checkpoints have `base` before the model.

    `encode(p, c, input_ids, ..., key) -> (states [B, T, E], cache)` is all below the heads, `encoder_spec` its
    declaration.
    """

    def model_spec(c: Any) -> dict[str, Spec]:
        return {**encoder_spec(c), **text_encoder.pooler_spec(c)}

    plain, pooled = partial(heads.with_heads, base, encoder_spec), partial(heads.with_heads, base, model_spec)
    head = plain(partial(heads.words_spec, "lm_head", names=("dense", "layer_norm", "decoder")))
    text = plain(heads.deep_head()), heads.deep_classification(encode)
    masked = heads.masked_lm(encode, words)
    return (
        Architecture(f"{name}Model", "", model_spec, text_encoder.pooled(encode), also=("ForTextEncoding",)),
        Architecture(f"{name}ForMaskedLM", "ForMaskedLM", head, masked, also=("ForPreTraining",)),
        Architecture(f"{name}ForCausalLM", "ForCausalLM", head, heads.causal_lm(encode, words)),
        *heads.label_heads(name, plain, pooled, encode, text_encoder.summarised(encode), text=text),
    )


encode = text_encoder.encoder(embeddings, text_encoder.block)

FAMILY = Family(
    "roberta",
    RobertaConfig,
    base="roberta",
    inputs=encode,
    init_cache=text_encoder.init_cache,
    relative="bert",
    architectures=architectures("Roberta", "roberta", encode),
    counts_tokens=True,
    flax=Port(inputs=text_encoder.FLAX_INPUTS),
    tf=Port(repeats={"lm_head": "roberta/embeddings/"}),
)
