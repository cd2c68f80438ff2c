"""Mamba: a language model of state-space layers, without attention: its memory is a state of fixed size.

Gu and Dao 2023, arXiv:2312.00752; original code state-spaces/mamba. A layer is a gated mixer: a short causal
convolution, then a linear recurrence whose steps, inputs and outputs depend on the token. There are no positions.
"""

import math
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from formax.core import tap
from formax.core.config import Config, ConfigError, config
from formax.core.family import Architecture, Family
from formax.core.layout import TRANSPOSE, Part
from formax.core.spec import At, Param, Spec, fold, normal, ones, stack_of
from formax.layers import conv, embed, heads, norm, ssm
from formax.layers.activations import activation, check_activation
from formax.layers.linear import fused_spec, linear, linear_spec
from formax.layers.ssm import MambaCache


@config
class MambaConfig(Config):
    """`config.json` of model type "mamba"."""

    model_type: ClassVar[str] = "mamba"

    vocab_size: int = 50280
    hidden_size: int = 768
    state_size: int = 16
    num_hidden_layers: int = 32
    layer_norm_epsilon: float = 1e-5
    pad_token_id: int | None = 0
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 0
    expand: float = 2
    intermediate_size: int | None = None  # expand * hidden_size, unless it is given
    conv_kernel: int = 4
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: str = "silu"
    initializer_range: float = 0.1
    residual_in_fp32: bool = True
    time_step_rank: int | str = "auto"
    time_step_scale: float = 1.0
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_init_scheme: str = "random"
    time_step_floor: float = 1e-4
    rescale_prenorm_residual: bool = False
    use_cache: bool = True
    use_mambapy: bool = False  # which program the reference runs where it has no kernel; no value changes

    def check(self) -> None:
        if isinstance(self.time_step_rank, str) and self.time_step_rank != "auto":
            raise ConfigError(f'time_step_rank={self.time_step_rank!r} must be a number or "auto"')
        if self.time_step_init_scheme not in ("random", "constant"):
            raise ConfigError(f"time_step_init_scheme={self.time_step_init_scheme!r} is none of random, constant")
        sizes = {"state_size": self.state_size, "conv_kernel": self.conv_kernel}
        for name, value in (sizes | {"intermediate_size": self.inner_size, "time_step_rank": self.rank}).items():
            if value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        check_activation(self.hidden_act)

    @property
    def inner_size(self) -> int:
        """Channels of the mixer."""
        return int(self.expand * self.hidden_size) if self.intermediate_size is None else self.intermediate_size

    @property
    def rank(self) -> int:
        """Numbers that the steps of all channels are made of."""
        return math.ceil(self.hidden_size / 16) if isinstance(self.time_step_rank, str) else self.time_step_rank

    def to_dict(self) -> dict[str, Any]:
        # The reference takes both from the file as they are.
        return super().to_dict() | {"intermediate_size": self.inner_size, "time_step_rank": self.rank}


def mixer_spec(c: MambaConfig) -> dict[str, Spec]:
    """The parts of a mixer."""
    size, inner, state, rank = c.hidden_size, c.inner_size, c.state_size, c.rank
    init, spread = normal(c.initializer_range), rank**-0.5 * c.time_step_scale
    steps = jax.nn.initializers.constant(spread) if c.time_step_init_scheme == "constant" else ssm.uniform(spread)
    out = ssm.uniform((inner * (c.num_hidden_layers if c.rescale_prenorm_residual else 1)) ** -0.5)
    halves, sizes = {"x": (inner, "mlp"), "gate": (inner, "mlp")}, (rank, state, state)
    kernel = conv.conv_spec(
        "conv1d", inner, inner, (c.conv_kernel,), init=ssm.uniform(c.conv_kernel**-0.5), bias=c.use_conv_bias,
        groups=inner, axes=(None, "mlp"),
    )  # fmt: skip
    return {
        **fused_spec("in_proj", size, halves, init=init, bias=c.use_bias),
        "conv": kernel,
        **{
            part: {
                "kernel": Param((inner, sizes[i]), ("mlp", None), "x_proj.weight", init, Part(i, sizes, then=TRANSPOSE))
            }
            for i, part in enumerate(("rank", "b", "c"))
        },
        "step": At(
            "dt_proj",
            {
                "kernel": Param((rank, inner), (None, "mlp"), "weight", steps, TRANSPOSE),
                "bias": Param(
                    (inner,), ("mlp",), "bias", ssm.step_bias(c.time_step_min, c.time_step_max, c.time_step_floor)
                ),
            },
        ),
        "a_log": Param((inner, state), ("mlp", "state"), "A_log", ssm.log_range),
        "d": Param((inner,), ("mlp",), "D", ones),
        "o": linear_spec("out_proj", inner, size, ("mlp", "embed"), init=out, bias=c.use_bias),
    }


def mixer(p: Any, x: jax.Array, act: str, seen: jax.Array | None, cache: MambaCache | None) -> Any:
    """Gate, convolution, recurrence: [B, T, E] -> ([B, T, E], cache).

    `seen` [B, T, 1] is zero where there is padding, which enters neither the convolution nor the state. Taps, under
    `mixer`: `conv`, `step`, `state` (after the last position), `ssm`, `out`.
    """
    act_of = activation(act)
    with tap.scope("mixer"):
        u, gate = linear(p["x"], x), linear(p["gate"], x)
        u = u if seen is None else u * seen
        u, before = ssm.causal_conv(p["conv"], u, None if cache is None else cache.conv)
        u = tap.tap("conv", act_of(u) if seen is None else act_of(u) * seen)
        step = tap.tap("step", jax.nn.softplus(linear(p["step"], linear(p["rank"], u))))
        a = -jnp.exp(p["a_log"].astype(jnp.float32))
        b, c = linear(p["b"], u), linear(p["c"], u)
        y, state = ssm.selective_scan(u, step, a, b, c, None if cache is None else cache.state)
        state = tap.tap("state", state)
        y = tap.tap("ssm", y + u * p["d"].astype(u.dtype))
        if cache is not None:
            cache = MambaCache(before.astype(cache.conv.dtype), state, cache.length + x.shape[1])
        return tap.tap("out", linear(p["o"], y * act_of(gate))), cache


def model_spec(c: MambaConfig) -> dict[str, Spec]:
    """Word table, layers and the last norm."""
    word = embed.embedding_spec("embeddings", c.vocab_size, c.hidden_size, init=normal(c.initializer_range))
    layer = {"mixer_norm": norm.rms_spec("norm", c.hidden_size), "mixer": At("mixer", mixer_spec(c))}
    return {
        "embed": {"word": word},
        "layers": stack_of("layers", [layer] * c.num_hidden_layers),
        "norm": norm.rms_spec("norm_f", c.hidden_size),
    }


def encode(
    p: Any,
    c: MambaConfig,
    input_ids: Any = None,
    attention_mask: Any = None,
    inputs_embeds: Any = None,
    cache: Any = None,
    key: Any = None,
) -> Any:
    """Embeddings, all layers and the last norm: ids [B, T] -> (states [B, T, E], cache). There is no dropout."""
    embed.check_inputs(input_ids, inputs_embeds, None)
    with tap.scope("embed"):
        x = tap.tap("out", embed.embed(p["embed"]["word"], input_ids) if inputs_embeds is None else inputs_embeds)
    dtype, seen = x.dtype, ssm.tokens_seen(attention_mask, x, 0 if cache is None else cache[0].length)
    x = x.astype(jnp.float32) if c.residual_in_fp32 else x

    def block(p: Any, x: Any, cache: Any, key: Any) -> Any:
        h = norm.rms(p["mixer_norm"], x.astype(dtype), c.layer_norm_epsilon)
        h, cache = mixer(p["mixer"], h, c.hidden_act, seen, cache)
        return x + h, cache

    x, cache = fold(block, p.get("layers", ()), x, cache=cache)
    with tap.scope("norm"):
        return tap.tap("out", norm.rms(p["norm"], x, c.layer_norm_epsilon).astype(dtype)), cache


model = heads.bare(encode)


def init_cache(c: MambaConfig, batch: int, length: int, encoder_length: int, dtype: Any) -> Any:
    """Empty caches of all layers; they are as large for any `length`."""
    empty = partial(MambaCache.empty, batch, c.inner_size, c.conv_kernel, c.state_size, dtype)
    return tuple(empty() for _ in range(c.num_hidden_layers))


# The reference's hidden states leave out the embeddings and end with the normed ones.
_states = {"hidden_states": ("output_hidden_states", ("layers.*.out", "norm.out"))}

FAMILY = Family(
    "mamba",
    MambaConfig,
    base="backbone",
    inputs=encode,
    init_cache=init_cache,
    architectures=(
        Architecture("MambaModel", "", model_spec, model, collected=_states),
        Architecture(
            "MambaForCausalLM",
            "ForCausalLM",
            heads.with_heads("backbone", model_spec, heads.lm_head()),
            heads.causal_lm(encode),
            also=("ForPreTraining",),
            collected=_states,
        ),
    ),
)
