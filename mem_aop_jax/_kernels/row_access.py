"""Norms, gathers and replacements of rows in groups: by TPU kernels where they run, else by XLA.

Where a function takes `chosen`, `(groups, k)` int32, these are indices of rows of each group.
"""

import functools
import math

import chex
import jax
import jax.numpy as jnp
from jax import lax

from mem_aop_jax._compat import axes_of, vary
from mem_aop_jax._kernels import row_access_tpu, row_sums_tpu, subspace_products_tpu
from mem_aop_jax._kernels.dispatch import kernel_or_xla
from mem_aop_jax._numerics import accumulation_dtype, row_norms


@jax.jit  # as `row_norms`
def grouped_row_norms(rows: chex.Array) -> chex.Array:
    """`row_norms` of rows `(groups, rows, features)` of any floating dtype, `(groups, rows)`."""
    groups, number, features = rows.shape
    block_rows = row_sums_tpu.choose_block_rows(groups * number, features, rows.dtype, False)

    def xla(rows):
        return row_norms(rows.astype(accumulation_dtype(rows.dtype)))

    def kernel(rows):
        norms, _ = row_sums_tpu.norms_and_sums(flat_rows(rows), None, block_rows)
        return norms.reshape(groups, number)

    return kernel_or_xla(kernel, xla, rows) if block_rows else xla(rows)


@jax.jit  # as `row_norms`
def gather_rows(rows: chex.Array, chosen: chex.Array) -> chex.Array:
    """The chosen rows, `(groups, k, features)`; NaN in place of one that does not exist."""
    block_rows = choose_block_rows(rows, chosen.size)

    def gather(rows, chosen):
        return rows.at[chosen].get(mode="fill", fill_value=jnp.nan)

    def xla(rows, chosen):
        if len(rows) == 1:
            return gather(rows[0], chosen[0])[None]
        return jax.vmap(gather)(rows, chosen)

    def kernel(rows, chosen):
        gathered = row_access_tpu.map_gathered_rows(
            lambda gathered, _: gathered, _gather_operands(rows, chosen), block_rows, rows.dtype
        ).reshape(*chosen.shape, -1)
        return jnp.where(_exists(rows, chosen)[..., None], gathered, jnp.nan)

    return kernel_or_xla(kernel, xla, rows, chosen) if block_rows else xla(rows, chosen)


@functools.partial(jax.jit, static_argnames=("precision", "stored", "add_projection", "dtype"))
def gather_residuals(
    rows: chex.Array,
    chosen: chex.Array,
    weights: chex.Array | None,
    coordinates: chex.Array,
    basis: chex.Array,
    precision: lax.PrecisionLike,
    *,
    stored: bool = False,
    add_projection: bool = False,
    dtype,
) -> chex.Array:
    """weights * (rows - coordinates basis^T) of the chosen rows; NaN for one that does not exist.

    Args:
      rows: `(groups, rows, features)`.
      chosen: `(groups, k)` int32.
      weights: `(groups, k)`; None is all ones.
      coordinates: `(groups, rows, q)`, of all rows.
      basis: `(features, q)`.
      precision: of the product, the projection of the rows.
      stored: whether another product of all rows keeps them until they are gathered.
      add_projection: whether it is added to the result, without weights.
      dtype: of the result, `(groups, k, features)`; inside it is float32 (float64 for float64).
    """
    inner_dtype = accumulation_dtype(rows.dtype)
    weights = jnp.ones_like(chosen) if weights is None else weights
    arrays = rows, chosen, weights.astype(inner_dtype), gather_rows(coordinates, chosen), basis
    block_rows = choose_block_rows(rows, chosen.size, basis.shape[1])
    kernel_precision = subspace_products_tpu.choose_precision(coordinates, basis, precision)

    def combine(rows, weights, projections):
        residuals = weights * (rows.astype(inner_dtype) - projections)
        return (projections + residuals if add_projection else residuals).astype(dtype)

    def xla(rows, chosen, weights, coordinates, basis):
        coordinates, basis = coordinates.astype(inner_dtype), basis.astype(inner_dtype)
        projections = jnp.matmul(coordinates, basis.T, precision=precision)
        gather = _gather_stored_rows if stored else gather_rows
        return combine(gather(rows, chosen), weights[..., None], projections)

    def kernel(rows, chosen, weights, coordinates, basis):
        def combine_block(rows, _, weights, coordinates, directions):
            projections = row_access_tpu.product(coordinates, directions, kernel_precision)
            return combine(rows, weights, projections)

        # The coordinates of a row that does not exist are NaN, and so is its residual.
        blocked = weights.reshape(-1, 1), flat_rows(coordinates)
        operands = _gather_operands(rows, chosen, blocked, (basis.T,))
        residuals = row_access_tpu.map_gathered_rows(combine_block, operands, block_rows, dtype)
        return residuals.reshape(*chosen.shape, -1)

    if not basis.shape[1] or block_rows is None or kernel_precision is None:
        return xla(*arrays)
    return kernel_or_xla(kernel, xla, *arrays)


def _gather_stored_rows(rows, chosen):
    """As `gather_rows`, of rows that are stored for another product, too.

    XLA for CPUs would compute the chosen ones anew, and keep for that what the rows came from. What
    goes into a branch is stored, once with the other uses of the same shape.
    """

    def on_cpu(rows, chosen):
        def gathered(stored):
            return gather_rows(stored.reshape(rows.shape), chosen)

        def missing(stored):
            result = jnp.full((*chosen.shape, stored.shape[1]), jnp.nan, stored.dtype)
            return vary(result, axes_of(stored, chosen))

        stored = lax.optimization_barrier(flat_rows(rows))  # else the branch gets the other shape
        return lax.cond(jnp.any(_exists(rows, chosen)), gathered, missing, stored)

    return lax.platform_dependent(rows, chosen, cpu=on_cpu, default=gather_rows)


def replace_product_rows(
    sampled: chex.Array,
    chosen: chex.Array,
    coordinates: chex.Array,
    directions: chex.Array,
    precision: lax.PrecisionLike,
) -> chex.Array:
    """The rows of `coordinates @ directions`, with the chosen ones replaced by sampled ones.

    Args:
      sampled: `(groups, k, features)`, in the dtype of the result.
      chosen: `(groups, k)` int32, the rows that they replace; none twice.
      coordinates: `(groups, rows, q)`, in the dtype of the product.
      directions: `(q, features)`, in the same.
      precision: of the product.
    """
    arrays = sampled, chosen, coordinates, directions
    groups, rows, rank = coordinates.shape
    block_rows = row_access_tpu.choose_block_rows(
        groups * rows, chosen.size, sampled.shape[2], sampled.dtype, rank
    )
    kernel_precision = subspace_products_tpu.choose_precision(coordinates, directions, precision)

    def xla(sampled, chosen, coordinates, directions):
        product = jnp.matmul(coordinates, directions, precision=precision)
        product = product.astype(sampled.dtype)  # before the copy that replacing rows makes
        return replace_rows(product, chosen, sampled)

    def kernel(sampled, chosen, coordinates, directions):
        def select_block(sampled, is_sampled, coordinates, directions):
            product = row_access_tpu.product(coordinates, directions, kernel_precision)
            return jnp.where(is_sampled, sampled.astype(product.dtype), product)

        positions = jnp.arange(chosen.size, dtype=jnp.int32)
        indices = jnp.full(groups * rows, -1, jnp.int32)  # in `sampled`, of each row of the result
        indices = indices.at[flat_indices(chosen, rows)].set(positions)
        operands = row_access_tpu.Operands(
            flat_rows(sampled), (indices,), (flat_rows(coordinates),), (directions,)
        )
        return row_access_tpu.map_gathered_rows(
            select_block, operands, block_rows, sampled.dtype, copies=chosen.size
        ).reshape(groups, rows, -1)

    runs = block_rows is not None and kernel_precision is not None
    if not runs or chosen.size % row_access_tpu.rows_per_word(sampled.dtype):
        return xla(*arrays)
    return kernel_or_xla(kernel, xla, *arrays)


@jax.vmap
def replace_rows(rows: chex.Array, chosen: chex.Array, sampled: chex.Array) -> chex.Array:
    """The rows of each group, with the chosen ones, none twice, replaced by sampled ones."""
    return rows.at[chosen].set(sampled, unique_indices=True)


def choose_block_rows(rows: chex.Array, chosen: int, rank: int = 0) -> int | None:
    """`row_access_tpu.choose_block_rows` for rows `(groups, rows, features)`."""
    groups, number, features = rows.shape
    return row_access_tpu.choose_block_rows(groups * number, chosen, features, rows.dtype, rank)


def flat_indices(chosen: chex.Array, rows: int) -> chex.Array:
    """The chosen rows `(groups, k)` as indices of `flat_rows`, `(groups k,)`, each of its group."""
    first = rows * jnp.arange(len(chosen), dtype=chosen.dtype)
    return (jnp.clip(chosen, 0, rows - 1) + first[:, None]).reshape(-1)


def flat_rows(rows: chex.Array) -> chex.Array:
    """The rows of all groups, `(groups rows, features)`."""
    return rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1])


def _gather_operands(rows, chosen, blocked=(), resident=()):
    indices = flat_indices(chosen, rows.shape[1])
    return row_access_tpu.Operands(flat_rows(rows), (indices,), blocked, resident)


def _exists(rows, chosen):
    return (chosen >= 0) & (chosen < rows.shape[1])
