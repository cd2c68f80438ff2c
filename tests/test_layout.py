"""Storage layouts are bijections: nothing is lost between a leaf and a file, and a slice is a slice of the whole."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formax.core.layout import (
    CONV_1D,
    CONV_2D,
    CONV_3D,
    SAME,
    TRANSPOSE,
    Index,
    Layout,
    Part,
    Patch,
    Permute,
    Reshape,
    Shape,
    Stacked,
)

Array = np.ndarray[Any, Any]
Case = list[tuple[Layout, Shape]]  # the leaves that one set of stored tensors holds

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8)
SIZE = st.integers(1, 5)


def shapes(rank: int) -> st.SearchStrategy[Shape]:
    return st.tuples(*[SIZE] * rank)


@st.composite
def simple(draw: st.DrawFn) -> tuple[Layout, Shape]:
    """A layout that maps one leaf to one stored tensor."""
    kind = draw(st.sampled_from(["same", "named", "permute", "reshape", "patch"]))
    if kind == "same":
        return SAME, draw(st.integers(0, 3).flatmap(shapes))
    if kind == "named":
        layout = draw(st.sampled_from([TRANSPOSE, CONV_1D, CONV_2D, CONV_3D]))
        return layout, draw(shapes(len(layout.order)))
    if kind == "permute":
        order = tuple(draw(st.permutations(range(draw(st.integers(1, 4))))))
        return Permute(order), draw(shapes(len(order)))
    if kind == "reshape":
        a, b, c = draw(shapes(3))
        return Reshape((1, a * b, c)), (a, b * c)
    patch = draw(st.integers(1, 3).flatmap(shapes))
    channels, out = draw(shapes(2))
    return Patch(patch), (int(np.prod(patch)) * channels, out)


@st.composite
def fused(draw: st.DrawFn) -> Case:
    """Parts of one stored tensor, interleaved or not, along some axis of the stored tensor."""
    then = draw(st.sampled_from([SAME, TRANSPOSE]))
    axis, other, groups = draw(st.integers(0, 1)), draw(SIZE), draw(st.integers(1, 3))
    sizes = tuple(groups * n for n in draw(st.lists(SIZE, min_size=1, max_size=4)))
    case: Case = []
    for i, size in enumerate(sizes):
        part = (size, other) if axis == 0 else (other, size)
        case.append((Part(i, sizes, axis, groups, then), part[::-1] if then is TRANSPOSE else part))
    return case


@st.composite
def stacked(draw: st.DrawFn) -> Case:
    then, shape = draw(simple())
    count = draw(st.integers(1, 4))
    return [(Stacked(count, then), (count, *shape))]


CASES = st.one_of(simple().map(lambda one: [one]), fused(), stacked())


def noise(shape: Shape, dtype: Any, seed: int) -> Array:
    """Random bits: every NaN payload, infinity, subnormal and -0.0 turns up."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(np.random.default_rng(seed).bytes(count), dtype).reshape(shape)


def bits(array: Array) -> tuple[Shape, str, bytes]:
    return array.shape, array.dtype.name, array.tobytes()


def write(case: Case, leaves: Sequence[Array], name: str = "x{}") -> dict[str, Array]:
    layout = case[0][0]
    if isinstance(layout, Part):
        return {name: layout.join(leaves)}
    if isinstance(layout, Stacked):
        return dict(zip(layout.names(name), layout.split(leaves[0]), strict=True))
    return {name: layout.store(leaves[0])}


def read(case: Case, files: dict[str, Array], index: Index | None = None, name: str = "x{}") -> list[Array]:
    return [
        layout.read(files.__getitem__, name, shape, (slice(None),) * len(shape) if index is None else index)
        for layout, shape in case
    ]


@given(case=CASES, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32))
def test_reading_undoes_writing_bit_for_bit(case: Case, dtype: Any, seed: int) -> None:
    leaves = [noise(shape, dtype, seed + i) for i, (_, shape) in enumerate(case)]
    files = write(case, leaves)
    for layout, shape in case:
        assert {array.shape for array in files.values()} == {layout.stored_shape(shape)}
    assert [bits(leaf) for leaf in read(case, files)] == [bits(leaf) for leaf in leaves]


@given(case=CASES, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32))
def test_writing_undoes_reading_bit_for_bit(case: Case, dtype: Any, seed: int) -> None:
    layout, shape = case[0]
    files = {name: noise(layout.stored_shape(shape), dtype, seed + i) for i, name in enumerate(layout.names("x{}"))}
    again = write(case, read(case, files))
    assert {name: bits(array) for name, array in again.items()} == {name: bits(array) for name, array in files.items()}


@given(case=CASES, seed=st.integers(0, 2**32), data=st.data())
def test_a_slice_is_a_slice_of_the_whole(case: Case, seed: int, data: st.DataObject) -> None:
    one = data.draw(st.sampled_from(case))
    layout, shape = one
    files = {
        name: noise(layout.stored_shape(shape), np.float32, seed + i) for i, name in enumerate(layout.names("x{}"))
    }
    index = tuple(data.draw(st.slices(size).filter(lambda s: s.step is None or s.step > 0)) for size in shape)
    whole, part = read([one], files)[0], read([one], files, index)[0]
    expected = whole[index]
    assert part.shape == expected.shape
    assert part.tobytes() == expected.tobytes()


def counting(*shape: int) -> Array:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_fused_projections_lie_one_after_the_other() -> None:
    # nn.Linear's (out, in): 6 rows of q, then 2 of k, then 2 of v, as grouped heads have them
    q, k, v = counting(3, 6), 100 + counting(3, 2), 200 + counting(3, 2)
    parts: Case = [
        (Part(i, (6, 2, 2), then=TRANSPOSE), leaf.shape) for i, leaf in enumerate((q, k, v))
    ]  # our leaves are (in, out)
    stored = write(parts, [q, k, v])["x{}"]
    np.testing.assert_array_equal(stored, np.concatenate([q.T, k.T, v.T], axis=0))
    np.testing.assert_array_equal(read(parts, {"x{}": stored})[1], k)

    # GPT-2's Conv1D (in, out): the same along the second axis, with nothing to transpose
    flat: Case = [(Part(i, (6, 2, 2), axis=1), leaf.shape) for i, leaf in enumerate((q, k, v))]
    np.testing.assert_array_equal(write(flat, [q, k, v])["x{}"], np.concatenate([q, k, v], axis=1))


def test_fused_projections_interleave_by_head() -> None:
    # GPT-NeoX: 3 heads of size 2, rows q0 q0 k0 k0 v0 v0 q1 q1 ...
    q, k, v = counting(5, 6), 100 + counting(5, 6), 200 + counting(5, 6)
    rows = [leaf.T[2 * head : 2 * head + 2] for head in range(3) for leaf in (q, k, v)]
    parts: Case = [(Part(i, (6, 6, 6), groups=3, then=TRANSPOSE), (5, 6)) for i in range(3)]
    np.testing.assert_array_equal(write(parts, [q, k, v])["x{}"], np.concatenate(rows))
    for leaf, found in zip((q, k, v), read(parts, {"x{}": np.concatenate(rows)}), strict=True):
        np.testing.assert_array_equal(found, leaf)

    # one bias of both, where a group has more of one part than of the other: 2 query heads to 1 key head
    sizes, bias = (4, 2), np.array([0, 1, 10, 2, 3, 11], np.float32)
    both: Case = [(Part(0, sizes, groups=2), (4,)), (Part(1, sizes, groups=2), (2,))]
    first, second = read(both, {"x{}": bias})
    assert (first.tolist(), second.tolist()) == ([0, 1, 2, 3], [10, 11])


def convolve(x: Array, kernel: Array, *args: Any, **options: Any) -> jax.Array:
    return jax.lax.conv_general_dilated(jnp.asarray(x), jnp.asarray(kernel), *args, **options)


def test_patch_is_the_convolution() -> None:
    height, width, channels, out = 2, 3, 4, 5
    kernel = noise((out, channels, height, width), np.int8, 0).astype(np.float32)
    image = noise((1, channels, 3 * height, 2 * width), np.int8, 1).astype(np.float32)
    expected = convolve(image, kernel, (height, width), "VALID")  # [1, out, 3, 2]

    leaf = Patch((height, width)).load(kernel, (height * width * channels, out))
    patches = image[0].reshape(channels, 3, height, 2, width).transpose(1, 3, 2, 4, 0).reshape(3, 2, -1)
    np.testing.assert_array_equal((patches @ leaf).transpose(2, 0, 1), expected[0])


@pytest.mark.parametrize(("layout", "rank"), [(CONV_1D, 1), (CONV_2D, 2), (CONV_3D, 3)])
def test_convolutions_are_channels_last(layout: Permute, rank: int) -> None:
    space = (4, 5, 6)[:rank]
    stored = noise((3, 2, *(2, 3, 2)[:rank]), np.int8, 0).astype(np.float32)  # PyTorch: (out, in, *window)
    x = noise((1, 2, *space), np.int8, 1).astype(np.float32)
    torch_way = convolve(x, stored, (1,) * rank, "VALID")

    axes = "DHW"[-rank:]
    leaf = layout.load(stored, tuple(stored.shape[axis] for axis in layout.order))
    our_way = convolve(
        np.moveaxis(x, 1, -1), leaf, (1,) * rank, "VALID", dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C")
    )
    np.testing.assert_array_equal(np.moveaxis(np.asarray(our_way), -1, 1), torch_way)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [(SAME, (4, 6)), (TRANSPOSE, (4, 6)), (Part(1, (2, 6), then=TRANSPOSE), (4, 6)), (Reshape((1, 4, 6)), (4, 6))],
    ids=["same", "transpose", "part", "reshape"],
)
def test_a_read_slice_is_a_view_of_the_file(layout: Layout, shape: Shape) -> None:
    stored = counting(*layout.stored_shape(shape))
    part = layout.read(lambda _: stored, "x", shape, (slice(1, 3), slice(0, 2)))
    assert np.shares_memory(part, stored)


def test_a_slice_of_a_stack_opens_what_it_needs() -> None:
    opened: list[str] = []

    def get(name: str) -> Array:
        opened.append(name)
        return np.full((3, 2), int(name.split(".")[1]), np.float32)

    found = Stacked(5, TRANSPOSE).read(get, "experts.{}.w", (5, 2, 3), (slice(1, 3), slice(0, 1), slice(None)))
    assert opened == ["experts.1.w", "experts.2.w"]
    np.testing.assert_array_equal(found, [[[1, 1, 1]], [[2, 2, 2]]])


def test_declarations_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sizes \(6, 3\) cannot be interleaved in 2 groups"):
        Part(0, (6, 3), groups=2)
    with pytest.raises(ValueError, match="no part 2"):
        Part(2, (6, 3))
    with pytest.raises(ValueError, match="axis -1"):
        Part(0, (6, 3), axis=-1)
    with pytest.raises(ValueError, match=r"\(4, 5\) is no part 1 of sizes \(6, 3\)"):
        Part(1, (6, 3)).stored_shape((4, 5))
    with pytest.raises(ValueError, match=r"\(4, 5\) cannot be stored as \(1, 4\)"):
        Reshape((1, 4)).stored_shape((4, 5))


def test_what_is_stored_with_others_is_not_stored_alone() -> None:
    leaf = np.asarray(jnp.ones((2, 3)))
    with pytest.raises(TypeError, match="join"):
        Part(0, (2, 4)).store(leaf)
    with pytest.raises(TypeError, match="split"):
        Stacked(2).store(leaf)
    with pytest.raises(TypeError, match="read"):
        Stacked(2).load(leaf, (2, 3))
