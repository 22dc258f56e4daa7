"""What a step with subspaces computes of all rows of X and G: by a kernel on TPUs, or not."""

import functools
import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from mem_aop_jax._kernels import subspace_products_tpu
from mem_aop_jax._kernels.dispatch import kernel_or_xla
from mem_aop_jax._kernels.row_access import flat_rows, grouped_row_norms
from mem_aop_jax._numerics import accumulation_dtype, safe_divide, widest_dtype


class SideProducts(NamedTuple):
    """What is computed of all rows of X or of G, `(..., rows, features)`.

    Attributes:
      coordinates: `(..., rows, q)`; 0 in place of what is not finite.
      norms: `(..., rows)`, in the units of `row_norms`.
      own: `(features, q)`: rows^T coordinates, these in units of the largest.
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
    """Of the inputs and of the cotangents, with the directions of each.

    Args:
      x: `(groups, rows, in_features)`.
      g: `(groups, rows, out_features)`.
      v: `(in_features, q)`, in the dtype of products.
      u: `(out_features, q)`.
      due: `()` bool, whether `own` is asked for (else anything); None is always.
      rank: of the cotangents' directions, those that `other` has.
      precision: of products.
    """
    args = (x, g, v, u) if due is None else (x, g, v, u, due)
    by_compiler = functools.partial(_by_compiler, rank=rank, precision=precision)
    of_kernel = subspace_products_tpu.precision_of_products(x, g, precision)
    ranks = v.shape[1], u.shape[1]
    block = subspace_products_tpu.choose_block_rows(
        math.prod(x.shape[:2]), x.shape[2], g.shape[2], ranks, x.dtype
    )
    if of_kernel is None or block is None:
        return by_compiler(*args)
    by_kernel = functools.partial(_by_kernel, rank=rank, block=block, precision=of_kernel)
    return kernel_or_xla(by_kernel, by_compiler, *args)


def contract_rows(a: chex.Array, b: chex.Array, dtype, precision: lax.PrecisionLike) -> chex.Array:
    """A^T B, as (B^T A)^T: with the few columns of B first it is fast on CPUs."""
    a, b = (c.reshape(math.prod(c.shape[:-1]), c.shape[-1]).astype(dtype) for c in (a, b))
    product = lax.dot_general(
        b,
        a,
        (((0,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=accumulation_dtype(dtype),
    )
    return lax.optimization_barrier(product).T  # or XLA turns it round again


def coordinates_and_norms(
    rows: chex.Array, basis: chex.Array, precision: lax.PrecisionLike
) -> tuple[chex.Array, chex.Array]:
    """The coordinates and norms of `SideProducts`."""
    dtype = basis.dtype
    coordinates = jnp.matmul(
        rows.astype(dtype),
        basis,
        precision=precision,
        preferred_element_type=accumulation_dtype(dtype),
    )
    coordinates = jnp.where(jnp.isfinite(coordinates), coordinates, 0).astype(dtype)
    return coordinates, grouped_row_norms(rows)


def _by_compiler(x, g, v, u, due=None, *, rank, precision):
    """In one pass over X and one over G for the products; on CPUs `own` is apart, if it is due."""
    (a, x_norms), (b, g_norms) = (
        coordinates_and_norms(x, v, precision),
        coordinates_and_norms(g, u, precision),
    )
    others = [b[..., :rank], a]
    units = [safe_divide(of, max_abs(of).astype(of.dtype)) for of in (a, b)]
    dtype = widest_dtype(v.dtype, u.dtype)
    times = functools.partial(contract_rows, dtype=dtype, precision=precision)

    def together(x, g, units, others, due=None):
        del due
        products = (
            times(rows, jnp.concatenate([unit, other], axis=-1, dtype=dtype))
            for rows, unit, other in zip((x, g), units, others, strict=True)
        )
        return tuple(
            jnp.split(product, [unit.shape[-1]], axis=1)
            for product, unit in zip(products, units, strict=True)
        )

    def apart(x, g, units, others, due):
        x_b, g_a = map(times, (x, g), others)
        own_x, own_g = lax.cond(
            due,
            lambda: (times(x, units[0]), times(g, units[1])),
            lambda: (jnp.zeros_like(x_b, shape=v.shape), jnp.zeros_like(g_a, shape=u.shape)),
        )
        return [own_x, x_b], [own_g, g_a]

    args = x, g, units, others
    if due is None:
        of_x, of_g = together(*args)
    else:
        of_x, of_g = lax.platform_dependent(*args, due, cpu=apart, default=together)
    return SideProducts(a, x_norms, *of_x), SideProducts(b, g_norms, *of_g)


def max_abs(coordinates: chex.Array) -> chex.Array:
    """`()`, in float32 or float64: the unit of `SideProducts.own`."""
    return jnp.max(jnp.abs(coordinates), initial=0).astype(accumulation_dtype(coordinates.dtype))


def psum_own_products(own: chex.Array, unit: chex.Array, axes: tuple[str, ...]) -> chex.Array:
    """`SideProducts.own`, of which each device along these mesh axes has that of its own rows."""
    return lax.psum(own * safe_divide(unit, lax.pmax(unit, axes)).astype(own.dtype), axes)


def _by_kernel(x, g, v, u, due=None, *, rank, block, precision):
    """The same, with `own` at any rate."""
    del due
    groups, rows = x.shape[:2]
    sides = subspace_products_tpu.one_pass(flat_rows(x), flat_rows(g), v, u, block, precision)
    of_x, of_g = (
        SideProducts(a.reshape(groups, rows, -1), lengths.reshape(groups, rows), *products)
        for a, lengths, *products in sides
    )
    return of_x._replace(other=of_x.other[:, :rank]), of_g
