"""The products of all rows of X and G in a step with subspaces: by a TPU kernel, or else by XLA."""

import functools
import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from mem_aop_jax._kernels import rows_gpu, subspace_products_tpu
from mem_aop_jax._kernels.dispatch import cuda_kernel_or_xla, kernel_or_xla
from mem_aop_jax._kernels.row_access import flat_rows, grouped_row_norms
from mem_aop_jax._numerics import accumulation_dtype, safe_divide, widest_dtype


class SideProducts(NamedTuple):
    """Products of all rows `(..., rows, features)` of one side, the inputs or the cotangents.

    Attributes:
      coordinates: `(..., rows, q)`, rows @ directions; 0 in place of what is not finite.
      norms: `(..., rows)`, in the units of `row_norms`.
      own: `(features, q)`, rows^T coordinates, where these are divided by their `max_abs`.
      other: rows^T (coordinates of the other side): `(in_features, rank)`, `(out_features, q)`.
    """

    coordinates: chex.Array
    norms: chex.Array
    own: chex.Array
    other: chex.Array


@functools.partial(jax.jit, static_argnames=("rank", "precision"))  # as `row_norms`
def side_products(
    x: chex.Array,
    g: chex.Array,
    v: chex.Array,
    u: chex.Array,
    due: chex.Array | None,
    rank: int,
    precision: lax.PrecisionLike,
) -> tuple[SideProducts, SideProducts]:
    """The products of the inputs and of the cotangents, each with their own directions.

    Args:
      x: `(groups, rows, in_features)`.
      g: `(groups, rows, out_features)`.
      v: directions of the inputs, `(in_features, q)`, in the dtype of products.
      u: directions of the cotangents, `(out_features, q)`.
      due: `()` bool, whether `own` is needed; else it may be anything. None is always.
      rank: how many directions of the cotangents `other` of the inputs has.
      precision: of products.
    """
    xla = functools.partial(_by_xla, rank=rank, precision=precision)
    kernel_precision = subspace_products_tpu.choose_precision(x, g, precision)
    rows, ranks = math.prod(x.shape[:2]), (v.shape[1], u.shape[1])
    block_rows = subspace_products_tpu.choose_block_rows(
        rows, x.shape[2], g.shape[2], ranks, x.dtype
    )

    def kernel(x, g, v, u, due):
        del due
        sides = subspace_products_tpu.one_pass(
            flat_rows(x), flat_rows(g), v, u, block_rows, kernel_precision
        )
        x_products, g_products = (
            SideProducts(coordinates.reshape(*x.shape[:2], -1), norms.reshape(x.shape[:2]), *others)
            for coordinates, norms, *others in sides
        )
        return x_products._replace(other=x_products.other[:, :rank]), g_products

    if block_rows is None or kernel_precision is None:
        return xla(x, g, v, u, due)
    return kernel_or_xla(kernel, xla, x, g, v, u, due)


def _by_xla(x, g, v, u, due, *, rank, precision):
    """One pass over X and G for `own` and `other`. On CPUs `own` has another one, only if due."""
    a, x_norms = coordinates_and_norms(x, v, precision)
    b, g_norms = coordinates_and_norms(g, u, precision)
    own = [safe_divide(side, max_abs(side).astype(side.dtype)) for side in (a, b)]
    other = [b[..., :rank], a]
    dtype = widest_dtype(v.dtype, u.dtype)
    contract = functools.partial(contract_rows, dtype=dtype, precision=precision)

    def in_one_pass(x, g, own, other, due=None):
        del due

        def products(rows, own, other):
            both = contract(rows, jnp.concatenate([own, other], axis=-1, dtype=dtype))
            return jnp.split(both, [own.shape[-1]], axis=1)

        return list(map(products, (x, g), own, other))

    def in_two_passes(x, g, own, other, due):
        x_b, g_a = map(contract, (x, g), other)
        x_a, g_b = lax.cond(
            due,
            lambda: tuple(map(contract, (x, g), own)),
            lambda: (jnp.zeros_like(x_b, shape=v.shape), jnp.zeros_like(g_a, shape=u.shape)),
        )
        return [[x_a, x_b], [g_b, g_a]]

    # In the shape of other products, or XLA for CPUs stores the rows again for the branch.
    args = flat_rows(x), flat_rows(g), own, other
    if due is None:
        x_products, g_products = in_one_pass(*args)
    else:
        x_products, g_products = lax.platform_dependent(
            *args, due, cpu=in_two_passes, default=in_one_pass
        )
    return SideProducts(a, x_norms, *x_products), SideProducts(b, g_norms, *g_products)


def coordinates_and_norms(
    rows: chex.Array, basis: chex.Array, precision: lax.PrecisionLike
) -> tuple[chex.Array, chex.Array]:
    """The first two fields of `SideProducts`."""
    dtype = basis.dtype

    def xla(rows, basis):
        products = jnp.matmul(
            rows.astype(dtype),
            basis,
            precision=precision,
            preferred_element_type=accumulation_dtype(dtype),
        )
        return products, grouped_row_norms(rows)

    def kernel(rows, basis):
        products, norms = rows_gpu.products_and_norms(flat_rows(rows), basis)
        return products.reshape(*rows.shape[:-1], -1), norms.reshape(rows.shape[:-1])

    number, (features, rank) = math.prod(rows.shape[:-1]), basis.shape
    if rows.dtype == dtype and rows_gpu.multiplies(number, features, rank, dtype):
        products, norms = cuda_kernel_or_xla(kernel, xla, rows, basis)
    else:
        products, norms = xla(rows, basis)
    return jnp.where(jnp.isfinite(products), products, 0).astype(dtype), norms


def contract_rows(a: chex.Array, b: chex.Array, dtype, precision: lax.PrecisionLike) -> chex.Array:
    """A^T B, summed over all rows, as (B^T A)^T: CPUs are fast with the few columns of B first."""
    a, b = (flat_rows(factor).astype(dtype) for factor in (a, b))
    product = lax.dot_general(
        b,
        a,
        (((0,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=accumulation_dtype(dtype),
    )
    if product.size < 32:  # XLA for CPUs, before jax 0.12, aborts on some of these under vmap
        return product.T
    return lax.optimization_barrier(product).T  # else XLA undoes the transposition


def max_abs(coordinates: chex.Array) -> chex.Array:
    """The largest absolute value, `()` float32 or float64: the unit of `SideProducts.own`."""
    return jnp.max(jnp.abs(coordinates), initial=0).astype(accumulation_dtype(coordinates.dtype))


def psum_own_products(own: chex.Array, unit: chex.Array, axes: tuple[str, ...]) -> chex.Array:
    """The sum of `SideProducts.own` over devices along mesh axes, in the largest of their units."""
    return lax.psum(own * safe_divide(unit, lax.pmax(unit, axes)).astype(own.dtype), axes)
