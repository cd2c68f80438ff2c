"""The kernel for Hopper, as far as a machine without one can tell: what it refuses, and that it lowers.

On a Hopper `tests/test_attention_backends.py` tries its numbers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from attention_cases import lowering_for

from formax.layers.attention import ALiBi, Bucketed, Mask, attention, compile_for, explain_attention, mosaic_gpu

CALLS: dict[str, dict[str, Any]] = {
    "all": {},
    "causal": {"mask": Mask(causal=True)},
    "window": {"mask": Mask(causal=True, window=(255, 0)), "softcap": 30.0, "sinks": jnp.ones(8)},
    "lengths": {"mask": Mask(kv_length=jnp.asarray([900, 0])), "scale": 0.1},
    "offsets": {"mask": Mask(causal=True, q_offset=jnp.asarray([0, 3]), prefix=jnp.asarray([4, 5]))},
    "keys": {"mask": Mask(keys=jnp.ones((2, 1000), bool)), "bias": ALiBi(jnp.ones(8), both_ways=True)},
    "alibi": {"mask": Mask(causal=True), "bias": ALiBi(jnp.ones(8))},
    "all together": {
        "mask": Mask(causal=True, segments=(jnp.zeros((2, 1000), jnp.int32),) * 2, kv_length=jnp.asarray([900, 0])),
        "bias": Bucketed(jnp.ones((32, 8)), 128, both_ways=True),
        "softcap": 30.0,
        "sinks": jnp.ones(8),
    },
}


def shapes(t: int = 1000, head_dim: int = 128, dtype: Any = jnp.bfloat16) -> tuple[Any, Any, Any]:
    q, k = (jax.ShapeDtypeStruct((2, t, heads, head_dim), dtype) for heads in (8, 2))
    return q, k, k


@pytest.mark.parametrize(
    ("name", "head_dim"), [*((name, 128) for name in CALLS), *(("all together", n) for n in (64, 96, 256))]
)
def test_it_lowers(name: str, head_dim: int) -> None:
    def loss(q: Any, k: Any, v: Any) -> Any:
        return attention(q, k, v, backend="mosaic_gpu", **CALLS[name]).astype(jnp.float32).sum()

    with lowering_for("cuda"):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*shapes(head_dim=head_dim))
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("mosaic_gpu") > 0
    assert program.count("xla.gpu.triton") == 2  # the backward pass is the portable one


@pytest.mark.parametrize(
    ("given", "options", "reason"),
    [
        (shapes(dtype=jnp.float32), {}, "computes in bfloat16 and float16, not float32"),
        (shapes(head_dim=80), {}, "heads of 80 and 80 channels; both must be 64, 96, 128 or 256"),
        (shapes(), {"dropout": 0.1, "key": jax.random.key(0)}, "drops no weights"),
        (shapes(), {"bias": jnp.ones((1000, 1000))}, "fetches no arrays of pairs"),
        (shapes(), {"mask": Mask(dense=jnp.ones((1, 1, 1, 1000), bool))}, "fetches no arrays of pairs"),
    ],
)
def test_what_it_does_not_do(given: Any, options: Any, reason: str) -> None:
    with compile_for("cuda"), pytest.raises(NotImplementedError, match=f"mosaic_gpu: {reason}"):
        attention(*given, backend="mosaic_gpu", **options)


def test_it_waits_for_a_device_to_prove_it(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = Mask(causal=True, q_offset=1)  # nothing for cuDNN
    with compile_for("cuda"):
        assert "supports this; its tests have not passed on a device yet" in explain_attention(*shapes(), mask=mask)
        monkeypatch.setattr(mosaic_gpu, "PROVEN", True)
        assert "mosaic_gpu   <- runs" in explain_attention(*shapes(), mask=mask)
        assert "100 queries are less than 2 blocks of 64" in explain_attention(*shapes(100), mask=mask)
