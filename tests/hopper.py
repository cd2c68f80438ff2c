"""Mosaic GPU's instructions as an interpreter that knows no timing: copies and products happen at once, one warp group
after the other, barriers do nothing.

JAX's own interpreter refuses products of warp groups. This one says what a kernel computes, not that its barriers are
right. It stands in for the module `jax.experimental.pallas.mosaic_gpu`.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


class LoweringSemantics(enum.Enum):
    Warpgroup = 1


@dataclass(frozen=True)
class CompilerParams:
    approx_math: bool
    lowering_semantics: LoweringSemantics


@dataclass(frozen=True)
class BlockSpec:
    block_shape: tuple[int | None, ...]
    index_map: Callable[..., tuple[Any, ...]]


def SMEM(shape: tuple[int, ...], dtype: Any) -> Any:  # noqa: N802
    return pltpu.VMEM(shape, dtype)


def Barrier(*, num_barriers: int = 1, num_arrivals: int = 1) -> Any:  # noqa: N802
    return pltpu.VMEM((num_barriers,), jnp.int32)


@dataclass(frozen=True)
class ACC:
    """Sums of products in registers."""

    shape: tuple[int, ...]
    dtype: Any

    @staticmethod
    def init(x: Any) -> Any:
        return x


def nothing(*_: Any) -> None:
    """What only matters in time."""


barrier_arrive = barrier_wait = commit_smem = wait_smem_to_gmem = nothing


def copy_gmem_to_smem(source: Any, target: Any, barrier: Any) -> None:
    target[...] = source[...]


def copy_smem_to_gmem(source: Any, target: Any) -> None:
    target[...] = source[...]


def wgmma(acc: Any, a: Any, b: Any) -> None:
    """Adds a product of tiles, summed in float32, the second factor always from shared memory."""
    a, b = a[...], b[...]
    assert acc.shape == (a.shape[0], b.shape[1])
    assert a.dtype == b.dtype
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    acc[...] += jnp.dot(a, b, preferred_element_type=jnp.float32, precision=exact)


@dataclass(frozen=True)
class Block:
    """What a step of a pipeline may read: a part of an array, the other way round where that is asked for."""

    place: Any
    turned: tuple[int, ...] | None = None

    def transpose(self, order: tuple[int, ...]) -> Block:
        return Block(self.place, order)

    def __getitem__(self, index: Any) -> Any:
        assert index is ...
        return self.place[...] if self.turned is None else self.place[...].transpose(self.turned)


def emit_pipeline_warp_specialized(
    body: Any, *, grid: Sequence[Any], compute_context: Any, in_specs: Sequence[BlockSpec], **of_timing: Any
) -> Callable[..., None]:
    """Its blocks are read where they lie."""

    def block(array: Any, spec: BlockSpec, at: tuple[Any, ...]) -> Any:
        places = zip(spec.index_map(*at), spec.block_shape, strict=True)
        return Block(array.at[tuple(n if size is None else pl.ds(n * size, size) for n, size in places)])

    def run(*arrays: Any) -> None:
        def step(n: Any, carry: Any) -> Any:
            at: list[Any] = []
            for size in reversed(grid):
                at.insert(0, jax.lax.rem(n, jnp.int32(size)))
                n = jax.lax.div(n, jnp.int32(size))
            blocks = [block(array, spec, tuple(at)) for array, spec in zip(arrays, in_specs, strict=True)]
            return body(tuple(at), *blocks, *[None] * len(blocks), carry)

        count = functools.reduce(lambda a, b: a * b, grid, jnp.int32(1))
        compute_context(lambda carry: jax.lax.fori_loop(0, count, step, carry))

    return run


def kernel(
    body: Any,
    *,
    out_type: Any,
    scratch_types: Sequence[Any],
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    num_threads: int,
    thread_name: str,
    compiler_params: Any,
) -> Callable[..., Any]:
    """A program after the other, and of each the warp groups that compute, without the last, which fetches."""
    outs = out_type if isinstance(out_type, list) else [out_type]

    def program(*refs: Any) -> None:
        places = {name: pl.program_id(n) for n, name in enumerate(grid_names)}
        for group in range(num_threads - 1):
            named = {**places, thread_name: jnp.int32(group)}
            with mock.patch.object(jax.lax, "axis_index", named.__getitem__):
                body(*refs)

    def run(*arrays: Any) -> Any:
        made = pl.pallas_call(program, grid=grid, out_shape=outs, scratch_shapes=scratch_types, interpret=True)
        found = made(*arrays)
        return found if isinstance(out_type, list) else found[0]

    return run


@contextmanager
def interpreted() -> Iterator[None]:
    """Scopes inside know what registers are, which hold zeros at first."""
    scoped = pl.run_scoped

    def run_scoped(run: Any, *types: ACC) -> Any:
        def zeroed(*refs: Any) -> Any:
            for ref in refs:
                ref[...] = jnp.zeros(ref.shape, ref.dtype)
            return run(*refs)

        return scoped(zeroed, *(pltpu.VMEM(t.shape, t.dtype) for t in types))

    def run_state(run: Any) -> Any:
        def on(x: jax.Array) -> Any:
            def started(ref: Any) -> Any:
                ref[...] = x
                run(ref)
                return ref[...]

            return scoped(started, pltpu.VMEM(x.shape, x.dtype))

        return on

    with mock.patch.object(pl, "run_scoped", run_scoped), mock.patch.object(pl, "run_state", run_state):
        yield
