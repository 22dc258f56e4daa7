"""Orthonormal columns on a GPU: products by XLA, the algebra of Gram matrices in kernels.

XLA starts a kernel for each step of an elimination, or waits for a library.
"""

import functools

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mem_aop_jax._compat import pallas_triton as plgpu

MAX_RANK = 64  # a kernel holds a few matrices of this size in registers
MIN_SIZE = 16  # of a matrix in a kernel
PRODUCT = functools.partial(jnp.matmul, precision="highest")


def orthonormal(
    columns: chex.Array, old: chex.Array, fill: float, shifts: tuple[float, ...]
) -> chex.Array:
    """As `orthonormal` in `mem_aop_jax._core.orthonormal`.

    Args:
      columns: `(features, q)` float32.
      old: `(features, q)` float32.
      fill: how much of `old` is added to columns of unit length.
      shifts: what the Gram matrix gets on its diagonal, in each round.
    """
    rank = old.shape[1]
    size = max(MIN_SIZE, pl.next_power_of_2(rank))
    missing = (0, 0), (0, size - rank)
    both = jnp.concatenate([jnp.pad(part, missing) for part in (columns, old)], axis=1)
    factor = functools.partial(_factor, rank=rank, size=size)
    combination, old_is_finite = factor(PRODUCT(both.T, both), fill=fill, shift=shifts[0])
    columns = PRODUCT(both, combination)
    for shift in shifts[1:]:
        combination, is_finite = factor(PRODUCT(columns.T, columns), shift=shift)
        columns = PRODUCT(columns, combination)
    columns = columns[:, :rank]
    old = jnp.where(old_is_finite > 0, old, jnp.eye(old.shape[0], old.shape[1], dtype=old.dtype))
    return jnp.where(is_finite > 0, columns, old)


def _factor(gram, *, rank, size, shift, fill=None):
    """R^T for orthonormal columns C R^T, by the Gram matrix of C; and whether R is finite.

    With `fill` the matrix is that of [C, O]: the result is for [C, O], R^T the factor for
    C / ||C|| + fill O, and the flag says whether the matrix of O is finite.
    """
    number = 1 if fill is None else 2  # of blocks, one above the other
    return pl.pallas_call(
        functools.partial(_kernel, rank=rank, fill=fill, shift=shift),
        out_shape=(
            jax.ShapeDtypeStruct((number * size, size), jnp.float32),
            jax.ShapeDtypeStruct((1,), jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=4),
    )(gram)


def _kernel(gram_ref, result_ref, is_finite_ref, *, rank, fill, shift):
    size = result_ref.shape[1]
    rows, columns = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    on_diagonal = rows == columns

    def diagonal(matrix):
        return jnp.sum(jnp.where(on_diagonal, matrix, 0), axis=1)

    def is_finite(matrix):
        return jnp.min(jnp.where(jnp.abs(matrix) < jnp.inf, 1.0, 0.0))[None]

    gram = gram_ref[:size, :size]
    if fill is not None:
        squares = diagonal(gram)
        scales = jnp.where(squares > 0, 1 / jnp.sqrt(squares), 1.0)
        old = gram_ref[size:, size:]
        cross = gram_ref[:size, size:] * scales[:, None]
        other_cross = gram_ref[size:, :size] * scales[None]
        gram = gram * scales[:, None] * scales[None]
        gram += fill * (cross + other_cross) + fill**2 * old
        is_finite_ref[...] = is_finite(old)
    gram += jnp.where(on_diagonal, jnp.where(rows < rank, shift, 1.0), 0.0)

    def eliminate(step, matrices):
        left, right = matrices

        def row(matrix):
            return jnp.sum(jnp.where(rows == step, matrix, 0), axis=0)

        column = jnp.sum(jnp.where(columns == step, left, 0), axis=1)
        pivot = jnp.sum(jnp.where(on_diagonal & (rows == step), left, 0))
        factor = jnp.where(jnp.arange(size) > step, column / pivot, 0)[:, None]
        return left - factor * row(left)[None], right - factor * row(right)[None]

    identity = jnp.where(on_diagonal, 1.0, 0.0)
    left, right = lax.fori_loop(0, rank, eliminate, (gram, identity))
    transposed = (right / jnp.sqrt(diagonal(left))[:, None]).T
    if fill is None:
        result_ref[...] = transposed
        is_finite_ref[...] = is_finite(transposed)
    else:
        result_ref[:size, :] = scales[:, None] * transposed
        result_ref[size:, :] = fill * transposed
