"""Orthonormal columns by Cholesky-QR: Householder QR is slow on accelerators."""

import functools

import chex
import jax
import jax.numpy as jnp
from jax import lax

from mem_aop_jax._kernels import orthonormal_gpu
from mem_aop_jax._kernels.dispatch import cuda_kernel_or_xla
from mem_aop_jax._numerics import safe_divide

FEW = 32  # columns, whose Gram matrix has little rounding
FILL = 1e-3  # how much of the old columns is added to new ones, so that these have full rank


@jax.jit
def orthonormal(columns: chex.Array, old: chex.Array) -> chex.Array:
    """Orthonormal columns that span `columns`; directions of `old` fill up a lower rank.

    Cholesky-QR, in two or three `rounds`, the first of them shifted, on columns of unit length:
    after a few steps of subspace iteration they are nearly orthogonal, however different their
    lengths. If any column is not finite, `old` is returned; if that is not finite either (a damaged
    checkpoint), columns of the identity.

    Args:
      columns: `(features, q)` float32 or float64, of any rank; the dtype must hold their squares.
      old: `(features, q)`, orthonormal columns.
    """
    dtype, rank = old.dtype, old.shape[1]
    columns = columns.astype(dtype)
    shift = (2 if rank <= FEW else rank) * rank * float(jnp.finfo(dtype).eps)  # above the rounding
    shifts = (shift, *[0.0] * (rounds(rank) - 1))
    by_xla = functools.partial(_orthonormal, shifts=shifts)
    if dtype != jnp.float32 or not 0 < rank <= orthonormal_gpu.MAX_RANK:
        return by_xla(columns, old)
    kernel = functools.partial(orthonormal_gpu.orthonormal, fill=FILL, shifts=shifts)
    return cuda_kernel_or_xla(kernel, by_xla, columns, old)


def rounds(rank: int) -> int:
    """Of Cholesky-QR: in how many so many columns are orthonormal to float32's rounding."""
    return 2 if rank <= FEW else 3


def _orthonormal(columns, old, *, shifts):
    dtype = old.dtype
    columns = safe_divide(columns, jnp.linalg.norm(columns, axis=0, keepdims=True))
    columns += FILL * old
    identity = jnp.eye(columns.shape[1], dtype=dtype)
    for shift in shifts:
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
