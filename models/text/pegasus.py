"""Pegasus: an encoder-decoder for summaries, pre-trained to write the sentences that were taken out of a text.

Zhang et al. 2019, arXiv:1912.08777; original code google-research/pegasus. Layers and last norms are mBART's, its
embeddings are the original Transformer's: words, scaled in every published file, and sines and cosines for positions,
which files store though nobody trains them.
"""

from functools import partial
from typing import Any, ClassVar

import jax

from formax.core import tap
from formax.core.config import config
from formax.core.family import Family, Port
from formax.core.spec import At, Param, Spec
from formax.layers import embed, norm, seq2seq, seq2seq_heads, transformer
from formax.layers.dropout import dropout
from formax.layers.transformer import FLAX_INPUTS, TransformerConfig, pre_norm


@config
class PegasusConfig(TransformerConfig):
    """`config.json` of model type "pegasus"."""

    model_type: ClassVar[str] = "pegasus"
    # Switches of the first code, which had BART's relatives in one.
    implemented: ClassVar = {
        "add_bias_logits": (False,),
        "add_final_layer_norm": (True,),
        "extra_pos_embeddings": (0, 1),  # read by nobody
        "normalize_before": (True,),
        "normalize_embedding": (False,),
        "static_position_embeddings": (True,),
    }

    vocab_size: int = 50265
    max_position_embeddings: int = 1024
    scale_embedding: bool = False
    use_cache: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    decoder_start_token_id: int | None = 0
    forced_eos_token_id: int | None = 1


def waves_spec(c: Any) -> Spec:
    """A table of sines and cosines for positions, stored as a buffer; Flax has none."""
    shape = (c.max_position_embeddings, c.d_model)
    table = Param(shape, (None, "embed"), "weight", embed.vaswani, optional=True, buffer=True)
    return At("embed_positions", {"embedding": table}, flax="")


def part_spec(c: PegasusConfig, part: str) -> dict[str, Spec]:
    """Positions, layers and last norm of the encoder or the decoder."""
    return {
        "embed": {"position": waves_spec(c)},
        "layers": transformer.layers_spec(c, part),
        "norm": norm.layer_spec("layer_norm", c.d_model),
    }


def embeddings(p: Any, c: Any, part: str, ids: Any, vectors: Any, offset: Any, key: Any) -> jax.Array:
    """Word and position vectors, added: [B, T] -> [B, T, E]."""
    with tap.scope("embed"):
        x = transformer.plain_words(p, part, ids, vectors, c.max_position_embeddings)
        if c.scale_embedding and (vectors is None or part == "decoder"):  # there the reference scales given ones, too
            x = x * c.d_model**0.5
        waves = embed.embed(p[part]["embed"]["position"], embed.positions(offset, x))
        return tap.tap("out", dropout(x + waves.astype(x.dtype), c.dropout, key))


model_spec = partial(transformer.one_table_spec, part_spec)
decoder_spec = partial(transformer.lone_decoder_spec, part_spec)
encode = transformer.text_encoder(embeddings, pre_norm)
decode = transformer.text_decoder(embeddings, pre_norm)
run_both = seq2seq.both(encode, decode)

_PORTED = ("PegasusModel", "PegasusForConditionalGeneration")

FAMILY = Family(
    "pegasus",
    PegasusConfig,
    base="model",
    inputs=run_both,
    init_cache=transformer.init_cache,
    relative="mbart",
    architectures=(
        *seq2seq_heads.word_heads("Pegasus", model_spec, run_both, methods={"encode": encode}),
        seq2seq_heads.lone_decoder("Pegasus", "model", decoder_spec, decode),
    ),
    flax=Port(_PORTED, inputs=FLAX_INPUTS),
    tf=Port(_PORTED, numbered="."),
)
