"""Spans are as many, as long and as likely as those of the reference's routine, whose counts are written out here."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from formax.layers.spec_augment import span_mask


def chances(size: int, length: int, count: int, real: int) -> np.ndarray:
    """How likely each place is hidden by `count` spans at different starts, all sets of starts being equally likely."""
    starts = real - length + 1
    covering = [max(0, min(t, starts - 1) - max(t - length + 1, 0) + 1) for t in range(size)]
    return np.array([1 - math.comb(starts - n, count) / math.comb(starts, count) for n in covering])


@pytest.mark.parametrize(("real", "count"), [(24, 3), (17, 2)])
def test_every_place_is_hidden_as_often_as_it_should(real: int, count: int) -> None:
    # 0.5 * 24 / 4 is 3 whatever is drawn for the part after the point; 0.5 * 17 / 4 is 2 unless that is above 0.875
    rows = 8000
    key = next(k for k in map(jax.random.key, range(9)) if jax.random.uniform(jax.random.split(k)[0]) < 0.8)
    mask = np.asarray(span_mask(key, rows, 24, 0.5, 4, lengths=jnp.full((rows,), real)))
    expected = chances(24, 4, count, real)
    deviation = np.sqrt(expected * (1 - expected) / rows)
    assert (np.abs(mask.mean(0) - expected) <= 4.5 * deviation).all()
    assert not mask[:, real:].any()


def test_the_part_after_the_point_is_the_chance_of_one_more_for_all_rows() -> None:
    # spans of one place do not overlap, so that they can be counted: 0.13 * 20 = 2.6
    draw = jax.vmap(lambda key: span_mask(key, 3, 20, 0.13, 1))
    counts = np.asarray(draw(jax.random.split(jax.random.key(1), 4000))).sum(-1)
    assert set(np.unique(counts)) == {2, 3}
    assert (counts == counts[:, :1]).all()
    assert abs((counts[:, 0] == 3).mean() - 0.6) < 4 * math.sqrt(0.6 * 0.4 / 4000)


def test_rows_are_drawn_apart() -> None:
    mask = np.asarray(span_mask(jax.random.key(0), 400, 60, 0.4, 4))
    assert len(np.unique(mask, axis=0)) > 390


@pytest.mark.parametrize(
    ("probability", "length", "min_spans", "lengths", "counts"),
    [
        (0.0, 1, 2, (20, 7), (2, 2)),  # at least so many
        (0.0, 1, 0, (20, 7), (0, 0)),
        (1.0, 1, 0, (20, 7), (20, 7)),  # no more than there are places
        (0.0, 1, 30, (20, 7, 0), (20, 7, 0)),
    ],
)
def test_counts(
    probability: float, length: int, min_spans: int, lengths: tuple[int, ...], counts: tuple[int, ...]
) -> None:
    mask = span_mask(
        jax.random.key(3), len(lengths), 20, probability, length, min_spans=min_spans, lengths=jnp.array(lengths)
    )
    assert tuple(np.asarray(mask).sum(-1)) == counts


def test_no_more_spans_than_fit_end_to_end() -> None:
    # 20 // 6 = 3 spans, though 10 are asked for: at most 18 places, and at least 8 (starts that follow each other)
    mask = np.asarray(span_mask(jax.random.key(0), 500, 20, 3.0, 6, min_spans=10))
    assert mask.sum(-1).max() <= 18
    assert mask.sum(-1).min() >= 8
    assert (mask.sum(-1) > 12).any()


def test_rows_shorter_than_a_span_have_none() -> None:
    mask = np.asarray(span_mask(jax.random.key(0), 3, 20, 0.9, 5, min_spans=2, lengths=jnp.array([20, 5, 4])))
    assert mask[0].any()
    np.testing.assert_array_equal(mask[1:].sum(-1), [5, 0])


def test_spans_are_whole() -> None:
    mask = np.asarray(span_mask(jax.random.key(0), 50, 60, 0.2, 7))
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(int))
    runs = np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1]
    assert runs.min() == 7


def test_it_traces_with_abstract_inputs() -> None:
    key = jax.eval_shape(lambda: jax.random.key(0))
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
    out = jax.eval_shape(lambda k, n: span_mask(k, 2, 30, 0.1, 5, lengths=n), key, lengths)
    assert (out.shape, out.dtype) == ((2, 30), jnp.bool_)


@pytest.mark.parametrize("length", [0, 9])
def test_spans_that_do_not_fit_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match=rf"spans of {length} do not fit into 8 places; the length must be 1 to 8"):
        span_mask(jax.random.key(0), 1, 8, 0.5, length)
