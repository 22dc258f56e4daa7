"""A TPU kernel for the products of all rows in a step with subspaces, in one pass over them.

    A = X V,  B = G U                              and the norms of the rows
    X^T [A / max |A|, B],  G^T [A, B / max |B|]

XLA reads X and G three times each for these. The kernel keeps the sums on the second line on the
chip, and their units, which grow as larger coordinates come. Matrices of few columns are transposed
inside, so that they fill the lanes.
"""

import functools

import chex
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mem_aop_jax._compat import jax_option, shape_like
from mem_aop_jax._kernels.row_sums_tpu import (
    IN_ORDER,
    LANES,
    SUBLANES,
    block_norms,
    fitting_block_rows,
    squares_scratch,
)
from mem_aop_jax._numerics import SCALES


def choose_precision(
    a: chex.Array, b: chex.Array, precision: lax.PrecisionLike
) -> lax.Precision | None:
    """The precision in a kernel for a product that has one outside; None: no kernel has it."""
    if a.dtype != b.dtype:
        return None
    if a.dtype == jnp.bfloat16:
        return lax.Precision.DEFAULT  # exact: the terms are added up in float32
    wanted = jax_option("jax_default_matmul_precision") if precision is None else precision
    wanted = wanted if isinstance(wanted, tuple) else (wanted, wanted)
    try:
        precisions = {lax.Precision(name or "default") for name in wanted}
    except ValueError:  # an algorithm of XLA's
        return None
    has_one = len(precisions) == 1 and lax.Precision.HIGH not in precisions
    return precisions.pop() if has_one and a.dtype == jnp.float32 else None


def choose_block_rows(
    rows: int, in_features: int, out_features: int, ranks: tuple[int, int], dtype
) -> int | None:
    """How many rows a step of the kernel has on the chip; None if it cannot run.

    It cannot if arrays are not whole tiles, or if what stays on the chip, which grows with the
    features, does not fit.
    """
    size, features = jnp.dtype(dtype).itemsize, in_features + out_features
    columns = sum(map(_rounded_up, ranks))
    row_bytes = 2 * size * features + 4 * (4 * columns + len(SCALES) * LANES)
    fixed_bytes = features * columns * (2 * size + 3 * 4)
    sizes, both = (2 * LANES, LANES), (in_features, out_features)
    return fitting_block_rows(sizes, rows, both, dtype, row_bytes, fixed_bytes)


def one_pass(
    x: chex.Array,
    g: chex.Array,
    v: chex.Array,
    u: chex.Array,
    block_rows: int,
    precision: lax.Precision,
) -> tuple[tuple[chex.Array, ...], tuple[chex.Array, ...]]:
    """The fields of `SideProducts` of both sides; all arrays are bfloat16, or all float32.

    Args:
      x: the inputs, `(rows, in_features)`.
      g: the cotangents, `(rows, out_features)`.
      v: directions of the inputs, `(in_features, q)`.
      u: directions of the cotangents, `(out_features, q)`.
      block_rows: from `choose_block_rows`.
      precision: of products.
    """
    sides, bases = (x, g), tuple(_padded(basis.T) for basis in (v, u))
    arrays, total = (*sides, *bases), sum(map(len, bases))

    def block_spec(rows):
        return pl.BlockSpec((block_rows, rows.shape[1]), lambda step: (step, 0))

    def columns_spec(transposed):
        return pl.BlockSpec((len(transposed), block_rows), lambda step: (0, step))

    def whole_spec(array):
        return pl.BlockSpec(array.shape, lambda step: (0, 0))

    coordinates = tuple(shape_like((len(basis), len(x)), x.dtype, arrays) for basis in bases)
    norms = tuple(shape_like((1, len(x)), jnp.float32, arrays) for _ in sides)
    sums = tuple(shape_like((total, rows.shape[1]), jnp.float32, arrays) for rows in sides)
    flops = sum(
        2 * len(x) * basis.shape[1] * (len(basis) + total) + 2 * len(SCALES) * rows.size
        for rows, basis in zip(sides, bases, strict=True)
    )
    moved = (*arrays, *coordinates, *norms, *sums)
    (a, b), (x_norms, g_norms), (x_sums, g_sums) = pl.pallas_call(
        functools.partial(_kernel, precision=precision),
        grid=(len(x) // block_rows,),
        in_specs=[tuple(map(block_spec, sides)), tuple(map(whole_spec, bases))],
        out_specs=(
            tuple(map(columns_spec, coordinates)),
            tuple(map(columns_spec, norms)),
            tuple(map(whole_spec, sums)),
        ),
        out_shape=(coordinates, norms, sums),
        scratch_shapes=[pltpu.SMEM((2,), jnp.float32), squares_scratch(block_rows)],
        cost_estimate=pl.CostEstimate(
            flops=flops,
            bytes_accessed=sum(array.size * array.dtype.itemsize for array in moved),
            transcendentals=0,
        ),
        compiler_params=IN_ORDER,
    )(sides, bases)
    with_a = slice(v.shape[1])
    with_b = slice(len(bases[0]), len(bases[0]) + u.shape[1])
    return (
        (a[: v.shape[1]].T, x_norms[0], x_sums[with_a].T, x_sums[with_b].T),
        (b[: u.shape[1]].T, g_norms[0], g_sums[with_b].T, g_sums[with_a].T),
    )


def _kernel(sides, bases, coordinates, norms, sums, units, squares, *, precision):
    """All but the last two arguments are pairs: of the inputs and of the cotangents."""

    @pl.when(pl.program_id(0) == 0)
    def _():
        for side in range(2):
            sums[side][...] = jnp.zeros_like(sums[side])
        units[0] = units[1] = jnp.float32(0)

    dot = functools.partial(
        lax.dot_general, precision=precision, preferred_element_type=jnp.float32
    )
    for side in range(2):
        products = dot(bases[side][...], sides[side][...], (((1,), (1,)), ((), ())))
        products = jnp.where(jnp.abs(products) < jnp.inf, products, 0)
        coordinates[side][...] = products.astype(coordinates[side].dtype)
    for side in range(2):
        norms[side][...] = block_norms(sides[side], squares)

    stored = [array[...].astype(jnp.float32) for array in coordinates]
    for side in range(2):
        old_unit = units[side]
        new_unit = jnp.maximum(old_unit, jnp.max(jnp.abs(stored[side])))
        units[side] = new_unit
        new_unit = jnp.where(new_unit > 0, new_unit, 1)
        factors, shrink = [*stored], [jnp.ones((len(array), 1), jnp.float32) for array in stored]
        factors[side] /= new_unit
        shrink[side] *= old_unit / new_unit
        factors = jnp.concatenate(factors).astype(sides[side].dtype)
        added = dot(factors, sides[side][...], (((1,), (0,)), ((), ())))
        sums[side][...] = sums[side][...] * jnp.concatenate(shrink) + added


def _rounded_up(number):
    return max(-(-number // SUBLANES), 1) * SUBLANES


def _padded(basis):
    return jnp.pad(basis, [(0, _rounded_up(len(basis)) - len(basis)), (0, 0)])
