"""Norms of rows of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mem_aop_jax._kernels.row_access import grouped_row_norms

ROWS = np.random.default_rng(0).normal(size=(1, 12, 300)).astype(np.float32)
SIZES = [0, 1e-34, 1e-30, 1e-14, 1e-13, 1, 1e12, 1e18, 1e19, 1e30, 1e36]


def wanted_norms(rows):
    return np.linalg.norm(np.asarray(rows, np.float64), axis=-1) / 256


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, lambda function: function])
def test_norms_of_rows_of_any_size(transform):
    """Of all rows, or of each another size: their squares underflow, overflow, or neither."""
    norms = transform(grouped_row_norms)
    for sizes in (*([size] * 12 for size in SIZES), [*SIZES, 1]):
        rows = ROWS * np.array(sizes, np.float32)[:, None]
        found = norms(rows[None] if transform is jax.vmap else rows).reshape(1, -1)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, wanted_norms(rows), rtol=1e-6)


def test_norms_of_rows_that_are_not_finite():
    others = np.arange(12) != 3
    for size in (1e-30, 1, 1e30):
        for bad in (np.nan, np.inf, -np.inf):
            rows = ROWS * np.float32(size)
            rows[0, 3, 5] = bad
            found = grouped_row_norms(rows)
            assert np.isfinite(found).tolist() == [others.tolist()]
            np.testing.assert_allclose(found[:, others], wanted_norms(rows[:, others]), rtol=1e-6)


def test_a_norm_does_not_depend_on_other_rows():
    """Nor on a power of 2, but for its own: what is chosen does not either."""
    wanted = np.asarray(grouped_row_norms(ROWS))
    for other in (0, 1e-30, 1e30, np.nan):
        rows = ROWS.copy()
        rows[:, 0] = other
        np.testing.assert_array_equal(grouped_row_norms(rows)[:, 1:], wanted[:, 1:])
        for power in (2.0**-80, 2.0**80):
            found = grouped_row_norms(ROWS * np.float32(power))
            np.testing.assert_array_equal(found, wanted * np.float32(power))
