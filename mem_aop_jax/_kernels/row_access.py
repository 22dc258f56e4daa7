"""Norms of rows, the chosen rows, and rows in their places: by kernels on TPUs, or the compiler."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
from jax import lax

from mem_aop_jax._kernels import row_access_tpu, row_sums_tpu, subspace_products_tpu
from mem_aop_jax._kernels.dispatch import kernel_or_xla
from mem_aop_jax._numerics import accumulation_dtype, row_norms


@jax.jit  # as `row_norms`
def grouped_row_norms(rows: chex.Array) -> chex.Array:
    """As `row_norms`, `(groups, rows)`, of rows of any floating dtype."""
    block = row_sums_tpu.choose_block_rows(
        math.prod(rows.shape[:2]), rows.shape[2], rows.dtype, False
    )
    if block is None:
        return _norms(rows)
    return kernel_or_xla(functools.partial(_norms_by_kernel, block=block), _norms, rows)


def _norms(rows):
    return row_norms(rows.astype(accumulation_dtype(rows.dtype)))


def _norms_by_kernel(rows, *, block):
    return row_sums_tpu.norms_and_sums(flat_rows(rows), None, block)[0].reshape(rows.shape[:2])


@jax.jit  # as `row_norms`
def gather_rows(rows: chex.Array, chosen: chex.Array) -> chex.Array:
    """The chosen rows of each group, `(groups, k, features)`; NaN for one that there is not."""
    block = choose_block_rows(rows, chosen.size)
    if block is None:
        return _take(rows, chosen)
    by_kernel = functools.partial(_take_by_kernel, block=block)
    return kernel_or_xla(by_kernel, _take, rows, chosen)


@jax.vmap
def _take(rows, chosen):
    return rows.at[chosen].get(mode="fill", fill_value=jnp.nan)


def _take_by_kernel(rows, chosen, *, block):
    found = row_access_tpu.gather_rows(flat_rows(rows), flat_indices(chosen, rows.shape[1]), block)
    there = _is_there(chosen, rows)[..., None]
    return jnp.where(there, found.reshape(*chosen.shape, -1), jnp.nan)


def _is_there(chosen, rows):
    return (chosen >= 0) & (chosen < rows.shape[1])


@functools.partial(
    jax.jit, static_argnames=("precision", "add_projection", "dtype")
)  # as `row_norms`
def gather_residuals(
    rows: chex.Array,
    chosen: chex.Array,
    weights: chex.Array | None,
    coordinates: chex.Array,
    basis: chex.Array,
    precision: lax.PrecisionLike,
    *,
    add_projection: bool = False,
    dtype,
) -> chex.Array:
    """What a basis does not hold of the chosen rows, times weights; NaN for a row that is missing.

    Args:
      rows: `(groups, rows, features)`.
      chosen: `(groups, k)` int32.
      weights: `(groups, k)`; None is all ones.
      coordinates: `(groups, rows, q)`, of all rows.
      basis: `(features, q)`.
      precision: of the product.
      add_projection: whether to add what the basis holds, without weights.
      dtype: of the result, `(groups, k, features)`; inside it is float32 (float64 for float64).
    """
    if weights is None:
        weights = jnp.ones_like(chosen, dtype=accumulation_dtype(rows.dtype))
    args = (
        rows,
        chosen,
        weights.astype(accumulation_dtype(rows.dtype)),
        gather_rows(coordinates, chosen),
        basis,
    )
    options = {"precision": precision, "add_projection": add_projection, "dtype": dtype}
    by_compiler = functools.partial(_take_outside, **options)
    block = choose_block_rows(rows, chosen.size, basis.shape[1])
    options["precision"] = subspace_products_tpu.precision_of_products(
        coordinates, basis, precision
    )
    if not basis.shape[1] or block is None or options["precision"] is None:
        return by_compiler(*args)
    by_kernel = functools.partial(_take_outside_by_kernel, block=block, **options)
    return kernel_or_xla(by_kernel, by_compiler, *args)


def _take_outside(rows, chosen, weights, coordinates, basis, *, precision, add_projection, dtype):
    rows = gather_rows(rows, chosen).astype(accumulation_dtype(rows.dtype))
    coordinates, basis = coordinates.astype(rows.dtype), basis.astype(rows.dtype)
    held = jnp.matmul(coordinates, basis.T, precision=precision)
    rest = weights[..., None] * (rows - held)
    return (held + rest if add_projection else rest).astype(dtype)


def _take_outside_by_kernel(rows, chosen, weights, coordinates, basis, **options):
    at = flat_indices(chosen, rows.shape[1])
    weights = jnp.where(_is_there(chosen, rows), weights, jnp.nan).reshape(-1)
    found = row_access_tpu.gather_residuals(
        flat_rows(rows), at, weights, flat_rows(coordinates), basis.T, **options
    )
    return found.reshape(*chosen.shape, -1)


def replace_product_rows(
    sampled: chex.Array,
    chosen: chex.Array,
    coordinates: chex.Array,
    directions: chex.Array,
    precision: lax.PrecisionLike,
) -> chex.Array:
    """Rows of `coordinates @ directions`, but for the chosen ones, which are sampled.

    Args:
      sampled: `(groups, k, features)`, in the dtype of the result.
      chosen: `(groups, k)` int32, which rows of each group they are; none twice.
      coordinates: `(groups, rows, q)`, in the dtype of the product.
      directions: `(q, features)`, in the same.
      precision: of the product.
    """
    by_compiler = functools.partial(_place, precision=precision)
    args = sampled, chosen, coordinates, directions
    groups, rows, rank = coordinates.shape
    sizes = groups * rows, chosen.size, sampled.shape[2]
    block = row_access_tpu.choose_block_rows(*sizes, sampled.dtype, rank)
    of_kernel = subspace_products_tpu.precision_of_products(coordinates, directions, precision)
    if (
        block is None
        or of_kernel is None
        or chosen.size % row_access_tpu.rows_of_word(sampled.dtype)
    ):
        return by_compiler(*args)
    by_kernel = functools.partial(_place_by_kernel, block=block, precision=of_kernel)
    return kernel_or_xla(by_kernel, by_compiler, *args)


def _place(sampled, chosen, coordinates, directions, *, precision):
    rows = jnp.matmul(coordinates, directions, precision=precision)
    return replace_rows(rows.astype(sampled.dtype), chosen, sampled)  # no copy of it in float32


def _place_by_kernel(sampled, chosen, coordinates, directions, *, block, precision):
    groups, rows, _ = coordinates.shape
    number = jnp.arange(chosen.size, dtype=jnp.int32)
    at = jnp.full(groups * rows, -1, jnp.int32).at[flat_indices(chosen, rows)].set(number)
    found = row_access_tpu.replace_product_rows(
        flat_rows(sampled), at, flat_rows(coordinates), directions, block, precision
    )
    return found.reshape(groups, rows, -1)


@jax.vmap
def replace_rows(rows: chex.Array, chosen: chex.Array, sampled: chex.Array) -> chex.Array:
    """The rows of each group, with the chosen ones, none twice, replaced."""
    return rows.at[chosen].set(sampled, unique_indices=True)


def choose_block_rows(rows: chex.Array, chosen: int, rank: int = 0) -> int | None:
    """As `row_access_tpu.choose_block_rows`, of `(groups, rows, features)`."""
    groups, number, features = rows.shape
    return row_access_tpu.choose_block_rows(groups * number, chosen, features, rows.dtype, rank)


def flat_indices(chosen: chex.Array, rows: int) -> chex.Array:
    """Indices `(groups, k)` of rows of each group as indices of the rows of all, `(groups k,)`."""
    first = rows * jnp.arange(len(chosen), dtype=chosen.dtype)
    return (jnp.clip(chosen, 0, rows - 1) + first[:, None]).reshape(-1)


def flat_rows(rows: chex.Array) -> chex.Array:
    """The rows of all groups."""
    return rows.reshape(-1, rows.shape[-1])
