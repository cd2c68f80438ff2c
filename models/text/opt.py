"""OPT: a decoder of BART's layers, GPT-3's sizes, and positions that padding has no part in.

Zhang et al. 2022, arXiv:2205.01068; original code facebookresearch/metaseq, whose position tables have two rows more
than positions, as fairseq's. Norms are before the parts of a layer, but in the model of 350 million parameters behind
them; this one also has words of half the width of its states, which are projected on the way in and out.
"""

from typing import Any, ClassVar

import numpy as np

from formax.core import tap
from formax.core.config import Config, check_multiple, config
from formax.core.family import Architecture, Family, Port
from formax.core.rng import split
from formax.core.spec import At, Spec, fold, normal, stack_of, under
from formax.layers import decoder, embed, heads, mlp, norm
from formax.layers.activations import check_activation
from formax.layers.attention import attention_spec, causal_mask, self_attention
from formax.layers.dropout import layer_drop
from formax.layers.linear import linear, linear_spec
from formax.layers.transformer import EPS, post_norm, pre_norm

OFFSET = 2  # the position table's first rows are not positions, but the second is that of padding
PLAIN = {"scale": np.float32(1), "bias": np.float32(0)}  # a norm without parameters


@config
class OPTConfig(Config):
    """`config.json` of model type "opt"."""

    model_type: ClassVar[str] = "opt"
    attribute_map: ClassVar = {"initializer_range": "init_std"}

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    ffn_dim: int = 3072
    max_position_embeddings: int = 2048
    do_layer_norm_before: bool = True
    _remove_final_layer_norm: bool = False  # of files that were fine-tuned when the reference had forgotten it
    word_embed_proj_dim: int | None = None
    dropout: float = 0.1
    attention_dropout: float = 0.0
    num_attention_heads: int = 12
    activation_function: str = "relu"
    layerdrop: float = 0.0
    init_std: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 2
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True

    def check(self) -> None:
        check_multiple(self, "hidden_size", "num_attention_heads")
        check_activation(self.activation_function, "activation_function")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def states_size(self) -> int:
        """Width of words, and of the states that heads read."""
        return self.word_embed_proj_dim or self.hidden_size

    @property
    def last_norm(self) -> bool:
        """Whether a norm comes after the last layer."""
        return self.do_layer_norm_before and not self._remove_final_layer_norm


def block_spec(c: OPTConfig) -> dict[str, Spec]:
    """One layer."""
    init, names = normal(c.init_std), ("q_proj", "k_proj", "v_proj", "out_proj")
    shared: dict[str, Any] = {"init": init, "bias": c.enable_bias}
    attn = attention_spec(c.hidden_size, c.num_attention_heads, c.head_dim, names=names, **shared)
    spec: dict[str, Spec] = {
        "attn": At("self_attn", attn),
        "mlp": mlp.dense_spec(c.hidden_size, c.ffn_dim, ("fc1", "fc2"), **shared),
    }
    if c.layer_norm_elementwise_affine:
        spec["attn_norm"] = norm.layer_spec("self_attn_layer_norm", c.hidden_size)
        spec["mlp_norm"] = norm.layer_spec("final_layer_norm", c.hidden_size)
    return spec


def block(p: Any, c: OPTConfig, x: Any, mask: Any, cache: Any, key: Any) -> Any:
    """Attention and a network, with norms before or behind them: [B, T, E] -> ([B, T, E], cache)."""
    keys, around = split(key, 4), pre_norm if c.do_layer_norm_before else post_norm

    def own(x: Any) -> Any:
        how = {"mask": mask, "cache": cache, "dropout": c.attention_dropout, "key": keys[0]}
        return self_attention(p["attn"], x, c.head_dim, **how)

    def think(x: Any) -> Any:
        return mlp.dense(p["mlp"], x, c.activation_function), None

    y, cache = around(p.get("attn_norm", PLAIN), x, own, c.dropout, keys[1])
    y, _ = around(p.get("mlp_norm", PLAIN), y, think, c.dropout, keys[2])
    return layer_drop(x, y, c.layerdrop, keys[3]), cache


def model_spec(c: OPTConfig) -> dict[str, Spec]:
    """Words, positions, layers, and where they exist the last norm and the projections of words."""
    init, size, words = normal(c.init_std), c.hidden_size, c.states_size
    rows = c.max_position_embeddings + OFFSET
    position = embed.embedding_spec("embed_positions", rows, size, init=init, axes=(None, "embed"))
    spec: dict[str, Spec] = {
        "embed": {
            "word": embed.embedding_spec("embed_tokens", c.vocab_size, words, init=init, tf="weight"),
            "position": position,
        },
        "layers": stack_of("layers", [block_spec(c)] * c.num_hidden_layers),
    }
    if c.last_norm and c.layer_norm_elementwise_affine:
        spec["norm"] = norm.layer_spec("final_layer_norm", size)
    if words != size:
        spec["in"] = linear_spec("project_in", words, size, (None, "embed"), init=init, bias=False)
        spec["out"] = linear_spec("project_out", size, words, ("embed", None), init=init, bias=False)
    return under("decoder", spec)


def decode(
    p: Any,
    c: OPTConfig,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    inputs_embeds: Any = None,
    cache: Any = None,
    key: Any = None,
) -> Any:
    """Embeddings, all layers and what comes after them: ids [B, T] -> (states [B, T, states_size], cache)."""
    embed.check_inputs(input_ids, inputs_embeds, c.max_position_embeddings)
    mask = causal_mask(attention_mask, cache)
    with tap.scope("embed"):
        x = embed.embed(p["embed"]["word"], input_ids) if inputs_embeds is None else inputs_embeds
        positions = embed.positions_of_tokens(mask.keys, mask.q_offset, x) if position_ids is None else position_ids
        x = linear(p["in"], x) if "in" in p else x
        x = tap.tap("out", x + embed.embed(p["embed"]["position"], OFFSET + positions))

    def run(p: Any, x: Any, cache: Any, key: Any) -> Any:
        return block(p, c, x, mask, cache, key)

    x, cache = fold(run, p.get("layers", ()), x, cache=cache, key=split(key, 1)[0])
    x = norm.layer(p.get("norm", PLAIN), x, EPS) if c.last_norm else x
    return tap.tap("last", linear(p["out"], x) if "out" in p else x), cache


def _lacks(c: OPTConfig) -> dict[str, bool]:
    return {"enable_bias": not c.enable_bias, "layer_norm_elementwise_affine": not c.layer_norm_elementwise_affine}


_words, _text, _, _span = heads.decoder_heads("OPT", "model", model_spec, decode)

FAMILY = Family(
    "opt",
    OPTConfig,
    base="model",
    inputs=decode,
    relative="bart",
    init_cache=decoder.own_caches,
    architectures=(Architecture("OPTModel", "", model_spec, heads.bare(decode)), _words, _text, _span),
    flax=Port(("OPTModel", "OPTForCausalLM"), lacks=_lacks),
    tf=Port(("OPTModel", "OPTForCausalLM"), numbered=".", lacks=_lacks),
)
