"""A TPU kernel for the norms of rows, or of the sums of rows and a memory, and what kernels share.

The kernels walk over blocks of rows, each with all features.
"""

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
SPILLED = 3 * 2**19  # bytes of on-chip memory for what registers do not hold of many features
IN_ORDER = pltpu.CompilerParams(dimension_semantics=("arbitrary",))


def fitting_block_rows(
    sizes: tuple[int, ...],
    rows: int,
    features: tuple[int, ...],
    dtype,
    row_bytes: int,
    fixed_bytes: int,
) -> int | None:
    """The first of the sizes of a block that divides the rows and fits into VMEM.

    It takes `row_bytes` for each of its rows, and `fixed_bytes`. None: no size fits, or an array
    of rows, one for each of `features`, is not of whole tiles of a dtype that kernels are for.
    """
    is_tiled = all(size and size % LANES == 0 for size in (rows, *features))
    if not is_tiled or jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        return None
    fitting = (n for n in sizes if not rows % n and n * row_bytes + fixed_bytes <= VMEM)
    return next(fitting, None)


def choose_block_rows(rows: int, features: int, dtype, with_memory: bool) -> int | None:
    """How many rows a step of `norms_and_sums` has on the chip; None if it cannot run."""
    buffers = 2 * (3 if with_memory else 1)  # rows, memory and sums, each of two steps
    row_bytes = buffers * jnp.dtype(dtype).itemsize * features + 4 * len(SCALES) * LANES
    sizes = 2 * LANES, LANES
    return fitting_block_rows(sizes, rows, (features,), dtype, row_bytes, SPILLED)


def norms_and_sums(
    rows: chex.Array, memory: chex.Array | None, block_rows: int
) -> tuple[chex.Array, chex.Array | None]:
    """The norms of rows + memory, `(rows,)` in the units of `row_norms`; and these sums.

    Args:
      rows: `(rows, features)`, float32 or bfloat16.
      memory: the same, overwritten by the sums. With None there are no sums.
      block_rows: from `choose_block_rows`.
    """
    arrays = tuple(keep_in_hbm(array) for array in (rows, memory) if array is not None)
    overwritten = arrays[1:]
    rows_spec = pl.BlockSpec((block_rows, rows.shape[1]), lambda step: (step, 0))
    norms_spec = pl.BlockSpec((1, block_rows), lambda step: (0, step))
    norms, sums = pl.pallas_call(
        _kernel,
        grid=(len(rows) // block_rows,),
        in_specs=[tuple(rows_spec for _ in arrays)],
        out_specs=(norms_spec, tuple(rows_spec for _ in overwritten)),
        out_shape=(
            shape_like((1, len(rows)), jnp.float32, arrays),
            tuple(hbm_shape(array, arrays) for array in overwritten),
        ),
        input_output_aliases={1: 1} if overwritten else {},
        scratch_shapes=[squares_scratch(block_rows)],
        cost_estimate=pl.CostEstimate(
            flops=2 * len(SCALES) * rows.size,
            bytes_accessed=(2 * len(arrays) - 1) * rows.nbytes + 4 * len(rows),
            transcendentals=0,
        ),
        compiler_params=IN_ORDER,
    )(arrays)
    return norms[0], *(sums or [None])


def _kernel(arrays, norms, sums, squares):
    rows = arrays[0]
    if sums:
        a, b = (array[...].astype(jnp.float32) for array in arrays)
        rows = sums[0]
        rows[...] = (a + b).astype(rows.dtype)
    norms[...] = block_norms(rows, squares)


def block_norms(rows, squares):
    """The norms of the rows of a block, `(1, rows)`, for use in a kernel; see `squares_scratch`."""

    def add_up_strip(strip, _):
        here = pl.ds(pl.multiple_of(strip * STRIP, STRIP), STRIP)
        totals = [jnp.zeros((STRIP, LANES), jnp.float32) for _ in SCALES]
        for first in range(0, rows.shape[1], LANES):
            part = rows[here, first : first + LANES].astype(jnp.float32)
            totals = [
                total + jnp.square(part * scale)
                for total, scale in zip(totals, SCALES, strict=True)
            ]
        for number, total in enumerate(totals):
            squares[number, here] = total

    lax.fori_loop(0, rows.shape[0] // STRIP, add_up_strip, None)
    return norms_from_sums(
        [jnp.sum(squares[number].T, axis=0, keepdims=True) for number in range(len(SCALES))]
    )


def squares_scratch(block_rows: int):
    """On-chip memory for the sums of the scaled squares of a block, one for each lane."""
    return pltpu.VMEM((len(SCALES), block_rows, LANES), jnp.float32)


def keep_in_hbm(array: chex.Array) -> chex.Array:
    """The array for a kernel; XLA may else copy it whole into on-chip memory."""
    if axes_of(array):  # in shard_map results in the same place have no type
        return array
    return pltpu.with_memory_space_constraint(array, pltpu.HBM)


def hbm_shape(array: chex.Array, arrays: chex.ArrayTree):
    """The type of a result that overwrites an array in HBM; `arrays` as in `shape_like`."""
    if axes_of(array):
        return shape_like(array.shape, array.dtype, arrays)
    return pltpu.HBM(array.shape, array.dtype)
