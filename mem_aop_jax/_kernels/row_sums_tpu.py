"""TPU kernels for the norms of rows, or of the sums of the rows and a memory, stored on the way."""

import chex
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mem_aop_jax._compat import axes_of, shape_like
from mem_aop_jax._numerics import SCALES, norms_from_sums

LANES, SUBLANES = 128, 16  # of a tile of bfloat16
STRIP = 32  # rows whose sums of squares are in registers together


VMEM = 14 * 2**20  # bytes of on-chip memory; every TPU has 16 MiB


IN_ORDER = pltpu.CompilerParams(dimension_semantics=("arbitrary",))


def whole_tiles(rows: int, features: int, dtype) -> bool:
    """Whether an array `(rows, features)` is one that the kernels are for."""
    whole = rows * features > 0 and not rows % LANES and not features % LANES
    return whole and jnp.dtype(dtype) in (jnp.float32, jnp.bfloat16)


def norms_of_block(rows, sums):
    """`(1, rows)`, as `policies.row_norms` has them; `sums` is memory for what is added up."""

    def of_strip(strip, _):
        at = pl.ds(pl.multiple_of(strip * STRIP, STRIP), STRIP)
        totals = [jnp.zeros((STRIP, LANES), jnp.float32) for _ in SCALES]
        for first in range(0, rows.shape[1], LANES):
            part = rows[at, first : first + LANES].astype(jnp.float32)
            totals = [
                total + jnp.square(part * scale)
                for total, scale in zip(totals, SCALES, strict=True)
            ]
        for number, total in enumerate(totals):
            sums[number, at] = total

    lax.fori_loop(0, rows.shape[0] // STRIP, of_strip, None)
    return norms_from_sums(
        [jnp.sum(sums[number].T, axis=0, keepdims=True) for number in range(len(SCALES))]
    )


def choose_block_rows(rows: int, features: int, dtype, with_memory: bool) -> int | None:
    """How many rows `norms_and_sums` has on the chip; None if it cannot run."""
    if not whole_tiles(rows, features, dtype):
        return None
    arrays = 3 if with_memory else 1
    of_row = 2 * arrays * jnp.dtype(dtype).itemsize * features + 4 * len(SCALES) * LANES
    most = VMEM - 3 * 2**19  # what registers do not hold of many features
    return next((of for of in (2 * LANES, LANES) if not rows % of and of * of_row <= most), None)


def norms_and_sums(
    rows: chex.Array, kept: chex.Array | None, block: int
) -> tuple[chex.Array, chex.Array | None]:
    """The norms of rows + kept, `(rows,)` in the units of `row_norms`; and these sums.

    Args:
      rows: `(rows, features)`, float32 or bfloat16.
      kept: the same, in whose place the sums are; None is none, and there are no sums.
      block: from `choose_block_rows`.
    """
    arrays = [left_in_hbm(of) for of in (rows, kept) if of is not None]
    of_block = pl.BlockSpec((block, rows.shape[1]), lambda step: (step, 0))
    of_norms = pl.BlockSpec((1, block), lambda step: (0, step))
    norms, *sums = pl.pallas_call(
        _join,
        grid=(len(rows) // block,),
        in_specs=[of_block for _ in arrays],
        out_specs=[of_norms, *(of_block for _ in arrays[1:])],
        out_shape=[
            shape_like((1, len(rows)), jnp.float32, arrays),
            *(shape_in_hbm(of, arrays) for of in arrays[1:]),
        ],
        input_output_aliases={1: 1} if len(arrays) > 1 else {},
        scratch_shapes=[pltpu.VMEM((len(SCALES), block, LANES), jnp.float32)],
        cost_estimate=pl.CostEstimate(
            flops=2 * len(SCALES) * rows.size,
            bytes_accessed=(2 * len(arrays) - 1) * rows.nbytes + 4 * len(rows),
            transcendentals=0,
        ),
        compiler_params=IN_ORDER,
    )(*arrays)
    return norms[0], *(sums or [None])


def _join(rows, *refs):
    if len(refs) == 2:
        norms, squares = refs
    else:
        kept, norms, sums, squares = refs
        wide = rows[...].astype(jnp.float32) + kept[...].astype(jnp.float32)
        sums[...] = wide.astype(sums.dtype)
        rows = sums
    norms[...] = norms_of_block(rows, squares)


def left_in_hbm(array: chex.Array) -> chex.Array:
    """The array for a kernel, for which XLA may else copy it whole into on-chip memory."""
    if axes_of(array):  # in shard_map results in the same place have no type
        return array
    return pltpu.with_memory_space_constraint(array, pltpu.HBM)


def shape_in_hbm(array: chex.Array, arrays):
    """Of a result in the place of an array that is left in HBM; `arrays` as in `shape_like`."""
    if axes_of(array):
        return shape_like(array.shape, array.dtype, arrays)
    return pltpu.HBM(array.shape, array.dtype)
