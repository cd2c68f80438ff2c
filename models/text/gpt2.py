"""GPT-2: a decoder with pre-norm blocks, learned positions, and the word table as its head.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; original code openai/gpt-2, whose kernels
are stored (in, out) with q, k and v in one. The blocks are the original Transformer's with the norms moved to the
inputs; `scale_attn_by_inverse_layer_idx` is Mistral's (stanford-crfm/mistral) against overflow in half precision.
"""

from functools import partial
from typing import Any, ClassVar

import jax

from formax.core import tap
from formax.core.config import Config, check_multiple, config
from formax.core.family import Architecture, Family, Port
from formax.core.layout import SAME
from formax.core.rng import split
from formax.core.spec import At, Ignored, Spec, fold, normal, stack_of
from formax.layers import embed, heads, mlp, norm, seq2seq
from formax.layers.activations import check_activation
from formax.layers.attention import causal_mask, cross_attention, from_attention_mask, self_attention
from formax.layers.dropout import dropout
from formax.layers.linear import fused_spec, linear_spec


@config
class GPT2Config(Config):
    """`config.json` of model type "gpt2"."""

    model_type: ClassVar[str] = "gpt2"
    attribute_map: ClassVar = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    implemented: ClassVar = {"summary_type": ("cls_index", "last", "first", "mean")}

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    summary_type: str = "cls_index"
    summary_use_proj: bool = True
    summary_activation: str | None = None
    summary_proj_to_labels: bool = True
    summary_first_dropout: float = 0.1
    scale_attn_weights: bool = True
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False  # an order of operations against overflow: scores are float32 here anyway

    def check(self) -> None:
        check_multiple(self, "n_embd", "n_head")
        check_activation(self.activation_function, "activation_function")
        if self.summary_activation is not None:
            check_activation(self.summary_activation, "summary_activation")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    def heads_of(self, layer: int) -> int:
        """Attention heads that are left in a layer."""
        return self.n_head - len(self.pruned_heads.get(layer, ()))

    def scale_of(self, layer: int) -> float:
        """Factor on a layer's attention scores."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale


def block_spec(c: GPT2Config, layer: int) -> dict[str, Spec]:
    """One layer."""
    init, out_init = normal(c.initializer_range), normal(c.initializer_range / (2 * c.n_layer) ** 0.5)

    def out(width: int) -> Spec:
        return linear_spec("c_proj", width, c.n_embd, ("heads", "embed"), init=out_init, layout=SAME)

    fused = partial(fused_spec, "c_attn", c.n_embd, init=init, layout=SAME)
    own = c.heads_of(layer) * c.head_dim
    attn = fused({"q": (own, "heads"), "k": (own, "kv_heads"), "v": (own, "kv_heads")}) | {"o": out(own)}
    masks: dict[str, Spec] = {
        "bias": Ignored("bias"),
        "masked_bias": Ignored("masked_bias"),
    }  # causal masks, until 2023
    inner = 4 * c.n_embd if c.n_inner is None else c.n_inner
    spec: dict[str, Spec] = {
        "attn_norm": norm.layer_spec("ln_1", c.n_embd),
        "attn": At("attn", attn | masks),
        "mlp_norm": norm.layer_spec("ln_2", c.n_embd),
        "mlp": At(
            "mlp", mlp.dense_spec(c.n_embd, inner, ("c_fc", "c_proj"), init=init, out_init=out_init, layout=SAME)
        ),
    }
    if c.add_cross_attention:
        query = linear_spec("q_attn", c.n_embd, c.n_embd, ("embed", "heads"), init=init, layout=SAME)
        cross = fused({"k": (c.n_embd, "kv_heads"), "v": (c.n_embd, "kv_heads")}) | {"q": query, "o": out(c.n_embd)}
        spec["cross_norm"] = norm.layer_spec("ln_cross_attn", c.n_embd)
        spec["cross"] = At("crossattention", cross | masks)
    return spec


def block(
    p: Any, c: GPT2Config, x: Any, scale: Any, mask: Any, cross_mask: Any, memory: Any, cache: Any, key: Any
) -> Any:
    """Pre-norm: each part sees its input normalised, and adds to it. [B, T, E] -> ([B, T, E], cache)."""
    keys = split(key, 5)
    cache = cache or {"attn": None, "cross": None}
    shared = {"scale": scale, "dropout": c.attn_pdrop}

    def read(name: str) -> jax.Array:
        return norm.layer(p[name], x, c.layer_norm_epsilon)

    h, attn = self_attention(
        p["attn"], read("attn_norm"), c.head_dim, mask=mask, cache=cache["attn"], key=keys[0], **shared
    )
    x = x + dropout(h, c.resid_pdrop, keys[1])
    cross = cache["cross"]
    if "cross" in p and (memory is not None or cross is not None):
        h, cross = cross_attention(
            p["cross"], read("cross_norm"), memory, c.head_dim, mask=cross_mask, cache=cross, key=keys[2], **shared
        )
        x = x + dropout(h, c.resid_pdrop, keys[3])
    h = mlp.dense(p["mlp"], read("mlp_norm"), c.activation_function)
    return x + dropout(h, c.resid_pdrop, keys[4]), {"attn": attn, "cross": cross}


def model_spec(c: GPT2Config) -> dict[str, Spec]:
    """Words, positions, layers and the last norm."""
    table = partial(embed.embedding_spec, size=c.n_embd, init=normal(c.initializer_range))
    return {
        "embed": {"word": table("wte", c.vocab_size), "position": table("wpe", c.n_positions, axes=(None, "embed"))},
        "layers": stack_of("h", [block_spec(c, i) for i in range(c.n_layer)]),
        "norm": norm.layer_spec("ln_f", c.n_embd),
    }


def embeddings(
    p: Any, input_ids: Any, token_type_ids: Any, position_ids: Any, vectors: Any, offset: Any, rate: float, key: Any
) -> jax.Array:
    """Vectors of words, positions and, if they are told, speakers, added: ids [B, T] -> [B, T, E]."""
    with tap.scope("embed"):
        x = embed.embed(p["embed"]["word"], input_ids) if vectors is None else vectors
        positions = embed.positions(offset, x) if position_ids is None else position_ids
        x = x + embed.embed(p["embed"]["position"], positions)
        if token_type_ids is not None:  # speakers are words here
            x = x + embed.embed(p["embed"]["word"], token_type_ids)
        return tap.tap("out", dropout(x, rate, key))


def decode(
    p: Any,
    c: GPT2Config,
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
    """Embeddings, all layers and the last norm: ids [B, T] -> (states [B, T, E], cache)."""
    embed.check_inputs(input_ids, inputs_embeds, c.n_positions)
    k_embed, k_layers = split(key, 2)
    mask, cross_mask = causal_mask(attention_mask, cache), from_attention_mask(encoder_attention_mask)
    ids = input_ids, token_type_ids, position_ids, inputs_embeds
    x = embeddings(p, *ids, mask.q_offset, c.embd_pdrop, k_embed)

    def run(p: Any, x: Any, cache: Any, key: Any, scale: Any) -> Any:
        return block(p, c, x, scale, mask, cross_mask, encoder_hidden_states, cache, key)

    scales = tuple(map(c.scale_of, range(c.n_layer)))
    x, cache = fold(run, p.get("layers", ()), x, cache=cache, key=k_layers, data=scales)
    return tap.tap("last", norm.layer(p["norm"], x, c.layer_norm_epsilon)), cache


model = heads.bare(decode)


def init_cache(c: GPT2Config, batch: int, length: int, encoder_length: int, dtype: Any) -> Any:
    """Empty caches of all layers, with room for `length` positions and an encoder's `encoder_length` states."""
    counts = list(map(c.heads_of, range(c.n_layer)))
    sizes = {"head_dim": c.head_dim, "cross_heads": c.n_head}
    return seq2seq.caches(counts, batch, length, encoder_length or None, dtype, **sizes)


FAMILY = Family(
    "gpt2",
    GPT2Config,
    base="transformer",
    inputs=decode,
    init_cache=init_cache,
    architectures=(
        Architecture("GPT2Model", "", model_spec, model),
        *heads.decoder_heads("GPT2", "transformer", model_spec, decode, lm="LMHeadModel", token="classifier"),
        heads.double_heads("GPT2DoubleHeadsModel", "transformer", model_spec, decode),
    ),
    flax=Port(
        ("GPT2Model", "GPT2LMHeadModel"),
        inputs=("input_ids", "attention_mask", "position_ids", "encoder_hidden_states", "encoder_attention_mask"),
    ),
    tf=Port(("GPT2Model", "GPT2LMHeadModel", "GPT2DoubleHeadsModel", "GPT2ForSequenceClassification")),
)
