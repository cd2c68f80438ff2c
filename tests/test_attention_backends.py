"""Every backend of attention against the formula in float64: one class of tests for all."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import BIASES, MASKS, NUMBERS, Sizes, check, draw, options, qkv
from hypothesis import given, settings
from hypothesis import strategies as st

from formax.core import mesh, tap
from formax.layers.attention import Mask, attention, compile_for, explain_attention, xla_chunked
from formax.sharding import make_mesh

BACKENDS = ["xla", "xla_chunked"]
EACH = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles each way, the last ones not full."""
    monkeypatch.setattr(xla_chunked, "ROWS", 16)
    monkeypatch.setattr(xla_chunked, "KEYS", 16)


@EACH
@pytest.mark.parametrize("mask", MASKS)
def test_masks(backend: str, mask: str) -> None:
    z = Sizes()
    check(partial(attention, backend=backend), z, options(z, mask, "none", "plain"))


@EACH
@pytest.mark.parametrize("bias", BIASES)
def test_biases(backend: str, bias: str) -> None:
    z = Sizes()
    check(partial(attention, backend=backend), z, options(z, "causal, aligned to the end", bias, "plain"))


@EACH
@pytest.mark.parametrize("numbers", NUMBERS)
def test_numbers(backend: str, numbers: str) -> None:
    z = Sizes()
    check(partial(attention, backend=backend), z, options(z, "an empty row", "none", numbers))


SIZES = {
    "one head": Sizes(h=1, k=1),
    "one head of keys": Sizes(h=6, k=1),
    "a head of keys each": Sizes(h=5, k=5),
    "wider values": Sizes(d=6, dv=11),
    "one query": Sizes(t=1),
    "one key": Sizes(t=3, s=1),
    "whole tiles": Sizes(t=32, s=48),
}


@EACH
@pytest.mark.parametrize("name", SIZES)
def test_sizes(backend: str, name: str) -> None:
    z = SIZES[name]
    check(partial(attention, backend=backend), z, options(z, "causal", "bucketed", "all three"))


@settings(max_examples=25)
@given(st.sampled_from(BACKENDS), st.sampled_from(sorted(MASKS)), st.sampled_from(sorted(BIASES)),
       st.sampled_from(sorted(NUMBERS)), st.sampled_from([Sizes(), *SIZES.values()]))  # fmt: skip
def test_any_combination(backend: str, mask: str, bias: str, numbers: str, z: Sizes) -> None:
    check(partial(attention, backend=backend), z, options(z, mask, bias, numbers))


@EACH
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(backend: str, dtype: jnp.dtype) -> None:
    z = Sizes()
    # a few of the 8 (11) bits that the inputs and weights have
    given = options(z, "causal", "alibi", "all three")
    check(partial(attention, backend=backend), z, given, dtype=dtype, tolerance=0.1 if dtype == jnp.bfloat16 else 0.01)


# --- under a mesh


@pytest.mark.parametrize("bias", BIASES)
def test_rows_and_heads_over_a_mesh(bias: str) -> None:
    z = Sizes(b=4, h=8, k=2)
    devices = make_mesh(data=2, fsdp=2, tensor=2)

    def attend(q: Any, k: Any, v: Any, **options: Any) -> Any:
        with mesh.placed(mesh.Placing(devices)):
            return attention(q, k, v, backend="xla_chunked", **options)

    check(attend, z, options(z, "causal segments and keys", bias, "sinks"))


def test_a_mesh_that_fits_in_part() -> None:
    z = Sizes(b=3, h=6, k=3)  # neither rows nor heads of keys are even
    devices = make_mesh(data=2, tensor=2)

    def attend(q: Any, k: Any, v: Any, **options: Any) -> Any:
        return attention(q, k, v, backend="xla_chunked", **options)

    with jax.set_mesh(devices):
        assert mesh.current() is not None
        check(attend, z, options(z, "offset by row", "alibi", "plain"))


def test_each_device_attends_with_its_own_rows_and_heads() -> None:
    devices = make_mesh(data=2, tensor=4)
    placing = mesh.Placing(devices)
    where = jax.NamedSharding(devices, placing.partition(("batch", None, "heads", None), (2, 1024, 4, 16)))
    x = jax.ShapeDtypeStruct((2, 1024, 4, 16), jnp.float32, sharding=where)

    def attend(q: Any, k: Any, v: Any) -> Any:
        with mesh.placed(placing):
            return attention(q, k, v, mask=Mask(causal=True))

    made = jax.jit(attend).lower(x, x, x).compile()
    program = made.as_text() or ""
    assert "dot" in program
    assert "all-gather" not in program
    assert "all-reduce" not in program
    assert made.output_shardings.is_equivalent_to(where, 4)


def test_dropped_weights_differ_from_device_to_device() -> None:
    z = Sizes(b=2, t=16, s=64, h=2, k=2)
    _, k, v = qkv(z)
    same = jnp.ones((2, 1, 2, 1))  # all rows and heads are alike but for what is dropped
    with jax.set_mesh(make_mesh(data=2, tensor=2)):
        run = jax.jit(partial(attention, backend="xla_chunked", dropout=0.5))
        out = run(jnp.zeros((2, 16, 2, 8)), k[:1, :, :1] * same, v[:1, :, :1] * same, key=jax.random.key(0))
    parts = np.asarray(out).transpose(0, 2, 1, 3).reshape(4, -1)
    assert len({part.tobytes() for part in parts}) == 4


# --- what is chosen


def shapes(t: int, s: int, dtype: Any = jnp.float32, *, b: int = 1, h: int = 4, d: int = 32) -> Any:
    return tuple(jax.ShapeDtypeStruct((b, length, h, d), dtype) for length in (t, s, s))


def test_long_sequences_are_computed_in_tiles_and_short_ones_at_once() -> None:
    assert "xla_chunked  <- runs" in explain_attention(*shapes(4096, 4096), mask=Mask(causal=True))
    table = explain_attention(*shapes(64, 64))
    assert "xla          <- runs" in table
    assert "a table of scores of 0.0625 MiB is made at once up to 0.5 MiB" in table
    assert "1 queries are no block" in explain_attention(*shapes(1, 2**20))


def test_the_table_names_what_was_asked() -> None:
    table = explain_attention(*shapes(8, 8), mask=Mask(causal=True, window=(3, 0)), softcap=2.0, backend="xla_chunked")
    assert "attention on cpu: q (1, 8, 4, 32)" in table
    assert "mask: causal, window; bias: none; softcap: 2.0; sinks: False" in table
    assert "xla_chunked  <- runs" in table


def test_a_backend_that_does_not_exist() -> None:
    z = Sizes()
    with pytest.raises(ValueError, match=r"attention has no backend 'flash'; there are .*xla_chunked, xla"):
        attention(*qkv(z), backend="flash")
    with pytest.raises(ValueError, match="platform 'gpu' is none of cpu, cuda, tpu"), compile_for("gpu"):
        pass


def test_weights_that_are_looked_at_are_all_there() -> None:
    z = Sizes(t=1500, s=1500, h=1, k=1)
    with tap.watch(["weights"]) as seen:
        attention(*qkv(z))
    assert seen.seen["weights"].shape == (z.b, z.h, z.t, z.s)
    none = tap.Intervention("weights", lambda weights: 0 * weights)
    with tap.watch(interventions=[none]):
        assert not attention(*qkv(z)).any()
    # They are places, also of a pass in which nobody looks at them.
    with pytest.raises(ValueError, match=r"'elsewhere' matches nothing .* there are: scores, weights"):  # noqa: SIM117
        with tap.watch(["elsewhere"]):
            attention(*qkv(z))
    with pytest.raises(NotImplementedError, match="xla_chunked: somebody looks at the scores"), tap.watch(["weights"]):
        attention(*qkv(z), backend="xla_chunked")


# --- what the backends are for


def test_dropout_in_tiles() -> None:
    z = Sizes(t=40, s=203)
    q, k, v = qkv(z)
    run = partial(attention, backend="xla_chunked", dropout=0.3)
    np.testing.assert_array_equal(run(q, k, v), attention(q, k, v, backend="xla_chunked"))  # no key, no dropout
    key = jax.random.key(0)
    even = jax.jit(run)(0 * q, k, jnp.ones_like(v), key=key)  # each of 203 keys has weight 1 / 203
    assert abs(float(even.mean()) - 1) < 5 * np.sqrt(0.3 / 0.7 / z.s / (z.b * z.t * z.h))
    np.testing.assert_allclose(even.std(), np.sqrt(0.3 / 0.7 / z.s), rtol=0.2)
    assert np.any(even != run(0 * q, k, jnp.ones_like(v), key=jax.random.key(1)))

    # the backward pass drops the same weights: slopes are those of differences
    slope = draw(1, z.b, z.t, z.h, z.dv)
    value = jax.jit(lambda *x: (run(*x, key=key) * slope).sum())
    found = jax.jit(jax.grad(value, argnums=(0, 1, 2)))(q, k, v)
    for i, one in enumerate((q, k, v)):
        way = draw(2 + i, *one.shape)
        moved = [value(*(x + e * way if x is one else x for x in (q, k, v))) for e in (-1e-2, 1e-2)]
        np.testing.assert_allclose((moved[1] - moved[0]) / 2e-2, jnp.vdot(found[i], way), rtol=5e-3)


def peak(length: int, backend: str | None) -> int:
    x = jax.ShapeDtypeStruct((1, length, 4, 32), jnp.float32)
    loss = jax.grad(lambda q: attention(q, q, q, mask=Mask(causal=True), backend=backend).sum())
    told = jax.jit(loss).lower(x).compile().memory_analysis()
    assert told is not None
    return told.temp_size_in_bytes


def test_memory_grows_with_the_length_and_not_its_square() -> None:
    assert peak(8192, None) < 3 * peak(4096, None)
    assert peak(4096, None) < peak(4096, "xla") / 10


def test_tiles_that_the_mask_rules_out_are_not_computed() -> None:
    """What is not a number in keys that nobody may see would show up, were it multiplied by nothing."""
    z = Sizes(t=48, s=48)
    q, k, v = qkv(z)
    for mask, dark in (
        (Mask(causal=True, window=(3, 0)), slice(None, None)),
        (Mask(causal=True), slice(16, None)),
        (Mask(kv_length=jnp.full(z.b, 16)), slice(16, None)),
        (Mask(window=(None, 2)), slice(32, None)),
        (Mask(keys=jnp.arange(48)[None] < 16), slice(16, None)),
        (Mask(segments=((jnp.arange(48) // 16)[None],) * 2), slice(16, None)),
    ):
        first = q[:, 32:] if dark == slice(None, None) else q[:, :16]
        where = slice(None, 16) if dark == slice(None, None) else dark
        used = Mask(**{**vars(mask), "q_offset": 32}) if dark == slice(None, None) else mask
        if used.segments is not None:
            used = Mask(segments=(used.segments[0][:, :16], used.segments[1]))
        out = attention(first, k.at[:, where].set(np.nan), v.at[:, where].set(np.nan), mask=used, backend="xla_chunked")
        assert np.isfinite(out).all(), mask


def chosen(platform: str, given: Any, **options: Any) -> str:
    """The name of the backend that runs."""
    with compile_for(platform):
        lines = explain_attention(*given, **options).splitlines()
    return next(line.split()[0] for line in lines if "<- runs" in line)


HALF = shapes(4096, 4096, jnp.bfloat16, d=128)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mask": Mask(window=(4, 4))}, r"cuDNN looks into the future \(jax#39576\)"),
        ({"mask": Mask(window=(4, None))}, r"cuDNN looks into the future"),
        ({"mask": Mask(causal=True, q_offset=3)}, "a causal mask is aligned to the first key"),
        ({"mask": Mask(causal=True, q_offset=jnp.asarray(0))}, "a causal mask is aligned to the first key"),
        ({"mask": Mask(dense=jnp.ones((1, 1, 1, 4096), bool))}, "a mask with dense is not on the list"),
        ({"mask": Mask(keys=jnp.ones((1, 4096), bool))}, "a mask with keys is not on the list"),
        ({"bias": jnp.ones((4096,))}, "a bias is not on the list"),
        ({"softcap": 2.0}, "a soft cap is not on the list"),
        ({"sinks": jnp.ones(4)}, "sinks is not on the list"),
        ({"dropout": 0.1, "key": jax.random.key(0)}, "dropout is not on the list"),
    ],
)
def test_cudnn_is_given_only_what_it_does_right(options: Any, reason: str) -> None:
    with compile_for("cuda"), pytest.raises(NotImplementedError, match=f"cudnn: .*{reason}"):
        attention(*HALF, backend="cudnn", **options)
    assert chosen("cuda", HALF, **options) != "cudnn"


def test_cudnn_does_what_is_on_its_list() -> None:
    for mask in (Mask(), Mask(causal=True), Mask(causal=True, window=(100, None)), Mask(causal=True, window=(100, 0))):
        assert chosen("cuda", HALF, mask=mask) == "cudnn"
    assert chosen("cuda", shapes(4096, 4096), mask=Mask(causal=True)) == "pallas_gpu"  # float32
    assert chosen("cuda", shapes(64, 4096, jnp.bfloat16), mask=Mask(causal=True)) == "pallas_gpu"  # cut off at the end
    assert chosen("cuda", shapes(4096, 4096, jnp.bfloat16, d=256)) == "pallas_gpu"


def test_each_platform_has_its_kernels() -> None:
    assert chosen("cpu", HALF) == "xla_chunked"
    with pytest.raises(NotImplementedError, match="pallas_gpu: runs on cuda, and this is cpu"):
        attention(*HALF, backend="pallas_gpu")
