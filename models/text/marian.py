"""Marian: translation models of the original Transformer's kind, of which Opus-MT has one for every pair of languages.

Junczys-Dowmunt et al. 2018, arXiv:1804.00344; original code marian-nmt/marian. Layers are BART's and
embeddings Pegasus', and nothing normalises these. Some models have words of their own for
either language.
"""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from formax.core.config import config
from formax.core.family import Architecture, Family, Port
from formax.core.spec import At, Ignored, Spec, Tied, normal
from formax.layers import embed, heads, seq2seq, seq2seq_heads, transformer
from formax.layers.linear import linear, linear_spec
from formax.layers.transformer import FLAX_INPUTS, post_norm
from formax.models.text import pegasus


@config
class MarianConfig(pegasus.PegasusConfig):
    """`config.json` of model type "marian"."""

    model_type: ClassVar[str] = "marian"
    implemented: ClassVar = pegasus.PegasusConfig.implemented | {
        "add_final_layer_norm": (False,),
        "normalize_before": (False,),
    }

    vocab_size: int = 58101
    decoder_vocab_size: int | None = None
    share_encoder_decoder_embeddings: bool = True
    pad_token_id: int | None = 58100
    eos_token_id: int | tuple[int, ...] | None = 0
    decoder_start_token_id: int | None = 58100
    forced_eos_token_id: int | None = 0

    @property
    def target_size(self) -> int:
        """How many words there are to write."""
        own = None if self.share_encoder_decoder_embeddings else self.decoder_vocab_size
        return own or self.vocab_size


def part_spec(c: MarianConfig, part: str) -> dict[str, Spec]:
    """Positions and layers of the encoder or the decoder."""
    return {"embed": {"position": pegasus.waves_spec(c)}, "layers": transformer.layers_spec(c, part)}


def unplaced_spec(c: MarianConfig, part: str) -> dict[str, Spec]:
    """The same without positions, which the reference leaves out of translation models' files."""
    return {**part_spec(c, part), "embed": Ignored("embed_positions.weight")}


def whole_spec(make: Any, c: MarianConfig) -> dict[str, Spec]:
    """Words, encoder and decoder, each of which `make(c, part)` declares."""
    if c.share_encoder_decoder_embeddings:
        return transformer.one_table_spec(make, c)
    # Both have as many words, whatever `decoder_vocab_size` says: with another number the reference reads no file.
    word = embed.embedding_spec("embed_tokens", c.vocab_size, c.d_model, init=normal(c.init_std))
    return {part: At(part, {**make(c, part), "word": word}) for part in ("encoder", "decoder")}


def embeddings(p: Any, c: MarianConfig, part: str, ids: Any, vectors: Any, offset: Any, key: Any) -> jax.Array:
    """Word and position vectors, added: [B, T] -> [B, T, E]; positions are computed where they are not stored."""
    if "embed" not in p[part]:
        table = embed.vaswani(None, (c.max_position_embeddings, c.d_model), jnp.float32)
        p = {**p, part: {**p[part], "embed": {"position": {"embedding": table}}}}
    return pegasus.embeddings(p, c, part, ids, vectors, offset, key)


model_spec = partial(whole_spec, part_spec)
encode = transformer.text_encoder(embeddings, post_norm)
decode = transformer.text_decoder(embeddings, post_norm)
run_both = seq2seq.both(encode, decode)


def decoder_spec(c: MarianConfig) -> dict[str, Spec]:
    """The decoder alone, with the words that are written."""
    word = embed.embedding_spec(
        "decoder.embed_tokens", c.decoder_vocab_size or c.vocab_size, c.d_model, init=normal(c.init_std)
    )
    return {"embed": {"word": word}, "decoder": At("decoder", part_spec(c, "decoder"))}


def head_spec(c: MarianConfig) -> dict[str, Spec]:
    """The head for words: the decoder's table again, or one of its own; and a bias."""
    table = "embed.word.embedding" if c.share_encoder_decoder_embeddings else "decoder.word.embedding"
    own = linear_spec("lm_head", c.d_model, c.target_size, ("embed", "vocab"), init=normal(c.init_std), bias=False)
    head = Tied("lm_head.weight", table) if c.tie_word_embeddings else own
    return {"head": head, **seq2seq_heads.bias_spec(c, c.target_size)}


def words(p: Any, c: MarianConfig, x: jax.Array) -> jax.Array:
    """Scores of all words: [B, T, E] -> [B, T, V]."""
    own = p["embed"] if "embed" in p else p["decoder"]
    logits = linear(p["head"], x) if "head" in p else embed.logits(own["word"], x)
    return logits + p["bias"].astype(logits.dtype)


_translation_spec = heads.with_heads("model", partial(whole_spec, unplaced_spec), head_spec)
_translation = seq2seq_heads.conditional_generation(run_both, words)
_methods = {"encode": encode}
_PORTED = ("MarianModel", "MarianMTModel")


def _lacks(c: MarianConfig) -> dict[str, bool]:
    return {"share_encoder_decoder_embeddings": not c.share_encoder_decoder_embeddings}


FAMILY = Family(
    "marian",
    MarianConfig,
    base="model",
    inputs=run_both,
    init_cache=transformer.init_cache,
    relative="bart",
    architectures=(
        Architecture("MarianModel", "", model_spec, run_both, methods=_methods),
        Architecture("MarianMTModel", "ForSeq2SeqLM", _translation_spec, _translation, methods=_methods),
        seq2seq_heads.lone_decoder("Marian", "model", decoder_spec, decode),
    ),
    flax=Port(_PORTED, inputs=FLAX_INPUTS, lacks=_lacks),
    tf=Port(_PORTED, numbered=".", lacks=_lacks),
)
