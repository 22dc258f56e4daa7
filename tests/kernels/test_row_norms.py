"""Norms of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mem_aop_jax._kernels.row_access import grouped_row_norms

ROWS = np.random.default_rng(0).normal(size=(1, 12, 300)).astype(np.float32)
SIZES = [0, 1e-34, 1e-30, 1e-14, 1e-13, 1, 1e12, 1e18, 1e19, 1e30, 1e36]


def norms_of(rows):
    return np.linalg.norm(np.asarray(rows, np.float64), axis=-1) / 256


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, lambda function: function])
@pytest.mark.parametrize("size", [*SIZES, None])
def test_norms_of_rows_of_any_size(size, transform):
    """Of all rows, or of each another size: their squares underflow, overflow, or neither."""
    sizes = [*SIZES, 1] if size is None else [size] * len(ROWS[0])
    rows = jnp.asarray(ROWS * np.array(sizes, np.float32)[:, None])
    given = rows[None] if transform is jax.vmap else rows
    found = transform(grouped_row_norms)(given).reshape(1, -1)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, norms_of(rows), rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("size", [1e-30, 1, 1e30])
def test_norms_of_rows_that_are_not_finite(size, bad):
    rows = jnp.asarray(ROWS * np.float32(size)).at[0, 3, 5].set(bad)
    found = grouped_row_norms(rows)
    assert np.isfinite(found).tolist() == [[number != 3 for number in range(12)]]
    others = np.arange(12) != 3
    np.testing.assert_allclose(found[:, others], norms_of(rows[:, others]), rtol=1e-6)


@pytest.mark.parametrize("other", [0, 1e-30, 1e30, jnp.nan])
def test_a_norm_does_not_depend_on_other_rows(other):
    """Nor on a power of 2, but for its own: what is chosen does not either."""
    rows = jnp.asarray(ROWS)
    found = grouped_row_norms(rows.at[:, 0].set(other))
    np.testing.assert_array_equal(found[:, 1:], grouped_row_norms(rows)[:, 1:])
    for power in (2.0**-80, 2.0**80):
        np.testing.assert_array_equal(
            grouped_row_norms(rows * power), grouped_row_norms(rows) * power
        )
