"""BigBird: a BERT for long texts, whose blocks of tokens look at few others instead of all.

Zaheer et al. 2020, arXiv:2007.14062; original code google-research/bigbird. Nearest relative: BERT. Blocks look at
their neighbours, at the first and the last block, and at some that are drawn (`formax.layers.block_sparse`); a text too
short for that, and every text of a decoder, is read with full attention. Embeddings are normalised after dropout.

As in the reference, blocks are drawn (by layer, not by step) in training alone; otherwise the first block takes their
place. The reference also stays with full attention once it has read a short text, and a decoder of it looks ahead in
long ones, and at the encoder with both its attentions; here neither is so.
"""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from formax.core import tap
from formax.core.config import ConfigError, config
from formax.core.family import Architecture, Family, Port
from formax.core.outputs import PreTrainingOutput, QuestionAnsweringOutput
from formax.core.rng import fold_path, split
from formax.core.spec import At, Spec, fold, normal, optional
from formax.layers import embed, heads, mlp, norm, text_encoder
from formax.layers.attention import causal_mask, from_attention_mask
from formax.layers.block_sparse import drawn_blocks, sparse_self_attention
from formax.layers.dropout import dropout
from formax.layers.linear import linear, linear_spec
from formax.layers.text_encoder import init_cache, pool
from formax.models.text.bert import BertConfig


@config
class BigBirdConfig(BertConfig):
    """`config.json` of model type "big_bird"."""

    model_type: ClassVar[str] = "big_bird"
    implemented: ClassVar = {
        "attention_type": ("block_sparse", "original_full"),
        "position_embedding_type": ("absolute",),
    }

    vocab_size: int = 50358
    hidden_act: str = "gelu_new"
    max_position_embeddings: int = 4096
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    sep_token_id: int | None = 66
    attention_type: str = "block_sparse"
    use_bias: bool = True
    rescale_embeddings: bool = False
    block_size: int = 64
    num_random_blocks: int = 3

    def check(self) -> None:
        super().check()
        if self.block_size < 1:
            raise ConfigError(f"block_size={self.block_size} must be 1 or more")

    def is_sparse(self, length: int) -> bool:
        """Whether a text of so many tokens is read block by block: not one that few blocks see whole."""
        enough = length > (5 + 2 * self.num_random_blocks) * self.block_size
        return self.attention_type == "block_sparse" and not self.is_decoder and enough


def encoder_spec(c: BigBirdConfig) -> dict[str, Spec]:
    """Embeddings and layers."""
    return text_encoder.encoder_spec(c, partial(text_encoder.block_spec, bias=True if c.use_bias else "o"))


def model_spec(c: BigBirdConfig) -> dict[str, Spec]:
    """The encoder and the pooler, which checkpoints of most heads have though these do not use it."""
    dense = linear_spec("pooler", c.hidden_size, c.hidden_size, ("embed", None), init=normal(c.initializer_range))
    return {**encoder_spec(c), "pooler": optional(dense)}


def sparse_block(p: Any, c: BigBirdConfig, x: jax.Array, keys: Any, drawn: Any, key: Any) -> jax.Array:
    """Post-norm, as BERT's, over the blocks of a text: [B, T, E] -> [B, T, E]. Weights are not dropped."""
    noise = split(key, 2)
    repeats = c.num_random_blocks if drawn is None else 0
    h = sparse_self_attention(p["attn"], x, c.head_dim, block=c.block_size, keys=keys, drawn=drawn, repeats=repeats)
    x = norm.layer(p["attn_norm"], x + dropout(h, c.hidden_dropout_prob, noise[0]), c.layer_norm_eps)
    h = dropout(mlp.dense(p["mlp"], x, c.hidden_act), c.hidden_dropout_prob, noise[1])
    return norm.layer(p["mlp_norm"], x + h, c.layer_norm_eps)


def embeddings(
    p: Any, c: BigBirdConfig, ids: Any, types: Any, positions: Any, vectors: Any, offset: Any, key: Any
) -> jax.Array:
    """Word, segment and position vectors, added: [B, T] -> [B, T, E]."""
    with tap.scope("embed"):
        x = embed.embed(p["word"], ids) if vectors is None else vectors
        x = x * c.hidden_size**0.5 if c.rescale_embeddings else x
        x = x + embed.embed(p["token_type"], jnp.zeros((1, 1), jnp.int32) if types is None else types)
        x = x + embed.embed(p["position"], embed.positions(offset, x) if positions is None else positions)
        return tap.tap("out", norm.layer(p["norm"], dropout(x, c.hidden_dropout_prob, key), c.layer_norm_eps))


def encode(
    p: Any,
    c: BigBirdConfig,
    input_ids: Any = None,
    attention_mask: Any = None,
    token_type_ids: Any = None,
    position_ids: Any = None,
    inputs_embeds: Any = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    cache: Any = None,
    key: Any = None,
) -> Any:
    """Embeddings and all layers: ids [B, T] -> (states [B, T, E], cache).

    Raises:
        ValueError: a cache for an encoder, or a mask of pairs for a text that is read block by block.
    """
    embed.check_inputs(input_ids, inputs_embeds, c.max_position_embeddings)
    if cache is not None and not c.is_decoder:
        raise ValueError("a cache needs is_decoder=True: an encoder's states change with every token that follows")
    k_embed, k_layers = split(key, 2)
    mask = causal_mask(attention_mask, cache) if c.is_decoder else from_attention_mask(attention_mask)
    x = embeddings(p["embed"], c, input_ids, token_type_ids, position_ids, inputs_embeds, mask.q_offset, k_embed)
    layers, t = p.get("layers", ()), x.shape[1]
    if not c.is_sparse(t):
        cross_mask = from_attention_mask(encoder_attention_mask)

        def full(p: Any, x: Any, cache: Any, key: Any) -> Any:
            return text_encoder.block(p, c, x, mask, cross_mask, encoder_hidden_states, cache, key)

        return fold(full, layers, x, cache=cache, key=k_layers)
    if mask.dense is not None:
        raise ValueError(f"texts of {t} tokens are read block by block: attention_mask must be [batch, length]")

    def sparse(p: Any, x: Any, cache: Any, key: Any, drawn: Any = None) -> Any:
        return sparse_block(p, c, x, mask.keys, drawn, key), cache

    blocks = -(-t // c.block_size)
    sizes, drawn = (blocks * c.block_size, c.block_size, c.num_random_blocks), None
    if key is not None:
        which = range(c.num_hidden_layers)
        drawn = tuple(drawn_blocks(*sizes, c.heads_of(i), i, c.max_position_embeddings) for i in which)
    return fold(sparse, layers, x, key=k_layers, data=drawn)


summary, model = text_encoder.summarised(encode), text_encoder.pooled(encode)
masked_lm, causal_lm = heads.masked_lm(encode), heads.causal_lm(encode, heads.words)
sequence_classification = heads.deep_classification(encode, lambda c: c.hidden_act, first="dense")


def pretraining(p: Any, c: BigBirdConfig, input_ids: Any = None, **inputs: Any) -> PreTrainingOutput:
    """Masked words [B, T, V] and next sentence [B, 2]."""
    x, _ = encode(p, c, input_ids, **inputs)
    pair = linear(p["pair"], pool(p, x))
    return PreTrainingOutput(prediction_logits=heads.words(p, c, x), seq_relationship_logits=pair)


def trivia_spec(c: BigBirdConfig) -> dict[str, Spec]:
    """One more feed-forward part with its norm, and a linear map to the first and the last token of an answer."""
    init, names = normal(c.initializer_range), ("intermediate.dense", "output.dense")
    spec = {
        "mlp": mlp.dense_spec(c.hidden_size, c.intermediate_size, names, init=init),
        "norm": norm.layer_spec("output.LayerNorm", c.hidden_size),
        "head": linear_spec("qa_outputs", c.hidden_size, 2, ("embed", None), init=init),
    }
    return {"answer": At("qa_classifier", spec)}


def question_answering(
    p: Any,
    c: BigBirdConfig,
    input_ids: Any = None,
    attention_mask: Any = None,
    question_lengths: Any = None,
    token_type_ids: Any = None,
    position_ids: Any = None,
    inputs_embeds: Any = None,
    key: Any = None,
) -> QuestionAnsweringOutput:
    """Scores of every token as the first and as the last of the answer, as for TriviaQA: two times [B, T].

    The question, `question_lengths` [B, 1] tokens with the separator (what is before the first one among the ids, if
    not given), cannot be the answer, but for the class token; it is the first segment if none are given.
    """
    if question_lengths is None and input_ids is not None:
        question_lengths = jnp.argmax(input_ids == c.sep_token_id, axis=-1, keepdims=True) + 1
    asked = None
    if question_lengths is not None:
        length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        asked = jnp.arange(length) < question_lengths
        token_type_ids = 1 - asked.astype(jnp.int32) if token_type_ids is None else token_type_ids
    given = {"token_type_ids": token_type_ids, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
    x, _ = encode(p, c, input_ids, attention_mask, key=key, **given)
    q, noise = p["answer"], split(None if key is None else fold_path(key, "answer"), 2)
    h = mlp.dense(q["mlp"], dropout(x, c.hidden_dropout_prob, noise[0]), c.hidden_act)
    x = norm.layer(q["norm"], x + dropout(h, c.hidden_dropout_prob, noise[1]), c.layer_norm_eps)
    scores = linear(q["head"], x)
    if asked is not None:
        scores = scores - (asked & (jnp.arange(asked.shape[1]) > 0))[..., None] * jnp.asarray(1e6, scores.dtype)
    return QuestionAnsweringOutput(start_logits=scores[..., 0], end_logits=scores[..., 1])


_spec = partial(heads.with_heads, "bert", model_spec)
_names = ("transform.dense", "transform.LayerNorm", "decoder")
_words = partial(heads.words_spec, "cls.predictions", names=_names)
_pair = heads.linear_head("cls.seq_relationship", 2, key="pair")
_choice, _labels = heads.linear_head("classifier", 1), heads.linear_head("classifier")
# All weights of a text that was read block by block are another place than those of full attention.
_SEEN = {"attentions": ("output_attentions", ("layers.*.attn.weights", "layers.*.attn.table"))}
_architecture = partial(Architecture, collected=_SEEN)

FAMILY = Family(
    "big_bird",
    BigBirdConfig,
    base="bert",
    inputs=encode,
    init_cache=init_cache,
    fills=False,
    relative="bert",
    architectures=(
        _architecture("BigBirdModel", "", model_spec, model, also=("ForTextEncoding",)),
        _architecture("BigBirdForPreTraining", "ForPreTraining", _spec(_words, _pair), pretraining),
        _architecture("BigBirdForMaskedLM", "ForMaskedLM", _spec(_words), masked_lm),
        _architecture("BigBirdForCausalLM", "ForCausalLM", _spec(_words), causal_lm),
        _architecture(
            "BigBirdForSequenceClassification",
            "ForSequenceClassification",
            _spec(heads.deep_head(first="dense")),
            sequence_classification,
        ),
        _architecture("BigBirdForMultipleChoice", "ForMultipleChoice", _spec(_choice), heads.multiple_choice(summary)),
        _architecture(
            "BigBirdForTokenClassification",
            "ForTokenClassification",
            _spec(_labels),
            heads.token_classification(encode),
        ),
        _architecture(
            "BigBirdForQuestionAnswering",
            "ForQuestionAnswering",
            heads.with_heads("bert", encoder_spec, trivia_spec),
            question_answering,
            inputs=question_answering,
        ),
    ),
    flax=Port(
        inputs=(
            *("input_ids", "attention_mask", "token_type_ids", "position_ids", "head_mask", "question_lengths"),
            *("encoder_hidden_states", "encoder_attention_mask"),
        )
    ),
)
