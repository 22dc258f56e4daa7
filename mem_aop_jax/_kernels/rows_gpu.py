"""GPU kernels on all rows of an array.

One reads them once for their norms and their products with directions; XLA reads them twice, since
a product is a call into a library. One clears rows in their array, and touches no others.
"""

import functools

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mem_aop_jax._compat import pallas_triton as plgpu
from mem_aop_jax._numerics import SCALES, norms_from_sums

BLOCK_ROWS, BLOCK_FEATURES = 64, 128  # of what a program multiplies at a time
MIN_RANK, MAX_RANK = 16, 64  # of a product on the chip
CLEARED_ROWS, CLEARED_FEATURES = 16, 128  # of what a program clears


def multiplies(rows: int, features: int, rank: int, dtype) -> bool:
    """Whether `products_and_norms` takes rows of these sizes, and so many directions."""
    whole_blocks = rows % BLOCK_ROWS == features % BLOCK_FEATURES == 0
    return whole_blocks and rows > 0 < rank <= MAX_RANK and dtype == jnp.bfloat16


def products_and_norms(rows: chex.Array, basis: chex.Array) -> tuple[chex.Array, chex.Array]:
    """`(rows, q)` float32, rows @ basis; and the norms of rows, `(rows,)`, as `row_norms` has them.

    Args:
      rows: `(rows, features)` bfloat16.
      basis: `(features, q)` bfloat16.
    """
    number, features = rows.shape
    rank = basis.shape[1]
    size = max(MIN_RANK, pl.next_power_of_2(rank))
    basis = jnp.pad(basis, ((0, 0), (0, size - rank)))
    products, *sums = pl.pallas_call(
        functools.partial(_kernel, blocks=features // BLOCK_FEATURES),
        grid=(number // BLOCK_ROWS,),
        in_specs=[
            pl.BlockSpec((BLOCK_ROWS, features), lambda i: (i, 0)),
            pl.BlockSpec((features, size), lambda i: (0, 0)),
        ],
        out_specs=[
            pl.BlockSpec((BLOCK_ROWS, size), lambda i: (i, 0)),
            *[pl.BlockSpec((BLOCK_ROWS,), lambda i: (i,)) for _ in SCALES],
        ],
        out_shape=[
            jax.ShapeDtypeStruct((number, size), jnp.float32),
            *[jax.ShapeDtypeStruct((number,), jnp.float32) for _ in SCALES],
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
    )(rows, basis)
    return products[:, :rank], norms_from_sums(sums)


def _kernel(rows_ref, basis_ref, products_ref, *sums_refs, blocks):
    def add_block(block, totals):
        here = pl.ds(block * BLOCK_FEATURES, BLOCK_FEATURES)
        rows = rows_ref[:, here]
        products, *sums = totals
        products += jnp.dot(rows, basis_ref[here, :], preferred_element_type=jnp.float32)
        rows = rows.astype(jnp.float32)
        sums = [
            total + jnp.sum(jnp.square(rows * scale), axis=1)
            for total, scale in zip(sums, SCALES, strict=True)
        ]
        return products, *sums

    zeros = [jnp.zeros(ref.shape, jnp.float32) for ref in (products_ref, *sums_refs)]
    totals = lax.fori_loop(0, blocks, add_block, tuple(zeros))
    for ref, total in zip((products_ref, *sums_refs), totals, strict=True):
        ref[...] = total


def clears(rows: int, features: int) -> bool:
    """Whether `clear_rows` takes an array of these sizes."""
    return rows % CLEARED_ROWS == features % CLEARED_FEATURES == 0 < rows * features


def clear_rows(rows: chex.Array, stays: chex.Array) -> chex.Array:
    """The rows `(rows, features)`, in their place, with 0 in those that do not stay, `(rows,)`."""
    number, features = rows.shape
    block = CLEARED_FEATURES
    while features % (2 * block) == 0 and block < 1024:
        block *= 2
    return pl.pallas_call(
        _clear_kernel,
        grid=(number // CLEARED_ROWS, features // block),
        in_specs=[
            pl.BlockSpec((CLEARED_ROWS, block), lambda i, j: (i, j)),
            pl.BlockSpec((CLEARED_ROWS,), lambda i, j: (i,)),
        ],
        out_specs=pl.BlockSpec((CLEARED_ROWS, block), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct(rows.shape, rows.dtype),
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=4),
    )(rows, stays.astype(jnp.int32))


def _clear_kernel(_, stays_ref, cleared_ref):
    shape = cleared_ref.shape
    is_cleared = jnp.broadcast_to((stays_ref[...] == 0)[:, None], shape)
    plgpu.store(cleared_ref.at[...], jnp.zeros(shape, cleared_ref.dtype), mask=is_cleared)
