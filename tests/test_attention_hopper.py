"""The kernels for Hopper, as far as a machine without one can tell: what they compute, refuse, and that they lower.

On a Hopper `tests/test_attention_backends.py` tries them for real.
"""

from collections.abc import Iterator
from typing import Any

import hopper
import jax
import jax.numpy as jnp
import pytest
from attention_cases import BIASES, MASKS, NUMBERS, Sizes, check, lowering_for, options

from formax.layers.attention import ALiBi, Bucketed, Mask, attention, compile_for, explain_attention, mosaic_gpu
from formax.layers.attention.problem import problem

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
    assert program.count("stablehlo.custom_call @mosaic_gpu") == (3 if head_dim < 256 else 4)
    assert program.count("xla.gpu.triton") == 0


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


# --- its numbers


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several tiles each way, the last ones not full, on the tests' interpreter."""
    monkeypatch.setattr(mosaic_gpu, "mosaic", lambda: hopper)
    monkeypatch.setattr(mosaic_gpu, "ROWS", 8)
    monkeypatch.setattr(mosaic_gpu, "KEYS", {8: 16})
    monkeypatch.setattr(mosaic_gpu, "FETCHED", 8)
    with compile_for("cuda", interpret=True), hopper.interpreted():
        yield


def attend(q: Any, k: Any, v: Any, **given: Any) -> Any:
    return mosaic_gpu.attention(problem(q, k, v, **given))


SIZES = Sizes(d=8, dv=8)
TAKEN = [
    *((mask, "none", "plain") for mask in MASKS if "dense" not in mask),
    *(("causal, aligned to the end", bias, "plain") for bias in BIASES if bias.startswith(("alibi", "bucketed"))),
    *(("causal", "none", numbers) for numbers in NUMBERS),
    ("causal segments and keys", "bucketed both ways", "all three"),
]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("mask", "bias", "numbers"), TAKEN)
def test_numbers(mask: str, bias: str, numbers: str) -> None:
    check(attend, SIZES, options(SIZES, mask, bias, numbers), hasty=True, fixed=("bias",))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("z", [Sizes(t=33, s=40, d=8, dv=8, h=6, k=1), Sizes(t=32, s=48, d=8, dv=8, h=3, k=3)])
@pytest.mark.parametrize("at_once", [8, 4])
def test_many_channels_take_keys_and_values_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, at_once: int, z: Sizes
) -> None:
    monkeypatch.setattr(mosaic_gpu, "TWO_SUMS", at_once)
    monkeypatch.setattr(mosaic_gpu, "KEYS", {8: 8})  # the last pair of warp groups has keys that do not exist
    check(attend, z, options(z, "causal segments and keys", "none", "all three"), hasty=True)


@pytest.mark.usefixtures("small_tiles")
def test_what_a_bias_learns_is_summed_by_the_portable_kernel() -> None:
    check(attend, SIZES, options(SIZES, "causal", "bucketed both ways", "plain"), hasty=True)
