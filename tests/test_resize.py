"""Resizing as PyTorch does it: `interpolate(x, size, mode="bicubic")`, "bilinear", `adaptive_avg_pool2d(x, size)`.

All of `torch.nn.functional`, of torch 2.13.0.
"""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from formax.layers.resize import bicubic, bilinear, check_pixels, cubic_matrix, grid_of, pair, pooled, stretch_positions

# a map of 3 x 5 that is the same in no two places, and in no direction a straight line
MAP = jnp.arange(1, 16, dtype=jnp.float32).reshape(3, 5, 1) ** 1.5
TORCH = {
    (4, 7): [
        [-0.115788, 0.759201, 2.360442, 3.944983, 5.687849, 8.210412, 9.955236],
        [7.134302, 8.736877, 11.380282, 13.682425, 16.10405, 19.423426, 21.661585],
        [23.69829, 26.16537, 30.072756, 33.279106, 36.568054, 40.92635, 43.815132],
        [37.639095, 40.484585, 44.966854, 48.612392, 52.33218, 57.222794, 60.450607],
    ],
    (2, 3): [[3.890127, 8.293068, 13.962412], [33.27883, 41.99203, 51.37437]],
    (6, 2): [
        [0.576473, 6.960441],
        [4.77985, 12.527206],
        [11.422181, 21.37649],
        [23.937468, 36.398315],
        [35.25825, 49.10977],
        [42.245014, 56.97428],
    ],
}


@pytest.mark.parametrize("size", TORCH)
def test_bicubic_is_torchs(size: tuple[int, int]) -> None:
    found = jax.jit(bicubic, static_argnums=(1, 2))(MAP, *size)
    np.testing.assert_allclose(found[..., 0], TORCH[size], rtol=1e-5, atol=1e-5)


LINEAR = {
    (4, 7): [
        [1.0, 2.044816, 3.50492, 5.196152, 7.198901, 9.363003, 11.18034],
        [9.560587, 11.317864, 13.622929, 16.090693, 18.79377, 21.624369, 23.956863],
        [22.866665, 25.322065, 28.465214, 31.719198, 35.147411, 38.674873, 41.549767],
        [36.482872, 39.389355, 43.084347, 46.872166, 50.808617, 54.831009, 58.094749],
    ],
    (2, 3): [[5.199951, 9.553968, 15.110632], [32.626583, 40.810978, 49.663639]],
}
POOLED = {
    (2, 3): [[9.261406, 14.028709, 19.450779], [27.817322, 34.828709, 42.275185]],
    (4, 2): [[3.008193, 8.125497], [10.811532, 17.604446], [30.128143, 39.76672], [41.641418, 52.450043]],
}


@pytest.mark.parametrize(
    ("resize", "size", "expected"),
    [(bilinear, size, values) for size, values in LINEAR.items()]
    + [(pooled, size, values) for size, values in POOLED.items()],
)
def test_bilinear_and_adaptive_pooling_are_torchs(resize: Any, size: tuple[int, int], expected: Any) -> None:
    np.testing.assert_allclose(resize(MAP, *size)[..., 0], expected, rtol=1e-5, atol=1e-5)


def test_leading_and_last_axes_are_carried_along() -> None:
    maps = jnp.asarray(np.random.RandomState(0).standard_normal((2, 4, 3, 5, 6)), jnp.float32)
    found = np.asarray(bicubic(maps, 7, 4))
    assert found.shape == (2, 4, 7, 4, 6)
    np.testing.assert_allclose(found[1, 2, ..., 3], bicubic(maps[1, 2, ..., 3:4], 7, 4)[..., 0], atol=1e-6)


def test_the_same_size_changes_nothing() -> None:
    np.testing.assert_array_equal(bicubic(MAP, 3, 5), MAP)


@pytest.mark.parametrize(("size", "new"), [(1, 4), (4, 1), (14, 16), (37, 5)])
def test_a_constant_stays_constant(size: int, new: int) -> None:
    assert cubic_matrix(size, new).shape == (new, size)
    np.testing.assert_allclose(cubic_matrix(size, new).sum(1), 1, rtol=1e-12)


def test_low_precision_is_computed_in_float32() -> None:
    found = bicubic(MAP.astype(jnp.bfloat16), 4, 7)
    assert found.dtype == jnp.bfloat16
    whole = bicubic(MAP.astype(jnp.bfloat16).astype(jnp.float32), 4, 7).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(whole, np.float32))


def test_positions_outside_the_grid_stay() -> None:
    table = jnp.asarray(np.random.RandomState(0).standard_normal((2 + 3 * 5, 4)), jnp.float32)
    found = stretch_positions(table, (3, 5), (4, 7), first=2)
    np.testing.assert_array_equal(found[:2], table[:2])
    np.testing.assert_array_equal(found[2:].reshape(4, 7, 4), bicubic(table[2:].reshape(3, 5, 4), 4, 7))


def test_positions_of_the_same_grid_are_the_table_itself() -> None:
    table = jnp.ones((1 + 3 * 5, 4))
    assert stretch_positions(table, (3, 5), (3, 5)) is table


def test_grids_count_whole_patches() -> None:
    assert pair(7) == (7, 7)
    assert pair((5, 9)) == (5, 9)
    assert grid_of(23, 5) == (4, 4)
    assert grid_of((22, 24), (4, 3)) == (5, 8)
    with pytest.raises(ValueError, match=r"height and width; got \(1, 2, 3\)"):
        pair((1, 2, 3))
    with pytest.raises(ValueError, match="image of 4 x 9 has no patch of 5 x 5"):
        grid_of((4, 9), 5)


def test_pixels_are_checked() -> None:
    c = SimpleNamespace(num_channels=3, image_size=20, patch_size=4)
    assert check_pixels(np.zeros((2, 3, 20, 20)), c, False) == (5, 5)
    assert check_pixels(np.zeros((2, 3, 30, 17)), c, True) == (7, 4)
    for wrong in (None, np.zeros((3, 20, 20)), np.zeros((2, 20, 20, 3))):
        with pytest.raises(ValueError, match=r"must be \[batch, 3 channels, height, width\], got (nothing|shape)"):
            check_pixels(wrong, c, False)
    with pytest.raises(ValueError, match=r"are 30 x 17, the model's images 20 x 20: resize them, or .*interpolate_pos"):
        check_pixels(np.zeros((2, 3, 30, 17)), c, False)
