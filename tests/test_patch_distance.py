"""The table of distances among patches, pair by pair."""

import jax.numpy as jnp
import numpy as np

from formax.layers import patch_distance


def test_every_pair_has_the_row_of_its_distance() -> None:
    rows, columns = 2, 3
    index = patch_distance.index(rows, columns)
    known = (2 * rows - 1) * (2 * columns - 1)
    places = [(y, x) for y in range(rows) for x in range(columns)]
    found: dict[tuple[int, int], int] = {}
    for i, (y, x) in enumerate(places):
        for j, (v, u) in enumerate(places):
            assert found.setdefault((y - v, x - u), index[1 + i, 1 + j]) == index[1 + i, 1 + j]
    assert sorted(found.values()) == list(range(known))  # one row each, and no other
    assert set(index[0, 1:]) == {known}  # the class token looks at patches, they at it, it at itself
    assert set(index[1:, 0]) == {known + 1}
    assert index[0, 0] == known + 2


def test_a_table_is_stretched_along_both_axes() -> None:
    """A slope stays one, and the rows about the class token stay as they are."""
    down, right = np.meshgrid(np.linspace(-1, 1, 5), np.linspace(-1, 1, 5), indexing="ij")
    table = jnp.asarray(np.concatenate([np.stack([down, right], -1).reshape(-1, 2), [[7, 8], [9, 10], [11, 12]]]))
    out = np.asarray(patch_distance.stretched({"embedding": table}, (3, 3), (4, 6)))
    assert out.shape == (7 * 11 + 3, 2)
    np.testing.assert_array_equal(out[-3:], table[-3:])
    near = out[:-3].reshape(7, 11, 2)
    assert (np.diff(near[..., 0], axis=0) >= 0).all()
    assert np.abs(np.diff(near[..., 0], axis=1)).max() < 1e-6
    assert (np.diff(near[..., 1], axis=1) >= 0).all()
    assert patch_distance.stretched({"embedding": table}, (3, 3), (3, 3)) is table
    np.testing.assert_allclose(near[3, 5], 0, atol=1e-6)  # the middle
