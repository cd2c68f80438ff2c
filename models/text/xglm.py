"""XGLM: a multilingual GPT-3 of BART's layers, with the norms before the parts and sines for positions.

Lin et al. 2021, arXiv:2112.10668; original code facebookresearch/fairseq, whose positions begin with 2. Words are
scaled by the square root of their width, and are the output as well; the sines are in no file.
"""

from dataclasses import replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from formax.core import tap
from formax.core.config import Config, ConfigError, check_multiple, config
from formax.core.family import Architecture, Family, Port
from formax.core.rng import split
from formax.core.spec import Ignored, Spec, normal, stack_of
from formax.layers import embed, heads, norm, transformer
from formax.layers.activations import check_activation
from formax.layers.attention import causal_mask, from_attention_mask
from formax.layers.dropout import dropout
from formax.layers.transformer import pre_norm

OFFSET = 2  # the position of the first token


@config
class XGLMConfig(Config):
    """`config.json` of model type "xglm"."""

    model_type: ClassVar[str] = "xglm"
    attribute_map: ClassVar = {
        "decoder_attention_heads": "attention_heads",
        "decoder_ffn_dim": "ffn_dim",
        "decoder_layerdrop": "layerdrop",
        "decoder_layers": "num_layers",
        "hidden_size": "d_model",
        "initializer_range": "init_std",
        "num_attention_heads": "attention_heads",
        "num_hidden_layers": "num_layers",
    }

    vocab_size: int = 256008
    max_position_embeddings: int = 2048
    d_model: int = 1024
    ffn_dim: int = 4096
    num_layers: int = 24
    attention_heads: int = 16
    activation_function: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    layerdrop: float = 0.0
    init_std: float = 0.02
    scale_embedding: bool = True
    use_cache: bool = True
    decoder_start_token_id: int | None = 2
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 2

    def check(self) -> None:
        check_multiple(self, "d_model", "attention_heads")
        check_activation(self.activation_function, "activation_function")
        if self.d_model % 2 or self.d_model < 4:
            raise ConfigError(f"d_model={self.d_model} must be even, and at least 4: as many sines as cosines")


def block_spec(c: XGLMConfig) -> dict[str, Spec]:
    """One layer of BART's decoder, which looks at an encoder only if it is asked to."""
    left_out = () if c.add_cross_attention else ("cross", "cross_norm")
    return {key: part for key, part in transformer.block_spec(c, "decoder").items() if key not in left_out}


def model_spec(c: XGLMConfig) -> dict[str, Spec]:
    """Words, layers and the last norm."""
    word = embed.embedding_spec("embed_tokens", c.vocab_size, c.d_model, init=normal(c.init_std), tf="weight")
    layers: dict[str, Spec] = {
        "layers": stack_of("layers", [block_spec(c)] * c.num_layers),
        "norm": norm.layer_spec("layer_norm", c.d_model),
    }
    return {"embed": {"word": word, "sines": Ignored("embed_positions.weights")}, "decoder": layers}


def embeddings(p: Any, c: XGLMConfig, ids: Any, vectors: Any, position_ids: Any, offset: Any, key: Any) -> jax.Array:
    """Word vectors and sines of their positions: [B, T] -> [B, T, E]."""
    with tap.scope("embed"):
        x = transformer.words(p, c, "decoder", ids, vectors, None)
        places = OFFSET + (embed.positions(offset, x) if position_ids is None else position_ids)
        sines = embed.waves(places, c.d_model)
        if c.pad_token_id is not None:  # the place of this number is nowhere; as a rule it is before the first one
            sines = jnp.where(jnp.equal(places, c.pad_token_id)[..., None], 0, sines)
        x = x + sines.astype(x.dtype)
        return tap.tap("out", dropout(x, c.dropout, key))


def decode(
    p: Any,
    c: XGLMConfig,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    inputs_embeds: Any = None,
    cache: Any = None,
    key: Any = None,
) -> Any:
    """Embeddings, all layers and the last norm: ids [B, T] -> (states [B, T, E], cache)."""
    k_embed, k_layers = split(key, 2)
    mask = causal_mask(attention_mask, cache)
    memory = encoder_hidden_states, from_attention_mask(encoder_attention_mask)
    with tap.scope("decoder"):
        x = embeddings(p, c, input_ids, inputs_embeds, position_ids, mask.q_offset, k_embed)
        return transformer.decoder_layers(p, c, x, mask, *memory, cache, k_layers, pre_norm)


def _flax_lacks(c: XGLMConfig) -> dict[str, bool]:
    """All of its places are somewhere."""
    return {"pad_token_id": c.pad_token_id is not None and c.pad_token_id >= OFFSET}


def _tf_lacks(c: XGLMConfig) -> dict[str, bool]:
    """Its files have a head of their own."""
    return {"tie_word_embeddings": c.tie_word_embeddings}


_words, *_ = heads.decoder_heads("XGLM", "model", model_spec, decode)
words_spec = heads.with_heads("model", model_spec, heads.lm_head(tf=None))

FAMILY = Family(
    "xglm",
    XGLMConfig,
    base="model",
    inputs=decode,
    relative="bart",
    init_cache=transformer.init_cache,
    architectures=(Architecture("XGLMModel", "", model_spec, heads.bare(decode)), replace(_words, spec=words_spec)),
    flax=Port(lacks=_flax_lacks),
    tf=Port(numbered=".", lacks=_tf_lacks),
)
