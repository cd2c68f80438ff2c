"""A few queries against a long cache, and caches in pages, against the formula."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    MASKS,
    NEEDS_LIBTPU,
    Sizes,
    check,
    draw,
    formula,
    lowering_for,
    numbers,
    options,
    qkv,
    temporary_bytes_of_a_tpu,
)

from formax.layers.attention import (
    Mask,
    Pages,
    attention,
    compile_for,
    decode_gpu,
    decode_tpu,
    decode_xla,
    explain_attention,
    explain_paged_attention,
    kernel,
    paged_attention,
)
from formax.layers.attention.problem import problem
from formax.sharding import make_mesh

ONE = Sizes(b=3, t=1, s=288, h=6, k=2, d=24, dv=20)


CALLS = [
    ("all", "none", "plain", ONE),
    ("causal, aligned to the end", "alibi", "all three", ONE),
    ("offset by row", "alibi both ways", "softcap", ONE),
    ("window", "none", "sinks", Sizes(b=2, t=3, s=288, h=4, k=2)),
    ("causal segments and keys", "none", "sinks", Sizes(b=2, t=5, s=288, h=4, k=1)),
    ("an empty row", "none", "plain", Sizes(b=2, t=2, s=304, h=2, k=2)),
    ("lengths", "none", "sinks", ONE),
]
ALSO = [
    ("traced offset", "bucketed", "plain", Sizes(b=2, t=3, s=288, h=6, k=2, d=24, dv=20)),
    ("prefix", "pairs", "all three", Sizes(b=2, t=4, s=101, h=4, k=2)),
    ("dense", "of keys", "plain", Sizes(b=2, t=2, s=101, h=4, k=2)),
    ("dilated window", "pairs, for all heads", "sinks", Sizes(b=2, t=3, s=101, h=2, k=2)),
]


KERNELS = {"decode_gpu": "cuda", "decode_tpu": "tpu"}
EACH = pytest.mark.parametrize("backend", KERNELS)
# In each order that a TPU has an array in, see `decode_tpu.order`; those above are all in one.
ORDERS = [
    ("offset by row", "bucketed both ways", "all three", Sizes(b=2, t=2, s=200, h=4, k=2, d=128, dv=128)),
    ("window", "alibi", "softcap", Sizes(b=2, t=1, s=200, h=6, k=3, d=128, dv=128)),
    ("causal segments and keys", "none", "sinks", Sizes(b=2, t=2, s=200, h=2, k=2, d=256, dv=128)),
    ("causal segments and keys", "none", "plain", Sizes(b=3, t=2, s=200, h=6, k=3, d=128, dv=24)),
]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles for each row or program, the last ones not full."""
    monkeypatch.setattr(decode_gpu, "PROGRAMS", 20)
    monkeypatch.setattr(decode_tpu, "BYTES", 2**16)
    monkeypatch.setattr(decode_tpu, "PAGES", 3)
    monkeypatch.setattr(decode_xla, "BLOCK", 32)


def interpreted(backend: str, *args: Any, **given: Any) -> Any:
    with compile_for(KERNELS[backend], interpret=True):
        return attention(*args, backend=backend, **given)


@EACH
@pytest.mark.parametrize(("mask", "bias", "more", "z"), CALLS)
def test_a_few_queries(backend: str, mask: str, bias: str, more: str, z: Sizes) -> None:
    check(partial(interpreted, backend), z, options(z, mask, bias, more), slopes=mask == "lengths", hasty=True)


@pytest.mark.parametrize(("mask", "bias", "more", "z"), [*ORDERS, ALSO[0]])
def test_a_few_queries_on_a_tpu(mask: str, bias: str, more: str, z: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_tpu, "BYTES", 2**17)
    check(partial(interpreted, "decode_tpu"), z, options(z, mask, bias, more), slopes=False, hasty=True)


@pytest.mark.parametrize(("mask", "bias", "more", "z"), [*CALLS, *ALSO])
def test_a_few_queries_on_a_cpu(mask: str, bias: str, more: str, z: Sizes) -> None:
    given = options(z, mask, bias, more)
    check(partial(attention, backend="decode_xla"), z, given, slopes=mask in ("lengths", "prefix"))


def test_what_is_not_filled_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not a number there would show up, were it multiplied by nothing."""
    monkeypatch.undo()
    z = Sizes(b=2, t=1, s=1024, h=2, k=1)
    q, k, v = (x.at[:, 512:].set(np.nan) if i else x for i, x in enumerate(qkv(z)))
    for mask in (Mask(causal=True, q_offset=jnp.asarray([100, 511])), Mask(kv_length=jnp.asarray([3, 400]))):
        assert np.isfinite(attention(q, k, v, mask=mask, backend="decode_xla")).all()
        assert "decode_xla   <- runs" in explain_attention(q, k, v, mask=mask)
    k, v = k.at[:, :256].set(np.nan), v.at[:, :256].set(np.nan)
    mask = Mask(causal=True, q_offset=500, window=(200, None))
    assert np.isfinite(attention(q, k, v, mask=mask, backend="decode_xla")).all()
    assert "decode_xla      supports this; all keys are seen" in explain_attention(q, k, v)


def pages_of(z: Sizes, page: int, lengths: list[int]) -> tuple[jax.Array, Pages]:
    """Queries, and a pool of pages that lie about in no order."""
    count = -(-z.s // page)
    order = np.random.default_rng(0).permutation(z.b * count + 3)[: z.b * count].reshape(z.b, count)
    _, k, v = qkv(Sizes(b=z.b * count + 3, t=1, s=page, h=z.h, k=z.k, d=z.d, dv=z.dv))
    q = draw(50, z.b, z.t, z.h, z.d)
    return q, Pages(k, v, jnp.asarray(order), jnp.asarray(lengths))


def of_pages(z: Sizes, q: jax.Array, pages: Pages, window: int | None, **given: Any) -> np.ndarray[Any, Any]:
    """By the formula, text by text."""
    found = []
    for i, length in enumerate(pages.length.tolist()):
        k, v = (np.concatenate(list(np.asarray(x)[pages.table[i]]))[None, :length] for x in (pages.k, pages.v))
        mask = Mask(causal=True, q_offset=length - z.t, window=None if window is None else (window - 1, None))
        given |= {"mask": mask, "bias": None}
        found.append(formula(q[i : i + 1], k, v, given, np.zeros((1, z.t, z.h, z.dv)))[0]["out"])
    return np.concatenate(found)


PAGED = [
    ("xla", Sizes(b=3, t=2, s=128, h=4, k=2)),
    ("decode_gpu", Sizes(b=3, t=2, s=128, h=4, k=2)),
    ("decode_tpu", Sizes(b=3, t=2, s=128, h=4, k=2, d=128, dv=128)),
    ("decode_tpu", Sizes(b=3, t=2, s=128, h=6, k=3, d=128, dv=128)),
]


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("backend", "z"), PAGED)
def test_pages_are_read_in_order(backend: str, z: Sizes, window: int | None) -> None:
    q, pages = pages_of(z, 16, [2, 37, 128])
    sinks = draw(51, z.h)
    run = jax.jit(partial(paged_attention, window=window, softcap=2.0, sinks=sinks, backend=backend))
    with compile_for(KERNELS.get(backend, "cpu"), interpret=True):
        out = run(q, pages)
    expected = of_pages(z, q, pages, window, softcap=2.0, sinks=sinks)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_pages_as_long_as_registers() -> None:
    """Whose channels need not be a multiple of 128."""
    z = Sizes(b=2, t=1, s=256, h=4, k=2)
    q, pages = pages_of(z, 128, [200, 9])
    with compile_for("tpu", interpret=True):
        out = jax.jit(partial(paged_attention, backend="decode_tpu"))(q, pages)
    np.testing.assert_allclose(out, of_pages(z, q, pages, None), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("backend", "z"), PAGED)
def test_pages_that_are_not_seen_are_not_looked_at(backend: str, z: Sizes) -> None:
    """Beyond the length and the window there is no such page; and what is no number elsewhere would show up."""
    q, pages = pages_of(z, 16, [16, 0, 100])
    at, length = jnp.arange(z.s // 16) * 16, pages.length[:, None]
    table = jnp.where((at < length) & (at + 16 > length - z.t - 19), pages.table, 10**6)
    used = jnp.zeros(len(pages.k), bool).at[table].set(True, mode="drop")[:, None, None, None]
    k, v = (jnp.where(used, x, np.nan if backend != "xla" else 0) for x in (pages.k, pages.v))
    with compile_for(KERNELS.get(backend, "cpu"), interpret=True):
        out = jax.jit(partial(paged_attention, window=20, backend=backend))(q, Pages(k, v, table, pages.length))
    assert np.isfinite(out).all()
    assert not out[1].any()


@EACH
def test_slopes_go_through_pages(backend: str) -> None:
    """Those of XLA's; a page of two texts has both of theirs."""
    z = Sizes(b=2, t=1, s=128, h=2, k=2, d=128, dv=128)
    q, pages = pages_of(z, 16, [20, 33])
    pages = replace(pages, table=pages.table.at[1, 0].set(pages.table[0, 0]))

    def total(name: str, k: jax.Array) -> jax.Array:
        return (paged_attention(q, replace(pages, k=k), backend=name) * draw(1, z.b, z.t, z.h, z.dv)).sum()

    with compile_for(KERNELS[backend], interpret=True):
        mine, expected = (jax.jit(jax.grad(partial(total, name)))(pages.k) for name in (backend, "xla"))
    np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-6)
    assert np.any(mine)


PLAIN = ("all", "offset by row", "window", "an empty row", "lengths")
FETCHED: dict[str, Any] = {
    **{name: MASKS[name] for name in PLAIN},
    "texts": lambda z: Mask(segments=(jnp.full((z.b, z.t), 2), jnp.arange(z.s)[None] // 50)),
}


@pytest.mark.parametrize(("name", "paged"), [*((name, False) for name in FETCHED), *((name, True) for name in PLAIN)])
def test_steps_of_a_tpu(name: str, paged: bool) -> None:
    """Every block that somebody sees something of is fetched once, and no other but the first."""
    z, pieces = Sizes(b=3, t=2, s=240, h=2, k=1), 3 if paged else 1
    mask = FETCHED[name](z)
    plan = replace(kernel.plan_of(problem(*qkv(z), mask=mask), z.t, 16 * pieces), keys=16 * pieces)
    given = kernel.operands(problem(*qkv(z), mask=mask), plan)
    numbers, count = decode_tpu.steps(plan, pieces, given | kernel.spans(plan, given))
    if paged:
        numbers["table"] = 1 + jnp.arange(z.b * z.s // 16)
    found = mask.materialise(z.t, z.s)
    pairs = np.broadcast_to(np.ones(1, bool) if found is None else np.asarray(found), (z.b, 1, z.t, z.s))
    seen = pairs.any((1, 2)).reshape(z.b, -1, 16).any(2)
    wanted = {(b, j) for b, j in np.argwhere(seen).tolist()}
    n = jnp.arange(int(count))
    copies = []
    for number in range(pieces):
        row, at = (np.broadcast_to(x, n.shape) for x in decode_tpu.place(plan, pieces, number, n, numbers))
        if paged:  # a page has a number of its own, and the first is nobody's
            row, at = (row - 1) // seen.shape[1], (row - 1) % seen.shape[1]
        brought = list(zip(row.tolist(), at.tolist(), strict=True))
        copies += [one for one, before in zip(brought, [None, *brought], strict=False) if one != before]
    idle = {(-1, seen.shape[1] - 1), (0, 0)} - wanted
    assert [one for one in sorted(copies) if one not in idle] == sorted(wanted)
    starts = {b: min(j for row, j in wanted if row == b) // pieces * pieces for b, _ in wanted}
    begun = [(b, j) for b in range(z.b) for j in range(starts.get(b, 0), starts.get(b, 0) + pieces)]
    assert sum(one in idle for one in copies) <= len(set(begun) - wanted)  # later tiles stay with what was there


@pytest.mark.parametrize("t", [1, 2])
def test_decoding_in_the_interpreter_of_tpus(t: int) -> None:
    """Which has the memories of a TPU: what was never written is not a number, for one."""
    from jax.experimental.pallas import tpu

    z = Sizes(b=3, t=t, s=200, h=4, k=2)
    with compile_for("tpu"), tpu.force_tpu_interpret_mode(tpu.InterpretParams()):
        if t == 1:
            given = options(z, "lengths", "alibi", "sinks")
            check(partial(attention, backend="decode_tpu"), z, given, slopes=False, hasty=True)
            return
        z = replace(z, s=128, d=128, dv=128)
        q, pages = pages_of(z, 16, [2, 37, 128])
        out = jax.jit(partial(paged_attention, window=30, backend="decode_tpu"))(q, pages)
    np.testing.assert_allclose(out, of_pages(z, q, pages, 30), rtol=1e-4, atol=1e-5)


@EACH
def test_pages_over_a_mesh(backend: str) -> None:
    """Rows and heads are split; every device has the pages of all rows."""
    z = Sizes(b=2, t=1, s=128, h=4, k=2, d=128, dv=128)
    q, pages = pages_of(z, 16, [40, 9])
    with jax.set_mesh(make_mesh(data=2, tensor=2)), compile_for(KERNELS[backend], interpret=True):
        out = jax.jit(partial(paged_attention, backend=backend))(q, pages)
    np.testing.assert_allclose(out, of_pages(z, q, pages, None), rtol=1e-4, atol=1e-5)


def test_keys_and_values_that_lie_otherwise_once_they_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve heads of 128 channels lie as those of 24 do, four do not."""
    monkeypatch.undo()
    z = Sizes(b=1, t=1, s=128, h=12, k=12, d=128, dv=24)
    given = options(z, "lengths", "none", "plain")
    with jax.set_mesh(make_mesh(tensor=3)):
        check(partial(interpreted, "decode_tpu"), z, given, slopes=False, hasty=True)


def test_what_does_not_fit_is_named() -> None:
    z = Sizes(b=2, t=1, s=64, h=2, k=1)
    q, pages = pages_of(z, 16, [16, 3])
    k, v, table, length = pages.k, pages.v, pages.table, pages.length
    for bad, message in (
        (Pages(k[0], v, table, length), r"keys \(16, 1, 8\) and values .* must be \[pages, page, heads, width\]"),
        (Pages(k, v[:, :8], table, length), r"keys .* and values \(11, 8, 1, 6\) must be"),
        (Pages(k[..., :4], v, table, length), r"q \(2, 1, 2, 8\) and pages of keys \(11, 16, 1, 4\) must agree"),
        (Pages(k, v, table[:1], length), r"table \(1, 4\) must be .* and length \(2,\) \[batch\], batch is 2"),
        (Pages(k, v, table, length[:1]), r"table \(2, 4\) must be .* and length \(1,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            paged_attention(q, bad)
    with pytest.raises(ValueError, match=r"attention has no backend 'vllm'; there are decode_gpu, .*, xla"):
        paged_attention(q, pages, backend="vllm")
    with compile_for("cuda"), pytest.raises(NotImplementedError, match="pages of 12 positions are no power of two"):
        paged_attention(q, Pages(k[:, :12], v[:, :12], table, length), backend="decode_gpu")
    with pytest.raises(NotImplementedError, match="decode_gpu: runs on cuda, and this is cpu"):
        paged_attention(q, pages, backend="decode_gpu")


def test_decoding_is_for_few_queries_and_caches_of_whole_tiles() -> None:
    def told(t: int, s: int, **given: Any) -> str:
        q = jax.ShapeDtypeStruct((2, t, 8, 64), jnp.bfloat16)
        k = jax.ShapeDtypeStruct((2, s, 2, 64), jnp.bfloat16)
        with compile_for("cuda"):
            return explain_attention(q, k, k, **given)

    mask = Mask(causal=True, q_offset=numbers(0, 9, 2))
    assert "decode_gpu   <- runs" in told(1, 4096, mask=mask)
    assert "17 queries of 4 heads that share keys are more than 64 rows" in told(17, 4096, mask=mask)
    assert "4097 keys are no multiple of 16, so that the cache would be copied" in told(1, 4097, mask=mask)
    assert "64 keys are few" in told(1, 64, mask=mask)
    assert "adds up no bias but ALiBi's" in told(1, 4096, bias=jnp.zeros((8, 1, 4096)))


def test_what_a_tpu_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def told(t: int = 1, s: int = 4096, h: int = 8, k: int = 2, d: int = 64, dv: int | None = None, **more: Any) -> str:
        shapes = (2, t, h, d), (2, s, k, d), (2, s, k, dv or d)
        with compile_for("tpu"):
            return explain_attention(*(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes), **more)

    assert "decode_tpu   <- runs" in told(mask=Mask(causal=True, q_offset=numbers(0, 9, 2)))
    assert "decode_tpu   <- runs" in told(k=1, d=576, dv=512)
    assert "17 queries of 8 heads are more than 128 rows" in told(17)
    assert "adds up no bias but ALiBi's and buckets', and reads no dense mask" in told(bias=jnp.zeros((8, 1, 4096)))
    assert "100 keys are less than a block of 128" in told(s=100)
    assert "200 keys are few" in told(s=200)
    assert "keys of 192 channels and values of 128 lie in different orders" in told(d=192, dv=128)
    assert "128 keys of 128 heads of 64 channels do not fit" in told(h=128, k=128)


def test_tiles_of_a_tpu_that_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large as fits, of a cache of one length in equal parts, and no larger than a window."""
    monkeypatch.undo()

    def tile(s: int, d: int, left: int | None = None) -> int:
        q: Any = jax.ShapeDtypeStruct((2, 1, 32, d), jnp.bfloat16)
        k = jax.ShapeDtypeStruct((2, s, 8, d), jnp.bfloat16)
        return decode_tpu.tile_of(problem(q, k, k, mask=Mask(causal=True, window=(left, None))))[0]

    assert [tile(s, 128) for s in (32768, 600, 512, 300)] == [512, 304, 512, 160]
    assert [tile(s, 64) for s in (32768, 1100, 300)] == [1024, 640, 256]
    assert [tile(4096, d, left=127) for d in (64, 128)] == [128, 128]
    assert [tile(4096, d, left=9) for d in (64, 128)] == [128, 16]


def test_pages_are_explained_as_other_calls_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def told(platform: str, page: int, d: int, n: int = 64, **more: Any) -> str:
        shapes = (4, 1, 8, d), (99, page, 2, d), (4, n), (4,)
        of: list[Any] = [jax.ShapeDtypeStruct(x, jnp.bfloat16 if len(x) == 4 else jnp.int32) for x in shapes]
        q, pool, table, length = of
        with compile_for(platform):
            return explain_paged_attention(q, Pages(pool, pool, table, length), **more)

    table = told("tpu", 16, 128)
    assert "attention on tpu: q (4, 1, 8, 128), k (99, 16, 2, 128), v (99, 16, 2, 128) in pages, table (4, 64)" in table
    assert "decode_tpu   <- runs" in table
    assert "xla             supports this, too; another comes first" in table
    assert "decode_gpu   <- runs" in told("cuda", 16, 64, window=7)
    assert "decode_xla   <- runs" in told("cpu", 16, 64)
    assert "xla          <- runs" in told("cpu", 16, 64, backend="xla")
    table = told("tpu", 64, 96)
    assert "pages of 64 positions lie apart where channels are no multiple of 128" in table
    assert "xla          <- runs" in table
    assert "pages of 24 positions are no power of two from 16 on" in told("cuda", 24, 128)
    assert "a list of 210000 numbers, of steps and pages, does not fit" in told("tpu", 16, 128, n=35000)


def programs(backend: str, heads: int, head_dim: int, rows: int = 2) -> list[tuple[Any, ...]]:
    """A cache and one in pages, each (function, shapes of its arguments)."""

    def of(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    cache, pool = of(rows, 1024, heads, head_dim), of(8 * rows, 128, heads, head_dim)
    q, table, length = of(rows, 1, 24, head_dim), of(rows, 8, dtype=jnp.int32), of(rows, dtype=jnp.int32)

    def plain(q: Any, k: Any, v: Any, length: Any) -> Any:
        return attention(q, k, v, mask=Mask(kv_length=length), sinks=jnp.ones(24), softcap=3.0, backend=backend)

    def paged(q: Any, k: Any, v: Any, table: Any, length: Any) -> Any:
        return paged_attention(q, Pages(k, v, table, length), window=100, backend=backend)

    return [(plain, q, cache, cache, length), (paged, q, pool, pool, table, length)]


@EACH
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_decoding_lowers(backend: str, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with lowering_for(KERNELS[backend]):
        for run, *shapes in programs(backend, 2, head_dim):
            program = jax.jit(run).trace(*shapes).lower(lowering_platforms=(KERNELS[backend],)).as_text()
            assert {"decode_gpu": "triton", "decode_tpu": "tpu_custom_call"}[backend] in program


@NEEDS_LIBTPU
@pytest.mark.parametrize(("heads", "head_dim"), [(12, 64), (8, 96), (2, 128), (3, 128), (8, 128), (4, 256), (1, 256)])
def test_a_tpu_can_decode(heads: int, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a copy of the cache, in whichever order it lies."""
    monkeypatch.undo()
    for run, *shapes in programs("decode_tpu", heads, head_dim, rows=512):
        assert temporary_bytes_of_a_tpu(monkeypatch, run, *shapes) < math.prod(shapes[1].shape) / 4
