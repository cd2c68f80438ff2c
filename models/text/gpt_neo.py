"""GPT-Neo: GPT-2 whose every other layer looks at the last 256 positions alone.

Black et al. 2021, doi:10.5281/zenodo.5297715; original code EleutherAI/gpt-neo. Beside GPT-2: kernels of their own for
q, k and v, stored (out, in) and without biases, and scores that are not divided by the root of a head's size (the
initial values were, in the original code).
"""

from functools import partial
from typing import Any, ClassVar

from formax.core import tap
from formax.core.config import Config, ConfigError, check_multiple, config
from formax.core.family import Architecture, Family, Port
from formax.core.rng import split
from formax.core.spec import At, Ignored, Spec, Static, fold, normal, stack_of
from formax.layers import decoder, embed, heads, mlp, norm
from formax.layers.activations import check_activation
from formax.layers.attention import Mask, attention_spec, causal_mask, self_attention
from formax.layers.dropout import dropout
from formax.models.text.gpt2 import embeddings

KINDS = ("global", "local")


@config
class GPTNeoConfig(Config):
    """`config.json` of model type "gpt_neo"."""

    model_type: ClassVar[str] = "gpt_neo"
    attribute_map: ClassVar = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}

    vocab_size: int = 50257
    max_position_embeddings: int = 2048
    hidden_size: int = 2048
    num_layers: int = 24
    attention_types: tuple[Any, ...] = ((KINDS, 12),)  # kinds in their order, and how many times
    attention_layers: tuple[str, ...] | None = None  # the kind of every layer, which files state as well
    num_heads: int = 16
    intermediate_size: int | None = None
    window_size: int = 256
    activation_function: str = "gelu_new"
    resid_dropout: float = 0.0
    embed_dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256

    def check(self) -> None:
        check_multiple(self, "hidden_size", "num_heads")
        check_activation(self.activation_function, "activation_function")
        if len(self.kinds) != self.num_layers or not set(self.kinds) <= {*KINDS}:
            raise ConfigError(
                f"attention_types={self.attention_types!r}, attention_layers={self.attention_layers!r} must be about "
                f"num_layers={self.num_layers} layers, each {' or '.join(KINDS)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """With the kind of every layer, which the reference would otherwise read as null."""
        return {**super().to_dict(), "attention_layers": list(self.kinds)}

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every layer's attention."""
        if self.attention_layers is not None:
            return self.attention_layers
        return tuple(kind for kinds, times in self.attention_types for kind in (*kinds,) * times)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def sliding_window(self) -> int:
        """The window of local layers, by the name that caches know."""
        return self.window_size

    @property
    def layer_types(self) -> tuple[str, ...]:
        """Which layers have it, as caches know them."""
        return tuple("sliding_attention" if kind == "local" else "full_attention" for kind in self.kinds)


def block_spec(c: GPTNeoConfig) -> dict[str, Spec]:
    """One layer."""
    init, inner = normal(c.initializer_range), 4 * c.hidden_size if c.intermediate_size is None else c.intermediate_size
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    attn = attention_spec(c.hidden_size, c.num_heads, c.head_dim, names=names, init=init, bias="o")
    masks: dict[str, Spec] = {"bias": Ignored("bias"), "masked_bias": Ignored("masked_bias")}  # until 2023
    return {
        "attn_norm": norm.layer_spec("ln_1", c.hidden_size),
        "attn": At("attn.attention", attn | masks),
        "mlp_norm": norm.layer_spec("ln_2", c.hidden_size),
        "mlp": At("mlp", mlp.dense_spec(c.hidden_size, inner, ("c_fc", "c_proj"), init=init)),
    }


def block(p: Any, c: GPTNeoConfig, x: Any, mask: Any, cache: Any, key: Any) -> Any:
    """Pre-norm: each part sees its input normalised, and adds to it. [B, T, E] -> ([B, T, E], cache)."""
    keys = split(key, 3)
    own = {"mask": mask, "scale": 1.0, "cache": cache, "dropout": c.attention_dropout, "key": keys[0]}
    h, cache = self_attention(p["attn"], norm.layer(p["attn_norm"], x, c.layer_norm_epsilon), c.head_dim, **own)
    x = x + dropout(h, c.resid_dropout, keys[1])
    h = mlp.dense(p["mlp"], norm.layer(p["mlp_norm"], x, c.layer_norm_epsilon), c.activation_function)
    return x + dropout(h, c.resid_dropout, keys[2]), cache


def model_spec(c: GPTNeoConfig) -> dict[str, Spec]:
    """Words, positions, layers and the last norm."""
    table = partial(embed.embedding_spec, size=c.hidden_size, init=normal(c.initializer_range))
    position = table("wpe", c.max_position_embeddings, axes=(None, "embed"))
    return {
        "embed": {"word": table("wte", c.vocab_size), "position": position},
        "layers": stack_of("h", [block_spec(c)] * c.num_layers),
        "norm": norm.layer_spec("ln_f", c.hidden_size),
    }


def decode(
    p: Any,
    c: GPTNeoConfig,
    input_ids: Any = None,
    attention_mask: Any = None,
    token_type_ids: Any = None,
    position_ids: Any = None,
    inputs_embeds: Any = None,
    cache: Any = None,
    key: Any = None,
) -> Any:
    """Embeddings, all layers and the last norm: ids [B, T] -> (states [B, T, E], cache)."""
    embed.check_inputs(input_ids, inputs_embeds, c.max_position_embeddings)
    k_embed, k_layers = split(key, 2)
    mask = causal_mask(attention_mask, cache)
    # Local layers do not see beyond their window, whatever pairs [B, T, S] say; nor does any see the future.
    whole = mask & Mask(causal=True, q_offset=mask.q_offset)
    masks = {"global": whole, "local": whole & Mask(window=(c.window_size - 1, None), q_offset=mask.q_offset)}
    ids = input_ids, token_type_ids, position_ids, inputs_embeds
    x = embeddings(p, *ids, mask.q_offset, c.embed_dropout, k_embed)

    def run(p: Any, x: Any, cache: Any, key: Any, kind: Static) -> Any:
        return block(p, c, x, masks[kind.value], cache, key)

    x, cache = fold(run, p.get("layers", ()), x, cache=cache, key=k_layers, data=tuple(map(Static, c.kinds)))
    return tap.tap("last", norm.layer(p["norm"], x, c.layer_norm_epsilon)), cache


FAMILY = Family(
    "gpt_neo",
    GPTNeoConfig,
    base="transformer",
    inputs=decode,
    relative="gpt2",
    init_cache=decoder.own_caches,
    architectures=(
        Architecture("GPTNeoModel", "", model_spec, heads.bare(decode)),
        *heads.decoder_heads("GPTNeo", "transformer", model_spec, decode, token="classifier"),
    ),
    flax=Port(("GPTNeoModel", "GPTNeoForCausalLM"), inputs=("input_ids", "attention_mask", "position_ids")),
)
