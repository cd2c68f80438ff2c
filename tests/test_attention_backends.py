"""Every backend of attention against the formula in float64: one class of tests for all."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    BIASES,
    MASKS,
    NEEDS_LIBTPU,
    NUMBERS,
    Sizes,
    check,
    draw,
    learned,
    lowering_for,
    options,
    qkv,
    temporary_bytes_of_a_tpu,
    with_learned,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from formax.core import mesh, tap
from formax.layers.attention import (
    ALiBi,
    Mask,
    attention,
    compile_for,
    explain_attention,
    kernel,
    pallas_gpu,
    pallas_tpu,
    xla_chunked,
)
from formax.layers.attention.backends import unsupported
from formax.layers.attention.problem import problem, target
from formax.sharding import make_mesh

KERNELS = {"pallas_gpu": "cuda", "pallas_tpu": "tpu"}  # interpreted here, which takes a while
BACKENDS = ["xla", "xla_chunked", *KERNELS]
EACH = pytest.mark.parametrize("backend", BACKENDS)
# What the interpreted kernels are asked the slopes of: every term of the scores, and every way to skip tiles.
WITH_SLOPES = ("all", "window", "prefix", "dense, for all heads", "causal segments and keys", "alibi both ways",
               "bucketed both ways", "pairs, for all rows", "of keys", "all three", "one head of keys",
               "whole tiles")  # fmt: skip


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles each way, the last ones not full."""
    monkeypatch.setattr(xla_chunked, "ROWS", 16)
    monkeypatch.setattr(xla_chunked, "KEYS", 16)
    monkeypatch.setattr(pallas_gpu, "FORWARD", (32, 16))
    monkeypatch.setattr(pallas_gpu, "BACKWARD", (16, 16))
    monkeypatch.setattr(pallas_tpu, "largest", lambda *_: (16, 16))


@contextmanager
def within(backend: str) -> Iterator[None]:
    """Where the backend can run: kernels are interpreted, but on a device of their own."""
    if backend not in KERNELS or target().platform == KERNELS[backend]:
        yield
        return
    with compile_for(KERNELS[backend], interpret=True):
        yield


def agrees(backend: str, name: str, z: Sizes, given: Any, **more: Any) -> None:
    """Values and slopes are those of the formula; of an interpreted kernel slopes where `WITH_SLOPES` has the name."""
    with within(backend):
        slopes = backend not in KERNELS or name in WITH_SLOPES
        check(partial(attention, backend=backend), z, given, slopes=slopes, hasty=backend in KERNELS, **more)


@EACH
@pytest.mark.parametrize("mask", MASKS)
def test_masks(backend: str, mask: str) -> None:
    z = Sizes()
    agrees(backend, mask, z, options(z, mask, "none", "plain"))


@EACH
@pytest.mark.parametrize("bias", BIASES)
def test_biases(backend: str, bias: str) -> None:
    z = Sizes()
    agrees(backend, bias, z, options(z, "causal, aligned to the end", bias, "plain"))


@EACH
@pytest.mark.parametrize("numbers", NUMBERS)
def test_numbers(backend: str, numbers: str) -> None:
    z = Sizes()
    agrees(backend, numbers, z, options(z, "an empty row", "none", numbers))


if jax.default_backend() == "gpu":  # these can be neither interpreted nor tried without one

    @pytest.mark.parametrize("backend", ["cudnn", "mosaic_gpu", "decode_gpu"])
    @pytest.mark.parametrize("numbers", NUMBERS)
    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("t", [1, 300])
    def test_on_a_gpu(backend: str, mask: str, numbers: str, t: int) -> None:
        """In half precision, which they compute in."""
        z = Sizes(t=t, s=304, d=64, dv=64, h=8, k=2)
        given = options(z, mask, "none", numbers)
        reason = unsupported(backend, problem(*qkv(z, jnp.bfloat16), **given))
        if reason is not None:
            pytest.skip(reason)
        check(partial(attention, backend=backend), z, given, dtype=jnp.bfloat16, tolerance=0.1)


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
    agrees(backend, name, z, options(z, "causal", "bucketed", "all three"))


COMBINATIONS = (st.sampled_from(sorted(MASKS)), st.sampled_from(sorted(BIASES)), st.sampled_from(sorted(NUMBERS)),
                st.sampled_from([Sizes(), *SIZES.values()]))  # fmt: skip


@settings(max_examples=25)
@given(st.sampled_from(["xla", "xla_chunked"]), *COMBINATIONS)
def test_any_combination(backend: str, mask: str, bias: str, numbers: str, z: Sizes) -> None:
    agrees(backend, "", z, options(z, mask, bias, numbers))


@settings(max_examples=6)
@given(st.sampled_from(sorted(KERNELS)), *COMBINATIONS)
def test_any_combination_in_a_kernel(backend: str, mask: str, bias: str, numbers: str, z: Sizes) -> None:
    agrees(backend, "", z, options(z, mask, bias, numbers))


@EACH
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(backend: str, dtype: jnp.dtype) -> None:
    z = Sizes()
    # a few of the 8 (11) bits that the inputs and weights have
    given = options(z, "causal", "alibi", "all three")
    if backend == "pallas_tpu" and dtype == jnp.float16:
        with within(backend), pytest.raises(NotImplementedError, match="float16 is none of float32, bfloat16"):
            attention(*qkv(z, dtype), backend=backend)
        return
    agrees(backend, "all three", z, given, dtype=dtype, tolerance=0.1 if dtype == jnp.bfloat16 else 0.01)


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


BLIND: dict[str, tuple[Mask, slice]] = {
    # with the keys that the first 16 queries, of the window the last 16 of 48, do not see
    "window": (Mask(causal=True, window=(3, 0), q_offset=32), slice(None, 16)),
    "causal": (Mask(causal=True), slice(16, None)),
    "lengths": (Mask(kv_length=jnp.full(2, 16)), slice(16, None)),
    "window to the right": (Mask(window=(None, 2)), slice(32, None)),
    "keys": (Mask(keys=jnp.arange(48)[None] < 16), slice(16, None)),
    "segments": (Mask(segments=(jnp.zeros((1, 16), jnp.int32), jnp.arange(48)[None] // 16)), slice(16, None)),
}


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("name", BLIND)
def test_tiles_that_the_mask_rules_out_are_not_computed(name: str, backend: str) -> None:
    """What is not a number in keys that nobody may see would show up, were it multiplied by nothing."""
    mask, dark = BLIND[name]
    q, k, v = qkv(Sizes(t=16, s=48))
    with within(backend):
        out = attention(q, k.at[:, dark].set(np.nan), v.at[:, dark].set(np.nan), mask=mask, backend=backend)
    assert np.isfinite(out).all()


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
    assert chosen("cuda", shapes(512, 4096, jnp.bfloat16), mask=Mask(causal=True)) == "pallas_gpu"  # cut off at the end
    assert chosen("cuda", shapes(4096, 4096, jnp.bfloat16, d=256)) == "pallas_gpu"


def test_each_platform_has_its_kernels() -> None:
    assert chosen("cpu", HALF) == "xla_chunked"
    with pytest.raises(NotImplementedError, match="pallas_gpu: runs on cuda, and this is cpu"):
        attention(*HALF, backend="pallas_gpu")


# --- kernels for chips that are not at hand


def slopes_of(backend: str, z: Sizes, given: Any) -> tuple[Any, Any]:
    """The gradient of a call to everything that has one, compiled for nothing yet, and its arguments' shapes."""
    arrays = {"bias": learned(given), "sinks": given["sinks"]}
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*qkv(z, jnp.bfloat16), *arrays.values())]

    def loss(q: Any, k: Any, v: Any, array: Any, sinks: Any) -> Any:
        return attention(q, k, v, backend=backend, **with_learned(given, array, sinks)).astype(jnp.float32).sum()

    return jax.grad(loss, argnums=(0, 1, 2, 3, 4)), shapes


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("mask", "bias"), [("causal segments and keys", "bucketed both ways"), ("dense", "pairs")])
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_lower(backend: str, mask: str, bias: str, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # with the tiles that they have there
    platform = KERNELS[backend]
    z = Sizes(b=1, t=200, s=300, h=2, k=1, d=head_dim, dv=head_dim)
    slopes, shapes = slopes_of(backend, z, options(z, mask, bias, "all three"))
    with lowering_for(platform):
        program = jax.jit(slopes).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    assert program.count("stablehlo.custom_call @tpu_custom_call" if platform == "tpu" else "xla.gpu.triton") == 3


@NEEDS_LIBTPU
@pytest.mark.parametrize(("mask", "bias"), [("causal segments and keys", "bucketed both ways"), ("dense", "pairs")])
@pytest.mark.parametrize("head_dim", [96, 256])
def test_a_tpu_can_have_it(mask: str, bias: str, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layouts and sizes, not the numbers."""
    monkeypatch.undo()
    z = Sizes(b=1, t=1500, s=1700, h=2, k=1, d=head_dim, dv=head_dim)
    slopes, shapes = slopes_of("pallas_tpu", z, options(z, mask, bias, "all three"))
    temporary_bytes_of_a_tpu(monkeypatch, slopes, *shapes)


def test_a_kernel_in_the_interpreter_of_tpus() -> None:
    """Which has the memories of a TPU: what was never written is not a number, for one."""
    from jax.experimental.pallas import tpu

    z = Sizes(b=1, h=2, k=1)
    with compile_for("tpu"), tpu.force_tpu_interpret_mode(tpu.InterpretParams()):
        check(partial(attention, backend="pallas_tpu"), z, options(z, "window", "pairs", "all three"), hasty=True)


TILES = {
    **{name: mask for name, mask in MASKS.items() if "dense" not in name and name != "keys"},
    "runs": lambda z: Mask(segments=(jnp.arange(z.t)[None] // 9, jnp.arange(z.s)[None] // 9)),
}


@pytest.mark.parametrize("of_keys", [False, True])
@pytest.mark.parametrize("name", TILES)
def test_tiles_of_a_tpu(name: str, of_keys: bool) -> None:
    """All tiles with a pair that is seen have a step, and what is loaded stays between the first and the last."""
    z = Sizes(t=75, s=90)
    mask = TILES[name](z)
    plan = kernel.plan_of(problem(*qkv(z), mask=mask), 16, 8)
    given = kernel.operands(problem(*qkv(z), mask=mask), plan)
    grid = pallas_tpu.Grid(plan, groups=2, of_keys=of_keys)
    found = kernel.needed(plan, {**given, **kernel.spans(plan, given)}, of_keys=of_keys)
    needed = {name: np.asarray(x) for name, x in found.items()}
    table = mask.materialise(z.t, z.s)
    seen = np.broadcast_to(np.ones(1, bool) if table is None else np.asarray(table)[:, 0], (z.b, z.t, z.s))
    (queries, keys), (tp, sp) = plan.blocks, plan.padded
    seen = np.pad(seen, ((0, 0), (0, tp - z.t), (0, sp - z.s)))
    parts = seen.reshape(z.b, queries, plan.rows, keys, plan.keys).transpose(0, 1, 3, 2, 4)
    rows, blocks, tiles = np.indices((z.b, grid.blocks, grid.tiles)).reshape(3, -1).astype(np.int32)
    ids = (rows, np.int32(0), blocks, *[0] * of_keys, tiles)
    at = {name: np.asarray(x) for name, x in grid.place(ids, needed["bounds"]).items()}
    first, stop = needed["bounds"].reshape(z.b, -1, 2)[rows, blocks].T
    load = at["query" if of_keys else "key"]
    assert np.where(first < stop, (first <= load) & (load < stop), load == np.clip(stop - 1, 0, None)).all()
    visited = np.zeros((z.b, queries, keys), bool)
    visited[tuple(np.broadcast_to(at[axis], rows.shape)[at["active"]] for axis in ("row", "i", "j"))] = True
    assert (visited >= parts.any((3, 4))).all()
    if "whole" in needed:
        whole = needed["whole"].reshape(z.b, queries, 2, 1)
        whole = (np.arange(keys) >= whole[:, :, 0]) & (np.arange(keys) < whole[:, :, 1])
        inside = np.arange(tp).reshape(queries, 1, -1, 1) < z.t  # what fills up the last block sees nothing
        assert ((parts | ~inside).all((3, 4)) >= whole).all()
    if name in ("window", "runs") and not of_keys:  # not one more than it takes
        np.testing.assert_array_equal(visited, parts.any((3, 4)))
    if name in ("window", "dilated window"):
        assert grid.tiles < grid.plan.blocks[not of_keys]


def test_blocks_of_a_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert [pallas_tpu.block(n, 512) for n in (1, 128, 129, 512, 513, 640, 1100, 4096)] == [
        128, 128, 256, 512, 384, 384, 384, 512,
    ]  # fmt: skip
    assert pallas_tpu.largest(64, 2) == (512, 512)
    assert pallas_tpu.largest(192, 4) == (256, 512)


@pytest.mark.parametrize("backend", KERNELS)
def test_what_a_kernel_does_not_do(backend: str) -> None:
    with within(backend):
        with pytest.raises(NotImplementedError, match="heads of 300 channels do not fit; 256 do"):
            attention(*shapes(256, 256, d=300), backend=backend)
        with pytest.raises(NotImplementedError, match="drops no weights"):
            attention(*shapes(256, 256), dropout=0.1, key=jax.random.key(0), backend=backend)


def test_a_tpu_has_its_kernel() -> None:
    assert chosen("tpu", HALF, mask=Mask(causal=True), bias=ALiBi(jnp.ones(4))) == "pallas_tpu"
    assert chosen("tpu", shapes(64, 4096)) == "xla"
    assert chosen("tpu", shapes(4096, 4096, b=0)) == "xla"  # there is nothing to compute
    with compile_for("tpu"):
        assert "64 queries are less than a block of 128" in explain_attention(*shapes(64, 4096))


def test_no_platform_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "METAL")
    table = explain_attention(*shapes(64, 64))
    assert "xla          <- runs" in table
    assert "pallas_gpu      runs on cuda, and this is METAL" in table
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for version, name in (("rocm 60300", "rocm"), ("PJRT C API\ncuda 12080", "cuda")):
        device = SimpleNamespace(client=SimpleNamespace(platform_version=version))
        monkeypatch.setattr(jax, "devices", lambda device=device: [device])
        assert target().platform == name


def test_a_kernel_of_several_devices_needs_a_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert chosen("tpu", HALF) != "pallas_tpu"
    with compile_for("tpu"):
        assert "one of 8 devices, or all?" in explain_attention(*HALF)
        with jax.set_mesh(make_mesh(data=2, tensor=4)):
            assert "pallas_tpu   <- runs" in explain_attention(*HALF)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_kernel_over_a_mesh(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    z = Sizes(b=4, t=17)
    given = options(z, "offset by row", "alibi", "sinks")
    devices = make_mesh(data=2, tensor=2)
    with jax.set_mesh(devices), within(backend):
        check(partial(attention, backend=backend), z, given, slopes=False)

    monkeypatch.undo()
    slopes, arrays = slopes_of("pallas_tpu", z, given)
    with jax.set_mesh(devices), compile_for("tpu"):  # which fails where XLA had to split the kernel
        jax.jit(slopes).trace(*arrays).lower(lowering_platforms=("tpu",))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_kernel_mapped(backend: str) -> None:
    """Also over what is prefetched."""
    z = Sizes(b=6, t=20, s=24)
    run = partial(attention, backend=backend)
    arrays, ends = qkv(z), jnp.asarray([3, 0, 24, 9, 17, 5])

    def some(q: jax.Array, k: jax.Array, v: jax.Array, ends: jax.Array) -> jax.Array:
        return run(q, k, v, mask=Mask(kv_length=ends))

    with within(backend):
        parts = [x.reshape(3, 2, *x.shape[1:]) for x in (*arrays, ends)]
        found = jax.jit(jax.vmap(some))(*parts)
        np.testing.assert_allclose(found.reshape(6, *found.shape[2:]), jax.jit(some)(*arrays, ends), atol=1e-6)
