"""Decoders of texts beside GPT-2 and Llama: what their configurations refuse and say, and what they keep."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import formax
from formax.core import registry
from formax.core.config import Config, ConfigError
from formax.layers.attention import ALiBi, Mask, alibi_slopes
from formax.models.text import bloom, gpt_neo

SMALL: dict[str, Any] = {"vocab_size": 31, "hidden_size": 12, "num_attention_heads": 2, "num_hidden_layers": 2}


def small(model_type: str, **changes: Any) -> Config:
    return formax.AutoConfig.for_model(model_type, **SMALL | changes)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window=0 must be null, or at least 1"),
        ("mistral", {"mlp_bias": True}, "mlp_bias=True is a switch that formax does not implement"),
        ("gemma", {"mlp_bias": True}, "mlp_bias=True is a switch that formax does not implement"),
        ("gpt_neo", {"attention_types": [[["global"], 3]]}, "must be about num_layers=2 layers, each global or local"),
        ("gpt_neo", {"attention_layers": ["local", "near"]}, "num_layers=2 layers, each global or local"),
        ("gptj", {"rotary_dim": 5}, "rotary_dim=5 must be even, and from 2 to a head's size, 6"),
        ("gptj", {"rotary_dim": 8}, "rotary_dim=8 must be even, and from 2 to a head's size, 6"),
        ("bloom", {"slow_but_exact": True}, "slow_but_exact=True is a switch that formax does not implement"),
        ("xglm", {"hidden_size": 9, "num_attention_heads": 3}, "d_model=9 must be even"),
        ("opt", {"num_attention_heads": 5}, "hidden_size=12 is no multiple of num_attention_heads=5"),
    ],
)
def test_what_configurations_refuse(model_type: str, changes: dict[str, Any], message: str) -> None:
    own: dict[str, dict[str, Any]] = {
        "gemma": {"num_key_value_heads": 1},
        "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
        "gptj": {"rotary_dim": 4},
        "mistral": {"num_key_value_heads": 1},
    }
    right = own.get(model_type, {})
    small(model_type, **right)
    with pytest.raises(ConfigError, match=message):
        small(model_type, **right | changes)


def test_gpt_neo_writes_the_kind_of_every_layer() -> None:
    c = small("gpt_neo", attention_types=[[["global", "local"], 1]])
    assert c.to_dict()["attention_layers"] == ["global", "local"]
    assert gpt_neo.GPTNeoConfig().kinds == ("global", "local") * 12
    given = small("gpt_neo", attention_types=[[["global"], 2]], attention_layers=["local", "global"])
    assert given.kinds == ("local", "global")


@pytest.mark.parametrize("model_type", ["mistral", "gpt_neo"])
def test_a_ring_writes_what_a_whole_cache_does(model_type: str) -> None:
    own: dict[str, dict[str, Any]] = {
        "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5},
        "mistral": {"intermediate_size": 20, "num_key_value_heads": 1, "sliding_window": 5},
    }
    c = small(model_type, initializer_range=0.5, **own[model_type])
    model = formax.AutoModelForCausalLM.from_config(c, key=jax.random.key(0))
    ids = jnp.asarray(np.random.default_rng(0).integers(3, 31, (2, 9)))
    how: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    whole = model.generate(ids, **how)
    np.testing.assert_array_equal(model.generate(ids, cache_implementation="sliding_window", **how), whole)


def test_blooms_distances_are_those_of_alibi_unless_padding_is_in_between() -> None:
    c = bloom.BloomConfig(n_head=2)
    assert isinstance(bloom.alibi(c, Mask(causal=True)), ALiBi)
    seen = jnp.asarray([[0, 0, 1, 1, 1], [1, 1, 0, 1, 1]], bool)
    bias = bloom.alibi(c, Mask(causal=True, keys=seen))
    assert bias.shape == (2, 2, 1, 5)
    numbers = np.where(seen, bias[:, 0, 0] / alibi_slopes(2)[0], 0)
    np.testing.assert_allclose(numbers, [[0, 0, 0, 1, 2], [0, 1, 0, 2, 3]], rtol=1e-6)


@pytest.mark.parametrize("model_type", ["mistral", "gemma", "gpt_neo", "gptj", "bloom", "opt", "xglm"])
def test_defaults_are_said_and_read_back(model_type: str) -> None:
    config = registry.family(model_type).config
    assert config.from_dict(config().to_dict()).to_dict() == config().to_dict()
