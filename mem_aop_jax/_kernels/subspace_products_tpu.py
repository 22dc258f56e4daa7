"""TPU kernels for what is computed of all rows, in one pass over them.

For a step with subspaces (`one_pass`)

    A = X V,  B = G U                              and the norms of the rows
    X^T [A / max |A|, B],  G^T [A, B / max |B|]

for which XLA reads X and G three times each. The products with few columns stay on the chip, as
does their unit, which grows as larger rows come. Inside, what has few columns is transposed, so
that it fills the lanes. Grids walk over blocks of rows, of all features.
"""

import functools

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mem_aop_jax._compat import shape_like
from mem_aop_jax._kernels.row_sums_tpu import (
    IN_ORDER,
    LANES,
    SUBLANES,
    VMEM,
    norms_of_block,
    whole_tiles,
)
from mem_aop_jax._numerics import SCALES


def precision_of_products(
    x: chex.Array, g: chex.Array, precision: lax.PrecisionLike
) -> lax.Precision | None:
    """What the kernel's products need to be as precise; None where it has no such products."""
    if x.dtype != g.dtype:
        return None
    if x.dtype == jnp.bfloat16:
        return lax.Precision.DEFAULT  # exact, of which the sums are in float32
    wanted = jax.config.jax_default_matmul_precision if precision is None else precision
    wanted = wanted if isinstance(wanted, tuple) else (wanted, wanted)
    try:
        found = {lax.Precision.DEFAULT if of is None else lax.Precision(of) for of in wanted}
    except ValueError:  # an algorithm of XLA's
        return None
    fits = x.dtype == jnp.float32 and len(found) == 1 and lax.Precision.HIGH not in found
    return found.pop() if fits else None


def choose_block_rows(
    rows: int, in_features: int, out_features: int, ranks: tuple[int, int], dtype
) -> int | None:
    """How many rows the kernel has on the chip.

    None: it cannot run, as sizes are not whole tiles, or as too many features are wide.
    """
    if not all(whole_tiles(rows, of, dtype) for of in (in_features, out_features)):
        return None
    size, features = jnp.dtype(dtype).itemsize, in_features + out_features
    columns = sum(map(_rounded_up, ranks))
    whole = features * columns * (2 * size + 3 * 4)
    row = 2 * size * features + 4 * (4 * columns + len(SCALES) * LANES)
    fit = (of for of in (2 * LANES, LANES) if not rows % of and of * row + whole <= VMEM)
    return next(fit, None)


def one_pass(
    x: chex.Array,
    g: chex.Array,
    v: chex.Array,
    u: chex.Array,
    rows: int,
    precision: lax.Precision,
) -> tuple[tuple[chex.Array, ...], tuple[chex.Array, ...]]:
    """As `all_rows.side_products`, of `(rows, features)` arrays, all bfloat16 or all float32.

    Args:
      x: the inputs.
      g: the cotangents.
      v: directions of the inputs, `(in_features, q)`.
      u: directions of the cotangents.
      rows: of a block, from `choose_block_rows`.
      precision: of products.
    """
    ranks = v.shape[1], u.shape[1]
    bases = [_padded(basis.T) for basis in (v, u)]
    columns = sum(map(len, bases))
    arrays = x, g, *bases

    def in_blocks(of_rows):
        return pl.BlockSpec((rows, of_rows.shape[1]), lambda block: (block, 0))

    def of_block(number):
        return pl.BlockSpec((number, rows), lambda block: (0, block))

    def whole(*shape):
        return pl.BlockSpec(shape, lambda block: (0, 0))

    outputs = [
        *((of_block(len(basis)), (len(basis), len(x)), x.dtype) for basis in bases),
        *((of_block(1), (1, len(x)), jnp.float32) for _ in bases),
        *((whole(columns, a.shape[1]), (columns, a.shape[1]), jnp.float32) for a in (x, g)),
    ]
    shapes = [shape_like(*shape, arrays) for _, *shape in outputs]
    flops = sum(
        2 * len(x) * basis.shape[1] * (len(basis) + columns) + 2 * len(SCALES) * of.size
        for of, basis in zip((x, g), bases, strict=True)
    )
    moved = sum(a.size * a.dtype.itemsize for a in (*arrays, *shapes))
    a, b, x_norms, g_norms, of_x, of_g = pl.pallas_call(
        functools.partial(_kernel, precision=precision),
        grid=(len(x) // rows,),
        in_specs=[in_blocks(x), in_blocks(g), *(whole(*basis.shape) for basis in bases)],
        out_specs=[spec for spec, *_ in outputs],
        out_shape=shapes,
        scratch_shapes=[
            pltpu.SMEM((2,), jnp.float32),
            pltpu.VMEM((len(SCALES), rows, LANES), jnp.float32),
        ],
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
        compiler_params=IN_ORDER,
    )(*arrays)
    of_a, of_b = slice(ranks[0]), slice(len(bases[0]), len(bases[0]) + ranks[1])
    return (
        (a[: ranks[0]].T, x_norms[0], of_x[of_a].T, of_x[of_b].T),
        (b[: ranks[1]].T, g_norms[0], of_g[of_b].T, of_g[of_a].T),
    )


def _kernel(x, g, v, u, a, b, x_norms, g_norms, of_x, of_g, units, sums, *, precision):
    @pl.when(pl.program_id(0) == 0)
    def _():
        of_x[...], of_g[...] = jnp.zeros_like(of_x), jnp.zeros_like(of_g)
        units[0] = units[1] = jnp.float32(0)

    product = functools.partial(
        lax.dot_general, precision=precision, preferred_element_type=jnp.float32
    )
    for rows, basis, coordinates in ((x, v, a), (g, u, b)):
        found = product(basis[...], rows[...], (((1,), (1,)), ((), ())))
        found = jnp.where(jnp.abs(found) < jnp.inf, found, 0)
        coordinates[...] = found.astype(coordinates.dtype)
    for rows, norms in ((x, x_norms), (g, g_norms)):
        norms[...] = norms_of_block(rows, sums)

    a, b = (coordinates[...].astype(jnp.float32) for coordinates in (a, b))
    for side, (rows, own, total) in enumerate(((x, a, of_x), (g, b, of_g))):
        before = units[side]
        now = jnp.maximum(before, jnp.max(jnp.abs(own)))
        units[side] = now
        now = jnp.where(now > 0, now, 1)
        both = [a, b]
        both[side] = own / now
        both = jnp.concatenate(both).astype(rows.dtype)
        shrink = [jnp.ones((len(of), 1), jnp.float32) for of in (a, b)]
        shrink[side] *= before / now
        added = product(both, rows[...], (((1,), (0,)), ((), ())))
        total[...] = total[...] * jnp.concatenate(shrink) + added


def _rounded_up(number):
    return max(-(-number // SUBLANES), 1) * SUBLANES


def _padded(basis):
    return jnp.pad(basis, [(0, _rounded_up(len(basis)) - len(basis)), (0, 0)])
