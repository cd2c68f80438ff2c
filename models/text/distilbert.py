"""DistilBERT: half of BERT's layers, taught by BERT; without segments and without a pooler.

Sanh et al. 2019, arXiv:1910.01108; original code huggingface/transformers. The blocks are BERT's, though attention's
output goes without dropout; texts and choices are classified from the first token's state by two linear maps with a
ReLU between, and the rates of dropout differ by head.
"""

from functools import partial
from typing import Any, ClassVar

import jax

from formax.core import tap
from formax.core.config import Config, check_multiple, config
from formax.core.family import Architecture, Family, Port
from formax.core.outputs import BaseModelOutput
from formax.core.rng import fold_path, split
from formax.core.spec import At, Ignored, Spec, fold, normal, stack_of
from formax.layers import embed, heads, mlp, norm
from formax.layers.activations import check_activation
from formax.layers.attention import attention_spec, from_attention_mask, self_attention
from formax.layers.dropout import dropout
from formax.layers.linear import linear, linear_spec

EPS = 1e-12  # of all norms


@config
class DistilBertConfig(Config):
    """`config.json` of model type "distilbert"."""

    model_type: ClassVar[str] = "distilbert"
    attribute_map: ClassVar = {
        "hidden_size": "dim",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    }

    vocab_size: int = 30522
    max_position_embeddings: int = 512
    sinusoidal_pos_embds: bool = False
    n_layers: int = 6
    n_heads: int = 12
    dim: int = 768
    hidden_dim: int = 4 * 768
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation: str = "gelu"
    initializer_range: float = 0.02
    qa_dropout: float = 0.1
    seq_classif_dropout: float = 0.2
    pad_token_id: int | None = 0

    def check(self) -> None:
        check_multiple(self, "dim", "n_heads")
        check_activation(self.activation, "activation")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def layer_norm_eps(self) -> float:
        return EPS

    @property
    def hidden_dropout_prob(self) -> float:
        return self.dropout


def block_spec(c: DistilBertConfig, layer: int) -> dict[str, Spec]:
    """One layer."""
    names, init = ("q_lin", "k_lin", "v_lin", "out_lin"), normal(c.initializer_range)
    count = c.n_heads - len(c.pruned_heads.get(layer, ()))
    return {
        "attn": At("attention", attention_spec(c.dim, count, c.head_dim, names=names, init=init)),
        "attn_norm": norm.layer_spec("sa_layer_norm", c.dim),
        "mlp": At("ffn", mlp.dense_spec(c.dim, c.hidden_dim, ("lin1", "lin2"), init=init)),
        "mlp_norm": norm.layer_spec("output_layer_norm", c.dim),
    }


def block(p: Any, c: DistilBertConfig, x: Any, mask: Any, key: Any) -> jax.Array:
    """Post-norm: what each part computes is added to its input, then normalised. [B, T, E] -> [B, T, E]."""
    k_attn, k_mlp = split(key, 2)
    h, _ = self_attention(p["attn"], x, c.head_dim, mask=mask, dropout=c.attention_dropout, key=k_attn)
    x = norm.layer(p["attn_norm"], x + h, EPS)
    h = dropout(mlp.dense(p["mlp"], x, c.activation), c.dropout, k_mlp)
    return norm.layer(p["mlp_norm"], x + h, EPS)


def model_spec(c: DistilBertConfig) -> dict[str, Spec]:
    """Embeddings and layers; sinusoidal positions are a table as learned ones are, which begins as sines."""
    init = normal(c.initializer_range)
    table = partial(embed.embedding_spec, size=c.dim)
    embeddings = {
        "word": table("word_embeddings", c.vocab_size, init=init, tf="weight"),
        "position": table(
            "position_embeddings",
            c.max_position_embeddings,
            init=embed.vaswani_in_pairs if c.sinusoidal_pos_embds else init,
            axes=(None, "embed"),
        ),
        "norm": norm.layer_spec("LayerNorm", c.dim),
        "position_ids": Ignored("position_ids"),
    }
    layers = [block_spec(c, i) for i in range(c.n_layers)]
    return {"embed": At("embeddings", embeddings), "layers": stack_of("transformer.layer", layers)}


def encode(
    p: Any,
    c: DistilBertConfig,
    input_ids: Any = None,
    attention_mask: Any = None,
    inputs_embeds: Any = None,
    key: Any = None,
) -> Any:
    """Embeddings and all layers: ids [B, T] -> (states [B, T, E], None)."""
    embed.check_inputs(input_ids, inputs_embeds, c.max_position_embeddings)
    k_embed, k_layers = split(key, 2)
    mask = from_attention_mask(attention_mask)
    with tap.scope("embed"):
        x = embed.embed(p["embed"]["word"], input_ids) if inputs_embeds is None else inputs_embeds
        x = x + embed.embed(p["embed"]["position"], embed.positions(0, x))
        x = tap.tap("out", dropout(norm.layer(p["embed"]["norm"], x, EPS), c.dropout, k_embed))

    def run(p: Any, x: Any, cache: Any, key: Any) -> Any:
        return block(p, c, x, mask, key), None

    return fold(run, p.get("layers", ()), x, key=k_layers)


def model(p: Any, c: DistilBertConfig, input_ids: Any = None, **inputs: Any) -> BaseModelOutput:
    """States [B, T, E]."""
    return BaseModelOutput(last_hidden_state=encode(p, c, input_ids, **inputs)[0])


def words(p: Any, c: DistilBertConfig, x: jax.Array) -> jax.Array:
    """Scores of all words [B, T, V]."""
    return heads.words(p, c, x, c.activation)


def summary(p: Any, c: DistilBertConfig, input_ids: Any = None, **inputs: Any) -> jax.Array:
    """A vector for every text, from its first token: ids [B, T] -> [B, E]."""
    x, _ = encode(p, c, input_ids, **inputs)
    return tap.tap("pooler", jax.nn.relu(linear(p["pooler"], x[:, 0])))


def encode_answers(p: Any, c: DistilBertConfig, input_ids: Any = None, key: Any = None, **inputs: Any) -> Any:
    """`encode` and the dropout of the head for answers."""
    x, _ = encode(p, c, input_ids, key=key, **inputs)
    return dropout(x, c.qa_dropout, None if key is None else fold_path(key, "head")), None


def _text_rate(c: DistilBertConfig) -> float:
    return c.seq_classif_dropout


def _first(c: DistilBertConfig) -> dict[str, Spec]:
    init = normal(c.initializer_range)
    return {"pooler": linear_spec("pre_classifier", c.dim, c.dim, ("embed", None), init=init)}


_plain = partial(heads.with_heads, "distilbert", model_spec)
_names = ("vocab_transform", "vocab_layer_norm", "vocab_projector")
_words = partial(heads.words_spec, "", names=_names, bias="vocab_projector.bias")
_labels, _score = heads.linear_head("classifier"), heads.linear_head("classifier", 1)
_HEADS: dict[str, tuple[Any, Any]] = {
    "ForMaskedLM": (_plain(_words), heads.masked_lm(encode, words)),
    "ForSequenceClassification": (_plain(_first, _labels), heads.sequence_classification(summary, _text_rate)),
    "ForMultipleChoice": (_plain(_first, _score), heads.multiple_choice(summary, _text_rate)),
    "ForTokenClassification": (_plain(_labels), heads.token_classification(encode)),
    "ForQuestionAnswering": (_plain(heads.linear_head("qa_outputs")), heads.question_answering(encode_answers)),
}
_also = {"ForMaskedLM": ("ForPreTraining",)}

FAMILY = Family(
    "distilbert",
    DistilBertConfig,
    base="distilbert",
    inputs=encode,
    relative="bert",
    architectures=(
        Architecture("DistilBertModel", "", model_spec, model, also=("ForTextEncoding",)),
        *(
            Architecture(f"DistilBert{task}", task, spec, apply, also=_also.get(task, ()))
            for task, (spec, apply) in _HEADS.items()
        ),
    ),
    flax=Port(
        inputs=("input_ids", "attention_mask", "head_mask"),
        # There the sines are computed, and are no table.
        lacks=lambda c: {"sinusoidal_pos_embds": c.sinusoidal_pos_embds},
    ),
    tf=Port(repeats={"vocab_projector": "distilbert/embeddings/"}),
)
