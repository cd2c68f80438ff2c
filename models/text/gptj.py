"""GPT-J: GPT-2 with rotary positions, whose attention and feed-forward network read the same normalised states.

Wang and Komatsuzaki 2021; original code kingoflolz/mesh-transformer-jax. Positions turn neighbouring channels together
(Llama turns those of the two halves of a head), and only the first `rotary_dim` of each head. The head for words has a
table and a bias of its own.
"""

from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from formax.core import tap
from formax.core.config import Config, ConfigError, check_multiple, config
from formax.core.family import Architecture, Family, Port
from formax.core.rng import split
from formax.core.spec import At, Ignored, Spec, fold, normal, stack_of
from formax.layers import decoder, embed, heads, mlp, norm, rope
from formax.layers.activations import check_activation
from formax.layers.attention import attention_spec, causal_mask, self_attention
from formax.layers.dropout import dropout

ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@config
class GPTJConfig(Config):
    """`config.json` of model type "gptj"."""

    model_type: ClassVar[str] = "gptj"
    attribute_map: ClassVar = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    vocab_size: int = 50400
    n_positions: int = 2048
    n_embd: int = 4096
    n_layer: int = 28
    n_head: int = 16
    rotary_dim: int = 64
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256
    tie_word_embeddings: bool = False

    def check(self) -> None:
        check_multiple(self, "n_embd", "n_head")
        check_activation(self.activation_function, "activation_function")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ConfigError(
                f"rotary_dim={self.rotary_dim} must be even, and from 2 to a head's size, {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


def block_spec(c: GPTJConfig) -> dict[str, Spec]:
    """One layer."""
    init, inner = normal(c.initializer_range), 4 * c.n_embd if c.n_inner is None else c.n_inner
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    attn = attention_spec(c.n_embd, c.n_head, c.head_dim, names=names, init=init, bias=False)
    masks: dict[str, Spec] = {"bias": Ignored("bias"), "masked_bias": Ignored("masked_bias")}  # until 2023
    return {
        "norm": norm.layer_spec("ln_1", c.n_embd),
        "attn": At("attn", attn | masks),
        "mlp": At("mlp", mlp.dense_spec(c.n_embd, inner, ("fc_in", "fc_out"), init=init)),
    }


def block(p: Any, c: GPTJConfig, x: Any, rotate: Any, mask: Any, cache: Any, key: Any) -> Any:
    """Attention and network side by side, both of the normalised input: [B, T, E] -> ([B, T, E], cache)."""
    keys = split(key, 3)
    y = norm.layer(p["norm"], x, c.layer_norm_epsilon)
    own = {"mask": mask, "rotate": rotate, "cache": cache, "dropout": c.attn_pdrop, "key": keys[0]}
    h, cache = self_attention(p["attn"], y, c.head_dim, **own)
    thought = dropout(mlp.dense(p["mlp"], y, c.activation_function), c.resid_pdrop, keys[2])
    return x + dropout(h, c.resid_pdrop, keys[1]) + thought, cache


def model_spec(c: GPTJConfig) -> dict[str, Spec]:
    """Words, layers and the last norm."""
    return {
        "embed": {
            "word": embed.embedding_spec("wte", c.vocab_size, c.n_embd, init=normal(c.initializer_range), tf="weight")
        },
        "layers": stack_of("h", [block_spec(c)] * c.n_layer),
        "norm": norm.layer_spec("ln_f", c.n_embd),
    }


def decode(
    p: Any,
    c: GPTJConfig,
    input_ids: Any = None,
    attention_mask: Any = None,
    token_type_ids: Any = None,
    position_ids: Any = None,
    inputs_embeds: Any = None,
    cache: Any = None,
    key: Any = None,
) -> Any:
    """Embeddings, all layers and the last norm: ids [B, T] -> (states [B, T, E], cache)."""
    embed.check_inputs(input_ids, inputs_embeds, c.n_positions)
    k_embed, k_layers = split(key, 2)
    mask = causal_mask(attention_mask, cache)
    with tap.scope("embed"):
        x = embed.embed(p["embed"]["word"], input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is not None:  # speakers are words here
            x = x + embed.embed(p["embed"]["word"], token_type_ids)
        x = tap.tap("out", dropout(x, c.embd_pdrop, k_embed))
    positions = embed.positions(mask.q_offset, x) if position_ids is None else position_ids
    cos, sin = rope.cos_sin(ROPE, c.rotary_dim, c.n_positions, positions)
    rotate = partial(rope.rotate_neighbours, cos=cos, sin=sin)

    def run(p: Any, x: Any, cache: Any, key: Any) -> Any:
        return block(p, c, x, rotate, mask, cache, key)

    x, cache = fold(run, p.get("layers", ()), x, cache=cache, key=k_layers)
    return tap.tap("last", norm.layer(p["norm"], x, c.layer_norm_epsilon)), cache


def _lacks(c: GPTJConfig) -> dict[str, bool]:
    return {"tie_word_embeddings": c.tie_word_embeddings}


words_spec = heads.with_heads("transformer", model_spec, heads.lm_head(bias=True, tf=None))
_words, _text, _, _span = heads.decoder_heads("GPTJ", "transformer", model_spec, decode)

FAMILY = Family(
    "gptj",
    GPTJConfig,
    base="transformer",
    inputs=decode,
    relative="gpt2",
    init_cache=decoder.own_caches,
    architectures=(
        Architecture("GPTJModel", "", model_spec, heads.bare(decode)),
        replace(_words, spec=words_spec),
        _text,
        _span,
    ),
    flax=Port(("GPTJModel", "GPTJForCausalLM"), inputs=("input_ids", "attention_mask", "position_ids"), lacks=_lacks),
    tf=Port(lacks=_lacks),
)
