"""A GPU kernel that reads rows once for their norms and their products with directions.

XLA reads them twice: a product is a call into a library.
"""

import functools

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mem_aop_jax._numerics import SCALES, norms_from_sums

BLOCK_ROWS, BLOCK_FEATURES = 64, 128  # of what a program multiplies at a time
MIN_RANK, MAX_RANK = 16, 64  # of a product on the chip


def can_run(rows: int, features: int, rank: int, dtype) -> bool:
    """Whether the kernel takes rows `(rows, features)` and so many directions of this dtype."""
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
        products += pl.dot(rows, basis_ref[here, :])
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
