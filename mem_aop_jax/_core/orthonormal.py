"""Orthonormal columns by Cholesky-QR: Householder QR is slow on accelerators."""

import chex
import jax
import jax.numpy as jnp
from jax import lax

from mem_aop_jax._numerics import safe_divide


@jax.jit
def orthonormal(columns: chex.Array, old: chex.Array) -> chex.Array:
    """Orthonormal columns that span `columns`; directions of `old` fill up a lower rank.

    Cholesky-QR, three times, the first time shifted, on columns of unit length: after a few steps
    of subspace iteration they are nearly orthogonal, however different their lengths. If any
    column is not finite, `old` is returned; if that is not finite either (a damaged checkpoint),
    columns of the identity.

    Args:
      columns: `(features, q)` float32 or float64, of any rank and size.
      old: `(features, q)`, orthonormal columns.
    """
    dtype = old.dtype
    columns = columns.astype(dtype)
    columns = safe_divide(columns, jnp.max(jnp.abs(columns), initial=0))
    columns = safe_divide(columns, jnp.linalg.norm(columns, axis=0, keepdims=True))
    columns += 1e-3 * old  # then the rank is q
    rank = columns.shape[1]
    identity = jnp.eye(rank, dtype=dtype)
    for shift in (rank**2 * jnp.finfo(dtype).eps, 0, 0):  # more than the rounding of the first
        gram = jnp.matmul(columns.T, columns, precision="highest") + shift * identity
        inverse = lax.platform_dependent(
            gram, cpu=inverse_in_blocks, cuda=inverse_by_elimination, default=inverse_factor
        )
        columns = jnp.matmul(columns, inverse.T, precision="highest")  # solving for N x q is slow
    old = jnp.where(
        jnp.all(jnp.isfinite(old)), old, jnp.eye(old.shape[0], old.shape[1], dtype=dtype)
    )
    return jnp.where(jnp.all(jnp.isfinite(columns)), columns, old)


def inverse_factor(gram: chex.Array) -> chex.Array:
    """The inverse of the Cholesky factor of a Gram matrix, `(q, q)`."""
    return _invert_lower(jnp.linalg.cholesky(gram))


def _invert_lower(lower):
    identity = jnp.eye(len(lower), dtype=lower.dtype)
    return lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)


def inverse_in_blocks(gram: chex.Array) -> chex.Array:
    """As `inverse_factor`, by blocks so small that BLAS on CPUs starts no threads of its own.

    Its threads would wait for those of XLA, for milliseconds.
    """

    def invert_block(lower):
        half = len(lower) // 2
        if half < 12:
            return _invert_lower(lower)
        first, last = (invert_block(lower[part, part]) for part in (slice(half), slice(half, None)))
        below = -jnp.matmul(
            jnp.matmul(last, lower[half:, :half], precision="highest"), first, precision="highest"
        )
        return jnp.block([[first, jnp.zeros_like(below.T)], [below, last]])

    return invert_block(jnp.linalg.cholesky(gram))


def inverse_by_elimination(gram: chex.Array) -> chex.Array:
    """As `inverse_factor`, in a few kernels: a GPU waits long for its linear algebra libraries."""
    rank = len(gram)
    if rank > 64:  # so many steps
        return inverse_factor(gram)
    both = jnp.concatenate([gram, jnp.eye(rank, dtype=gram.dtype)], axis=1)
    for step in range(rank):
        below = jnp.arange(rank) > step
        factor = jnp.where(below, both[:, step] / both[step, step], 0)
        both -= jnp.outer(factor, both[step])
    return both[:, rank:] / jnp.sqrt(jnp.diagonal(both))[:, None]
