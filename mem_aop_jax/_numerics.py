"""Numbers of any size: norms without under- or overflow, quotients, dtypes of sums."""

import functools
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

SCALES = (2.0**80, 1.0, 2.0**-80)  # the squares of any row fit with one of them


@jax.jit  # also where the caller is not: what depends on the platform is compiled each time
def row_norms(rows: chex.Array) -> chex.Array:
    """Euclidean norms of rows of any finite size, in units of 256, without under- or overflow.

    Takes the first finite one of three scaled sums of squares.
    """
    on_cpu = functools.partial(_row_norms, blocks=16)
    return jax.lax.platform_dependent(rows, cpu=on_cpu, default=_row_norms)


def _row_norms(rows, blocks=1):
    """With the columns in so many blocks, which CPUs add up faster than those of a row."""
    if blocks > 1:
        missing = [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % blocks)]
        rows = jnp.pad(rows, missing)
        rows = rows.reshape(*rows.shape[:-1], blocks, rows.shape[-1] // blocks)
    sums = tuple(jnp.square(rows * scale) for scale in SCALES)
    for axis in range(-1 - (blocks > 1), 0):
        sums = _sums(sums, axis)
    return norms_from_sums(sums)


def norms_from_sums(sums: Sequence[chex.Array]) -> chex.Array:
    """As `row_norms`, of sums of squares of rows times each of `SCALES`."""
    small, medium, large = (
        jnp.sqrt(total) * (2.0**-8 / scale) for total, scale in zip(sums, SCALES, strict=True)
    )
    return jnp.where(sums[0] < jnp.inf, small, jnp.where(sums[1] < jnp.inf, medium, large))


def _sums(operands, axis):
    """In one reduction, since only that reads the rows once and stores nothing of their size."""
    zeros = (np.zeros((), operands[0].dtype),) * len(operands)

    def add(a, b):
        return tuple(x + y for x, y in zip(a, b, strict=True))

    return jax.lax.reduce(operands, zeros, add, dimensions=(operands[0].ndim + axis,))


def safe_divide(values: chex.Array, size: chex.Array) -> chex.Array:
    """Values in units of a size; as they are where it is 0."""
    return values / jnp.where(size > 0, size, 1)


def accumulation_dtype(dtype: chex.ArrayDType) -> jnp.dtype:
    """The dtype in which rows are added and products accumulate: float32, or float64 for itself."""
    return jnp.zeros((), jnp.float64 if dtype == jnp.float64 else jnp.float32).dtype


def widened(values: chex.Array) -> chex.Array:
    """Values in the dtype in which they are added up."""
    return values.astype(accumulation_dtype(values.dtype))


def widest_dtype(*dtypes: chex.ArrayDType) -> jnp.dtype:
    """The one with the most bytes, of equals the first."""
    return max(dtypes, key=lambda dtype: dtype.itemsize)
