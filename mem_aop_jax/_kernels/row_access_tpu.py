"""TPU kernels that copy chosen rows of an array, one by one, from HBM into on-chip memory.

One kernel computes any function of gathered rows; another one gathers rows and clears them in their
array. XLA copies a whole array of bfloat16 into on-chip memory before it gathers rows of it. Two
rows of bfloat16 share 32-bit words: they are copied together, and the kernels take them apart.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mem_aop_jax._compat import TPU_COPIES_ROWS, shape_like
from mem_aop_jax._kernels.row_sums_tpu import (
    IN_ORDER,
    SUBLANES,
    fitting_block_rows,
    hbm_shape,
    keep_in_hbm,
)

MAX_CACHED = 2**24  # bytes of a result that XLA may leave on the chip for the operation after it
MAX_INDICES = 2**16  # of rows: scalar memory holds three arrays of so many
ABSENT = 1  # a shift that stands for no row; those of rows are 0 and 16 bits
STAYS, DROPPED = -2, -1  # states of a row; that of a chosen one is its last position in `chosen`


class Operands(NamedTuple):
    """What a kernel reads, by where it finds it.

    Attributes:
      rows: `(rows, features)` float32 or bfloat16, in HBM, from which the kernel copies rows.
      prefetched: int32 arrays in scalar memory. The first, `(k,)`, are the indices of the rows
        to copy, some maybe twice; for a negative one nothing is copied.
      blocked: arrays `(k, any)`; each step of the kernel has a block of `block_rows` of theirs.
      resident: arrays `(any, any)` that stay on the chip in all steps.
    """

    rows: chex.Array
    prefetched: tuple[chex.Array, ...]
    blocked: tuple[chex.Array, ...] = ()
    resident: tuple[chex.Array, ...] = ()


class Arrivals(NamedTuple):
    """On-chip memory for copied rows: two blocks, as one is copied while the other is used."""

    words: chex.Array
    semaphores: chex.Array


def choose_block_rows(rows: int, chosen: int, features: int, dtype, rank: int = 0) -> int | None:
    """How many rows a step of these kernels has on the chip; None if they cannot run.

    Args:
      rows: how many rows the array has (in `replace_product_rows` the result).
      chosen: how many of them are copied.
      features: of a row.
      dtype: of the rows.
      rank: how many directions of the same features are resident.
    """
    if not TPU_COPIES_ROWS or max(rows, chosen) > MAX_INDICES:
        return None
    size = jnp.dtype(dtype).itemsize
    row_bytes = features * (3 * 4 + 2 * size + 2 * 4)  # words, results, products
    resident_bytes = features * 2 * 4 * rank
    sizes = 128, 64, 32, SUBLANES
    return fitting_block_rows(sizes, rows, (features,), dtype, row_bytes, resident_bytes)


def map_gathered_rows(
    function: Callable, operands: Operands, block_rows: int, dtype, copies: int | None = None
) -> chex.Array:
    """A function of gathered rows, computed block by block, `(k, features)`.

    Args:
      function: takes a block of gathered rows, `(block_rows, features)`; `(block_rows, 1)` bool,
        false where the index is negative and the row is anything; and the other operands.
      operands: with `prefetched` the indices alone.
      block_rows: from `choose_block_rows`.
      dtype: of the result.
      copies: how many indices are not negative, for the estimate of the cost; None is all.
    """
    (indices,) = operands.prefetched
    operands = operands._replace(
        prefetched=(_padded(indices, block_rows),),
        blocked=tuple(_padded(array, block_rows) for array in operands.blocked),
    )
    kernel = functools.partial(_map_kernel, function=function)
    (result,) = _call(kernel, operands, block_rows, dtype, copies=copies)
    return result[: len(indices)]


def _map_kernel(prefetched, shifts, others, rows, out, arrivals, *, function):
    words = _copied_words(prefetched[0], rows, arrivals)
    gathered = _unpacked_rows(words, shifts[...], rows.dtype)
    others = (array[...] for array in others)
    out[...] = function(gathered, shifts[...] != ABSENT, *others).astype(out.dtype)


def extract_rows(
    rows: chex.Array, chosen: chex.Array, stay: chex.Array, block_rows: int
) -> tuple[chex.Array, chex.Array]:
    """The chosen rows; and all rows, written in place, with zeros for those that do not stay.

    Args:
      rows: `(rows, features)`, float32 or bfloat16.
      chosen: `(k,)` int32, each one of the rows; some may be the same.
      stay: `(rows,)` bool, false for the chosen ones. Only if it is false for others, too, the
        kernel looks through all rows.
      block_rows: from `choose_block_rows`.
    """
    indices = _padded(chosen, block_rows)
    states = jnp.where(stay, STAYS, DROPPED).astype(jnp.int32)
    states = states.at[indices].max(jnp.arange(len(indices), dtype=jnp.int32))
    any_dropped = jnp.any(states == DROPPED).astype(jnp.int32)[None]
    operands = Operands(rows, (indices, states, any_dropped))
    packed = rows_per_word(rows.dtype)
    scratch = pltpu.VMEM((packed * (block_rows + 1), rows.shape[1]), rows.dtype)
    gathered, rest = _call(
        _extract_kernel, operands, block_rows, rows.dtype, (scratch, pltpu.SemaphoreType.DMA(()))
    )
    return gathered[: len(chosen)], rest


def _extract_kernel(prefetched, shifts, others, rows, out, rest, arrivals, cleared, written):
    """`cleared` holds the words of a block without the chosen rows, and after them words of zeros.

    They are written into `rest`, which is `rows`, while the next block is on its way.
    """
    del others
    indices, states, any_dropped = prefetched
    step, steps = pl.program_id(0), pl.num_programs(0)
    block_rows, packed = len(out), rows_per_word(rows.dtype)
    zeros = packed * block_rows  # where they begin in `cleared`
    words = _copied_words(indices, rows, arrivals)
    out[...] = _unpacked_rows(words, shifts[...], out.dtype)

    def for_each_write(step, act):
        """`act(copy)` once for all rows that share words: for the one that was chosen last."""

        def visit(row, _):
            position = step * block_rows + row
            index = indices[position]
            shared = [states[(index & -packed) + i] for i in range(packed)]
            none_stays = functools.reduce(jnp.minimum, shared) > STAYS
            source = _words_of(cleared, jnp.where(none_stays, zeros, packed * row))
            copy = pltpu.make_async_copy(source, _words_of(rest, index), written)
            pl.when(functools.reduce(jnp.maximum, shared) == position)(lambda: act(copy))

        lax.fori_loop(0, block_rows, visit, None)

    @pl.when(step == 0)
    def _():
        cleared[zeros:] = jnp.zeros((packed, cleared.shape[1]), cleared.dtype)

    pl.when(step > 0)(lambda: for_each_write(step - 1, lambda copy: copy.wait()))
    cleared[:zeros] = pltpu.bitcast(_cleared_words(words, shifts[...], rows.dtype), rows.dtype)
    for_each_write(step, lambda copy: copy.start())

    def copy_now(source, target):
        copy = pltpu.make_async_copy(source, target, written)
        copy.start()
        copy.wait()

    def clear_if_dropped(row, _):
        @pl.when(states[row] == DROPPED)
        def _():
            on_chip, in_hbm = _words_of(cleared, 0), _words_of(rest, row)
            copy_now(in_hbm, on_chip)
            words = pltpu.bitcast(on_chip[...], jnp.int32)
            words = _cleared_words(words, _shifts(row, rows.dtype), rows.dtype)
            on_chip[...] = pltpu.bitcast(words, rows.dtype)
            copy_now(on_chip, in_hbm)

    @pl.when(step + 1 == steps)
    def _():
        for_each_write(step, lambda copy: copy.wait())
        pl.when(any_dropped[0] == 1)(lambda: lax.fori_loop(0, len(states), clear_if_dropped, None))


def _call(kernel, operands, block_rows, dtype, scratch=(), copies=None):
    """Calls a kernel with a step for each `block_rows` of the k indices.

    It takes references to the prefetched arrays, to the shifts of the rows, to a tuple of the
    blocked and resident arrays, to `rows`, to the results, to `Arrivals` and to `scratch`. The
    results are `(k, features)` and, if there is scratch memory, `rows`, changed in place.
    """
    rows, prefetched, blocked, resident = operands
    k, features = len(prefetched[0]), rows.shape[1]
    shifts = _shifts(prefetched[0][:, None], rows.dtype)
    args = prefetched, shifts, (*blocked, *resident), keep_in_hbm(rows)
    arrays = jax.tree.leaves(args)

    def block_spec(array):
        return pl.BlockSpec((block_rows, array.shape[1]), lambda step, *_: (step, 0))

    def whole_spec(array):
        return pl.BlockSpec(array.shape, lambda step, *_: (0, 0))

    hbm_spec = pl.BlockSpec(memory_space=pltpu.HBM)
    gathered = shape_like((k, features), dtype, arrays)
    changed = [hbm_shape(rows, arrays)] if scratch else []
    arrivals = Arrivals(
        pltpu.VMEM((2, rows_per_word(rows.dtype) * block_rows, features), rows.dtype),
        pltpu.SemaphoreType.DMA((2,)),
    )
    copied_bytes = 4 * features * (1 + len(changed)) * (copies or k)
    result_bytes = k * features * jnp.dtype(dtype).itemsize
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(k // block_rows,),
            in_specs=[
                block_spec(shifts),
                (*map(block_spec, blocked), *map(whole_spec, resident)),
                hbm_spec,
            ],
            out_specs=[block_spec(gathered), *(hbm_spec for _ in changed)],
            scratch_shapes=[arrivals, *scratch],
        ),
        out_shape=[gathered, *changed],
        input_output_aliases={len(arrays) - 1: 1} if changed else {},
        cost_estimate=pl.CostEstimate(
            flops=sum(2 * k * array.size for array in resident),
            bytes_accessed=copied_bytes
            + (result_bytes if result_bytes > MAX_CACHED else 0)
            + sum(array.nbytes for array in (shifts, *blocked, *resident)),
            transcendentals=0,
        ),
        compiler_params=IN_ORDER,
    )(*args)


def _copied_words(indices, rows, arrivals):
    """`(block_rows, features)` int32: the words of the rows of this step.

    The words of the next step are on their way from here on.
    """
    step, steps = pl.program_id(0), pl.num_programs(0)
    packed = rows_per_word(rows.dtype)
    block_rows = arrivals.words.shape[1] // packed

    def for_each_copy(step, act):
        def visit(row, _):
            index, slot = indices[step * block_rows + row], step & 1
            target = _words_of(arrivals.words.at[slot], packed * row)
            copy = pltpu.make_async_copy(
                _words_of(rows, index), target, arrivals.semaphores.at[slot]
            )
            pl.when(index >= 0)(lambda: act(copy))

        lax.fori_loop(0, block_rows, visit, None)

    pl.when(step == 0)(lambda: for_each_copy(step, lambda copy: copy.start()))
    pl.when(step + 1 < steps)(lambda: for_each_copy(step + 1, lambda copy: copy.start()))
    for_each_copy(step, lambda copy: copy.wait())
    return pltpu.bitcast(arrivals.words[step & 1], jnp.int32)


def _padded(array, block_rows):
    """The array with its last row repeated, so that its rows are whole blocks."""
    missing = [(0, -len(array) % block_rows)] + [(0, 0)] * (array.ndim - 1)
    return jnp.pad(array, missing, mode="edge")


def rows_per_word(dtype) -> int:
    """How many rows share 32-bit words."""
    return 4 // jnp.dtype(dtype).itemsize


def _words_of(rows, index):
    """A reference to all rows that share the words of a row."""
    packed = rows_per_word(rows.dtype)
    return rows.at[pl.ds(pl.multiple_of(index & -packed, packed), packed)]


def _shifts(indices, dtype):
    """The bits by which the words of rows are shifted to the right for these rows, or `ABSENT`."""
    return jnp.where(indices < 0, ABSENT, 16 * (indices & (rows_per_word(dtype) - 1)))


def _unpacked_rows(words, shifts, dtype):
    """One row of each word."""
    if dtype == jnp.float32:
        return pltpu.bitcast(words, dtype)
    upper = lax.shift_right_logical(words, jnp.broadcast_to(shifts, words.shape)) << 16
    return pltpu.bitcast(upper, jnp.float32).astype(dtype)  # bfloat16 is the upper half of float32


def _cleared_words(words, shifts, dtype):
    """The words with zeros in place of these rows."""
    if dtype == jnp.float32:
        return jnp.zeros_like(words)
    return words & ~(0xFFFF << jnp.broadcast_to(shifts, words.shape))


def product(a: chex.Array, b: chex.Array, precision: lax.Precision) -> chex.Array:
    """A B in float32, for use in a kernel."""
    return lax.dot_general(
        a, b, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
