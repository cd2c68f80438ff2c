"""T5: an encoder-decoder without absolute positions, whose every task is text in, text out.

Raffel et al. 2019, arXiv:1910.10683; original code google-research/text-to-text-transfer-transformer. Pre-norm blocks
with RMS norms and no biases; scores are not scaled, and a bias by bucketed distance, one table a stack, is added to
them. T5 1.1 and Flan-T5 (Shazeer 2020, arXiv:2002.05202) have gated feed-forward networks and a head of their own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax

from formax.core.config import Config, ConfigError, config
from formax.core.family import Architecture, Family, Port
from formax.core.outputs import LogitsOutput
from formax.core.spec import Spec, Tied, normal, optional
from formax.layers import heads, seq2seq, seq2seq_heads, text_to_text
from formax.layers.activations import check_activation
from formax.layers.linear import linear_spec

Specs = Callable[[Any], dict[str, Spec]]
Tasks = tuple[str, ...]


@config
class T5Config(Config):
    """`config.json` of model type "t5"."""

    model_type: ClassVar[str] = "t5"
    attribute_map: ClassVar = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    }

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    is_encoder_decoder: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    classifier_dropout: float = 0.0

    def check(self) -> None:
        try:
            check_activation(self.activation, "feed_forward_proj")
        except ValueError:
            raise ConfigError(
                f'feed_forward_proj={self.feed_forward_proj!r} is no activation and no "gated-" one'
            ) from None
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 2:
            raise ConfigError(
                f"relative_attention_max_distance={self.relative_attention_max_distance} must be more than half of "
                f"relative_attention_num_buckets={self.relative_attention_num_buckets}"
            )

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward networks are gated; where a file says so beside `feed_forward_proj`, it counts."""
        return self.extra.get("is_gated_act", self.feed_forward_proj.startswith("gated-"))

    @property
    def activation(self) -> str:
        """The activation of the feed-forward networks; "gated-gelu" was trained with the tanh form."""
        plain = self.feed_forward_proj.removeprefix("gated-")
        return self.extra.get("dense_act_fn", "gelu_new" if self.feed_forward_proj == "gated-gelu" else plain)


encode = text_to_text.text_encoder(text_to_text.bucketed)
decode = text_to_text.text_decoder(text_to_text.bucketed)


# --- heads


def _linear(name: str, c: Any, *, std: float) -> dict[str, Spec]:
    init = normal(c.initializer_factor * std)
    return {"head": optional(linear_spec(name, c.d_model, c.num_labels, ("embed", None), init=init))}


def _words_head(c: Any) -> dict[str, Spec]:
    """A head for words: the table again, or one of its own."""
    init = normal(c.initializer_factor)
    own = optional(linear_spec("lm_head", c.d_model, c.vocab_size, ("embed", "vocab"), init=init, bias=False))
    return {"head": Tied("lm_head.weight", "embed.word.embedding") if c.tie_word_embeddings else own}


def _labels_head(c: Any) -> dict[str, Spec]:
    init = normal(c.initializer_factor * c.d_model**-0.5)
    return seq2seq_heads.labels_spec(c.d_model, c.num_labels, init=init)


def _spans_head(c: Any) -> dict[str, Spec]:
    return _linear("qa_outputs", c, std=c.d_model**-0.5)


def _words(p: Any, c: Any, x: jax.Array) -> jax.Array:
    # The table's rows are as long as the states are wide, which a head of its own need not undo.
    return heads.lm_logits(p, x * c.d_model**-0.5 if c.tie_word_embeddings else x)


def word_heads(
    name: str, encoder_spec: Specs, model_spec: Specs, encode: Any, decode: Any, *, also: Tasks = (), **more: Any
) -> tuple[Architecture, ...]:
    """The bare model, the one that writes and the encoder alone, whose class names begin with `name`.

    `also` are further tasks of the second, `more` is what else is to be said of all.
    """
    run, both = seq2seq.both(encode, decode), {"methods": {"encode": encode}, **more}
    words_spec, words = heads.with_heads("", model_spec, _words_head), seq2seq_heads.conditional_generation(run, _words)
    return (
        Architecture(f"{name}Model", "", model_spec, run, **both),
        Architecture(f"{name}ForConditionalGeneration", "ForSeq2SeqLM", words_spec, words, also=also, **both),
        Architecture(f"{name}EncoderModel", "ForTextEncoding", encoder_spec, encode, inputs=encode, **more),
    )


def label_heads(
    name: str, encoder_spec: Specs, model_spec: Specs, encode: Any, decode: Any
) -> tuple[Architecture, ...]:
    """Labels for texts and spans by the decoder, which reads the text again, and for tokens by the encoder alone."""

    def tokens(p: Any, c: Any, input_ids: Any = None, key: Any = None, **inputs: Any) -> LogitsOutput:
        x = encode(p, c, input_ids, key=key, **inputs).last_hidden_state
        return LogitsOutput(logits=heads.classify(p, c, x, key))

    run = seq2seq.both(encode, decode, shifted=seq2seq.after_start)
    texts_spec, spans_spec = (
        heads.with_heads("transformer", model_spec, _labels_head),
        heads.with_heads("", model_spec, _spans_head),
    )
    tokens_spec = heads.with_heads("transformer", encoder_spec, partial(_linear, "classifier", std=1.0))
    texts, spans = seq2seq_heads.sequence_classification(run), seq2seq_heads.question_answering(run)
    more: dict[str, Any] = {"methods": {"encode": encode}}
    return (
        Architecture(f"{name}ForSequenceClassification", "ForSequenceClassification", texts_spec, texts, **more),
        Architecture(f"{name}ForTokenClassification", "ForTokenClassification", tokens_spec, tokens, inputs=encode),
        Architecture(f"{name}ForQuestionAnswering", "ForQuestionAnswering", spans_spec, spans, **more),
    )


_parts: tuple[Any, ...] = (text_to_text.encoder_spec, text_to_text.model_spec, encode, decode)


def family(name: str, kind: type[T5Config], *, also: Tasks = (), **more: Any) -> Family:
    """A family that is T5 with another configuration; class names begin with `name`, `also` is for `word_heads`."""
    ported = (f"{name}Model", f"{name}ForConditionalGeneration", f"{name}EncoderModel")
    return Family(
        kind.model_type,
        kind,
        base="transformer",
        inputs=seq2seq.both(encode, decode),
        init_cache=text_to_text.init_cache,
        architectures=(*word_heads(name, *_parts, also=also), *label_heads(name, *_parts)),
        flax=Port(ported),
        tf=Port(ported, base="", repeats={"encoder": "shared/", "decoder": "shared/"}),
        **more,
    )


_OLD = {"T5WithLMHeadModel": "T5ForConditionalGeneration"}
FAMILY = family("T5", T5Config, also=("ForPreTraining",), old_names=_OLD)
